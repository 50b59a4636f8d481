"""Metrics of embeddings and rankings: functions of tensors, without files or settings."""
