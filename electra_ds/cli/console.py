"""The command line application, tables on the terminal, and exit codes."""

import contextlib
import os
import sys
import time
from collections.abc import Iterable
from typing import NoReturn

import typer

app = typer.Typer(
    name="electra-ds",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def root() -> None:
    """Pretrain text encoders by replaced token detection (ELECTRA) on DeepSpeed."""


def print_table(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(*(Column(name, overflow="fold") for name in head), show_header=bool(head))
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(f"\n{title}", table, sep="\n")


def leave(code: int, last_words: str = "") -> NoReturn:
    # Threads of gloo or NCCL may wait for ranks that are gone, or abort after all work is done: an ordinary exit would
    # hang on them or lie about the code.
    for stream, text in ((sys.stdout, ""), (sys.stderr, last_words)):
        with contextlib.suppress(OSError):  # whoever read them may be gone
            print(text, end="", file=stream, flush=True)
    if code in (1, 2) and (
        mpi := sys.modules.get("mpi4py.MPI")
    ):  # or srun leaves the other ranks waiting
        time.sleep(1)  # a launcher that is told to abort may drop what was printed just before
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)
