"""Evaluations, sharded over ranks."""
