"""Training data: shards and their index, sample order, decoding, tokens, stream, demo set."""
