"""Errors that are printed without a traceback. Their messages have no secrets of URLs.

A program that uses the Python API may print or log them in any way.
"""

from electra_ds.common.redaction import redacted


class UserError(ValueError):
    """A mistake that the user can correct. The command line exits with code 2.

    The message names the file, key or rank, the value found, the expected value and what to try.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class RunFailure(RuntimeError):
    """A command cannot continue (a loss that is not finite, a full disk). The exit code is 1.

    The last checkpoint of a run remains valid.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class LockedOut(UserError):
    """Another job holds the lock of the folder, so no error file is written to it."""
