"""Exact match, F1 and null threshold of answers against a restatement of the official rules."""

import collections
import random
import re
import string

import pytest

from electra_ds.finetuning.answer_metrics import (
    Answer,
    best_threshold,
    exact,
    f1,
    normalized,
    score_answers,
)
from electra_ds.finetuning.squad_files import Answers

# (answers, prediction): articles, punctuation, case, white space, several answers, other scripts.
HARD = [
    (["The Eiffel Tower."], "eiffel  tower"),
    (["the"], "a"),
    (["the"], ""),
    (["A"], "the B"),
    (["theatre"], "the atre"),
    (["U.S.A."], "USA"),
    (["twenty-one"], "twenty one"),
    (["$4.5 million", "4.5 million dollars"], "4.5 million"),
    (["a cat", "an old cat", "cat"], "the old cat"),
    (["cat cat dog"], "cat dog dog"),
    (["“quoted”"], "quoted"),
    (["naïve café"], "naive cafe"),
    (["東京都"], "東京"),
    (["北京 the 大学"], "北京 大学"),
    (["an\tapple\n"], "apple"),
    (["a-the-b"], "ab"),
    (["É"], "é"),
    (["İstanbul"], "istanbul"),
    (["..."], "!"),
    (["word"], "..."),
    (["one", "one"], "one two three"),
    ([], ""),
    ([], "the"),
    ([], "some answer"),
]


def official_words(text: str) -> str:
    """The four steps of the official normalisation, one after the other."""
    text = text.lower()
    text = "".join(character for character in text if character not in set(string.punctuation))
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def official_f1(gold: str, predicted: str, version: int) -> float:
    golds, words = official_words(gold).split(), official_words(predicted).split()
    same = sum((collections.Counter(golds) & collections.Counter(words)).values())
    if version == 2 and (len(golds) == 0 or len(words) == 0):
        return int(golds == words)
    if same == 0:
        return 0
    precision, recall = same / len(words), same / len(golds)
    return 2 * precision * recall / (precision + recall)


def official_scores(version: int, cases: list, threshold: float | None = None, odds=()) -> tuple:
    """Lists of exact and F1 of every question, as apply_no_ans_threshold returns them."""
    exacts, f1s = [], []
    for number, (golds, predicted) in enumerate(cases):
        if version == 2:
            golds = [gold for gold in golds if official_words(gold)] or [""]
        exacts.append(max(int(official_words(g) == official_words(predicted)) for g in golds))
        f1s.append(max(official_f1(g, predicted, version) for g in golds))
        if threshold is not None and odds[number] > threshold:
            exacts[-1] = f1s[-1] = float(not cases[number][0])
    return exacts, f1s


def official_best(cases: list, scores: list, odds: list) -> tuple[float, float]:
    """The loop of the official find_best_thresh: (mean score, threshold)."""
    current = best = sum(not golds for golds, _ in cases)
    threshold = 0.0
    for number in sorted(range(len(cases)), key=lambda number: odds[number]):
        golds, predicted = cases[number]
        if golds:
            current += scores[number]
        else:
            current += -1 if predicted else 0
        if current > best:
            best, threshold = current, odds[number]
    return best / len(cases), threshold


def answers_of(cases: list, odds=None) -> tuple[list[Answer], list[Answers]]:
    odds = odds or [0.0] * len(cases)
    answers = [Answer(text, 0, 0, odd) for (_, text), odd in zip(cases, odds, strict=True)]
    return answers, [Answers(tuple(golds), (0,) * len(golds)) for golds, _ in cases]


def test_hard_cases_have_the_values_of_the_official_rules():
    expected = {  # of version 2.0
        "eiffel  tower": (1, 1),
        "the atre": (0, 0),
        "USA": (1, 1),
        "twenty one": (0, 0),  # the hyphen is removed without a space
        "4.5 million": (1, 1),
        "the old cat": (1, 1),
        "cat dog dog": (0, 2 / 3),
        "naive cafe": (0, 0),
        "ab": (0, 0),  # "athe-b" without punctuation is one word
        "é": (1, 1),
        "some answer": (0, 0),
    }
    for golds, predicted in HARD:
        if predicted not in expected:
            continue
        exacts, f1s = official_scores(2, [(golds, predicted)])
        assert (exacts[0], f1s[0]) == pytest.approx(expected[predicted]), predicted


@pytest.mark.parametrize("version", [1, 2])
def test_metrics_equal_a_restatement_of_the_official_evaluation(version):
    cases = [case for case in HARD if case[0] or version == 2]
    for case in cases:
        answers, golds = answers_of([case])
        no_answer = version == 2
        found = score_answers(["f1", "exact"], no_answer, answers, golds, 0.0)
        (exact_score,), (f1_score,) = official_scores(version, [case])
        assert (found["exact"], found["f1"]) == pytest.approx((exact_score, f1_score)), case
    answers, golds = answers_of(cases)
    found = score_answers(["exact"], version == 2, answers, golds, 0.0)
    assert found["exact"] == pytest.approx(
        sum(official_scores(version, cases)[0]) / len(cases), abs=1e-12
    )


def test_versions_differ_in_answers_without_words():
    assert f1("the", "a", no_answer=True) == 1 and f1("the", "a", no_answer=False) == 0
    assert exact("the", "") == 1 and normalized("The, a!") == ""


def test_the_null_threshold_equals_that_of_the_official_search():
    draw = random.Random(0)
    for _ in range(200):
        cases = [draw.choice(HARD) for _ in range(draw.randint(1, 12))]
        cases = [(golds, text or "x") for golds, text in cases]
        odds = [draw.gauss(0, 3) for _ in cases]
        answers, golds = answers_of(cases, odds)
        found = score_answers(["f1", "exact", "best_f1", "best_exact"], True, answers, golds, None)
        for name, scores in zip(("exact", "f1"), official_scores(2, cases), strict=True):
            best, threshold = official_best(cases, scores, odds)
            assert found[f"best_{name}"] == pytest.approx(best)
            if best > sum(not golds for golds, _ in cases) / len(cases):
                assert found[f"best_{name}_threshold"] == threshold
            else:  # none is answered
                assert found[f"best_{name}_threshold"] < min(odds)
        # The predictions at the threshold have the best F1, and any other has not more. The search
        # counts every answer to an impossible question as wrong, also one without words.
        if any(not golds and not official_words(text) for golds, text in cases):
            continue
        tuned = found["best_f1_threshold"]
        at = sum(official_scores(2, cases, tuned, odds)[1]) / len(cases)
        assert at == pytest.approx(found["best_f1"])
        for other in [*odds, min(odds) - 1]:
            assert sum(official_scores(2, cases, other, odds)[1]) / len(cases) <= at + 1e-9


def test_scores_are_those_of_the_predictions_at_the_given_threshold():
    cases = [(["cat"], "cat"), (["dog"], "dog"), ([], "fox"), ([], "owl")]
    odds = [-3.0, 1.0, 0.0, 5.0]
    answers, golds = answers_of(cases, odds)
    names = ["exact", "best_exact"]
    at_zero = score_answers(names, True, answers, golds, 0.0)
    assert at_zero == {
        "exact": 0.5,  # cat is right, dog is not answered, fox is answered, owl is not
        "best_exact": 0.75,
        "best_f1_threshold": -3.0,
        "best_exact_threshold": -3.0,
    }
    assert score_answers(names, True, answers, golds, None)["exact"] == 0.75
    assert [answer.at(0.0).text for answer in answers] == ["cat", "", "fox", ""]
    assert best_threshold(answers, [1, 1, 0, 0], golds) == (0.75, -3.0)
