"""The verb pretrain: resume, next batch, forward and backward, vote, step, log, evaluate, save; leave together."""

import contextlib
import functools
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from electra_ds.cluster import run_folder
from electra_ds.cluster.launchers import Ranks
from electra_ds.cluster.watchdog import Watchdog
from electra_ds.common.errors import UserError
from electra_ds.common.folder_lock import Lock, owner_of
from electra_ds.config.engine_files import load_engine
from electra_ds.config.schema import RunConfig
from electra_ds.data.dataset import Data, open_data
from electra_ds.model.build import build_objective
from electra_ds.model.objective import Objective
from electra_ds.training import checkpoint, checkpointer
from electra_ds.training.engine import (
    Engine,
    leave,
    on_rank0,
    start,
)
from electra_ds.training.trainer import Limits, Run, _say


def pretrain(config: RunConfig, data: str | Path, out: Path, ranks: Ranks, limits: Limits) -> int:
    """The verb: meet the other ranks, run, leave together; returns the exit code (0 done, 85 saved and stopped).

    Raises UserError or RunFailure; what went first is left in OUT/error-rank-N.json.
    """
    record = functools.partial(run_folder.record_error, out)
    try:
        device = start(ranks, config.train.timeout_minutes, config.train.deterministic)
    except BaseException as error:
        if not owner_of(out)[0]:  # such as a port that the run at work in OUT has
            record(ranks.rank, error)
        raise
    run_folder.on_stop_signal(
        limits.asked.append
    )  # earlier a signal ends a rank at once: it may wait for lost ones
    train = config.train
    watchdog = Watchdog(ranks, train.silence_seconds, train.timeout_minutes, on_rank0, record)
    with (
        contextlib.ExitStack() as held,
        watchdog,
    ):  # the lock stays until it is recorded who went first
        code = pretrain_on_ranks(config, data, out, ranks, device, limits, held)
    leave()
    return code


def pretrain_on_ranks(
    config: RunConfig,
    data: str | Path,
    out: Path,
    ranks: Ranks,
    device: torch.device,
    limits: Limits,
    held: contextlib.ExitStack | None = None,
) -> int:
    """Train among ranks that have met, until the schedule ends or a stop is agreed on. Resumes what OUT holds.

    held: keeps OUT's lock after an error, until it is closed; by default the lock is given back at once.
    Raises UserError for mistakes of the user, RunFailure for a run that cannot go on; on every rank.
    """
    began = time.monotonic()
    data = open_data(data)
    manifest = data.manifest
    config = config.with_data(
        manifest.tokenizer.vocab_size, manifest.tokenizer.special_ids, manifest.sequence_length
    )
    config = config.model_copy(update={"engine": load_engine(config.engine)})
    reader, row_order = data.training(config.train.seed, config.train.global_batch_size)
    total_steps = config.total_steps(reader.rows)
    with contextlib.nullcontext(held) if held else contextlib.ExitStack() as held:
        lock = held.enter_context(Lock(out, on_rank0))
        if on_rank0(lambda: run_folder.is_done(out)) and not limits.extend:
            _say(ranks, f"{out} is finished; to go on, raise train.total_steps and give --extend")
            return run_folder.DONE
        if lock.took_over:
            _say(ranks, f"{out}/lock: taken over from {lock.took_over}")
        on_rank0(lambda: _count_failures(out, config.train.max_restarts, lock.took_over))
        engine = Engine(_objective(config), config, config.engine, ranks, device)
        nodes = run_folder.open_folder(out, ranks.rank, engine.all_gather_object)
        run_folder.open_log(out, ranks)
        on_rank0(lambda: checkpointer.remove_stale(out / "ckpt"))
        _check_data_is_one(data, engine, nodes)
        run = Run(config, engine, data, reader, row_order, out, total_steps, limits, began, lock)
        progress = run.resume()
        attempt = {"nodes": nodes, "launcher": ranks.launcher, "world_size": ranks.world_size}
        on_rank0(lambda: _describe(out, config, data, total_steps=total_steps, **attempt))
        done = run.train(progress)
    held.close()
    engine.close()  # after the lock is given back: the first rank to leave may take rank 0 down
    return run_folder.DONE if done else run_folder.stop_exit_code()


def _describe(out: Path, config: RunConfig, data: Data, **attempt: Any) -> None:
    (out / "done").unlink(missing_ok=True)
    run_folder.write_config(out, config, data.manifest.dataset_id, **attempt)
    if data.tokenizer.is_dir():  # so that the run folder alone is enough for detect and export
        shutil.copytree(data.tokenizer, out / "tokenizer", dirs_exist_ok=True)


def _check_data_is_one(data: Data, engine: Engine, nodes: list[str]) -> None:
    """Each node may have a copy of its own. UserError on every rank when they differ."""
    found = dict(zip(engine.all_gather_object(data.manifest.dataset_id), nodes, strict=True))
    if len(found) > 1:
        listed = ", ".join(f"{dataset_id} on {node}" for dataset_id, node in found.items())
        raise UserError(
            f"--data is not the same for all ranks: dataset_id {listed}; copy the same data to every node"
        )


def _count_failures(out: Path, limit: int, silent: str) -> None:
    found = checkpoint.latest(out / "ckpt")
    run_folder.count_failures(
        out, checkpoint.read_meta(found).progress.step if found else 0, limit, silent
    )


def _objective(config: RunConfig) -> Objective:
    # Built whole on every rank from the same seed: zero.Init would silently skip our initialisation.
    objective = build_objective(config, config.train.seed)
    objective.recompute_layers(config.train.activation_checkpointing)
    if config.train.compile:
        objective.compile_layers()
    return objective
