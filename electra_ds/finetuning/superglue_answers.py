"""Metrics and predictions of questions with several candidate answers: MultiRC and ReCoRD."""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from electra_ds.common.printable import printable

if TYPE_CHECKING:
    from electra_ds.finetuning.examples import Example
    from electra_ds.finetuning.superglue_rows import Candidate

# Format -> names of its metrics, in place of those of its kind.
GROUP_METRICS: dict[str, tuple[str, ...]] = {
    "multirc": ("average", "f1a", "em"),
    "record": ("average", "f1", "em"),
}
PICKS_ONE = ("record",)  # formats in which the best candidate of a question is the answer
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def best_candidates(examples: list[Example], logits: list[np.ndarray]) -> list[int]:
    """Return 1 for the best candidate of each question and 0 for the others.

    logits: of each example, [2]: wrong and right. The first of equal candidates is the best.
    """
    best: dict[str, tuple[float, int]] = {}
    for number, (example, row) in enumerate(zip(examples, logits, strict=True)):
        value = float(row[1]) - float(row[0])
        group = _candidate(example).group
        if group not in best or value > best[group][0]:
            best[group] = value, number
    chosen = {number for _, number in best.values()}
    return [int(number in chosen) for number in range(len(examples))]


def candidates_table(examples: list[Example], predictions: list[Any]) -> bytes:
    """Return a TSV with one line for each question: index, text of the best candidate."""
    lines = ["index\tprediction"]
    for example, is_best in zip(examples, predictions, strict=True):
        if is_best:
            candidate = _candidate(example)
            lines.append(f"{printable(candidate.group)}\t{printable(candidate.text)}")
    return ("\n".join(lines) + "\n").encode()


def group_functions(
    shape: str, examples: list[Example], predictions: list[int]
) -> dict[str, Callable[[], float]]:
    """Return the metrics of a shape with candidates: name -> function without arguments.

    MultiRC: f1a is the F1 of right answers over all answers, em the share of the questions of which
    every answer is classified correctly. ReCoRD: the highest F1 of tokens and the highest exact
    match with one of the right answers, averaged over the questions.
    """
    if shape == "multirc":
        return {
            "f1a": lambda: _f1_of_right_answers(examples, predictions),
            "em": lambda: _all_correct(examples, predictions),
        }
    chosen = [_candidate(x) for x, is_best in zip(examples, predictions, strict=True) if is_best]
    return {
        "f1": lambda: _best_mean(chosen, token_f1),
        "em": lambda: _best_mean(chosen, exact_match),
    }


def _candidate(example: Example) -> Candidate:
    assert example.candidate is not None
    return example.candidate


def _f1_of_right_answers(examples: list[Example], predictions: list[int]) -> float:
    counts = Counter((example.label, p) for example, p in zip(examples, predictions, strict=True))
    total = 2 * counts[1, 1] + counts[0, 1] + counts[1, 0]
    return 2 * counts[1, 1] / max(1, total)


def _all_correct(examples: list[Example], predictions: list[int]) -> float:
    questions: dict[str, list[bool]] = defaultdict(list)
    for example, prediction in zip(examples, predictions, strict=True):
        questions[_candidate(example).group].append(example.label == prediction)
    return sum(map(all, questions.values())) / max(1, len(questions))


def _best_mean(chosen: list[Candidate], function: Callable[[str, str], float]) -> float:
    best = [max(function(x.text, answer) for answer in x.answers) for x in chosen]
    return sum(best) / max(1, len(best))


def normalized(text: str) -> str:
    """Return an answer in lower case, without punctuation and articles, with single spaces.

    The official evaluations of SQuAD and ReCoRD normalize in these steps.
    """
    text = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(text.split())


def exact_match(text: str, answer: str) -> float:
    """Return 1.0 if both texts are equal after normalization, else 0.0."""
    return float(normalized(text) == normalized(answer))


def token_f1(text: str, answer: str) -> float:
    """Return the F1 of the normalized words of a text; 0.0 without a common word."""
    words, wanted = normalized(text).split(), normalized(answer).split()
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted)) if common else 0.0
