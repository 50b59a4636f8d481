"""Benchmarks of data loading, run by command and not by tests."""
