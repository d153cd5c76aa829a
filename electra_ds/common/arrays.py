"""Runs of equal values, and safe parsing of .npy files."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable

NPY_MOST = 1 << 14  # bytes, largest header of an .npy file
# Header of an array of numbers, as numpy writes it. numpy's own reader parses any Python literal.
NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|]\w{1,8})', 'fortran_order': (True|False), "
    rb"'shape': \((\d{1,18}(?:, \d{1,18}){0,7},?)\), \}\s*"
)


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
    """Return the array in the content of an .npy file, read-only. Nothing is unpickled.

    path: the file, for messages. what: the expected content, for messages.
    dtype, shape: the expected ones, compared before memory is allocated.
    Raises UserError when header, dtype, shape or number of bytes differ.
    """
    expected = f"{what}, {dtype}{list(shape)}; copy the data again or prepare it again"
    size_of_header = int.from_bytes(content[8:10], "little")
    header = NPY_HEADER.fullmatch(content[10 : 10 + size_of_header])
    if not content.startswith(b"\x93NUMPY\x01\x00") or header is None:
        start = printable(repr(content[:16]))
        raise UserError(
            f"{printable(path)}: not an .npy file (it begins with {start}); expected {expected}"
        )
    found_dtype = header[1].decode()
    found_shape = tuple(map(int, header[3].replace(b",", b" ").split()))
    in_c_order = header[2] == b"False" or len(shape) == 1
    if (found_dtype, found_shape) != (dtype.str, shape) or not in_c_order:
        raise UserError(
            f"{printable(path)}: found {found_dtype}{list(found_shape)}; expected {expected}"
        )
    values = memoryview(content)[10 + size_of_header :]
    size = int(np.prod(shape)) * dtype.itemsize
    if len(values) != size:
        raise UserError(
            f"{printable(path)}: found {len(values)} bytes of values, which is not {size}; "
            f"expected {expected}"
        )
    return np.frombuffer(values, dtype).reshape(shape)
