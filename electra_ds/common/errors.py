"""Errors that are printed without a traceback."""


class UserError(ValueError):
    """A mistake that the user can correct. The command line exits with code 2.

    The message names the file, key or rank, the value found, the expected value and what to try.
    """


class RunFailure(RuntimeError):
    """A command cannot continue (a loss that is not finite, a full disk). The exit code is 1.

    The last checkpoint of a run remains valid.
    """


class LockedOut(UserError):
    """Another job holds the lock of the folder, so no error file is written to it."""
