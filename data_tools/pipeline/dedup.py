"""Exact and near-duplicate documents.

Exact duplicates have equal hashes of their text. Near-duplicates are found by locality-sensitive
hashing: documents with MinHash signatures that agree in a band of slots are compared.

A document is identified by (unit, number in the unit), or by the one number unit << 32 | number,
which is in reading order. Dimensions: D documents of a unit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from data_tools.pipeline.clean import SLOTS, hash_rows
from data_tools.pipeline.units import key_range, read_table, unit_files
from data_tools.workers import OnProgress, Run

NO_DUPLICATES = np.empty((0, 2), np.int64)
HASHES_AT_ONCE = 4 << 20  # documents sorted by hash at a time, 104 bytes each
MISSED = 0.01  # share of the pairs at the threshold that may have no band in common
LEADERS = 8  # most documents of a group that all its later documents are compared with
# Documents grouped at a time: 48 MB, and 256 bytes for each one in a group of two or more.
AT_ONCE = 2 << 20
NUMBER_BITS = np.uint64(32)
NUMBER_MASK = np.uint64(0xFFFFFFFF)


def find_duplicates(folder: str, units: int, on_total: Callable[[int], None]) -> np.ndarray:
    """Return every document with the text of an earlier one: [n, 2] int64, sorted.

    folder, units: folder and number of the tokenized units
    on_total:      receives the number of documents compared so far
    Columns are (unit, document). The hashes are divided into equal ranges that are searched in
    turn, so that memory holds about HASHES_AT_ONCE documents.
    """
    total = sum(len(read_table(folder, unit)) for unit in range(units))
    ranges = -(-total // HASHES_AT_ONCE) or 1
    duplicates = [NO_DUPLICATES]
    done = 0
    for part in range(ranges):
        entries = _hash_entries(folder, units, *key_range(part, ranges))
        entries = entries[np.lexsort(entries.T[::-1])]  # by hash, then unit, then document
        same = (entries[1:, :2] == entries[:-1, :2]).all(axis=1)
        duplicates.append(entries[1:][same][:, 2:].astype(np.int64))
        done += len(entries)
        on_total(done)
    return sort_pairs(np.concatenate(duplicates))


def _hash_entries(folder: str, units: int, low: np.uint64, high: np.uint64) -> np.ndarray:
    """Return the documents with a second half of their hash in [low, high]: [n, 4] uint64.

    Columns are (first half of the hash, second half, unit, document).
    """
    entries = []
    for unit in range(units):
        table = read_table(folder, unit)
        table = table[(table["hash"][:, 1] >= low) & (table["hash"][:, 1] <= high)]
        unit_column = np.full(len(table), unit, np.uint64)
        number = table["document"].astype(np.uint64)
        entries.append(np.column_stack([table["hash"], unit_column, number]))
    return np.concatenate(entries)


def sort_pairs(pairs: np.ndarray) -> np.ndarray:
    """Return (unit, document) pairs, [n, 2], in reading order."""
    return pairs[np.lexsort(pairs.T[::-1])]


def is_duplicate(duplicates: np.ndarray, unit: int, table: np.ndarray) -> np.ndarray:
    """Return which documents of a unit's table are in `duplicates` ([n, 2], sorted): [D] bool."""
    first, last = np.searchsorted(duplicates[:, 0], (unit, unit + 1))
    return np.isin(table["document"], duplicates[first:last, 1])


def find_near_duplicates(
    folder: str,
    units: int,
    excluded: str,
    threshold: float,
    run: Run,
    on_part: Callable[[int, int], None],
) -> np.ndarray:
    """Return the documents that are similar to an earlier one that stays: [n, 2] int64, sorted.

    folder, units: folder and number of the tokenized units
    excluded:      .npy file of documents [n, 2] that are ignored, such as exact duplicates
    threshold:     least estimated Jaccard similarity of similar documents, 0.5 to 1
    run:           runs a function on a list of parts of the work, see data_tools/workers.py
    on_part:       receives (number of finished parts, number of all parts)
    Columns are (unit, document).
    """
    pairs = np.empty((0, 2), np.uint64)
    parts = -(-sum(len(read_table(folder, unit)) for unit in range(units)) // AT_ONCE)
    bands = _bands(threshold)
    for i, band in enumerate(bands):
        done_before = i * parts

        def on_total(done: int, done_before: int = done_before) -> None:
            on_part(done_before + done, len(bands) * parts)

        compare = partial(similar_pairs, folder, units, excluded, threshold, parts, band)
        results = run(compare, [*range(parts)], on_total)
        pairs = np.unique(np.concatenate([pairs, *(result["pairs"] for result in results)]), axis=0)
    removed = np.sort(_removed_documents(pairs))
    columns = [removed >> NUMBER_BITS, removed & NUMBER_MASK]
    return np.column_stack(columns).astype(np.int64)


def _bands(threshold: float) -> list[slice]:
    """Return the slots of each band.

    The bands are as wide as possible while pairs at the threshold agree in at least one band with
    probability 1 - MISSED.
    """
    width = max(n for n in range(1, SLOTS + 1) if (1 - threshold**n) ** (SLOTS // n) <= MISSED)
    return [slice(first, first + width) for first in range(0, SLOTS - width + 1, width)]


def _removed_documents(pairs: np.ndarray) -> np.ndarray:
    """Return the documents, [n] uint64, that are similar to an earlier one that stays.

    pairs: [n, 2] uint64, similar documents, the earlier one first
    """
    removed = [np.empty(0, np.uint64)]
    while len(pairs):
        # A document stays if it is not the later document of any remaining pair.
        stays = ~np.isin(pairs[:, 0], pairs[:, 1])
        removed.append(np.unique(pairs[stays, 1]))
        pairs = pairs[~np.isin(pairs, removed[-1]).any(axis=1)]
    return np.concatenate(removed)


def similar_pairs(
    folder: str,
    units: int,
    excluded: str,
    threshold: float,
    parts: int,
    band: slice,
    part: int,
    on_progress: OnProgress,
) -> dict:
    """Find pairs of documents that agree in a band and have a similarity of at least the threshold.

    Returns {"pairs": [n, 2] uint64}, the earlier document first. The values of a slot are divided
    into `parts` equal ranges; only documents with their first slot of the band in range number
    `part` are compared. Documents with equal slots in the band form a group. Each document is
    compared with the first one of its group; those that are not similar to it form a new group.
    This is done LEADERS times.
    """
    entries = _band_entries(folder, units, excluded, parts, band, part)
    _, group, sizes = np.unique(entries[:, 0], return_inverse=True, return_counts=True)
    entries = entries[sizes[group] > 1]
    keys, documents, rows = entries[np.lexsort((entries[:, 1], entries[:, 0]))].T
    slots = _gather_slots(folder, documents, rows)
    pairs = []
    rest = np.arange(len(keys))
    for _ in range(LEADERS):
        begins = np.diff(keys[rest], prepend=~keys[rest[:1]]) != 0  # first document of a group
        leader = rest[np.maximum.accumulate(np.where(begins, np.arange(len(rest)), 0))]
        equal_slots = sum(slot[leader] == slot[rest] for slot in slots)
        similar = equal_slots >= threshold * SLOTS
        candidates = np.column_stack([documents[leader], documents[rest]])
        pairs.append(candidates[similar & ~begins])
        rest = rest[~similar]
    on_progress(1)
    return {"pairs": np.concatenate(pairs)}


def _band_entries(
    folder: str, units: int, excluded: str, parts: int, band: slice, part: int
) -> np.ndarray:
    """Return the documents of one part of a band: [n, 3] uint64.

    Columns are (hash of the band's slots, document, row in the unit's table).
    """
    duplicates = np.load(excluded, mmap_mode="r", allow_pickle=False)
    entries = [np.empty((0, 3), np.uint64)]
    for unit in range(units):
        table = read_table(folder, unit)
        if not len(table):
            continue
        signatures = _read_signatures(folder, unit)
        first_slot = signatures[:, band.start].astype(np.uint32)
        rows = np.flatnonzero(first_slot * np.uint32(parts) >> 16 == part)
        rows = rows[~is_duplicate(duplicates, unit, table[rows])]
        documents = table["document"][rows].astype(np.uint64) | np.uint64(unit << 32)
        hashes = hash_rows(signatures[rows, band].T)
        entries.append(np.column_stack([hashes, documents, rows.astype(np.uint64)]))
    return np.concatenate(entries)


def _gather_slots(folder: str, documents: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the signatures of documents, [SLOTS, n] uint16. rows: [n] rows in the units' tables"""
    slots = np.empty((SLOTS, len(documents)), np.uint16)
    if not len(documents):
        return slots
    unit_of = documents >> NUMBER_BITS
    by_unit = np.argsort(unit_of, kind="stable")
    for of_unit in np.split(by_unit, np.flatnonzero(np.diff(unit_of[by_unit])) + 1):
        signatures = _read_signatures(folder, int(unit_of[of_unit[0]]))
        slots[:, of_unit] = signatures[rows[of_unit]].T
    return slots


def _read_signatures(folder: str, unit: int) -> np.ndarray:
    """Return a unit's signatures, [D, SLOTS] uint16, memory-mapped; D is at least 1."""
    return np.memmap(unit_files(folder, unit).signatures, np.uint16, "r").reshape(-1, SLOTS)
