"""Windows over long contexts: rows of a question and a slice of its context.

Dimensions: L tokens of a context.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from electra_ds.data.tokenizer import Tokenizer
from electra_ds.finetuning.examples import Example
from electra_ds.finetuning.question_settings import QuestionSettings
from electra_ds.finetuning.squad_files import Answers

NOT_SCORED = [-1, -1]
NO_ANSWER = [0, 0]  # [CLS]

Spans = list[tuple[int, int]]  # first character of each token, and the one after the last


class Window(NamedTuple):
    """The slice of a context in one row.

    example: number of its question. first, size: number of its first token in the context, and
    number of its tokens. spans: of all L tokens of the context.
    """

    example: int
    first: int
    size: int
    spans: Spans


class WindowRow(NamedTuple):
    """One row: [CLS] question [SEP] slice [SEP]; fields as in `batches.Encoded`.

    label: first and last token of the answer in ids; [CLS] twice if the window has none; -1 twice
    if it is not scored. left_out: tokens of the question that are cut.
    """

    ids: list[int]
    second_start: int
    label: list[int]
    left_out: int
    window: Window


def encode_questions(
    examples: Sequence[Example], settings: QuestionSettings, tokenizer: Tokenizer, max_length: int
) -> list[WindowRow]:
    """Return the rows of all questions, in their order; those of one question are consecutive.

    A row has at most max_length tokens, and a question at most half of them. The answer of a row is
    the first one that is at its answer_start. Questions without one are not scored.
    """
    special = tokenizer.special_ids
    contexts: dict[str, tuple[list[int], Spans]] = {}
    asked = tokenizer.encode_batch([str(example.text_a) for example in examples])
    rows = []
    for number, (example, tokens) in enumerate(zip(examples, asked, strict=True)):
        context = str(example.text_b or "")
        if context not in contexts:
            contexts[context] = tokenizer.encode_with_offsets(context)
        ids, spans = contexts[context]
        question = tokens[: min(settings.max_question_tokens, (max_length - 3) // 2)]
        room = max_length - 3 - len(question)
        answer, otherwise = _answer_of(example, spans)
        start = len(question) + 2
        for first, count in slices(len(ids), room, settings.stride):
            row = [special.cls, *question, special.sep, *ids[first : first + count], special.sep]
            label = otherwise
            if answer is not None and first <= answer[0] and answer[1] < first + count:
                label = [start + position - first for position in answer]
            window = Window(number, first, count, spans)
            rows.append(WindowRow(row, start, label, len(tokens) - len(question), window))
    return rows


def slices(length: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Return (first token, number of tokens) of each window over a context.

    length: L. room: tokens of a window. The windows overlap by at least half of `room`, so that an
    answer of up to half of it is complete in one of them. A context without tokens has one window.
    """
    stride = min(stride, max(1, room // 2))
    found = [(0, min(room, length))]
    while sum(found[-1]) < length:
        first = found[-1][0] + stride
        found.append((first, min(room, length - first)))
    return found


def _answer_of(example: Example, spans: Spans) -> tuple[tuple[int, int] | None, list[int]]:
    """Return (first and last token of the answer in the context or None, label without it)."""
    answers = example.label
    if not isinstance(answers, Answers):
        return None, NOT_SCORED
    for text, start in zip(answers.texts, answers.starts, strict=True):
        if start >= 0 and (found := answer_tokens(spans, start, start + len(text))):
            return found, NO_ANSWER
    return None, NOT_SCORED if answers.texts else NO_ANSWER


def answer_tokens(spans: Spans, start: int, end: int) -> tuple[int, int] | None:
    """Return the first and last token that share a character with [start, end), or None.

    Spans are in the order of the text. Those of white space are empty and are left out.
    """
    first = bisect_right(spans, start, key=lambda span: span[1])
    last = bisect_left(spans, end, key=lambda span: span[0]) - 1
    while first <= last and spans[first][0] >= spans[first][1]:
        first += 1
    while first <= last and spans[last][0] >= spans[last][1]:
        last -= 1
    return (first, last) if first <= last else None


def best_windows(windows: Sequence[Window]) -> np.ndarray:
    """Return, for each token of a context, the number of the window with most context, [L] int64.

    windows: all windows of one question. The context of a token in a window is the smaller number
    of tokens on its sides, plus 0.01 times the tokens of the window. The first window wins a tie.
    """
    length = len(windows[0].spans)
    owner = np.zeros(length, np.int64)
    best = np.full(length, -1.0)
    for number, window in enumerate(windows):
        left = np.arange(window.size)
        score = np.minimum(left, window.size - 1 - left) + 0.01 * window.size
        part = slice(window.first, window.first + window.size)
        is_better = score > best[part]
        best[part][is_better] = score[is_better]
        owner[part][is_better] = number
    return owner
