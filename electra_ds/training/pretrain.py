"""The command `pretrain`: initialize the ranks, set up or resume a run, train, close."""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from electra_ds.cluster import failures, rank_log, run_folder, stop_signals
from electra_ds.cluster.launchers import NO_LAUNCHER, Ranks
from electra_ds.cluster.watchdog import Watchdog
from electra_ds.common.errors import UserError
from electra_ds.common.folder_kinds import found_at
from electra_ds.common.folder_lock import Lock, owner_of
from electra_ds.common.outputs import check_outside
from electra_ds.common.printable import printable, printable_lines, shortened
from electra_ds.common.redaction import redacted
from electra_ds.config.loading import differences, parse_run
from electra_ds.config.schema import MAX_STEPS, RunConfig
from electra_ds.data.data_tokenizer import copy_tokenizer
from electra_ds.data.dataset import Data, open_data
from electra_ds.data.loader import Loader, consumed_rows_from_state
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.model.build import build_objective
from electra_ds.model.kernels.attention_mask import with_cu_seqlens
from electra_ds.model.objective import ElectraObjective, Objective
from electra_ds.model.weights import true_rows
from electra_ds.training import checkpoint, generator_from
from electra_ds.training.checkpoint import folder_of_model
from electra_ds.training.checkpointer import Checkpointer, remove_stale, rename_final
from electra_ds.training.collectives import (
    ControlGroup,
    destroy_process_groups,
    fail_on_all_ranks,
    is_collective,
    on_rank0,
)
from electra_ds.training.compile_cache import secure_compile_cache
from electra_ds.training.engine import Engine, start
from electra_ds.training.init_from import GENERATOR_PARTS, find_source
from electra_ds.training.metrics_file import metric_lines
from electra_ds.training.precision import precision_name
from electra_ds.training.pretrainer import Pretrainer, Schedule
from electra_ds.training.run_logger import Logger, RunLogger
from electra_ds.training.run_plan import TrainingData, plan, plan_warnings
from electra_ds.training.state import TrainingState
from electra_ds.training.stop_requests import StopRequests
from electra_ds.training.verdict import VerdictTracker


@dataclass(frozen=True)
class AttemptOptions:
    """Options of one attempt.

    stop_at_step: save and stop after this step.
    max_minutes: save and stop after this time.
    extend: continue a finished run with a larger train.total_steps.
    init_from: a run or checkpoint; a new run starts from its weights.
    read_generator: returns the weights of a frozen generator by canonical name, for the config with
        the values of the data and the tokenizer of the data.
    asked: reasons to stop at the next vote; signal handlers append to it.
    Raises UserError when stop_at_step or max_minutes is out of range.
    """

    stop_at_step: int | None = None
    max_minutes: float | None = None
    extend: bool = False
    init_from: Path | None = None
    read_generator: Callable[[RunConfig, Tokenizer], dict[str, Tensor]] | None = None
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.stop_at_step is not None and not 1 <= self.stop_at_step <= MAX_STEPS:
            raise UserError(
                f"--stop-at-step {shortened(self.stop_at_step)}: expected a step from 1 to "
                f"{MAX_STEPS:,}"
            )
        minutes = self.max_minutes
        if minutes is not None and not (minutes >= 0 and math.isfinite(minutes)):
            raise UserError(f"--max-minutes {minutes}: expected a number of minutes, 0 or more")


def check_out(out: Path, init_from: Path | None = None) -> None:
    """Check the path of the run folder, before anything is written to it.

    Raises UserError when it is no folder or a folder of prepared data, for a new run in the folder
    of a model or of finetune, and for one below the run that its weights come from.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {printable(out)}: is a file; expected a folder for the run")
    if (out / "manifest.json").exists():
        raise UserError(
            f"--out {printable(out)}: holds prepared data; give the run a folder of its own"
        )
    found = found_at(out)
    is_taken = found.kind in ("hugging face", "fine-tuned", "checkpoint")
    if is_taken and not (out / "ckpt").exists():
        raise UserError(f"--out {printable(out)}: {found.phrase}; give the run a folder of its own")
    if not (out / "config.json").exists():
        is_model = init_from is not None and found_at(init_from).kind in ("run", "checkpoint")
        started_from = folder_of_model(init_from) if init_from and is_model else None
        check_outside(out, "--out", {"--init-from": started_from})


@dataclass(frozen=True)
class Attempt:
    """One start of a run: its config, data, run folder, ranks and options."""

    config: RunConfig
    data: TrainingData
    out: Path
    ranks: Ranks
    options: AttemptOptions
    lock: Lock
    began: float  # time.monotonic()
    total_steps: int
    init_from: Path | None = None  # the checkpoint that --init-from stands for, in a new run
    generator: dict[str, Tensor] | None = None  # weights of --generator-from, emptied once set

    def print(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.ranks.rank == 0:
            with contextlib.suppress(OSError):  # the console may be a file on a full disk
                print(redacted(printable_lines(text)), flush=True)


def pretrain(
    config: RunConfig, data: str | Path, out: Path, ranks: Ranks, options: AttemptOptions
) -> int:
    """Initialize the process group, train, and destroy the process group. Called on every rank.

    Returns the exit code: 0 if the schedule is complete, 85 if the run is saved and stopped (under
    torchrun 0).
    Raises UserError or RunFailure. The first failure is written to OUT/error-rank-N.json.
    """
    check_out(out, options.init_from)  # before an error file is written into it
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
    data: str | Path,
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
    planned = plan(config, open_data(data), ranks.world_size)
    held = lock or Lock(out, on_rank0)
    attempt = Attempt(
        planned.config, planned.data, out, ranks, options, held, began, planned.total_steps
    )
    attempt = _with_sources(attempt)  # before O is made
    try:
        held.acquire()
        return _run(attempt, planned.engine, device)
    finally:
        if lock is None:
            held.release()


def _with_sources(attempt: Attempt) -> Attempt:
    """The attempt with what --init-from and --generator-from stand for. Collective."""
    options, source = attempt.options, attempt.init_from
    reads = options.init_from or options.read_generator or attempt.config.objective.is_frozen
    if not reads:
        return attempt
    is_new = checkpoint.latest_on_rank0(attempt.out / "ckpt") is None
    if options.init_from and is_new:
        source = _find_source(attempt)
    generator = generator_from.read_weights(
        options.read_generator,
        attempt.config,
        attempt.data.source.tokenizer,
        ControlGroup(attempt.ranks).all_gather_object,
        needs_weights=is_new and source is None,
    )
    return replace(attempt, init_from=source, generator=generator)


def _run(attempt: Attempt, engine_config: dict[str, Any], device: torch.device) -> int:
    """Build the engine, resume, train, and close. Returns the exit code."""
    config, out, lock = attempt.config, attempt.out, attempt.lock
    if on_rank0(lambda: run_folder.is_done(out)) and not attempt.options.extend:
        attempt.print(f"{out} is finished; to continue, raise train.total_steps and pass --extend")
        return stop_signals.DONE
    if lock.took_over:
        attempt.print(f"{out}/lock: taken over from {lock.took_over}")
    notes = on_rank0(lambda: _count_failures(out, config.train.max_restarts, lock.took_over))
    for note in notes:
        attempt.print(note)
    if _offloads(engine_config):
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
    engine = Engine(objective, config, engine_config, attempt.ranks, device)
    if frozen is not None:
        engine.add_frozen(frozen)
    nodes = run_folder.open_folder(out, attempt.ranks.rank, engine.all_gather_object)
    rank_log.open_log(out, attempt.ranks)
    on_rank0(lambda: remove_stale(out / "ckpt"))
    _check_same_data(attempt.data.source, engine, nodes)
    resumed = _resume(attempt, engine)
    if attempt.generator is not None:
        generator_from.set_weights(engine, attempt.generator, out, is_new=resumed is None)
    on_rank0(lambda: _write_description(attempt, nodes))
    is_complete = _train(attempt, engine, resumed)
    lock.release()  # before the engine closes: rank 0 may fail when another rank ends first
    engine.close()
    return stop_signals.DONE if is_complete else stop_signals.stop_exit_code()


def _offloads(engine_config: dict[str, Any]) -> bool:
    section = engine_config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return section.get("device", "none") != "none"


def _objective(config: RunConfig) -> Objective:
    # Every rank builds the full module from the same seed. DeepSpeed's zero.Init would skip the
    # initialization without an error.
    objective = build_objective(config, config.train.seed)
    objective.recompute_layers(config.train.activation_checkpointing)
    if config.train.compile:
        objective.compile_layers()
    return objective


# ----------------------------------------------------------------------------------- resuming


def _resume(attempt: Attempt, engine: Engine) -> TrainingState | None:
    """Load the latest checkpoint of OUT and return its state; None for a new run. Collective.

    With --init-from a new run loads the weights of another run. Raises UserError when the config or
    the data of the checkpoint differ from those of this run.
    """
    options, config = attempt.options, attempt.config
    rows = true_rows(engine.module)
    found = checkpoint.latest_on_rank0(attempt.out / "ckpt")
    if found is None:
        if options.init_from is not None:
            source = attempt.init_from or _find_source(attempt)
            skipped = () if attempt.generator is None else GENERATOR_PARTS
            checkpoint.load(engine, source, rows, weights_only=True, skipped=skipped)
            attempt.print(
                f"weights of {source}; the schedule and the position in the data start at 0"
            )
        return None
    meta = checkpoint.read_meta(found)
    old = parse_run(meta.config, f"{found}/meta.json")
    science, machine = differences(old, config)
    if options.extend:
        lengths = ("train.total_steps:", "train.epochs:")
        science = [line for line in science if not line.startswith(lengths)]
    if science:
        fits = type(old) is type(config)  # the class of a config is that of its architecture
        raise UserError(
            f"{found} was trained with another config: {'; '.join(science)}. Use the old values"
            + (
                ", choose another --out, or start from its weights with --init-from"
                if fits
                else " or choose another --out; its weights fit its own architecture only"
            )
        )
    consumed_rows_from_state(meta.state.data, attempt.data.reader, attempt.data.row_order)
    consumed = meta.state.attempts * config.train.global_batch_size
    if meta.state.consumed_rows != consumed:
        raise UserError(
            f"{found}/meta.json: data.position = {meta.state.consumed_rows:,}; expected "
            f"{consumed:,}, the rows of {meta.state.attempts:,} steps; use an older checkpoint"
        )
    checkpoint.load(engine, found, rows)
    if options.extend and found.name == checkpoint.FINAL:
        rename_final(engine, found, meta.state.step)
    changed = f"; now {', '.join(machine)}" if machine else ""
    attempt.print(f"resuming {found} at step {meta.state.step}{changed}")
    return meta.state


def _find_source(attempt: Attempt) -> Path:
    assert attempt.options.init_from is not None
    return find_source(
        attempt.options.init_from,
        attempt.config,
        attempt.data.source.tokenizer,
        ControlGroup(attempt.ranks).all_gather_object,
        needs_generator=attempt.options.read_generator is None,
    )


def _count_failures(out: Path, limit: int, silent: str) -> list[str]:
    newest = checkpoint.latest(out / "ckpt")
    step = checkpoint.read_meta(newest).state.step if newest else 0
    return failures.count_failures(out, step, limit, silent)


def _check_same_data(source: Data, engine: Engine, nodes: list[str]) -> None:
    """Raise UserError on every rank when nodes have different data. Collective."""
    dataset_ids = engine.all_gather_object(source.manifest.dataset_id)
    node_of = dict(zip(dataset_ids, nodes, strict=True))
    if len(node_of) > 1:
        listed = ", ".join(f"{dataset_id} on {node}" for dataset_id, node in node_of.items())
        raise UserError(
            f"--data is not the same for all ranks: dataset_id {listed}; "
            "copy the same data to every node"
        )


def _write_description(attempt: Attempt, nodes: list[str]) -> None:
    """Write config.json and the tokenizer. `detect` and `export` then need only the run folder."""
    out, source = attempt.out, attempt.data.source
    (out / "done").unlink(missing_ok=True)
    run_folder.write_config(
        out,
        attempt.config,
        source.manifest.dataset_id,
        total_steps=attempt.total_steps,
        nodes=nodes,
        launcher=attempt.ranks.launcher,
        world_size=attempt.ranks.world_size,
    )
    copy_tokenizer(source.manifest.tokenizer, source.tokenizer, out / "tokenizer")


# ------------------------------------------------------------------------------------ training


def _train(attempt: Attempt, engine: Engine, resumed: TrainingState | None) -> bool:
    """Train until the end of the schedule or a stop. Returns whether it is complete. Collective."""
    loader = _loader(attempt, engine, resumed.consumed_rows if resumed else 0)
    state = resumed or TrainingState(data=loader.state(0))
    with _open_logger(attempt, state.step) as logger:
        for line in _start_lines(attempt, engine, state.step):
            logger.say(line)
        checkpointer = Checkpointer(
            engine,
            attempt.out / "ckpt",
            attempt.config.checkpoint,
            attempt.config.model_dump(mode="json"),
            true_rows(engine.module),
            before_write=attempt.lock.beat,
            flush=logger.flush,
            saved_step=resumed.step if resumed else None,
        )
        pretrainer = _pretrainer(attempt, engine, loader, checkpointer, logger, state)
        state = pretrainer.run(state)
        is_complete = pretrainer.finish(state)
        loader.close()
        reason = "" if is_complete else pretrainer.stop_reason(state)
        facts = {"step": state.step, "total_steps": attempt.total_steps, "reason": reason}
        on_rank0(lambda: run_folder.finish(attempt.out, is_complete, facts))
        ended = "finished" if is_complete else "stopped and saved"
        why = f" ({reason})" if reason else ""
        logger.say(f"{ended} at step {state.step}{why}: {checkpointer.last_checkpoint()}")
    return is_complete


def _loader(attempt: Attempt, engine: Engine, consumed_rows: int) -> Loader:
    train, data = attempt.config.train, attempt.data
    return Loader(
        data.reader,
        data.row_order,
        data.recipe,
        rank=attempt.ranks.rank,
        world_size=attempt.ranks.world_size,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        consumed_rows=consumed_rows,
        pin_memory=engine.device.type == "cuda",
        transform=with_cu_seqlens,
    )


def _open_logger(attempt: Attempt, step: int) -> Logger:
    """Return a RunLogger on rank 0 and a Logger without output on other ranks. Collective."""
    train = attempt.config.train
    epochs = attempt.total_steps * train.global_batch_size / attempt.data.reader.rows
    opened: list[Logger] = []

    def open_files() -> None:
        tensorboard = attempt.config.logging.tensorboard
        opened.append(RunLogger(attempt.out, step, attempt.total_steps, epochs, tensorboard))

    on_rank0(open_files)
    return opened[0] if opened else Logger()


def _verdict(attempt: Attempt, step: int) -> VerdictTracker:
    """The verdict after the log lines up to a step. Collective."""
    config = attempt.config
    tracker = VerdictTracker(config.verdict, config.optimizer.warmup_steps)

    def replayed() -> dict[str, Any]:
        records = (record for _, record in metric_lines(attempt.out / "metrics.jsonl"))
        tracker.add_all(records, step)
        return tracker.state()

    tracker.set_state(on_rank0(replayed))
    return tracker


def _pretrainer(
    attempt: Attempt,
    engine: Engine,
    loader: Loader,
    checkpointer: Checkpointer,
    logger: Logger,
    state: TrainingState,
) -> Pretrainer:
    options, total_steps = attempt.options, attempt.total_steps
    last_step = min(total_steps, options.stop_at_step or total_steps)
    is_rank0 = attempt.ranks.rank == 0
    verdict = _verdict(attempt, state.step)
    return Pretrainer(
        attempt.config,
        engine,
        loader,
        attempt.data.source.held_out(),
        attempt.data.recipe,
        Schedule(total_steps, last_step, attempt.data.reader.rows),
        checkpointer,
        logger,
        StopRequests(attempt.out, is_rank0, options.asked, attempt.began, options.max_minutes),
        attempt.lock,
        verdict,
        state,
        attempt.began,
    )


def _start_lines(attempt: Attempt, engine: Engine, step: int) -> list[str]:
    """Return the lines that rank 0 prints before the first step."""
    config, ranks = attempt.config, attempt.ranks
    train = config.train
    precision = precision_name(engine.deepspeed_config)
    is_alone = ranks.launcher == NO_LAUNCHER
    launched = (
        "1 rank, no launcher" if is_alone else f"{ranks.world_size} rank(s) under {ranks.launcher}"
    )
    lines = [
        f"{engine.parameter_count():,} parameters, {launched}, ZeRO {engine.stage}, {precision}; "
        "a step is "
        f"{train.global_batch_size} rows of {config.data.sequence_length} tokens "
        f"({engine.accumulation} x {train.micro_batch_size} per rank); "
        f"{attempt.total_steps} steps, from step {step}"
    ]
    offloads = _offloads(engine.deepspeed_config)
    is_half = precision in ("bf16", "fp16")
    if ranks.world_size == 1 and engine.stage and not is_half and not offloads:
        name = "zero0-fp32" if precision == "fp32" else "zero0"
        lines.append(
            f"ZeRO {engine.stage} has no effect on memory with one rank: "
            f"--engine {name} is faster and needs less memory"
        )
    rows = attempt.total_steps * train.global_batch_size
    parts = [
        f"{name} {part.share:.2%}, {part.epochs(rows):.2f} epochs"
        for name, part in attempt.data.source.shares.items()
    ]
    if parts:
        lines.append(printable(f"mixture: {'; '.join(parts)}"))
    lines += plan_warnings(config, attempt.total_steps)
    if attempt.options.init_from is not None and step:
        lines.append(
            f"WARNING: --init-from {printable(attempt.options.init_from)} has no effect, because "
            f"{printable(attempt.out)} has a checkpoint to resume from"
        )
    return lines
