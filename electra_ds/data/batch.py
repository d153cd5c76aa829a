"""Batches of packed rows: layout of the rows, masked positions and random numbers.

Dimensions: B rows, S sequence, K masked positions per row, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from electra_ds.common.special_ids import SpecialIds
from electra_ds.data import philox
from electra_ds.data.masking import MaskingRecipe, select_masked_positions

if TYPE_CHECKING:
    from collections.abc import Callable


class Batch(NamedTuple):
    """One micro-batch of packed rows with masked positions and random numbers.

    All of it is a pure function of (token ids, seed, epoch, row number).
    """

    input_ids: Tensor  # [B, S] int64, unmasked
    segment_ids: Tensor  # [B, S] int64
    document_ids: Tensor  # [B, S] int64, 0 = padding, else 1, 2, ... within the row
    position_ids: Tensor  # [B, S] int64, restart at each document
    masked_positions: Tensor  # [B, K] int64, columns of the row; unused ones are 0 with weight 0
    masked_weights: Tensor  # [B, K] float32, 1 or 0
    keep_original: Tensor  # [B, K] bool, True: the position keeps its token instead of [MASK]
    uniforms: Tensor  # [B, K] float32 in [0, 1), one number for each draw from the generator
    # int32, starts of the documents in the flattened batch; the loader leaves it None and
    # `model.kernels.attention_mask.with_cu_seqlens` fills it in
    cu_seqlens: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return a batch with function(tensor) for each tensor; fields that are None stay None."""
        return Batch._make(None if value is None else function(value) for value in self)


def row_layout(
    ids: np.ndarray, packing: str, special: SpecialIds
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Derive segments, documents and positions of packed rows from their special tokens.

    best_fit: a document fragment extends from each [CLS] to the next, and its positions restart
    concat:   the row is one document
    google:   the row is one document, with segment 1 after the first [SEP]

    ids: [B, S] token ids; text produces no [PAD], [CLS] or [SEP]
    Returns segment_ids, document_ids (0 = padding, else 1, 2, ...) and position_ids, each [B, S]
    int64.
    """
    real = ids != special.pad
    columns = np.arange(ids.shape[1], dtype=np.int64)
    document_ids = real.astype(np.int64)
    position_ids = columns * real
    segment_ids = np.zeros(ids.shape, np.int64)
    if packing == "best_fit":
        starts = ids == special.cls
        document_ids *= np.cumsum(starts, axis=1)
        position_ids -= np.maximum.accumulate(columns * starts, axis=1) * real
    elif packing == "google":
        separators = ids == special.sep
        separators_before = np.cumsum(separators, axis=1) - separators
        segment_ids[(separators_before >= 1) & real] = 1
    return segment_ids, document_ids, position_ids


def make_batch(
    ids: np.ndarray, rows: np.ndarray, epochs: np.ndarray | int, recipe: MaskingRecipe
) -> Batch:
    """Make a batch of CPU tensors from packed rows.

    Each row of the batch is a pure function of (token ids, seed, epoch, row number).

    ids:    [B, S] unsigned token ids
    rows:   [B] int64 row numbers
    epochs: [B] int64 epoch numbers, or one number for all rows
    """

    def random_bits(n: int, purpose: int) -> np.ndarray:
        return philox.random_bits(recipe.seed, epochs, rows, n, purpose)

    segment_ids, document_ids, position_ids = row_layout(ids, recipe.packing, recipe.special_ids)
    masked_positions, used = select_masked_positions(
        ids, recipe, random_bits(ids.shape[1], philox.MASKED_POSITIONS)
    )
    slots = used.shape[1]
    keep_draws = philox.uniforms(random_bits(slots, philox.KEEP_ORIGINAL))
    uniforms = philox.uniforms(random_bits(slots, philox.UNIFORMS))
    return Batch(
        input_ids=torch.from_numpy(ids.astype(np.int64)),
        segment_ids=torch.from_numpy(segment_ids),
        document_ids=torch.from_numpy(document_ids),
        position_ids=torch.from_numpy(position_ids),
        masked_positions=torch.from_numpy(masked_positions),
        masked_weights=torch.from_numpy(used.astype(np.float32)),
        keep_original=torch.from_numpy(keep_draws >= np.float32(recipe.mask_token_prob)),
        uniforms=torch.from_numpy(uniforms),
    )


def fixed_corruption(
    batch: Batch, rows: np.ndarray, unigrams: np.ndarray, special_ids: SpecialIds
) -> tuple[Tensor, Tensor]:
    """Replace the tokens at the masked positions by unigram draws, the same for every model.

    batch:    on the CPU
    rows:     [B] row numbers; the draws are keyed by them and a constant seed
    unigrams: [V] token counts of the training rows; special tokens are never drawn
    Returns input_ids [B, S] int64 and is_replaced [B, S] bool, False where the original was drawn.
    """
    counts = unigrams.astype(np.int64)
    counts[list(special_ids.model_dump().values())] = 0
    ends = np.cumsum(counts)
    random_bits = philox.random_bits(
        philox.EVALUATION_SEED, 0, rows, batch.masked_positions.shape[1], philox.CORRUPTION
    )
    targets = (random_bits + 0.5) * 2.0**-32 * ends[-1]
    draws = np.searchsorted(ends, targets, side="right")  # [B, K]
    used = batch.masked_weights.numpy() > 0
    ids = batch.input_ids.numpy().copy()
    ids[np.nonzero(used)[0], batch.masked_positions.numpy()[used]] = draws[used]
    corrupted = torch.from_numpy(ids)
    return corrupted, corrupted != batch.input_ids
