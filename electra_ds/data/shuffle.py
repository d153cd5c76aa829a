"""Order of the training rows as a pure function: position -> (row number, epoch).

Dimensions: n positions, T rows of an epoch.
"""

from collections import OrderedDict
from typing import Any

import numpy as np

from electra_ds.common.arrays import runs
from electra_ds.data.philox import BLOCKS, WINDOW, permutation

ORDER_VERSION = 1
MAX_LANES = 256


class ShuffledOrder:
    """The shuffled order of rows on disk, the same for any world size.

    Every epoch permutes the blocks of rows. Then the rows of each window are permuted; a window is
    `window` consecutive blocks. Positions continue across epochs. Every row occurs once per epoch.
    """

    cached_windows = 4

    def __init__(self, block_rows: np.ndarray, seed: int, window: int = 64) -> None:
        """block_rows: [blocks] rows of each block, in the order of the reader's row numbers."""
        self.seed = seed
        self.window = window
        self.block_rows = np.asarray(block_rows, np.int64)
        self.block_starts = np.cumsum(self.block_rows) - self.block_rows
        self.total_rows = int(self.block_rows.sum())
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def state(self) -> dict[str, Any]:
        """Return the parameters that a checkpoint and the run that resumes from it must share."""
        return {
            "kind": "shards",
            "version": ORDER_VERSION,
            "seed": self.seed,
            "window": self.window,
        }

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map [n] positions to ([n] row numbers, [n] epochs), int64.

        The cost depends on the windows touched, not on the size of the positions.
        """
        positions = np.asarray(positions, np.int64)
        epochs, offsets = np.divmod(positions, self.total_rows)
        rows = np.empty_like(positions)
        for epoch, in_epoch in runs(epochs):
            _, window_starts = self._blocks(epoch)
            windows = np.searchsorted(window_starts, offsets[in_epoch], side="right") - 1
            offsets[in_epoch] -= window_starts[windows]
            for window, in_window in runs(windows):
                window_offsets = offsets[in_epoch][in_window]
                rows[in_epoch][in_window] = self._window(epoch, window)[window_offsets]
        return rows, epochs

    def _blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the permuted blocks, [blocks], and the first offset of each window, [windows]."""
        if self._epoch is None or self._epoch[0] != epoch:
            blocks = permutation(len(self.block_rows), self.seed, epoch, 0, BLOCKS)
            ends = np.cumsum(self.block_rows[blocks])
            starts = np.concatenate([[0], ends[self.window - 1 : -1 : self.window]])
            self._epoch = (epoch, blocks, starts)
        return self._epoch[1:]

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """Return the row numbers of one window in their order, [rows of the window]."""
        key = (epoch, window)
        if key not in self._windows:
            blocks = self._blocks(epoch)[0][window * self.window : (window + 1) * self.window]
            sizes = self.block_rows[blocks]
            # first row of the row's block, minus the rows of the window before that block
            bases = np.repeat(self.block_starts[blocks] - np.cumsum(sizes) + sizes, sizes)
            rows = bases + np.arange(sizes.sum())
            self._windows[key] = rows[permutation(len(rows), self.seed, epoch, window, WINDOW)]
            if len(self._windows) > self.cached_windows:
                self._windows.popitem(last=False)
        return self._windows[key]


class StreamOrder(ShuffledOrder):
    """The shuffled order of streamed rows. A rank reads from few chunks at a time.

    Every epoch permutes the chunks and the rows of each chunk. The resulting T rows are divided
    into lanes of T // lanes rows or one more. Every global batch takes the next rows of each lane,
    in the order of the lanes. So the same slice of every batch, and the rank that reads it, uses
    the same lanes. A lane goes through its rows of one epoch and then of the next. Every row occurs
    once per epoch. The epochs of two lanes may end one row apart.
    """

    def __init__(self, chunk_rows: np.ndarray, seed: int, global_batch_size: int) -> None:
        """chunk_rows: [chunks] rows of each chunk, in the order of the reader's row numbers."""
        super().__init__(chunk_rows, seed, window=1)
        most = min(MAX_LANES, global_batch_size, self.total_rows)
        self.lanes = next(lanes for lanes in range(most, 0, -1) if global_batch_size % lanes == 0)
        self.global_batch_size = global_batch_size
        self.lane_rows = global_batch_size // self.lanes  # of one batch
        # first row of each lane among the rows of an epoch, [lanes + 1]
        self.lane_starts = np.arange(self.lanes + 1) * self.total_rows // self.lanes
        self.cached_windows = 2 * self.lanes

    def state(self) -> dict[str, Any]:
        """Return the parameters that a checkpoint and the run that resumes from it must share."""
        chunks = len(self.block_rows)
        return {
            "kind": "stream",
            "version": ORDER_VERSION,
            "seed": self.seed,
            "lanes": self.lanes,
            "chunks": chunks,
        }

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map [n] positions to ([n] row numbers, [n] epochs), int64.

        The cost depends on the chunks touched, not on the size of the positions.
        """
        batches, slots = np.divmod(np.asarray(positions, np.int64), self.global_batch_size)
        lanes, slots_in_lane = np.divmod(slots, self.lane_rows)
        lane_offsets = batches * self.lane_rows + slots_in_lane  # across epochs
        epochs, offsets = np.divmod(lane_offsets, np.diff(self.lane_starts)[lanes])
        shuffled_positions = epochs * self.total_rows + self.lane_starts[lanes] + offsets
        ascending = np.argsort(shuffled_positions)
        rows = np.empty_like(shuffled_positions)
        rows[ascending] = super().rows(shuffled_positions[ascending])[0]
        return rows, epochs
