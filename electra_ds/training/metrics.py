"""What is said of a loss: counts on the device, and the rates that people read.

Letters: B rows, S sequence, K masked positions.
"""

import math

from torch import Tensor

from electra_ds.config.schema import ObjectiveConfig
from electra_ds.model.losses import Counts


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


def metrics_of_kind(values: dict[str, float], options: ObjectiveConfig) -> dict[str, float]:
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
