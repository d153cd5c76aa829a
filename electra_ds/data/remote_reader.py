"""Random access to the rows of a data folder behind a URL, with checks and retries.

Rows are fetched by byte ranges over http or from an object store.

A chunk is a run of consecutive blocks of one shard, about 1 MiB, and takes one request.

Dimensions: n rows, S sequence.
"""

import hashlib
import itertools
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from electra_ds.common.arrays import runs
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.json_files import MAX_BYTES
from electra_ds.common.printable import printable
from electra_ds.common.redaction import redacted, without_secrets_of
from electra_ds.common.urls import file_system
from electra_ds.data.rows import sort_rows
from electra_ds.data.shard_format import NPY_HEADER, TAR_BLOCK, padded, shard_file
from electra_ds.data.shard_reader import SplitIndex

CHUNK_BYTES = 1 << 20  # bytes of rows per chunk, without the fragments between its blocks
CONCURRENT_REQUESTS = 16
RETRY_PAUSES = (0.5, 1, 2, 4, 8, 16, 32)  # seconds
CACHED_CHUNKS = 256  # chunks kept in memory: the most recently read ones
# Client errors (4xx) that a retry may resolve: request timeout, too many requests.
TRANSIENT_STATUSES = (408, 429)


class ByteRange(NamedTuple):
    """Bytes [start, end) of a file; the whole file when start and end are None.

    limit: most bytes of a whole file; of a larger one, no more than limit + 1 bytes are read
    """

    name: str
    start: int | None = None
    end: int | None = None
    limit: int = MAX_BYTES

    @property
    def requested(self) -> tuple[int, int]:
        """First byte and end of the request."""
        if self.start is None or self.end is None:
            return 0, self.limit + 1
        return self.start, self.end

    @property
    def size(self) -> int | None:
        """Number of bytes, None for a whole file."""
        if self.start is None or self.end is None:
            return None
        return self.end - self.start

    def __str__(self) -> str:
        return "all" if self.size is None else f"bytes {self.start:,} to {self.end:,}"


class SmallFile(NamedTuple):
    """What is known of a file before it is copied."""

    sha256: str | None = None
    limit: int = MAX_BYTES  # most bytes


class RemoteFolder:
    """A folder behind a URL of a known protocol.

    name: the URL without its secrets, for messages
    """

    def __init__(self, url: str) -> None:
        self._url = url = url.rstrip("/")
        self.name = printable(redacted(url))
        self._system, self._root = file_system(url)

    def read(
        self,
        ranges: Sequence[ByteRange],
        accept: Callable[[ByteRange, bytes], Exception | None],
    ) -> None:
        """Read byte ranges, several at a time, and call accept(range, content) for each.

        A range that fails, or for which `accept` returns an error, is requested again after a
        pause. After the last retry, raises the error that `accept` returned, or RunFailure.
        Raises UserError without a retry when a file does not exist, may not be read, or comes from
        a server that ignores Range requests.
        """
        for pause in (*RETRY_PAUSES, None):
            errors = self._read_once(ranges, accept)
            if not errors:
                return
            if pause is None:
                raise next(iter(errors.values()))
            if pause == RETRY_PAUSES[0]:  # a minute without output would look like a hang
                name = next(iter(errors)).name
                print(
                    f"{self.name}/{name}: no complete answer yet, retrying for "
                    f"{sum(RETRY_PAUSES):.0f} s",
                    file=sys.stderr,
                )
            ranges = list(errors)
            time.sleep(pause)

    def copy(self, files: dict[str, SmallFile], folder: Path) -> None:
        """Copy small files into `folder`. files: by name, relative to the folder.

        Raises UserError when a file is larger than its limit or has another sha256.
        """

        def accept(part: ByteRange, content: bytes) -> UserError | None:
            expected = files[part.name].sha256
            if expected is not None and hashlib.sha256(content).hexdigest() != expected:
                return UserError(
                    f"{self.name}/{part.name}: its sha256 differs from that in manifest.json; "
                    "copy the data there again"
                )
            path = folder / part.name
            try:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
            except OSError as error:
                raise RunFailure(
                    f"{path}: {error}; free disk space, or set TMPDIR to another folder"
                ) from error
            return None

        self.read([ByteRange(name, limit=file.limit) for name, file in files.items()], accept)

    def _read_once(
        self,
        ranges: Sequence[ByteRange],
        accept: Callable[[ByteRange, bytes], Exception | None],
    ) -> dict[ByteRange, Exception]:
        """Request each range once. Returns the errors of those that failed."""
        errors = {}
        for first in range(0, len(ranges), CONCURRENT_REQUESTS):
            group = ranges[first : first + CONCURRENT_REQUESTS]
            answers = self._system.cat_ranges(
                [f"{self._root}/{part.name}" for part in group],
                [part.requested[0] for part in group],
                [part.requested[1] for part in group],
                on_error="return",
            )
            for part, answer in zip(group, answers, strict=True):
                error = self._transient_error(part, answer) or accept(part, answer)
                if error:
                    errors[part] = error
        return errors

    def _transient_error(self, part: ByteRange, answer: bytes | Exception) -> Exception | None:
        """Return the error of a failed request that a retry may resolve, None for a good answer.

        Raises UserError for an error that a retry cannot resolve.
        """
        path = f"{self.name}/{part.name}"
        status = getattr(answer, "status", 0)
        received = (
            f"{type(answer).__name__}: {without_secrets_of(self._url, str(answer))}"
            if isinstance(answer, Exception)
            else f"{len(answer):,} bytes"
        )
        is_client_error = 400 <= status < 500 and status not in TRANSIENT_STATUSES
        if isinstance(answer, FileNotFoundError | PermissionError) or is_client_error:
            raise UserError(f"{path}: {received}; expected a file of a data folder")
        requested = f"requested {part}, received {received}"
        if isinstance(answer, bytes):
            if part.size is None and len(answer) > part.limit:
                raise UserError(
                    f"{path}: more than {part.limit:,} bytes; expected a file of a data folder, as "
                    "its manifest describes it"
                )
            if part.size is None or len(answer) == part.size:
                return None
            if len(answer) > part.size:
                raise UserError(
                    f"{path}: {requested}; expected a server that supports Range requests; "
                    "otherwise stage the data"
                )
        return RunFailure(
            f"{path}: {requested}, {len(RETRY_PAUSES) + 1} times in {sum(RETRY_PAUSES):.0f} s; "
            "the same command resumes"
        )


class RemoteReader(SplitIndex):
    """The rows of one split behind a URL, by row number, fetched by chunk.

    Headers and crc32 of every block are compared with the index. Damage that persists after the
    retries raises UserError with shard and block.
    """

    def __init__(self, folder: RemoteFolder, split: str, small_files: Path) -> None:
        """small_files: folder with copies of the manifest and the index."""
        super().__init__(small_files, split, location=folder.name)
        self.folder = folder
        block_bytes = self.manifest.block_rows * self.sequence_length * self.dtype.itemsize
        blocks_per_chunk = max(1, CHUNK_BYTES // block_bytes)
        first_blocks = [
            np.arange(first, end, blocks_per_chunk)
            for first, end in itertools.pairwise(self.shard_starts)
        ]
        # first block and first row of each chunk, [chunks + 1]
        self.chunk_blocks = np.concatenate([*first_blocks, [len(self.blocks)]])
        self.chunk_starts = self.block_starts[self.chunk_blocks]
        self.chunk_rows = np.diff(self.chunk_starts)
        self._chunks: OrderedDict[int, np.ndarray] = OrderedDict()  # chunk -> [n, S]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the token ids of [n] row numbers, [n, S] of the stored type.

        Raises IndexError for a row number out of range.
        """
        rows = np.asarray(rows, np.int64)
        ascending, sorted_rows = sort_rows(rows, self.rows)
        chunks = np.searchsorted(self.chunk_starts, sorted_rows, side="right") - 1
        needed = {chunk: ascending[here] for chunk, here in runs(chunks)}
        self._fetch([chunk for chunk in needed if chunk not in self._chunks])
        gathered = np.empty((len(rows), self.sequence_length), self.dtype)
        for chunk, here in needed.items():
            gathered[here] = self._chunks[chunk][rows[here] - self.chunk_starts[chunk]]
            self._chunks.move_to_end(chunk)
        while len(self._chunks) > max(CACHED_CHUNKS, len(needed)):
            self._chunks.popitem(last=False)
        return gathered

    def _fetch(self, chunks: list[int]) -> None:
        """Fetch chunks, each from its first block's tar header to the end of its last rows."""
        chunk_of: dict[ByteRange, int] = {}
        for chunk in chunks:
            first, last = self.blocks[self.chunk_blocks[chunk : chunk + 2] - [0, 1]]
            start = int(first["offset"]) - TAR_BLOCK
            end = int(last["offset"]) + padded(int(last["bytes"]))
            chunk_of[ByteRange(shard_file(self.split, first["shard"]), start, end)] = chunk

        def accept(part: ByteRange, content: bytes) -> UserError | None:
            try:
                self._chunks[chunk_of[part]] = self._parse(chunk_of[part], content)
            except UserError as error:
                return error
            return None

        self.folder.read(list(chunk_of), accept)

    def _parse(self, chunk: int, content: bytes) -> np.ndarray:
        """Return the rows in the bytes of a chunk, [n, S]; UserError when they are damaged."""
        view = memoryview(content)
        blocks = range(*self.chunk_blocks[chunk : chunk + 2])
        content_start = int(self.blocks["offset"][blocks[0]]) - TAR_BLOCK
        parts = []
        for block in blocks:
            _, _, offset, size, _, _ = self.blocks[block].item()
            start = offset - content_start
            headers = content[start - TAR_BLOCK : start + NPY_HEADER]
            self.check_ids(block, headers, view[start : start + size])
            ids = np.frombuffer(view[start + NPY_HEADER : start + size], self.dtype)
            parts.append(ids.reshape(-1, self.sequence_length))
        return np.concatenate(parts)
