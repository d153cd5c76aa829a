"""Opening of inputs: local files and URLs."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from typing import BinaryIO

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable
from electra_ds.common.urls import file_system, is_url

HEAD = 1 << 16  # bytes from which the format of a file is detected
URL_BUFFER = 1 << 20  # bytes


def open_input(path: str) -> io.BufferedReader:
    """Open a local file, or a URL of a known protocol, for reading. The result is seekable.

    Raises UserError for a pipe or a device; their content cannot be read twice.
    """
    if is_url(path):
        system, place = file_system(path)
        return io.BufferedReader(system.open(place, "rb"), URL_BUFFER)
    # Opening a FIFO would wait for a writer.
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115 (returned)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{printable(path)}: not a regular file; expected a file or a folder")
    return file


def fingerprint(raw: BinaryIO) -> tuple[int, str]:
    """Return (size in bytes, digest of the first HEAD bytes) of a file; it is left at its start."""
    digest = hashlib.sha256(raw.read(HEAD)).hexdigest()[:16]
    size = raw.seek(0, os.SEEK_END)
    raw.seek(0)
    return size, digest
