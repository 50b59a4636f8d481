"""Benchmarks of the engine: commands, never timed tests."""
