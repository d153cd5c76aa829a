"""How are rows read where they lie, behind http or in an object store? In ranges of bytes, checked, asked for again.

A chunk is blocks of one shard that follow one another, about 1 MiB: one request, taken apart by webdataset. Letters:
n rows, S sequence.
"""

import hashlib
import io
import itertools
import os
import sys
import tarfile
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from webdataset.tariterators import tar_file_iterator

from electra_ds.common.arrays import runs
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.files import file_system
from electra_ds.data.shard_format import NPY_HEADER, TAR_BLOCK, block_name, padded, shard_file
from electra_ds.data.shard_reader import SplitIndex

os.environ.setdefault(
    "WDS_SECURE", "1"
)  # read when webdataset is imported: no commands behind URLs, no unpickling
CHUNK_BYTES = 1 << 20  # of rows; the pieces between the blocks come along
REQUESTS = 16  # at a time
PAUSES = (0.5, 1, 2, 4, 8, 16, 32)  # seconds before an answer is asked for again
CHUNKS_KEPT = 256  # in memory, of those read last
PASSING = (
    408,
    429,
)  # timeout, too many requests: of the answers 4xx, those that another attempt may mend


class Part(NamedTuple):
    """Bytes [start, end) of a file; without an end the whole of it."""

    name: str
    start: int | None = None
    end: int | None = None


class RemoteFolder:
    """A folder behind a URL of any kind that fsspec knows."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._system, self._root = file_system(self.url)

    def read(self, parts: Sequence[Part], take: Callable[[Part, bytes], Exception | None]) -> None:
        """Hand the content of each part to `take`, several being asked for at once.

        What does not come, or is found wrong by `take`, is asked for again after a pause; if that never helps the last
        error is raised: that of `take`, or RunFailure. UserError at once when a file is not there or may not be read.
        """
        for pause in (*PAUSES, None):
            troubles = {}
            for group in (
                parts[start : start + REQUESTS] for start in range(0, len(parts), REQUESTS)
            ):
                names, starts, ends = map(list, zip(*group, strict=True))
                paths = [f"{self._root}/{name}" for name in names]
                answers = self._system.cat_ranges(paths, starts, ends, on_error="return")
                for part, answer in zip(group, answers, strict=True):
                    if trouble := self._trouble(part, answer) or take(part, answer):
                        troubles[part] = trouble
            if not troubles:
                return
            if pause is None:
                raise next(iter(troubles.values()))
            if pause == PAUSES[0]:  # a minute without a word would look like a hang
                first = f"{self.url}/{next(iter(troubles)).name}"
                print(
                    f"{first}: no whole answer yet, asked for again for {sum(PAUSES):.0f} s",
                    file=sys.stderr,
                )
            parts = list(troubles)
            time.sleep(pause)

    def copy(self, names: dict[str, str | None], to: Path) -> None:
        """Copy small files into the folder `to`, whole; names: with their sha256 where it is known."""

        def take(part: Part, content: bytes) -> UserError | None:
            if names[part.name] not in (None, hashlib.sha256(content).hexdigest()):
                return UserError(
                    f"{self.url}/{part.name}: its sha256 is not the manifest's; copy the data there again"
                )
            try:
                (to / part.name).parent.mkdir(exist_ok=True)
                (to / part.name).write_bytes(content)
            except OSError as error:
                raise RunFailure(
                    f"{to / part.name}: {error}; make room, or set TMPDIR to another folder"
                ) from error

        self.read([Part(name) for name in names], take)

    def _trouble(self, part: Part, answer: bytes | Exception) -> Exception | None:
        """What is wrong with an answer and may pass; UserError for what does not."""
        name, status = f"{self.url}/{part.name}", getattr(answer, "status", 0)
        found = (
            f"{type(answer).__name__}: {answer}"
            if isinstance(answer, Exception)
            else f"{len(answer):,} bytes"
        )
        if isinstance(answer, FileNotFoundError | PermissionError) or (
            400 <= status < 500 and status not in PASSING
        ):
            raise UserError(f"{name}: {found}; expected a file of a data folder")
        if isinstance(answer, bytes) and (part.end is None or len(answer) == part.end - part.start):
            return None
        asked = f"asked for {'all' if part.end is None else f'bytes {part.start:,} to {part.end:,}'}, found {found}"
        if isinstance(answer, bytes) and len(answer) > part.end - part.start:
            raise UserError(
                f"{name}: {asked}; expected a server that knows Range requests; else stage the data"
            )
        return RunFailure(
            f"{name}: {asked}, {len(PAUSES) + 1} times in {sum(PAUSES):.0f} s; the same command resumes"
        )


class RemoteReader(SplitIndex):
    """The rows of one split, by number, fetched by the chunk.

    Whatever comes is compared with the index: names of members and crc32 of blocks. Damage that stays when it is asked
    for again is a UserError with shard and block.
    """

    def __init__(self, folder: RemoteFolder, split: str, small_files: Path) -> None:
        """small_files: where copies of the manifest and the index are."""
        super().__init__(small_files, split, location=folder.url)
        self.folder = folder
        block_bytes = self.manifest.block_rows * self.sequence_length * self.dtype.itemsize
        step = max(1, CHUNK_BYTES // block_bytes)
        firsts = [np.arange(*ends, step) for ends in itertools.pairwise(self.shard_starts)]
        self.chunk_blocks = np.concatenate(
            [*firsts, [len(self.blocks)]]
        )  # [chunks + 1], the first block of each
        self.chunk_starts = self.block_starts[
            self.chunk_blocks
        ]  # [chunks + 1], the first row of each
        self.chunk_rows = np.diff(self.chunk_starts)
        self._chunks: OrderedDict[int, np.ndarray] = OrderedDict()  # [n, S] each

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number: [n] integers -> [n, S] of the stored type."""
        rows = np.asarray(rows, np.int64)
        by_row = np.argsort(rows)
        chunks = np.searchsorted(self.chunk_starts, rows[by_row], side="right") - 1
        needed = {chunk: by_row[here] for chunk, here in runs(chunks)}
        self._fetch([chunk for chunk in needed if chunk not in self._chunks])
        found = np.empty((len(rows), self.sequence_length), self.dtype)
        for chunk, here in needed.items():
            found[here] = self._chunks[chunk][rows[here] - self.chunk_starts[chunk]]
            self._chunks.move_to_end(chunk)
        while len(self._chunks) > max(CHUNKS_KEPT, len(needed)):
            self._chunks.popitem(last=False)
        return found

    def _fetch(self, chunks: list[int]) -> None:
        """From the tar header of a chunk's first block to the end of the rows of its last."""
        wanted = {}
        for chunk in chunks:
            first, last = self.blocks[self.chunk_blocks[chunk : chunk + 2] - [0, 1]]
            end = int(last["offset"]) + padded(int(last["bytes"]))
            wanted[
                Part(shard_file(self.split, first["shard"]), int(first["offset"]) - TAR_BLOCK, end)
            ] = chunk

        def take(part: Part, content: bytes) -> UserError | None:
            try:
                self._chunks[wanted[part]] = self._parse(wanted[part], content)
            except UserError as error:
                return error

        self.folder.read(list(wanted), take)

    def _parse(self, chunk: int, content: bytes) -> np.ndarray:
        """The chunk's rows [n, S]. UserError: damage."""
        members = tar_file_iterator(
            io.BytesIO(content), select_files=lambda name: name.endswith(".ids.npy")
        )
        found = []
        for block in range(*self.chunk_blocks[chunk : chunk + 2]):
            try:
                name, data = next(members, {"fname": "nothing", "data": b""}).values()
            except tarfile.TarError as error:
                raise self.damage(block, str(error)) from None
            if name != f"{block_name(self.split, *self.place(block))}.ids.npy":
                raise self.damage(block, f"{name} stands in its place")
            if zlib.crc32(data) != self.blocks["crc32"][block]:
                raise self.damage(block, "its rows differ from their crc32")
            found.append(
                np.frombuffer(data, self.dtype, offset=NPY_HEADER).reshape(-1, self.sequence_length)
            )
        return np.concatenate(found)
