"""Copy of a data folder to a node's own disk or to an object store; the manifest is written last.

A file is held in memory between reading and writing, and its sha256 is checked there. A damaged or
truncated file is therefore never written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from fsspec.implementations.local import LocalFileSystem

from data_tools.workers import Progress, ignore_progress
from electra_ds.common.errors import LockedOut, RunFailure, UserError
from electra_ds.common.files import write_bytes
from electra_ds.common.folder_lock import Lock
from electra_ds.common.urls import file_system
from electra_ds.data.shard_format import MANIFEST, Manifest, index_file, parse_manifest


class File(NamedTuple):
    """A file of a data folder; sha256 and bytes are None if the manifest does not contain them."""

    name: str
    sha256: str | None = None
    bytes: int | None = None


class Location:
    """A local folder, or a folder at a URL that fsspec supports.

    name:   as given, for messages
    folder: path of a local folder, None for a URL
    """

    def __init__(self, given: str) -> None:
        self.name = given.rstrip("/")
        self._system, root = file_system(given)
        self._root = root.rstrip("/")
        self.folder = Path(root) if isinstance(self._system, LocalFileSystem) else None

    @contextmanager
    def _run_failures(self, name: str) -> Iterator[None]:
        """Turn errors of a file system into RunFailure."""
        try:
            yield
        except Exception as error:  # each file system raises its own types
            raise RunFailure(
                f"{self.name}/{name}: {error or type(error).__name__}; the same command resumes "
                "from what is copied"
            ) from error

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, None if it does not exist. RunFailure for other errors."""
        content = None
        with self._run_failures(name), suppress(FileNotFoundError, NotADirectoryError):
            content = self._system.cat_file(f"{self._root}/{name}")
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a file; atomic in a local folder, at a URL if its file system supports that.

        Raises RunFailure when it cannot be written.
        """
        with self._run_failures(name):
            if self.folder is None:
                self._system.pipe_file(f"{self._root}/{name}", content)
            else:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(self.folder / name, content)

    def holds(self, file: File) -> bool:
        """Whether a file of this name exists and has the size of the manifest, if that is known."""
        holds = False
        with self._run_failures(file.name), suppress(FileNotFoundError):
            size = self._system.size(f"{self._root}/{file.name}")
            holds = file.bytes is None or size == file.bytes
        return holds


def stage(source: str, to: str, *, workers: int = 4, progress: Progress = ignore_progress) -> int:
    """Copy the data folder `source` to `to`; return the number of bytes copied.

    source, to: local folders or URLs; http can only be read
    workers:    number of threads, each with one file in memory
    progress:   receives ("copy", bytes of shards done, bytes of all shards)
    A complete copy (by its manifest and the sizes of its files) is left as it is. In an incomplete
    one, existing files are read again and kept if they have the sha256 of the manifest; at a URL
    they are kept if they have the right size. If several processes have the same local target, one
    copies and the others wait until the copy is complete. If that process dies, another one
    continues.
    Raises UserError when `source` is damaged or is no data folder, and when `to` holds other data;
    RunFailure when a file cannot be read or written, and when the target has too little space.
    """
    origin = Location(source)
    target = Location(to)
    content = origin.read("manifest.json")
    if content is None:
        raise UserError(f"{source}/manifest.json: not found; expected {MANIFEST}")
    files = _files(parse_manifest(content, source))
    with ThreadPoolExecutor(workers) as threads:
        complete = partial(_is_complete, origin, target, content, files, threads)
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


def _files(manifest: Manifest) -> list[File]:
    """Return all files of a data folder except the manifest."""
    files = [File("unigrams.npy"), *map(File, manifest.tokenizer.files)]
    for name, split in manifest.splits.items():
        files.append(File(index_file(name), split.index_sha256))
        files += [File(shard.file, shard.sha256, shard.bytes) for shard in split.shards]
    return files


def _is_complete(
    origin: Location, target: Location, manifest: bytes, files: list[File], threads: Executor
) -> bool:
    """Whether the target has this manifest and all files; UserError when it holds other data."""
    present = target.read("manifest.json")
    if present is None:
        if target.holds(File("prepare.json")):
            raise UserError(
                f"{target.name}: holds an unfinished `prepare`; give another folder, or finish "
                "that `prepare` first"
            )
        return False
    if present != manifest:
        raise UserError(
            f"{target.name}: holds other data than {origin.name}; give another folder, or empty it"
        )
    return all(threads.map(target.holds, files))


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
        _remove_temporary_files(target.folder)
        _check_free_space(target, target.folder, files)
    copied = 0
    done = 0
    total = sum(file.bytes or 0 for file in files)
    sizes = threads.map(partial(_copy_file, origin, target), files)
    for file, size in zip(files, sizes, strict=True):
        copied += size
        done += file.bytes or 0
        progress("copy", done, total)
    return copied


def _remove_temporary_files(folder: Path) -> None:
    """Remove the files that a killed copy left."""
    for temporary in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        temporary.unlink(missing_ok=True)  # the heartbeat thread may rename its own file meanwhile


def _check_free_space(target: Location, folder: Path, files: list[File]) -> None:
    """Raise RunFailure when the missing shards do not fit."""
    needed = sum(file.bytes or 0 for file in files if not target.holds(file))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunFailure(
            f"{target.name}: {needed:,} bytes of shards are missing here and {free:,} are free; "
            "make room, or give another folder"
        )


def _copy_file(origin: Location, target: Location, file: File) -> int:
    """Copy one file unless the target has it; return the bytes copied."""
    if target.holds(file) and (target.folder is None or _is_whole(target.read(file.name), file)):
        return 0
    content = origin.read(file.name)
    if content is None or not _is_whole(content, file):
        problem = "missing" if content is None else "its sha256 differs from that in the manifest"
        raise UserError(
            f"{origin.name}/{file.name}: damaged ({problem}); copy this file there again, or "
            "prepare the data again"
        )
    target.write(file.name, content)
    return len(content)


def _is_whole(content: bytes | None, file: File) -> bool:
    """Whether the content exists and has the sha256 of the manifest, if that is known."""
    return content is not None and file.sha256 in (None, sha256(content).hexdigest())
