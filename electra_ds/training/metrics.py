"""Metrics of summed counts: accuracies, precision, recall, AUC."""

import math

from torch import Tensor

from electra_ds.config.schema import ObjectiveConfig
from electra_ds.model.losses import Counts


def share(part: float, whole: float) -> float:
    """Return part / whole; NaN if whole is 0."""
    return part / whole if whole else math.nan


def auc(histogram: Tensor) -> float:
    """Return the area under the ROC curve of a histogram [2, BINS] of original and replaced tokens.

    Pairs in one bin count half. The result is NaN without tokens of both labels.
    """
    original, replaced = histogram.double().cpu()
    below = original.cumsum(0) - original / 2
    pairs = original.sum() * replaced.sum()
    return share(float((replaced * below).sum()), float(pairs))


def rates(counts: Counts) -> dict[str, float]:
    """Return {metric: value} of counts; NaN where a class is empty. Positive means replaced."""
    masked, tokens = float(counts.masked), float(counts.tokens)
    replaced = float(counts.replaced)
    original = tokens - replaced
    true_positive = float(counts.true_positive)
    false_positive = float(counts.false_positive)
    false_negative = float(counts.false_negative)
    return {
        "mlm_accuracy": share(float(counts.mlm_correct), masked),
        "sampled_accuracy": share(float(counts.sampled_correct), masked),
        "replaced_fraction": share(replaced, tokens),
        "disc_auc": auc(counts.histogram),
        "disc_precision": share(true_positive, true_positive + false_positive),
        "disc_recall": share(true_positive, true_positive + false_negative),
        "disc_accuracy": share(tokens - false_positive - false_negative, tokens),
        "disc_accuracy_original": share(original - false_positive, original),
    }


def metrics_of_kind(values: dict[str, float], options: ObjectiveConfig) -> dict[str, float]:
    """Return `values` without the metrics that do not exist for this kind of objective."""

    def exists(key: str) -> bool:
        if key.startswith("mlm_"):
            return options.has_generator or options.kind == "mlm"
        if key in ("disc_loss", "replaced_fraction"):
            return options.kind != "mlm"
        if key == "sampled_accuracy":
            return options.has_generator
        return options.detects or not key.startswith(("disc_", "fixed_", "base_rate_"))

    return {key: value for key, value in values.items() if exists(key)}
