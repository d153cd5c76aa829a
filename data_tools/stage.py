"""How does a data folder get onto a node's own disk, or to an object store? Checked on the way, the manifest last.

A file stands in memory between reading and writing, so what is damaged or cut short is never written.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from fsspec.implementations.local import LocalFileSystem

from data_tools.workers import Progress
from electra_ds.common.errors import LockedOut, RunFailure, UserError
from electra_ds.common.files import file_system, parse_json, write_bytes
from electra_ds.common.folder_lock import Lock
from electra_ds.data.shard_format import MANIFEST, Manifest, check_manifest, index_file


class File(NamedTuple):
    """What the manifest says of a file; None where it says nothing."""

    name: str
    sha256: str | None = None
    bytes: int | None = None


class Place:
    """A local folder, or a URL that fsspec knows; `folder` is the local one, else None."""

    def __init__(self, given: str) -> None:
        self.name = given.rstrip("/")
        self._system, root = file_system(given)
        self._root = root.rstrip("/")
        self.folder = Path(root) if isinstance(self._system, LocalFileSystem) else None

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each file system has errors of its own
            raise RunFailure(
                f"{self.name}/{name}: {error or type(error).__name__}; the same command goes on from what "
                f"is copied"
            ) from error

    def read(self, name: str) -> bytes | None:
        """The content of a file; None: it is not there."""
        with self._told(name), suppress(FileNotFoundError, NotADirectoryError):
            return self._system.cat_file(f"{self._root}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all (at a URL as far as its file system promises that)."""
        with self._told(name):
            if self.folder is None:
                self._system.pipe_file(f"{self._root}/{name}", content)
            else:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(self.folder / name, content)

    def holds(self, file: File) -> bool:
        """Is a file of this name and size there?"""
        with self._told(file.name), suppress(FileNotFoundError):
            return (
                self._system.size(f"{self._root}/{file.name}") == file.bytes or file.bytes is None
            )
        return False


def stage(
    source: str, to: str, *, workers: int = 4, progress: Progress = lambda stage, done, total: None
) -> int:
    """Copy the data folder `source`, checked on the way; returns the number of bytes that were copied.

    source, to: local folders or URLs; http can only be read
    workers:    threads, each with a shard in memory
    progress:   hears ("copy", bytes of shards done, of all)
    A copy that is complete, by its manifest and the sizes of its files, is left alone. In one that is not, what is
    there is read again (at a URL its size is asked for) and stays when it is the manifest's. Of several processes that
    copy to one local folder one is at work; the others wait until all is there, and one goes on if it dies.
    Raises UserError when `source` is no data folder or damaged, or `to` holds other data; RunFailure when something
    cannot be read or written.
    """
    given, target = Place(source), Place(to)
    if (content := given.read("manifest.json")) is None:
        raise UserError(f"{source}/manifest.json: not found; expected {MANIFEST}")
    files = _files(check_manifest(parse_json(content, source, MANIFEST), source))

    def complete() -> bool:
        found = target.read("manifest.json")
        if found is None and target.holds(File("prepare.json")):
            raise UserError(
                f"{to}: holds an unfinished `prepare`; give another folder, or finish that first"
            )
        if found not in (None, content):
            raise UserError(
                f"{to}: holds other data than {source}; give another folder, or remove it"
            )
        return found is not None and all(threads.map(target.holds, files))

    with ThreadPoolExecutor(workers) as threads:
        while not complete():
            turn = (
                Lock(target.folder, lambda take: complete() or take())
                if target.folder
                else nullcontext()
            )
            with suppress(LockedOut), turn:  # locked out: another process is at work, look again
                if not complete():
                    copied = _copy(given, target, files, threads, progress)
                    target.write("manifest.json", content)
                    if target.folder:
                        (target.folder / "heartbeat.json").unlink(missing_ok=True)
                    return copied
    return 0


def _files(manifest: Manifest) -> list[File]:
    """All files of a data folder but the manifest."""
    files = [File("unigrams.npy"), *map(File, manifest.tokenizer.files)]
    for name, split in manifest.splits.items():
        files.append(File(index_file(name), split.index_sha256))
        files += [File(shard.file, shard.sha256, shard.bytes) for shard in split.shards]
    return files


def _copy(
    source: Place, target: Place, files: list[File], threads: Executor, progress: Progress
) -> int:
    """Copy the files that are missing; returns their bytes. RunFailure when the disk is too small for the shards."""
    if target.folder:
        for stale in [
            *target.folder.glob(".*.tmp"),
            *target.folder.glob("*/.*.tmp"),
        ]:  # a killed copy left them
            stale.unlink(missing_ok=True)  # our own heartbeat's comes and goes
        needed = sum(file.bytes or 0 for file in files if not target.holds(file))
        if needed > (free := shutil.disk_usage(target.folder).free):
            raise RunFailure(
                f"{target.name}: {needed:,} bytes of shards are missing here and {free:,} are free; make "
                f"room, or give another folder"
            )
    copied, done, total = 0, 0, sum(file.bytes or 0 for file in files)
    for file, size in zip(files, threads.map(partial(_bring, source, target), files), strict=True):
        copied, done = copied + size, done + (file.bytes or 0)
        progress("copy", done, total)
    return copied


def _bring(source: Place, target: Place, file: File) -> int:
    """Copy one file unless it is there; returns the bytes copied."""
    if target.holds(file) and (target.folder is None or _is_whole(target.read(file.name), file)):
        return 0
    if not _is_whole(content := source.read(file.name), file):
        found = "not there" if content is None else "its sha256 is not the manifest's"
        raise UserError(
            f"{source.name}/{file.name}: damaged ({found}); copy it there again, or prepare the data again"
        )
    target.write(file.name, content)
    return len(content)


def _is_whole(content: bytes | None, file: File) -> bool:
    return content is not None and file.sha256 in (None, sha256(content).hexdigest())
