"""How do rows become this rank's batches? Order, gather, layout, exactly-k choice, prefetch: all from one position.

Letters: B rows, S sequence, K chosen places per row, V vocabulary, G rows of the global batch.
"""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from electra_ds import order
from electra_ds.config import ObjectiveConfig, SpecialIds
from electra_ds.errors import UserError
from electra_ds.ops.attention import piece_bounds
from electra_ds.shards import Manifest
from electra_ds.values import Batch

READ_TOKENS = 1 << 18  # gathered at once: several rows of each block then, about 8 MB as tensors
COLUMN_BITS = np.uint64(24)  # of a sorting key; 32 random bits lie above them
SPAN_WORDS = 10  # at most (SpanBERT, section 3.1)
# Words of a span by 12 random bits, the inverse of 1 - .8 ** length: geometric with p = .2, 3.8 on average.
SPAN_LENGTHS = (1 + np.log1p(np.arange(4096) / -4096 * (1 - 0.8**SPAN_WORDS)) / np.log(0.8)).astype(
    np.uint8
)


class Rows(Protocol):
    """The rows of one split, by number."""

    manifest: Manifest  # what they mean
    rows: int
    sequence_length: int
    dtype: np.dtype

    def read(self, rows: np.ndarray) -> np.ndarray:
        """[n] row numbers -> [n, S] unsigned."""


class RowOrder(Protocol):
    """Which row is the n-th, endlessly."""

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] positions -> ([n] row numbers, [n] epochs), int64."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must agree on to go on from a position, JSON values."""


class Recipe(NamedTuple):
    """What turns a row into a batch row beside its ids: the data's facts, the objective's masking, the seed."""

    packing: str  # best_fit, concat or google
    special_ids: SpecialIds
    mask_prob: float
    mask_token_prob: float  # of a chosen place to become [MASK]
    seed: int  # the key
    masking: str = "token"  # or whole_word, span
    begins_word: np.ndarray | None = None  # [V] bool, the tokenizer's; not needed to draw tokens


def max_chosen(mask_prob: float, sequence_length: int) -> int:
    """K, the chosen places that a row has room for: 19 (S = 128, .15), 79 (512, .15), 130 (512, .25)."""
    return max(1, min(sequence_length, int((mask_prob + 0.005) * sequence_length)))


def layout(
    ids: np.ndarray, packing: str, special: SpecialIds
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What [CLS], [SEP] and [PAD] say about packed rows (text cannot make their ids).

    ids: [B, S]. Returns segment_ids, piece_ids (0 = padding, else 1, 2, ...), position_ids, each [B, S] int64.
    best_fit: a piece from each [CLS] to the next, positions restart. concat: one piece. google: one piece,
    segment 1 after the first [SEP].
    """
    real = ids != special.pad
    columns = np.arange(ids.shape[1], dtype=np.int64)
    pieces, positions, segments = (
        real.astype(np.int64),
        columns * real,
        np.zeros(ids.shape, np.int64),
    )
    if packing == "best_fit":
        starts = ids == special.cls
        pieces *= np.cumsum(starts, axis=1)
        positions -= np.maximum.accumulate(columns * starts, axis=1) * real
    elif packing == "google":
        separators = ids == special.sep
        segments[(np.cumsum(separators, axis=1) - separators >= 1) & real] = 1
    return segments, pieces, positions


def choose(ids: np.ndarray, recipe: Recipe, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exactly k distinct places per row, k = min(candidates, max(1, min(K, round(mask_prob * real tokens)))).

    ids: [B, S]; numbers: [B, S] uint32, random. Candidates are the real tokens but [CLS], [SEP], [MASK]; the k with
    the smallest numbers are chosen. With masking whole_word or span, a token takes the number of its word or span:
    these are drawn in random order, and the last one is cut where the k-th place is reached.
    Returns chosen [B, K] int64, ascending, 0 where unused, and used [B, K] bool.
    """
    n, special = ids.shape[1], recipe.special_ids
    slots = max_chosen(recipe.mask_prob, n)
    barred = np.isin(ids, (special.pad, special.cls, special.sep, special.mask))
    if recipe.masking != "token":
        numbers = numbers_of_words(
            numbers, recipe.begins_word[ids], barred, recipe.masking == "span"
        )
    wanted = np.rint(recipe.mask_prob * (ids != special.pad).sum(1))  # halves to even
    k = np.minimum((~barred).sum(1), np.clip(wanted, 1, slots))
    keys = (numbers.astype(np.uint64) << COLUMN_BITS) | np.arange(n, dtype=np.uint64)
    keys |= barred.astype(np.uint64) << np.uint64(63)
    smallest = np.sort(np.partition(keys, slots - 1, axis=1)[:, :slots], axis=1)
    used = np.arange(slots) < k[:, None]
    columns = (smallest & np.uint64((1 << int(COLUMN_BITS)) - 1)).astype(np.int64)
    return np.sort(np.where(used, columns, n), axis=1) * used, used


def numbers_of_words(
    numbers: np.ndarray, begins: np.ndarray, barred: np.ndarray, spans: bool
) -> np.ndarray:
    """The random number of each token's word, which is that of the word's first token; [B, S] uint32.

    numbers: [B, S] uint32; begins: [B, S] bool, by spelling; barred: [B, S] bool, no candidates: no word goes past.
    spans: each word also starts a span of 1 to 10 words, cut before what is barred, and a word takes the smallest
    number of the spans that cover it: that of the first one drawn, starts being drawn uniformly, each once.
    """
    edges = barred.copy()
    edges[:, 1:] |= barred[:, :-1]
    edges[:, 0] = True
    starts = (begins | edges).ravel()
    own = numbers.ravel()[starts]  # [words of all rows]
    drawn = own.copy()
    if spans:
        lengths = SPAN_LENGTHS[own & 4095]  # the order is that of the upper bits, but for ties
        pieces = np.cumsum(edges, dtype=np.int32)[starts]
        for d in range(1, SPAN_WORDS):
            beyond = (lengths[:-d] <= d) | (pieces[:-d] != pieces[d:])
            np.minimum(
                drawn[d:], own[:-d] | -beyond.astype(np.uint32), out=drawn[d:]
            )  # all ones: never the smallest
    return drawn[np.cumsum(starts) - 1].reshape(numbers.shape)


def make_batch(
    ids: np.ndarray, rows: np.ndarray, epochs: np.ndarray | int, recipe: Recipe
) -> Batch:
    """Packed rows -> Batch of CPU tensors; each row's part is a pure function of (ids, seed, epoch, row number).

    ids: [B, S] unsigned; rows: [B] row numbers; epochs: [B] or one.
    """

    def words(n: int, purpose: int) -> np.ndarray:
        return order.words(recipe.seed, epochs, rows, n, purpose)

    segments, pieces, positions = layout(ids, recipe.packing, recipe.special_ids)
    chosen, used = choose(ids, recipe, words(ids.shape[1], order.CHOSEN))
    keep = order.uniforms(words(used.shape[1], order.KEEP)) >= np.float32(recipe.mask_token_prob)
    uniforms = order.uniforms(words(used.shape[1], order.UNIFORMS))
    arrays = (
        ids.astype(np.int64),
        segments,
        pieces,
        positions,
        chosen,
        used.astype(np.float32),
        keep,
        uniforms,
    )
    return Batch(*map(torch.from_numpy, arrays))


def recipe_for(
    manifest: Manifest, objective: ObjectiveConfig, seed: int, begins_word: np.ndarray | None = None
) -> Recipe:
    """The recipe of a run on these rows."""
    return Recipe(
        manifest.packing,
        manifest.tokenizer.special_ids,
        objective.mask_prob,
        objective.mask_token_prob,
        seed,
        objective.masking,
        begins_word,
    )


# ----------------------------------------------------------------------------------------------------- training


class StepBatch(NamedTuple):
    """What one rank computes in one attempt of an optimizer step."""

    position: int  # of the global batch's first row
    micro_positions: list[int]  # of each micro-batch's first row on this rank: seeds its dropout
    micros: list[Batch]
    chosen_count: int  # this rank's sums over the micro-batches, for the global normalisers
    token_count: int
    rows: np.ndarray  # [G / world_size] row numbers, for messages
    wait_seconds: float  # that the caller waited for the data


class Batches:
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
        position: int = 0,
        pin_memory: bool = False,
    ) -> None:
        assert global_batch_size % (world_size * micro_batch_size) == 0 and 0 <= rank < world_size
        self.reader, self.order, self.recipe, self.pin_memory = (
            reader,
            row_order,
            recipe,
            pin_memory,
        )
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank_rows = global_batch_size // world_size
        self.first = rank * self.rank_rows
        self.steps_at_once = max(
            1, min(64, READ_TOKENS // (self.rank_rows * reader.sequence_length))
        )
        self._queue: queue.Queue[StepBatch | Exception] = queue.Queue(2 * self.steps_at_once)
        self._stop, self._failure = threading.Event(), None
        self._thread = threading.Thread(
            target=self._produce, args=(position,), name="batches", daemon=True
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

    def state(self, position: int) -> dict[str, Any]:
        """The data's part of a checkpoint, the same on every rank; `position` is the next global batch's."""
        return _state_head(self.reader, self.order) | {"position": position}

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
        chosen, tokens = batch.chosen_weights.numpy().sum(1), (batch.piece_ids.numpy() > 0).sum(1)
        for i, first in enumerate(firsts.tolist()):
            here = slice(i * own, (i + 1) * own)
            yield StepBatch(
                position=first,
                micro_positions=[first + self.first + start for start in range(0, own, micro)],
                micros=[
                    self._micro(batch, slice(a, a + micro))
                    for a in range(here.start, here.stop, micro)
                ],
                chosen_count=int(chosen[here].sum()),
                token_count=int(tokens[here].sum()),
                rows=rows[here],
                wait_seconds=0.0,
            )

    def _micro(self, batch: Batch, rows: slice) -> Batch:
        own = batch.map(lambda tensor: tensor[rows])
        return (
            own._replace(bounds=piece_bounds(own.piece_ids).pin_memory())
            if self.pin_memory
            else own
        )


def _state_head(reader: Rows, row_order: RowOrder) -> dict[str, Any]:
    return row_order.state() | {"dataset_id": reader.manifest.dataset_id}


def position_from_state(state: dict[str, Any], reader: Rows, row_order: RowOrder) -> int:
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


# --------------------------------------------------------------------------------------------------- evaluation


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
    (number -1, piece_ids 0, chosen_weights 0).
    """
    recipe = recipe._replace(seed=order.EVALUATION_SEED, masking="token")
    total = reader.rows if max_rows is None else min(max_rows, reader.rows)
    for start in range(rank * batch_rows, total + rank * batch_rows, world_size * batch_rows):
        rows = np.arange(start, start + batch_rows)
        rows[rows >= total] = -1
        ids = np.full((batch_rows, reader.sequence_length), recipe.special_ids.pad, reader.dtype)
        ids[rows >= 0] = reader.read(rows[rows >= 0])
        yield make_batch(ids, rows, 0, recipe), rows


def fixed_corruption(
    batch: Batch, rows: np.ndarray, unigrams: np.ndarray, special_ids: SpecialIds
) -> tuple[Tensor, Tensor]:
    """Unigram tokens at the batch's chosen places: a replaced-token task that is the same for every model.

    rows: [B] row numbers, the key beside a constant; unigrams: [V] token counts of the training rows (special ids
    are never drawn). Returns input_ids [B, S] int64 and is_replaced [B, S] bool (a draw of the same token is not).
    """
    counts = unigrams.astype(np.int64)
    counts[
        [special_ids.pad, special_ids.unk, special_ids.cls, special_ids.sep, special_ids.mask]
    ] = 0
    ends = np.cumsum(counts)
    random_words = order.words(
        order.EVALUATION_SEED, 0, rows, batch.chosen.shape[1], order.CORRUPTION
    )
    draws = np.searchsorted(
        ends, (random_words + 0.5) * 2.0**-32 * ends[-1], side="right"
    )  # [B, K]
    used = batch.chosen_weights.numpy() > 0
    ids = batch.input_ids.numpy().copy()
    ids[np.nonzero(used)[0], batch.chosen.numpy()[used]] = draws[used]
    corrupted = torch.from_numpy(ids)
    return corrupted, corrupted != batch.input_ids
