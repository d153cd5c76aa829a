"""What one forward returns: losses, and the sums behind the metrics.

Letters: B rows, S sequence, K masked positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from electra_ds.data.batch import Batch
from electra_ds.model.kernels.vocab_head import HeadResult

BINS = 2000  # of the histogram of discriminator logits, from which the AUC is computed
LIMIT = 20.0  # the bins divide [-LIMIT, LIMIT]


class Totals(NamedTuple):
    """Counts of the whole global batch, by which sums of losses are divided."""

    masked_count: float  # masked positions
    token_count: float  # real tokens


class Counts(NamedTuple):
    """Sums behind the metrics: 0-d fp64 tensors and one histogram, additive over micro-batches and
    ranks.

    Positive means replaced. The counts of tokens are over the positions that the main loss counts.
    """

    masked: Tensor  # masked positions
    tokens: Tensor
    mlm_correct: Tensor
    sampled_correct: Tensor
    replaced: Tensor
    true_positive: Tensor
    false_positive: Tensor
    false_negative: Tensor
    histogram: Tensor  # [2, BINS]: discriminator logits of original (row 0) and replaced tokens

    def to_vector(self) -> Tensor:
        """All sums as one vector [COUNTS_SIZE], fp64."""
        *scalars, histogram = self
        return torch.cat([torch.stack(scalars), histogram.flatten()])

    @classmethod
    def from_vector(cls, vector: Tensor) -> "Counts":
        """The inverse of `to_vector`."""
        scalars = len(cls._fields) - 1
        return cls(*vector[:scalars], vector[scalars:].view(2, BINS))


COUNTS_SIZE = len(Counts._fields) - 1 + 2 * BINS


class Losses(NamedTuple):
    """What one forward gives: 0-d fp32 tensors, each already divided by the counts of the whole global batch."""

    total: Tensor
    mlm_loss: Tensor  # of the generator (0 without a network); of the main encoder for kind mlm
    disc_loss: Tensor  # of the main encoder, whatever it learns; 0 for kind mlm
    counts: Counts | None


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
