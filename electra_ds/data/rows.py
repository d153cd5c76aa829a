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
        """Return the token ids of [n] row numbers, [n, S] unsigned."""


class RowOrder(Protocol):
    """The endless order of the training rows. Position 0 is the first row of a run."""

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map [n] positions to ([n] row numbers, [n] epochs), int64."""

    def state(self) -> dict[str, Any]:
        """Return the parameters of the order as JSON values.

        A run resumes only from a checkpoint with equal parameters.
        """
