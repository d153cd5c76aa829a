"""Rows of SuperGLUE's JSONL files as texts, labels and indexes.

The shape of a file has the name of its task. Each shape is a typed record with bounds. WiC's word is
marked in both sentences as `* word *`; WSC's noun as `* noun *` and its pronoun as `# pronoun #`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import AliasChoices, ConfigDict, Field

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import Record, parse_record
from electra_ds.common.printable import shortened

Shape = Literal["boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"]
SHAPES: tuple[str, ...] = get_args(Shape)
# Shapes in which several examples are the answers of one question.
GROUPED = ("multirc", "record")
CANDIDATE = "candidate"  # key of a row
QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
PLACEHOLDER = "@placeholder"
DOWNLOAD = "correct the row, or download the file again from super.gluebenchmark.com/tasks"

Rows = Iterator[tuple[str, dict[str | int, Any]]]  # as `rows.Row`
Values = dict[str | int, Any]
Text = Annotated[str, Field(min_length=1, max_length=1_000_000)]
Index = Annotated[int, Field(ge=0, lt=2**31)]
Number = Literal[0, 1] | None


class Candidate(NamedTuple):
    """One answer of a question.

    group: name of the question. text: of the answer. answers: the right answers, as far as known.
    """

    group: str
    text: str
    answers: tuple[str, ...] = ()


class _Read(Record):
    model_config = ConfigDict(extra="ignore")


class _Row(_Read):
    idx: Index


class BoolQ(_Row):
    """A passage and a question that yes or no answers."""

    passage: Text
    question: Text
    label: bool | None = None

    def values(self, where: str) -> Iterator[Values]:
        """Yield (passage, question)."""
        yield _pair(self.passage, self.question, self.label, self.idx)


class Entailment(_Row):
    """A premise and a hypothesis; AX-b names them sentence1 and sentence2."""

    premise: Text = Field(validation_alias=AliasChoices("premise", "sentence1"))
    hypothesis: Text = Field(validation_alias=AliasChoices("hypothesis", "sentence2"))

    def values(self, where: str) -> Iterator[Values]:
        """Yield (premise, hypothesis)."""
        yield _pair(self.premise, self.hypothesis, getattr(self, "label", None), self.idx)


class CB(Entailment):
    """A row of CB."""

    label: Literal["contradiction", "entailment", "neutral"] | None = None


class RTE(Entailment):
    """A row of RTE, AX-b or AX-g."""

    label: Literal["entailment", "not_entailment"] | None = None


class COPA(_Row):
    """A premise and two possible causes or effects of it."""

    premise: Text
    choice1: Text
    choice2: Text
    question: Literal["cause", "effect"]
    label: Number = None

    def values(self, where: str) -> Iterator[Values]:
        """Yield the premise with the question, and the two choices."""
        first = f"{self.premise} {QUESTIONS[self.question]}"
        choices = [self.choice1, self.choice2]
        yield _pair(first, "", self.label, self.idx) | {"choices": choices}


class _Answer(_Read):
    text: Text
    idx: Index
    label: Number = None


class _Question(_Read):
    question: Text
    idx: Index
    answers: list[_Answer] = Field(min_length=1, max_length=10_000)


class _Paragraph(_Read):
    text: Text
    questions: list[_Question] = Field(min_length=1, max_length=10_000)


class MultiRC(_Row):
    """A paragraph with questions, each with answers of which any number are right."""

    passage: _Paragraph

    def values(self, where: str) -> Iterator[Values]:
        """Yield (paragraph, question and answer) for each answer."""
        paragraph = re.sub(r"</?b>", "", self.passage.text.replace("<br>", " "))
        for question in self.passage.questions:
            group = f"{self.idx}/{question.idx}"
            for answer in question.answers:
                second = f"{question.question} {answer.text}"
                row = _pair(paragraph, second, answer.label, f"{group}/{answer.idx}")
                yield row | {CANDIDATE: Candidate(group, answer.text)}


class _Span(_Read):
    start: Index
    end: Index  # of the last character


class _Passage(_Read):
    text: Text
    entities: list[_Span] = Field(min_length=1, max_length=10_000)


class _RightAnswer(_Read):
    text: Text


class _Query(_Read):
    query: Text
    idx: Index
    answers: list[_RightAnswer] | None = Field(None, min_length=1, max_length=10_000)


class ReCoRD(_Read):
    """A passage with its entities, and queries in which one of them is missing."""

    passage: _Passage
    qas: list[_Query] = Field(min_length=1, max_length=10_000)

    def values(self, where: str) -> Iterator[Values]:
        """Yield (passage, query with an entity) for each query and different entity."""
        text = self.passage.text
        for number, span in enumerate(self.passage.entities):
            if not span.start <= span.end < len(text):
                raise UserError(
                    f"{where}: passage.entities.{number}: found characters {span.start} to "
                    f"{span.end}; expected a place in the text of {len(text)} characters; "
                    f"{DOWNLOAD}"
                )
        spans = self.passage.entities
        entities = dict.fromkeys(text[span.start : span.end + 1] for span in spans)
        passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", text)
        passage = passage.replace("\n@highlight\n", ". ")
        for number, query in enumerate(self.qas):
            if PLACEHOLDER not in query.query:
                raise UserError(
                    f"{where}: qas.{number}.query: found {shortened(query.query)}; expected a text "
                    f"with {PLACEHOLDER}; {DOWNLOAD}"
                )
            answers = tuple(answer.text for answer in query.answers or ())
            for entity in entities:
                label = int(entity in answers) if answers else None
                second = query.query.replace(PLACEHOLDER, entity)
                row = _pair(passage, second, label, f"{query.idx}/{entity}")
                yield row | {CANDIDATE: Candidate(str(query.idx), entity, answers)}


class WiC(_Row):
    """Two sentences with one word, perhaps in two senses."""

    sentence1: Text
    sentence2: Text
    start1: Index
    end1: Index
    start2: Index
    end2: Index
    label: bool | None = None

    def values(self, where: str) -> Iterator[Values]:
        """Yield both sentences with the word marked."""
        marked: list[str] = []
        for number in (1, 2):
            text = getattr(self, f"sentence{number}")
            start, end = getattr(self, f"start{number}"), getattr(self, f"end{number}")
            if not start < end <= len(text):
                raise UserError(
                    f"{where}: start{number}, end{number}: found {start} and {end}; expected a place "
                    f"in sentence{number} of {len(text)} characters; {DOWNLOAD}"
                )
            marked.append(f"{text[:start]} * {text[start:end]} * {text[end:]}".strip())
        yield _pair(marked[0], marked[1], self.label, self.idx)


class _Target(_Read):
    span1_index: Index
    span1_text: Text
    span2_index: Index
    span2_text: Text


class WSC(_Row):
    """A text with a noun phrase (span1) and a pronoun (span2), which may stand for it."""

    text: Text
    target: _Target
    label: bool | None = None

    def values(self, where: str) -> Iterator[Values]:
        """Yield the text with both marked."""
        words = self.text.split()
        marked = list(words)
        for number, mark in ((1, "*"), (2, "#")):
            text = getattr(self.target, f"span{number}_text")
            index = getattr(self.target, f"span{number}_index")
            size = len(text.split())
            first = _place(words, text, index)
            if first is None:
                raise UserError(
                    f"{where}: target.span{number}_text: found {shortened(text)} at word {index}; "
                    f"expected words of the text; {DOWNLOAD}"
                )
            marked[first] = f"{mark} {marked[first]}"
            marked[first + size - 1] += f" {mark}"
        yield _pair(" ".join(marked), "", self.label, self.idx)


Kind = type[BoolQ] | type[CB] | type[COPA] | type[MultiRC] | type[ReCoRD] | type[WiC] | type[WSC]
RECORDS: dict[str, Kind | type[RTE]] = {
    "boolq": BoolQ,
    "cb": CB,
    "copa": COPA,
    "multirc": MultiRC,
    "record": ReCoRD,
    "rte": RTE,
    "wic": WiC,
    "wsc": WSC,
}


def superglue_rows(lines: Rows, shape: str, split: str) -> Rows:
    """Yield the rows of a file with the keys text_a, text_b, choices, label, idx and candidate.

    lines: the objects of the file. shape: of SHAPES. A label that is not known has no key. Raises
    UserError, with file, line and key, for an object of another shape, for a missing label in train
    and valid, and for an index of a question that occurs twice.
    """
    record = RECORDS[shape]
    needs_label = split.startswith(("train", "valid"))
    what = f"a row of {record.__name__} with keys of these types; {DOWNLOAD}"
    seen: set[Any] = set()
    for where, line in lines:
        for row in parse_record(line, where, record, what).values(where):
            if needs_label and "label" not in row:
                raise UserError(
                    f"{where}: label: missing in row {row['idx']}; expected a label in the split "
                    f"{split}; {DOWNLOAD}"
                )
            if shape in GROUPED and row["idx"] in seen:
                raise UserError(
                    f"{where}: idx: {shortened(row['idx'])} occurs twice; expected each index once; "
                    f"{DOWNLOAD}"
                )
            seen.add(row["idx"])
            yield where, row


def _pair(first: str, second: str, label: Any, index: int | str) -> Values:
    values: Values = {"text_a": first, "text_b": second, "label": label, "idx": index}
    return {key: value for key, value in values.items() if value is not None}


def _place(words: list[str], text: str, index: int) -> int | None:
    """Return the number of the first word of `text` in `words`, as near to `index` as possible.

    The published indexes are sometimes off by a few words. Case and punctuation around words are
    ignored. None if the text does not occur.
    """
    wanted = list(map(_bare, text.split()))
    bare = list(map(_bare, words))
    starts = range(len(words) - len(wanted) + 1)
    places = [start for start in starts if bare[start : start + len(wanted)] == wanted]
    return min(places, key=lambda start: abs(start - index), default=None)


def _bare(word: str) -> str:
    return re.sub(r"^\W+|\W+$|'s\W*$", "", word.lower())
