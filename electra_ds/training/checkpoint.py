"""The checkpoint format: names, meta.json, checks, and loading at any ZeRO stage and world size.

    OUT/ckpt/1000/meta.json                            state, config, file list with sizes and sha256
                  model-00001-of-00002.safetensors     fp32 master weights by canonical parameter name
                  optim-00001-of-00002.safetensors     exp_avg/NAME, exp_avg_sq/NAME; with Muon
                                                       momentum_buffer/NAME of its matrices
    OUT/ckpt/latest                                    the name of one checkpoint, written last

A checkpoint folder is complete, because it is renamed to its name after its files are written. The
files are safetensors and JSON, so reading them executes no code.
"""

import contextlib
import os
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.files import sha256_file
from electra_ds.common.folder_kinds import found_at, reading
from electra_ds.common.json_files import Record, parse_record, read_json, read_small
from electra_ds.common.printable import printable, shortened
from electra_ds.config.schema import MAX_STEPS
from electra_ds.training.collectives import fail_on_all_ranks, on_rank0
from electra_ds.training.spike_guard import WINDOW
from electra_ds.training.state import TrainingState

FORMAT = "electra_ds checkpoint"
VERSION = 1
FINAL = "final"
STEP = re.compile(r"[0-9]{1,15}")  # name of a checkpoint
FILE_NAME = re.compile(r"(model|optim)-[0-9]{5}-of-[0-9]{5}\.safetensors")
MAX_POINTER_BYTES = 256  # of the file `latest`
DEFAULT_EXPECTATION = "a run folder (OUT), OUT/ckpt or OUT/ckpt/STEP"


class Weights(Protocol):
    """Interface of `engine.Engine` for saving and loading: full tensors, and collectives.

    The values in `frozen` are saved from rank 0; on other ranks only their shapes are used.
    moments: parameter name -> names of its moments.
    """

    ranks: Any
    parameters: dict[str, Any]
    frozen: dict[str, Tensor]
    optimizer_kind: str
    moments: dict[str, tuple[str, ...]]

    def full_tensor(self, name: str, kind: str) -> Tensor: ...
    def set_full_tensor(self, name: str, kind: str, value: Tensor) -> None: ...
    def set_frozen(self, name: str, value: Tensor) -> None: ...
    def shape(self, name: str) -> torch.Size: ...
    def all_gather_object(self, value: Any) -> list[Any]: ...
    def reset_moments(self, applied_steps: int) -> None: ...
    def scaler_state(self) -> dict[str, float]: ...
    def set_scaler_state(self, state: dict[str, float]) -> None: ...


class FileFacts(Record):
    """Size and hash of a file of a checkpoint."""

    bytes: int = Field(ge=0, le=2**53)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class ScalerFacts(Record):
    """State of DeepSpeed's fp16 loss scaler; empty without one. These attributes are set."""

    cur_scale: float | None = Field(default=None, gt=0, le=2**64)
    cur_iter: int | None = Field(default=None, ge=0, le=2**62)
    last_overflow_iter: int | None = Field(default=None, ge=-1, le=2**62)
    cur_hysteresis: int | None = Field(default=None, ge=0, le=2**31)


class MetaFile(Record):
    """meta.json. Unknown keys are ignored: later versions may add some."""

    model_config = Record.model_config | {"extra": "ignore"}

    step: int = Field(ge=0, le=MAX_STEPS)
    skipped: int = Field(ge=0, le=MAX_STEPS)
    skipped_in_a_row: int = Field(ge=0, le=MAX_STEPS)
    tokens: int = Field(ge=0, le=2**62)
    data: dict[str, Any]
    interval: list[list[float]] = Field(max_length=2**20)
    recent_losses: list[float] = Field(
        default=[], max_length=WINDOW
    )  # the first checkpoints have none
    first_attempt: int = Field(default=0, ge=0, le=2 * MAX_STEPS)  # likewise
    first_position: int = Field(default=0, ge=0, lt=2**62)
    reset_step: int = Field(default=0, ge=0, le=MAX_STEPS)
    optimizer: str = Field(default="adam", max_length=64)  # the first checkpoints have none
    scaler: ScalerFacts
    world_size: int = Field(ge=1, le=2**20)
    config: dict[str, Any]
    files: dict[str, FileFacts] = Field(min_length=1, max_length=2**21)

    @model_validator(mode="after")
    def _sums_and_position_fit(self) -> "MetaFile":
        position = self.data.get("position", 0)
        if type(position) is not int or not 0 <= position < 2**62:
            raise ValueError(
                f"data.position = {shortened(position)}; expected the number of consumed rows"
            )
        if self.reset_step > self.step:
            raise ValueError(f"reset_step = {self.reset_step}; expected at most step = {self.step}")
        if len({len(row) for row in self.interval}) > 1:
            raise ValueError("interval has rows of different lengths")
        return self


@dataclass(frozen=True)
class Meta:
    """Content of meta.json, which describes a checkpoint.

    state: progress of the run.
    config: the resolved config as JSON values.
    optimizer: kind of the optimizer that the moments belong to.
    scaler: state of the fp16 loss scaler; empty without one.
    world_size: number of ranks that wrote the checkpoint.
    files: file name -> {"bytes": size, "sha256": hexadecimal hash}.
    """

    state: TrainingState
    config: dict[str, Any]
    scaler: dict[str, float]
    world_size: int
    files: dict[str, dict[str, Any]]
    optimizer: str = "adam"


def latest(folder: Path) -> Path | None:
    """Return the checkpoint that `latest` names; None if there is no file `latest`.

    folder: OUT/ckpt.
    Raises UserError when the file does not name a checkpoint.
    """
    pointer = folder / "latest"
    if not os.path.lexists(pointer):
        return None
    what = "the name of a checkpoint"
    name = read_small(pointer, what, MAX_POINTER_BYTES).decode(errors="replace").strip()
    if name == FINAL and not (folder / FINAL).exists():
        # The run was killed while --extend renamed `final` to its step.
        steps = (path.name for path in folder.iterdir() if STEP.fullmatch(path.name))
        name = max(steps, key=int, default=name)
    is_name = name == FINAL or STEP.fullmatch(name)
    if not is_name or not (folder / name / "meta.json").exists():
        raise UserError(
            f"{printable(pointer)} names {shortened(name)}, which is no complete checkpoint in "
            f"{printable(folder)}; write the name of a complete checkpoint into the file"
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
    Raises UserError when there is no checkpoint, and when the folder cannot be read.
    """
    with reading(path, expected):
        for folder in (path, path / "ckpt"):
            if (folder / "meta.json").exists():
                return folder
            newest = latest(folder)
            if newest is not None:
                return newest
    clause = found_at(path).clause
    raise UserError(f"{printable(path)}: no checkpoint here{clause}; expected {expected}")


def folder_of_model(path: Path) -> Path:
    """The run folder, or the folder of a fine-tuned seed, that a MODEL argument is a part of.

    OUT for OUT/ckpt and OUT/ckpt/STEP, DIR/TASK/seed-N for its model; otherwise `path`.
    """
    real = path.resolve()
    if real.name == "ckpt" or (real.name == "model" and (real / "meta.json").exists()):
        return real.parent
    return real.parent.parent if real.parent.name == "ckpt" else path


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
    file = path / "meta.json"
    what = "the description of a checkpoint"
    values = read_json(file, "a checkpoint of electra_ds")
    found = (values.get("format"), values.get("version"))
    if found != (FORMAT, VERSION):
        shown = f"{shortened(found[0])} version {shortened(found[1])}"
        raise UserError(f"{printable(file)}: expected {FORMAT!r} version {VERSION}, found {shown}")
    record = parse_record(values, file, MetaFile, what)
    known = {key.name: getattr(record, key.name) for key in fields(TrainingState)}
    meta = Meta(
        TrainingState(**known),
        record.config,
        record.scaler.model_dump(exclude_none=True),
        record.world_size,
        {name: facts.model_dump() for name, facts in record.files.items()},
        record.optimizer,
    )
    for name, facts in meta.files.items():
        _check_size(path, name, facts["bytes"])
    return meta


def _check_size(path: Path, name: str, expected: int) -> None:
    if not FILE_NAME.fullmatch(name):
        raise UserError(
            f"{printable(path)}/meta.json: found a file named {shortened(name)}, which no "
            "checkpoint has; expected model-NNNNN-of-NNNNN.safetensors or "
            "optim-NNNNN-of-NNNNN.safetensors"
        )
    size = (path / name).stat().st_size if (path / name).is_file() else None
    if size != expected:
        found = "no file" if size is None else size
        raise UserError(f"{printable(path / name)}: expected {expected} bytes, found {found}")


def check_content(path: Path, meta: Meta, part: int = 0, parts: int = 1) -> None:
    """Compare the sha256 of the files `part`, `part + parts`, ... (by name) with meta.json.

    Raises UserError with the name of the damaged file.
    """
    for name in sorted(meta.files)[part::parts]:
        if sha256_file(path / name) != meta.files[name]["sha256"]:
            raise UserError(
                f"{printable(path / name)}: its content has changed (the sha256 differs from that in "
                "meta.json); use an older checkpoint"
            )


def tensors(
    path: Path, meta: Meta, prefix: str = "model", only: Container[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, fp32 tensor on the CPU) of the `model` or `optim` files.

    only: names of tensors; the others are not read.
    Raises UserError when a file is not a safetensors file, or holds a tensor of another type.
    """
    for name in sorted(meta.files):
        if not name.startswith(prefix):
            continue
        with _reading_tensors(path / name) as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if only is not None and key not in only:
                    continue
                value = file.get_tensor(key)
                if value.dtype != torch.float32:
                    raise UserError(
                        f"{printable(path / name)}: {printable(key)} has type {value.dtype}; "
                        "expected float32, as checkpoints hold it"
                    )
                yield key, value


def shapes(path: Path, meta: Meta, prefix: str = "model") -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of the `model` or `optim` files, from their headers.

    The key is the canonical name of a weight, or kind/NAME of a moment.
    Raises UserError when a file is not a safetensors file.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name in sorted(meta.files):
        if name.startswith(prefix):
            with _reading_tensors(path / name) as file:
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    return found


@contextlib.contextmanager
def _reading_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises UserError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(
            f"{printable(path)}: not a safetensors file ({error}); use an older checkpoint"
        ) from None


def weights(path: Path) -> dict[str, Tensor]:
    """Return all weights of a checkpoint, {canonical name: fp32 tensor on the CPU}.

    The files are checked by size and sha256. Raises UserError when one is missing or damaged.
    """
    with reading(path, "the files of a checkpoint"):
        meta = read_meta(path)
        check_content(path, meta)
        return dict(tensors(path, meta))


def load(
    engine: Weights,
    path: Path,
    true_rows: dict[str, int],
    *,
    weights_only: bool = False,
    skipped: tuple[str, ...] = (),
) -> Meta:
    """Set the engine's weights, moments, step count and loss scaler from a checkpoint. Collective.

    true_rows: parameter name -> rows without padding, for tensors padded in memory on the first axis.
    weights_only: load no moments (they are set to zero), no step count and no loss scaler. The
        checkpoint may lack the frozen tensors; these keep their values.
    skipped: prefixes of tensors of the checkpoint that are not loaded, whatever their shapes.
    Raises UserError on every rank when a file is damaged, the parameters differ, or the moments are
    those of another optimizer.
    """
    meta = read_meta(path)
    if not weights_only:
        _check_optimizer(path, meta, engine.optimizer_kind)
    with fail_on_all_ranks(engine.all_gather_object, f"loading {path}"):
        check_content(path, meta, engine.ranks.rank, engine.ranks.world_size)
    state = meta.state
    engine.reset_moments(0 if weights_only else state.step - state.reset_step)
    expected = {
        name: _stored_shape(engine.shape(name), true_rows.get(name)) for name in engine.parameters
    }
    kinds: dict[str, tuple[str, ...]] = {name: ("master",) for name in engine.frozen}
    for name in expected:
        kinds[name] = ("master", *(() if weights_only else engine.moments[name]))
    missing = {(name, kind) for name in expected for kind in kinds[name]}
    expected |= {name: tuple(value.shape) for name, value in engine.frozen.items()}
    if not weights_only:
        missing |= {(name, "master") for name in engine.frozen}
    for prefix in ("model",) if weights_only else ("model", "optim"):
        for key, value in tensors(path, meta, prefix):
            kind, _, name = ("master", "", key) if prefix == "model" else key.partition("/")
            if name.startswith(skipped):
                continue
            if kind not in kinds.get(name, ()) or expected.get(name) != tuple(value.shape):
                here = expected.get(name, "no such parameter")
                raise UserError(
                    f"{printable(path)}: {printable(key)} has shape {tuple(value.shape)}, this "
                    f"run's model has {here}"
                )
            if name in engine.frozen:
                engine.set_frozen(name, value)
            else:
                engine.set_full_tensor(name, kind, _pad(value, engine.shape(name)))
            missing.discard((name, kind))
    if missing:
        names = ", ".join(sorted({name for name, _ in missing}))
        raise UserError(f"{path}: these tensors are missing: {names}")
    if not weights_only:
        engine.set_scaler_state(meta.scaler)
    return meta


def _check_optimizer(path: Path, meta: Meta, expected: str) -> None:
    found, has_moments = meta.optimizer, any(name.startswith("optim") for name in meta.files)
    if has_moments and found != expected:
        raise UserError(
            f"{printable(path)}: has the moments of optimizer.kind = {printable(found)}, but this "
            f"run has optimizer.kind = {expected}; the moments of one kind are of no use to another: "
            f"set optimizer.kind = {printable(found)}, or start another run with --init-from"
        )


def _stored_shape(shape: torch.Size, rows: int | None) -> tuple[int, ...]:
    return tuple(shape) if rows is None else (rows, *shape[1:])


def _pad(value: Tensor, shape: torch.Size) -> Tensor:
    if value.shape == shape:
        return value
    padded = torch.zeros(shape, dtype=value.dtype)
    padded[: len(value)] = value
    return padded
