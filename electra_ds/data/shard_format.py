"""How do packed rows lie on disk? Format version 1: tar shards, block index, manifest, random access, checks.

Every byte around the rows (tar header, npy header) follows from the manifest and the index, so a reader compares
headers with what the writer would have written and parses none of them: nothing in a shard can be executed, and a
link, a device, a foreign name or an object array is simply a difference. Letters: n rows, S sequence, P pieces.
"""

import hashlib
import tarfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from electra_ds.common.errors import UserError
from electra_ds.common.files import read_json, write_bytes, write_json
from electra_ds.common.special_ids import SpecialIds

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
