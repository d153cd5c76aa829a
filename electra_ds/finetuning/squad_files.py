"""Questions of a JSON file of SQuAD's shape: articles, paragraphs, questions, answers.

A file that does not fit raises a UserError that names file, article, paragraph and question.
"""

from codecs import BOM_UTF8
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field, ValidationError

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import (
    MAX_VALUES_OF_DATA,
    Record,
    describe,
    parse_json,
    read_small,
)
from electra_ds.common.printable import shortened

MAX_CHARACTERS = 1 << 24  # of a context
WHAT = "a JSON file of SQuAD's shape"
MOST_MISPLACED = 0.5  # share of the training questions; above it the offsets of a file are wrong


class AnswerRecord(Record):
    """One answer. answer_start: its first character in the context."""

    model_config = ConfigDict(extra="ignore")

    text: str = Field(max_length=MAX_CHARACTERS)
    answer_start: int = Field(ge=0, le=MAX_CHARACTERS)


class QuestionRecord(Record):
    """One question. answers: None in a file without them."""

    model_config = ConfigDict(extra="ignore")

    id: str = Field(min_length=1, max_length=1000)
    question: str = Field(max_length=MAX_CHARACTERS)
    answers: list[AnswerRecord] | None = Field(None, max_length=10_000)
    is_impossible: bool = False


class ParagraphRecord(Record):
    """One context and its questions."""

    model_config = ConfigDict(extra="ignore")

    context: str = Field(min_length=1, max_length=MAX_CHARACTERS)
    qas: list[QuestionRecord]


class ArticleRecord(Record):
    """One article."""

    model_config = ConfigDict(extra="ignore")

    title: str = Field("", max_length=MAX_CHARACTERS)
    paragraphs: list[ParagraphRecord]


class SquadFile(Record):
    """The content of a file."""

    model_config = ConfigDict(extra="ignore")

    data: list[ArticleRecord]


class Answers(NamedTuple):
    """The answers of a question; none if it has no answer.

    starts: first character of each text in the context; -1 if the text is not at answer_start.
    """

    texts: tuple[str, ...]
    starts: tuple[int, ...]

    @property
    def is_misplaced(self) -> bool:
        """Whether there are answers, but none of them is at its answer_start."""
        return bool(self.starts) and max(self.starts) < 0


class Question(NamedTuple):
    """One question. key: its id. answers: None if the file does not have them."""

    key: str
    question: str
    context: str
    answers: Answers | None


def read_questions(path: Path, split: str, no_answer: bool) -> list[Question]:
    """Return the questions of a file, in its order.

    split: train and valid need answers; in test splits answers = [] without is_impossible = true
    are hidden. no_answer: whether questions may have no answer.
    Raises UserError for a file that cannot be read or has another shape, for a repeated id, for
    answers that are missing, blank or not expected, and for a training file in which the texts of
    more than half of the questions are not at answer_start.
    """
    content = read_small(path, WHAT).removeprefix(BOM_UTF8)
    value = parse_json(content, path, WHAT, max_values=MAX_VALUES_OF_DATA)
    try:
        file = SquadFile.model_validate(value)
    except ValidationError as error:
        where = _place(value, error.errors(include_url=False)[0]["loc"])
        raise UserError(f"{path}: {describe(error, most=1)}{where}; expected {WHAT}") from None
    questions: dict[str, Question] = {}
    for article in file.data:
        for number, paragraph in enumerate(article.paragraphs):
            for record in paragraph.qas:
                where = (
                    f"{path}: article {shortened(article.title)}, paragraph {number} (from 0), "
                    f"question {shortened(record.id)}"
                )
                if record.id in questions:
                    raise UserError(
                        f"{where}: the id occurs twice; expected every id once, because it names the "
                        "prediction; rename one"
                    )
                answers = _answers(record, paragraph.context, split, no_answer, where)
                questions[record.id] = Question(
                    record.id, record.question.strip(), paragraph.context, answers
                )
    if not questions:
        raise UserError(f"{path}: contains no question; check that the file is complete")
    if split == "train":
        _check_places(path, list(questions.values()))
    return list(questions.values())


def _place(value: Any, loc: tuple[int | str, ...]) -> str:
    """Return the title of the article and the id of the question of a wrong field.

    value: the content of the file. loc: keys of the field, from the outermost.
    """
    found: dict[str, str] = {}
    for key in loc:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            break
        if isinstance(value, dict):
            titles = {"article": value.get("title"), "question": value.get("id")}
            found |= {name: text for name, text in titles.items() if isinstance(text, str)}
    described = ", ".join(f"{name} {shortened(text)}" for name, text in found.items())
    return f" ({described})" if described else ""


def _answers(
    record: QuestionRecord, context: str, split: str, no_answer: bool, where: str
) -> Answers | None:
    """Return the answers of a question. Errors as in `read_questions`."""
    given = record.answers or []
    if record.is_impossible and not no_answer:
        raise UserError(
            f"{where}: is_impossible = true; expected an answer to every question of this task; use "
            'the task squad2, or give the task "questions": {"no_answer": true}'
        )
    if record.is_impossible and given:
        raise UserError(
            f"{where}: is_impossible = true with {len(given)} answers; expected answers = []; "
            "correct one of them"
        )
    is_hidden = not split.startswith(("train", "valid"))
    is_without = record.is_impossible or (no_answer and record.answers == [] and not is_hidden)
    if not given and not is_without:
        if is_hidden:
            return None
        found = "no key answers" if record.answers is None else "answers = []"
        raise UserError(
            f"{where}: {found}; expected at least one answer in the split {split}; for questions "
            'without an answer use the task squad2, or give the task "questions": {"no_answer": '
            "true}"
        )
    for number, answer in enumerate(given):
        if not answer.text.strip():
            raise UserError(
                f"{where}: answers.{number}.text = {shortened(answer.text)} is blank; expected a "
                "part of the context; a question without an answer has answers = [] and "
                "is_impossible = true"
            )
    starts = (
        answer.answer_start if context.startswith(answer.text, answer.answer_start) else -1
        for answer in given
    )
    return Answers(tuple(answer.text for answer in given), tuple(starts))


def _check_places(path: Path, questions: list[Question]) -> None:
    """Raise UserError if the texts of most answers are not at answer_start."""
    odd = [question for question in questions if question.answers and question.answers.is_misplaced]
    answered = sum(bool(question.answers and question.answers.texts) for question in questions)
    if odd and len(odd) > MOST_MISPLACED * answered:
        assert odd[0].answers is not None
        raise UserError(
            f"{path}: {len(odd)} of {answered} questions have no answer at its answer_start, the "
            f"first is {shortened(odd[0].key)} with {shortened(odd[0].answers.texts[0])}; expected "
            "answer_start to count characters of Unicode from 0, not bytes or UTF-16 units, and "
            "context and answers in one Unicode form; correct the file"
        )
