"""The checkpoint format: names, meta.json, checks, and loading at any ZeRO stage and world size.

    OUT/ckpt/1000/meta.json                            state, config, file list with sizes and sha256
                  model-00001-of-00002.safetensors     fp32 master weights by canonical parameter name
                  optim-00001-of-00002.safetensors     exp_avg/NAME, exp_avg_sq/NAME
    OUT/ckpt/latest                                    the name of one checkpoint, written last

A checkpoint folder is complete, because it is renamed to its name after its files are written. The
files are safetensors and JSON, so reading them executes no code.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.files import sha256_file
from electra_ds.common.json_files import read_json
from electra_ds.training.collectives import fail_on_all_ranks, on_rank0
from electra_ds.training.state import TrainingState

FORMAT = "electra_ds checkpoint"
VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq")
FINAL = "final"
DEFAULT_EXPECTATION = "a run folder (OUT), OUT/ckpt or OUT/ckpt/STEP"


class Weights(Protocol):
    """Interface of `engine.Engine` for saving and loading: full tensors, and collectives."""

    ranks: Any
    parameters: dict[str, Any]

    def full_tensor(self, name: str, kind: str) -> Tensor: ...
    def set_full_tensor(self, name: str, kind: str, value: Tensor) -> None: ...
    def shape(self, name: str) -> torch.Size: ...
    def all_gather_object(self, value: Any) -> list[Any]: ...
    def reset_moments(self, applied_steps: int) -> None: ...
    def scaler_state(self) -> dict[str, float]: ...
    def set_scaler_state(self, state: dict[str, float]) -> None: ...


@dataclass(frozen=True)
class Meta:
    """Content of meta.json, which describes a checkpoint.

    state: progress of the run.
    config: the resolved config as JSON values.
    scaler: state of the fp16 loss scaler; empty without one.
    world_size: number of ranks that wrote the checkpoint.
    files: file name -> {"bytes": size, "sha256": hexadecimal hash}.
    """

    state: TrainingState
    config: dict[str, Any]
    scaler: dict[str, float]
    world_size: int
    files: dict[str, dict[str, Any]]


def latest(folder: Path) -> Path | None:
    """Return the checkpoint that `latest` names; None if there is no file `latest`.

    folder: OUT/ckpt.
    Raises UserError when the file does not name a checkpoint.
    """
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    name = pointer.read_text().strip()
    if name == FINAL and not (folder / FINAL).exists():
        # The run was killed while --extend renamed `final` to its step.
        steps = (path.name for path in folder.iterdir() if path.name.isdigit())
        name = max(steps, key=int, default=name)
    if not re.fullmatch(r"\d+|final", name) or not (folder / name / "meta.json").exists():
        raise UserError(
            f"{pointer} names {name!r}, which is no complete checkpoint in {folder}; "
            "write the name of a complete checkpoint into the file"
        )
    return folder / name


def latest_on_rank0(folder: Path) -> Path | None:
    """Return `latest(folder)` as rank 0 reads it, on every rank. Collective."""

    def name() -> str | None:
        found = latest(folder)
        return found.name if found else None

    found = on_rank0(name)
    return folder / found if found else None


def find_checkpoint(path: Path, expected: str = DEFAULT_EXPECTATION) -> Path:
    """Return the latest checkpoint of a run folder or of its ckpt folder, or `path` if it is one.

    expected: description of the accepted folders, for the error message.
    Raises UserError when there is no checkpoint.
    """
    for folder in (path, path / "ckpt"):
        if (folder / "meta.json").exists():
            return folder
        newest = latest(folder)
        if newest is not None:
            return newest
    raise UserError(f"{path}: no checkpoint here; expected {expected}")


def tokenizer_of(checkpoint: Path) -> Path:
    """Return the tokenizer folder of a checkpoint. It may not exist.

    It is beside the checkpoint of a fine-tuned model; otherwise it is in the run folder.
    """
    parent = checkpoint.resolve().parent
    beside = parent / "tokenizer"
    return beside if beside.is_dir() else parent.parent / "tokenizer"


def read_meta(path: Path) -> Meta:
    """Read meta.json and check format, version, and the size of every file.

    Raises UserError with the file, what was found and what was expected.
    """
    values = read_json(path / "meta.json", "a checkpoint of electra_ds")
    found = (values.get("format"), values.get("version"))
    if found != (FORMAT, VERSION):
        raise UserError(f"{path}/meta.json: expected {FORMAT!r} version {VERSION}, found {found}")
    values.setdefault("recent_losses", [])  # the first checkpoints have none
    try:
        state = TrainingState(**{key.name: values[key.name] for key in fields(TrainingState)})
        meta = Meta(
            state, values["config"], values["scaler"], values["world_size"], values["files"]
        )
    except KeyError as error:
        raise UserError(
            f"{path}/meta.json: has no {error}; it is incomplete, use an older checkpoint"
        ) from None
    for name, facts in meta.files.items():
        _check_size(path, name, facts["bytes"])
    return meta


def _check_size(path: Path, name: str, expected: int) -> None:
    if not re.fullmatch(r"(model|optim)-\d{5}-of-\d{5}\.safetensors", name):
        raise UserError(
            f"{path}/meta.json: found a file named {name!r}, which no checkpoint has; expected "
            "model-NNNNN-of-NNNNN.safetensors or optim-NNNNN-of-NNNNN.safetensors"
        )
    size = (path / name).stat().st_size if (path / name).exists() else None
    if size != expected:
        found = "no file" if size is None else size
        raise UserError(f"{path / name}: expected {expected} bytes, found {found}")


def check_content(path: Path, meta: Meta, part: int = 0, parts: int = 1) -> None:
    """Compare the sha256 of the files `part`, `part + parts`, ... (by name) with meta.json.

    Raises UserError with the name of the damaged file.
    """
    for name in sorted(meta.files)[part::parts]:
        if sha256_file(path / name) != meta.files[name]["sha256"]:
            raise UserError(
                f"{path / name}: its content has changed (the sha256 differs from that in "
                "meta.json); use an older checkpoint"
            )


def tensors(path: Path, meta: Meta, prefix: str = "model") -> Iterator[tuple[str, Tensor]]:
    """Yield (name, fp32 tensor on the CPU) of the `model` or `optim` files.

    Raises UserError when a file is not a safetensors file.
    """
    for name in sorted(meta.files):
        if not name.startswith(prefix):
            continue
        try:
            with safe_open(path / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    yield key, file.get_tensor(key)
        except SafetensorError as error:
            raise UserError(
                f"{path / name}: not a safetensors file ({error}); use an older checkpoint"
            ) from None


def weights(path: Path) -> dict[str, Tensor]:
    """Return all weights of a checkpoint, {canonical name: fp32 tensor on the CPU}.

    The files are checked by size and sha256. Raises UserError when one is missing or damaged.
    """
    meta = read_meta(path)
    check_content(path, meta)
    return dict(tensors(path, meta))


def load(
    engine: Weights, path: Path, padded: dict[str, int], *, weights_only: bool = False
) -> Meta:
    """Set the engine's weights, moments, step count and loss scaler from a checkpoint. Collective.

    padded: parameter name -> rows without padding, for tensors padded in memory on the first axis.
    weights_only: load no moments (they are set to zero), no step count and no loss scaler.
    Raises UserError on every rank when a file is damaged or the parameters differ.
    """
    meta = read_meta(path)
    with fail_on_all_ranks(engine.all_gather_object, f"loading {path}"):
        check_content(path, meta, engine.ranks.rank, engine.ranks.world_size)
    engine.reset_moments(0 if weights_only else meta.state.step)
    expected = {
        name: _stored_shape(engine.shape(name), padded.get(name)) for name in engine.parameters
    }
    kinds = ("master",) if weights_only else ("master", *MOMENTS)
    missing = {(name, kind) for name in expected for kind in kinds}
    for prefix in ("model",) if weights_only else ("model", "optim"):
        for key, value in tensors(path, meta, prefix):
            kind, name = ("master", key) if prefix == "model" else key.split("/", 1)
            if expected.get(name) != tuple(value.shape):
                here = expected.get(name, "no such parameter")
                raise UserError(
                    f"{path}: {key} has shape {tuple(value.shape)}, this run's model has {here}"
                )
            engine.set_full_tensor(name, kind, _pad(value, engine.shape(name)))
            missing.discard((name, kind))
    if missing:
        names = ", ".join(sorted({name for name, _ in missing}))
        raise UserError(f"{path}: these tensors are missing: {names}")
    if not weights_only:
        engine.set_scaler_state(meta.scaler)
    return meta


def _stored_shape(shape: torch.Size, rows: int | None) -> tuple[int, ...]:
    return tuple(shape) if rows is None else (rows, *shape[1:])


def _pad(value: Tensor, shape: torch.Size) -> Tensor:
    if value.shape == shape:
        return value
    padded = torch.zeros(shape, dtype=value.dtype)
    padded[: len(value)] = value
    return padded
