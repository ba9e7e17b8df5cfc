"""How a run ends other than well."""


class UserError(Exception):
    """A mistake of the user's: the message says what, where and what to do. Exit code 2, no traceback."""


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved: run the same command again to go on. Exit code 75."""
