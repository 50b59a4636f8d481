"""What a run does: config, towers, objectives, the exact step, checkpoints, evaluation."""
