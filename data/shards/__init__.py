"""WebDataset shards: tar members, index, reader, filtered views."""
