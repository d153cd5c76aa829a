"""Errors that are printed without a traceback."""


class UserError(ValueError):
    """A mistake that the user can correct: exit code 2.

    The message says where (file, key or rank), what was found, what was expected and what to try.
    """


class RunFailure(RuntimeError):
    """A run that cannot continue (a loss that is not finite, a full disk): exit code 1.

    The last checkpoint is good.
    """


class LockedOut(UserError):
    """The folder belongs to another job: nothing may be written there, not even this error."""
