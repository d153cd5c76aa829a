"""Headers of tars that are safe to follow: a bounded amount of memory and time, and no holes."""

from __future__ import annotations

import re
import tarfile
from typing import Any, NoReturn

MOST_EXTRA = 1 << 20  # bytes of a long name or of extended attributes, which are held in memory
MOST_GLOBAL = 1 << 16  # bytes of the attributes of all members, which tarfile copies for each one
MOST_IN_A_ROW = 16  # extended headers before a member; tarfile calls itself for each one
RECORD = re.compile(rb"(\d{1,7}) ")  # the length of an attribute
# Before 3.11.10, tarfile searches the attributes in a time quadratic in the length of a number.
LONG_NUMBER = re.compile(rb"\d{256}")
EXTRA_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class TarHeader(tarfile.TarInfo):
    """A tar header that raises ReadError if it is damaged, or if tarfile would hold a large part of
    the archive in memory; tarfile would end the archive at a damaged header."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> TarHeader:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            is_end_mark = len(buf) == tarfile.BLOCKSIZE and not buf.strip(b"\0")
            if is_end_mark:
                raise
            raise tarfile.ReadError(str(error)) from None
        if header.size < 0 or (header.type in EXTRA_TYPES and header.size > MOST_EXTRA):
            raise tarfile.ReadError(
                f"a name or attributes of {header.size:,} bytes; at most {MOST_EXTRA:,} are read"
            )
        return header

    def _proc_member(self, tar: Any) -> Any:
        """Read the member of this header. Called by tarfile, again for each extended header."""
        is_extra = self.type in EXTRA_TYPES
        tar.extra_headers = getattr(tar, "extra_headers", 0) + 1 if is_extra else 0
        if tar.extra_headers > MOST_IN_A_ROW:
            raise tarfile.ReadError(f"more than {MOST_IN_A_ROW} extended headers in a row")
        return super()._proc_member(tar)  # type: ignore[misc]

    def _proc_pax(self, tar: Any) -> Any:
        """Read extended attributes, and the member after them."""
        if self.type == tarfile.XGLTYPE:
            tar.global_bytes = getattr(tar, "global_bytes", 0) + self.size
            if tar.global_bytes > MOST_GLOBAL:
                raise tarfile.ReadError(
                    f"attributes of all members of {tar.global_bytes:,} bytes; at most "
                    f"{MOST_GLOBAL:,} are read"
                )
        stream = tar.fileobj
        content = stream.read(self._block(self.size))  # type: ignore[attr-defined]
        _check_attributes(content, self.size)
        tar.fileobj = _Replayed(content, stream)
        try:
            return super()._proc_pax(tar)  # type: ignore[misc]
        finally:
            tar.fileobj = stream

    def _refuse_sparse(self, *_: object) -> NoReturn:
        """Refuse a member with holes: its header may ask for any number of zeros."""
        raise tarfile.ReadError("a sparse member; pack the files again without --sparse")

    # Methods of tarfile that read the list of holes, of any size, into memory.
    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


class _Replayed:
    """A stream of which a part, that was read already, is returned once more."""

    def __init__(self, content: bytes, stream: Any) -> None:
        self._content: bytes | None = content
        self._stream = stream

    def read(self, size: int) -> bytes:
        content, self._content = self._content, None
        return self._stream.read(size) if content is None else content

    def tell(self) -> int:
        return self._stream.tell()


def _check_attributes(content: bytes, size: int) -> None:
    """Raise ReadError unless `content` has attributes of the lengths that it declares.

    tarfile takes records that overlap, so that each of them could be as long as all.
    content: the blocks of the attributes. size: bytes of them, without the padding.
    """
    position = 0
    while position < size and (length := RECORD.match(content, position)):
        end = position + int(length[1])
        record = content[length.end() : end]
        if end > size or b"=" not in record or not record.endswith(b"\n"):
            break
        position = end
    if position < size or content[size:].strip(b"\0") or LONG_NUMBER.search(content):
        raise tarfile.ReadError("damaged attributes")
