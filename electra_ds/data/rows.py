"""Interfaces of row readers and row orders."""

from typing import Any, Protocol

import numpy as np

from electra_ds.data.shard_format import Manifest


class Rows(Protocol):
    """The rows of one split, by number."""

    manifest: Manifest  # what they mean
    rows: int
    sequence_length: int
    dtype: np.dtype

    def read(self, rows: np.ndarray) -> np.ndarray:
        """[n] row numbers -> [n, S] unsigned."""


class RowOrder(Protocol):
    """Which row is the n-th, endlessly."""

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] positions -> ([n] row numbers, [n] epochs), int64."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must agree on to go on from a position, JSON values."""
