"""The values handed from stage to stage. Letters: B rows, S sequence, K chosen places."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch of packed rows with its masking decisions, a pure function of (seed, epoch, row)."""

    input_ids: Tensor  # [B, S] int64, unmasked
    segment_ids: Tensor  # [B, S] int64
    piece_ids: Tensor  # [B, S] int64, 0 = padding, else 1, 2, ... within the row
    position_ids: Tensor  # [B, S] int64, restart at each piece
    chosen: Tensor  # [B, K] int64, places in the row; unused ones are 0 with weight 0
    chosen_weights: Tensor  # [B, K] float32, 1 or 0
    keep: Tensor  # [B, K] bool, True: the place keeps its token instead of [MASK]
    uniforms: Tensor  # [B, K] float32 in [0, 1), one number per draw from the generator
    bounds: Tensor | None = (
        None  # int32, `ops.attention.piece_bounds` of piece_ids; made for CUDA alone
    )

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch of function(tensor) for each tensor that is there."""
        return Batch(*(value if value is None else function(value) for value in self))


class Counts(NamedTuple):
    """Sums for the metrics: 0-d tensors (and one histogram), additive over micro-batches and ranks."""

    chosen: Tensor
    tokens: Tensor
    mlm_correct: Tensor
    sampled_correct: Tensor
    replaced: Tensor
    true_positive: Tensor
    false_positive: Tensor
    false_negative: Tensor
    histogram: (
        Tensor  # [2, BINS]: discriminator logits of original (row 0) and replaced tokens (row 1)
    )


class Losses(NamedTuple):
    """What one forward gives: 0-d fp32 tensors, each already divided by the counts of the whole global batch."""

    total: Tensor
    mlm_loss: Tensor  # of the generator (0 without a network); of the main encoder for kind mlm
    disc_loss: Tensor  # of the main encoder, whatever it learns; 0 for kind mlm
    counts: Counts | None
