"""Random access to the rows of a data folder on disk, with checks."""

import mmap
import zlib
from pathlib import Path

import numpy as np

from electra_ds.common.arrays import runs
from electra_ds.common.errors import UserError
from electra_ds.data.shard_format import (
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

OPEN_SHARDS = 256  # mapped at a time; each map holds a file descriptor


class SplitIndex:
    """What manifest and index say about the rows of one split: in shard order, then block order, then place there."""

    def __init__(self, data_dir: str | Path, split: str, location: str | Path) -> None:
        """location: what messages call the data folder."""
        self.location, self.split, self.manifest = location, split, read_manifest(data_dir)
        if split not in self.manifest.splits:
            have = ", ".join(self.manifest.splits)
            raise UserError(
                f"{location}: no split {split!r}, it holds {have}; `prepare --valid-fraction` makes valid"
            )
        self.info = self.manifest.splits[split]
        self.rows, self.sequence_length = self.info.rows, self.manifest.sequence_length
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self.blocks = read_index(Path(data_dir) / index_file(split), self.info.index_sha256)
        self.block_starts = np.concatenate(
            [[0], np.cumsum(self.blocks["rows"], dtype=np.int64)]
        )  # [blocks + 1]
        self.shard_starts = np.searchsorted(
            self.blocks["shard"], np.arange(len(self.info.shards) + 1)
        )  # in blocks
        if self.block_starts[-1] != self.rows or not self.rows:
            indexed = self.block_starts[-1]
            raise UserError(
                f"{location}: split {split} has {self.rows} rows, {indexed} of them indexed; prepare again"
            )

    def place(self, block: int) -> tuple[int, int]:
        """(shard, block within the shard) of a block."""
        shard = int(self.blocks["shard"][block])
        return shard, block - int(self.shard_starts[shard])

    def damage(self, block: int, what: str) -> UserError:
        """The error for a damaged block, by file and block."""
        shard, number = self.place(block)
        path = f"{self.location}/{shard_file(self.split, shard)}"
        return UserError(
            f"{path}: block {number}: {what}; copy this shard again (`verify` lists all damage)"
        )


class ShardReader(SplitIndex):
    """The rows of one split, by number, through mmap.

    Opening compares names and sizes of the files with the manifest; a block's headers and crc32 are compared when
    it is first touched. Damage is a UserError with shard and block. `check_files=False` leaves the first part to
    the caller (`check_shard`).
    """

    def __init__(self, data_dir: str | Path, split: str, *, check_files: bool = True) -> None:
        super().__init__(data_dir, split, location=data_dir)
        self.data_dir = Path(data_dir)
        self._maps: dict[int, np.ndarray] = {}  # shard -> [bytes] uint8
        self._views: dict[int, np.ndarray] = {}  # block -> [n, S]
        self._checked = np.zeros(len(self.blocks), bool)
        if check_files:
            for shard in range(len(self.info.shards)):
                self.check_shard(shard)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number: [n] integers -> [n, S] of the stored type. Gathered by block, so many at once is faster."""
        rows = np.asarray(rows, np.int64)
        by_row = np.argsort(rows)
        rows = rows[by_row]
        if len(rows) and not (rows[0] >= 0 and rows[-1] < self.rows):
            raise IndexError(f"rows {rows[0]}..{rows[-1]} asked of {self.rows}")
        blocks = np.searchsorted(self.block_starts, rows, side="right") - 1
        inside = rows - self.block_starts[blocks]
        found = np.empty((len(rows), self.sequence_length), self.dtype)
        for block, here in runs(blocks):
            self.block(block).take(inside[here], axis=0, out=found[here], mode="clip")
        back = np.empty_like(by_row)
        back[by_row] = np.arange(len(by_row))
        return found.take(back, axis=0)

    def block(self, block: int) -> np.ndarray:
        """A view of one block's rows [n, S]; its headers and crc32 are checked when it is first touched."""
        if block not in self._views:
            _, rows, offset, size, crc32, _ = self.blocks[block].item()
            data = self._map(block)
            if not self._checked[block]:
                self._check_header(
                    block, "ids", data[offset - TAR_BLOCK : offset + NPY_HEADER].tobytes(), rows
                )
                if zlib.crc32(data[offset : offset + size]) != crc32:
                    raise self.damage(block, "its rows differ from their crc32")
                self._checked[block] = True
            array = data[offset + NPY_HEADER : offset + size].view(self.dtype)
            self._views[block] = array.reshape(rows, self.sequence_length)
        return self._views[block]

    def pieces(self, block: int) -> np.ndarray:
        """Where one block's pieces come from: [P, 6] int32, PIECE_FIELDS, `row` from the block's start."""
        _, _, offset, size, _, _ = self.blocks[block].item()
        data, start = self._map(block), offset + padded(size)
        try:
            payload = int(
                data[start + 124 : start + 135].tobytes(), 8
            )  # USTAR's size field; compared just below
        except ValueError:
            raise self.damage(block, "no tar header where its pieces begin") from None
        count = max(0, payload - NPY_HEADER) // 24
        self._check_header(
            block, "pieces", data[start : start + TAR_BLOCK + NPY_HEADER].tobytes(), count
        )
        return (
            data[start + TAR_BLOCK + NPY_HEADER : start + TAR_BLOCK + payload]
            .view("<i4")
            .reshape(count, 6)
        )

    def check_shard(self, shard: int) -> None:
        """Compare one shard's place, size and index entries with the manifest; UserError names shard and block."""
        info, own = (
            self.info.shards[shard],
            self.blocks[slice(*self.shard_starts[shard : shard + 2])],
        )
        path = self.data_dir / info.file
        if info.file != shard_file(self.split, shard) or path.is_symlink() or not path.is_file():
            raise UserError(
                f"{path}: shard {shard} of {self.split} is no regular file here; copy the data again"
            )
        ends = own["offset"] + own["bytes"]
        size = path.stat().st_size
        if size != info.bytes:
            cut = int(np.searchsorted(ends, size, side="right"))
            where = (
                f"block {cut} is the first cut"
                if cut < len(own)
                else f"the change is after block {len(own) - 1}"
            )
            raise UserError(
                f"{path}: {size} bytes, the manifest says {info.bytes}; {where}; copy this shard again"
            )
        widths = NPY_HEADER + own["rows"] * (self.sequence_length * self.dtype.itemsize)
        if own["rows"].sum() != info.rows or (own["bytes"] != widths).any() or (ends > size).any():
            raise UserError(
                f"{path}: index-{self.split}.bin and manifest disagree about its rows; prepare again"
            )

    def _check_header(self, block: int, kind: str, found: bytes, rows: int) -> None:
        dtype, width = (self.dtype, self.sequence_length) if kind == "ids" else (np.dtype("<i4"), 6)
        name = f"{block_name(self.split, *self.place(block))}.{kind}.npy"
        if found[:TAR_BLOCK] != tar_header(name, NPY_HEADER + rows * width * dtype.itemsize):
            raise self.damage(block, f"its tar header is not that of {name}")
        if found[TAR_BLOCK:] != npy_header(dtype, (rows, width)):
            raise self.damage(
                block, f"the npy header of {name} is not that of {dtype.name}[{rows}, {width}]"
            )

    def _map(self, block: int) -> np.ndarray:
        """The bytes of the shard that holds `block`, [bytes] uint8; all maps are let go when there are too many."""
        shard = int(self.blocks["shard"][block])
        if shard not in self._maps:
            if len(self._maps) >= OPEN_SHARDS:
                self._maps.clear()
                self._views.clear()
            with open(self.data_dir / shard_file(self.split, shard), "rb") as file:
                self._maps[shard] = np.frombuffer(
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8
                )
        return self._maps[shard]
