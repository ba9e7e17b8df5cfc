"""Shards in: writing, indexing, ordering, reading. Knows nothing of `trainer` or `models`."""
