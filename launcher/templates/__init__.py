"""Job and cluster descriptions for other systems, from a run's config."""
