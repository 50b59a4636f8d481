"""The run folder: creation, attempts, log, provenance."""
