"""Captions, tokenizers and text corpora."""
