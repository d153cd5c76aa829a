"""The values handed from stage to stage. Letters: B rows, S sequence, K masked positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from electra_ds.data.batch import Batch
from electra_ds.model.kernels.vocab_head import HeadResult

if TYPE_CHECKING:
    from torch import Tensor


class Counts(NamedTuple):
    """Sums for the metrics: 0-d tensors (and one histogram), additive over micro-batches and ranks."""

    masked: Tensor
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


BINS, LIMIT = (
    2000,
    20.0,
)  # the histogram of discriminator logits behind the AUC: bins over [-LIMIT, LIMIT]


@torch.no_grad()
def count(
    batch: Batch, drawn: HeadResult, logits: Tensor, is_replaced: Tensor, places: Tensor
) -> Counts:
    """The sums behind the metrics, on the device (float64: exact up to 2**53); tokens are those at `places` [B, S]."""
    weights, real = batch.masked_weights.double(), (places > 0).double()
    targets = batch.input_ids.gather(1, batch.masked_positions)
    label, guess = is_replaced.double() * real, (logits > 0).double() * real
    return Counts(
        masked=weights.sum(),
        tokens=real.sum(),
        mlm_correct=(weights * (drawn.best == targets)).sum(),
        sampled_correct=(weights * (drawn.sampled == targets)).sum(),
        replaced=label.sum(),
        true_positive=(label * guess).sum(),
        false_positive=((1 - label) * guess).sum(),
        false_negative=(label * (1 - guess)).sum(),
        histogram=histogram(logits, is_replaced, real),
    )


def histogram(logits: Tensor, is_replaced: Tensor, real: Tensor) -> Tensor:
    """Discriminator logits of the real tokens binned by label, [2, BINS] float64: original, replaced."""
    clipped = (
        logits.double().nan_to_num(0.0).clamp(-LIMIT, LIMIT)
    )  # a broken run is reported by its losses
    place = ((clipped + LIMIT) * (BINS / (2 * LIMIT))).long().clamp(max=BINS - 1)
    filled = torch.zeros(2 * BINS, dtype=torch.float64, device=logits.device)
    return filled.scatter_add_(
        0, (place + BINS * is_replaced).flatten(), real.double().flatten()
    ).view(2, BINS)
