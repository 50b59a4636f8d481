"""Shards that lie elsewhere: their addresses, reads over the network, copies on this node."""
