"""The command line application, tables on the terminal, and exit codes."""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, NoReturn

import typer

PIPE_WIDTH = 160  # columns of a table that goes to a file or a pipe

app = typer.Typer(
    name="electra-ds",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"electra-ds {version('electra_ds')}")
        except PackageNotFoundError:  # a checkout on PYTHONPATH
            print("electra-ds, not installed")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Pretrain text encoders by replaced token detection (ELECTRA) on DeepSpeed."""


def print_table(title: str, head: Sequence[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table over the terminal's whole width; long cells continue on the next line.

    head: titles of the columns; if it is empty, the table has no header.
    """
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(*(Column(name, overflow="fold") for name in head), show_header=bool(head))
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    console.print(f"\n{title}", table, sep="\n")


def leave(code: int, error: str = "") -> NoReturn:
    """Print an error and end the process with this exit code.

    An ordinary exit could hang or change the exit code, because threads of gloo or NCCL may wait
    for ranks that have ended, or abort after the work is done.
    """
    for stream, text in ((sys.stdout, ""), (sys.stderr, error)):
        with contextlib.suppress(OSError):  # the other end of the stream may be closed
            print(text, end="", file=stream, flush=True)
    mpi = sys.modules.get("mpi4py.MPI")
    if code in (1, 2) and mpi:  # otherwise srun leaves the other ranks waiting
        time.sleep(1)  # a launcher that aborts may drop what was printed just before
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)
