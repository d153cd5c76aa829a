"""Atomic file writes and checksums.

A file is written under a temporary name, synced, and renamed; then its folder is synced.
"""

import contextlib
import hashlib
import os
import secrets
from pathlib import Path


def fsync_folder(path: str | Path) -> None:
    """Sync a folder to disk. POSIX requires this for new names, besides the fsync of the files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_device(path: Path) -> bool:
    """Whether a path is a device, a pipe or a standard stream, which is not replaced by a file."""
    return str(path).startswith(("/dev/", "/proc/")) or (path.exists() and not path.is_file())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically. A reader finds the old or the new content, also after a power cut.

    A device or a pipe, such as /dev/stdout, is written as it is. Raises OSError; its `filename` is
    `path`.
    """
    path = Path(path)
    if is_device(path):
        _write_through(path, data)
        return
    # A random name, since process numbers repeat across hosts.
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)  # the error of a full disk has none
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def _write_through(path: Path, data: bytes) -> None:
    """Write into a device or a pipe. OSError with its path for a folder and a full device."""
    try:
        with open(path, "wb") as file:
            file.write(data)
    except OSError as error:
        error.filename = str(path)
        raise


def apply_umask(path: str | Path) -> None:
    """Give a file the mode of a new file: readable and writable, without the bits of the umask.

    Some libraries write files that only the owner can read.
    """
    os.chmod(path, 0o666 & ~_umask())


def _umask() -> int:
    """The umask of this process."""
    # Reading it by os.umask would change it for other threads for a moment.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def is_lfs_pointer(start: bytes) -> bool:
    """Whether the first bytes of a file are those of a Git LFS pointer, not of the file itself."""
    return start.startswith(b"version https://git-lfs.github.com/")


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
