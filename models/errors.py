"""The error type of this package."""


class ModelError(Exception):
    """An unusable pipeline, weight file or model setting. The message says what is wrong, where, and what to do."""
