"""Declared sizes of the pages of a Parquet file, compared with a limit before pyarrow reads them.

The metadata of a file gives a size for each chunk of a column, and pyarrow does not compare it with
the pages: each page has a size of its own, up to 2 GiB, and a batch holds many pages. The header of
a page is a struct of Thrift in its compact protocol.
Format: https://parquet.apache.org/docs/file-format/data-pages/
"""

from __future__ import annotations

import os
from io import BufferedReader
from typing import Any, NamedTuple

from electra_ds.common.decompression import check_expansion

MOST_HEADER = 1 << 16  # bytes of the header of a page, which may hold statistics of long values
DEEPEST = 8  # structs and lists in a header
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
MOST = 2**31 - 1  # of the 32-bit integers of a header
DATA_FIELDS = {0: 5, 3: 8}  # type of a page of values -> field with the number of its values


class PageHeader(NamedTuple):
    """uncompressed, compressed: bytes of the page. values: of the column, 0 in a dictionary."""

    uncompressed: int
    compressed: int
    values: int
    length: int  # bytes of the header


def check_chunk(name: str, content: BufferedReader, chunk: Any) -> int:
    """Return the bytes of a column chunk in memory, which its pages declare.

    name: of the file, in messages. chunk: pyarrow's ColumnChunkMetaData. Leaves the position of the
    content as it was. Raises UserError when they are too many for the compressed bytes, and
    ValueError when the header of a page is malformed.
    """
    position = chunk.data_page_offset
    dictionary = chunk.dictionary_page_offset
    if chunk.has_dictionary_page and dictionary and 0 < dictionary < position:
        position = dictionary
    before = content.tell()
    size = content.seek(0, os.SEEK_END)
    compressed = uncompressed = values = 0
    try:
        while values < chunk.num_values:  # as pyarrow
            content.seek(position)
            header = page_header(content.read(MOST_HEADER))
            position += header.length + header.compressed
            if position > size:
                raise ValueError("a page is not in the file")
            compressed += header.length + header.compressed
            uncompressed += header.uncompressed
            values += header.values
            check_expansion(name, compressed, uncompressed)
    finally:
        content.seek(before)
    check_expansion(name, chunk.total_compressed_size, chunk.total_uncompressed_size)
    return max(uncompressed, chunk.total_uncompressed_size)


def page_header(content: bytes) -> PageHeader:
    """Return the header of a page. content: begins with it. Raises ValueError if it is malformed."""
    reader = _Thrift(content)
    fields = reader.struct(0)
    values: Any = 0
    if (field := DATA_FIELDS.get(fields.get(1, -1))) is not None:
        data = fields.get(field)
        values = data.get(1) if isinstance(data, dict) else None
    uncompressed, compressed = fields.get(2, -1), fields.get(3, -1)
    for number in (uncompressed, compressed, values):
        if not isinstance(number, int) or not 0 <= number <= MOST:
            raise ValueError("the header of a page has no size, or one out of range")
    return PageHeader(uncompressed, compressed, values, reader.position)


class _Thrift:
    """Reader of a struct in the compact protocol of Thrift. Methods raise ValueError."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def struct(self, depth: int) -> dict[int, Any]:
        """Read a struct; return its numbers and structs by the number of their field."""
        fields: dict[int, Any] = {}
        number = 0
        while first := self._byte():
            delta, kind = first >> 4, first & 15
            number = number + delta if delta else self._signed()
            fields[number] = self._value(kind, depth + 1)
        return fields

    def _value(self, kind: int, depth: int, is_element: bool = False) -> Any:
        if depth > DEEPEST:
            raise ValueError(f"the header of a page is nested more than {DEEPEST} deep")
        if kind in (TRUE, FALSE):
            return self._byte() == TRUE if is_element else kind == TRUE
        if kind == STRUCT:
            return self.struct(depth)
        if kind in (I16, I32, I64):
            return self._signed()
        if kind in (LIST, SET):
            return self._list(depth)
        sizes = {BYTE: 1, DOUBLE: 8}
        if kind == BINARY:
            self._skip(self._unsigned())
        elif kind in sizes:
            self._skip(sizes[kind])
        else:
            raise ValueError(f"the header of a page has a value of type {kind}")
        return None

    def _list(self, depth: int) -> None:
        first = self._byte()
        count = first >> 4 if first >> 4 < 15 else self._unsigned()
        for _ in range(count):  # an element takes at least one byte, or the content ends
            self._value(first & 15, depth + 1, is_element=True)

    def _signed(self) -> int:
        number = self._unsigned()
        return number >> 1 ^ -(number & 1)

    def _unsigned(self) -> int:
        number = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise ValueError("the header of a page has a number of more than 64 bits")

    def _byte(self) -> int:
        self._skip(1)
        return self.content[self.position - 1]

    def _skip(self, count: int) -> None:
        self.position += count
        if self.position > len(self.content):
            raise ValueError("the header of a page is not in the file, or longer than expected")
