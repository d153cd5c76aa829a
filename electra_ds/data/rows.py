"""Interfaces of row readers and row orders.

Dimensions: n rows or positions, S sequence.
"""

from typing import Any, Protocol

import numpy as np

from electra_ds.data.shard_format import Manifest


class RowReader(Protocol):
    """Random access to the rows of one split, by row number."""

    manifest: Manifest  # of the data folder
    rows: int
    sequence_length: int
    dtype: np.dtype

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the token ids of [n] row numbers, [n, S] unsigned.

        Raises IndexError for a row number out of range.
        """


class RowOrder(Protocol):
    """The endless order of the training rows. Position 0 is the first row of a run."""

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map [n] positions to ([n] row numbers, [n] epochs), int64."""

    def state(self) -> dict[str, Any]:
        """Return the parameters of the order as JSON values.

        A run resumes only from a checkpoint with equal parameters.
        """


def sort_rows(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (the order that sorts [n] row numbers, the sorted row numbers), int64.

    count: rows of the reader
    Raises IndexError for a number out of range, since numpy would count a negative one from the end.
    """
    rows = np.asarray(rows, np.int64)
    ascending = np.argsort(rows)
    rows = rows[ascending]
    if len(rows) and not (rows[0] >= 0 and rows[-1] < count):
        raise IndexError(f"row numbers {rows[0]}..{rows[-1]}, expected 0..{count - 1}")
    return ascending, rows
