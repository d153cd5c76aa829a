"""Endless batches of one rank, prepared by a thread, and batches of held-out rows.

Dimensions: B rows of a micro-batch, G rows of the global batch.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.config.batch_sizes import BatchSizes
from electra_ds.data import philox
from electra_ds.data.batch import Batch, make_batch
from electra_ds.data.masking import MaskingRecipe
from electra_ds.data.rows import RowOrder, RowReader

# Tokens that one read returns, about 8 MB as tensors. With so many, each block gives several rows.
READ_TOKENS = 1 << 18
MOST_STEPS = 64  # of one read


class StepBatch(NamedTuple):
    """The rows of one rank in one attempt of an optimizer step."""

    first_row: int  # position (not row number) of the first row of the global batch
    global_rows: int  # rows of the global batch
    first_rows: list[int]  # positions of the first rows of the micro-batches; they seed dropout
    micro_batches: list[Batch]
    masked_count: int  # masked positions of this rank; summed over ranks, a divisor of the losses
    token_count: int  # real tokens of this rank; summed over ranks, a divisor of the losses
    rows: np.ndarray  # [G / world_size] row numbers, for messages
    wait_seconds: float  # time that the caller waited for the data


class Loader:
    """Endless iterator over the batches of one rank, prepared ahead by one thread.

    The global batch that starts at position p has the rows at positions p .. p + G - 1. Rank r
    takes the r-th contiguous slice of it, and micro-batch i takes the i-th slice of that. G may
    depend on the number of attempts. An exception in the thread is raised by the next call of
    `next()`.
    """

    def __init__(
        self,
        reader: RowReader,
        row_order: RowOrder,
        recipe: MaskingRecipe,
        *,
        global_batch_size: int | BatchSizes,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        consumed_rows: int = 0,
        attempts: int = 0,
        pin_memory: bool = False,
        transform: Callable[[Batch], Batch] | None = None,
    ) -> None:
        """Start the thread.

        reader:        the rows of the training split
        row_order:     row number and epoch of each position
        recipe:        masking of the rows
        global_batch_size: rows of all ranks in a step, or in each attempt, divisible by world_size *
            micro_batch_size
        micro_batch_size: rows of a forward pass of this rank
        rank, world_size: this rank's share of a global batch
        consumed_rows: position of the first row of the first global batch
        attempts:      applied and skipped steps before the first global batch
        pin_memory:    copy the tensors to page-locked memory, for a GPU
        transform:     applied to each micro-batch in the thread
        """
        if isinstance(global_batch_size, int):
            global_batch_size = BatchSizes(global_batch_size)
        self.sizes = global_batch_size
        assert all(size % (world_size * micro_batch_size) == 0 for size in self.sizes.sizes)
        assert 0 <= rank < world_size
        self.reader = reader
        self.order = row_order
        self.recipe = recipe
        self.pin_memory = pin_memory
        self.transform = transform
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self._queue: queue.Queue[StepBatch | Exception] = queue.Queue()
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(
            target=self._produce, args=(consumed_rows, attempts), name="loader", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._failure is not None:
            raise self._failure
        assert not self._stop.is_set(), "the loader is closed"
        start = time.perf_counter()
        item = self._queue.get()
        if isinstance(item, Exception):
            self._failure = item
            raise item
        return item._replace(wait_seconds=time.perf_counter() - start)

    def state(self, consumed_rows: int) -> dict[str, Any]:
        """Return the state of the data order for a checkpoint. It is equal on every rank.

        consumed_rows: position at which the next global batch starts
        """
        return data_state(self.reader, self.order) | {"position": consumed_rows}

    def close(self) -> None:
        """Stop the thread and drop the batches that it prepared."""
        self._stop.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join()

    def _produce(self, consumed_rows: int, attempts: int) -> None:
        try:
            steps = 1  # at first, so that the first batch is ready early
            while not self._stop.is_set():
                self._queue.maxsize = 2 * self._steps_per_read(attempts)
                for step in self._read(consumed_rows, attempts, steps):
                    self._put(step)
                consumed_rows += self.sizes.rows_between(attempts, attempts + steps)
                attempts += steps
                steps = self._steps_per_read(attempts)
        except Exception as error:  # raised by next() in the caller's thread
            self._put(error)

    def _steps_per_read(self, attempts: int) -> int:
        later = attempts + MOST_STEPS  # a read may cross a change of the size
        rank_rows = max(self.sizes.rows(attempts), self.sizes.rows(later)) // self.world_size
        steps = READ_TOKENS // (rank_rows * self.reader.sequence_length)
        return max(1, min(MOST_STEPS, steps))

    def _put(self, item: StepBatch | Exception) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                pass

    def _read(self, consumed_rows: int, attempts: int, steps: int) -> Iterator[StepBatch]:
        """Read and mask the rows of the next `steps` steps at once, and yield the steps."""
        global_rows = [self.sizes.rows(attempts + step) for step in range(steps)]
        first_rows = consumed_rows + np.cumsum([0, *global_rows[:-1]])
        shares = [size // self.world_size for size in global_rows]  # rows of this rank
        own_first = [
            first + self.rank * share for first, share in zip(first_rows, shares, strict=True)
        ]
        own = [first + np.arange(share) for first, share in zip(own_first, shares, strict=True)]
        rows, epochs = self.order.rows(np.concatenate(own))
        batch = make_batch(self.reader.read(rows), rows, epochs, self.recipe)
        if self.pin_memory:
            batch = batch.map(Tensor.pin_memory)
        masked_counts = batch.masked_weights.numpy().sum(1)
        token_counts = (batch.document_ids.numpy() > 0).sum(1)
        start = 0
        for i, share in enumerate(shares):
            here = slice(start, start + share)
            micro_starts = range(0, share, self.micro_batch_size)
            yield StepBatch(
                first_row=int(first_rows[i]),
                global_rows=global_rows[i],
                first_rows=[int(own_first[i]) + offset for offset in micro_starts],
                micro_batches=[self._micro_batch(batch, start + offset) for offset in micro_starts],
                masked_count=int(masked_counts[here].sum()),
                token_count=int(token_counts[here].sum()),
                rows=rows[here],
                wait_seconds=0.0,
            )
            start += share

    def _micro_batch(self, batch: Batch, start: int) -> Batch:
        micro_batch = batch.map(lambda tensor: tensor[start : start + self.micro_batch_size])
        return micro_batch if self.transform is None else self.transform(micro_batch)


def data_state(reader: RowReader, row_order: RowOrder) -> dict[str, Any]:
    """Return what the rows at all positions depend on, as JSON values: the data and the order."""
    return row_order.state() | {"dataset_id": reader.manifest.dataset_id}


def data_differences(state: dict[str, Any], reader: RowReader, row_order: RowOrder) -> list[str]:
    """Return every difference between the data and order of a checkpoint and those of this run."""
    return [
        f"{key}: checkpoint {state.get(key)!r}, now {value!r}"
        for key, value in data_state(reader, row_order).items()
        if state.get(key) != value
    ]


def consumed_rows_from_state(state: dict[str, Any], reader: RowReader, row_order: RowOrder) -> int:
    """Return the number of rows that the run of a checkpoint has consumed: its next position.

    Raises UserError with every difference between the state and the data of this run.
    """
    if differences := data_differences(state, reader, row_order):
        raise UserError(
            f"the checkpoint belongs to other data: {'; '.join(differences)}; pass the data of the "
            "checkpoint, or start from its weights with --init-from"
        )
    return int(state["position"])


def evaluation_batches(
    reader: RowReader,
    recipe: MaskingRecipe,
    *,
    batch_rows: int,
    rank: int = 0,
    world_size: int = 1,
    max_rows: int | None = None,
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield this rank's batches of the first `max_rows` rows of a split, and their row numbers.

    Together the ranks yield each row once. All ranks yield the same number of batches. Missing rows
    are padding: row number -1, document_ids 0, masked_weights 0. Masking is the same for every run
    and every checkpoint: it selects tokens and uses a constant seed.

    max_rows: None for all rows
    Yields (batch with B = batch_rows, row numbers [batch_rows] int64).
    """
    if max_rows is not None and max_rows < 1:
        raise UserError(f"max_rows = {max_rows}; expected at least 1, or none for all rows")
    recipe = recipe._replace(seed=philox.EVALUATION_SEED, masking="token")
    total = reader.rows if max_rows is None else min(max_rows, reader.rows)
    first = rank * batch_rows
    for start in range(first, total + first, world_size * batch_rows):
        rows = np.arange(start, start + batch_rows)
        rows[rows >= total] = -1
        ids = np.full((batch_rows, reader.sequence_length), recipe.special_ids.pad, reader.dtype)
        ids[rows >= 0] = reader.read(rows[rows >= 0])
        yield make_batch(ids, rows, 0, recipe), rows
