"""Data folder format, version 1: tar shards of packed rows, block index, manifest.

Manifest and index determine every byte around the rows (tar headers, npy headers). A reader does
not parse these headers, it compares them with the expected bytes. So nothing in a shard is
executed, and a link, a device, another name or an object array is found as a difference.

A fragment is a run of text tokens of one document in one row; [CLS] and [SEP] do not belong to it.
On disk (member names, manifest keys) fragments are called pieces.

Letters: n rows, S sequence, F fragments, V vocabulary.
"""

import hashlib
import io
import tarfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from electra_ds.common.errors import UserError
from electra_ds.common.files import write_bytes
from electra_ds.common.json_files import read_json, write_json
from electra_ds.common.special_ids import SpecialIds

FORMAT: Literal["electra_ds shards"] = "electra_ds shards"
VERSION: Literal[1] = 1
MANIFEST = "a data folder's manifest (`prepare` writes it last; run `prepare` again to resume)"
# Columns of the fragments: `row` counts from the first row of the block, `start` is the first
# column in the row, `document` counts within its unit and `token` within its document.
FRAGMENT_FIELDS = ("row", "start", "length", "unit", "document", "token")
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
# Bytes. Tar headers and payloads start at multiples of 512, so the rows are aligned to 64 bytes.
TAR_BLOCK = 512
NPY_HEADER = 128  # bytes


class _ManifestPart(BaseModel):
    """Base class of the manifest and its parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenizerInfo(_ManifestPart):
    """The tokenizer that made the token ids. Its files are in DATA/tokenizer."""

    kind: Literal["wordpiece", "sentencepiece"]
    sha256: str  # the tokenizer's fingerprint
    vocab_size: int
    special_ids: SpecialIds

    @property
    def files(self) -> tuple[str, str]:
        """Paths of the tokenizer's files, relative to DATA."""
        vocabulary = "vocab.txt" if self.kind == "wordpiece" else "spm.model"
        return ("tokenizer/options.json", f"tokenizer/{vocabulary}")


class SourcePlan(_ManifestPart):
    """Division of the input into units.

    A unit is a list of (file, start, end): the documents that start in bytes [start, end) of
    files[file].
    """

    sha256: str
    files: tuple[str, ...]  # relative to the input root
    units: tuple[tuple[tuple[int, int, int], ...], ...]  # each ((file, start, end), ...)


class UnknownWords(_ManifestPart):
    """Words of the input that became [UNK], duplicate documents included."""

    found: int  # number of [UNK] tokens
    looked_at: int  # number of [UNK] tokens for which the word was recorded
    words: dict[str, int]  # the most frequent words -> counts, in descending order


class ShardInfo(_ManifestPart):
    """One tar file of a split."""

    file: str  # relative to DATA
    rows: int
    bytes: int
    sha256: str


class SplitInfo(_ManifestPart):
    """One split, with counts over all shards."""

    documents: int
    pieces: int  # document fragments
    tokens: int  # text tokens: without [CLS], [SEP] and padding
    pad: int
    rows: int
    index_sha256: str
    shards: tuple[ShardInfo, ...]


class Manifest(_ManifestPart):
    """DATA/manifest.json: description of a data folder. A folder with a manifest is complete."""

    format: Literal["electra_ds shards"] = FORMAT
    version: Literal[1] = VERSION
    dataset_id: str = ""  # set by write_manifest
    sequence_length: int
    dtype: Literal["uint16", "uint32"]
    block_rows: int
    packing: Literal["best_fit", "concat", "google"]
    seed: int  # of the document shuffle and of the packing
    tokenizer: TokenizerInfo
    source: SourcePlan
    splits: dict[str, SplitInfo]
    # reason -> removed documents, or lines or characters where the reason names these
    removed: dict[str, int] = {}
    bad_lines: dict[str, int] = {}  # class -> unreadable input lines
    unknowns: UnknownWords | None = None  # None in data prepared by versions without this record

    @property
    def segments(self) -> int:
        """Number of token types in a row: packing google marks a second segment."""
        return 2 if self.packing == "google" else 1

    def content_id(self) -> str:
        """Return a hash of format, rows and tokenizer, [32 hexadecimal digits].

        It does not depend on the names of the input files.
        """
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
    """Set dataset_id and write DATA/manifest.json, the last file of a data folder.

    Returns the manifest as written.
    """
    manifest = manifest.model_copy(update={"dataset_id": manifest.content_id()})
    write_json(Path(data_dir) / "manifest.json", manifest.model_dump(mode="json"))
    return manifest


def read_manifest(data_dir: str | Path) -> Manifest:
    """Read DATA/manifest.json.

    Raises UserError when it is missing, malformed, or of another format or version.
    """
    path = Path(data_dir) / "manifest.json"
    return check_manifest(read_json(path, MANIFEST), path)


def check_manifest(raw: dict, path: str | Path) -> Manifest:
    """Return the manifest in `raw`, the parsed JSON of `path`.

    Raises UserError when it is malformed, or of another format or version.
    """
    format_and_version = raw.get("format"), raw.get("version")
    if format_and_version != (FORMAT, VERSION):
        raise UserError(
            f"{path}: found format and version {format_and_version}, expected {(FORMAT, VERSION)}; "
            "prepare the data again"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; prepare the data again"
        ) from None


def read_unigrams(data_dir: str | Path, vocab_size: int) -> np.ndarray:
    """Read DATA/unigrams.npy: token counts of the training rows, [V] int64, 0 for special tokens.

    Raises UserError when it is missing, unreadable, or of another type or size.
    """
    path = Path(data_dir) / "unigrams.npy"
    try:
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not readable ({error}); expected token counts; prepare the data again"
        ) from None
    if counts.shape != (vocab_size,) or counts.dtype != np.int64:
        raise UserError(
            f"{path}: found {counts.dtype}{list(counts.shape)}, expected int64[{vocab_size}]; "
            "prepare the data again"
        )
    return counts


def shard_file(split: str, shard: int) -> str:
    """Return a shard's path, relative to DATA."""
    return f"shards/{split}-{shard:06d}.tar"


def block_name(split: str, shard: int, block: int) -> str:
    """Return the common name of a block's two members; webdataset uses it as the sample's key."""
    return f"{split}-{shard:06d}-{block:06d}"


def ids_dtype(vocab_size: int) -> np.dtype:
    """Return the stored type of token ids: uint16 up to 65,536 tokens, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def tar_header(name: str, size: int) -> bytes:
    """Return the 512 bytes before a member: USTAR, regular file, time and owner 0."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(format=tarfile.USTAR_FORMAT)


def npy_header(dtype: np.dtype, shape: tuple[int, int]) -> bytes:
    """Return the 128 bytes before an array in C order: npy 1.0, for every numpy version."""
    text = (
        f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({shape[0]}, {shape[1]}), }}"
    )
    magic = b"\x93NUMPY\x01\x00"
    text_size = (NPY_HEADER - 10).to_bytes(2, "little")
    return magic + text_size + text.ljust(NPY_HEADER - 11).encode() + b"\n"


def padded(size: int) -> int:
    """Return the bytes that a payload of `size` bytes occupies in a tar."""
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def write_shard(
    path: str | Path,
    split: str,
    shard: int,
    rows: np.ndarray,
    fragments: np.ndarray,
    block_rows: int = 256,
) -> tuple[ShardInfo, np.ndarray]:
    """Write one tar of rows atomically; equal arguments give equal bytes on every machine.

    path:      the tar file; in a data folder it is DATA / shard_file(split, shard)
    rows:      [n, S] uint16 or uint32 token ids, unmasked, n > 0
    fragments: [F, 6] int32, columns FRAGMENT_FIELDS, sorted by `row`, which counts from the first
               row of the shard
    Returns the shard's entry in the manifest and its part of the index, [blocks] INDEX_DTYPE.
    """
    assert rows.ndim == 2
    assert len(rows)
    assert rows.dtype in (np.uint16, np.uint32)
    assert fragments.shape[1:] == (len(FRAGMENT_FIELDS),)
    assert (np.diff(fragments[:, 0]) >= 0).all(), "fragments must be sorted by row"
    rows = rows.astype(rows.dtype.newbyteorder("<"), copy=False)
    tar = io.BytesIO()
    index = []
    for block, start in enumerate(range(0, len(rows), block_rows)):
        ids = rows[start : start + block_rows]
        first, last = np.searchsorted(fragments[:, 0], (start, start + len(ids)))
        block_fragments = fragments[first:last] - np.array([start, 0, 0, 0, 0, 0])
        for kind, array in (("ids", ids), ("pieces", block_fragments.astype("<i4"))):
            payload = npy_header(array.dtype, array.shape) + array.tobytes()
            tar.write(tar_header(f"{block_name(split, shard, block)}.{kind}.npy", len(payload)))
            if kind == "ids":
                offset = tar.tell()
                index.append((shard, len(ids), offset, len(payload), zlib.crc32(payload), 0))
            tar.write(payload.ljust(padded(len(payload)), b"\0"))
    tar.write(bytes(2 * TAR_BLOCK))  # end of the tar
    content = tar.getvalue()
    write_bytes(path, content)
    info = ShardInfo(
        file=shard_file(split, shard),
        rows=len(rows),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    return info, np.array(index, INDEX_DTYPE)


def index_file(split: str) -> str:
    """Return the path of a split's block index, relative to DATA."""
    return f"index-{split}.bin"


def write_index(path: str | Path, blocks: np.ndarray) -> str:
    """Write a block index, [blocks] INDEX_DTYPE in order. Returns its sha256 for the manifest."""
    content = INDEX_MAGIC + np.array([VERSION, len(blocks)], "<u4").tobytes() + blocks.tobytes()
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def read_index(path: str | Path, sha256: str) -> np.ndarray:
    """Read a block index, [blocks] INDEX_DTYPE.

    Raises UserError when it is missing or its sha256 differs from `sha256`, that of the manifest.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: not readable ({error.strerror}); expected the block index of a split"
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(
            f"{path}: its sha256 differs from that in manifest.json; copy the data again or "
            "prepare it again"
        )
    return np.frombuffer(content, INDEX_DTYPE, offset=len(INDEX_MAGIC) + 8)
