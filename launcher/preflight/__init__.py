"""Checks before a run: machine, network, data, shared folder, user code."""
