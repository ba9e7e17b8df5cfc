"""The one error that a user of the data can act on."""


class DataError(Exception):
    """Shards, images or captions that cannot be used: the message says what is wrong, where, and what to do."""
