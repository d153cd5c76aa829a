"""Losses of one forward pass, their divisors, and the sums for the metrics.

Dimensions: B rows, S sequence, K masked positions.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from electra_ds.data.batch import Batch
from electra_ds.model.kernels.vocab_head import HeadResult

BINS = 2000  # of the histogram of discriminator logits, which is used to compute the AUC
LIMIT = 20.0  # the bins divide [-LIMIT, LIMIT]; larger logits are in the outer bins
CHUNK = 2**22  # elements of hidden states that are squared at once


class Totals(NamedTuple):
    """Counts of the whole global batch, by which sums of losses are divided."""

    masked_count: float  # masked positions
    token_count: float  # real tokens


class Counts(NamedTuple):
    """Sums for the metrics: 0-d fp64 tensors and one histogram.

    They are additive over micro-batches and ranks. Positive means replaced. Tokens are counted at
    the positions of the main loss.
    """

    masked: Tensor  # masked positions
    tokens: Tensor
    mlm_correct: Tensor
    sampled_correct: Tensor
    replaced: Tensor
    true_positive: Tensor
    false_positive: Tensor
    false_negative: Tensor
    hidden_square: Tensor  # `centred_square` of the discriminator's last hidden states
    histogram: Tensor  # [2, BINS]: discriminator logits of original (row 0) and replaced tokens

    def to_vector(self) -> Tensor:
        """Return all sums as one vector [COUNTS_SIZE], fp64."""
        *scalars, histogram = self
        return torch.cat([torch.stack(scalars), histogram.flatten()])

    @classmethod
    def from_vector(cls, vector: Tensor) -> "Counts":
        """Return the counts of a vector that `to_vector` made."""
        scalars = len(cls._fields) - 1
        return cls._make([*vector[:scalars], vector[scalars:].view(2, BINS)])


COUNTS_SIZE = len(Counts._fields) - 1 + 2 * BINS


class Losses(NamedTuple):
    """Losses of one forward pass: 0-d fp32 tensors, divided by the totals of the global batch."""

    total: Tensor
    mlm_loss: Tensor  # of the generator (0 without a network); of the main encoder for kind mlm
    disc_loss: Tensor  # of the main encoder, also when it predicts tokens; 0 for kind mlm
    counts: Counts | None


@torch.no_grad()
def count(
    batch: Batch,
    drawn: HeadResult,
    logits: Tensor,
    is_replaced: Tensor,
    counted: Tensor,
    hidden: Tensor | None = None,
) -> Counts:
    """Return the sums for the metrics, on the device, in float64 (exact up to 2**53).

    drawn:       loss and samples of the generator, with `predicted`
    logits:      [B, S] fp32 of the discriminator; zeros without one
    is_replaced: [B, S] bool
    counted:     [B, S]; a token counts where it is above 0
    hidden:      [B, S, H] last hidden states of the discriminator; None where they are not known
    """
    weights = batch.masked_weights.double()
    is_counted = (counted > 0).double()
    targets = batch.input_ids.gather(1, batch.masked_positions)
    label = is_replaced.double() * is_counted
    prediction = (logits > 0).double() * is_counted
    return Counts(
        masked=weights.sum(),
        tokens=is_counted.sum(),
        mlm_correct=(weights * (drawn.predicted == targets)).sum(),
        sampled_correct=(weights * (drawn.sampled == targets)).sum(),
        replaced=label.sum(),
        true_positive=(label * prediction).sum(),
        false_positive=((1 - label) * prediction).sum(),
        false_negative=(label * (1 - prediction)).sum(),
        hidden_square=centred_square(hidden, is_counted),
        histogram=histogram(logits, is_replaced, is_counted),
    )


def centred_square(hidden: Tensor | None, weights: Tensor) -> Tensor:
    """Return sum_i w_i mean((h_i - m)^2), 0-d fp64, with m the mean of h in the row of i.

    The mean of each row is subtracted, and not that of the batch, so that the result does not
    depend on the division into batches. NaN without h.

    hidden: [B, S, H] float. weights: [B, S] fp64, 0 or 1.
    """
    if hidden is None:
        return weights.new_full((), math.nan)
    total = weights.new_zeros(())
    rows = max(1, CHUNK // math.prod(hidden.shape[1:]))  # rows of a chunk, to need little memory
    for h, w in zip(hidden.split(rows), weights.split(rows), strict=True):
        h, w = h.float(), w.float()[:, :, None]  # [rows, S, H], [rows, S, 1]
        mean = (w * h).sum(1, keepdim=True) / w.sum(1, keepdim=True).clamp(min=1.0)
        total += (w * (h - mean).square()).mean(2).sum(1).double().sum()
    return total


def histogram(logits: Tensor, is_replaced: Tensor, weights: Tensor) -> Tensor:
    """Return weighted histograms of logits by label, [2, BINS] float64: original, replaced.

    logits: [B, S] float. is_replaced: [B, S] bool. weights: [B, S].
    A NaN is counted as 0; the loss is NaN, too, and is reported.
    """
    clipped = logits.double().nan_to_num(0.0).clamp(-LIMIT, LIMIT)
    bins = ((clipped + LIMIT) * (BINS / (2 * LIMIT))).long().clamp(max=BINS - 1)
    sums = torch.zeros(2 * BINS, dtype=torch.float64, device=logits.device)
    sums.scatter_add_(0, (bins + BINS * is_replaced).flatten(), weights.double().flatten())
    return sums.view(2, BINS)
