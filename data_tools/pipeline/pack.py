"""Which piece of which document lies where in which row? The three packings, as pure functions of lengths.

Letters: D documents, P pieces, n rows, S sequence. A piece is a stretch of one document's tokens in one row; its start
and length count text tokens, not [CLS] and [SEP] around it. No packing drops a token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from electra_ds.common.special_ids import SpecialIds

PACKINGS = ("best_fit", "concat", "google", "as_rows")
SHORTEST = 3  # [CLS] token [SEP]: less room is padding
SINGLE_SEGMENT, SHORT_TARGET = (
    0.1,
    0.05,
)  # the authors' probabilities of a row without B, of a shorter target
SHORTEST_TARGET = 5  # tokens


class Layout(NamedTuple):
    """Rows before their ids are filled in."""

    rows: int
    pieces: np.ndarray  # [P, 5] int64: row, start, length, document, token
    cls: np.ndarray  # [.] int64, places row * S + column of the [CLS]
    sep: np.ndarray  # [.] the same of the [SEP]


def lay_out(
    packing: str,
    line_lengths: np.ndarray,
    document_lines: np.ndarray,
    width: int,
    chance: np.ndarray,
) -> Layout:
    """Place documents into rows of `width` tokens.

    line_lengths:   tokens of each line, all documents' lines one after the other
    document_lines: [D] number of lines of each document
    chance:         [chances_needed(...)] random numbers in [0, 1), for google only
    """
    ends = np.concatenate([[0], np.cumsum(line_lengths, dtype=np.int64)])[np.cumsum(document_lines)]
    lengths = np.diff(ends, prepend=0)  # [D]
    if packing == "best_fit":
        return best_fit(lengths, width)
    if packing == "concat":
        return concat(lengths, width)
    if packing == "as_rows":
        return as_rows(line_lengths, document_lines, width)
    assert packing == "google"
    return google(line_lengths, document_lines, width, chance)


def best_fit(lengths: np.ndarray, width: int) -> Layout:
    """Documents in pieces of width - 2; the full ones fill a row each, the rest goes where it fits best.

    Each piece stands as [CLS] tokens [SEP]. Rests are placed by decreasing length into the row with the least room
    that suffices (best-fit decreasing), rows of equal room last in, first out.
    """
    room = width - 2
    full, rest = np.divmod(np.asarray(lengths, np.int64), room)
    count = int(full.sum())
    document = np.repeat(np.arange(len(full)), full)
    token = (np.arange(count) - np.repeat(np.cumsum(full) - full, full)) * room
    tails = np.flatnonzero(rest)
    tails = tails[np.argsort(-rest[tails], kind="stable")]
    places, extra = _place((rest[tails] + 2).tolist(), width)
    row = np.concatenate([np.arange(count), places[:, 0] + count])
    start = np.concatenate([np.ones(count, np.int64), places[:, 1] + 1])
    length = np.concatenate([np.full(count, room), rest[tails]])
    pieces = np.stack(
        [
            row,
            start,
            length,
            np.concatenate([document, tails]),
            np.concatenate([token, full[tails] * room]),
        ],
        axis=1,
    )
    first = row * width + start
    return Layout(count + extra, pieces, first - 1, first + length)


def _place(sizes: list[int], width: int) -> tuple[np.ndarray, int]:
    """Bins of `width` for decreasing sizes: ([P, 2] bin and offset, bins). Rooms with a bin are bits of one integer."""
    open_bins: list[list[int]] = [[] for _ in range(width + 1)]  # by room left
    rooms, bins, places = 0, 0, np.empty((len(sizes), 2), np.int64)
    for i, size in enumerate(sizes):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            own = open_bins[room].pop()
            if not open_bins[room]:
                rooms &= ~(1 << room)
        else:
            room, own, bins = width, bins, bins + 1
        places[i] = own, width - room
        room -= size
        if room >= SHORTEST:
            open_bins[room].append(own)
            rooms |= 1 << room
    return places, bins


def concat(lengths: np.ndarray, width: int) -> Layout:
    """One stream of documents, a [SEP] after each, cut into rows of one [CLS] and width - 1 tokens of the stream."""
    lengths = np.asarray(lengths, np.int64)
    room = width - 1
    ends = np.cumsum(lengths + 1)  # of a document with its [SEP], in the stream
    begins = ends - lengths - 1
    rows = -(-int(ends[-1]) // room) if len(ends) else 0
    touched = (ends - 2) // room - begins // room + 1  # rows that a document's tokens reach
    document = np.repeat(np.arange(len(lengths)), touched)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(touched) - touched, touched)
    row = begins[document] // room + nth
    left = np.maximum(begins[document], row * room)
    right = np.minimum(ends[document] - 1, (row + 1) * room)
    pieces = np.stack(
        [row, left - row * room + 1, right - left, document, left - begins[document]], axis=1
    )
    sep = ends - 1
    return Layout(rows, pieces, np.arange(rows) * width, sep // room * width + 1 + sep % room)


def google(
    line_lengths: np.ndarray, document_lines: np.ndarray, width: int, chance: np.ndarray
) -> Layout:
    """[CLS] A [SEP] B [SEP] as the authors build rows from lines, except that what overflows starts the next row.

    A row takes tokens up to a target; A ends with the first line that reaches about half of it, B is the rest. Some
    rows have no B, some a shorter target; rows never cross documents. chance: see `chances_needed`.
    """
    pieces, sep = [], []
    row = line = 0
    for document, count in enumerate(document_lines.tolist()):
        ends = np.cumsum(line_lengths[line : line + count]).tolist()
        line += count
        at = nth = 0
        while ends and at < ends[-1]:
            single, short = chance[2 * row] < SINGLE_SEGMENT, chance[2 * row + 1] / SHORT_TARGET
            target = width - 2 if single else width - 3
            if short < 1:
                target = SHORTEST_TARGET + int(short * (target - SHORTEST_TARGET))
            end = min(at + target, ends[-1])
            wanted = end if single else min(at + max(1, (target - 3) // 2), end)
            while ends[nth] < wanted:
                nth += 1
            middle = min(ends[nth], end)
            pieces.append((row, 1, middle - at, document, at))
            sep.append(row * width + 1 + middle - at)
            if end > middle:
                pieces.append((row, 2 + middle - at, end - middle, document, middle))
                sep.append(row * width + 2 + end - at)
            at, row = end, row + 1
    table = np.array(pieces, np.int64).reshape(-1, 5)
    return Layout(row, table, np.arange(row) * width, np.array(sep, np.int64))


def as_rows(line_lengths: np.ndarray, document_lines: np.ndarray, width: int) -> Layout:
    """A row [CLS] A [SEP] or [CLS] A [SEP] B [SEP] for each document: A and B are its lines."""
    rows = np.arange(len(document_lines))
    row = np.repeat(rows, document_lines)
    first = (np.cumsum(document_lines) - document_lines)[row]  # line of the same document
    before = np.cumsum(line_lengths) - line_lengths
    token = before - before[first]
    start = 1 + token + np.arange(len(row)) - first
    assert (start + line_lengths < width).all()
    pieces = np.stack([row, start, line_lengths, row, token], axis=1)
    return Layout(len(rows), pieces, rows * width, row * width + start + line_lengths)


def chances_needed(tokens: int, documents: int) -> int:
    """Random numbers that suffice for `google`: two a row, each row but a document's last of SHORTEST_TARGET tokens."""
    return 2 * (tokens // SHORTEST_TARGET + documents)


def fill(
    layout: Layout, ids: np.ndarray, begins: np.ndarray, width: int, special: SpecialIds
) -> np.ndarray:
    """The rows [n, S] of `ids.dtype`: document d's tokens are ids[begins[d]:]."""
    rows = np.full(layout.rows * width, special.pad, ids.dtype)
    rows[layout.cls], rows[layout.sep] = special.cls, special.sep
    step = max(1, (1 << 16) // width)  # pieces at a time: index arrays stay in the cache
    for first in range(0, len(layout.pieces), step):
        row, start, length, document, token = layout.pieces[first : first + step].T
        place, origin = row * width + start, begins[document] + token
        targets = np.arange(int(length.sum())) + np.repeat(
            place - np.cumsum(length) + length, length
        )
        rows[targets] = ids[targets + np.repeat(origin - place, length)]
    return rows.reshape(layout.rows, width)
