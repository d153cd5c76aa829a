"""This rank's batches from a row count on, prepared ahead by a thread; batches for evaluation."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.data import philox
from electra_ds.data.batch import Batch, make_batch
from electra_ds.data.masking import Recipe
from electra_ds.data.rows import RowOrder, Rows

READ_TOKENS = 1 << 18  # gathered at once: several rows of each block then, about 8 MB as tensors


class StepBatch(NamedTuple):
    """What one rank computes in one attempt of an optimizer step."""

    first_row: int  # of the global batch's first row
    first_rows: list[int]  # of each micro-batch's first row on this rank: seeds its dropout
    micro_batches: list[Batch]
    masked_count: int  # this rank's sums over the micro-batches, for the global normalisers
    token_count: int
    rows: np.ndarray  # [G / world_size] row numbers, for messages
    wait_seconds: float  # that the caller waited for the data


class Loader:
    """This rank's batches from a position on, endless, made ahead by one thread.

    The global batch at position p is the rows at p .. p + G - 1; rank r takes the r-th contiguous slice and
    micro-batch i the i-th slice of that. An error in the thread is raised by the next `next()`.
    """

    def __init__(
        self,
        reader: Rows,
        row_order: RowOrder,
        recipe: Recipe,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        consumed_rows: int = 0,
        pin_memory: bool = False,
        transform: Callable[[Batch], Batch] | None = None,
    ) -> None:
        assert global_batch_size % (world_size * micro_batch_size) == 0 and 0 <= rank < world_size
        self.reader, self.order, self.recipe, self.pin_memory = (
            reader,
            row_order,
            recipe,
            pin_memory,
        )
        self.transform = transform
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank_rows = global_batch_size // world_size
        self.first = rank * self.rank_rows
        self.steps_at_once = max(
            1, min(64, READ_TOKENS // (self.rank_rows * reader.sequence_length))
        )
        self._queue: queue.Queue[StepBatch | Exception] = queue.Queue(2 * self.steps_at_once)
        self._stop, self._failure = threading.Event(), None
        self._thread = threading.Thread(
            target=self._produce, args=(consumed_rows,), name="batches", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._failure is not None:
            raise self._failure
        assert not self._stop.is_set(), "these batches are closed"
        start = time.perf_counter()
        item = self._queue.get()
        if isinstance(item, Exception):
            self._failure = item
            raise item
        return item._replace(wait_seconds=time.perf_counter() - start)

    def state(self, consumed_rows: int) -> dict[str, Any]:
        """The data's part of a checkpoint, the same on every rank; consumed_rows: row count at which the next global batch starts."""
        return _state_head(self.reader, self.order) | {"position": consumed_rows}

    def close(self) -> None:
        """End the thread; batches made ahead are dropped."""
        self._stop.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join()

    def _produce(self, position: int) -> None:
        try:
            steps = 1  # at first, so that the first batch waits for no others
            while not self._stop.is_set():
                for step in self._read(position, steps):
                    self._put(step)
                position, steps = position + steps * self.global_batch_size, self.steps_at_once
        except Exception as error:  # handed to the caller of next()
            self._put(error)

    def _put(self, item: StepBatch | Exception) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                pass

    def _read(self, position: int, steps: int) -> Iterator[StepBatch]:
        """The next `steps` steps, gathered and masked as one."""
        own, micro = self.rank_rows, self.micro_batch_size
        firsts = position + np.arange(steps) * self.global_batch_size
        rows, epochs = self.order.rows((firsts[:, None] + self.first + np.arange(own)).ravel())
        batch = make_batch(self.reader.read(rows), rows, epochs, self.recipe)
        if self.pin_memory:
            batch = batch.map(Tensor.pin_memory)
        chosen, tokens = (
            batch.masked_weights.numpy().sum(1),
            (batch.document_ids.numpy() > 0).sum(1),
        )
        for i, first in enumerate(firsts.tolist()):
            here = slice(i * own, (i + 1) * own)
            yield StepBatch(
                first_row=first,
                first_rows=[first + self.first + start for start in range(0, own, micro)],
                micro_batches=[
                    self._micro(batch, slice(a, a + micro))
                    for a in range(here.start, here.stop, micro)
                ],
                masked_count=int(chosen[here].sum()),
                token_count=int(tokens[here].sum()),
                rows=rows[here],
                wait_seconds=0.0,
            )

    def _micro(self, batch: Batch, rows: slice) -> Batch:
        own = batch.map(lambda tensor: tensor[rows])
        return own if self.transform is None else self.transform(own)


def _state_head(reader: Rows, row_order: RowOrder) -> dict[str, Any]:
    return row_order.state() | {"dataset_id": reader.manifest.dataset_id}


def consumed_rows_from_state(state: dict[str, Any], reader: Rows, row_order: RowOrder) -> int:
    """The position to go on from. UserError lists every difference between the state and this run's data."""
    expected = _state_head(reader, row_order)
    differ = [
        f"{key}: checkpoint {state.get(key)!r}, now {value!r}"
        for key, value in expected.items()
        if state.get(key) != value
    ]
    if differ:
        raise UserError(
            "the checkpoint belongs to other data: "
            + "; ".join(differ)
            + "; give the data it was made with, or "
            "start from its weights with --init-from"
        )
    return int(state["position"])


def evaluation_batches(
    reader: Rows,
    recipe: Recipe,
    *,
    batch_rows: int,
    rank: int = 0,
    world_size: int = 1,
    max_rows: int | None = None,
) -> Iterator[tuple[Batch, np.ndarray]]:
    """The split's first `max_rows` rows (all: None), each once over the ranks, with the row numbers [batch_rows] int64.

    Masked with the constant evaluation seed and by tokens, whatever the run's recipe says, so that every run and
    checkpoint sees the same. Every rank gets the same number of batches; rows that fill up are padding throughout
    (number -1, document_ids 0, masked_weights 0).
    """
    recipe = recipe._replace(seed=philox.EVALUATION_SEED, masking="token")
    total = reader.rows if max_rows is None else min(max_rows, reader.rows)
    for start in range(rank * batch_rows, total + rank * batch_rows, world_size * batch_rows):
        rows = np.arange(start, start + batch_rows)
        rows[rows >= total] = -1
        ids = np.full((batch_rows, reader.sequence_length), recipe.special_ids.pad, reader.dtype)
        ids[rows >= 0] = reader.read(rows[rows >= 0])
        yield make_batch(ids, rows, 0, recipe), rows
