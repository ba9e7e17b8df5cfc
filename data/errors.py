"""The error type of this package."""


class DataError(Exception):
    """Unusable shards, images or captions. The message says what is wrong, where, and what to do."""
