"""Order of training rows: which row is the n-th, for any world size."""

from collections import OrderedDict
from typing import Any

import numpy as np

from electra_ds.common.arrays import runs
from electra_ds.data.philox import BLOCKS, WINDOW, permutation

ORDER_VERSION = 1
MAX_LANES = 256


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
