"""Notes on questions and answers that train without an error but are cut or not used."""

from collections.abc import Sequence

from electra_ds.common.printable import shortened
from electra_ds.finetuning.batches import Encoded
from electra_ds.finetuning.examples import Example
from electra_ds.finetuning.squad_files import Answers
from electra_ds.finetuning.tasks import Task
from electra_ds.finetuning.windows import NO_ANSWER, NOT_SCORED, answer_tokens

SHARE = 0.01  # of questions; above it a note is given


def question_notes(
    task: Task, split: str, examples: Sequence[Example], encoded: Sequence[Encoded]
) -> list[str]:
    """Return notes on one split: questions that are cut; in train also answers that are not at
    answer_start, that are parts of tokens, that are in no window, and that are never predicted.

    encoded: the rows of all questions.
    """
    notes = []
    cut = {row.window.example for row in encoded if row.window and row.left_out}
    if len(cut) > SHARE * len(examples):
        notes.append(
            f"{split}: {_percent(len(cut), examples)} of the questions are longer than "
            f"{task.questions.max_question_tokens} tokens (questions.max_question_tokens) or half "
            "of train.max_length, and are cut"
        )
    if split == "train":
        notes += _answer_notes(task, examples, encoded)
    return notes


def _answer_notes(task: Task, examples: Sequence[Example], encoded: Sequence[Encoded]) -> list[str]:
    """Return the notes on the answers of the training split."""
    spans = {row.window.example: row.window.spans for row in encoded if row.window}
    found = {row.window.example for row in encoded if row.window and _has_answer(row)}
    misplaced, unaligned, outside, long = [], [], [], []
    for number, example in enumerate(examples):
        answers = example.label
        if not isinstance(answers, Answers) or not answers.texts:
            continue
        if answers.is_misplaced:
            misplaced.append(example)
            continue
        text, start = next(
            pair for pair in zip(answers.texts, answers.starts, strict=True) if pair[1] >= 0
        )
        tokens = answer_tokens(spans[number], start, start + len(text))
        if number not in found:
            outside.append(example)
        if tokens is None:
            continue
        if tokens[1] - tokens[0] >= task.questions.max_answer_tokens:
            long.append(example)
        first, last = (spans[number][token] for token in tokens)
        if (example.text_b or "")[first[0] : last[1]] != text.strip():
            unaligned.append(example)
    notes = []
    if misplaced:
        first_one = misplaced[0]
        assert isinstance(first_one.label, Answers)
        notes.append(
            f"train: {len(misplaced):,} of {len(examples):,} questions are not trained on, because "
            f"no answer is at its answer_start; the first is {shortened(first_one.key)} with the "
            f"answer {shortened(first_one.label.texts[0])}"
        )
    shares = {
        "have an answer that begins or ends inside a token; the whole tokens are learned": unaligned,
        "have an answer that is complete in no window of train.max_length tokens; they are trained "
        "as windows without an answer": outside,
        f"have an answer of more than {task.questions.max_answer_tokens} tokens "
        "(questions.max_answer_tokens), which is never predicted": long,
    }
    notes += [
        f"train: {_percent(len(some), examples)} of the questions {what}; the first is "
        f"{shortened(some[0].key)}"
        for what, some in shares.items()
        if len(some) > SHARE * len(examples)
    ]
    return notes


def _has_answer(row: Encoded) -> bool:
    return row.label not in (NO_ANSWER, NOT_SCORED)


def _percent(count: int, examples: Sequence[Example]) -> str:
    return f"{100 * count / len(examples):.1f} %"
