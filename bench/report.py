"""How does a bench speak? Its options, its errors, its tables in markdown. A module, not a bench itself."""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from electra_ds.common.errors import UserError

MARKS = ("floor", "target", "stretch")


def parser_of(doc: str) -> argparse.ArgumentParser:
    """A parser that shows the whole of `doc`, with the option --json."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser


def bench(main: Callable[[], None]) -> None:
    """main(), whose user's mistakes are told without a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def heading(*names: str) -> None:
    """The head of a markdown table."""
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|", flush=True)


def row(*cells: object) -> None:
    """A row of a markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, lowest, highest)."""
    return statistics.median(values), min(values), max(values)


def reached(value: float, goals: Sequence[float]) -> str:
    """The best of MARKS that value reaches."""
    marks = [mark for mark, goal in zip(MARKS, goals, strict=False) if value >= goal]
    return marks[-1] if marks else "BELOW" if goals else ""
