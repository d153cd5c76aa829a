"""Headers of tars that are safe to follow: a bounded amount of memory, and no holes."""

from __future__ import annotations

import tarfile
from typing import NoReturn

MOST_EXTRA = 1 << 20  # bytes of a long name or of extended attributes, which are held in memory
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

    def _refuse_sparse(self, *_: object) -> NoReturn:
        """Refuse a member with holes: its header may ask for any number of zeros."""
        raise tarfile.ReadError("a sparse member; pack the files again without --sparse")

    # Methods of tarfile that read the list of holes, of any size, into memory.
    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse
