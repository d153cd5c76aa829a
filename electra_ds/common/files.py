"""Atomic file writes, JSON files, file systems behind URLs.

A file is written under a temporary name, synced, and renamed; then its folder is synced.
"""

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from electra_ds.common.errors import UserError


def file_system(place: str) -> tuple[Any, str]:
    """The file system of a folder or of a URL that fsspec knows, and the path there.

    UserError when fsspec knows no such URL, or lacks a package for it.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{place}: {error}; expected a folder, or a URL of one "
            "(http, s3: pip install 'electra_ds[remote]')"
        ) from None


def fsync_folder(path: str | Path) -> None:
    """Make the names inside a folder durable. POSIX needs this beside the fsync of the files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically: a reader sees the old file or the new one, also after a power cut.

    An OSError carries the path.
    """
    path = Path(path)
    # A random name, since process numbers repeat across hosts.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
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


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline; atomic as `write_bytes`."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: str | Path, what: str, kinds: type | tuple[type, ...] = dict) -> Any:
    """Read a JSON object, or another of `kinds`.

    what: the expected content, for the UserError of a file that is missing, broken or another.
    """
    try:
        content = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: not found; expected {what}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; expected {what}") from None
    return parse_json(content, path, what, kinds)


def parse_json(
    content: bytes, path: str | Path, what: str, kinds: type | tuple[type, ...] = dict
) -> Any:
    """Like `read_json`, for content that was read already. path: a file or URL, for messages."""
    try:
        value = json.loads(content.decode())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); expected {what}") from None
    if not isinstance(value, kinds):
        raise UserError(
            f"{path}: found a JSON {type(value).__name__}; expected {what}, a JSON object"
        )
    return value


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
