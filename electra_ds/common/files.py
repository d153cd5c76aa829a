"""Atomic file writes, opening of regular files, file modes and checksums.

An atomic write creates a file under a temporary name, syncs and renames it, and syncs its folder.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

STREAM = re.compile(r"/dev/(stdin|stdout|stderr|fd/[0-9]+)|/proc/.*")
TEMPORARY = re.compile(r"\.(.+\.)?[0-9a-f]{12}\.tmp")  # name of a temporary file of this package


def fsync_folder(path: str | Path) -> None:
    """Sync a folder to disk. An fsync of a new file does not make its name durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_device(path: Path) -> bool:
    """Return whether an output at a path that the user named must not be replaced by a file.

    True for a device, a pipe, a folder, and a standard stream, which may be a redirected file.
    """
    return bool(STREAM.fullmatch(str(path))) or (path.exists() and not path.is_file())


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises OSError, also for a FIFO, without waiting for its writer.
    """
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 (returned)
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def _open_at_once(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a new file that replaces `path` atomically when the block succeeds.

    A reader finds the old or the new content, also after a power cut. A link or a FIFO at `path` is
    replaced, too; nothing is written through it. Raises OSError, also for a device and a standard
    stream, which are never replaced; its `filename` is `path`, also if the block raised it.
    """
    path = Path(path)
    if STREAM.fullmatch(str(path)) or _is_device_node(path):
        raise OSError(errno.EEXIST, "is a device; expected a file", str(path))
    # A random name, since process numbers repeat across hosts.
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)  # the error of a full disk has none
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _is_device_node(path: Path) -> bool:
    """Return whether a path itself, links not followed, is a device."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically, as `replacing` does. Raises OSError; its `filename` is `path`."""
    with replacing(path) as file:
        file.write(data)


def write_output(path: str | Path, data: bytes) -> None:
    """Write an output that the user named: a device or a pipe directly, else as `write_bytes`.

    For files that the user did not name, such as those of a run folder, use `write_bytes`. Raises
    OSError; its `filename` is `path`.
    """
    path = Path(path)
    if not is_device(path):
        write_bytes(path, data)
        return
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
    """Return the SHA-256 of a regular file, in hexadecimal. Raises OSError for other files."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
