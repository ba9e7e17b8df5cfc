"""Shards in: writing, indexing, ordering and reading them. Knows nothing of `trainer` or `models`."""
