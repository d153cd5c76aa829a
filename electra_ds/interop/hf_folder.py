"""Reading of Hugging Face model folders (config.json and weights) without running their code."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import read_json

FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def is_hf_folder(path: Path) -> bool:
    """Whether path has a config.json with weights beside it (a run folder has no such weights)."""
    return (path / "config.json").is_file() and any((path / name).is_file() for name in FILES)


def read_config(folder: Path, model_types: tuple[str, ...] = ("electra",)) -> dict[str, Any]:
    """config.json of a folder. Raises UserError if it is missing or has another model_type."""
    config = read_json(folder / "config.json", "the config.json of a Hugging Face model")
    model_type = config.get("model_type")
    if model_type not in model_types:
        expected = " or ".join(map(repr, model_types))
        raise UserError(f"{folder}/config.json: model_type = {model_type!r}; expected {expected}")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by their names, from one file or several.

    A pickled file is read as weights only. Raises UserError when there are no weights, or when a
    file cannot be read.
    """
    first = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if first is None:
        raise UserError(f"{folder}: no weights here; expected one of {', '.join(FILES)}")
    names = {first.name}
    if first.suffix == ".json":
        names = set(
            read_json(first, "the index of a model in several files")["weight_map"].values()
        )
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        tensors |= _read_file(folder / Path(name).name)
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, "cpu", weights_only=True)
    except (OSError, EOFError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error) or "empty").splitlines()[0]
        raise UserError(f"{path}: cannot be read as weights ({reason})") from None
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(
            f"{path}: found values that are no tensors; expected a dict of tensors (a state_dict)"
        )
    return tensors
