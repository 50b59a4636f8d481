"""The run folder: creation, contents, attempts, log, provenance."""
