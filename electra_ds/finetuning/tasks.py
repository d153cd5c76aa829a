"""What is a task? One description for GLUE and for own tasks: files, columns, labels, metrics."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from electra_ds.common.errors import UserError
from electra_ds.common.files import read_json
from electra_ds.common.section import Section, machine, science
from electra_ds.common.suggestions import nearest
from electra_ds.config.loading import parse_config
from electra_ds.finetuning.examples import seen_labels
from electra_ds.finetuning.metrics import METRICS

Column = str | int


class Task(Section):
    """A task: where its examples are, what they mean, how predictions are scored. Own tasks are written as JSON."""

    name: str = science(..., "name of the task and of its folder of results", pattern=r"^[\w.-]+$")
    kind: Literal["classification", "regression", "token_classification"] = science(
        "classification", "what is told"
    )
    splits: dict[str, str] = science(
        ..., "train, valid..., test... -> file, or split of the dataset"
    )
    folder: str = machine(
        ".", "where the files are, seen from the description; or they are in --data"
    )
    dataset: str | None = science(
        None, "Hugging Face dataset, or a folder that `datasets` reads, instead of files"
    )
    dataset_config: str | None = science(None, "its configuration, where it has several")
    format: Literal["tsv", "csv", "jsonl", "conll"] | None = science(
        None, "of the files; null: by their names"
    )
    header: bool = science(True, "TSV and CSV: the first line names the columns")
    columns: dict[str, list[str]] = science(
        {}, "split -> names of the columns of a file without a header"
    )
    text_a: Column = science(
        "sentence", "column of the sentence or words, by name or number from 0"
    )
    text_b: Column | None = science(None, "column of the second sentence of a pair")
    label: Column | None = science("label", "column of the label")
    index: Column | None = science(
        None, "column that names an example in predictions; null: the row's number from 0"
    )
    labels: list[str] | None = science(
        None, "classes, in their order; null: those of the training split, sorted"
    )
    label_range: tuple[float, float] | None = science(
        None,
        "regression: lowest and highest label; null: those of the training split",
        strict=False,
    )
    metrics: list[str] = science([], "first the main one; empty: the usual of the kind")
    both_orders: bool = science(False, "pairs: train on (a, b) and on (b, a)")
    epochs: float | None = science(
        None, "passes over the training examples; null: the recipe's", gt=0
    )
    skip_short: list[str] = science(
        [], "splits whose rows with too few columns are left out, with a warning"
    )

    @model_validator(mode="after")
    def _agrees(self) -> Task:
        for split in self.splits:
            if split.split("_")[0] not in ("train", "valid", "test"):
                raise ValueError(f"splits.{split}: expected train, valid, valid_x, test or test_x")
        if odd := [name for name in self.metrics if name not in METRICS[self.kind]]:
            raise ValueError(
                f"metrics: {odd[0]!r} is none of {self.kind}; there are {', '.join(METRICS[self.kind])}"
            )
        if self.labels is not None and (
            len(set(self.labels)) != len(self.labels) or len(self.labels) < 2
        ):
            raise ValueError(f"labels: {self.labels}; expected at least two, each once")
        if "f1" in self.metrics and self.labels and len(self.labels) > 2:
            raise ValueError("metrics: f1 is for two labels; use macro_f1")
        if self.both_orders and self.text_b is None:
            raise ValueError(
                "both_orders: for pairs; name the column of the second sentence as text_b"
            )
        if self.label is None and "train" in self.splits:
            raise ValueError(
                "label: null, but there is a split train; name the column of its labels"
            )
        if self.label_range is not None and not self.label_range[0] < self.label_range[1]:
            raise ValueError(
                f"label_range: {list(self.label_range)}; expected the lowest label, then a higher one"
            )
        return self

    @property
    def main_metric(self) -> str:
        """The metric by which seeds are compared."""
        return self.metrics[0]

    def path(self, split: str) -> Path:
        """The file of a split."""
        return Path(self.folder, self.splits[split])

    @property
    def valid_splits(self) -> list[str]:
        """The splits that models are scored on, the main one first."""
        return [split for split in self.splits if split.startswith("valid")]


_FILES = {"train": "train.tsv", "valid": "dev.tsv", "test": "test.tsv"}
_MNLI_FILES = {
    "train": "train.tsv",
    "valid_matched": "dev_matched.tsv",
    "valid_mismatched": "dev_mismatched.tsv",
    "test_matched": "test_matched.tsv",
    "test_mismatched": "test_mismatched.tsv",
    "test_ax": "../diagnostic/diagnostic.tsv",
}
_COLA = ["source", "label", "star", "sentence"]
_PAIR = {"text_a": "sentence1", "text_b": "sentence2"}
_NLI = {**_PAIR, "labels": ["entailment", "not_entailment"]}
_MNLI = {**_PAIR, "label": "gold_label", "labels": ["contradiction", "entailment", "neutral"]}
# What differs from the defaults of Task and of load_task. The metric named first is that of the paper's tables
# (ELECTRA, section 3.1). The published files of QQP have a few broken rows.
GLUE = {
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
    "ax": {**_MNLI, "splits": {"test": "diagnostic.tsv"}},  # for prediction with the model of MNLI
}
_ALIASES = {"sst": "sst2", "sts": "stsb", "diagnostic": "ax"}


def glue_name(name: str) -> str:
    """The short name of a GLUE task in any usual spelling: STS-B, sst_2, CoLA; other words stay what they are."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return _ALIASES.get(plain, plain)


def load_task(name: str, data: Path | None) -> Task:
    """A GLUE task by name or an own one by the path of its JSON, with labels, label_range and metrics filled in.

    data: the folder that holds the tasks' folders (GLUE_DIR with CoLA/, RTE/, ...) or the task's own folder.
    Test splits whose file is not there are left out. UserError for an unknown name or key, and for what is wrong in a
    training file whose labels must be read.
    """
    if name.endswith(".json"):
        task = _own_task(Path(name), data)
    elif glue_name(name) in GLUE:
        short = glue_name(name)
        values = {"labels": ["0", "1"], "splits": _FILES, "name": short} | GLUE[short]
        task = Task(**values, folder=str(_glue_folder(short, values["splits"], data).resolve()))
    else:
        raise UserError(
            f"no task named {name!r}{nearest(glue_name(name), list(GLUE))}; there are {', '.join(GLUE)}; "
            "of an own task give the description's path (task.json)"
        )
    return _filled(task)


def _glue_folder(short: str, files: dict[str, str], data: Path | None) -> Path:
    """The folder of a GLUE task inside `data`, or `data` itself where it holds one of the task's files."""
    if data is None:
        raise UserError(f"task {short}: give --data GLUE_DIR, the folder with CoLA/, RTE/, ...")
    if not data.is_dir():
        raise UserError(
            f"task {short}: --data {data} is no folder; expected GLUE_DIR with CoLA/, RTE/, ..."
        )
    inside = sorted(child for child in data.iterdir() if child.is_dir())
    if found := [child for child in inside if glue_name(child.name) == short]:
        return found[0]
    if any((data / file).is_file() for file in files.values()):
        return data
    raise UserError(
        f"task {short}: {data} has no folder {short} (in any spelling: STS-B for stsb, diagnostic for ax); found "
        f"{', '.join(child.name for child in inside[:20]) or 'no folder at all'}; give --data the folder that holds "
        f"it, or the task's own with {next(iter(files.values()))}"
    )


def _own_task(path: Path, data: Path | None) -> Task:
    values = read_json(path, "a task's description")
    task = parse_config({"name": path.stem} | values, str(path), Task)
    if "train" not in task.splits or not task.valid_splits:
        raise UserError(
            f"{path}: splits: found {', '.join(task.splits)}; expected at least train and valid"
        )
    here = path.parent / task.folder
    there = here if data is None or (here / task.splits.get("train", "")).is_file() else data
    return task.model_copy(update={"folder": str(there.resolve())})


def _filled(task: Task) -> Task:
    """The task with what is null taken from the training split, and without test splits that are not there."""
    there = [
        split
        for split in task.splits
        if task.dataset or split[:4] != "test" or task.path(split).exists()
    ]
    update: dict = {"splits": {split: task.splits[split] for split in there}}
    if task.kind == "regression" and task.label_range is None:
        seen = seen_labels(task)
        if seen[0] == seen[-1]:
            raise UserError(
                f"task {task.name}: every label of the training split is {seen[0]}; nothing can be learned"
            )
        update["label_range"] = (seen[0], seen[-1])
    if task.kind != "regression" and task.labels is None:
        update["labels"] = seen_labels(task)
        if len(update["labels"]) < 2:
            raise UserError(
                f"task {task.name}: the training split has the one label {update['labels']}; expected two"
            )
    if not task.metrics:
        bio = any(label.startswith("B-") for label in update.get("labels") or task.labels or ())
        tags = ["entity_f1", "token_accuracy"] if bio else ["token_accuracy"]
        update["metrics"] = {
            "classification": ["accuracy"],
            "regression": ["pearson", "spearman"],
        }.get(task.kind, tags)
    return parse_config(task.model_dump() | update, f"task {task.name}", Task)


def task_names(text: str) -> list[str]:
    """What --tasks lists by commas, each once: GLUE names in any spelling (`glue`: the nine), paths of descriptions."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    nine = [name for name in GLUE if name != "ax"]
    names = [short if (short := glue_name(name)) in GLUE else name for name in names]
    return list(
        dict.fromkeys(one for name in names for one in (nine if name.lower() == "glue" else [name]))
    )
