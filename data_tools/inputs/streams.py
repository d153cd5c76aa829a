"""Opening of inputs: local files and URLs, decompressed by the extension of their name."""

from __future__ import annotations

import bz2
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from electra_ds.common.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".tgz", ".tbz2", ".txz")
HEAD = 1 << 16  # bytes from which the format of a file is detected
URL_BUFFER = 1 << 20  # bytes


def open_input(path: str) -> io.BufferedReader:
    """Open a local file, or a URL that fsspec supports, for reading. The result is seekable."""
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    return io.BufferedReader(fsspec.open(path, "rb").open(), URL_BUFFER)


def fingerprint(raw: BinaryIO) -> tuple[int, str]:
    """Return (size in bytes, digest of the first HEAD bytes) of a file; it is left at its start."""
    digest = hashlib.sha256(raw.read(HEAD)).hexdigest()[:16]
    size = raw.seek(0, os.SEEK_END)
    raw.seek(0)
    return size, digest


def content_of(raw: io.BufferedReader, name: str) -> io.BufferedReader:
    """Return the content of an open file, decompressed if `name` has a compressed extension."""
    if Path(name).suffix in COMPRESSED:
        return io.BufferedReader(_Decompressed(raw, name), HEAD)
    return raw


class _Decompressed(io.RawIOBase):
    """The content of a compressed file of one or more streams.

    Reading raises UserError with the file's name when the file is damaged or truncated.
    """

    def __init__(self, raw: io.BufferedReader, name: str) -> None:
        self.raw = raw
        self.name = name
        self.suffix = Path(name).suffix
        self.stream: Any = None  # the decompressor of the current stream
        self.pending = b""  # decompressed bytes that are not yet returned
        self.returned = 0  # bytes of content returned so far

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self.pending and (data := self.raw.read(HEAD)):
                self.pending = b"".join(self._decompress(data))
            if not self.pending and self.stream is not None and not self.stream.eof:
                raise EOFError("the file ends inside its compressed stream")
        except UserError:
            raise
        except Exception as error:  # each decompressor raises its own types
            raise UserError(
                f"{self.name}: broken after byte {self.returned} of its content ({error}); "
                f"expected a whole {self.suffix} file; copy it again or leave it out"
            ) from None
        count = min(len(buffer), len(self.pending))
        buffer[:count] = self.pending[:count]
        self.pending = self.pending[count:]
        self.returned += count
        return count

    def _decompress(self, data: bytes) -> Iterator[bytes]:
        """Decompress bytes of the file, which may end one stream and start the next."""
        while True:
            between_streams = self.stream is None or self.stream.eof
            if between_streams:
                data = data.lstrip(b"\0")  # padding between streams
            if not data:
                return
            if between_streams:
                self.stream = _decompressor(self.suffix)
            yield self.stream.decompress(data)
            data = self.stream.unused_data if self.stream.eof else b""


def _decompressor(suffix: str) -> Any:
    """Return a new decompressor of one stream; UserError when its package is not installed."""
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError(
                "reading .zst needs the zstandard package: pip install zstandard"
            ) from None
        return zstandard.ZstdDecompressor().decompressobj()
    if suffix in (".gz", ".tgz"):
        return zlib.decompressobj(31)  # 31: with the header of gzip
    if suffix in (".bz2", ".tbz2"):
        return bz2.BZ2Decompressor()
    return lzma.LZMADecompressor()
