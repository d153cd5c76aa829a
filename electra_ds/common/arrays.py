"""Helpers for numpy arrays."""

import itertools
from collections.abc import Iterator

import numpy as np


def runs(values: np.ndarray) -> Iterator[tuple[int, slice]]:
    """The stretches of equal values, in order: (value, where)."""
    cuts = np.flatnonzero(values[1:] != values[:-1]) + 1
    for first, last in itertools.pairwise(
        [0, *cuts.tolist(), len(values)][: len(values) + 1]
    ):  # none if empty
        yield int(values[first]), slice(first, last)
