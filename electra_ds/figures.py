"""What is said of a loss: counts on the device, and the rates that people read.

Letters: B rows, S sequence, K chosen places.
"""

import math

import torch
from torch import Tensor

from electra_ds.config import ObjectiveConfig
from electra_ds.ops.vocab_head import HeadResult
from electra_ds.values import Batch, Counts

BINS, LIMIT = (
    2000,
    20.0,
)  # the histogram of discriminator logits behind the AUC: bins over [-LIMIT, LIMIT]


@torch.no_grad()
def count(
    batch: Batch, drawn: HeadResult, logits: Tensor, is_replaced: Tensor, places: Tensor
) -> Counts:
    """The sums behind the metrics, on the device (float64: exact up to 2**53); tokens are those at `places` [B, S]."""
    weights, real = batch.chosen_weights.double(), (places > 0).double()
    targets = batch.input_ids.gather(1, batch.chosen)
    label, guess = is_replaced.double() * real, (logits > 0).double() * real
    return Counts(
        chosen=weights.sum(),
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


def share(part: float, whole: float) -> float:
    """part / whole; nan of nothing."""
    return part / whole if whole else math.nan


def auc(filled: Tensor) -> float:
    """Area under the ROC curve of a histogram [2, BINS]; pairs in one bin count half. nan without both labels."""
    original, replaced = filled.double().cpu()
    below = original.cumsum(0) - original / 2
    pairs = original.sum() * replaced.sum()
    return share(float((replaced * below).sum()), float(pairs))


def rates(sums: Counts) -> dict[str, float]:
    """Readable metrics of summed counts; nan where a class is empty. Positive means replaced."""
    chosen, tokens, mlm_correct, sampled_correct, replaced, tp, fp, fn = (
        float(value) for value in sums[:8]
    )
    original = tokens - replaced
    return {
        "mlm_accuracy": share(mlm_correct, chosen),
        "sampled_accuracy": share(sampled_correct, chosen),
        "replaced_fraction": share(replaced, tokens),
        "disc_auc": auc(sums.histogram),
        "disc_precision": share(tp, tp + fp),
        "disc_recall": share(tp, tp + fn),
        "disc_accuracy": share(tokens - fp - fn, tokens),
        "disc_accuracy_original": share(original - fp, original),
    }


def own_figures(values: dict[str, float], options: ObjectiveConfig) -> dict[str, float]:
    """values without the figures that do not exist for this kind of objective."""

    def exists(key: str) -> bool:
        if key.startswith("mlm_"):
            return options.has_generator or options.kind == "mlm"
        if key in ("disc_loss", "replaced_fraction"):
            return options.kind != "mlm"
        if key == "sampled_accuracy":
            return options.has_generator
        return options.detects or not key.startswith(("disc_", "fixed_", "base_rate_"))

    return {key: value for key, value in values.items() if exists(key)}
