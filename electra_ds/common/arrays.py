"""Helpers for numpy arrays."""

import itertools
from collections.abc import Iterator

import numpy as np


def runs(values: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Yield (value, slice) for each run of equal values of a vector [n], in order."""
    if not len(values):
        return
    cuts = np.flatnonzero(values[1:] != values[:-1]) + 1
    for first, last in itertools.pairwise([0, *cuts.tolist(), len(values)]):
        yield int(values[first]), slice(first, last)
