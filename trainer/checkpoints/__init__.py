"""Checkpoints: format, saving, upload, download, retention."""
