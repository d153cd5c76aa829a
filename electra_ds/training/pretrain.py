"""The command `pretrain`: initialize the ranks, set up or resume a run, train, close."""

import functools
import time
from pathlib import Path
from typing import Any

import torch

from electra_ds.cluster import failures, rank_log, run_folder, stop_signals
from electra_ds.cluster.launchers import Ranks
from electra_ds.cluster.watchdog import Watchdog
from electra_ds.common.errors import UserError
from electra_ds.common.folder_lock import Lock, owner_of
from electra_ds.config.engine_files import offloads_optimizer
from electra_ds.config.phases import how_to_extend
from electra_ds.config.schema import RunConfig
from electra_ds.data.data_tokenizer import copy_tokenizer
from electra_ds.data.dataset import Data
from electra_ds.data.named_data import Given, open_named
from electra_ds.model.build import build_objective
from electra_ds.model.objective import ElectraObjective, Objective
from electra_ds.training import checkpoint, generator_from
from electra_ds.training.attempt import Attempt, AttemptOptions, check_out
from electra_ds.training.checkpointer import remove_stale
from electra_ds.training.collectives import (
    ControlGroup,
    destroy_process_groups,
    fail_on_all_ranks,
    is_collective,
    on_rank0,
)
from electra_ds.training.compile_cache import secure_compile_cache
from electra_ds.training.engine import Engine, start
from electra_ds.training.phase_loop import train_run
from electra_ds.training.phase_texts import facts
from electra_ds.training.resuming import resume, with_sources
from electra_ds.training.run_plan import plan


def pretrain(
    config: RunConfig, data: Given, out: Path, ranks: Ranks, options: AttemptOptions
) -> int:
    """Initialize the process group, train, and destroy the process group. Called on every rank.

    data: one value of --data, or those of the phases (`named_data.open_named`).

    Returns the exit code: 0 if the schedule is complete, 85 if the run is saved and stopped (under
    torchrun 0).
    Raises UserError or RunFailure. The first failure is written to OUT/error-rank-N.json.
    """
    # Before an error file is written into it.
    check_out(out, options.init_from, options.branch_from)
    train = config.train
    record = functools.partial(failures.record_error, out)
    try:
        device = start(ranks, train.timeout_minutes, train.deterministic)
    except BaseException as error:
        if not owner_of(out)[0]:  # with an owner the folder may belong to another, running job
            record(ranks.rank, error)
        raise
    # Set after the initialization: before it a signal must end the rank at once, because the rank
    # may wait for ranks that do not start.
    stop_signals.on_stop_signal(options.asked.append)
    watchdog = Watchdog(
        ranks,
        train.silence_seconds,
        train.timeout_minutes,
        on_rank0,
        record,
        is_collective,
    )
    lock = Lock(out, on_rank0)
    try:
        with watchdog:
            code = pretrain_on_ranks(config, data, out, ranks, device, options, lock)
    finally:
        lock.release()  # after the watchdog has recorded the first failure
    destroy_process_groups()
    return code


def pretrain_on_ranks(
    config: RunConfig,
    data: Given,
    out: Path,
    ranks: Ranks,
    device: torch.device,
    options: AttemptOptions,
    lock: Lock | None = None,
) -> int:
    """Train, or resume the run in OUT, after the process group is initialized. Collective.

    lock: the lock of OUT, not yet acquired; after an error the caller releases it. Without a lock,
        one is made and released here.
    Returns the exit code; see `pretrain`. Raises UserError or RunFailure on every rank.
    """
    began = time.monotonic()
    planned = plan(config, open_named(data, config.phases), ranks.world_size)
    held = lock or Lock(out, on_rank0)
    attempt = Attempt(
        planned.config,
        planned.data,
        planned.phases,
        out,
        ranks,
        options,
        held,
        began,
        planned.total_steps,
    )
    attempt = with_sources(attempt)  # before O is made
    try:
        held.acquire()
        return _run(attempt, planned.engine, device)
    finally:
        if lock is None:
            held.release()


def _run(attempt: Attempt, engine_config: dict[str, Any], device: torch.device) -> int:
    """Build the engine, resume, train, and close. Returns the exit code."""
    config, out, lock = attempt.config, attempt.out, attempt.lock
    if on_rank0(lambda: run_folder.is_done(out)) and not attempt.options.extend:
        attempt.print(on_rank0(lambda: finished_line(attempt)))
        return stop_signals.DONE
    if lock.took_over:
        attempt.print(f"{out}/lock: taken over from {lock.took_over}")
    notes = on_rank0(lambda: _count_failures(out, config.train.max_restarts, lock.took_over))
    for note in notes:
        attempt.print(note)
    if offloads_optimizer(engine_config):
        attempt.print(
            "offload_optimizer: loading DeepSpeed's CPU Adam; the first run on a machine compiles "
            "it, which takes minutes"
        )
    if config.train.compile:
        with fail_on_all_ranks(
            ControlGroup(attempt.ranks).all_gather_object, "checking the folder of compiled code"
        ):
            secure_compile_cache()
    objective = _objective(config)
    frozen = None
    if config.objective.is_frozen:
        assert isinstance(objective, ElectraObjective)
        frozen = objective.set_generator_apart()
    engine = Engine(objective, attempt.phases[0].config, engine_config, attempt.ranks, device)
    if frozen is not None:
        engine.add_frozen(frozen)
    nodes = run_folder.open_folder(out, attempt.ranks.rank, engine.all_gather_object)
    rank_log.open_log(out, attempt.ranks)
    on_rank0(lambda: remove_stale(out / "ckpt"))
    _check_same_data(attempt, engine, nodes)
    resumed = resume(attempt, engine)
    if attempt.generator is not None:
        generator_from.set_weights(engine, attempt.generator, out, is_new=resumed is None)
    on_rank0(lambda: _write_description(attempt, nodes, is_new=resumed is None))
    is_complete = train_run(attempt, engine, resumed)
    lock.release()  # before the engine closes: rank 0 may fail when another rank ends first
    engine.close()
    return stop_signals.DONE if is_complete else stop_signals.stop_exit_code()


def finished_line(attempt: Attempt) -> str:
    """Return the line that a start of a finished run prints without --extend."""
    out, total_steps = attempt.out, attempt.total_steps
    newest = checkpoint.latest(out / "ckpt")
    step = checkpoint.read_meta(newest).state.step if newest else total_steps
    if step < total_steps:
        return f"{out} is finished at step {step:,}; to continue to step {total_steps:,}, pass --extend"
    longer = how_to_extend(attempt.config.phases)
    return f"{out} is finished; to continue, {longer} and pass --extend"


def _objective(config: RunConfig) -> Objective:
    # Every rank builds the full module from the same seed. DeepSpeed's zero.Init would skip the
    # initialization without an error.
    objective = build_objective(config, config.train.seed)
    objective.recompute_layers(config.train.activation_checkpointing)
    if config.train.compile:
        objective.compile_layers()
    return objective


def _count_failures(out: Path, limit: int, silent: str) -> list[str]:
    newest = checkpoint.latest(out / "ckpt")
    step = checkpoint.read_meta(newest).state.step if newest else 0
    return failures.count_failures(out, step, limit, silent)


def _check_same_data(attempt: Attempt, engine: Engine, nodes: list[str]) -> None:
    """Raise UserError on every rank when nodes have different data. Collective."""
    sources: dict[str, Data] = {phase.data_name: phase.data.source for phase in attempt.phases}
    own = ", ".join(source.manifest.dataset_id for source in sources.values())
    dataset_ids = engine.all_gather_object(own)
    node_of = dict(zip(dataset_ids, nodes, strict=True))
    if len(node_of) > 1:
        listed = ", ".join(f"{dataset_id} on {node}" for dataset_id, node in node_of.items())
        raise UserError(
            f"--data is not the same for all ranks: dataset_id {listed}; "
            "copy the same data to every node"
        )


def _write_description(attempt: Attempt, nodes: list[str], is_new: bool) -> None:
    """Write config.json and the tokenizer. `detect` and `export` then need only the run folder."""
    out, source = attempt.out, attempt.data.source
    branch = attempt.branch.facts if attempt.branch else None
    if branch is None and not is_new:
        branch = run_folder.branch_facts(out)
    (out / "done").unlink(missing_ok=True)
    run_folder.write_config(
        out,
        attempt.config,
        source.manifest.dataset_id,
        total_steps=attempt.total_steps,
        nodes=nodes,
        launcher=attempt.ranks.launcher,
        world_size=attempt.ranks.world_size,
        **facts(attempt.phases),
        **({} if branch is None else {"branch": branch}),
    )
    copy_tokenizer(source.manifest.tokenizer, source.tokenizer, out / "tokenizer")
