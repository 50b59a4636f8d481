"""`gigabatch data pack`: write WebDataset shards from tables or from other shards."""
