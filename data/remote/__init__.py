"""Remote shards: addresses, reads over the network, copies on this node."""
