"""`gigabatch data pack`: shards written from tables, or from other shards."""
