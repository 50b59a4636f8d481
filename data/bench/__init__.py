"""Benchmarks of the data: commands, never timed tests."""
