"""Assembly of shards: documents in shuffled order are packed into rows, and the rows permuted.

Shard b of a split has the documents of all units with a shuffle key in the b-th equal part of all
keys. This shuffles the whole corpus without a dependency between shards. Memory holds one shard.
Dimensions: D documents, F fragments, n rows, S sequence length, V size of the vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from data_tools.pipeline.dedup import is_duplicate
from data_tools.pipeline.markers import ShardMarker, finished
from data_tools.pipeline.pack import Layout, fill, lay_out, uniforms_needed
from data_tools.pipeline.settings import Settings
from data_tools.pipeline.units import DOCUMENT, KEYS, key_range, npy_bytes, read_table, unit_files
from data_tools.workers import OnProgress
from electra_ds.common.errors import UserError
from electra_ds.common.files import write_bytes
from electra_ds.common.json_files import write_json
from electra_ds.common.special_ids import SpecialIds
from electra_ds.data import philox
from electra_ds.data.shard_format import FRAGMENT_FIELDS, ids_dtype, shard_file, write_shard

SPLITS = ("train", "valid")
# Purposes of random bits, in addition to those of electra_ds/data/philox.py.
ROWS = 32
SEGMENTS = 33
IDS_AT_ONCE = 1 << 20  # ids that are counted at a time, as int64
# A document of a shard: the number of its unit, and its entry in the table of that unit.
UNIT_DOCUMENT = np.dtype([("unit", "<u4"), ("entry", DOCUMENT)])


@dataclass(frozen=True)
class ShardTask:
    """A shard, with all settings that determine its bytes. The units are the other input."""

    split: str
    shard: int
    shards: int  # number of shards of this split
    units: int  # number of units
    units_folder: str
    work: str  # folder of markers and of duplicates.npy
    out: str  # data folder
    plan_sha256: str  # fingerprint of the settings of units and packing
    settings: Settings
    vocab_size: int
    special_ids: SpecialIds


@dataclass(frozen=True)
class PackedShard:
    """The content of a shard."""

    rows: np.ndarray  # [n, S] ids_dtype, in their final order
    fragments: np.ndarray  # [F, 6] int32, FRAGMENT_FIELDS, sorted by row
    unigrams: np.ndarray  # [V] int64 counts of text tokens
    counts: dict[str, int]  # documents, tokens, pieces (fragments), pad


def in_split(table: np.ndarray, split: str, valid_fraction: float) -> np.ndarray:
    """Return which documents of a table belong to a split: [D] bool.

    The hash of the text selects the split, so equal texts are never in both splits. table: [D]
    DOCUMENT. split: train or valid. valid_fraction: share of the documents in valid.
    """
    valid = table["hash"][:, 0] < np.uint64(min(KEYS - 1, int(valid_fraction * KEYS)))
    return valid if split == "valid" else ~valid


def marker_path(task: ShardTask) -> Path:
    """Return the path of a shard's marker.

    Beside it are the shard's unigram counts (.npy) and its part of the index (.index).
    """
    return Path(task.work) / f"{task.split}-{task.shard:06d}.json"


def assemble_shard(task: ShardTask, on_progress: OnProgress) -> dict:
    """Write a shard unless it is finished; return its marker.

    on_progress: receives the number of tokens of the shard
    Raises UserError for a shard without documents.
    """
    marker_file = marker_path(task)
    path = Path(task.out) / shard_file(task.split, task.shard)
    written = [path, *map(marker_file.with_suffix, (".npy", ".index"))]
    if marker := finished(marker_file, task.plan_sha256, written, ShardMarker):
        on_progress(marker["tokens"])
        return marker
    packed = _pack(task)
    info, blocks = write_shard(
        path, task.split, task.shard, packed.rows, packed.fragments, task.settings.block_rows
    )
    files = {os.path.relpath(path, marker_file.parent): info.sha256}
    for suffix, content in ((".npy", npy_bytes(packed.unigrams)), (".index", blocks.tobytes())):
        write_bytes(marker_file.with_suffix(suffix), content)
        files[marker_file.with_suffix(suffix).name] = sha256(content).hexdigest()
    marker = {
        **packed.counts,
        "plan_sha256": task.plan_sha256,
        "files": files,
        "shard": info.model_dump(),
    }
    write_json(marker_file, marker)
    on_progress(marker["tokens"])
    return marker


def collect(task: ShardTask) -> tuple[np.ndarray, np.ndarray]:
    """Return a shard's documents in the order of their keys.

    Returns (table [D] UNIT_DOCUMENT; ids of these documents, concatenated in this order, [ids]
    ids_dtype, with a [SEP] after each line).
    """
    tables = _shard_tables(task)
    unit_ends = np.cumsum([len(table) for table in tables])
    joined = np.concatenate(tables)
    del tables  # as large as `joined`
    entries = joined["entry"]
    by_key = np.lexsort((entries["document"], joined["unit"], entries["key"]))
    lengths = entries["stored"].astype(np.int64)
    targets = np.empty_like(lengths)  # first id of each document in the result
    targets[by_key] = np.cumsum(lengths[by_key]) - lengths[by_key]
    dtype = ids_dtype(task.vocab_size)
    stored = np.empty(lengths.sum(), dtype)
    for unit in np.flatnonzero(np.diff(unit_ends, prepend=0)).tolist():
        ids = np.asarray(np.memmap(unit_files(task.units_folder, unit).ids, dtype, "r"))
        of_unit = slice(unit_ends[unit - 1] if unit else 0, unit_ends[unit])
        columns = (entries["start"][of_unit], lengths[of_unit], targets[of_unit])
        for start, length, target in zip(*(column.tolist() for column in columns), strict=True):
            stored[target : target + length] = ids[start : start + length]
    return joined[by_key], stored


def _shard_tables(task: ShardTask) -> list[np.ndarray]:
    """Return the shard's documents of each unit, without duplicates: [D] UNIT_DOCUMENT each."""
    low, high = key_range(task.shard, task.shards)
    duplicates = np.load(Path(task.work) / "duplicates.npy", mmap_mode="r", allow_pickle=False)
    tables = []
    for unit in range(task.units):
        table = read_table(task.units_folder, unit)
        table = table[(table["key"] >= low) & (table["key"] <= high)]
        selected = in_split(table, task.split, task.settings.valid_fraction)
        table = table[selected & ~is_duplicate(duplicates, unit, table)]
        with_unit = np.zeros(len(table), UNIT_DOCUMENT)
        with_unit["unit"] = unit
        with_unit["entry"] = table
        tables.append(with_unit)
    return tables


def _pack(task: ShardTask) -> PackedShard:
    """Collect and pack the documents of a shard. Raises UserError when there are none."""
    table, stored = collect(task)
    if not len(table):
        raise UserError(
            f"shard {task.shard} of {task.shards} of split {task.split} has no document, because "
            "the split has few and long documents; expected a blank line between documents "
            "(carriage returns alone end no line), JSONL, or <doc> blocks"
        )
    special = task.special_ids
    line_lengths, document_lines = _line_lengths(table, stored, special)
    ids = stored[stored != special.sep]
    del stored  # as large as the shard
    layout = _lay_out(task, line_lengths, document_lines)
    tokens = table["entry"]["tokens"].astype(np.int64)
    width = task.settings.sequence_length
    rows = fill(layout, ids, np.cumsum(tokens) - tokens, width, special)
    new_row = philox.permutation(
        layout.rows, task.settings.seed, SPLITS.index(task.split), task.shard, ROWS
    )
    rows = rows[np.argsort(new_row)]
    fragments = _fragment_table(layout, table, new_row)
    counts = {
        "documents": len(table),
        "tokens": len(ids),
        "pieces": len(fragments),
        "pad": rows.size - len(ids) - len(layout.cls) - len(layout.sep),
    }
    return PackedShard(rows, fragments, _count_unigrams(ids, task), counts)


def _line_lengths(
    table: np.ndarray, stored: np.ndarray, special: SpecialIds
) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens of each line, lines of each document [D]) from the result of `collect`."""
    line_ends = np.flatnonzero(stored == special.sep)
    line_lengths = np.diff(line_ends, prepend=-1) - 1
    document_ends = np.cumsum(table["entry"]["stored"].astype(np.int64))
    document_lines = np.diff(np.searchsorted(line_ends, document_ends), prepend=0)
    return line_lengths, document_lines


def _lay_out(task: ShardTask, line_lengths: np.ndarray, document_lines: np.ndarray) -> Layout:
    """Place the documents of a shard into rows."""
    settings = task.settings
    uniforms = np.empty(0, np.float32)
    if settings.packing == "google":
        bits = philox.random_bits(
            settings.seed,
            SPLITS.index(task.split),
            np.array([task.shard]),
            uniforms_needed(int(line_lengths.sum()), len(document_lines)),
            SEGMENTS,
        )
        uniforms = philox.uniforms(bits[0])
    return lay_out(
        settings.packing, line_lengths, document_lines, settings.sequence_length, uniforms
    )


def _fragment_table(layout: Layout, table: np.ndarray, new_row: np.ndarray) -> np.ndarray:
    """Return the fragments of permuted rows, [F, 6] int32, FRAGMENT_FIELDS, sorted by row.

    new_row: [n] position of each row of the layout after the permutation
    """
    row, start, length, document, token = layout.fragments.T
    order = np.lexsort((start, new_row[row]))
    fragments = np.empty((len(order), len(FRAGMENT_FIELDS)), "<i4")
    unit = table["unit"][document]
    number = table["entry"]["document"][document]
    for column, values in enumerate((new_row[row], start, length, unit, number, token)):
        fragments[:, column] = values[order]
    return fragments


def _count_unigrams(ids: np.ndarray, task: ShardTask) -> np.ndarray:
    """Return the number of occurrences of each entry, [V] int64; 0 for special tokens and [UNK]."""
    unigrams = np.zeros(task.vocab_size, np.int64)
    for first in range(0, len(ids), IDS_AT_ONCE):
        unigrams += np.bincount(ids[first : first + IDS_AT_ONCE], minlength=task.vocab_size)
    unigrams[list(task.special_ids.model_dump().values())] = 0
    return unigrams
