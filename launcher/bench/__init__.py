"""Benchmarks that start runs: faults, objectives, data reading."""
