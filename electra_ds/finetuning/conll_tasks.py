"""Presets of two tagging tasks in the CoNLL column shape: chunking and named entities."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from electra_ds.common.errors import UserError
from electra_ds.finetuning.task_folders import plain_name, task_folder


class Preset(NamedTuple):
    """spellings: names of its folder. types: of spans. splits: split -> names of its file."""

    spellings: tuple[str, ...]
    types: tuple[str, ...]
    splits: dict[str, tuple[str, ...]]


# conll2000 has no dev set: the authors of ELECTRA score its test set as dev.
CONLL = {
    "conll2000": Preset(
        ("conll2000", "chunk", "chunking"),
        ("ADJP", "ADVP", "CONJP", "INTJ", "LST", "NP", "PP", "PRT", "SBAR", "UCP", "VP"),
        {
            "train": ("train.txt",),
            "valid": ("dev.txt", "valid.txt", "test.txt"),
            "test": ("test.txt",),
        },
    ),
    "conll2003": Preset(
        ("conll2003", "ner"),
        ("LOC", "MISC", "ORG", "PER"),
        {
            "train": ("train.txt", "eng.train"),
            "valid": ("valid.txt", "dev.txt", "eng.testa"),
            "test": ("test.txt", "eng.testb"),
        },
    ),
}


def conll_name(name: str) -> str | None:
    """Return the name of a preset in any usual spelling (CoNLL-2000), or None."""
    plain = plain_name(name)
    return plain if plain in CONLL else None


def is_preset(name: str, tag_scheme: str) -> bool:
    """Return whether a task is a preset, and not a user's task of the same name."""
    return name in CONLL and tag_scheme == "bioes"


def conll_values(name: str, data: Path | None) -> dict[str, Any]:
    """Return the description of a preset. data: the folder with conll2000/, or that of the task.

    Raises UserError for a missing folder, and without a file of train or valid.
    """
    preset = CONLL[name]
    folder = task_folder(name, preset.spellings, preset.splits["train"], data)
    splits: dict[str, str] = {}
    for split, files in preset.splits.items():
        found = [file for file in files if (folder / file).is_file()]
        if found and found[0] not in splits.values():
            splits[split] = found[0]
        elif split != "test":
            raise UserError(
                f"task {name}: {folder} has no file of the split {split}; expected "
                f"{' or '.join(files)}, one word a line with its tag in the last column; copy it "
                "there"
            )
    tags = [f"{prefix}-{kind}" for kind in preset.types for prefix in "BIES"]
    return {
        "name": name,
        "folder": str(folder.resolve()),
        "kind": "token_classification",
        "format": "conll",
        "splits": splits,
        "text_a": "words",
        "label": "tags",
        "labels": ["O", *tags],
        "tag_scheme": "bioes",
        "metrics": ["entity_f1", "token_accuracy"],
    }
