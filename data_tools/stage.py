"""Copy of a data folder to a node's own disk or to an object store; the manifest is written last.

A file is held in memory between reading and writing, and its sha256 is checked there. A damaged or
truncated file is therefore never written.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from fsspec.implementations.local import LocalFileSystem

from data_tools.workers import Progress, ignore_progress
from electra_ds.common.errors import LockedOut, RunFailure, UserError
from electra_ds.common.files import write_bytes
from electra_ds.common.folder_lock import Lock
from electra_ds.common.json_files import MAX_BYTES, read_small
from electra_ds.common.names import check_inside
from electra_ds.common.outputs import check_output_folder
from electra_ds.common.own_folder import remove_temporary_files
from electra_ds.common.printable import printable, shortened
from electra_ds.common.redaction import redacted, without_secrets_of
from electra_ds.common.urls import file_system, read_bounded, what_to_check
from electra_ds.data.data_tokenizer import load_data_tokenizer
from electra_ds.data.shard_format import (
    MANIFEST,
    Manifest,
    index_bytes,
    index_file,
    parse_manifest,
    parse_unigrams,
    unigrams_bytes,
)

# Files beside those of the manifest that a copy in progress, or the root of a disk, may have.
UNIMPORTANT = {"manifest.json", "lock", "heartbeat.json", "lost+found"}


class File(NamedTuple):
    """A file of a data folder. is_small: whether it is read again to see if a copy is complete."""

    name: str
    sha256: str
    bytes: int
    is_small: bool = False


class Location:
    """A local folder, or a folder at a URL.

    name:   as given, without secrets, for messages
    folder: path of a local folder, None for a URL
    advice: what a user can check when a URL fails
    """

    def __init__(self, given: str) -> None:
        self._given = given
        self.name = printable(redacted(given.rstrip("/")))
        self._system, root = file_system(given)
        self._root = root.rstrip("/")
        self.folder = Path(root) if isinstance(self._system, LocalFileSystem) else None
        self.advice = "" if self.folder else f"; {what_to_check(given)}"

    @contextmanager
    def _run_failures(self, name: str) -> Iterator[None]:
        """Turn errors of a file system into RunFailure."""
        try:
            yield
        except (UserError, RunFailure):
            raise
        except Exception as error:  # each file system raises its own types
            raise RunFailure(
                f"{self.name}/{name}: {without_secrets_of(self._given, str(error)) or type(error).__name__}"
                f"{self.advice}; the same command resumes from what is copied"
            ) from error

    def read(self, name: str, limit: int = MAX_BYTES) -> bytes | None:
        """Return the content of a file, None if it does not exist.

        Raises UserError when it has more than `limit` bytes, RunFailure for other errors.
        """
        content = None
        with self._run_failures(name), suppress(FileNotFoundError, NotADirectoryError):
            if self.folder is not None:
                try:
                    (self.folder / name).stat()
                except (FileNotFoundError, NotADirectoryError):
                    return None
                except OSError:  # explained by read_small
                    pass
                return read_small(self.folder / name, "a file of a data folder", limit)
            try:
                content = read_bounded(self._system, f"{self._root}/{name}", limit)
            except ValueError as error:
                raise UserError(
                    f"{self.name}/{name}: {error}; expected a file of a data folder"
                ) from None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a file; atomic in a local folder, at a URL if its file system supports that.

        Raises RunFailure when it cannot be written, UserError when a link leads out of the folder.
        """
        with self._run_failures(name):
            if self.folder is None:
                self._system.pipe_file(f"{self._root}/{name}", content)
            else:
                path = self.folder / name
                check_inside(path.parent, self.folder, self.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, content)

    def holds(self, file: File) -> bool:
        """Whether a file of this name exists and has the size of the manifest; links do not."""
        holds = False
        with self._run_failures(file.name), suppress(FileNotFoundError, NotADirectoryError):
            if self.folder is not None:
                status = (self.folder / file.name).lstat()
                return stat.S_ISREG(status.st_mode) and status.st_size == file.bytes
            holds = self._system.size(f"{self._root}/{file.name}") == file.bytes
        return holds

    def entries(self, folder: str = "") -> set[str]:
        """Return the names in the folder, or in a folder of it; none if it does not exist."""
        names: list[str] = []
        with self._run_failures(folder), suppress(FileNotFoundError, NotADirectoryError):
            if self.folder is not None:
                names = os.listdir(self.folder / folder)
            else:
                places = self._system.ls(f"{self._root}/{folder}".rstrip("/"), detail=False)
                names = [place.rstrip("/").rpartition("/")[2] for place in places]
        return set(names)


def stage(source: str, to: str, *, workers: int = 4, progress: Progress = ignore_progress) -> int:
    """Copy the data folder `source` to `to`; return the number of bytes copied.

    source, to: local folders or URLs; http can only be read
    workers:    number of threads, each with one file in memory
    progress:   receives ("copy", bytes of shards done, bytes of all shards)
    A complete copy is left as it is: it has the same manifest, tokenizer, token counts and indexes,
    and shards of the sizes of the manifest. In an incomplete one, existing files are read again and
    kept if they have the sha256 of the manifest; at a URL, shards are kept if they have the right
    size. If several processes have the same local target, one copies and the others wait until the
    copy is complete. If that process dies, another one continues.
    Raises UserError when `source` is damaged or is no data folder, and when `to` holds other data
    or other files; RunFailure when a file cannot be read or written, and when the target has too
    little space.
    """
    origin = Location(source)
    target = Location(to)
    content = origin.read("manifest.json")
    if content is None:
        if origin.folder and origin.folder.is_file():
            raise UserError(f"{origin.name}: is a file; expected a data folder")
        raise UserError(
            f"{origin.name}/manifest.json: not found; expected {MANIFEST}{origin.advice}"
        )
    manifest = parse_manifest(content, f"{origin.name}/manifest.json")
    files = [*_small_files(origin, manifest), *_shards(manifest)]
    with ThreadPoolExecutor(workers) as threads:
        complete = partial(_is_complete, origin, target, content, files, threads)
        if complete():
            return 0
        if target.folder:
            check_output_folder(target.folder, "--to")
        while not complete():
            # LockedOut: another process is copying; check again.
            with suppress(LockedOut), _lock(target, complete):
                if not complete():
                    copied = _copy(origin, target, files, threads, progress)
                    target.write("manifest.json", content)
                    if target.folder:
                        (target.folder / "heartbeat.json").unlink(missing_ok=True)
                    return copied
    return 0


def _small_files(origin: Location, manifest: Manifest) -> list[File]:
    """Read the files of a data folder except the shards; return them.

    Raises UserError when one is missing or is not that of the manifest.
    """
    tokenizer = manifest.tokenizer
    limits = dict.fromkeys(tokenizer.files, MAX_BYTES)
    limits["unigrams.npy"] = unigrams_bytes(tokenizer.vocab_size)
    sha256s = {}
    for split, info in manifest.splits.items():
        limits[index_file(split)] = index_bytes(sum(manifest.blocks(split)))
        sha256s[index_file(split)] = info.index_sha256
    contents = {name: _read_whole(origin, name, limit) for name, limit in limits.items()}
    files = []
    for name, content in contents.items():
        file = File(name, sha256(content).hexdigest(), len(content), is_small=True)
        if file.sha256 != sha256s.get(name, file.sha256):
            raise _damaged_file(origin, name, "its sha256 differs from that in the manifest")
        files.append(file)
    parse_unigrams(
        contents["unigrams.npy"],
        f"{origin.name}/unigrams.npy",
        tokenizer.vocab_size,
        manifest.unigrams_sha256,
    )
    with TemporaryDirectory(prefix="electra_ds-") as folder:
        (Path(folder) / "tokenizer").mkdir()
        for name in tokenizer.files:
            (Path(folder) / name).write_bytes(contents[name])
        try:
            load_data_tokenizer(folder, tokenizer)
        except UserError as error:
            raise UserError(str(error).replace(folder, origin.name)) from None
    return files


def _shards(manifest: Manifest) -> list[File]:
    """Return the shards of a data folder. The manifest has only names of this format."""
    return [
        File(shard.file, shard.sha256, shard.bytes)
        for split in manifest.splits.values()
        for shard in split.shards
    ]


def _read_whole(origin: Location, name: str, limit: int) -> bytes:
    """Read a file of the data folder that is copied; UserError when it does not exist."""
    content = origin.read(name, limit)
    if content is None:
        raise _damaged_file(origin, name, "missing")
    return content


def _damaged_file(origin: Location, name: str, problem: str) -> UserError:
    """Return the error for a damaged file of the data folder that is copied."""
    return UserError(
        f"{origin.name}/{name}: damaged ({problem}); copy this file there again, or prepare the "
        "data again"
    )


def _is_complete(
    origin: Location, target: Location, manifest: bytes, files: list[File], threads: Executor
) -> bool:
    """Whether the target has this manifest and all files; UserError when it holds other data."""
    present = target.read("manifest.json")
    if present is None:
        _check_target(target, files)
        return False
    if present != manifest:
        raise UserError(
            f"{target.name}: holds other data than {origin.name}; give another folder, or empty it"
        )

    def is_held(file: File) -> bool:
        return target.holds(file) and (not file.is_small or _is_whole(target, file))

    return all(threads.map(is_held, files))


def _check_target(target: Location, files: list[File]) -> None:
    """Raise UserError when the target has other files than those of an unfinished copy."""
    present = target.entries()
    if "prepare.json" in present:
        raise UserError(
            f"{target.name}: holds an unfinished `prepare`; give another folder, or finish that "
            "`prepare` first"
        )
    names = {file.name for file in files}
    other = present - UNIMPORTANT - {name.partition("/")[0] for name in names}
    if target.folder:
        for folder in ("shards", "tokenizer"):
            inside = {f"{folder}/{name}" for name in target.entries(folder) if name[0] != "."}
            other |= inside - names
    if other := {name for name in other if not name.startswith(".")}:
        raise UserError(
            f"{target.name}: holds {shortened(min(other))}, which is no file of this data folder; "
            "give a new or empty folder"
        )


def _lock(target: Location, complete: Callable[[], bool]) -> AbstractContextManager:
    """Return the lock of a local target, or an empty context for a URL.

    Waiting for the lock also ends, without the lock, when another process has completed the copy.
    """
    if target.folder is None:
        return nullcontext()
    return Lock(target.folder, lambda take: complete() or take())


def _copy(
    origin: Location, target: Location, files: list[File], threads: Executor, progress: Progress
) -> int:
    """Copy the missing files; return their bytes.

    Raises RunFailure when the disk has too little free space for the shards.
    """
    if target.folder:
        for names in ((), ("shards",), ("tokenizer",)):  # the folders with files of a copy
            remove_temporary_files(target.folder, *names)
        _check_free_space(target, target.folder, files)
    copied = 0
    done = 0
    total = sum(file.bytes for file in files if not file.is_small)
    sizes = threads.map(partial(_copy_file, origin, target), files)
    for file, size in zip(files, sizes, strict=True):
        copied += size
        done += 0 if file.is_small else file.bytes
        progress("copy", done, total)
    return copied


def _check_free_space(target: Location, folder: Path, files: list[File]) -> None:
    """Raise RunFailure when the missing shards do not fit."""
    needed = sum(file.bytes for file in files if not file.is_small and not target.holds(file))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunFailure(
            f"{target.name}: {needed:,} bytes of shards are missing here and {free:,} are free; "
            "make room, or give another folder"
        )


def _copy_file(origin: Location, target: Location, file: File) -> int:
    """Copy one file unless the target has it; return the bytes copied."""
    is_trusted = target.folder is None and not file.is_small
    if target.holds(file) and (is_trusted or _is_whole(target, file)):
        return 0
    content = _read_whole(origin, file.name, file.bytes)
    if sha256(content).hexdigest() != file.sha256:
        raise _damaged_file(origin, file.name, "its sha256 differs from that in the manifest")
    target.write(file.name, content)
    return len(content)


def _is_whole(target: Location, file: File) -> bool:
    """Whether a file of the target has the content of the manifest."""
    content = target.read(file.name, file.bytes)
    return content is not None and sha256(content).hexdigest() == file.sha256
