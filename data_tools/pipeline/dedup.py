"""Which documents nearly repeat one that stays? Those whose signatures share a band of slots are compared.

Equal bands find the candidates (locality-sensitive hashing). A place is a document as one number, unit << 32 | number
in the unit, so that places are in reading order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from data_tools.pipeline.assemble import is_duplicate, read_table
from data_tools.pipeline.clean import SLOTS, hash_rows
from data_tools.pipeline.units import unit_paths
from data_tools.workers import Run

MISSED = 0.01  # share of the pairs just at the threshold that may have no band in common
LEADERS = 8  # of the documents that share a band, so many at most are compared with all others
AT_ONCE = (
    2 << 20
)  # documents grouped at a time: 48 MB, and 256 bytes for each that shares its band with another


def _signatures(folder: str, unit: int) -> np.ndarray:
    """A unit's signatures, [D, SLOTS], mapped; in the order of its document table (D documents, at least one)."""
    return np.memmap(unit_paths(folder, unit)[3], np.uint16, "r").reshape(-1, SLOTS)


def similar_pairs(
    folder: str,
    units: int,
    left_out: str,
    threshold: float,
    parts: int,
    band: slice,
    part: int,
    on_progress: Callable[[int], None],
) -> dict:
    """`pairs` [n, 2] uint64: places of documents whose similarity reaches the threshold, the earlier one first.

    Of one band of slots, and of those whose first slot of it lies in one of equal parts of its values; the documents
    in the .npy `left_out` do not count. Each is compared with the first of its group; those unlike it are then a group
    of their own, and so on.
    """
    duplicates = np.load(left_out, mmap_mode="r", allow_pickle=False)
    found = [np.empty((0, 3), np.uint64)]
    for unit in range(units):
        table = read_table(folder, unit)
        if not len(table):
            continue
        signatures = _signatures(folder, unit)
        rows = np.flatnonzero(
            signatures[:, band.start].astype(np.uint32) * np.uint32(parts) >> 16 == part
        )
        rows = rows[~is_duplicate(duplicates, unit, table[rows])]
        places = table["document"][rows].astype(np.uint64) | np.uint64(unit << 32)
        found.append(
            np.column_stack([hash_rows(signatures[rows, band].T), places, rows.astype(np.uint64)])
        )
    entries = np.concatenate(found)
    _, group, sizes = np.unique(entries[:, 0], return_inverse=True, return_counts=True)
    entries = entries[sizes[group] > 1]
    keys, places, rows = entries[np.lexsort((entries[:, 1], entries[:, 0]))].T
    slots = np.empty((SLOTS, len(keys)), np.uint16)
    unit_of = places >> np.uint64(32)
    by_unit = np.argsort(unit_of, kind="stable")
    for own in (
        np.split(by_unit, np.flatnonzero(np.diff(unit_of[by_unit])) + 1) if len(keys) else ()
    ):
        slots[:, own] = _signatures(folder, int(unit_of[own[0]]))[rows[own]].T
    pairs, rest = [], np.arange(len(keys))
    for _ in range(LEADERS):
        begins = np.diff(keys[rest], prepend=~keys[rest[:1]]) != 0
        leader = rest[np.maximum.accumulate(np.where(begins, np.arange(len(rest)), 0))]
        similar = sum(slot[leader] == slot[rest] for slot in slots) >= threshold * SLOTS
        pairs.append(np.column_stack([places[leader], places[rest]])[similar & ~begins])
        rest = rest[~similar]
    on_progress(1)
    return {"pairs": np.concatenate(pairs)}


def find_near_duplicates(
    folder: str,
    units: int,
    left_out: str,
    threshold: float,
    run: Run,
    progress: Callable[[int, int], None],
) -> np.ndarray:
    """[n, 2] int64 (unit, document), sorted: documents similar to an earlier one that is not among them itself.

    `progress` hears (done, total) of the parts of the work.
    """
    width = max(n for n in range(1, SLOTS + 1) if (1 - threshold**n) ** (SLOTS // n) <= MISSED)
    parts = -(-sum(len(read_table(folder, unit)) for unit in range(units)) // AT_ONCE)
    bands = [slice(first, first + width) for first in range(0, SLOTS - width + 1, width)]
    pairs, gone = np.empty((0, 2), np.uint64), [np.empty(0, np.uint64)]
    for i, band in enumerate(bands):
        pairs_of = partial(similar_pairs, folder, units, left_out, threshold, parts, band)
        results = run(
            pairs_of,
            [*range(parts)],
            lambda done, i=i: progress(i * parts + done, len(bands) * parts),
        )
        pairs = np.unique(np.concatenate([pairs, *(result["pairs"] for result in results)]), axis=0)
    while len(pairs):
        stays = ~np.isin(
            pairs[:, 0], pairs[:, 1]
        )  # no pair that is left speaks against the earlier document
        gone.append(np.unique(pairs[stays, 1]))
        pairs = pairs[~np.isin(pairs, gone[-1]).any(axis=1)]
    places = np.sort(np.concatenate(gone))
    return np.column_stack([places >> np.uint64(32), places & np.uint64(0xFFFFFFFF)]).astype(
        np.int64
    )
