"""Benchmarks of the engine. They are commands; no test depends on a time."""
