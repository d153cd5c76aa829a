"""The eight tasks of SuperGLUE: names, files, labels and metrics.

Their names begin with `superglue-`, so that they differ from GLUE's rte and from users' tasks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from electra_ds.finetuning.task_folders import plain_name, task_folder

PREFIX = "superglue-"
FILES = {"train": "train.jsonl", "valid": "val.jsonl", "test": "test.jsonl"}
# Diagnostic sets, predicted with the model of RTE.
AX = {"test_axb": "../AX-b/AX-b.jsonl", "test_axg": "../AX-g/AX-g.jsonl"}
OUTSIDE = {(f"{PREFIX}rte", file) for file in AX.values()}
_TRUE = ["false", "true"]
_NUMBERS = ["0", "1"]
# Values that differ from those of `superglue_values`. The first metric is the value of the task in the
# average of SuperGLUE.
SUPERGLUE: dict[str, dict[str, Any]] = {
    f"{PREFIX}boolq": {"labels": _TRUE},
    f"{PREFIX}cb": {
        "labels": ["contradiction", "entailment", "neutral"],
        "metrics": ["average", "accuracy", "macro_f1"],
    },
    f"{PREFIX}copa": {"kind": "multiple_choice", "text_b": None, "choices": "choices"},
    f"{PREFIX}multirc": {"labels": _NUMBERS, "metrics": ["average", "f1a", "em"]},
    f"{PREFIX}record": {"labels": _NUMBERS, "metrics": ["average", "f1", "em"]},
    f"{PREFIX}rte": {"labels": ["entailment", "not_entailment"], "splits": FILES | AX},
    f"{PREFIX}wic": {"labels": _TRUE},
    f"{PREFIX}wsc": {"labels": _TRUE, "text_b": None},
}


def is_superglue(name: str) -> bool:
    """Return whether a task of this name is a task of SuperGLUE."""
    return name in SUPERGLUE


def superglue_name(name: str) -> str | None:
    """Return the name of a SuperGLUE task in any usual spelling (BoolQ, superglue-rte), or None.

    `rte` is the task of GLUE.
    """
    plain = plain_name(name)
    short = plain.removeprefix("superglue")
    known = f"{PREFIX}{short}"
    return known if known in SUPERGLUE and plain != "rte" else None


def superglue_values(name: str, data: Path | None) -> dict[str, Any]:
    """Return the description of a task. data: the folder with BoolQ/, CB/, ..., or that of the task.

    Raises UserError for a missing folder.
    """
    shape = name.removeprefix(PREFIX)
    folder = task_folder(name, [shape], FILES.values(), data)
    return {
        "name": name,
        "folder": str(folder.resolve()),
        "format": shape,
        "splits": FILES,
        "text_a": "text_a",
        "text_b": "text_b",
        "index": "idx",
        "metrics": ["accuracy"],
        **SUPERGLUE[name],
    }
