"""Helpers for numpy arrays."""

import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable

NPY_MOST = 1 << 14  # bytes, most before the values of an .npy file


def runs(values: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Yield (value, slice) for each run of equal values of a vector [n], in order."""
    if not len(values):
        return
    cuts = np.flatnonzero(values[1:] != values[:-1]) + 1
    for first, last in itertools.pairwise([0, *cuts.tolist(), len(values)]):
        yield int(values[first]), slice(first, last)


def parse_npy(
    content: bytes, path: str | Path, what: str, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    """Return the array in the content of an .npy file, read-only; nothing is unpickled.

    path: the file, for messages. what: the expected content. dtype, shape: the expected ones; they
        are compared before memory is asked for.
    """
    expected = f"{what}, {dtype}{list(shape)}; copy the data again or prepare it again"
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version} of the format")
        found_shape, in_fortran_order, found_dtype = np.lib.format.read_array_header_1_0(file)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        problem = str(error).partition("\n")[0]
        raise UserError(
            f"{printable(path)}: not readable ({printable(problem)}); expected {expected}"
        ) from None
    if (found_dtype, found_shape) != (dtype, shape) or (in_fortran_order and len(shape) > 1):
        raise UserError(
            f"{printable(path)}: found {found_dtype}{list(found_shape)}; expected {expected}"
        )
    values = memoryview(content)[file.tell() :]
    size = int(np.prod(shape)) * dtype.itemsize
    if len(values) != size:
        raise UserError(
            f"{printable(path)}: found {len(values)} bytes of values, which is not {size}; "
            f"expected {expected}"
        )
    return np.frombuffer(values, dtype).reshape(shape)
