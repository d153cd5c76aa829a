"""The training of a run after its engine is built: phase after phase, to the end or a stop."""

from typing import Any

from electra_ds.cluster import run_folder
from electra_ds.data.loader import Loader
from electra_ds.model.kernels.attention_mask import with_cu_seqlens
from electra_ds.model.weights import true_rows
from electra_ds.training.attempt import Attempt
from electra_ds.training.checkpointer import Checkpointer
from electra_ds.training.collectives import on_rank0
from electra_ds.training.engine import Engine
from electra_ds.training.metrics_file import metric_lines
from electra_ds.training.phase_texts import begin_line
from electra_ds.training.phases import Phase, current_index, entered
from electra_ds.training.positions import last_position
from electra_ds.training.pretrainer import Pretrainer, Schedule
from electra_ds.training.run_logger import Logger, RunLogger
from electra_ds.training.start_lines import start_lines
from electra_ds.training.state import TrainingState
from electra_ds.training.stop_requests import StopRequests
from electra_ds.training.verdict import VerdictTracker


def train_run(attempt: Attempt, engine: Engine, resumed: TrainingState | None) -> bool:
    """Train until the end of the schedule or a stop. Returns whether it is complete. Collective."""
    state = resumed or entered(TrainingState(), attempt.phases, 0)
    with _open_logger(attempt, state) as logger:
        for line in start_lines(attempt, engine, state):
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
