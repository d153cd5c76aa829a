"""Declared sizes of Arrow IPC messages, compared with a limit before pyarrow asks for memory.

A compressed buffer begins with its uncompressed size, which pyarrow allocates at once. A message's
metadata is a flatbuffer. Format: https://arrow.apache.org/docs/format/Columnar.html
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from io import BufferedReader

from electra_ds.common.decompression import check_expansion

CONTINUATION = 0xFFFFFFFF
FOOTER_END = 10  # bytes: int32 size of the footer, "ARROW1"
DICTIONARY_BATCH, RECORD_BATCH = 2, 3  # of the enumeration MessageHeader
ROW_BYTES = 8  # counted for a row, since a column of missing values has no buffer


class Table:
    """A table of a flatbuffer. Reading outside of the content raises struct.error."""

    def __init__(self, content: bytes, position: int) -> None:
        self.content = content
        self.position = position
        self.fields = position - self._number("<i", position)  # of its vtable
        if self.fields < 0:
            raise struct.error("a table outside of its flatbuffer")

    @classmethod
    def root(cls, content: bytes) -> Table:
        """Return the root table of a flatbuffer."""
        return cls(content, *struct.unpack_from("<I", content))

    def number(self, field: int, kind: str) -> int:
        """Return a number, 0 without one. kind: its format for struct."""
        place = self._place(field)
        return self._number(kind, place) if place else 0

    def table(self, field: int) -> Table | None:
        """Return a table inside of this one, None without one."""
        place = self._place(field)
        return Table(self.content, place + self._number("<I", place)) if place else None

    def structs(self, field: int, kind: str) -> Iterator[tuple[int, ...]]:
        """Return the structs of a vector, none without one. kind: their format for struct."""
        place = self._place(field)
        if not place:
            return iter(())
        start = place + self._number("<I", place)
        size = self._number("<I", start) * struct.calcsize(kind)
        part = memoryview(self.content)[start + 4 : start + 4 + size]
        if len(part) != size:
            raise struct.error("a vector outside of its flatbuffer")
        return struct.iter_unpack(kind, part)

    def _place(self, field: int) -> int:
        """Return the position of a field, 0 if the table does not have it."""
        entry = 4 + 2 * field
        if entry + 2 > self._number("<H", self.fields):
            return 0
        offset = self._number("<H", self.fields + entry)
        return self.position + offset if offset else 0

    def _number(self, kind: str, position: int) -> int:
        return struct.unpack_from(kind, self.content, position)[0]


class DeclaredSizes:
    """The sizes that the messages of an Arrow file or stream declare.

    Methods raise UserError when a message would need too much memory, and ValueError when it is
    malformed. They leave the position of the content as it was.
    """

    def __init__(self, name: str, content: BufferedReader) -> None:
        """name: of the file, in messages"""
        self.name = name
        self.content = content
        position = content.tell()
        self.size = content.seek(0, os.SEEK_END)
        content.seek(position)

    def batches(self) -> list[int]:
        """Check the dictionaries of a file; return the positions of its record batches."""
        with _Restored(self.content):
            self.content.seek(max(0, self.size - FOOTER_END))
            (length,) = struct.unpack_from("<i", self.content.read(FOOTER_END))
            footer = Table.root(self._read(self.size - FOOTER_END - length, length))
            dictionaries = [offset for offset, *_ in footer.structs(2, "<qi4xq")]
            positions = [offset for offset, *_ in footer.structs(3, "<qi4xq")]
            for position in dictionaries:
                self._check_message(position)
        return positions

    def check_batch(self, position: int) -> None:
        """Check the record batch of a file at this position."""
        with _Restored(self.content):
            self._check_message(position)

    def check_next(self) -> None:
        """Check the messages of a stream up to its next record batch, or to its end."""
        with _Restored(self.content):
            position = self.content.tell()
            kind = 0
            while kind != RECORD_BATCH and position < self.size:
                kind, position = self._check_message(position)

    def check_stream(self) -> None:
        """Check all messages of a stream."""
        with _Restored(self.content):
            position = self.content.tell()
            while position < self.size:
                _, position = self._check_message(position)

    def _check_message(self, position: int) -> tuple[int, int]:
        """Check the message at a position; return (kind, position after it)."""
        mark, length = struct.unpack("<II", self._read(position, 8))
        start = position + 8
        if mark != CONTINUATION:  # before version 0.15 of Arrow there was no mark
            length, start = mark, position + 4
        if not length:  # the end of a stream
            return 0, self.size
        message = Table.root(self._read(start, length))
        body = start + length
        body_size = message.number(3, "<q")
        if not 0 <= body_size <= self.size - body:
            raise ValueError(f"a message of {body_size:,} bytes is not in the file")
        kind = message.number(1, "<B")
        batch = message.table(2)
        if batch and kind == DICTIONARY_BATCH:
            batch = batch.table(1)
        if batch and kind in (DICTIONARY_BATCH, RECORD_BATCH):
            expanded = self._expanded(batch, body, body_size)
            check_expansion(self.name, length + body_size, expanded)
        return kind, body + body_size

    def _expanded(self, batch: Table, body: int, body_size: int) -> int:
        """Return the bytes of memory that a record batch declares."""
        is_compressed = batch.table(3) is not None
        lengths = [batch.number(0, "<q"), *(length for length, _ in batch.structs(1, "<qq"))]
        total = ROW_BYTES * max(lengths)
        for offset, length in batch.structs(2, "<qq"):
            if not 0 <= offset <= offset + length <= body_size:
                raise ValueError("a buffer is not in its message")
            if is_compressed and length >= 8:
                (declared,) = struct.unpack("<q", self._read(body + offset, 8))
                if declared < -1:  # -1: not compressed
                    raise ValueError(f"a buffer of {declared:,} bytes")
                length = length if declared == -1 else declared
            total += length
        return total

    def _read(self, position: int, length: int) -> bytes:
        if not 0 <= position <= position + length <= self.size:
            raise ValueError("a message is not in the file")
        self.content.seek(position)
        return self.content.read(length)


class _Restored:
    """Context that restores the position of a file, and raises struct.error as ValueError."""

    def __init__(self, content: BufferedReader) -> None:
        self.content = content
        self.position = content.tell()

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.content.seek(self.position)
        if isinstance(error, struct.error):
            raise ValueError(f"malformed metadata ({error})") from None
