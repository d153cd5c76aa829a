"""Descriptions of GLUE tasks and user tasks: files, columns, labels, metrics."""

from __future__ import annotations

import os
import re
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import parse_json, read_small
from electra_ds.common.names import check_relative
from electra_ds.common.printable import printable, shortened
from electra_ds.common.section import Section, machine, science
from electra_ds.common.suggestions import nearest
from electra_ds.config.loading import parse_config
from electra_ds.finetuning.conll_tasks import CONLL, conll_name, conll_values
from electra_ds.finetuning.examples import seen_labels
from electra_ds.finetuning.lookalikes import check_labels
from electra_ds.finetuning.metrics import METRICS, not_entity_tags
from electra_ds.finetuning.question_settings import (
    QuestionSettings,
    check_questions,
    question_values,
)
from electra_ds.finetuning.squad import ALIASES, SQUAD, squad_folder
from electra_ds.finetuning.superglue_answers import GROUP_METRICS
from electra_ds.finetuning.superglue_rows import SHAPES, Shape
from electra_ds.finetuning.superglue_tasks import (
    OUTSIDE,
    SUPERGLUE,
    is_superglue,
    superglue_name,
    superglue_values,
)
from electra_ds.finetuning.tag_schemes import TagScheme

Column = str | int
# Files of finetune in DIR. No task may have one of these names.
OWN_FILES = (
    "config.json",
    "report.json",
    "report.md",
    "submission.zip",
    "superglue.zip",
    "lock",
)
# classification: one class for a text or a pair. regression: one number. token_classification: one
# class for each word. multiple_choice: the right one of several second texts. question_answering: a
# part of a context.
TaskKind = Literal[
    "classification",
    "regression",
    "token_classification",
    "multiple_choice",
    "question_answering",
]
DIAGNOSTIC = "../diagnostic/diagnostic.tsv"  # beside the folder of MNLI
# (task, file) of the files that are not in the folder of their task.
BESIDE = {("mnli", DIAGNOSTIC), *OUTSIDE}


class Task(Section):
    """A task: its files, their columns, its labels and metrics.

    The description of a user's task is a JSON file with these keys.
    """

    name: str = science(
        ..., "name of the task and of its result folder", pattern=r"^[\w.-]+$", max_length=200
    )
    kind: TaskKind = science("classification", "what is predicted")
    splits: dict[str, str] = science(
        ..., "train, valid..., test... -> a file in `folder`, or a split of the dataset"
    )
    folder: str = machine(
        ".", "folder of the files, beside the description or below it; or they are in --data"
    )
    dataset: str | None = science(
        None,
        "Hugging Face dataset, or a folder that `datasets` reads in `folder` or --data, instead of "
        "files",
    )
    dataset_config: str | None = science(None, "name of the dataset's configuration")
    format: Literal["tsv", "csv", "jsonl", "conll"] | Shape | None = science(
        None, "format of the files; null: derived from their suffixes"
    )
    header: bool = science(True, "TSV and CSV: the first line has the names of the columns")
    columns: dict[str, list[str]] = science(
        {}, "split -> names of the columns of a file without a header"
    )
    text_a: Column = science(
        "sentence", "column of the text or the words, by name or by number from 0"
    )
    text_b: Column | None = science(None, "column of the second text of a pair")
    choices: list[Column] | Column | None = science(
        None, "multiple choice: columns of the choices, or one column with a list of them"
    )
    label: Column | None = science("label", "column of the label")
    index: Column | None = science(
        None,
        "column with the name of an example in predictions; null: the number of the row from 0",
    )
    labels: list[str] | None = science(
        None, "classes, in their order; null: those of the training split, sorted"
    )
    label_range: tuple[float, float] | None = science(
        None,
        "regression: lowest and highest label; null: those of the training split",
        strict=False,
    )
    tag_scheme: TagScheme = science(
        "file", "tags that are learned: those of the file, or the same spans in bioes"
    )
    metrics: list[str] = science(
        [], "the first is the main metric; empty: the default metrics of the kind"
    )
    both_orders: bool = science(False, "pairs: train on (a, b) and on (b, a)")
    epochs: float | None = science(
        None, "passes over the training examples; null: those of the config", gt=0
    )
    skip_short: list[str] = science(
        [], "splits in which rows with too few columns are skipped, with a warning"
    )

    questions: QuestionSettings = Field(
        QuestionSettings(), description="windows and null answers of question_answering"
    )

    @model_validator(mode="after")
    def _agrees(self) -> Task:
        check_questions(self)
        if self.name.startswith(".") or self.name.lower() in OWN_FILES:
            raise ValueError(
                f"name: {shortened(self.name)} cannot name a result folder; expected a name that "
                "does not begin with a dot and is not that of a file of finetune"
            )
        for split in self.splits:  # part of the name of a file of predictions
            if not re.fullmatch(r"train|(valid|test)(_[\w-]{1,100})?", split):
                raise ValueError(
                    f"splits.{printable(split)}: expected train, valid, valid_x, test or test_x"
                )
        if self.dataset not in (None, "."):
            check_relative(self.dataset, "dataset", "a name on the hub or a folder of the task")
        if self.dataset is None:
            for split, file in self.splits.items():
                if (self.name, file) not in BESIDE:
                    check_relative(file, f"splits.{split}", "a file in the folder of the task")
        known = GROUP_METRICS.get(str(self.format), METRICS[self.kind])
        if odd := [name for name in self.metrics if name not in known]:
            raise ValueError(
                f"metrics: {odd[0]!r} is not a metric of {self.kind}; there are {', '.join(known)}"
            )
        if self.metrics == ["average"]:
            raise ValueError("metrics: average is the mean of the other metrics; name them as well")
        self._check_choices()
        if self.labels is not None and (
            len(set(self.labels)) != len(self.labels) or len(self.labels) < 2
        ):
            raise ValueError(f"labels: {self.labels}; expected at least two, each once")
        if "f1" in self.metrics and self.labels and len(self.labels) > 2:
            raise ValueError("metrics: f1 is for two labels; use macro_f1")
        if self.both_orders and self.text_b is None:
            raise ValueError(
                "both_orders needs pairs; give the column of the second text as text_b"
            )
        if self.label is None and "train" in self.splits:
            raise ValueError(
                "label: null, but there is a split train; give the column of its labels"
            )
        if self.label_range is not None and not self.label_range[0] < self.label_range[1]:
            raise ValueError(
                f"label_range: {list(self.label_range)}; expected the lowest label and a higher one"
            )
        return self

    def _check_choices(self) -> None:
        is_choice = self.kind == "multiple_choice"
        if is_choice != (self.choices is not None):
            raise ValueError(
                "choices and kind multiple_choice belong together; give the columns of the choices, "
                "or one column with a list of them, as choices"
            )
        if isinstance(self.choices, list) and len(self.choices) < 2:
            raise ValueError(f"choices: {self.choices}; expected at least two columns")
        if is_choice and self.both_orders:
            raise ValueError("both_orders is for pairs; multiple_choice has none")
        if self.tag_scheme != "file" and self.kind != "token_classification":
            raise ValueError("tag_scheme is for token_classification")
        if self.format in SHAPES and not is_superglue(self.name):
            raise ValueError(
                f"format: {self.format} is that of a task of SuperGLUE; expected tsv, csv, jsonl or "
                "conll; convert the file to jsonl"
            )

    @property
    def choice_columns(self) -> list[Column]:
        """The columns of the choices; [] for tasks other than multiple choice."""
        if self.choices is None:
            return []
        return self.choices if isinstance(self.choices, list) else [self.choices]

    @property
    def has_pairs(self) -> bool:
        """Whether inputs have two segments."""
        return self.text_b is not None or self.choices is not None

    @property
    def main_metric(self) -> str:
        """The metric by which seeds are compared."""
        return self.metrics[0]

    @property
    def is_glue(self) -> bool:
        """Whether name, kind and columns are those of a GLUE task."""
        read = ("kind", "text_a", "text_b", "label")
        known = Task.model_validate(_glue_values(self.name)) if self.name in GLUE else None
        return known is not None and all(getattr(self, k) == getattr(known, k) for k in read)

    def path(self, split: str) -> Path:
        """Return the path of the file of a split."""
        return Path(self.folder, self.splits[split])

    @property
    def valid_splits(self) -> list[str]:
        """The splits on which models are scored, the main one first."""
        return [split for split in self.splits if split.startswith("valid")]


_FILES = {"train": "train.tsv", "valid": "dev.tsv", "test": "test.tsv"}
_MNLI_FILES = {
    "train": "train.tsv",
    "valid_matched": "dev_matched.tsv",
    "valid_mismatched": "dev_mismatched.tsv",
    "test_matched": "test_matched.tsv",
    "test_mismatched": "test_mismatched.tsv",
    "test_ax": DIAGNOSTIC,
}
_COLA = ["source", "label", "star", "sentence"]
_PAIR = {"text_a": "sentence1", "text_b": "sentence2"}
_NLI = {**_PAIR, "labels": ["entailment", "not_entailment"]}
_MNLI = {**_PAIR, "label": "gold_label", "labels": ["contradiction", "entailment", "neutral"]}
# Values that differ from the defaults of Task and of `_glue_values`. The first metric is the one in
# the tables of the paper (ELECTRA, section 3.1). The published files of QQP have a few short rows.
GLUE: dict[str, dict[str, Any]] = {
    "cola": {"columns": {"train": _COLA, "valid": _COLA}, "metrics": ["matthews"]},
    "sst2": {},
    "mrpc": {
        "text_a": "#1 String",
        "text_b": "#2 String",
        "label": "Quality",
        "metrics": ["accuracy", "f1"],
        "both_orders": True,
    },
    "stsb": {
        **_PAIR,
        "kind": "regression",
        "label": "score",
        "labels": None,
        "label_range": (0.0, 5.0),
        "metrics": ["spearman", "pearson"],
        "both_orders": True,
    },
    "qqp": {
        "text_a": "question1",
        "text_b": "question2",
        "label": "is_duplicate",
        "metrics": ["accuracy", "f1"],
        "skip_short": ["train", "valid"],
    },
    "mnli": {**_MNLI, "splits": _MNLI_FILES},
    "qnli": {**_NLI, "text_a": "question", "text_b": "sentence"},
    "rte": _NLI,
    "wnli": _PAIR,
    "ax": {**_MNLI, "splits": {"test": "diagnostic.tsv"}},  # predicted with a model of MNLI
}
_ALIASES = {"sst": "sst2", "sts": "stsb", "diagnostic": "ax"} | ALIASES


def glue_name(name: str) -> str:
    """Return the short name of a GLUE task or SQuAD in any usual spelling (STS-B, sst_2, CoLA).

    Other names are returned with only their letters a to z, in lower case, and digits.
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return _ALIASES.get(plain, plain)


def load_task(name: str, data: Path | None) -> Task:
    """Return a GLUE or SuperGLUE task, SQuAD 1.1 (squad) or 2.0 (squad2), a preset of CoNLL, or a
    user's task.

    name: name of one of these tasks, or path of the description of a user's task (x.json).
    data: the folder with the folders of the tasks (GLUE_DIR with CoLA/, RTE/, ...), or the folder
    of the task.
    labels and label_range that are null are read from the training split. Empty metrics become the
    default metrics of the kind. Test splits without a file are removed.
    Raises UserError for an unknown name or key, for a missing folder, and for errors in the
    training file when labels are read from it.
    """
    if name.endswith(".json"):
        return _filled(_user_task(Path(name), data))
    if known := superglue_name(name):
        return _filled(Task.model_validate(superglue_values(known, data)))
    if known := conll_name(name):
        return _filled(Task.model_validate(conll_values(known, data)))
    short = glue_name(name)
    if short in SQUAD:
        return _filled(Task(**SQUAD[short], folder=str(squad_folder(short, data).resolve())))
    if short not in GLUE:
        there_are = [*GLUE, *SUPERGLUE, *SQUAD, *CONLL]
        raise UserError(
            f"no task named {name!r}{nearest(short, there_are)}; there are {', '.join(there_are)}; "
            "for a task of your own give the path of its description (task.json)"
        )
    values = _glue_values(short)
    folder = _glue_folder(short, values["splits"], data)
    return _filled(Task(**values, folder=str(folder.resolve())))


def _glue_values(short: str) -> dict[str, Any]:
    return {"labels": ["0", "1"], "splits": _FILES, "name": short} | GLUE[short]


def _glue_folder(short: str, files: dict[str, str], data: Path | None) -> Path:
    """Return the folder of a GLUE task in `data`, or `data` if it contains a file of the task."""
    if data is None:
        raise UserError(f"task {short}: give --data GLUE_DIR, the folder with CoLA/, RTE/, ...")
    if not data.is_dir():
        raise UserError(
            f"task {short}: --data {data} is not a folder; expected GLUE_DIR with CoLA/, RTE/, ..."
        )
    folders = sorted(child for child in data.iterdir() if child.is_dir())
    if matching := [folder for folder in folders if glue_name(folder.name) == short]:
        return matching[0]
    if any((data / file).is_file() for file in files.values()):
        return data
    listed = ", ".join(folder.name for folder in folders[:20]) or "no folder"
    raise UserError(
        f"task {short}: {data} has no folder {short} (in any spelling: STS-B for stsb, diagnostic "
        f"for ax); found {listed}; give --data the folder that contains it, or the folder with "
        f"{next(iter(files.values()))}"
    )


def _user_task(path: Path, data: Path | None) -> Task:
    """Return the task of a description. Its files are beside the description, or in `data`.

    A description may come from another person, so it cannot name files at other places.
    """
    what = "a task's description"
    values = parse_json(read_small(path, what).removeprefix(BOM_UTF8), path, what)
    name = values.get("name", path.stem)
    if isinstance(name, str) and name.split() not in ([], [name]):
        origin = "" if "name" in values else ", from the name of the file,"
        raise UserError(
            f"{path}: name: {shortened(name)}{origin} has white space; expected letters, digits, "
            "'_', '-' and '.', because it names the folder of the results; rename the file, or add "
            f'"name": "{"-".join(name.split())}" to the description'
        )
    task = parse_config({"name": path.stem} | values, str(path), Task)
    published = {"a GLUE task": task.name in GLUE, "a SuperGLUE task": is_superglue(task.name)}
    published["a published task"] = task.name in SQUAD
    found = next((what for what, is_name in published.items() if is_name), None)
    if found:
        # Config, report and predict would treat a task of this name as the published task.
        raise UserError(
            f"{path}: name: {task.name!r} is the name of {found}; give this task another one "
            f'("name": "{task.name}-own") in its description'
        )
    if "train" not in task.splits or not task.valid_splits:
        raise UserError(
            f"{path}: splits: found {', '.join(task.splits)}; expected at least train and valid"
        )
    if task.folder != ".":
        check_relative(task.folder, f"{printable(path)}: folder", "a folder beside the description")
    folder = path.parent / task.folder
    if data is not None and task.dataset is not None:
        is_there = (data / task.dataset).exists() and not (folder / task.dataset).exists()
        folder = data if is_there else folder
    elif data is not None:
        beside, there = folder / task.splits["train"], data / task.splits["train"]
        if beside.is_file() and there.is_file() and not beside.samefile(there):
            raise UserError(
                f"{path}: {beside} and {there} both exist; leave out --data, or remove one of them"
            )
        if not beside.is_file():
            folder = data
    return task.model_copy(update={"folder": str(folder.resolve())})


def _filled(task: Task) -> Task:
    """Return the task with values for null labels, label_range and metrics. See `load_task`."""
    splits = {
        split: file
        for split, file in task.splits.items()
        if task.dataset or not split.startswith("test") or task.path(split).exists()
    }
    values = task.model_dump() | {"splits": splits}
    if task.kind == "question_answering":
        return parse_config(values | question_values(task), f"task {task.name}", Task)
    if task.kind == "regression" and task.label_range is None:
        labels = seen_labels(task)
        if labels[0] == labels[-1]:
            raise UserError(
                f"task {task.name}: every label of the training split is {labels[0]}; "
                "expected at least two different labels"
            )
        values["label_range"] = (labels[0], labels[-1])
    if task.kind in ("classification", "token_classification") and task.labels is None:
        values["labels"] = seen_labels(task)
        check_labels(values["labels"], task.name)
        if len(values["labels"]) < 2:
            raise UserError(
                f"task {task.name}: the training split has the one label "
                f"{shortened(values['labels'][0])}; "
                "expected at least two labels"
            )
    labels = values["labels"] or []
    if task.kind == "token_classification" and (split := [x for x in labels if len(x.split()) > 1]):
        raise UserError(
            f"task {task.name}: the tag {shortened(split[0])} has white space inside; expected "
            "tags without it, because files of predictions separate tags by spaces; rename it"
        )
    if not task.metrics:
        values["metrics"] = _default_metrics(task.kind, labels)
    if "entity_f1" in task.metrics and (odd := not_entity_tags(labels)):
        raise UserError(
            f"task {task.name}: metrics: entity_f1 needs tags of BIO or BIOES (O, B-x, I-x, E-x, "
            f"S-x), found the label {shortened(odd[0])}; use token_accuracy"
        )
    return parse_config(values, f"task {task.name}", Task)


def _default_metrics(kind: TaskKind, labels: list[str]) -> list[str]:
    if kind in ("classification", "multiple_choice"):
        return ["accuracy"]
    if kind == "regression":
        return ["pearson", "spearman"]
    begins = any(label[:2] in ("B-", "S-", "U-") for label in labels)
    has_entities = begins and not not_entity_tags(labels)
    return ["entity_f1", "token_accuracy"] if has_entities else ["token_accuracy"]


def task_names(text: str) -> list[str]:
    """Return the tasks of --tasks, a list separated by commas, each once.

    Names of GLUE and SQuAD in any spelling become short names, SuperGLUE names superglue-NAME.
    `glue` becomes the nine GLUE tasks (without ax), `superglue` its eight.
    Paths of descriptions are not changed; the path of an existing file may contain commas. Raises
    UserError for a list without names.
    """
    names: list[str] = []
    for name in _listed(text):
        short = glue_name(name)
        if name.lower() == "glue":
            names += [task for task in GLUE if task != "ax"]
        elif name.lower() == "superglue":
            names += SUPERGLUE
        elif known := superglue_name(name) or conll_name(name):
            names.append(known)
        elif name:
            names.append(short if short in GLUE or short in SQUAD else name)
    if not names:
        raise UserError(
            f"--tasks {shortened(text)}: names no task; expected tasks such as rte or descriptions "
            "(task.json), separated by commas"
        )
    return list(dict.fromkeys(names))


def _listed(text: str) -> list[str]:
    """Return the parts between commas. The path of an existing description is one part."""
    parts = text.split(",")
    names = []
    while parts:
        joined = (n for n in range(len(parts), 1, -1) if _is_description(",".join(parts[:n])))
        count = next(joined, 1)
        names.append(",".join(parts[:count]).strip())
        parts = parts[count:]
    return names


def _is_description(name: str) -> bool:
    return name.strip().endswith(".json") and os.path.isfile(name.strip())
