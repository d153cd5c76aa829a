"""Reading of Hugging Face model folders (config.json and weights) without running their code."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.files import is_lfs_pointer, open_regular
from electra_ds.common.json_files import Record, read_json, read_record
from electra_ds.common.names import check_name
from electra_ds.common.printable import printable, shortened
from electra_ds.interop.hf import LOADED_TYPES, format_of_type
from electra_ds.interop.hf_format import HfFormat
from electra_ds.interop.pickled_weights import read_pickled
from electra_ds.model.weights import check_type

FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class Index(Record):
    """The index of a model in several files. weight_map: tensor name -> file name."""

    model_config = ConfigDict(extra="ignore")

    weight_map: dict[str, str] = Field(min_length=1)


MOST_UNUSED_ROWS = 64


def is_hf_folder(path: Path) -> bool:
    """Return whether a folder has a config.json and weights. A run folder has no such weights."""
    return (path / "config.json").is_file() and any((path / name).is_file() for name in FILES)


class HfFolder(NamedTuple):
    """The content of a folder. tensors: by their names in the folder."""

    format: HfFormat
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def read_config(folder: Path, model_types: Sequence[str] = LOADED_TYPES) -> dict[str, Any]:
    """Return the content of config.json in a folder.

    Raises UserError if the file is missing or invalid, or has another model_type.
    """
    config = read_json(folder / "config.json", "the config.json of a Hugging Face model")
    model_type = config.get("model_type")
    if model_type not in model_types:
        expected = " or ".join(map(repr, model_types))
        found = f"model_type = {shortened(model_type)}" if model_type else "no model_type"
        raise UserError(
            f"{folder}/config.json: {found}; expected {expected}; use a model of such a type"
        )
    return config


def read_folder(folder: Path, entries: int, model_types: Sequence[str] = LOADED_TYPES) -> HfFolder:
    """Return the content of a folder, without the rows that its vocabulary does not use.

    entries: number of entries of the vocabulary. Word tables are often padded to a multiple of 8 or
    64, and some have rows for later entries. Such rows are removed from the tensors, and
    `vocab_size` of the config is reduced, if they are at most MOST_UNUSED_ROWS or 5 % of all rows.
    Raises UserError as `read_config` and `read_tensors` do.
    """
    config, tensors = read_config(folder, model_types), read_tensors(folder)
    form = format_of_type(config["model_type"])
    rows = config.get("vocab_size")
    if not isinstance(rows, int) or not 0 < rows - entries <= max(MOST_UNUSED_ROWS, rows // 20):
        return HfFolder(form, config, tensors)
    cut = {
        name: tensor[:entries]
        if name.endswith(form.rows_of_words) and tensor.ndim and len(tensor) == rows
        else tensor
        for name, tensor in tensors.items()
    }
    return HfFolder(form, config | {"vocab_size": entries}, cut)


def stated_length(folder: Path) -> int | None:
    """Return model_max_length in tokenizer_config.json of a folder, in tokens.

    Returns None without the file, and for a value that is not an integer of at least 3.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    length = read_json(path, "the options of a Hugging Face tokenizer").get("model_max_length")
    is_length = isinstance(length, int) and not isinstance(length, bool) and length >= 3
    return length if is_length else None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder by name, from one file or several, on the CPU.

    Pickled files are loaded with weights_only=True. Raises UserError when there are no weights, when
    a file cannot be read, and for floating-point tensors of less than 16 bits.
    """
    first = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if first is None:
        raise UserError(f"{folder}: no weights here; expected one of {', '.join(FILES)}")
    if first.suffix != ".json":
        return _read_file(first)
    index = read_record(first, Index, "the index of a model in several files").weight_map
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(index.values())):
        tensors |= _read_file(folder / check_name(name, f"{first}: weight_map", "a file"))
    if missing := sorted(index.keys() - tensors.keys()):
        raise UserError(
            f"{first}: weight_map names {printable(missing[0])}, which is in none of the files; "
            "copy all files of the model"
        )
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        with open_regular(path) as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as weights ({error.strerror})") from None
    if is_lfs_pointer(start):
        raise UserError(f"{path}: is a Git LFS pointer, not the weights; run: git lfs pull")
    if not start:
        raise UserError(f"{path}: cannot be read as weights (empty)")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
    for name, value in tensors.items():
        if value.is_floating_point():  # torch compares and converts no tensors of 4 bits
            check_type(value, printable(name), str(path))
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: cannot be read as weights ({reason}); copy the file again"
        ) from None
