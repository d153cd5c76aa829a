"""Answers from the logits of windows, and their files.

Dimensions: S tokens of a row, n tokens of the context in it.
"""

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from electra_ds.common.json_files import json_bytes
from electra_ds.common.printable import printable
from electra_ds.finetuning.answer_metrics import Answer
from electra_ds.finetuning.batches import Encoded
from electra_ds.finetuning.examples import Example
from electra_ds.finetuning.tasks import Task
from electra_ds.finetuning.windows import Window, best_windows

NO_SPAN = -1e6  # score of a context without tokens


def decode_answers(
    task: Task, examples: Sequence[Example], encoded: Sequence[Encoded], logits: list[np.ndarray]
) -> list[Answer]:
    """Return the best span of each question, with its text cut from the original context.

    encoded: the rows of all questions. logits: of each row, fp32 [S, 2], start and end.
    The score of a span is the sum of the logits of its first and its last token, in a row in which
    the first token has most context. Spans have at most questions.max_answer_tokens tokens.
    """
    rows = zip(encoded, logits, strict=True)
    answers: list[Answer] = []
    for number, group in groupby(rows, key=lambda row: _window(row[0]).example):
        assert number == len(answers)
        own = list(group)
        windows = [_window(row) for row, _ in own]
        owner = best_windows(windows)
        best, span = NO_SPAN, (0, 0)
        for i, (row, values) in enumerate(own):
            part = slice(windows[i].first, windows[i].first + windows[i].size)
            spans = windows[i].spans[part]
            scores = values[row.second_start : row.second_start + windows[i].size]
            score, first, last = _best_span(
                scores.astype(np.float64), spans, owner[part] == i, task.questions.max_answer_tokens
            )
            if score > best:
                best, span = score, (spans[first][0], spans[last][1])
        null = min(float(values[0].astype(np.float64).sum()) for _, values in own)
        text = str(examples[number].text_b or "")[slice(*span)]
        answers.append(Answer(text, *span, null - best))
    return answers


def _window(row: Encoded) -> Window:
    assert row.window is not None
    return row.window


def _best_span(
    scores: np.ndarray, spans: list[tuple[int, int]], may_begin: np.ndarray, longest: int
) -> tuple[float, int, int]:
    """Return (score, first token, last token) of the best span in one row.

    scores: [n, 2] fp64. spans: [n]. may_begin: [n] bool, tokens that are scored as the first one
    in this row. longest: tokens of a span. The score is -inf without a span. Tokens of white space
    neither begin nor end a span.
    """
    has_text = np.array([start < end for start, end in spans], bool)
    start = np.where(has_text & may_begin, scores[:, 0], -np.inf)
    end = np.where(has_text, scores[:, 1], -np.inf)
    best = (-math.inf, 0, 0)
    for length in range(min(longest, len(spans))):
        sums = start[: len(spans) - length] + end[length:]
        first = int(sums.argmax())
        if sums[first] > best[0]:
            best = (float(sums[first]), first, first + length)
    return best


def answers_table(task: Task, examples: Sequence[Example], answers: Sequence[Answer]) -> bytes:
    """Return a TSV with one line for each question: index, prediction, start, end, null_odds.

    start, end: characters in the context; empty without an answer. null_odds: only if the task has
    questions without an answer.
    """
    odds = ["null_odds"] if task.questions.no_answer else []
    lines = ["\t".join(["index", "prediction", "start", "end", *odds])]
    for example, answer in zip(examples, answers, strict=True):
        places = [str(answer.start), str(answer.end)] if answer.text else ["", ""]
        cells = [printable(example.key), printable(answer.text), *places]
        lines.append("\t".join([*cells, *[f"{answer.null_odds:.6g}"] * len(odds)]))
    return ("\n".join(lines) + "\n").encode()


def predictions_json(examples: Sequence[Example], answers: Sequence[Answer]) -> bytes:
    """Return the predictions in the official shape: an object id -> text."""
    pairs = zip(examples, answers, strict=True)
    return json_bytes({example.key: answer.text for example, answer in pairs})


def answer_files(
    task: Task, split: str, examples: Sequence[Example], answers: Sequence[Answer]
) -> dict[str, bytes]:
    """Return name -> content of the official files: predictions, and null odds for version 2.0."""
    files = {f"predictions-{split}.json": predictions_json(examples, answers)}
    if task.questions.no_answer:
        pairs = zip(examples, answers, strict=True)
        odds = {example.key: answer.null_odds for example, answer in pairs}
        files[f"null_odds-{split}.json"] = json_bytes(odds)
    return files
