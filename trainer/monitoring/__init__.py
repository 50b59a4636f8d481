"""Metrics, progress, counters, slow ranks and the hang watchdog."""
