"""Evaluation of a run's towers: the tasks of `gigabatch eval`, and retrieval while training."""
