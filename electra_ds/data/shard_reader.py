"""Random access to the rows of a data folder on disk, with checks.

Dimensions: n rows, S sequence, F fragments.
"""

import stat
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np

from electra_ds.common.arrays import runs
from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable, shortened
from electra_ds.data.rows import sort_rows
from electra_ds.data.shard_files import ShardFiles
from electra_ds.data.shard_format import (
    FRAGMENT_FIELDS,
    NPY_HEADER,
    TAR_BLOCK,
    block_name,
    index_file,
    npy_header,
    padded,
    read_index,
    read_manifest,
    shard_file,
    tar_header,
)

# Rows in memory. A window of the shuffled order has 4 MiB of rows of 128 tokens, 16 MiB of 512.
CACHED_BYTES = 1 << 26
FEW_ROWS = 4  # of a block, for which the rest of the block is not read
TAR_SIZE_FIELD = slice(124, 135)  # octal digits in a USTAR header


class SplitIndex:
    """Manifest and block index of one split, and the checks that both readers share.

    Rows are numbered in the order of shards, of blocks within a shard, and of rows within a block.
    """

    def __init__(self, data_dir: str | Path, split: str, location: str | Path) -> None:
        """Read manifest and index. Raises UserError when they are missing, damaged or disagree.

        data_dir: folder of manifest and index. location: name of the data folder in messages.
        """
        self.location = location
        self.split = split
        self.manifest = read_manifest(data_dir)
        if split not in self.manifest.splits:
            splits = ", ".join(self.manifest.splits)
            raise UserError(
                f"{printable(location)}: found no split {shortened(split)}, only {splits}; "
                "`prepare --valid-fraction` writes a split named valid"
            )
        self.info = self.manifest.splits[split]
        self.rows = self.info.rows
        self.sequence_length = self.manifest.sequence_length
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        blocks_of_shards = self.manifest.blocks(split)
        self.blocks = read_index(
            Path(data_dir) / index_file(split), self.info.index_sha256, sum(blocks_of_shards)
        )
        self._check_index(blocks_of_shards)
        # first row of each block, [blocks + 1]
        self.block_starts = np.concatenate([[0], np.cumsum(self.blocks["rows"], dtype=np.int64)])
        # first block of each shard, [shards + 1]
        self.shard_starts = np.searchsorted(
            self.blocks["shard"], np.arange(len(self.info.shards) + 1)
        )

    def _check_index(self, blocks_of_shards: list[int]) -> None:
        """Compare the index with the manifest; UserError with the first shard that differs.

        blocks_of_shards: [shards] number of blocks that follows from the manifest
        """
        shards = self.info.shards
        first = np.cumsum([0, *blocks_of_shards[:-1]])  # first block of each shard
        rows_before_last = np.arange(len(self.blocks)) - np.repeat(first, blocks_of_shards)
        rows_left = np.repeat([shard.rows for shard in shards], blocks_of_shards)
        rows_left = rows_left - rows_before_last * self.manifest.block_rows
        rows = np.minimum(rows_left, self.manifest.block_rows)
        size = NPY_HEADER + rows * self.sequence_length * self.dtype.itemsize
        starts = self.blocks["offset"].astype(np.float64)  # exact below 2^53, no overflow above
        ends = starts + size
        previous_end = np.concatenate([[0], ends[:-1]])
        previous_end[first] = 0
        wrong = self.blocks["shard"] != np.repeat(np.arange(len(shards)), blocks_of_shards)
        wrong |= (self.blocks["rows"] != rows) | (self.blocks["bytes"] != size)
        wrong |= (starts < previous_end + TAR_BLOCK) | (starts % TAR_BLOCK != 0)
        wrong |= ends > np.repeat([shard.bytes for shard in shards], blocks_of_shards)
        if wrong.any():
            block = int(np.argmax(wrong))
            shard = int(np.searchsorted(first, block, side="right")) - 1
            raise UserError(
                f"{printable(self.location)}/{shard_file(self.split, shard)}: "
                f"{index_file(self.split)} and manifest.json give different rows for it; copy or "
                "prepare the data again"
            )

    def shard_and_number(self, block: int) -> tuple[int, int]:
        """Return (shard, number within the shard) of a block."""
        shard = int(self.blocks["shard"][block])
        return shard, block - int(self.shard_starts[shard])

    def block_error(self, block: int, what: str) -> UserError:
        """Return the error for a damaged block; it names the file and the block within it."""
        shard, number = self.shard_and_number(block)
        path = f"{printable(self.location)}/{shard_file(self.split, shard)}"
        return UserError(
            f"{path}: block {number}: {what}; copy this shard again (`verify` lists all damage)"
        )

    def check_ids(self, block: int, headers: bytes, payload: memoryview) -> None:
        """Compare a block's headers and crc32 with the expected ones; UserError when they differ.

        headers: tar header and npy header, as read
        payload: npy header and rows, as read
        """
        rows, crc32 = self.blocks[["rows", "crc32"]][block].item()
        self._check_headers(block, "ids", headers, rows)
        if zlib.crc32(payload) != crc32:
            raise self.block_error(block, "the crc32 of its rows differs from that in the index")

    def _check_headers(self, block: int, kind: str, headers: bytes, rows: int) -> None:
        """Raise UserError when a member's headers differ from the expected ones.

        kind: "ids" or "pieces". headers: tar header and npy header, as read. rows: length of the
        first axis of the array.
        """
        dtype: np.dtype = np.dtype("<i4")
        width = len(FRAGMENT_FIELDS)
        if kind == "ids":
            dtype = self.dtype
            width = self.sequence_length
        name = f"{block_name(self.split, *self.shard_and_number(block))}.{kind}.npy"
        if headers[:TAR_BLOCK] != tar_header(name, NPY_HEADER + rows * width * dtype.itemsize):
            raise self.block_error(
                block, f"its tar header differs from the expected one for {name}"
            )
        if headers[TAR_BLOCK:] != npy_header(dtype, (rows, width)):
            raise self.block_error(
                block, f"the npy header of {name}: expected that of {dtype.name}[{rows}, {width}]"
            )


class ShardReader(SplitIndex):
    """The rows of one split on disk, by row number.

    The constructor compares names and sizes of the files with the manifest. Headers and crc32 of a
    block are compared when it is first read. Damage raises UserError with shard and block. With
    `check_files=False` the caller checks the files (`check_shard`). The blocks that were read last
    stay in memory, at most CACHED_BYTES of them.
    """

    def __init__(self, data_dir: str | Path, split: str, *, check_files: bool = True) -> None:
        super().__init__(data_dir, split, location=data_dir)
        self.data_dir = Path(data_dir)
        shards = self.info.shards
        self._files = ShardFiles(
            [self.data_dir / shard.file for shard in shards], [shard.bytes for shard in shards]
        )
        self._blocks: OrderedDict[int, np.ndarray] = OrderedDict()  # block -> [n, S], by last use
        self._cached_bytes = 0
        self._checked = np.zeros(len(self.blocks), bool)
        if check_files:
            for shard in range(len(shards)):
                self.check_shard(shard)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the token ids of [n] row numbers, [n, S] of the stored type.

        Rows are gathered by block, so one call for many rows is faster than many calls. Raises
        IndexError for a row number out of range.
        """
        ascending, rows = sort_rows(rows, self.rows)
        blocks = np.searchsorted(self.block_starts, rows, side="right") - 1
        offsets = rows - self.block_starts[blocks]
        gathered = np.empty((len(rows), self.sequence_length), self.dtype)
        for block, here in runs(blocks):
            self._gather(block, offsets[here], gathered[here])
        inverse = np.empty_like(ascending)
        inverse[ascending] = np.arange(len(ascending))
        return gathered.take(inverse, axis=0)

    def _gather(self, block: int, offsets: np.ndarray, out: np.ndarray) -> None:
        """Copy the rows of a block at [n] offsets to `out`, [n, S]."""
        if block in self._blocks or len(offsets) > FEW_ROWS or not self._checked[block]:
            self.block(block).take(offsets, axis=0, out=out, mode="clip")
            return
        shard, _, first, *_ = self.blocks[block].item()
        for offset, row in zip(offsets.tolist(), out, strict=True):
            self._files.read_into(shard, first + NPY_HEADER + offset * row.nbytes, row)

    def block(self, block: int) -> np.ndarray:
        """Return one block's rows, [n, S], read-only; the first call checks headers and crc32."""
        if block in self._blocks:
            self._blocks.move_to_end(block)
            return self._blocks[block]
        shard, rows, offset, size, _, _ = self.blocks[block].item()
        content = self._files.read(shard, offset - TAR_BLOCK, TAR_BLOCK + size)
        if not self._checked[block]:
            self.check_ids(
                block, content[: TAR_BLOCK + NPY_HEADER], memoryview(content)[TAR_BLOCK:]
            )
            self._checked[block] = True
        array = np.frombuffer(content, self.dtype, offset=TAR_BLOCK + NPY_HEADER)
        array = array.reshape(rows, self.sequence_length)
        while self._blocks and self._cached_bytes + array.nbytes > CACHED_BYTES:
            self._cached_bytes -= self._blocks.popitem(last=False)[1].nbytes
        self._blocks[block] = array
        self._cached_bytes += array.nbytes
        return array

    def fragments(self, block: int) -> np.ndarray:
        """Return the document fragments of one block, [F, 6] int32, columns FRAGMENT_FIELDS.

        `row` counts from the first row of the block. Raises UserError when a fragment is not inside
        its row.
        """
        shard, rows, offset, size, _, _ = self.blocks[block].item()
        start = offset + padded(size)
        headers = self._files.read(shard, start, TAR_BLOCK + NPY_HEADER)
        try:
            payload_size = int(headers[TAR_SIZE_FIELD], 8)  # the header is compared below
        except ValueError:
            raise self.block_error(block, "no tar header where its fragments start") from None
        count = max(0, payload_size - NPY_HEADER) // (4 * len(FRAGMENT_FIELDS))
        self._check_headers(block, "pieces", headers, count)
        size = payload_size - NPY_HEADER
        if start + len(headers) + size > self.info.shards[shard].bytes:
            raise self.block_error(block, "the file ends inside its fragments")
        values = self._files.read(shard, start + len(headers), size)
        fragments = np.frombuffer(values, "<i4").reshape(count, len(FRAGMENT_FIELDS))
        row, column, length, *source = fragments.astype(np.int64).T
        inside = (row >= 0) & (row < rows)
        inside &= (column > 0) & (length > 0) & (column + length <= self.sequence_length)
        inside &= (np.array(source) >= 0).all(axis=0)
        if not inside.all():
            raise self.block_error(
                block,
                f"document fragment {int(np.argmin(inside))} lies outside its row or has no source",
            )
        return fragments

    def check_shard(self, shard: int) -> None:
        """Compare path, size and index entries of one shard with the manifest.

        Raises UserError with shard and block.
        """
        info = self.info.shards[shard]
        blocks = self.blocks[slice(*self.shard_starts[shard : shard + 2])]
        path = self.data_dir / info.file  # the manifest has only the names of this format
        problem = ""
        try:
            status = path.lstat()
        except OSError as error:
            problem = f" ({error.strerror})"
        if problem or not stat.S_ISREG(status.st_mode):
            raise UserError(
                f"{printable(path)}: shard {shard} of {self.split} is missing or no regular file"
                f"{problem}; copy the data again"
            )
        ends = blocks["offset"] + blocks["bytes"]
        size = status.st_size
        if size != info.bytes:
            whole_blocks = int(np.searchsorted(ends, size, side="right"))
            where = (
                f"block {whole_blocks} is the first incomplete one"
                if whole_blocks < len(blocks)
                else f"the change is after block {len(blocks) - 1}"
            )
            raise UserError(
                f"{printable(path)}: found {size} bytes, expected {info.bytes} as in the manifest; {where}; "
                "copy this shard again"
            )
