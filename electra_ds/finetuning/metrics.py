"""How good are predictions? Scores by name; 1 is perfect, shares are not multiplied by 100."""

from typing import Any

import numpy as np

from electra_ds.common.errors import UserError

# The metrics of each kind of task; the first of a task's is its main one.
METRICS = {
    "classification": ("accuracy", "f1", "macro_f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "token_classification": ("entity_f1", "token_accuracy"),
}


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """(first word, word behind the last, type) of every entity of a BIO-tagged sentence.

    An I- that continues nothing of its type begins an entity, as in the CoNLL evaluation.
    """
    found, start, kind = set(), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, this = tag.partition("-")
        if kind and (prefix != "I" or this != kind):
            found.add((start, place, kind))
            kind = ""
        if prefix in "BI" and not kind:
            start, kind = place, this
    return found


def _entity_f1(labels: list[str], truth: list[list[int]], predicted: list[list[int]]) -> float:
    """Micro average over the sentences; 0.0 when there is no entity on either side."""
    if odd := [label for label in labels if label != "O" and label[:2] not in ("B-", "I-")]:
        raise UserError(
            f"entity_f1 needs BIO tags (O, B-x, I-x), found the label {odd[0]!r}; use token_accuracy"
        )
    sides = [
        [entities([labels[tag] for tag in tags]) for tags in side] for side in (truth, predicted)
    ]
    right = sum(len(a & b) for a, b in zip(*sides, strict=True))
    return 2 * right / max(1, sum(len(found) for side in sides for found in side))


def score(task: Any, predictions: Any, examples: list) -> dict[str, float]:
    """The task's metrics over labelled examples, by name.

    predictions: class numbers [N], floats [N] on the labels' own scale, or per example a list of one label number per
    word. f1 is that of the second label. What cannot be computed counts as no skill: matthews, pearson and spearman
    of constant predictions and f1 without a positive are 0.0. Predictions that are not finite give nan.
    """
    from scipy import stats
    from sklearn import metrics

    truth = [example.label for example in examples]
    assert len(truth) == len(predictions) and None not in truth
    if task.kind == "token_classification":
        flat = [[tag for tags in side for tag in tags] for side in (truth, predictions)]
        functions = {
            "token_accuracy": lambda: metrics.accuracy_score(*flat),
            "entity_f1": lambda: _entity_f1(task.labels, truth, predictions),
        }
    else:
        sides = np.asarray(truth), np.asarray(predictions)
        constant = any(np.ptp(side) == 0 for side in sides)  # ptp of nan is nan
        functions = {
            "accuracy": lambda: metrics.accuracy_score(*sides),
            "f1": lambda: metrics.f1_score(*sides, zero_division=0),
            "macro_f1": lambda: metrics.f1_score(
                *sides, labels=range(len(task.labels)), average="macro", zero_division=0
            ),
            "matthews": lambda: metrics.matthews_corrcoef(*sides),
            "pearson": lambda: 0.0 if constant else stats.pearsonr(*sides).statistic,
            "spearman": lambda: 0.0 if constant else stats.spearmanr(*sides).statistic,
        }
    return {name: float(functions[name]()) for name in task.metrics}
