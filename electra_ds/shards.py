"""How do packed rows lie on disk? Format version 1: tar shards, block index, manifest, random access, checks.

Every byte around the rows (tar header, npy header) follows from the manifest and the index, so a reader compares
headers with what the writer would have written and parses none of them: nothing in a shard can be executed, and a
link, a device, a foreign name or an object array is simply a difference. Letters: n rows, S sequence, P pieces.
"""

import hashlib
import mmap
import tarfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from electra_ds.config import SpecialIds
from electra_ds.errors import UserError
from electra_ds.files import read_json, write_bytes, write_json
from electra_ds.order import runs

FORMAT, VERSION = "electra_ds shards", 1
MANIFEST = "a data folder's manifest (`prepare` writes it last: run it again, it resumes)"
# A piece is a stretch of one document's text tokens in one row (start, length: without [CLS] and [SEP]); `row` counts
# from the block's first row, `document` within its unit, `token` within its document.
PIECE_FIELDS = ("row", "start", "length", "unit", "document", "token")
INDEX_MAGIC = b"EDSIDX1\0"
INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("rows", "<u4"),
        ("offset", "<u8"),
        ("bytes", "<u8"),
        ("crc32", "<u4"),
        ("zero", "<u4"),
    ]
)
TAR_BLOCK = 512  # bytes: every tar header and payload starts on a multiple of it, so the rows are 64-byte aligned
NPY_HEADER = 128  # bytes
OPEN_SHARDS = 256  # mapped at a time; each map holds a file descriptor


# ---------------------------------------------------------------------------------------------------- manifest


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenizerInfo(_Part):
    """The tokenizer that made the ids; its files lie in DATA/tokenizer."""

    kind: Literal["wordpiece", "sentencepiece"]
    sha256: str  # the tokenizer's fingerprint
    vocab_size: int
    special_ids: SpecialIds

    @property
    def files(self) -> tuple[str, str]:
        """Relative to DATA."""
        return (
            "tokenizer/options.json",
            f"tokenizer/{'vocab.txt' if self.kind == 'wordpiece' else 'spm.model'}",
        )


class SourcePlan(_Part):
    """How the input was cut: a unit is the documents that start in bytes [start, end) of files[file], file by file."""

    sha256: str
    files: tuple[str, ...]  # relative to the input root
    units: tuple[tuple[tuple[int, int, int], ...], ...]  # each ((file, start, end), ...)


class UnknownWords(_Part):
    """What became [UNK] in the input, duplicates included."""

    found: int  # [UNK]s
    looked_at: int  # of them
    words: dict[str, int]  # how often the most frequent ones stood there, the first one most often


class ShardInfo(_Part):
    """One tar file of a split."""

    file: str  # relative to DATA
    rows: int
    bytes: int
    sha256: str


class SplitInfo(_Part):
    """One split, its counts over all shards."""

    documents: int
    pieces: int
    tokens: int  # of text: without [CLS], [SEP] and padding
    pad: int
    rows: int
    index_sha256: str
    shards: tuple[ShardInfo, ...]


class Manifest(_Part):
    """DATA/manifest.json: everything about a data folder; its presence means that the folder is complete."""

    format: Literal["electra_ds shards"] = FORMAT
    version: Literal[1] = VERSION
    dataset_id: str = ""  # filled by write_manifest
    sequence_length: int
    dtype: Literal["uint16", "uint32"]
    block_rows: int
    packing: Literal["best_fit", "concat", "google"]
    seed: int  # of the document shuffle and the packing
    tokenizer: TokenizerInfo
    source: SourcePlan
    splits: dict[str, SplitInfo]
    removed: dict[
        str, int
    ] = {}  # by reason: documents, unless the reason names lines or characters
    bad_lines: dict[str, int] = {}  # unreadable input lines by class
    unknowns: UnknownWords | None = None  # None: prepared before they were recorded

    def content_id(self) -> str:
        """Fingerprint of the rows and of what they mean; the same for the same rows, whatever the input's names."""
        parts = [self.format, self.version, self.sequence_length, self.dtype, self.packing]
        parts += [
            self.tokenizer.sha256,
            self.tokenizer.vocab_size,
            self.tokenizer.special_ids.model_dump_json(),
        ]
        for name in sorted(self.splits):
            parts += [[name, shard.rows, shard.sha256] for shard in self.splits[name].shards]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def write_manifest(data_dir: str | Path, manifest: Manifest) -> Manifest:
    """Fill in dataset_id and write DATA/manifest.json, the last file of a data folder. Returns what was written."""
    manifest = manifest.model_copy(update={"dataset_id": manifest.content_id()})
    write_json(Path(data_dir) / "manifest.json", manifest.model_dump(mode="json"))
    return manifest


def read_manifest(data_dir: str | Path) -> Manifest:
    """Read DATA/manifest.json. UserError when it is missing, of another format or version, or malformed."""
    path = Path(data_dir) / "manifest.json"
    return check_manifest(read_json(path, MANIFEST), path)


def check_manifest(raw: dict, path: str | Path) -> Manifest:
    """The manifest in `raw`, the JSON of `path`. UserError when it is of another format or version, or malformed."""
    found = raw.get("format"), raw.get("version")
    if found != (FORMAT, VERSION):
        raise UserError(
            f"{path}: format and version {found}, this program reads {(FORMAT, VERSION)}; prepare again"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; prepare the data again"
        ) from None


def read_unigrams(data_dir: str | Path, vocab_size: int) -> np.ndarray:
    """Token counts of the training rows, [V] int64, special ids 0 (DATA/unigrams.npy)."""
    path = Path(data_dir) / "unigrams.npy"
    try:
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not readable ({error}); expected token counts, prepare the data again"
        ) from None
    if counts.shape != (vocab_size,) or counts.dtype != np.int64:
        raise UserError(
            f"{path}: {counts.dtype}{list(counts.shape)}, expected int64[{vocab_size}]; prepare again"
        )
    return counts


# ------------------------------------------------------------------------------------------------------ writing


def shard_file(split: str, shard: int) -> str:
    """A shard's path inside DATA."""
    return f"shards/{split}-{shard:06d}.tar"


def block_name(split: str, shard: int, block: int) -> str:
    """The key that a block's two members share; webdataset takes it as the sample's key."""
    return f"{split}-{shard:06d}-{block:06d}"


def ids_dtype(vocab_size: int) -> np.dtype:
    """The narrowest stored type: uint16 up to 65,536 tokens, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member: USTAR, regular file, no time, no owner."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(format=tarfile.USTAR_FORMAT)


def npy_header(dtype: np.dtype, shape: tuple[int, int]) -> bytes:
    """The 128 bytes before an array in C order: npy version 1.0, the same for every numpy version."""
    text = (
        f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({shape[0]}, {shape[1]}), }}"
    )
    return (
        b"\x93NUMPY\x01\x00"
        + (NPY_HEADER - 10).to_bytes(2, "little")
        + text.ljust(NPY_HEADER - 11).encode()
        + b"\n"
    )


def padded(size: int) -> int:
    """The bytes that a payload takes in a tar."""
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def write_shard(
    path: str | Path,
    split: str,
    shard: int,
    rows: np.ndarray,
    pieces: np.ndarray,
    block_rows: int = 256,
) -> tuple[ShardInfo, np.ndarray]:
    """Write one tar of rows, whole or not at all; the same arguments give the same bytes on every machine.

    path:   where the tar goes (its place in a data folder is shard_file(split, shard))
    rows:   [n, S] uint16 or uint32 token ids, unmasked, n > 0
    pieces: [P, 6] int32, PIECE_FIELDS, sorted by row; `row` counts from the shard's first row
    Returns what the manifest and the index say about it, the latter [blocks] INDEX_DTYPE.
    """
    assert (
        rows.ndim == 2
        and len(rows)
        and rows.dtype in (np.uint16, np.uint32)
        and pieces.shape[1:] == (6,)
    )
    assert (np.diff(pieces[:, 0]) >= 0).all(), "pieces come sorted by row"
    rows = rows.astype(rows.dtype.newbyteorder("<"), copy=False)
    data, blocks = bytearray(), []
    for block, start in enumerate(range(0, len(rows), block_rows)):
        own = rows[start : start + block_rows]
        first, last = np.searchsorted(pieces[:, 0], (start, start + len(own)))
        own_pieces = (pieces[first:last] - np.array([start, 0, 0, 0, 0, 0])).astype("<i4")
        for kind, array in (("ids", own), ("pieces", own_pieces)):
            payload = npy_header(array.dtype, array.shape) + array.tobytes()
            data += tar_header(f"{block_name(split, shard, block)}.{kind}.npy", len(payload))
            if kind == "ids":
                blocks.append((shard, len(own), len(data), len(payload), zlib.crc32(payload), 0))
            data += payload.ljust(padded(len(payload)), b"\0")
    data += bytes(2 * TAR_BLOCK)
    write_bytes(path, data)
    digest = hashlib.sha256(data).hexdigest()
    info = ShardInfo(file=shard_file(split, shard), rows=len(rows), bytes=len(data), sha256=digest)
    return info, np.array(blocks, INDEX_DTYPE)


def index_file(split: str) -> str:
    """The block index's path inside DATA."""
    return f"index-{split}.bin"


def write_index(path: str | Path, blocks: np.ndarray) -> str:
    """Write the index of a split's blocks, [blocks] INDEX_DTYPE in order; returns its sha256 for the manifest."""
    data = INDEX_MAGIC + np.array([VERSION, len(blocks)], "<u4").tobytes() + blocks.tobytes()
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def read_index(path: str | Path, sha256: str) -> np.ndarray:
    """Read a block index: [blocks] INDEX_DTYPE. UserError when it is missing or not the manifest's."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: not readable ({error.strerror}); expected the block index of a split"
        ) from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(
            f"{path}: its sha256 is not the manifest's; copy the data again or prepare it again"
        )
    return np.frombuffer(data, INDEX_DTYPE, offset=len(INDEX_MAGIC) + 8)


# ------------------------------------------------------------------------------------------------------ reading


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
