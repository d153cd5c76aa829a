"""The command line: one module per group of verbs."""

import os
import traceback

# isort: off
# --help lists the verbs in the order of these imports.
from electra_ds.cli import data, train, evaluate, finetune, transfer  # noqa: F401

# isort: on
from electra_ds.cli.console import app, leave
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.printable import printable_lines
from electra_ds.common.urls import redacted


def main() -> None:
    """Run a verb.

    A UserError becomes one message and exit code 2, a RunFailure one message and exit code 1.
    """
    try:
        app()
    except (UserError, RunFailure) as error:
        rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        message = redacted(printable_lines(str(error)))
        leave(2 if isinstance(error, UserError) else 1, f"electra-ds{rank}: error: {message}\n")
    except Exception:
        leave(1, traceback.format_exc())
