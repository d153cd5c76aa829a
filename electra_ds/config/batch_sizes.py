"""Rows of the global batches of a run as a function of the attempt, and their split over ranks.

An attempt is an applied or a skipped step. The sizes depend on the number of attempts, so the rows
that a run has consumed follow from that number, whatever is skipped.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence

from electra_ds.common.errors import UserError

Entry = Sequence[int]  # [attempts before the first batch of this size, rows]


def check_schedule(schedule: Sequence[Entry], most_steps: int, most_rows: int) -> None:
    """Check the entries of train.batch_schedule.

    most_steps, most_rows: largest values of an entry.
    Raises ValueError with the entry that is wrong and what was expected.
    """
    last = 0
    for entry in schedule:
        shown = f"batch_schedule has the entry {list(entry)}"
        if len(entry) != 2:
            raise ValueError(f"{shown}; expected [step, rows], such as [1000, 512]")
        step, rows = entry
        if not 1 <= step <= most_steps or not 1 <= rows <= most_rows:
            raise ValueError(
                f"{shown}; expected a step from 1 to {most_steps:,} and from 1 to {most_rows:,} "
                "rows (the first steps have global_batch_size rows)"
            )
        if step <= last:
            raise ValueError(
                f"{shown} after the step {last}; expected ascending steps, each of them once"
            )
        last = step


class BatchSizes:
    """The rows of the global batch of each attempt.

    first: rows of the first attempts (train.global_batch_size).
    schedule: [step, rows] with ascending steps: after `step` attempts, each one has `rows` rows
        (train.batch_schedule).
    """

    def __init__(self, first: int, schedule: Sequence[Entry] = ()) -> None:
        self.starts = [0, *(step for step, _ in schedule)]  # attempts before each size
        self.sizes = [first, *(rows for _, rows in schedule)]
        self._rows_before = [0]  # rows before each of the starts
        for index in range(1, len(self.starts)):
            steps = self.starts[index] - self.starts[index - 1]
            self._rows_before.append(self._rows_before[-1] + steps * self.sizes[index - 1])

    def rows(self, attempt: int) -> int:
        """Return the rows of the global batch after `attempt` attempts."""
        return self.sizes[self._index(attempt)]

    def rows_before(self, attempt: int) -> int:
        """Return the rows of the first `attempt` attempts of a run that begins at attempt 0."""
        index = self._index(attempt)
        return self._rows_before[index] + (attempt - self.starts[index]) * self.sizes[index]

    def rows_between(self, first: int, attempt: int) -> int:
        """Return the rows of the attempts from `first` to `attempt` - 1."""
        return self.rows_before(attempt) - self.rows_before(first)

    def nearest_attempt(self, rows: float) -> int:
        """Return the number of attempts, at least 1, with about as many rows in all.

        It is rounded to the nearest number; a half is rounded to the even number.
        """
        index = bisect_right(self._rows_before, rows) - 1
        left = rows - self._rows_before[index]
        return max(1, self.starts[index] + round(left / self.sizes[index]))

    def _index(self, attempt: int) -> int:
        return bisect_right(self.starts, attempt) - 1


def accumulations(sizes: BatchSizes, micro_batch_size: int, world_size: int) -> list[int]:
    """Return the micro-batches per step and rank, for each of the sizes.

    Raises UserError with the field of the first size that is not divisible by world_size *
    micro_batch_size.
    """
    per_micro = world_size * micro_batch_size
    for start, rows in zip(sizes.starts, sizes.sizes, strict=True):
        if rows % per_micro:
            key = f"[{start}, {rows}] of train.batch_schedule:" if start else ""
            raise UserError(_message(key, rows, sizes.sizes, micro_batch_size, world_size))
    return [rows // per_micro for rows in sizes.sizes]


def _message(key: str, rows: int, sizes: list[int], micro_batch_size: int, world_size: int) -> str:
    """The message for a batch that the ranks cannot split.

    key: the entry of the batch schedule; "" for train.global_batch_size.
    """
    batch = f"{key} {rows} rows" if key else f"train.global_batch_size = {rows} rows"
    if rows % world_size:
        return (
            f"{batch} cannot be split over {world_size} ranks; choose a number of ranks that "
            "divides it"
        )
    # All sizes have the same micro-batches. A size that the ranks do not divide is reported next.
    share = math.gcd(*(size // world_size for size in sizes if size % world_size == 0))
    fits = max(m for m in range(1, min(share, micro_batch_size) + 1) if share % m == 0)
    return (
        f"{batch} cannot be split over {world_size} ranks x micro_batch_size {micro_batch_size}; "
        f"the largest micro_batch_size that fits is {fits} (--set train.micro_batch_size={fits})"
    )
