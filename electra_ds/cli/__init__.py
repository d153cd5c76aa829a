"""The command line: one module per group of verbs."""

import errno
import os
import traceback
from typing import NoReturn

# isort: off
# --help lists the verbs in the order of these imports.
from electra_ds.cli import data, train, evaluate, finetune, transfer  # noqa: F401

# isort: on
from electra_ds.cli.console import app, leave
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.printable import printable, printable_lines
from electra_ds.common.urls import redacted

# Errors of the system that a user can correct by another path or other rights.
PATH_ERRORS = (
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


def main() -> None:
    """Run a verb.

    A UserError becomes one message and exit code 2, a RunFailure one message and exit code 1, an
    error of the system (a path, a full disk) one message and either code.
    """
    try:
        app()
    except (UserError, RunFailure) as error:
        _leave_with(2 if isinstance(error, UserError) else 1, str(error))
    except OSError as error:
        _leave_with(2 if error.errno in PATH_ERRORS else 1, _described(error))
    except Exception as error:
        if _is_out_of_memory(error):
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            _leave_with(1, f"not enough memory ({first}); `check` shows what a run needs")
        leave(1, printable_lines(traceback.format_exc()))


def _leave_with(code: int, message: str) -> NoReturn:
    size = os.environ.get("WORLD_SIZE", "1")
    rank = f" (rank {printable(os.environ.get('RANK', '?'))})" if size != "1" else ""
    leave(code, f"electra-ds{rank}: error: {redacted(printable_lines(message))}\n")


def _described(error: OSError) -> str:
    """The message of an error of the system. Some have no number or no file."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an error is that of Python or of torch on a GPU or a CPU for a full memory."""
    is_of_torch = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or is_of_torch or "can't allocate memory" in str(error)
