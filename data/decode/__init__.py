"""Decoding: bytes of a sample's members -> tensors, and their collation into micro-batches."""
