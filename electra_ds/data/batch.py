"""How do rows become this rank's batches? Order, gather, layout, exactly-k choice, prefetch: all from one position.

Letters: B rows, S sequence, K masked positions per row, V vocabulary, G rows of the global batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from electra_ds.common.special_ids import SpecialIds
from electra_ds.data import philox
from electra_ds.data.masking import Recipe, select_masked_positions

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def layout(
    ids: np.ndarray, packing: str, special: SpecialIds
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What [CLS], [SEP] and [PAD] say about packed rows (text cannot make their ids).

    ids: [B, S]. Returns segment_ids, document_ids (0 = padding, else 1, 2, ...), position_ids, each [B, S] int64.
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


def make_batch(
    ids: np.ndarray, rows: np.ndarray, epochs: np.ndarray | int, recipe: Recipe
) -> Batch:
    """Packed rows -> Batch of CPU tensors; each row's part is a pure function of (ids, seed, epoch, row number).

    ids: [B, S] unsigned; rows: [B] row numbers; epochs: [B] or one.
    """

    def bits(n: int, purpose: int) -> np.ndarray:
        return philox.random_bits(recipe.seed, epochs, rows, n, purpose)

    segments, pieces, positions = layout(ids, recipe.packing, recipe.special_ids)
    chosen, used = select_masked_positions(ids, recipe, bits(ids.shape[1], philox.CHOSEN))
    keep = philox.uniforms(bits(used.shape[1], philox.KEEP)) >= np.float32(recipe.mask_token_prob)
    uniforms = philox.uniforms(bits(used.shape[1], philox.UNIFORMS))
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


def fixed_corruption(
    batch: Batch, rows: np.ndarray, unigrams: np.ndarray, special_ids: SpecialIds
) -> tuple[Tensor, Tensor]:
    """Unigram tokens at the batch's masked positions: a replaced-token task that is the same for every model.

    rows: [B] row numbers, the key beside a constant; unigrams: [V] token counts of the training rows (special ids
    are never drawn). Returns input_ids [B, S] int64 and is_replaced [B, S] bool (a draw of the same token is not).
    """
    counts = unigrams.astype(np.int64)
    counts[
        [special_ids.pad, special_ids.unk, special_ids.cls, special_ids.sep, special_ids.mask]
    ] = 0
    ends = np.cumsum(counts)
    random_words = philox.random_bits(
        philox.EVALUATION_SEED, 0, rows, batch.masked_positions.shape[1], philox.CORRUPTION
    )
    draws = np.searchsorted(
        ends, (random_words + 0.5) * 2.0**-32 * ends[-1], side="right"
    )  # [B, K]
    used = batch.masked_weights.numpy() > 0
    ids = batch.input_ids.numpy().copy()
    ids[np.nonzero(used)[0], batch.masked_positions.numpy()[used]] = draws[used]
    corrupted = torch.from_numpy(ids)
    return corrupted, corrupted != batch.input_ids


class Batch(NamedTuple):
    """One micro-batch of packed rows with its masking decisions, a pure function of (seed, epoch, row)."""

    input_ids: Tensor  # [B, S] int64, unmasked
    segment_ids: Tensor  # [B, S] int64
    document_ids: Tensor  # [B, S] int64, 0 = padding, else 1, 2, ... within the row
    position_ids: Tensor  # [B, S] int64, restart at each piece
    masked_positions: Tensor  # [B, K] int64, places in the row; unused ones are 0 with weight 0
    masked_weights: Tensor  # [B, K] float32, 1 or 0
    keep_original: Tensor  # [B, K] bool, True: the place keeps its token instead of [MASK]
    uniforms: Tensor  # [B, K] float32 in [0, 1), one number per draw from the generator
    cu_seqlens: Tensor | None = (
        None  # int32, `ops.attention.document_cu_seqlens` of document_ids; made for CUDA alone
    )

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch of function(tensor) for each tensor that is there."""
        return Batch(*(value if value is None else function(value) for value in self))
