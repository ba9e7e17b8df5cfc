"""How a run ends other than well."""


class UserError(Exception):
    """A mistake of the user's: the message says what, where and what to do. Exit code 2, no traceback."""


class RankError(UserError):
    """What only one process may have met (a damaged file of its own): it says so itself, whichever rank it is."""


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved: run the same command again to go on. Exit code 75."""


class NodeTrouble(Exception):
    """A node that does not answer or cannot compute, while others can: not the user's mistake, and worth another try
    without it. One line, exit code 1. speaks: whether this process is the one that says it."""

    def __init__(self, message: str, speaks: bool = True):
        super().__init__(message)
        self.speaks = speaks
