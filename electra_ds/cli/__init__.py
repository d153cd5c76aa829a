"""The command line: one module per group of verbs."""

import contextlib
import errno
import os
import sys
import traceback

# isort: off
# --help lists the verbs in the order of these imports.
from electra_ds.cli import data, train, evaluate, finetune, transfer  # noqa: F401

# isort: on
from electra_ds.cli.console import app, leave
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.printable import printable, printable_lines
from electra_ds.common.redaction import redacted

# Errors of the machine without a file name; other errors without one are of the program.
OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE)
# Errors that a user can correct by another path or other rights.
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

    A UserError becomes one message and exit code 2, a RunFailure one message and exit code 1. An
    OSError that names a file, a full disk and a full memory become one message; the exit code is 2
    for a path that the user can correct, otherwise 1. Any other error keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            # Texts of users have characters that the encoding of the terminal may lack.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        _run()
    except UserError as error:
        leave(2, _message(str(error)))
    except RunFailure as error:
        leave(1, _message(str(error)))
    except OSError as error:
        if error.filename is None and error.errno not in OF_THE_MACHINE:
            leave(1, redacted(printable_lines(traceback.format_exc())))
        leave(2 if error.errno in PATH_ERRORS else 1, _message(_reason(error)))
    except Exception as error:
        if _is_out_of_memory(error):
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            leave(1, _message(f"not enough memory ({first}); `check` shows what a run needs"))
        leave(1, redacted(printable_lines(traceback.format_exc())))


def _run() -> None:
    """Run a verb and write what it printed. OSError when standard output is full."""
    try:
        app()
    except SystemExit:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of a pipe has ended
            leave(1)
        except OSError as error:
            error.filename = "standard output"
            raise error from None
        raise


def _reason(error: OSError) -> str:
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([*names, error.strerror or str(error) or type(error).__name__])


def _message(text: str) -> str:
    """The line that ends a failed command; it names the rank if there are several."""
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")
    rank = f" (rank {printable(os.environ.get('RANK', '?'))})" if several else ""
    return f"electra-ds{rank}: error: {redacted(printable_lines(text))}\n"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an error is that of Python or of torch on a GPU or a CPU for a full memory."""
    is_of_torch = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or is_of_torch or "can't allocate memory" in str(error)
