"""Ranks that exchange values and errors, and write what they got: exchange.py FOLDER."""

import sys
from collections.abc import Callable
from pathlib import Path

from electra_ds.cluster.launchers import find_ranks
from electra_ds.common.errors import LockedOut, RunFailure, UserError
from electra_ds.training.collectives import ControlGroup, destroy_process_groups, on_rank0
from electra_ds.training.engine import start


def raising(error: Exception) -> Callable[[], None]:
    """A function that raises the error."""

    def fail() -> None:
        raise error

    return fail


def main(folder: Path) -> None:
    """Write one line for each exchange into FOLDER/RANK."""
    ranks = find_ranks()
    start(ranks, 2.0)
    text = "x\u00e9"[:0] if ranks.rank == 0 else "xxxxx\u00e9"
    value = {"rank": ranks.rank, "text": text}
    lines = [str(ControlGroup(ranks).all_gather_object(value))]
    lines.append(str(on_rank0(lambda: {"of rank 0": (1, None)})))
    errors = (UserError("wrong"), LockedOut("locked"), OSError("full"), RunFailure("ended"))
    for error in errors:
        try:
            on_rank0(raising(error))
        except Exception as caught:
            lines.append(f"{type(caught).__name__}: {caught}")
    (folder / str(ranks.rank)).write_text("\n".join(lines), encoding="utf-8")
    destroy_process_groups()


main(Path(sys.argv[1]))
