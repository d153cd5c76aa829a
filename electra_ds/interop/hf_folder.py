"""Folders of Hugging Face: config.json beside tensors. Reading one executes nothing."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.files import read_json

FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def is_hf_folder(path: Path) -> bool:
    """Whether path holds a config.json with weights beside it (a run folder's config.json has none)."""
    return (path / "config.json").is_file() and any((path / name).is_file() for name in FILES)


def read_config(folder: Path, kinds: tuple[str, ...] = ("electra",)) -> dict:
    """config.json of a folder; UserError when its model_type is none of `kinds`."""
    config = read_json(folder / "config.json", "the config.json of a Hugging Face model")
    found = config.get("model_type")
    if found not in kinds:
        raise UserError(
            f"{folder}/config.json: model_type = {found!r}; expected {' or '.join(map(repr, kinds))}"
        )
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by foreign name, in one file or several; a pickled file is read as weights only."""
    first = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if first is None:
        raise UserError(f"{folder}: no weights here; expected one of {', '.join(FILES)}")
    names = [first.name]
    if first.suffix == ".json":
        names = sorted(
            set(read_json(first, "the index of a model in several files")["weight_map"].values())
        )
    found = {}
    for path in (folder / Path(name).name for name in names):
        try:
            tensors = (
                load_file(path)
                if path.suffix == ".safetensors"
                else torch.load(path, "cpu", weights_only=True)
            )
        except (OSError, EOFError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{path}: cannot be read as weights ({(str(error) or 'empty').splitlines()[0]})"
            ) from None
        if not all(isinstance(value, Tensor) for value in tensors.values()):
            raise UserError(
                f"{path}: expected a table of tensors by name, as `state_dict()` gives it"
            )
        found.update(tensors)
    return found
