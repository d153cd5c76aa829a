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
from electra_ds.config.phases import how_to_extend, is_extension
from electra_ds.config.schema import MAX_STEPS, RunConfig
from electra_ds.data.data_tokenizer import copy_tokenizer
from electra_ds.data.dataset import Data
from electra_ds.data.loader import Loader
from electra_ds.data.named_data import Given, open_named
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.model.build import build_objective
from electra_ds.model.kernels.attention_mask import with_cu_seqlens
from electra_ds.model.objective import ElectraObjective, Objective
from electra_ds.model.weights import true_rows
from electra_ds.training import checkpoint, generator_from
from electra_ds.training.branch import Branch, find_branch
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
from electra_ds.training.phase_texts import begin_line, facts
from electra_ds.training.phases import (
    Phase,
    TrainingData,
    check_resume,
    current_index,
    entered,
)
from electra_ds.training.positions import last_position
from electra_ds.training.precision import precision_name
from electra_ds.training.pretrainer import Pretrainer, Schedule
from electra_ds.training.run_logger import Logger, RunLogger
from electra_ds.training.run_plan import plan, plan_warnings
from electra_ds.training.state import TrainingState
from electra_ds.training.stop_requests import StopRequests
from electra_ds.training.verdict import VerdictTracker

MOST_SHOWN = 3  # later sizes of the global batch in the first line


@dataclass(frozen=True)
class AttemptOptions:
    """Options of one attempt.

    stop_at_step: save and stop after this step.
    max_minutes: save and stop after this time.
    extend: continue a finished run with a larger train.total_steps, or with longer or more phases.
    init_from: a run or checkpoint; a new run starts from its weights.
    branch_from: a run or checkpoint with moments; a new run continues it with its own config.
    read_generator: returns the weights of a frozen generator by canonical name, for the config with
        the values of the data and the tokenizer of the data.
    asked: reasons to stop at the next vote; signal handlers append to it.
    Raises UserError when stop_at_step or max_minutes is out of range, and for options that exclude
    each other.
    """

    stop_at_step: int | None = None
    max_minutes: float | None = None
    extend: bool = False
    init_from: Path | None = None
    read_generator: Callable[[RunConfig, Tokenizer], dict[str, Tensor]] | None = None
    branch_from: Path | None = None
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
        if self.branch_from is None:
            return
        for given, option in (
            (self.init_from, "--init-from"),
            (self.read_generator, "--generator-from"),
        ):
            if given is not None:
                raise UserError(
                    f"--branch-from and {option} exclude each other: a branch has all weights of "
                    f"its checkpoint; leave {option} out"
                )


def check_out(out: Path, init_from: Path | None = None, branch_from: Path | None = None) -> None:
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
        sources = {"--init-from": init_from, "--branch-from": branch_from}
        check_outside(out, "--out", {name: _run_of(path) for name, path in sources.items()})


def _run_of(path: Path | None) -> Path | None:
    """The run folder of a run or checkpoint; None for other paths."""
    is_model = path is not None and found_at(path).kind in ("run", "checkpoint")
    return folder_of_model(path) if path is not None and is_model else None


@dataclass(frozen=True)
class Attempt:
    """One start of a run: its config, data, run folder, ranks and options.

    data: of the first phase. phases: a run without phases is one phase.
    """

    config: RunConfig
    data: TrainingData
    phases: list[Phase]
    out: Path
    ranks: Ranks
    options: AttemptOptions
    lock: Lock
    began: float  # time.monotonic()
    total_steps: int
    init_from: Path | None = None  # the checkpoint that --init-from stands for, in a new run
    branch: Branch | None = None  # what --branch-from stands for, in a new run
    generator: dict[str, Tensor] | None = None  # weights of --generator-from, emptied once set

    def print(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.ranks.rank == 0:
            with contextlib.suppress(OSError):  # the console may be a file on a full disk
                print(redacted(printable_lines(text)), flush=True)


def pretrain(
    config: RunConfig, data: Given, out: Path, ranks: Ranks, options: AttemptOptions
) -> int:
    """Initialize the process group, train, and destroy the process group. Called on every rank.

    data: one value of --data, or those of the phases (`named_data.open_named`).

    Returns the exit code: 0 if the schedule is complete, 85 if the run is saved and stopped (under
    torchrun 0).
    Raises UserError or RunFailure. The first failure is written to OUT/error-rank-N.json.
    """
    check_out(
        out, options.init_from, options.branch_from
    )  # before an error file is written into it
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
    attempt = _with_sources(attempt)  # before O is made
    try:
        held.acquire()
        return _run(attempt, planned.engine, device)
    finally:
        if lock is None:
            held.release()


def _with_sources(attempt: Attempt) -> Attempt:
    """The attempt with what the options with the suffix `-from` stand for. Collective."""
    options, source, branch = attempt.options, attempt.init_from, None
    reads = options.init_from or options.read_generator or options.branch_from
    if not (reads or attempt.config.objective.is_frozen):
        return attempt
    is_new = checkpoint.latest_on_rank0(attempt.out / "ckpt") is None
    if options.branch_from and is_new:
        control = ControlGroup(attempt.ranks)
        branch = find_branch(options.branch_from, attempt.config, attempt.phases, control)
    if options.init_from and is_new:
        source = _find_source(attempt)
    generator = generator_from.read_weights(
        options.read_generator,
        attempt.config,
        attempt.data.source.tokenizer,
        ControlGroup(attempt.ranks).all_gather_object,
        needs_weights=is_new and source is None and branch is None,
    )
    return replace(attempt, init_from=source, branch=branch, generator=generator)


def _run(attempt: Attempt, engine_config: dict[str, Any], device: torch.device) -> int:
    """Build the engine, resume, train, and close. Returns the exit code."""
    config, out, lock = attempt.config, attempt.out, attempt.lock
    if on_rank0(lambda: run_folder.is_done(out)) and not attempt.options.extend:
        longer = how_to_extend(config.phases)
        attempt.print(f"{out} is finished; to continue, {longer} and pass --extend")
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
    engine = Engine(objective, attempt.phases[0].config, engine_config, attempt.ranks, device)
    if frozen is not None:
        engine.add_frozen(frozen)
    nodes = run_folder.open_folder(out, attempt.ranks.rank, engine.all_gather_object)
    rank_log.open_log(out, attempt.ranks)
    on_rank0(lambda: remove_stale(out / "ckpt"))
    _check_same_data(attempt, engine, nodes)
    resumed = _resume(attempt, engine)
    if attempt.generator is not None:
        generator_from.set_weights(engine, attempt.generator, out, is_new=resumed is None)
    on_rank0(lambda: _write_description(attempt, nodes, is_new=resumed is None))
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

    With --init-from a new run loads the weights of another run, with --branch-from its state as
    well. Raises UserError when the config or
    the data of the checkpoint differ from those of this run.
    """
    options, config = attempt.options, attempt.config
    rows = true_rows(engine.module)
    found = checkpoint.latest_on_rank0(attempt.out / "ckpt")
    if found is None:
        if options.branch_from is not None:
            return _begin_branch(attempt, engine)
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
        science = [
            line
            for line in science
            if not (line.startswith(lengths) or is_extension(line, old.phases))
        ]
    if science:
        fits = type(old) is type(config)  # the class of a config is that of its architecture
        raise UserError(
            f"{found} was trained with another config: {'; '.join(science)}. Use the old values"
            + (
                ", choose another --out and continue it with --branch-from, or start from its "
                "weights with --init-from"
                if fits
                else " or choose another --out; its weights fit its own architecture only"
            )
        )
    check_resume(meta.state, attempt.phases, f"{found}/meta.json", extends=options.extend)
    checkpoint.load(engine, found, rows)
    if options.extend and found.name == checkpoint.FINAL:
        rename_final(engine, found, meta.state.step)
    changed = f"; now {', '.join(machine)}" if machine else ""
    attempt.print(f"resuming {found} at step {meta.state.step}{changed}")
    return meta.state


def _begin_branch(attempt: Attempt, engine: Engine) -> TrainingState:
    """Load the checkpoint of --branch-from and return the first state of the branch. Collective."""
    branch = attempt.branch
    if branch is None:
        raise UserError(
            f"{printable(attempt.out)}/ckpt: its checkpoint was removed during the start; repeat "
            "the command"
        )
    checkpoint.load(engine, branch.source, true_rows(engine.module))
    for line in branch.lines:
        attempt.print(line)
    return branch.state


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


# ------------------------------------------------------------------------------------ training


def _train(attempt: Attempt, engine: Engine, resumed: TrainingState | None) -> bool:
    """Train until the end of the schedule or a stop. Returns whether it is complete. Collective."""
    state = resumed or entered(TrainingState(), attempt.phases, 0)
    with _open_logger(attempt, state) as logger:
        for line in _start_lines(attempt, engine, state):
            logger.say(line)
        checkpointer = Checkpointer(
            engine,
            attempt.out / "ckpt",
            attempt.config.checkpoint,
            attempt.config.model_dump(mode="json"),
            true_rows(engine.module),
            before_write=attempt.lock.beat,
            flush=logger.flush,
            saved_step=resumed.step if resumed and not attempt.branch else None,
        )
        state, pretrainer = _train_phases(attempt, engine, checkpointer, logger, state)
        is_complete = pretrainer.finish(state)
        reason = "" if is_complete else pretrainer.stop_reason(state)
        ended_at = {"step": state.step, "total_steps": attempt.total_steps, "reason": reason}
        on_rank0(lambda: run_folder.finish(attempt.out, is_complete, ended_at))
        ended = "finished" if is_complete else "stopped and saved"
        why = f" ({reason})" if reason else ""
        logger.say(f"{ended} at step {state.step}{why}: {checkpointer.last_checkpoint()}")
    return is_complete


def _train_phases(
    attempt: Attempt,
    engine: Engine,
    checkpointer: Checkpointer,
    logger: Logger,
    state: TrainingState,
) -> tuple[TrainingState, Pretrainer]:
    """Train phase after phase, to the end or a stop. Collective.

    Returns the last state, which is not saved, and the trainer of its phase.
    """
    phases, options = attempt.phases, attempt.options
    is_rank0 = attempt.ranks.rank == 0
    stops = StopRequests(attempt.out, is_rank0, options.asked, attempt.began, options.max_minutes)
    verdict = _verdict(attempt, state.step)
    index = current_index(state, phases)
    while True:
        if state.step >= phases[index].end_step and index + 1 < len(phases):
            index += 1  # also of a checkpoint that was saved at the border
            state = entered(state, phases, index)
            if phases[index].resets_moments:
                engine.reset_moments(0)
        _begin_phase(attempt, engine, logger, state)
        loader = _loader(attempt, phases[index], engine, state)
        trainer = _pretrainer(
            attempt, phases[index], engine, loader, checkpointer, logger, stops, verdict, state
        )
        state = trainer.run(state)
        loader.close()
        is_stop = trainer.stop_voted or state.step >= trainer.schedule.last_step
        if is_stop or index + 1 == len(phases):
            return state, trainer


def _begin_phase(attempt: Attempt, engine: Engine, logger: Logger, state: TrainingState) -> None:
    """Give engine, module and log the values of a phase; nothing in a run without phases."""
    phase = attempt.phases[current_index(state, attempt.phases)]
    if not phase.name:
        return
    engine.use(phase.config)
    objective: Any = engine.module
    objective.apply_phase(phase.config.objective, phase.config.model)
    logger.begin_phase(phase.name, _epochs_at_end(state, phase))
    logger.say(begin_line(phase, len(attempt.phases), attempt.ranks.world_size))


def _epochs_at_end(state: TrainingState, phase: Phase) -> float:
    """Passes over the data of a phase at its end, if no more steps are skipped."""
    rows = last_position(state, phase.config.batch_sizes, phase.end_step)
    return rows / phase.data.reader.rows


def _loader(attempt: Attempt, phase: Phase, engine: Engine, state: TrainingState) -> Loader:
    train, data = phase.config.train, phase.data
    return Loader(
        data.reader,
        data.row_order,
        data.recipe,
        rank=attempt.ranks.rank,
        world_size=attempt.ranks.world_size,
        global_batch_size=phase.config.batch_sizes,
        micro_batch_size=train.micro_batch_size,
        consumed_rows=state.consumed_rows,
        attempts=state.attempts,
        pin_memory=engine.device.type == "cuda",
        transform=with_cu_seqlens,
    )


def _open_logger(attempt: Attempt, state: TrainingState) -> Logger:
    """Return a RunLogger on rank 0 and a Logger without output on other ranks. Collective."""
    phase = attempt.phases[current_index(state, attempt.phases)]
    epochs = _epochs_at_end(state, phase)
    opened: list[Logger] = []

    def open_files() -> None:
        tensorboard = attempt.config.logging.tensorboard
        opened.append(RunLogger(attempt.out, state.step, attempt.total_steps, epochs, tensorboard))

    on_rank0(open_files)
    return opened[0] if opened else Logger()


def _verdict(attempt: Attempt, step: int) -> VerdictTracker:
    """The verdict after the log lines up to a step. Collective."""
    # The warmup of the first phase: the samples of a generator that has just begun.
    config = attempt.phases[0].config
    tracker = VerdictTracker(config.verdict, config.optimizer.warmup_steps)

    def replayed() -> dict[str, Any]:
        records = (record for _, record in metric_lines(attempt.out / "metrics.jsonl"))
        tracker.add_all(records, step)
        return tracker.state()

    tracker.set_state(on_rank0(replayed))
    return tracker


def _pretrainer(
    attempt: Attempt,
    phase: Phase,
    engine: Engine,
    loader: Loader,
    checkpointer: Checkpointer,
    logger: Logger,
    stops: StopRequests,
    verdict: VerdictTracker,
    state: TrainingState,
) -> Pretrainer:
    total_steps = attempt.total_steps
    last_step = min(total_steps, attempt.options.stop_at_step or total_steps)
    later = attempt.phases[phase.index + 1 :]
    tokens_after = sum(part.steps * part.tokens_per_step for part in later)
    return Pretrainer(
        phase.config,
        engine,
        loader,
        phase.data.source.held_out(),
        phase.data.recipe,
        Schedule(
            total_steps,
            last_step,
            phase.data.reader.rows,
            phase.config.batch_sizes,
            phase.span,
            phase.end_step,
            tokens_after / phase.config.data.sequence_length,
        ),
        checkpointer,
        logger,
        stops,
        attempt.lock,
        verdict,
        state,
        attempt.began,
    )


def _start_lines(attempt: Attempt, engine: Engine, state: TrainingState) -> list[str]:
    """Return the lines that rank 0 prints before the first step."""
    config, ranks, step = attempt.config, attempt.ranks, state.step
    precision = precision_name(engine.deepspeed_config)
    is_alone = ranks.launcher == NO_LAUNCHER
    launched = (
        "1 rank, no launcher" if is_alone else f"{ranks.world_size} rank(s) under {ranks.launcher}"
    )
    # Of a run with phases, the line at the begin of each phase shows its steps.
    batch = _batch_text(config, ranks.world_size, state.attempts)
    step_text = "" if config.phases else f"a step is {batch}; "
    in_phases = f" in {len(attempt.phases)} phases" if config.phases else ""
    lines = [
        f"{engine.parameter_count():,} parameters, {launched}, ZeRO {engine.stage}, {precision}; "
        f"{step_text}{attempt.total_steps} steps{in_phases}, from step {step}"
    ]
    offloads = _offloads(engine.deepspeed_config)
    is_half = precision in ("bf16", "fp16")
    if ranks.world_size == 1 and engine.stage and not is_half and not offloads:
        name = "zero0-fp32" if precision == "fp32" else "zero0"
        lines.append(
            f"ZeRO {engine.stage} has no effect on memory with one rank: "
            f"--engine {name} is faster and needs less memory"
        )
    lines += _mixture_lines(attempt.phases)
    lines += plan_warnings(
        [phase.span for phase in attempt.phases],
        [phase.name for phase in config.phases],
        config.train.batch_schedule,
    )
    given = {"--init-from": attempt.options.init_from, "--branch-from": attempt.options.branch_from}
    lines += [
        f"WARNING: {name} {printable(path)} has no effect, because {printable(attempt.out)} has a "
        "checkpoint to resume from"
        for name, path in given.items()
        if path is not None and step and not attempt.branch
    ]
    return lines


def _mixture_lines(phases: list[Phase]) -> list[str]:
    """The shares of the sources of each mixture, and their passes in the phases that use it."""
    lines = []
    for name in dict.fromkeys(phase.data_name for phase in phases):
        same = [phase for phase in phases if phase.data_name == name]
        rows = sum(phase.config.batch_sizes.rows_before(phase.steps) for phase in same)
        parts = [
            f"{source} {part.share:.2%}, {part.epochs(rows):.2f} epochs"
            for source, part in same[0].data.source.shares.items()
        ]
        if parts:
            lines.append(printable(f"mixture{f' {name}' if name else ''}: {'; '.join(parts)}"))
    return lines


def _batch_text(config: RunConfig, world_size: int, attempts: int) -> str:
    """The rows of the next step and their split over ranks, and the next sizes of a schedule."""
    micro_batch_size, sizes = config.train.micro_batch_size, config.batch_sizes
    rows = sizes.rows(attempts)
    later = [
        f", {size} after {start:,} steps"
        for start, size in zip(sizes.starts, sizes.sizes, strict=True)
        if start > attempts
    ]
    rest = ", ..." if len(later) > MOST_SHOWN else ""
    return (
        f"{rows} rows of {config.data.sequence_length} tokens "
        f"({rows // (micro_batch_size * world_size)} x {micro_batch_size} per rank)"
        f"{''.join(later[:MOST_SHOWN])}{rest}"
    )
