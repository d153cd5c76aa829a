"""Data folder format, version 1: tar shards of packed rows, block index, manifest.

Manifest and index determine every byte around the rows (tar headers, npy headers). A reader does
not parse these headers, it compares them with the expected bytes. So nothing in a shard is
executed, and a link, a device, another name or an object array is found as a difference.

A fragment is a run of text tokens of one document in one row; [CLS] and [SEP] do not belong to it.
On disk (member names, manifest keys) fragments are called pieces.

Dimensions: n rows, S sequence, F fragments, V vocabulary.
"""

import hashlib
import io
import re
import tarfile
import zlib
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from electra_ds.common.arrays import NPY_MOST, parse_npy
from electra_ds.common.errors import UserError
from electra_ds.common.files import write_bytes
from electra_ds.common.folder_kinds import found_at
from electra_ds.common.json_files import (
    MAX_VALUES_OF_DATA,
    Record,
    parse_json,
    parse_record,
    read_small,
    write_json,
)
from electra_ds.common.printable import printable, shortened
from electra_ds.common.special_ids import SpecialIds

FORMAT: Literal["electra_ds shards"] = "electra_ds shards"
VERSION: Literal[1] = 1
MANIFEST = "a data folder's manifest (`prepare` writes it last; run `prepare` again to resume)"
UNIGRAMS = "token counts of the training rows"
SPLITS = ("train", "valid")
# Blocks of a split. The index is in memory: 256 MiB, for 10^12 tokens in rows of 512.
MAX_BLOCKS = 1 << 23
MAX_VOCABULARY = 1 << 24  # entries; the largest published vocabularies have 2^20
# A single surrogate of a byte that is not UTF-8, as JSON escapes it.
NOT_UTF8 = re.compile(rb"(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][cC]([89a-fA-F][0-9a-fA-F])")
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


# Kind of a tokenizer -> name of its vocabulary file.
VOCABULARY_OF_KIND = {
    "wordpiece": "vocab.txt",
    "sentencepiece": "spm.model",
    "byte_bpe": "tokenizer.json",
}

Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Positive = Annotated[int, Field(ge=1, lt=1 << 53)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class TokenizerInfo(Record):
    """The tokenizer that made the token ids. Its files are in DATA/tokenizer."""

    kind: Literal["wordpiece", "sentencepiece", "byte_bpe"]
    sha256: Sha256  # the tokenizer's fingerprint
    vocab_size: Annotated[int, Field(ge=len(SpecialIds.model_fields), le=MAX_VOCABULARY)]
    special_ids: SpecialIds

    @model_validator(mode="after")
    def _check(self) -> "TokenizerInfo":
        ids = list(self.special_ids.model_dump().values())
        if not 0 <= min(ids) <= max(ids) < self.vocab_size or len({*ids}) < len(ids):
            raise ValueError(
                f"special_ids are {ids}; expected different ids of a vocabulary of "
                f"{self.vocab_size} entries"
            )
        return self

    @property
    def files(self) -> tuple[str, str]:
        """Paths of the tokenizer's files, relative to DATA."""
        return ("tokenizer/options.json", f"tokenizer/{VOCABULARY_OF_KIND[self.kind]}")


class SourcePlan(Record):
    """Division of the input into units.

    A unit is a list of (file, start, end): the documents that start in bytes [start, end) of
    files[file].
    """

    sha256: Sha256
    files: tuple[str, ...]  # relative to the input root
    units: tuple[tuple[tuple[Count, Count, Count], ...], ...]  # each ((file, start, end), ...)

    @model_validator(mode="after")
    def _check(self) -> "SourcePlan":
        for number, unit in enumerate(self.units):
            for file, start, end in unit:
                if file >= len(self.files) or start > end:
                    raise ValueError(
                        f"units.{number} has ({file}, {start}, {end}); expected a file below "
                        f"{len(self.files)} and its bytes from start to end"
                    )
        return self


class UnknownWords(Record):
    """Words of the input that became [UNK], duplicate documents included."""

    found: Count  # number of [UNK] tokens
    looked_at: Count  # number of [UNK] tokens for which the word was recorded
    words: dict[str, Count]  # the most frequent words -> counts, in descending order
    tokens: Count | None = None  # of the input; None in data prepared by versions without it
    # Characters without spaces: of the input, of the recorded words, and of those of them that are
    # too long for WordPiece. None in data prepared by versions without these counts.
    characters: Count | None = None
    unknown_characters: Count | None = None
    long_characters: Count | None = None

    @property
    def share(self) -> float | None:
        """Share of the tokens that are [UNK], from 0 to 1; None if it is not known."""
        return None if self.tokens is None else self.found / max(1, self.tokens)

    @property
    def share_of_characters(self) -> float | None:
        """Share of the characters that became [UNK], from 0 to 1; None if it is not known.

        If not all [UNK]s were recorded, the others are assumed to have the same mean length.
        """
        if self.characters is None or self.unknown_characters is None:
            return None
        all_unknown = self.unknown_characters * self.found / max(1, self.looked_at)
        return min(1.0, all_unknown / max(1, self.characters))


class ShardInfo(Record):
    """One tar file of a split."""

    file: str  # relative to DATA
    rows: Positive
    bytes: Positive
    sha256: Sha256


class SplitInfo(Record):
    """One split, with counts over all shards."""

    documents: Positive
    pieces: Positive  # document fragments
    tokens: Positive  # text tokens: without [CLS], [SEP] and padding
    pad: Count
    rows: Positive
    index_sha256: Sha256
    shards: Annotated[tuple[ShardInfo, ...], Field(min_length=1)]


class Manifest(Record):
    """DATA/manifest.json: description of a data folder. A folder with a manifest is complete."""

    format: Literal["electra_ds shards"] = FORMAT
    version: Literal[1] = VERSION
    dataset_id: Annotated[str, Field(pattern="^([0-9a-f]{32})?$")] = ""  # set by write_manifest
    sequence_length: Annotated[int, Field(ge=3, lt=1 << 16)]
    dtype: Literal["uint16", "uint32"]
    block_rows: Annotated[int, Field(ge=1, le=1 << 20)]
    packing: Literal["best_fit", "concat", "google"]
    # of the document shuffle and of the packing
    seed: Annotated[int, Field(gt=-(1 << 64), lt=1 << 64)]
    tokenizer: TokenizerInfo
    source: SourcePlan
    splits: dict[str, SplitInfo]
    # reason -> removed documents, or lines or characters where the reason names these
    removed: dict[str, Count] = Field({})
    bad_lines: dict[str, Count] = Field({})  # class -> unreadable input lines
    unknowns: UnknownWords | None = None  # None in data prepared by versions without this record
    # of unigrams.npy; None in data prepared by versions without this record
    unigrams_sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        if "train" not in self.splits or not self.splits.keys() <= {*SPLITS}:
            raise ValueError(
                f"splits are {shortened(', '.join(self.splits))}; expected train, or train and "
                "valid"
            )
        if self.tokenizer.vocab_size > 1 << 8 * np.dtype(self.dtype).itemsize:
            raise ValueError(
                f"dtype is {self.dtype} for {self.tokenizer.vocab_size} entries; expected a type "
                "that holds all ids"
            )
        for name, split in self.splits.items():
            if problem := self._split_problem(name, split):
                raise ValueError(f"splits.{name}: {problem}; prepare or copy the data again")
        return self

    def _split_problem(self, name: str, split: SplitInfo) -> str:
        """Describe a contradiction among the numbers of a split; empty if there is none."""
        row_bytes = self.sequence_length * np.dtype(self.dtype).itemsize
        for number, shard in enumerate(split.shards):
            if shard.file != shard_file(name, number):
                return (
                    f"shards.{number}.file = {shortened(shard.file)}; expected "
                    f"{shard_file(name, number)}"
                )
            if shard.bytes < shard.rows * row_bytes:
                return (
                    f"shards.{number}.bytes = {shard.bytes}; expected at least {row_bytes} for "
                    f"each of its {shard.rows} rows"
                )
        rows = sum(shard.rows for shard in split.shards)
        if rows != split.rows:
            return f"rows = {split.rows}; expected {rows}, the sum of its shards"
        blocks = sum(-(-shard.rows // self.block_rows) for shard in split.shards)
        if blocks > MAX_BLOCKS:
            return (
                f"{blocks:,} blocks of {self.block_rows} rows; expected at most {MAX_BLOCKS:,}, with "
                "more rows in a block"
            )
        if split.tokens + split.pad > split.rows * self.sequence_length:
            return (
                f"tokens = {split.tokens} and pad = {split.pad}; expected at most "
                f"{split.rows} rows of {self.sequence_length}"
            )
        return ""

    def blocks(self, split: str) -> list[int]:
        """Return the number of blocks of each shard of a split, [shards]."""
        return [-(-shard.rows // self.block_rows) for shard in self.splits[split].shards]

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
    found = found_at(Path(data_dir))
    if found.kind not in ("data", "other", "unreadable"):
        raise UserError(
            f"{printable(path)}: not found{found.clause}; expected a data folder of `prepare`"
        )
    return parse_manifest(read_small(path, MANIFEST), path)


def parse_manifest(content: bytes, path: str | Path) -> Manifest:
    """Return the manifest in `content`. path: its file or URL, for messages.

    Raises UserError when it is malformed, or of another format or version.
    """
    # Earlier versions wrote file names that are not UTF-8 as single surrogates (PEP 383).
    content = NOT_UTF8.sub(rb"\\\\x\1", content)
    raw = parse_json(content, path, MANIFEST, max_values=MAX_VALUES_OF_DATA)
    format_and_version = raw.get("format"), raw.get("version")
    if format_and_version != (FORMAT, VERSION):
        found = " and ".join(map(shortened, format_and_version))
        raise UserError(
            f"{printable(path)}: found format and version {found}, expected {FORMAT!r} and "
            f"{VERSION}; prepare the data again"
        )
    return parse_record(raw, path, Manifest, MANIFEST)


def read_unigrams(data_dir: str | Path, vocab_size: int, sha256: str | None = None) -> np.ndarray:
    """Read DATA/unigrams.npy: token counts of the training rows, [V] int64, 0 for special tokens.

    sha256: that of the manifest, None if it has none.
    Raises UserError when it is missing, unreadable, of another type or size, or has another sha256.
    """
    path = Path(data_dir) / "unigrams.npy"
    content = read_small(path, UNIGRAMS, unigrams_bytes(vocab_size))
    return parse_unigrams(content, path, vocab_size, sha256)


def unigrams_bytes(vocab_size: int) -> int:
    """Return the most bytes of a file of token counts."""
    return NPY_MOST + vocab_size * np.dtype(np.int64).itemsize


def parse_unigrams(
    content: bytes, path: str | Path, vocab_size: int, sha256: str | None
) -> np.ndarray:
    """Like `read_unigrams`, for content that was read already. path: for messages."""
    counts = parse_npy(content, path, UNIGRAMS, np.dtype(np.int64), (vocab_size,))
    if sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise UserError(
            f"{printable(path)}: its sha256 differs from that in manifest.json; copy the data "
            "again or prepare it again"
        )
    if (counts < 0).any() or not counts.any():
        raise UserError(
            f"{printable(path)}: negative counts, or none; expected {UNIGRAMS}; copy the data again "
            "or prepare it again"
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


def index_bytes(blocks: int) -> int:
    """Return the size of a block index."""
    return len(INDEX_MAGIC) + 8 + blocks * INDEX_DTYPE.itemsize


def read_index(path: str | Path, sha256: str, blocks: int) -> np.ndarray:
    """Read a block index, [blocks] INDEX_DTYPE.

    sha256, blocks: of the manifest.
    Raises UserError when it is missing, or its size or sha256 is another one.
    """
    what = "the block index of a split"
    size = index_bytes(blocks)
    content = read_small(path, what, size)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(
            f"{printable(path)}: its sha256 differs from that in manifest.json; copy the data again "
            "or prepare it again"
        )
    head = INDEX_MAGIC + np.array([VERSION, blocks], "<u4").tobytes()
    if len(content) != size or not content.startswith(head):
        raise UserError(
            f"{printable(path)}: {len(content)} bytes, which are not {what} of {blocks} blocks; "
            "prepare the data again"
        )
    return np.frombuffer(content, INDEX_DTYPE, offset=len(head))
