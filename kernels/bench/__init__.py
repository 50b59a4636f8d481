"""Benchmarks of the engine. They are commands; no test depends on measured times."""
