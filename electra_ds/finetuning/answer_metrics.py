"""Exact match, F1 and null threshold of answers, by the rules of SQuAD's official evaluations."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from electra_ds.finetuning.squad_files import Answers

BEST_F1_THRESHOLD = "best_f1_threshold"  # the null threshold that predictions use
BEST_EXACT_THRESHOLD = "best_exact_threshold"
ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
PUNCTUATION = str.maketrans("", "", string.punctuation)  # of ASCII


class Answer(NamedTuple):
    """The best span of a question.

    text: cut from the context; empty if the prediction is that there is no answer. start, end: its
    characters in the context. null_odds: score of [CLS] minus that of the best span.
    """

    text: str
    start: int
    end: int
    null_odds: float

    def at(self, threshold: float) -> "Answer":
        """Return the prediction with a null threshold: empty if null_odds exceeds it."""
        return self._replace(text="") if self.null_odds > threshold else self


def normalized(text: str) -> str:
    """Return an answer as it is compared: lower case, without punctuation of ASCII and articles."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact(gold: str, predicted: str) -> float:
    """Return 1.0 if both answers are equal after `normalized`, else 0.0."""
    return float(normalized(gold) == normalized(predicted))


def f1(gold: str, predicted: str, no_answer: bool) -> float:
    """Return the F1 of the words of two answers.

    no_answer: by the rule of version 2.0, an answer without words equals another one without words;
    by that of 1.1 its F1 is 0.
    """
    golds, words = normalized(gold).split(), normalized(predicted).split()
    if no_answer and not (golds and words):
        return float(golds == words)
    common = (Counter(golds) & Counter(words)).total()
    return 2 * common / (len(golds) + len(words)) if common else 0.0


def raw_scores(
    predicted: Sequence[str],
    golds: Sequence[Answers],
    of_pair: Callable[[str, str], float],
    no_answer: bool,
) -> list[float]:
    """Return the largest score of each prediction over the answers of its question.

    of_pair: function of an answer and a prediction. no_answer: answers without words are left out,
    and a question without others has the answer "".
    """
    scores = []
    for text, answers in zip(predicted, golds, strict=True):
        texts = list(answers.texts)
        if no_answer:
            texts = [answer for answer in texts if normalized(answer)] or [""]
        scores.append(max(of_pair(answer, text) for answer in texts))
    return scores


def best_threshold(
    answers: Sequence[Answer], scores: Sequence[float], golds: Sequence[Answers]
) -> tuple[float, float]:
    """Return (best mean score, null threshold with it), as the official evaluation of 2.0.

    answers: with the text of the best span. scores: `raw_scores` of them. A question with null_odds
    at most the threshold gets its answer. If it is best to answer none, the threshold is one below
    the least of null_odds; the official evaluation, for probabilities, returns 0 there.
    """
    total = best = float(sum(not gold.texts for gold in golds))
    threshold = min(answer.null_odds for answer in answers) - 1.0
    for i in sorted(range(len(answers)), key=lambda i: answers[i].null_odds):
        total += scores[i] if golds[i].texts else -bool(answers[i].text)
        if total > best:
            best, threshold = total, answers[i].null_odds
    return best / len(answers), threshold


def score_answers(
    names: Sequence[str],
    no_answer: bool,
    answers: Sequence[Answer],
    golds: Sequence[Answers],
    threshold: float | None,
) -> dict[str, float]:
    """Return {name: value} of metrics over labelled questions.

    names: exact, f1, best_exact, best_f1. answers: with the text of the best span. no_answer: also
    return both thresholds; exact and f1 are those of the predictions at `threshold`, None: at the
    one with the best F1.
    """
    functions = {"exact": exact, "f1": lambda gold, text: f1(gold, text, no_answer)}
    found: dict[str, float] = {}
    if no_answer:
        for name, function in functions.items():
            raw = raw_scores([answer.text for answer in answers], golds, function, no_answer)
            found[f"best_{name}"], found[f"best_{name}_threshold"] = best_threshold(
                answers, raw, golds
            )
        threshold = found[BEST_F1_THRESHOLD] if threshold is None else threshold
        answers = [answer.at(threshold) for answer in answers]
    for name, function in functions.items():
        scores = raw_scores([answer.text for answer in answers], golds, function, no_answer)
        found[name] = sum(scores) / len(scores)
    thresholds = [BEST_F1_THRESHOLD, BEST_EXACT_THRESHOLD] if no_answer else []
    return {name: found[name] for name in [*names, *thresholds]}
