"""Errors that are printed without a traceback."""


class UserError(ValueError):
    """A mistake that the user can correct: exit code 2.

    The message names the place (file, key or rank), the value there, the expected value and what to
    try.
    """


class RunFailure(RuntimeError):
    """A run that cannot continue (a loss that is not finite, a full disk): exit code 1.

    The last checkpoint is good.
    """


class LockedOut(UserError):
    """The folder belongs to another job: nothing may be written there, not even this error."""
