"""Shards of captioned images: writing, indexing, shuffling and reading them. Imports neither `trainer` nor `models`."""
