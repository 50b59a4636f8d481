"""Training: config, towers, objectives, the exact step, checkpoints, evaluation."""
