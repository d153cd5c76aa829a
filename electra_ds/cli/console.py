"""The command line application, tables on the terminal, and exit codes."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import typer
import typer.core

from electra_ds.common.errors import UserError
from electra_ds.common.printable import json_text, printable, printable_lines
from electra_ds.common.redaction import redacted
from electra_ds.common.urls import check_local

TEXTS = ("text", "original")  # parameters with texts, which may be empty
PIPE_WIDTH = 160  # columns of a table that goes to a file or a pipe


@contextlib.contextmanager
def _redacted_usage() -> Iterator[None]:
    """Remove the secrets of URLs from the errors of arguments, which click prints."""
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):
            error.message = redacted(message)  # type: ignore[attr-defined]
        raise


class Verbs(typer.core.TyperGroup):
    """The group of all verbs."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb. An EOFError keeps its traceback; click would print "Aborted!" only."""
        try:
            with _redacted_usage():
                return super().invoke(ctx)
        except EOFError as error:
            raise RuntimeError("unexpected end of a file") from error


class Verb(typer.core.TyperCommand):
    """A verb.

    It refuses empty values, which would be the current folder in the place of a path, and URLs in
    the place of a local path.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the verb; UserError for an empty one, and for a URL as a path."""
        with _redacted_usage():
            given, *_ = self.make_parser(ctx).parse_args(args=list(args))
        hints = get_type_hints(self.callback) if self.callback else {}
        paths = {name for name, hint in hints.items() if Path in (hint, *get_args(hint))}
        for parameter in self.get_params(ctx):
            value = given.get(parameter.name)
            values = value if isinstance(value, (list, tuple)) else [value]
            if "" in values and parameter.name not in TEXTS:
                raise UserError(
                    f"{_shown_name(parameter)} is an empty string, as an unset variable in a shell "
                    "gives; expected a value"
                )
            if parameter.name in paths:
                for text in values:
                    if isinstance(text, str):
                        check_local(text, _shown_name(parameter))
        with _redacted_usage():
            return super().parse_args(ctx, args)


def _shown_name(parameter: Any) -> str:
    """The name of an option or an argument in messages."""
    if parameter.opts[0].startswith("-"):
        return max(parameter.opts, key=len)
    return (getattr(parameter, "metavar", None) or parameter.opts[0].upper()).rstrip(".")


class App(typer.Typer):
    """An application of verbs."""

    def command(self, name: str | None = None, **options: Any) -> Any:
        """Register a function as a `Verb`; as `typer.Typer.command`."""
        return super().command(name, **{"cls": Verb, **options})


app = App(
    name="electra-ds",
    cls=Verbs,
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

    cells = [[printable_lines(cell) for cell in row] for row in rows]
    titles = list(head) or [""] * max(map(len, cells), default=0)
    # The default overflow, "ellipsis", cuts long words, and the ends of lines of wide characters.
    table = Table(*(Column(name, overflow="fold") for name in titles), show_header=bool(head))
    for row in cells:
        table.add_row(*row)
    # emoji: otherwise ":smile:" in a text would be shown as a picture
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    console.print(f"\n{printable(title)}", table, sep="\n")


def print_json(value: Any, indent: int | None = None) -> None:
    """Print a value as JSON, without characters that a terminal interprets."""
    text = json_text(value, indent)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        text = json.dumps(value, indent=indent)  # only ASCII
    print(text)


def progress_line(what: str) -> Callable[[int, int], None]:
    """A function that shows (number done, number of all) on the terminal, in one line.

    Without a terminal as standard error it shows nothing.
    """
    shown_at = 0.0

    def show(done: int, total: int) -> None:
        nonlocal shown_at
        now, is_last = time.monotonic(), done >= total
        if now - shown_at > 0.2 or is_last:
            shown_at = now
            text = f"{what}: {min(done, total):,} of {total:,}"
            print(f"\r\x1b[K{'' if is_last else text}", end="", file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else lambda done, total: None


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
