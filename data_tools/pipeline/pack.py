"""Packing of documents into rows, as pure functions of lengths. No packing drops a token.

A fragment is a contiguous part of one document in one row. Its start is the column of its first
text token; column 0 is the [CLS] of the row. Its length is the number of its text tokens. Dimensions:
D documents, F fragments, n rows, S sequence length.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from electra_ds.common.special_ids import SpecialIds

PACKINGS = ("best_fit", "concat", "google", "as_rows")
SHORTEST_FREE = 3  # least free space that is filled ([CLS] token [SEP]); less becomes padding
# Probabilities of the authors' code for rows without B and for shorter targets.
SINGLE_SEGMENT = 0.1
SHORT_TARGET = 0.05
SHORTEST_TARGET = 5  # tokens
FILLED_AT_ONCE = 1 << 16  # about the tokens of one step of `fill`, so that arrays fit in the cache


class Layout(NamedTuple):
    """The layout of rows, without token ids."""

    rows: int
    fragments: np.ndarray  # [F, 5] int64: row, start, length, document, first token in the document
    cls: np.ndarray  # [.] int64, positions row * S + column of the [CLS]
    sep: np.ndarray  # [.] int64, positions of the [SEP]


def lay_out(
    packing: str,
    line_lengths: np.ndarray,
    document_lines: np.ndarray,
    width: int,
    uniforms: np.ndarray,
) -> Layout:
    """Place documents into rows of `width` tokens (S).

    packing:        one of PACKINGS
    line_lengths:   [lines] int64 tokens of each line, over all documents in order
    document_lines: [D] int64 number of lines of each document
    uniforms:       [uniforms_needed(...)] random numbers in [0, 1), for google only
    """
    line_ends = np.concatenate([[0], np.cumsum(line_lengths, dtype=np.int64)])
    document_ends = line_ends[np.cumsum(document_lines)]
    lengths = np.diff(document_ends, prepend=0)  # [D]
    if packing == "best_fit":
        return best_fit(lengths, width)
    if packing == "concat":
        return concat(lengths, width)
    if packing == "as_rows":
        return as_rows(line_lengths, document_lines, width)
    assert packing == "google"
    return google(line_lengths, document_lines, width, uniforms)


def best_fit(lengths: np.ndarray, width: int) -> Layout:
    """Cut documents into fragments of width - 2 tokens, each stored as [CLS] tokens [SEP].

    A fragment of full length fills a row. The rest of each document is placed into the row with the
    least sufficient free space, longest rest first (best-fit decreasing); of rows with equal free
    space, into the one that was changed last. lengths: [D] tokens of each document.
    """
    room = width - 2
    full, rest = np.divmod(np.asarray(lengths, np.int64), room)
    full_rows = int(full.sum())
    document = np.repeat(np.arange(len(full)), full)
    nth = np.arange(full_rows) - np.repeat(np.cumsum(full) - full, full)
    tails = np.flatnonzero(rest)  # documents with a rest
    tails = tails[np.argsort(-rest[tails], kind="stable")]
    bins, tail_rows = _pack_bins((rest[tails] + 2).tolist(), width)
    row = np.concatenate([np.arange(full_rows), bins[:, 0] + full_rows])
    start = np.concatenate([np.ones(full_rows, np.int64), bins[:, 1] + 1])
    length = np.concatenate([np.full(full_rows, room), rest[tails]])
    document = np.concatenate([document, tails])
    token = np.concatenate([nth * room, full[tails] * room])
    fragments = np.stack([row, start, length, document, token], axis=1)
    first = row * width + start
    return Layout(full_rows + tail_rows, fragments, first - 1, first + length)


def _pack_bins(sizes: list[int], width: int) -> tuple[np.ndarray, int]:
    """Place sizes, in decreasing order, into bins of `width`.

    Returns ([sizes, 2] int64: bin and offset in the bin; number of bins).
    """
    bins_by_room: list[list[int]] = [[] for _ in range(width + 1)]  # index: free space
    rooms = 0  # bit r is set if a bin has r free tokens
    bins = 0
    placed = np.empty((len(sizes), 2), np.int64)
    for i, size in enumerate(sizes):
        fitting = rooms >> size
        if fitting:
            lowest_bit = (fitting & -fitting).bit_length() - 1
            room = size + lowest_bit
            bin_number = bins_by_room[room].pop()
            if not bins_by_room[room]:
                rooms &= ~(1 << room)
        else:
            room = width
            bin_number = bins
            bins += 1
        placed[i] = bin_number, width - room
        room -= size
        if room >= SHORTEST_FREE:
            bins_by_room[room].append(bin_number)
            rooms |= 1 << room
    return placed, bins


def concat(lengths: np.ndarray, width: int) -> Layout:
    """Cut one stream of documents, a [SEP] after each, into rows of [CLS] and width - 1 tokens.

    lengths: [D] tokens of each document.
    """
    lengths = np.asarray(lengths, np.int64)
    room = width - 1
    ends = np.cumsum(lengths + 1)  # in the stream, [SEP] included
    begins = ends - lengths - 1
    rows = -(-int(ends[-1]) // room) if len(ends) else 0
    row_count = (ends - 2) // room - begins // room + 1  # rows that hold tokens of a document
    document = np.repeat(np.arange(len(lengths)), row_count)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(row_count) - row_count, row_count)
    row = begins[document] // room + nth
    first = np.maximum(begins[document], row * room)
    last = np.minimum(ends[document] - 1, (row + 1) * room)
    fragments = np.stack(
        [row, first - row * room + 1, last - first, document, first - begins[document]], axis=1
    )
    sep = ends - 1
    sep_positions = sep // room * width + 1 + sep % room
    return Layout(rows, fragments, np.arange(rows) * width, sep_positions)


def google(
    line_lengths: np.ndarray, document_lines: np.ndarray, width: int, uniforms: np.ndarray
) -> Layout:
    """Build rows [CLS] A [SEP] B [SEP] from lines, as the authors' code does.

    A row contains text tokens of one document, up to a target length. A ends with the first line
    that reaches about half of the target; B is the rest. Some rows have no B, and some have a
    shorter target. Unlike in the authors' code, text that does not fit starts the next row.

    Arguments as in `lay_out`.
    """
    fragments: list[tuple[int, int, int, int, int]] = []
    sep: list[int] = []
    row = 0
    line = 0
    for document, count in enumerate(document_lines.tolist()):
        ends = np.cumsum(line_lengths[line : line + count]).tolist()
        line += count
        start = 0  # token of the document at which the row begins
        nth = 0  # line of the document
        while ends and start < ends[-1]:
            target, single = _google_target(width, *uniforms[2 * row : 2 * row + 2])
            end = min(start + target, ends[-1])
            half = end if single else min(start + max(1, (target - 3) // 2), end)
            while ends[nth] < half:
                nth += 1
            middle = min(ends[nth], end)
            fragments.append((row, 1, middle - start, document, start))
            sep.append(row * width + 1 + middle - start)
            if end > middle:
                fragments.append((row, 2 + middle - start, end - middle, document, middle))
                sep.append(row * width + 2 + end - start)
            start = end
            row += 1
    table = np.array(fragments, np.int64).reshape(-1, 5)
    return Layout(row, table, np.arange(row) * width, np.array(sep, np.int64))


def _google_target(width: int, for_segments: float, for_length: float) -> tuple[int, bool]:
    """Return (target number of text tokens of a row, whether it has only segment A).

    for_segments, for_length: random numbers in [0, 1)
    """
    single = bool(for_segments < SINGLE_SEGMENT)
    target = width - 2 if single else width - 3
    shortened = for_length / SHORT_TARGET
    if shortened < 1:
        target = SHORTEST_TARGET + int(shortened * (target - SHORTEST_TARGET))
    return target, single


def as_rows(line_lengths: np.ndarray, document_lines: np.ndarray, width: int) -> Layout:
    """Make one row of each document: [CLS] A [SEP], or [CLS] A [SEP] B [SEP].

    A and B are the lines of the document, which must fit into the row. Arguments as in `lay_out`.
    """
    rows = np.arange(len(document_lines))
    row = np.repeat(rows, document_lines)
    first_line = (np.cumsum(document_lines) - document_lines)[row]  # of the same document
    tokens_before = np.cumsum(line_lengths) - line_lengths
    token = tokens_before - tokens_before[first_line]
    start = 1 + token + np.arange(len(row)) - first_line
    assert (start + line_lengths < width).all()
    fragments = np.stack([row, start, line_lengths, row, token], axis=1)
    return Layout(len(rows), fragments, rows * width, row * width + start + line_lengths)


def uniforms_needed(tokens: int, documents: int) -> int:
    """Return a sufficient number of random numbers for `google`.

    Each row uses two. All rows of a document except the last have at least SHORTEST_TARGET tokens.
    tokens: of all documents. documents: number of documents.
    """
    return 2 * (tokens // SHORTEST_TARGET + documents)


def fill(
    layout: Layout, ids: np.ndarray, begins: np.ndarray, width: int, special: SpecialIds
) -> np.ndarray:
    """Return the rows of a layout, [n, S] of `ids.dtype`.

    ids:    text tokens of all documents
    begins: [D] index in `ids` of the first token of each document
    width:  S
    """
    rows = np.full(layout.rows * width, special.pad, ids.dtype)
    rows[layout.cls] = special.cls
    rows[layout.sep] = special.sep
    step = max(1, FILLED_AT_ONCE // width)
    for first in range(0, len(layout.fragments), step):
        row, start, length, document, token = layout.fragments[first : first + step].T
        target = row * width + start
        origin = begins[document] + token
        nth = np.arange(int(length.sum()))  # token of these fragments
        tokens_before = np.cumsum(length) - length
        targets = nth + np.repeat(target - tokens_before, length)
        rows[targets] = ids[targets + np.repeat(origin - target, length)]
    return rows.reshape(layout.rows, width)
