"""A checkpoint: a folder that exists whole or not at all, read back at any ZeRO stage and world size.

    OUT/ckpt/1000/meta.json                            format, step, position, config, file list with sizes and sha256
                  model-00001-of-00002.safetensors     fp32 master weights by canonical parameter name
                  optim-00001-of-00002.safetensors     exp_avg/NAME, exp_avg_sq/NAME
    OUT/ckpt/latest                                    the name of one, written last

Reading executes nothing: safetensors and JSON only.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from electra_ds.config import CheckpointConfig
from electra_ds.errors import RunFailure, UserError
from electra_ds.files import fsync_folder, read_json, sha256_file, write_bytes, write_json

FORMAT, VERSION = "electra_ds checkpoint", 1
MOMENTS = ("exp_avg", "exp_avg_sq")
FINAL = "final"


class Weights(Protocol):
    """What saving needs of `engine.Engine`: whole tensors by name, and agreement among the ranks."""

    ranks: Any
    parameters: dict[str, Any]

    def whole(self, name: str, kind: str) -> Tensor: ...
    def set_whole(self, name: str, kind: str, value: Tensor) -> None: ...
    def shape(self, name: str) -> torch.Size: ...
    def exchange(self, value: Any) -> list[Any]: ...
    def reset_moments(self, applied_steps: int) -> None: ...
    def scaler_state(self) -> dict[str, float]: ...
    def set_scaler_state(self, state: dict[str, float]) -> None: ...


@dataclass(frozen=True)
class Progress:
    """Where a run stands, the same on every rank, plus the sums of the open logging interval.

    step: applied optimizer steps. skipped: attempts that were not applied; the position counts both.
    tokens: real tokens of all attempts. data: the state of the rows (kind, version, dataset_id, position, ...).
    interval: per rank, what the next log line has summed so far (continued only at the same world size).
    recent_losses: what guard.Guard measures the next loss against.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    tokens: int = 0
    data: dict = field(default_factory=dict)
    interval: list[list[float]] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Meta:
    """meta.json: everything but the tensors."""

    progress: Progress
    config: dict
    scaler: dict
    world_size: int
    files: dict[str, dict]


# ---------------------------------------------------------------------------------------------------------- writing


class Saving:
    """A checkpoint on its way: of the moment it was made, whatever the engine does since.

    Made on every rank (collective): the tensors are gathered into host memory, which is the pause; from then on a
    thread of each rank writes its files beside OUT/ckpt/NAME. `commit` makes them a checkpoint.
    padded: parameter name -> true rows, for tensors padded in memory; the file holds the true rows.
    weights_only: a model to carry away, not to resume: no moments, and `latest` is left alone.
    Raises RunFailure on every rank when rank 0 cannot write; earlier checkpoints stay as they were.
    """

    def __init__(
        self,
        engine: Weights,
        folder: Path,
        name: str,
        progress: Progress,
        config: dict,
        padded: dict[str, int],
        *,
        weights_only: bool = False,
    ):
        self.target, self._engine, self._weights_only = folder / name, engine, weights_only
        self._meta = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(progress),
            "scaler": engine.scaler_state(),
            "world_size": engine.ranks.world_size,
            "config": config,
        }
        with _together(engine, f"saving {self.target}") as report:
            tensors = _gather(engine, padded, ("master",) if weights_only else ("master", *MOMENTS))
            if engine.ranks.rank == 0:
                # A name of its own: an attempt that slept while another took its place disturbs nothing.
                report["temporary"] = folder / f".{name}.{secrets.token_hex(4)}.tmp"
                report["temporary"].mkdir(parents=True)
        self._temporary = report["everyone"][0]["temporary"]
        writer = ThreadPoolExecutor(1, "saving")
        self._written = writer.submit(_write, tensors, self._temporary, engine.ranks)
        writer.shutdown(wait=False)

    def is_written(self) -> bool:
        """Whether this rank's files are written, or cannot be: `commit` does not wait for this rank any more."""
        return self._written.done()

    def commit(self, flush: Callable[[], None] = lambda: None) -> Path:
        """Wait for every rank's files, make the folder whole and point `latest` at it. Collective.

        flush: makes durable what `latest` must not get ahead of; OSError when it cannot.
        Raises RunFailure on every rank when any rank could not write; earlier checkpoints stay as they were.
        """
        engine, target = self._engine, self.target
        try:
            with _together(engine, f"saving {target}") as report:
                report.update(self._written.result())
                flush()
            files = {file: facts for found in report["everyone"] for file, facts in found.items()}
            with _together(engine, f"saving {target}"):
                if engine.ranks.rank == 0:
                    write_json(self._temporary / "meta.json", self._meta | {"files": files})
                    _replace_folder(self._temporary, target)
                    if not self._weights_only:
                        write_bytes(target.with_name("latest"), f"{target.name}\n".encode())
        finally:
            if (
                engine.ranks.rank == 0
            ):  # after a failure: a half checkpoint would keep a full disk full
                shutil.rmtree(self._temporary, ignore_errors=True)
        return target


def save(*arguments: Any, **options: Any) -> Path:
    """Write a checkpoint and wait for it: the arguments of `Saving`. Collective."""
    return Saving(*arguments, **options).commit()


def _gather(
    engine: Weights, padded: dict[str, int], kinds: tuple[str, ...]
) -> dict[str, dict[str, Tensor]]:
    """Gather each tensor on all ranks, copy it on its owner; {"model": ..., "optim": ...} of this rank."""
    owners = _owners(
        {name: engine.shape(name).numel() for name in engine.parameters}, engine.ranks.world_size
    )
    weights, moments = {}, {}
    for name in engine.parameters:
        for kind in kinds:
            whole = engine.whole(name, kind)
            if owners[name] == engine.ranks.rank:
                true = whole[: padded[name]] if name in padded else whole
                kept = true.to("cpu", torch.float32, copy=True).contiguous()
                (weights if kind == "master" else moments)[
                    name if kind == "master" else f"{kind}/{name}"
                ] = kept
    return {"model": weights, "optim": moments} if len(kinds) > 1 else {"model": weights}


def _write(tensors: dict[str, dict[str, Tensor]], folder: Path, ranks: Any) -> dict[str, dict]:
    """Write this rank's files, durable; {file: size and sha256}. Runs beside the training: no collective in here."""
    files = {}
    for prefix, part in tensors.items():
        path = folder / f"{prefix}-{ranks.rank + 1:05d}-of-{ranks.world_size:05d}.safetensors"
        try:
            save_file(part, path)
        except (
            SafetensorError
        ) as error:  # the library hides the operating system's error, such as a full disk
            raise OSError(f"{path}: {error}") from None
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return files


def _owners(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """Parameter -> rank that writes it, largest first onto the least loaded: the same on every rank."""
    load, owners = [0] * world_size, {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        owners[name] = min(range(world_size), key=load.__getitem__)
        load[owners[name]] += sizes[name]
    return owners


def _replace_folder(temporary: Path, target: Path) -> None:
    fsync_folder(temporary)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(temporary, target)
    fsync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _together(engine: Weights, what: str) -> Iterator[dict]:
    """Run a block on every rank; if it fails on any, fail on all with the rank and the cause named.

    The yielded dict is exchanged: afterwards its key `everyone` lists that of each rank.
    """
    mine: dict = {}
    problem = None
    try:
        yield mine
    except (OSError, UserError) as error:
        problem = error
    everyone = engine.exchange((problem, dict(mine)))
    for rank, (error, _) in enumerate(everyone):
        if isinstance(error, UserError):
            raise UserError(f"{what} failed: rank {rank}: {error}")
        if error:
            raise RunFailure(
                f"{what} failed: rank {rank}: {error}; earlier checkpoints are untouched"
            )
    mine["everyone"] = [report for _, report in everyone]


def rename_final(engine: Weights, final: Path, step: int) -> None:
    """Give `final` back its step's name, so that a longer schedule can go on from it. Collective."""
    engine.exchange(None)  # other ranks may still read it
    with _together(engine, f"renaming {final}"):
        if engine.ranks.rank == 0:
            os.rename(final, final.with_name(str(step)))
            write_bytes(final.with_name("latest"), f"{step}\n".encode())


def prune(folder: Path, rules: CheckpointConfig, newest: int) -> list[str]:
    """Remove what the rules do not keep (never `final` nor the newest two); returns the names removed.

    newest: the step just saved. Later ones belong to a run that went back to an older checkpoint: they stay until it
    gets there and overwrites them.
    """
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    own = [step for step in steps if step <= newest]
    kept = set(own[-rules.keep_last :]) | set(steps[len(own) :]) | set(rules.keep_steps)
    if rules.keep_every:
        kept |= {step for step in steps if step % rules.keep_every == 0}
    removed = [str(step) for step in steps if step not in kept]
    for name in removed:
        doomed = folder / f".{name}.old"
        shutil.rmtree(doomed, ignore_errors=True)  # what a crash left here
        with contextlib.suppress(OSError):  # what cannot be removed stays
            os.rename(
                folder / name, doomed
            )  # gone at once under its name, so that nobody reads a half
        shutil.rmtree(doomed, ignore_errors=True)
    return removed


def sweep(folder: Path) -> None:
    """Remove what a killed save or prune left half done. For rank 0, before anything is saved."""
    for left in (*folder.glob(".*.tmp"), *folder.glob(".*.old")):
        left.unlink(missing_ok=True) if left.is_file() else shutil.rmtree(left, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------- reading


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
    with _together(engine, f"loading {path}"):
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
            engine.set_whole(name, kind, _pad(value, engine.shape(name)))
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
