"""Writing of checkpoints: snapshot, files written in a thread, commit, pruning."""

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from electra_ds.cluster.launchers import Ranks
from electra_ds.common.files import apply_umask, fsync_folder, sha256_file, write_bytes
from electra_ds.common.json_files import write_json
from electra_ds.common.own_folder import remove_own
from electra_ds.config.schema import CheckpointConfig
from electra_ds.training.checkpoint import FINAL, FORMAT, STEP, VERSION, Weights, latest
from electra_ds.training.collectives import Votes, fail_on_all_ranks
from electra_ds.training.state import TrainingState

# Names in OUT/ckpt that a killed save or prune leaves. Earlier versions named no attempt.
STALE = re.compile(
    rf"\.({STEP.pattern}|{FINAL})((\.[0-9a-f]{{8}})?\.tmp|\.old)|\.latest\.[0-9a-f]{{12}}\.tmp"
)


class PendingCheckpoint:
    """A snapshot of the training state, while its files are written.

    The constructor copies the tensors into host memory; training pauses meanwhile. Then a thread of
    each rank writes its files into a temporary folder in OUT/ckpt. `commit` renames the folder.
    Constructor and `commit` are collective.

    true_rows: parameter name -> rows without padding, for tensors padded in memory. The files hold
        these rows only.
    weights_only: write no moments, and do not change `latest`. For export and for --init-from.
    Raises RunFailure on every rank when rank 0 cannot write. Earlier checkpoints are not changed.
    """

    def __init__(
        self,
        engine: Weights,
        folder: Path,
        name: str,
        state: TrainingState,
        config: dict[str, Any],
        true_rows: dict[str, int],
        *,
        weights_only: bool = False,
    ):
        self.target = folder / name
        self.step = state.step
        self._engine = engine
        self._weights_only = weights_only
        self._meta = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(state),
            "optimizer": engine.optimizer_kind,
            "scaler": engine.scaler_state(),
            "world_size": engine.ranks.world_size,
            "config": config,
        }
        with fail_on_all_ranks(engine.all_gather_object, f"saving {self.target}") as report:
            tensors = _gather(engine, true_rows, weights_only)
            if engine.ranks.rank == 0:
                # A random name: two attempts that save at once, one of them after a long sleep,
                # do not write into one folder.
                report["temporary"] = f".{name}.{secrets.token_hex(4)}.tmp"
                (folder / report["temporary"]).mkdir(parents=True)
        self._temporary = folder / report["all_ranks"][0]["temporary"]
        writer = ThreadPoolExecutor(1, "saving")
        self._files = writer.submit(_write, tensors, self._temporary, engine.ranks)
        writer.shutdown(wait=False)

    def is_written(self) -> bool:
        """Return whether this rank's thread has ended, with or without an error."""
        return self._files.done()

    def commit(self, flush: Callable[[], None] = lambda: None) -> Path:
        """Wait for the files of every rank, rename the folder, write its name into `latest`.

        flush: writes the logs to disk before the rename, so that they reach the checkpoint's step.
            It may raise OSError.
        Returns the checkpoint folder. Raises RunFailure on every rank when a rank could not write.
        Collective.
        """
        engine = self._engine
        is_rank0 = engine.ranks.rank == 0
        action = f"saving {self.target}"
        try:
            with fail_on_all_ranks(engine.all_gather_object, action) as report:
                report.update(self._files.result())
                flush()
            files = {name: facts for rank in report["all_ranks"] for name, facts in rank.items()}
            with fail_on_all_ranks(engine.all_gather_object, action):
                if is_rank0:
                    write_json(self._temporary / "meta.json", self._meta | {"files": files})
                    _replace_folder(self._temporary, self.target)
                    if not self._weights_only:
                        _point_latest_at(self.target)
        finally:
            if is_rank0:  # after a failure the partial checkpoint would keep the disk full
                shutil.rmtree(self._temporary, ignore_errors=True)
        return self.target


def save(*arguments: Any, **options: Any) -> Path:
    """Write a checkpoint, wait for it and return its folder. Collective.

    The arguments are those of `PendingCheckpoint`. Raises RunFailure when a rank could not write.
    """
    return PendingCheckpoint(*arguments, **options).commit()


class Checkpointer:
    """Saves the training state. At most one snapshot is pending. Every rank makes the same calls.

    folder: OUT/ckpt.
    rules: when to save and which checkpoints to keep.
    config: the resolved config as JSON values, stored in each checkpoint.
    true_rows: see `PendingCheckpoint`.
    before_write: called on rank 0 before each write. It raises LockedOut when another job has taken
        the run folder.
    flush: see `PendingCheckpoint.commit`.
    saved_step: step of the checkpoint that the run resumed from; it is not saved again.
    on_commit: set by the caller; called with (step, seconds of pause) after each commit.
    """

    def __init__(
        self,
        engine: Weights,
        folder: Path,
        rules: CheckpointConfig,
        config: dict[str, Any],
        true_rows: dict[str, int],
        before_write: Callable[[], None] = lambda: None,
        flush: Callable[[], None] = lambda: None,
        saved_step: int | None = None,
    ):
        self._saved_step = saved_step  # of the last snapshot
        self.on_commit: Callable[[int, float], None] = lambda step, pause_seconds: None
        self._engine = engine
        self._folder = folder
        self._rules = rules
        self._config = config
        self._true_rows = true_rows
        self._before_write = before_write
        self._flush = flush
        self._is_rank0 = engine.ranks.rank == 0
        self._pending: PendingCheckpoint | None = None
        self._announced: PendingCheckpoint | None = None  # the snapshot of this rank's last vote
        self._pause_seconds = 0.0

    def save(self, state: TrainingState, name: str | None = None) -> None:
        """Take a snapshot. Collective.

        `commit_if_written` commits it when all ranks have written their files. With
        checkpoint.asynchronous = false it is committed here.

        name: name of the checkpoint; by default the step. Without a name, nothing is done if the
            step is saved already.
        Raises RunFailure on all ranks when a file cannot be written, and LockedOut when another
        job has taken the run folder.
        """
        if name is None and state.step == self._saved_step:
            return
        self.commit()
        began = time.perf_counter()
        if self._is_rank0:
            self._before_write()
        self._pending = PendingCheckpoint(
            self._engine,
            self._folder,
            name or str(state.step),
            state,
            self._config,
            self._true_rows,
        )
        self._saved_step = state.step
        self._pause_seconds = time.perf_counter() - began
        if not self._rules.asynchronous:
            self.commit()

    def save_final(self, state: TrainingState) -> None:
        """Write the last checkpoint of the schedule under the name `final`. Collective."""
        self.save(state, FINAL)
        self.commit()

    def is_written(self) -> bool:
        """Return this rank's vote: whether its files of the pending snapshot are written."""
        self._announced = self._pending
        return self._pending is not None and self._pending.is_written()

    def commit_if_written(self, votes: Votes) -> None:
        """Commit the pending snapshot if all ranks voted that it is written. Collective."""
        if votes.written == self._engine.ranks.world_size and self._pending is self._announced:
            self.commit()

    def commit(self) -> None:
        """Wait for the pending snapshot, if there is one, and commit it. Collective."""
        if self._pending is None:
            return
        began = time.perf_counter()
        pending, self._pending = self._pending, None
        if self._is_rank0:
            self._before_write()
        pending.commit(self._flush if self._is_rank0 else lambda: None)
        if self._is_rank0:
            prune(self._folder, self._rules, pending.step)
        self._pause_seconds += time.perf_counter() - began
        self.on_commit(pending.step, self._pause_seconds)

    def last_checkpoint(self) -> str:
        """Return the path of the last checkpoint, or "none yet", for messages. Collective.

        A pending snapshot is committed first.
        """
        self.commit()
        return str(latest(self._folder) or "none yet")


def write_initial(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """Write the checkpoint folder/0 with weights only, and name it in `latest`. Returns folder/0.

    It is called in a single process without an engine. `pretrain --init-from` accepts the result.

    folder: OUT/ckpt.
    state: parameter name -> full tensor without padded rows, stored as fp32.
    config: the resolved config as JSON values.
    Raises OSError when a file cannot be written.
    """
    return write_initial_parts(folder, [state], 1, config)


def write_initial_parts(
    folder: Path, parts: Iterable[dict[str, Tensor]], count: int, config: dict[str, Any]
) -> Path:
    """As `write_initial`, with the weights in several files. One part is in memory at a time.

    parts: `state` of `write_initial` in parts. count: the number of parts.
    """
    target = folder / "0"
    temporary = folder / f".0.{secrets.token_hex(4)}.tmp"
    temporary.mkdir(parents=True)
    meta = {"format": FORMAT, "version": VERSION, **asdict(TrainingState())}
    meta |= {"scaler": {}, "world_size": 1, "config": config}
    meta["files"] = {}
    for index, part in enumerate(parts):
        weights = {
            name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, tensor in part.items()
        }
        meta["files"] |= _write({"model": weights}, temporary, Ranks(index, count, 0, 1, "none"))
        del part, weights  # before the next part is computed
    write_json(temporary / "meta.json", meta)
    _replace_folder(temporary, target)
    _point_latest_at(target)
    return target


def _point_latest_at(checkpoint: Path) -> None:
    write_bytes(checkpoint.with_name("latest"), f"{checkpoint.name}\n".encode())


def _gather(
    engine: Weights, true_rows: dict[str, int], weights_only: bool
) -> dict[str, dict[str, Tensor]]:
    """Gather each tensor on all ranks and copy it on its owner. Rank 0 adds the frozen tensors.

    weights_only: without the moments. Returns this rank's {"model": {name: tensor}, "optim":
    {kind/name: tensor}}, fp32 on the CPU.
    """
    sizes = {name: engine.shape(name).numel() for name in engine.parameters}
    owners = _owners(sizes, engine.ranks.world_size)
    weights: dict[str, Tensor] = {}
    if engine.ranks.rank == 0:  # they do not change, so tensors of the CPU are not copied
        weights = {name: x.to("cpu", torch.float32) for name, x in engine.frozen.items()}
    moments: dict[str, Tensor] = {}
    for name in engine.parameters:
        for kind in ("master", *(() if weights_only else engine.moments[name])):
            full = engine.full_tensor(name, kind)
            if owners[name] != engine.ranks.rank:
                continue
            value = full[: true_rows[name]] if name in true_rows else full
            copied = value.to("cpu", torch.float32, copy=True).contiguous()
            if kind == "master":
                weights[name] = copied
            else:
                moments[f"{kind}/{name}"] = copied
    return {"model": weights} if weights_only else {"model": weights, "optim": moments}


def _write(
    tensors: dict[str, dict[str, Tensor]], folder: Path, ranks: Any
) -> dict[str, dict[str, Any]]:
    """Write this rank's files durably; {file: size and sha256}.

    It runs in a thread during training, so it must not call a collective.
    """
    files = {}
    for prefix, part in tensors.items():
        name = f"{prefix}-{ranks.rank + 1:05d}-of-{ranks.world_size:05d}.safetensors"
        path = folder / name
        try:
            save_file(part, path)
        except (
            SafetensorError
        ) as error:  # the library hides the system's error, such as a full disk
            raise OSError(f"{path}: {error}") from None
        apply_umask(path)  # safetensors writes files that only their owner can read
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return files


def _owners(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """Parameter -> the rank that writes it: largest first, each to the rank with least to write."""
    load = [0] * world_size
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = min(range(world_size), key=load.__getitem__)
        load[owners[name]] += sizes[name]
    return owners


def _replace_folder(temporary: Path, target: Path) -> None:
    fsync_folder(temporary)
    folder, old = target.parent, f".{target.name}.old"
    remove_own(folder, old)
    if os.path.lexists(target):
        os.rename(target, folder / old)
    os.rename(temporary, target)
    fsync_folder(folder)
    remove_own(folder, old)


def rename_final(engine: Weights, final: Path, step: int) -> None:
    """Rename `final` to its step, so that a longer schedule can continue from it. Collective."""
    engine.all_gather_object(None)  # wait for ranks that still read it
    with fail_on_all_ranks(engine.all_gather_object, f"renaming {final}"):
        if engine.ranks.rank == 0:
            renamed = final.with_name(str(step))
            os.rename(final, renamed)
            _point_latest_at(renamed)


def prune(folder: Path, rules: CheckpointConfig, newest: int) -> list[str]:
    """Remove the checkpoints that the rules do not keep. Returns the names removed.

    `final`, the newest two, and a folder without meta.json are always kept. Steps after `newest`
    are left over from before a return to an older checkpoint. They are kept until the run
    overwrites them.

    newest: the step just saved.
    """
    names = filter(STEP.fullmatch, os.listdir(folder))
    steps = sorted(int(name) for name in names if (folder / name / "meta.json").exists())
    up_to_newest = [step for step in steps if step <= newest]
    later = steps[len(up_to_newest) :]
    kept = {*up_to_newest[-rules.keep_last :], *later, *rules.keep_steps}
    if rules.keep_every:
        kept |= {step for step in steps if step % rules.keep_every == 0}
    removed = [str(step) for step in steps if step not in kept]
    for name in removed:
        trash = f".{name}.old"
        remove_own(folder, trash)  # left by a crash
        with contextlib.suppress(OSError):  # a folder that cannot be removed is kept
            # The rename comes first, so that a reader never sees half of a checkpoint.
            os.rename(folder / name, folder / trash)
        remove_own(folder, trash)
    return removed


def remove_stale(folder: Path) -> None:
    """Remove temporary files of a killed save or prune. Called on rank 0 before any save.

    Only names of this module are removed: OUT/ckpt may be a link to a folder with other files.
    """
    with contextlib.suppress(FileNotFoundError):
        for name in filter(STALE.fullmatch, os.listdir(folder)):
            remove_own(folder, name)
