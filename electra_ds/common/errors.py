"""Errors that are printed without a traceback."""


class UserError(ValueError):
    """A mistake that the user can correct. The command line exits with code 2.

    The message names the file, key or rank, the value found, the expected value and what to try.
    """


class RunFailure(RuntimeError):
    """A run cannot continue (a loss that is not finite, a full disk). The exit code is 1.

    The last checkpoint is valid.
    """


class LockedOut(UserError):
    """Another job has the lock of the folder. No error file is written to the folder."""
