"""What a run reads: index, order, reader, decoding, tokens, stream, and the demo set."""
