"""Atomic file writes, file modes and checksums.

An atomic write creates a file under a temporary name, syncs and renames it, and syncs its folder.
"""

import contextlib
import hashlib
import os
import secrets
from pathlib import Path


def fsync_folder(path: str | Path) -> None:
    """Sync a folder to disk. An fsync of a new file does not make its name durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_device(path: Path) -> bool:
    """Return whether a path must not be replaced by a file.

    True for a device, a pipe, a folder, and every path in /dev or /proc (standard streams).
    """
    return str(path).startswith(("/dev/", "/proc/")) or (path.exists() and not path.is_file())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically. A reader finds the old or the new content, also after a power cut.

    A device or a pipe, such as /dev/stdout, is written directly. Raises OSError; if the write
    fails, its `filename` is `path`.
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
    """Write to a device or a pipe. Raises OSError with the path, also for a folder."""
    try:
        with open(path, "wb") as file:
            file.write(data)
    except OSError as error:
        error.filename = str(path)
        raise


def apply_umask(path: str | Path) -> None:
    """Set the mode of a file to 0o666 without the bits of the umask, the mode of a new file.

    Some libraries write files that only the owner can read.
    """
    os.chmod(path, 0o666 & ~_umask())


def _umask() -> int:
    """Return the umask of this process."""
    # os.umask can only be read by changing it, which other threads could see.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def is_lfs_pointer(start: bytes) -> bool:
    """Return whether the first bytes of a file are those of a Git LFS pointer."""
    return start.startswith(b"version https://git-lfs.github.com/")


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of the content of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
