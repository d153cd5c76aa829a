"""Decompression with a limit: a compressed file may not grow by more than a factor.

Files come from other people, and a few bytes may stand for any number. Memory holds about AT_ONCE
bytes of a content, whatever the file declares.
"""

from __future__ import annotations

import bz2
import io
import lzma
import os
import zlib
from pathlib import Path
from typing import Any, Protocol

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable, shortened

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".tgz", ".tbz2", ".txz")
INPUT = 1 << 16  # bytes that are read from a compressed file at a time
AT_ONCE = 1 << 20  # most decompressed bytes in memory
# zstandard has no limit of the output of one call. A block of 4 bytes gives at most 128 KiB.
ZSTD_INPUT = 1 << 10
DICTIONARY = 1 << 28  # bytes, most memory of an .xz decompressor; `xz -9` needs 65 MiB
# A file may grow by this factor; smaller contents than FREE are never refused.
EXPANSION = 1000
FREE = 1 << 28  # bytes
EXPANSION_VARIABLE = "ELECTRA_DS_MAX_EXPANSION"


class Expansion:
    """The bytes that the compressed members of an archive became, all of them together."""

    def __init__(self, name: str, size: int) -> None:
        """name, size: of the archive on disk"""
        self.name = name
        self.size = size
        self.content = 0

    def add(self, count: int) -> None:
        """Count bytes of content. Raises UserError when they are too many for the archive."""
        self.content += count
        check_expansion(self.name, self.size, self.content)


def content_of(
    raw: io.BufferedReader, name: str, archive: Expansion | None = None
) -> io.BufferedReader:
    """Return the content of an open file, decompressed if `name` has a compressed extension.

    archive: counts the content of a member of an archive
    """
    if Path(name).suffix in COMPRESSED:
        return io.BufferedReader(_Decompressed(raw, name, archive), INPUT)
    return raw


def check_expansion(name: str, compressed: int, content: int) -> None:
    """Raise UserError when `compressed` bytes of a file became too many bytes of content."""
    most = max(FREE, max_expansion() * compressed)
    if content > most:
        raise UserError(
            f"{printable(name)}: {compressed:,} compressed bytes have a content of more than "
            f"{most:,} bytes; expected at most {max_expansion():,} times as many, as text has; if "
            f"the file is what you expect, set {EXPANSION_VARIABLE} to a larger factor"
        )


def max_expansion() -> int:
    """Return the factor by which compressed files may grow, from the environment if set there."""
    text = os.environ.get(EXPANSION_VARIABLE, str(EXPANSION))
    if not text.isascii() or not text.isdecimal() or not 1 <= len(text) <= 12 or int(text) < 1:
        raise UserError(
            f"{EXPANSION_VARIABLE} = {shortened(text)}; expected an integer of 1 to 12 digits"
        )
    return int(text)


class _Decompressor(Protocol):
    """A decompressor of one stream. No call returns much more than AT_ONCE bytes."""

    @property
    def eof(self) -> bool:
        """Whether the stream has ended."""

    @property
    def unused_data(self) -> bytes:
        """Input after the end of the stream."""

    @property
    def needs_input(self) -> bool:
        """Whether no output is left without more input."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Decompress more input, b"" for the output that is left of earlier input."""


class _Decompressed(io.RawIOBase):
    """The content of a compressed file of one or more streams.

    Reading raises UserError with the file's name when the file is damaged, truncated, or has a
    content that is too large for its size. Memory holds about AT_ONCE bytes of the content.
    """

    def __init__(self, raw: io.BufferedReader, name: str, archive: Expansion | None = None) -> None:
        self.raw = raw
        self.archive = archive
        self.name = name
        self.suffix = Path(name).suffix
        self.stream: _Decompressor | None = None  # the decompressor of the current stream
        self.unread = b""  # input between streams
        self.pending = memoryview(b"")  # decompressed bytes that are not yet returned
        self.consumed = 0  # bytes read from the file
        self.returned = 0  # bytes of content returned so far

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self.pending and self._advance():
                pass
        except UserError:
            raise
        except Exception as error:  # each decompressor raises its own types
            raise UserError(
                f"{printable(self.name)}: broken after byte {self.returned} of its content "
                f"({printable(str(error))}); expected a whole {self.suffix} file; copy it again or "
                "leave it out"
            ) from None
        count = min(len(buffer), len(self.pending))
        buffer[:count] = self.pending[:count]
        self.pending = self.pending[count:]
        self.returned += count
        return count

    def _advance(self) -> bool:
        """Decompress a part of the file into `pending`, which is empty; False at its end."""
        data = b""
        is_at_end = False
        if self.stream is None or self.stream.eof:
            data = self._next_stream()
            if not data:
                return False
            self.stream = _decompressor(self.suffix)
        elif self.stream.needs_input:
            data = self._read()
            is_at_end = not data
        self.pending = memoryview(self.stream.decompress(data, AT_ONCE))
        if self.stream.eof:
            self.unread = self.stream.unused_data
        elif is_at_end and not self.pending:
            raise EOFError("the file ends inside its compressed stream")
        check_expansion(self.name, self.consumed, self.returned + len(self.pending))
        if self.archive:
            self.archive.add(len(self.pending))
        return True

    def _next_stream(self) -> bytes:
        """Return the first input of the next stream, without the padding before it."""
        data = self.unread.lstrip(b"\0")
        self.unread = b""
        while not data and (read := self._read()):
            data = read.lstrip(b"\0")
        return data

    def _read(self) -> bytes:
        data = self.raw.read(INPUT)
        self.consumed += len(data)
        return data


class _Gzip:
    """A stream of gzip."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(31)  # 31: with the header of gzip

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._stream.unconsumed_tail

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._stream.decompress(self._stream.unconsumed_tail + data, max_length)


class _Zstandard:
    """A frame of zstandard. Input is passed on in small parts, which bounds the output."""

    def __init__(self) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(
                "reading .zst needs the zstandard package: pip install zstandard"
            ) from None
        self._stream = zstandard.ZstdDecompressor().decompressobj()
        self._input = memoryview(b"")

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data + self._input.tobytes()

    @property
    def needs_input(self) -> bool:
        return not self._input

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if data:
            self._input = memoryview(data)
        parts: list[bytes] = []
        while self._input and not self._stream.eof and sum(map(len, parts)) < max_length:
            parts.append(self._stream.decompress(self._input[:ZSTD_INPUT]))
            self._input = self._input[ZSTD_INPUT:]
        return b"".join(parts)


def _decompressor(suffix: str) -> _Decompressor:
    """Return a new decompressor of one stream; UserError when its package is not installed."""
    if suffix == ".zst":
        return _Zstandard()
    if suffix in (".gz", ".tgz"):
        return _Gzip()
    if suffix in (".bz2", ".tbz2"):
        return bz2.BZ2Decompressor()
    return lzma.LZMADecompressor(memlimit=DICTIONARY)
