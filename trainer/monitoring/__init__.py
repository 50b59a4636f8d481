"""Metrics, progress, throughput counters, stragglers and the hang watchdog."""
