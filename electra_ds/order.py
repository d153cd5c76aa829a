"""Which row is the n-th? Pure arithmetic on (seed, epoch, position), and the random words that belong to a row.

Raw Philox words and a shuffle of our own, since libraries do not promise the streams of their generators. Anything
here that changes an answer raises ORDER_VERSION. Letters: n positions or words, B rows.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

ORDER_VERSION = 1
EVALUATION_SEED = 0x454C_4543_5452_41  # "ELECTRA": held-out rows are masked alike for every run and every checkpoint
# What a word is for: the low 8 bits of the counter's second word, so that no two uses share a number.
BLOCKS, WINDOW, CHOSEN, KEEP, UNIFORMS, CORRUPTION, EXAMPLES, MIXTURE = range(8)
MAX_LANES = 256
PIECE = 4096  # counters at a time: their words stay in the processor's cache
LOW32 = np.uint64(0xFFFF_FFFF)


def philox(counter: Sequence[np.ndarray], key: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    counter: four uint64 arrays of 32-bit values that broadcast to one shape; key: 64 bits, low word first.
    Returns [..., 4] uint32.
    """
    c0, c1, c2, c3 = counter
    for turn in range(10):
        k0 = np.uint64((key + turn * 0x9E3779B9) & 0xFFFF_FFFF)
        k1 = np.uint64(((key >> 32) + turn * 0xBB67AE85) & 0xFFFF_FFFF)
        left, right = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (right >> 32) ^ c1 ^ k0,
            right & LOW32,
            (left >> 32) ^ c3 ^ k1,
            left & LOW32,
        )
    out = np.empty((*c0.shape, 4), np.uint32)
    for i, part in enumerate((c0, c1, c2, c3)):
        out[..., i] = part
    return out


def words(
    seed: int, epochs: np.ndarray | int, rows: np.ndarray, n: int, purpose: int
) -> np.ndarray:
    """n random words for each row, a pure function of (seed, epoch, row, purpose).

    seed: 0 <= seed < 2**64; epochs: [B] or one, below 2**24; rows: [B] non-negative. Returns [B, n] uint32.
    """
    rows = np.asarray(rows).astype(np.uint64)
    stream = (np.broadcast_to(epochs, rows.shape).astype(np.uint64) << 8) | np.uint64(purpose)
    counter = np.stack([stream, rows & LOW32, rows >> 32])[..., None]  # [3, B, 1]
    quads = np.arange(-(-n // 4), dtype=np.uint64)
    found = np.empty((len(rows), len(quads), 4), np.uint32)
    high, wide = max(1, PIECE // len(quads)), min(PIECE, len(quads))
    for row in range(0, len(rows), high):
        for quad in range(0, len(quads), wide):
            here = slice(row, row + high), slice(quad, quad + wide)
            found[here] = philox((quads[here[1]], *counter[:, here[0]]), seed)
    return found.reshape(len(rows), -1)[:, :n]


def uniforms(random_words: np.ndarray) -> np.ndarray:
    """uint32 words -> float32 in [0, 1): the upper 24 bits, so that the largest is 1 - 2**-24."""
    return (random_words >> 8).astype(np.float32) * np.float32(2.0**-24)


def permutation(n: int, seed: int, epoch: int, stream: int, purpose: int) -> np.ndarray:
    """A random order of 0..n-1, [n] int64: numbers sorted by random keys that carry them in their low bits."""
    pairs = words(seed, epoch, np.array([stream]), 2 * n, purpose)[0].view("<u8")
    low = np.uint64((1 << max(1, n - 1).bit_length()) - 1)
    keys = (pairs << 32 | pairs >> 32) & ~low  # the first word of a pair is the high one
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()  # all keys differ, so every sorting method gives this order
    return (keys & low).astype(np.int64)


def runs(values: np.ndarray) -> Iterator[tuple[int, slice]]:
    """The stretches of equal values, in order: (value, where)."""
    cuts = np.flatnonzero(values[1:] != values[:-1]) + 1
    for first, last in itertools.pairwise(
        [0, *cuts.tolist(), len(values)][: len(values) + 1]
    ):  # none if empty
        yield int(values[first]), slice(first, last)


class Order:
    """The order of training: position -> (row, epoch), for any world size and any number of readers.

    Per epoch the blocks are permuted; windows of `window` consecutive permuted blocks follow one another, and the
    rows of a window are permuted among themselves. Positions run on across epochs; each row comes once per epoch.
    """

    windows_kept = 4  # in memory

    def __init__(self, block_rows: np.ndarray, seed: int, window: int = 64) -> None:
        """block_rows: [blocks] rows in each block, in the reader's numbering of rows."""
        self.seed, self.window = seed, window
        self.block_rows = np.asarray(block_rows, np.int64)
        self.block_starts = np.cumsum(self.block_rows) - self.block_rows
        self.total_rows = int(self.block_rows.sum())
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must agree on to go on from a position."""
        return {
            "kind": "shards",
            "version": ORDER_VERSION,
            "seed": self.seed,
            "window": self.window,
        }

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] positions, any, -> ([n] row numbers, [n] epochs), int64. Costs the windows touched, not the history."""
        positions = np.asarray(positions, np.int64)
        epochs, offsets = np.divmod(positions, self.total_rows)
        rows = np.empty_like(positions)
        for epoch, part in runs(epochs):
            _, window_starts = self._blocks(epoch)
            windows = np.searchsorted(window_starts, offsets[part], side="right") - 1
            offsets[part] -= window_starts[windows]
            for window, own in runs(windows):
                rows[part][own] = self._window(epoch, window)[offsets[part][own]]
        return rows, epochs

    def _blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of blocks, [blocks], and the first offset of each window, [windows]."""
        if self._epoch is None or self._epoch[0] != epoch:
            blocks = permutation(len(self.block_rows), self.seed, epoch, 0, BLOCKS)
            ends = np.cumsum(self.block_rows[blocks])
            starts = np.concatenate([[0], ends[self.window - 1 : -1 : self.window]])
            self._epoch = (epoch, blocks, starts)
        return self._epoch[1:]

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """The rows of a window in their order, [rows of the window]."""
        if (epoch, window) not in self._windows:
            blocks = self._blocks(epoch)[0][window * self.window : (window + 1) * self.window]
            sizes = self.block_rows[blocks]
            rows = np.repeat(
                self.block_starts[blocks] - np.cumsum(sizes) + sizes, sizes
            ) + np.arange(sizes.sum())
            self._windows[epoch, window] = rows[
                permutation(len(rows), self.seed, epoch, window, WINDOW)
            ]
            if len(self._windows) > self.windows_kept:
                self._windows.popitem(last=False)
        return self._windows[epoch, window]


class LaneOrder(Order):
    """The order of streamed rows: position -> (row, epoch), where a rank reads from few chunks at a time.

    The rows of an epoch, chunk after permuted chunk and permuted within each, are cut into lanes of T // lanes rows or
    one more. Every global batch takes its next rows from each lane, lane after lane, so that neighbouring slices of
    all batches come from neighbouring lanes; a lane goes through its rows of one epoch, then of the next. So each row
    comes once per epoch, and the epoch ends in one lane up to a row earlier than in another.
    """

    def __init__(self, chunk_rows: np.ndarray, seed: int, global_batch_size: int) -> None:
        """chunk_rows: [chunks] rows in each chunk, in the reader's numbering of rows."""
        super().__init__(chunk_rows, seed, window=1)
        most = min(MAX_LANES, global_batch_size, self.total_rows)
        self.lanes = next(lanes for lanes in range(most, 0, -1) if global_batch_size % lanes == 0)
        self.global_batch_size, self.lane_rows = (
            global_batch_size,
            global_batch_size // self.lanes,
        )  # of a batch
        self.lane_starts = (
            np.arange(self.lanes + 1) * self.total_rows // self.lanes
        )  # in the rows of an epoch
        self.windows_kept = 2 * self.lanes

    def state(self) -> dict[str, Any]:
        """What a checkpoint must agree on to go on from a position."""
        chunks = len(self.block_rows)
        return {
            "kind": "stream",
            "version": ORDER_VERSION,
            "seed": self.seed,
            "lanes": self.lanes,
            "chunks": chunks,
        }

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] positions, any, -> ([n] row numbers, [n] epochs), int64. Costs the chunks touched, not the history."""
        batches, slots = np.divmod(np.asarray(positions, np.int64), self.global_batch_size)
        lanes, turns = np.divmod(slots, self.lane_rows)
        epochs, offsets = np.divmod(
            batches * self.lane_rows + turns, np.diff(self.lane_starts)[lanes]
        )
        places = epochs * self.total_rows + self.lane_starts[lanes] + offsets
        by_place, rows = np.argsort(places), np.empty_like(places)
        rows[by_place] = super().rows(places[by_place])[0]
        return rows, epochs
