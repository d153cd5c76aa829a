"""Which documents make a shard, and what does it hold? Deduplicated, in key order, packed, rows permuted, written.

Shard b of a split takes the documents whose key lies in the b-th equal part of all keys, from every unit: a shuffle of
the whole corpus in which no shard needs another. Memory is that of one shard (and of one range of hashes).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from data_tools.pipeline.pack import chances_needed, fill, lay_out
from data_tools.pipeline.units import DOCUMENT, array_bytes, finished, unit_paths
from electra_ds.common.errors import UserError
from electra_ds.common.files import write_bytes, write_json
from electra_ds.common.special_ids import SpecialIds
from electra_ds.data import philox
from electra_ds.data.shard_format import ids_dtype, shard_file, write_shard

SPLITS = ("train", "valid")
ROWS, SEGMENTS = 32, 33  # purposes of random words, beside those of order.py
NO_DUPLICATES = np.empty((0, 2), np.int64)  # what find_duplicates gives when every text is new
HASHES_AT_ONCE = 4 << 20  # documents compared at a time, 104 bytes each
KEYS = 1 << 64


@dataclass(frozen=True)
class ShardTask:
    """Everything that one shard follows from, beside the units, and where it goes."""

    split: str
    shard: int
    shards: int  # of this split
    units: int
    units_folder: str
    work: str  # folder of markers, duplicates.npy
    out: str
    plan_sha256: str  # of units and packing together
    sequence_length: int
    packing: str
    valid_fraction: float
    seed: int
    block_rows: int
    vocab_size: int
    special_ids: SpecialIds


def read_table(folder: str, unit: int) -> np.ndarray:
    """A unit's document table, [D] DOCUMENT, mapped."""
    table = np.load(unit_paths(folder, unit)[1], mmap_mode="r", allow_pickle=False)
    assert table.dtype == DOCUMENT
    return table


def in_split(table: np.ndarray, split: str, valid_fraction: float) -> np.ndarray:
    """[D] bool. A text's hash decides, so that equal texts never stand on both sides."""
    valid = table["hash"][:, 0] < np.uint64(min(KEYS - 1, int(valid_fraction * KEYS)))
    return valid if split == "valid" else ~valid


def marker_path(task: ShardTask) -> Path:
    """Where a shard's marker goes; its unigram counts lie beside it as .npy, its part of the index as .index."""
    return Path(task.work) / f"{task.split}-{task.shard:06d}.json"


def find_duplicates(folder: str, units: int, progress: Callable[[int], None]) -> np.ndarray:
    """[duplicates, 2] int64 (unit, document), sorted: every document whose text stood before, in that order.

    Works through equal ranges of hashes, so that memory is bounded by HASHES_AT_ONCE documents; `progress` hears the
    number of documents done.
    """
    total = sum(len(read_table(folder, unit)) for unit in range(units))
    ranges = -(-total // HASHES_AT_ONCE) or 1
    found, done = [NO_DUPLICATES], 0
    for part in range(ranges):
        low, high = np.uint64(part * KEYS // ranges), np.uint64((part + 1) * KEYS // ranges - 1)
        own = []
        for unit in range(units):
            table = read_table(folder, unit)
            table = table[(table["hash"][:, 1] >= low) & (table["hash"][:, 1] <= high)]
            number = np.full(len(table), unit, np.uint64)
            own.append(
                np.column_stack([table["hash"], number, table["document"].astype(np.uint64)])
            )
        entries = np.concatenate(own)
        entries = entries[np.lexsort(entries.T[::-1])]  # by hash, then unit, then document
        same = (entries[1:, :2] == entries[:-1, :2]).all(axis=1)
        found.append(entries[1:][same][:, 2:].astype(np.int64))
        done += len(entries)
        progress(done)
    pairs = np.concatenate(found)
    return pairs[np.lexsort(pairs.T[::-1])]


def is_duplicate(duplicates: np.ndarray, unit: int, table: np.ndarray) -> np.ndarray:
    """[D] bool: which documents of a unit are in `duplicates`."""
    first, last = np.searchsorted(duplicates[:, 0], (unit, unit + 1))
    return np.isin(table["document"], duplicates[first:last, 1])


def collect(task: ShardTask) -> tuple[np.ndarray, np.ndarray]:
    """This shard's documents in key order: (their table with a `unit` beside it [D], their ids with line ends)."""
    low, high = (
        np.uint64(task.shard * KEYS // task.shards),
        np.uint64((task.shard + 1) * KEYS // task.shards - 1),
    )
    duplicates = np.load(Path(task.work) / "duplicates.npy", mmap_mode="r", allow_pickle=False)
    dtype = ids_dtype(task.vocab_size)
    tables = []
    for unit in range(task.units):
        table = read_table(task.units_folder, unit)
        table = table[(table["key"] >= low) & (table["key"] <= high)]
        table = table[
            in_split(table, task.split, task.valid_fraction)
            & ~is_duplicate(duplicates, unit, table)
        ]
        both = np.zeros(len(table), [("unit", "<u4"), ("own", DOCUMENT)])
        both["unit"], both["own"] = unit, table
        tables.append(both)
    ends = np.cumsum([len(table) for table in tables])
    joined = np.concatenate(tables)
    del tables  # as large
    by_key = np.lexsort((joined["own"]["document"], joined["unit"], joined["own"]["key"]))
    lengths = joined["own"]["stored"].astype(np.int64)
    places = np.empty_like(lengths)  # of the documents, in the result
    places[by_key] = np.cumsum(lengths[by_key]) - lengths[by_key]
    stored = np.empty(lengths.sum(), dtype)
    for unit in np.flatnonzero(np.diff(ends, prepend=0)).tolist():
        ids = np.asarray(np.memmap(unit_paths(task.units_folder, unit)[0], dtype, "r"))
        own = slice(ends[unit - 1] if unit else 0, ends[unit])
        found = joined["own"]["start"][own], lengths[own], places[own]
        for start, length, place in zip(*(part.tolist() for part in found), strict=True):
            stored[place : place + length] = ids[start : start + length]
    return joined[by_key], stored


def assemble_shard(task: ShardTask, on_progress: Callable[[int], None]) -> dict:
    """Write one shard unless it is there and whole; returns its marker."""
    marker = marker_path(task)
    if found := finished(marker, task.plan_sha256):
        on_progress(found["tokens"])
        return found
    rows, pieces, unigrams, counts = _pack(task)
    file = shard_file(task.split, task.shard)
    info, blocks = write_shard(
        Path(task.out) / file, task.split, task.shard, rows, pieces, task.block_rows
    )
    files = {os.path.relpath(Path(task.out) / file, marker.parent): info.sha256}
    for suffix, content in ((".npy", array_bytes(unigrams)), (".index", blocks.tobytes())):
        write_bytes(marker.with_suffix(suffix), content)
        files[marker.with_suffix(suffix).name] = sha256(content).hexdigest()
    counts |= {"plan_sha256": task.plan_sha256, "files": files, "shard": info.model_dump()}
    write_json(marker, counts)
    on_progress(counts["tokens"])
    return counts


def _pack(task: ShardTask) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    """(rows in their order, pieces, unigram counts, what else is counted) of a shard."""
    table, stored = collect(task)
    if not len(table):
        raise UserError(
            f"shard {task.shard} of {task.shards} of the {task.split} split would hold no document: they "
            f"are too long; expected a blank line between documents (or JSONL, or <doc> blocks)"
        )
    special, width, split = task.special_ids, task.sequence_length, SPLITS.index(task.split)
    line_ends = np.flatnonzero(stored == special.sep)
    line_lengths = np.diff(line_ends, prepend=-1) - 1
    document_ends = np.cumsum(table["own"]["stored"].astype(np.int64))
    lines_before = np.searchsorted(line_ends, document_ends)
    tokens = table["own"]["tokens"].astype(np.int64)
    ids = stored[stored != special.sep]
    del stored  # as large as the shard
    chance = np.empty(0, np.float32)
    if task.packing == "google":
        needed = chances_needed(len(ids), len(table))
        chance = philox.uniforms(
            philox.random_bits(task.seed, split, np.array([task.shard]), needed, SEGMENTS)[0]
        )
    layout = lay_out(task.packing, line_lengths, np.diff(lines_before, prepend=0), width, chance)
    rows = fill(layout, ids, np.cumsum(tokens) - tokens, width, special)
    new_row = philox.permutation(layout.rows, task.seed, split, task.shard, ROWS)
    rows = rows[np.argsort(new_row)]
    row, start, length, document, token = layout.pieces.T
    by_row = np.lexsort((start, new_row[row]))
    pieces = np.empty((len(by_row), 6), "<i4")
    for column, values in enumerate(
        [
            new_row[row],
            start,
            length,
            table["unit"][document],
            table["own"]["document"][document],
            token,
        ]
    ):
        pieces[:, column] = values[by_row]
    unigrams = np.zeros(task.vocab_size, np.int64)
    for first in range(0, len(ids), 1 << 20):  # which become int64
        unigrams += np.bincount(ids[first : first + (1 << 20)], minlength=task.vocab_size)
    unigrams[list(special.model_dump().values())] = 0
    return (
        rows,
        pieces,
        unigrams,
        {
            "documents": len(table),
            "tokens": len(ids),
            "pieces": len(pieces),
            "pad": rows.size - len(ids) - len(layout.cls) - len(layout.sep),
        },
    )
