"""How is an input opened? Local files and URLs alike, decompressed by name, tars without a silent end."""

from __future__ import annotations

import bz2
import hashlib
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from electra_ds.common.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".tgz", ".tbz2", ".txz")
HEAD = 1 << 16  # bytes in which the format of a file shows


def open_input(path: str) -> io.BufferedReader:
    """A file, or a URL of any kind that fsspec knows, for reading; seekable."""
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    return io.BufferedReader(fsspec.open(path, "rb").open(), 1 << 20)


def fingerprint(raw: BinaryIO) -> tuple[int, str]:
    """(bytes, digest of the first HEAD of them) of an open file, which is left at its beginning."""
    digest = hashlib.sha256(raw.read(HEAD)).hexdigest()[:16]
    size = raw.seek(0, os.SEEK_END)
    raw.seek(0)
    return size, digest


def content_of(raw: BinaryIO, name: str) -> BinaryIO:
    """What an open file holds, decompressed if its name says that it is compressed."""
    compressed = Path(name).suffix in COMPRESSED
    return io.BufferedReader(_Decompressed(raw, name), HEAD) if compressed else raw


class _Decompressed(io.RawIOBase):
    """The content of a compressed file of one or more streams; UserError when it is damaged or not whole."""

    def __init__(self, raw: BinaryIO, name: str) -> None:
        self.raw, self.name, self.suffix = raw, name, Path(name).suffix
        self.stream: Any = None
        self.held, self.given = b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        try:
            while not self.held and (data := self.raw.read(HEAD)):
                self.held = b"".join(self._decompress(data))
            if not self.held and self.stream is not None and not self.stream.eof:
                raise EOFError("the file ends inside its compressed stream")
        except UserError:
            raise
        except Exception as error:  # each decompressor has errors of its own
            raise UserError(
                f"{self.name}: broken after byte {self.given} of its content ({error}); expected a whole "
                f"{self.suffix} file; copy it again or leave it out"
            ) from None
        count = min(len(buffer), len(self.held))
        buffer[:count], self.held = self.held[:count], self.held[count:]
        self.given += count
        return count

    def _decompress(self, data: bytes) -> Iterator[bytes]:
        while (
            data := data if self.stream is not None and not self.stream.eof else data.lstrip(b"\0")
        ):  # padding
            if self.stream is None or self.stream.eof:
                self.stream = _decompressor(self.suffix)
            yield self.stream.decompress(data)
            data = self.stream.unused_data if self.stream.eof else b""


def _decompressor(suffix: str) -> Any:
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError(
                "reading .zst needs the zstandard package: pip install zstandard"
            ) from None
        return zstandard.ZstdDecompressor().decompressobj()
    if suffix in (".gz", ".tgz"):
        return zlib.decompressobj(31)
    return bz2.BZ2Decompressor() if suffix in (".bz2", ".tbz2") else lzma.LZMADecompressor()


class TarMember(tarfile.TarInfo):
    """A header of a tar. Where tarfile takes a damaged or missing one for the end, this is an error."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not buf.strip(b"\0"):  # the end of an archive
                raise
            raise tarfile.ReadError(str(error)) from None
