"""Checks before a run: machine, network, data, copies of checkpoints."""
