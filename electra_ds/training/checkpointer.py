"""Writing, committing and pruning of checkpoints."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from electra_ds.cluster.launchers import Ranks
from electra_ds.common.files import fsync_folder, sha256_file, write_bytes, write_json
from electra_ds.config.schema import CheckpointConfig
from electra_ds.training.checkpoint import (
    FORMAT,
    MOMENTS,
    VERSION,
    Weights,
    fail_on_all_ranks,
)
from electra_ds.training.state import Progress


class PendingCheckpoint:
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
        with fail_on_all_ranks(engine, f"saving {self.target}") as report:
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
            with fail_on_all_ranks(engine, f"saving {target}") as report:
                report.update(self._written.result())
                flush()
            files = {file: facts for found in report["everyone"] for file, facts in found.items()}
            with fail_on_all_ranks(engine, f"saving {target}"):
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
    return PendingCheckpoint(*arguments, **options).commit()


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
            whole = engine.full_tensor(name, kind)
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


def rename_final(engine: Weights, final: Path, step: int) -> None:
    """Give `final` back its step's name, so that a longer schedule can go on from it. Collective."""
    engine.all_gather_object(None)  # other ranks may still read it
    with fail_on_all_ranks(engine, f"renaming {final}"):
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


def remove_stale(folder: Path) -> None:
    """Remove what a killed save or prune left half done. For rank 0, before anything is saved."""
    for left in (*folder.glob(".*.tmp"), *folder.glob(".*.old")):
        left.unlink(missing_ok=True) if left.is_file() else shutil.rmtree(left, ignore_errors=True)


def write_initial(folder: Path, state: dict[str, Tensor], config: dict) -> Path:
    """Write folder/0, a checkpoint of weights alone, and point `latest` at it; returns folder/0.

    For a single process without an engine. folder: OUT/ckpt. state: parameter name -> whole tensor
    without padded rows, stored as fp32. config: the resolved config as JSON values.
    Raises OSError when a file cannot be written.
    """
    weights = {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in state.items()
    }
    target = folder / "0"
    temporary = folder / f".0.{secrets.token_hex(4)}.tmp"
    temporary.mkdir(parents=True)
    meta = {"format": FORMAT, "version": VERSION, **asdict(Progress())}
    meta |= {"scaler": {}, "world_size": 1, "config": config}
    meta["files"] = _write({"model": weights}, temporary, Ranks(0, 1, 0, 1, "none"))
    write_json(temporary / "meta.json", meta)
    _replace_folder(temporary, target)
    write_bytes(folder / "latest", b"0\n")
    return target
