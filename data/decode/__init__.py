"""Decoding of sample members to tensors, and their collation."""
