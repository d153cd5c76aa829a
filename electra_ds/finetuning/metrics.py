"""Metrics of predictions. The best value is 1; values are not multiplied by 100."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from electra_ds.common.errors import UserError
from electra_ds.common.printable import shortened
from electra_ds.finetuning.superglue_answers import GROUP_METRICS, group_functions

if TYPE_CHECKING:
    from electra_ds.finetuning.examples import Example
    from electra_ds.finetuning.tasks import Task

# Kind of task -> names of its metrics.
METRICS = {
    "classification": ("accuracy", "f1", "macro_f1", "matthews", "average"),
    "regression": ("pearson", "spearman", "average"),
    "token_classification": ("entity_f1", "token_accuracy"),
    "question_answering": ("f1", "exact", "best_f1", "best_exact"),  # see answer_metrics.py
    "multiple_choice": ("accuracy",),
}


# Tags of BIO, and of BIOES and BILOU, which also mark the last word (E, L) and single words (S, U).
ENTITY_TAG = re.compile(r"O|[BIESLU]-.+", re.DOTALL)


def not_entity_tags(labels: list[str]) -> list[str]:
    """Return the labels that are not tags of BIO, BIOES or BILOU."""
    return [label for label in labels if not ENTITY_TAG.fullmatch(label)]


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """Return (first word, word after the last, type) of every entity of a sentence.

    tags: one tag of BIO, BIOES or BILOU for each word. A tag that does not continue an entity of
    its type begins one, as in the CoNLL evaluation. E, L, S and U end the entity.
    """
    spans: set[tuple[int, int, str]] = set()
    start, kind = 0, ""  # of the open entity; kind is empty outside entities
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, tag_kind = tag.partition("-")
        if kind and (prefix not in "IEL" or tag_kind != kind):
            spans.add((start, index, kind))
            kind = ""
        if prefix != "O" and not kind:
            start, kind = index, tag_kind
        if prefix in "ESLU":
            spans.add((start, index + 1, kind))
            kind = ""
    return spans


def _entity_f1(labels: list[str], truth: list[list[int]], predicted: list[list[int]]) -> float:
    """Return the micro-averaged F1 of entities; 0.0 without true and predicted entities."""
    if odd := not_entity_tags(labels):
        raise UserError(
            f"entity_f1 needs BIO tags (O, B-x, I-x), found the label {shortened(odd[0])}; "
            "use token_accuracy"
        )
    correct = total = 0
    for true_tags, predicted_tags in zip(truth, predicted, strict=True):
        true_spans = entities([labels[tag] for tag in true_tags])
        predicted_spans = entities([labels[tag] for tag in predicted_tags])
        correct += len(true_spans & predicted_spans)
        total += len(true_spans) + len(predicted_spans)
    return 2 * correct / max(1, total)


def score(task: "Task", predictions: Any, examples: "list[Example]") -> dict[str, float]:
    """Return {name: value} of the metrics of the task over labelled examples.

    predictions: class numbers [N]; in regression floats [N] in the unit of the labels; in token
    classification one list of class numbers for each example, one for each word; in multiple
    choice numbers of choices. average is the mean of the other metrics of the task.
    f1 is that of the second label. Undefined metrics are 0.0: matthews, pearson and spearman of
    constant labels or predictions, and f1 without positives. In regression, predictions that are
    not finite give nan. Raises UserError for entity_f1 with labels that are not BIO tags.
    """
    from scipy import stats
    from sklearn import metrics

    truth: list[Any] = [example.label for example in examples]
    assert len(truth) == len(predictions) and None not in truth
    labels = task.labels or []
    functions: dict[str, Callable[[], Any]]
    if task.format in GROUP_METRICS:
        functions = group_functions(str(task.format), examples, predictions)
    elif task.kind == "token_classification":
        flat = [[tag for tags in side for tag in tags] for side in (truth, predictions)]
        functions = {
            "token_accuracy": lambda: metrics.accuracy_score(*flat),
            "entity_f1": lambda: _entity_f1(labels, truth, predictions),
        }
    else:
        sides = np.asarray(truth), np.asarray(predictions)
        is_constant = any(np.ptp(side) == 0 for side in sides)  # ptp of nan is nan
        functions = {
            "accuracy": lambda: metrics.accuracy_score(*sides),
            "f1": lambda: metrics.f1_score(*sides, zero_division=0),
            "macro_f1": lambda: metrics.f1_score(
                *sides, labels=range(len(labels)), average="macro", zero_division=0
            ),
            "matthews": lambda: metrics.matthews_corrcoef(*sides),
            "pearson": lambda: 0.0 if is_constant else stats.pearsonr(*sides).statistic,
            "spearman": lambda: 0.0 if is_constant else stats.spearmanr(*sides).statistic,
        }
    scores = {name: float(functions[name]()) for name in task.metrics if name != "average"}
    mean = sum(scores.values()) / max(1, len(scores))
    return {name: scores.get(name, mean) for name in task.metrics}
