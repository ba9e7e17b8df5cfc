"""Errors that a user of the library can act on."""


class ModelError(Exception):
    """A pipeline, weight file or model setting that cannot be used; the message says which, where and what to do."""
