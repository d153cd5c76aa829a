"""A checkpoint: a folder that exists whole or not at all, read back at any ZeRO stage and world size.

    OUT/ckpt/1000/meta.json                            format, step, position, config, file list with sizes and sha256
                  model-00001-of-00002.safetensors     fp32 master weights by canonical parameter name
                  optim-00001-of-00002.safetensors     exp_avg/NAME, exp_avg_sq/NAME
    OUT/ckpt/latest                                    the name of one, written last

Reading executes nothing: safetensors and JSON only.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.files import read_json, sha256_file
from electra_ds.training.state import Progress

FORMAT, VERSION = "electra_ds checkpoint", 1
MOMENTS = ("exp_avg", "exp_avg_sq")
FINAL = "final"


class Weights(Protocol):
    """What saving needs of `engine.Engine`: whole tensors by name, and agreement among the ranks."""

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
    """meta.json: everything but the tensors."""

    progress: Progress
    config: dict
    scaler: dict
    world_size: int
    files: dict[str, dict]


@contextlib.contextmanager
def fail_on_all_ranks(engine: Weights, what: str) -> Iterator[dict]:
    """Run a block on every rank; if it fails on any, fail on all with the rank and the cause named.

    The yielded dict is exchanged: afterwards its key `everyone` lists that of each rank.
    """
    mine: dict = {}
    problem = None
    try:
        yield mine
    except (OSError, UserError) as error:
        problem = error
    everyone = engine.all_gather_object((problem, dict(mine)))
    for rank, (error, _) in enumerate(everyone):
        if isinstance(error, UserError):
            raise UserError(f"{what} failed: rank {rank}: {error}")
        if error:
            raise RunFailure(
                f"{what} failed: rank {rank}: {error}; earlier checkpoints are untouched"
            )
    mine["everyone"] = [report for _, report in everyone]


def latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or None when no checkpoint was ever finished under OUT/ckpt."""
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    name = pointer.read_text().strip()
    if (
        name == FINAL and not (folder / FINAL).exists()
    ):  # killed while `--extend` gave it back its step's name
        name = max(
            (path.name for path in folder.iterdir() if path.name.isdigit()), key=int, default=name
        )
    if not re.fullmatch(r"\d+|final", name) or not (folder / name / "meta.json").exists():
        raise UserError(
            f"{pointer} names {name!r}, which is no checkpoint in {folder}; write the name of a good one into it"
        )
    return folder / name


def read_meta(path: Path) -> Meta:
    """Read meta.json and check format, version, and that every file is there with its size; UserError if not."""
    values = read_json(path / "meta.json", "a checkpoint of electra_ds")
    found = (values.get("format"), values.get("version"))
    if found != (FORMAT, VERSION):
        raise UserError(f"{path}/meta.json: expected {FORMAT!r} version {VERSION}, found {found}")
    values.setdefault("recent_losses", [])  # checkpoints of earlier days have none
    try:
        progress = Progress(**{key: values[key] for key in Progress.__dataclass_fields__})
        meta = Meta(progress, *(values[key] for key in ("config", "scaler", "world_size", "files")))
    except KeyError as error:
        raise UserError(
            f"{path}/meta.json: has no {error}; it is incomplete, use an older checkpoint"
        ) from None
    for name, facts in meta.files.items():
        if not re.fullmatch(r"(model|optim)-\d{5}-of-\d{5}\.safetensors", name):
            raise UserError(
                f"{path}/meta.json: lists a file named {name!r}, which no checkpoint has"
            )
        size = (path / name).stat().st_size if (path / name).exists() else None
        if size != facts["bytes"]:
            raise UserError(
                f"{path / name}: expected {facts['bytes']} bytes, found {'no file' if size is None else size}"
            )
    return meta


def check_content(path: Path, meta: Meta, part: int = 0, parts: int = 1) -> None:
    """Compare the sha256 of every `parts`-th file with meta.json; UserError names the damaged one."""
    for name in sorted(meta.files)[part::parts]:
        if sha256_file(path / name) != meta.files[name]["sha256"]:
            raise UserError(
                f"{path / name}: its content is not what was written (sha256 differs); use an older checkpoint"
            )


def tensors(path: Path, meta: Meta, prefix: str = "model") -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 tensor) of the `model` or `optim` files, one at a time."""
    for name in sorted(meta.files):
        if name.startswith(prefix):
            try:
                with safe_open(path / name, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 (not a dict)
                        yield key, file.get_tensor(key)
            except SafetensorError as error:
                raise UserError(
                    f"{path / name}: not a safetensors file ({error}); use an older checkpoint"
                ) from None


def weights(path: Path) -> dict[str, Tensor]:
    """All fp32 weights of a checkpoint by canonical name, checked against their sha256."""
    meta = read_meta(path)
    check_content(path, meta)
    return dict(tensors(path, meta))


def load(
    engine: Weights, path: Path, padded: dict[str, int], *, weights_only: bool = False
) -> Meta:
    """Set the engine's weights (and moments, step count, loss scaler) from a checkpoint. Collective.

    Raises UserError on every rank when a file is damaged or the parameters differ, with the differences listed.
    """
    meta = read_meta(path)
    with fail_on_all_ranks(engine, f"loading {path}"):
        check_content(path, meta, engine.ranks.rank, engine.ranks.world_size)
    engine.reset_moments(0 if weights_only else meta.progress.step)
    expected = {
        name: _stored_shape(engine.shape(name), padded.get(name)) for name in engine.parameters
    }
    seen = set()
    for prefix in ("model",) if weights_only else ("model", "optim"):
        for key, value in tensors(path, meta, prefix):
            kind, name = ("master", key) if prefix == "model" else key.split("/", 1)
            if expected.get(name) != tuple(value.shape):
                here = expected.get(name, "no such parameter")
                raise UserError(
                    f"{path}: {key} has shape {tuple(value.shape)}, this run's model has {here}"
                )
            engine.set_full_tensor(name, kind, _pad(value, engine.shape(name)))
            seen.add((name, kind))
    wanted = {
        (n, k) for n in expected for k in (("master",) if weights_only else ("master", *MOMENTS))
    }
    if wanted - seen:
        raise UserError(
            f"{path}: these tensors are missing: {', '.join(sorted({n for n, _ in wanted - seen}))}"
        )
    if not weights_only:
        engine.set_scaler_state(meta.scaler)
    return meta


def _stored_shape(shape: torch.Size, rows: int | None) -> tuple[int, ...]:
    return tuple(shape) if rows is None else (rows, *shape[1:])


def _pad(value: Tensor, shape: torch.Size) -> Tensor:
    if value.shape == shape:
        return value
    full = torch.zeros(shape, dtype=value.dtype)
    full[: len(value)] = value
    return full


def find_checkpoint(
    path: Path, expected: str = "a run folder (OUT), OUT/ckpt or OUT/ckpt/STEP"
) -> Path:
    """A checkpoint folder from a run folder (its latest), a ckpt folder, or the folder itself."""
    for folder in (path, path / "ckpt"):
        if (folder / "meta.json").exists():
            return folder
        if (found := latest(folder)) is not None:
            return found
    raise UserError(f"{path}: no checkpoint here; expected {expected}")


def tokenizer_of(found: Path) -> Path:
    """Where the tokenizer of a checkpoint lies: beside a fine-tuned model, or in the run folder above ckpt."""
    parent = found.resolve().parent
    return parent / "tokenizer" if (parent / "tokenizer").is_dir() else parent.parent / "tokenizer"
