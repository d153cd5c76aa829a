"""What a path is, for the message of a command that expected another kind of folder."""

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import parse_strictly, read_small
from electra_ds.common.printable import printable

Kind = Literal[
    "missing",
    "unreadable",
    "file",
    "data",
    "hugging face",
    "fine-tuned",
    "checkpoint",
    "run",
    "tokenizer",
    "other",
]
WEIGHTS = re.compile(r"(model\.safetensors|pytorch_model\.bin)(\.index\.json)?")
PARTS = ("discriminator", "generator")
VOCABULARIES = {"vocab.txt", "spm.model", "tokenizer.json", "spiece.model", "tokenizer.model"}
OF_A_RUN = {"ckpt", "metrics.jsonl", "heartbeat.json", "restarts.json"}
CHECKPOINT = re.compile(r"[0-9]{1,15}|final")
SEED = re.compile(r"seed-[0-9]+")
HEADS_OF_TASKS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)


class Found(NamedTuple):
    """kind: of the path. phrase: it as a part of a sentence; empty if the kind is "other"."""

    kind: Kind
    phrase: str

    @property
    def clause(self) -> str:
        """The phrase as a part of a message: ": PHRASE", or empty."""
        return f": {self.phrase}" if self.phrase else ""


@contextlib.contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Raise the OSError of a block that looks into a path as a UserError.

    pathlib raises it for a folder without permission and for a name that is too long. expected: at
    the path.
    """
    try:
        yield
    except OSError as error:
        where = printable(path if error.filename is None else error.filename)
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"{printable(path)}: cannot be read ({where}: {reason}); expected {expected}; check "
            "the path and its permissions"
        ) from None


def found_at(path: Path) -> Found:
    """The kind of a path, recognized by the names in it; files are read only for a phrase."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _folder(path, set(os.listdir(path)))
    except (FileNotFoundError, NotADirectoryError):
        return Found("missing", "it does not exist")
    except (OSError, ValueError) as error:
        return Found("unreadable", f"it cannot be read ({getattr(error, 'strerror', error)})")
    return Found("file", "it is a file" if stat.S_ISREG(mode) else "it is a device or a pipe")


def _folder(path: Path, names: set[str]) -> Found:
    if "manifest.json" in names:
        return Found("data", "it is a folder of prepared data")
    hugging_face = [folder for folder in (path, *(path / part for part in PARTS)) if _is_hf(folder)]
    if hugging_face:
        return Found("hugging face", _hugging_face(hugging_face[0]))
    if _is_fine_tuned(path, names):
        return Found("fine-tuned", _fine_tuned(path, names))
    if "meta.json" in names:
        return Found("checkpoint", "it is a checkpoint")
    if any(name.endswith("-of-00001.safetensors") for name in names):
        return Found("checkpoint", "it is a checkpoint without meta.json, which is not complete")
    if names & OF_A_RUN:
        return Found("run", f"it is a run{_state(path / 'ckpt')}")
    if "latest" in names or _checkpoints(path):
        return Found("checkpoint", f"it is the ckpt folder of a run{_state(path)}")
    if names & VOCABULARIES:
        return Found("tokenizer", "it is the folder of a tokenizer")
    return Found("other", "" if names else "it is an empty folder")


def _is_hf(folder: Path) -> bool:
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    return "config.json" in names and any(map(WEIGHTS.fullmatch, names))


def _hugging_face(folder: Path) -> str:
    try:
        config = parse_strictly(read_small(folder / "config.json", "a config"), nan_as_null=True)
        names = config.get("architectures") if isinstance(config, dict) else None
    except (OSError, ValueError):  # UserError is a ValueError
        names = None
    first = names[0] if isinstance(names, list) and names else ""
    if str(first).endswith(HEADS_OF_TASKS):
        return "it is an exported fine-tuned model (give the folder that finetune wrote)"
    return (
        "it is a Hugging Face folder (give the run that it was exported from, or make a run of it "
        "with `electra-ds import`)"
    )


def _is_fine_tuned(path: Path, names: set[str]) -> bool:
    of_seeds = any(SEED.fullmatch(name) for name in names)
    return (
        of_seeds
        or SEED.fullmatch(path.name) is not None
        or (path.name == "model" and "meta.json" in names)
        or any(path.glob("*/seed-*/result.json"))
        or any(path.glob("*/seed-*/model/meta.json"))
    )


def _fine_tuned(path: Path, names: set[str]) -> str:
    patterns = (
        "meta.json",
        "model/meta.json",
        "seed-*/model/meta.json",
        "*/seed-*/model/meta.json",
    )
    models = sorted(meta.parent for pattern in patterns for meta in path.glob(pattern))
    if not models:
        return "it is an output folder of finetune in which no model was kept (train.keep)"
    if models[0] == path:
        return "it is a fine-tuned model"
    return f"it is an output folder of finetune, with the model {printable(models[0])}"


def _state(ckpt: Path) -> str:
    """What is unusual in a folder of checkpoints; empty if nothing is."""
    try:
        os.listdir(ckpt)
    except PermissionError:
        return f" with checkpoints that cannot be read ({printable(ckpt)}: no permission)"
    except OSError:
        return " without a checkpoint"
    if not (found := _checkpoints(ckpt)):
        return " without a checkpoint"
    if (ckpt / "latest").exists():
        return ""
    return f" without ckpt/latest; name a checkpoint, such as {printable(ckpt / found[-1])}"


def _checkpoints(ckpt: Path) -> list[str]:
    """Names of the complete checkpoints in a folder, oldest first."""
    found = [
        meta.parent.name
        for meta in ckpt.glob("*/meta.json")
        if CHECKPOINT.fullmatch(meta.parent.name)
    ]
    return sorted(found, key=lambda name: (name == "final", len(name), name))
