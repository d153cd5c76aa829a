"""Options, error messages and markdown tables shared by the benches. Not a bench itself."""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from electra_ds.common.errors import UserError

GOAL_NAMES = ("floor", "target", "stretch")


def make_parser(description: str, has_json: bool = True) -> argparse.ArgumentParser:
    """A parser; its --help prints the whole description. has_json: adds the option --json."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if has_json:
        parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    return parser


def run_main(main: Callable[[], None]) -> None:
    """Call main(). A UserError is printed without a traceback; the exit code is then 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def print_heading(*names: str) -> None:
    """Print the head of a markdown table."""
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|", flush=True)


def print_row(*cells: object) -> None:
    """Print a row of a markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def median_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, smallest, largest)."""
    return statistics.median(values), min(values), max(values)


def best_goal(value: float, goals: Sequence[float]) -> str:
    """The name of the highest goal that the value reaches, "BELOW" for none, "" without goals.

    goals: ascending, in the order of GOAL_NAMES; the last ones may be missing.
    """
    if not goals:
        return ""
    reached = [name for name, goal in zip(GOAL_NAMES, goals, strict=False) if value >= goal]
    return reached[-1] if reached else "BELOW"
