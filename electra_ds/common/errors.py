"""The errors a user is meant to read; they are printed without a traceback."""


class UserError(ValueError):
    """A mistake the user can mend: exit code 2.

    The message says where (file, key or rank), what was found, what was expected and what to try.
    """


class RunFailure(RuntimeError):
    """A run that cannot go on (a loss that is not finite, a full disk): exit code 1, the last checkpoint is good."""


class LockedOut(UserError):
    """OUT is another attempt's: nothing may be written there, not even this error."""
