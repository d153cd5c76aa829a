"""Pretraining steps: schedule, bad losses, log lines, held-out evaluation, checkpoints."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from electra_ds.common.errors import RunFailure
from electra_ds.common.folder_lock import Lock
from electra_ds.config.batch_sizes import BatchSizes
from electra_ds.config.schema import RunConfig
from electra_ds.data.dataset import HeldOut
from electra_ds.data.loader import StepBatch
from electra_ds.data.masking import MaskingRecipe
from electra_ds.model.losses import Counts, Losses, Totals
from electra_ds.training.checkpointer import Checkpointer
from electra_ds.training.engine import Engine, StepResult
from electra_ds.training.entropy import entropy
from electra_ds.training.held_out import evaluate_sources
from electra_ds.training.loss_sums import LossSums
from electra_ds.training.metrics import metrics_of_kind, rates
from electra_ds.training.phases import Span
from electra_ds.training.positions import last_position
from electra_ds.training.run_logger import Logger
from electra_ds.training.spike_guard import SpikeGuard
from electra_ds.training.state import TrainingState
from electra_ds.training.stop_requests import StopRequests
from electra_ds.training.trainer import Trainer
from electra_ds.training.verdict import COLLAPSED, VerdictTracker, advice

FIRST_LINE_SECONDS = 60.0  # after the first step, without a log line
WAIT_SHARE = 0.05  # share of the time waiting for data above which a warning is printed


@dataclass
class Timing:
    """Times and counts of this rank since the last log line."""

    began: float
    wait_seconds: float = 0.0  # for data
    tokens: int = 0
    attempts: int = 0
    rows: int = 0  # of the global batches
    pause_seconds: float = 0.0  # of checkpoints


@dataclass(frozen=True)
class Schedule:
    """Numbers of steps of the run, of this attempt and of a phase, of rows per epoch and per step.

    In a run without phases, end_step is total_steps.
    """

    total_steps: int
    last_step: int  # of this attempt: --stop-at-step, or total_steps
    epoch_rows: int
    sizes: BatchSizes
    rates: Span  # the learning rates of the phase
    end_step: int  # of the run, at the end of the phase
    rows_after: float = 0.0  # of later phases, in rows of this phase by their tokens


class Pretrainer(Trainer):
    """One attempt at a pretraining run, or at one phase of it, on this rank."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        batches: Iterator[StepBatch],
        held_out: dict[str, HeldOut],
        recipe: MaskingRecipe,
        schedule: Schedule,
        checkpointer: Checkpointer,
        logger: Logger,
        requests: StopRequests,
        lock: Lock,
        verdict: VerdictTracker,
        state: TrainingState,
        began: float,
    ):
        """Connect the parts of an attempt.

        config: of the phase; in a run without phases that of the run.
        batches: endless, from the position of `state`.
        held_out: name of a source -> its held-out rows.
        recipe: masking of the held-out rows.
        schedule: length of the run and the last step of this attempt.
        requests: of this rank, to save or to stop.
        lock: of the run folder; held while this object is used.
        verdict: with the log lines up to `state`.
        state: the state at the start.
        began: `time.monotonic()` at the start of the attempt.
        """
        self.config = config
        self.engine = engine
        self.batches = batches
        self.held_out = held_out
        self.recipe = recipe
        self.schedule = schedule
        self.checkpointer = checkpointer
        self.logger = logger
        self.requests = requests
        self.lock = lock
        self.began = began
        self.guard = SpikeGuard(config.train.spike_factor, state.recent_losses)
        self.refuses = self.guard.refuses if config.train.spike_factor else None
        self.sums = LossSums(2, engine.ranks, engine.device, state.interval)  # mlm, disc
        self.timing = Timing(time.perf_counter())
        self.verdict = verdict
        self._advised: set[str] = set()  # words of which the advice was printed
        self._is_first_attempt = True
        self._says_running = True  # until the first log line of this attempt
        checkpointer.on_commit = self._record_pause

    def totals(self, batch: StepBatch) -> Totals:
        """Return the numbers of masked positions and of real tokens of this rank."""
        return Totals(batch.masked_count, batch.token_count)

    def is_finished(self, state: TrainingState) -> bool:
        """Whether the last step of this attempt, or of the phase, is applied."""
        return state.step >= min(self.schedule.last_step, self.schedule.end_step)

    def should_stop(self, state: TrainingState) -> bool:
        """Return whether this rank asks to stop. Raises LockedOut when the lock was lost."""
        self.lock.step = state.step
        if self.lock.lost:
            raise self.lock.lost
        return self.requests.should_stop()

    def should_save(self, state: TrainingState) -> bool:
        """Whether OUT/SAVE was touched."""
        return self.requests.should_save()

    def forward_options(self, state: TrainingState) -> dict[str, Any]:
        """Return the options of the forward pass: with_counts in steps that are logged."""
        return {
            "with_counts": self._is_logged(state.step + 1),
            "progress": state.step / self.schedule.total_steps,
        }

    def _is_logged(self, step: int) -> bool:
        # The end of a phase is logged, so that an interval belongs to one phase.
        return step % self.config.logging.every == 0 or step == self.schedule.end_step

    def learning_rate(self, state: TrainingState) -> float:
        """The learning rate after `state.step` applied steps."""
        return self.schedule.rates.rate(state.step)

    def snapshot(self, state: TrainingState) -> TrainingState:
        """The state with each rank's sums of the open interval. Collective."""
        return replace(state, interval=self.sums.per_rank(self.engine.control))

    def after_attempt(
        self,
        state: TrainingState,
        batch: StepBatch,
        totals: Totals,
        losses: list[Losses],
        lr: float,
        result: StepResult,
    ) -> TrainingState:
        """Count the attempt; log, evaluate and save when due."""
        if not self._is_first_attempt:  # no batch was prepared before the first call
            self.timing.wait_seconds += batch.wait_seconds
        self._is_first_attempt = False
        self.timing.tokens += batch.token_count
        self.timing.attempts += 1
        self.timing.rows += batch.global_rows
        before = state
        position = batch.first_row + batch.global_rows
        state = state.advanced(
            result.applied,
            data=state.data | {"position": position},
            tokens=state.tokens + int(totals.token_count),
            recent_losses=self.guard.recent,
        )
        self._say_batch_size(batch, state)
        if not result.applied:
            self._report_skipped(before, state, batch, losses)
            return state
        self.sums.add_step([torch.stack([loss.mlm_loss, loss.disc_loss]) for loss in losses])
        self.logger.advance(state.step)
        if self._is_logged(state.step):
            self._log(state, losses, lr, result)
            self._says_running = False
        elif self._says_running:
            self._say_running(state)
        if self._is_evaluated(state.step):
            self.evaluate(state.step)
        is_last = state.step >= self.schedule.total_steps
        if state.step % self.config.checkpoint.every == 0 and not is_last:
            self.checkpointer.save(self.snapshot(state))
        return state

    def finish(self, state: TrainingState) -> bool:
        """Evaluate and save at the end of the schedule or at a stop. Collective.

        Returns whether the schedule is complete.
        """
        is_complete = state.step >= self.schedule.total_steps
        if not is_complete:
            self.checkpointer.save(self.snapshot(state))
            self.checkpointer.commit()
            return False
        if not self._is_evaluated(state.step):
            self.evaluate(state.step)
        self.checkpointer.save_final(self.snapshot(state))
        return True

    def stop_reason(self, state: TrainingState) -> str:
        """Why an attempt ended before its schedule, for messages."""
        if self.requests.reasons:
            return self.requests.reasons[0]
        if state.step >= self.schedule.last_step:
            return f"--stop-at-step {self.schedule.last_step}"
        return "requested on another rank"

    def _is_evaluated(self, step: int) -> bool:
        every = self.config.train.eval_every
        is_border = step == self.schedule.end_step < self.schedule.total_steps
        return is_border or (bool(every) and step % every == 0)

    def evaluate(self, step: int) -> None:
        """Log the metrics of the held-out rows, if there are any. Collective."""
        if not self.held_out:
            return
        train, engine = self.config.train, self.engine
        with engine.evaluating() as module:
            values = evaluate_sources(
                module,
                self.held_out,
                self.recipe,
                engine.device,
                batch_rows=train.micro_batch_size,
                max_rows=train.eval_rows,
                rank=engine.ranks.rank,
                world_size=engine.ranks.world_size,
                sum_over_ranks=engine.control.sum,
            )
        self.logger.valid(step, values)

    # ------------------------------------------------------------------------------- skipped steps

    def _report_skipped(
        self, before: TrainingState, state: TrainingState, batch: StepBatch, losses: list[Losses]
    ) -> None:
        """Report a skipped step with the rows of a bad loss. Collective.

        Raises RunFailure on every rank when the run cannot continue. This waits for the device,
        which is acceptable because skipped steps are rare.
        """
        options = self.config.train
        step = before.step + 1
        per_rank = self.engine.control.all_gather_object(self._described_losses(batch, losses))
        blame = self.guard.blame([part for parts in per_rank for part in parts])
        if blame and options.on_bad_loss == "stop":
            raise RunFailure(
                f"step {step} has {blame}. The weights were not changed; "
                "--set train.on_bad_loss=skip skips such steps; last good checkpoint: "
                f"{self.checkpointer.last_checkpoint()}"
            )
        if blame:
            self.logger.say(f"step {step} has {blame}: skipped")
        if state.skipped_in_a_row > options.max_skipped_steps:
            raise RunFailure(
                f"{state.skipped_in_a_row} steps in a row after step {state.step} were skipped "
                "because of spikes, or because losses or gradients were not finite "
                f"(train.max_skipped_steps = {options.max_skipped_steps}): lower "
                "optimizer.peak_lr, use bf16 or fp32, or inspect the rows in the lines above; "
                f"last good checkpoint: {self.checkpointer.last_checkpoint()}"
            )

    def _described_losses(self, batch: StepBatch, losses: list[Losses]) -> list[tuple[float, str]]:
        """(loss, description with its row numbers) of each micro-batch of this rank."""
        micro = self.config.train.micro_batch_size
        described = []
        for index, loss in enumerate(losses):
            rows = batch.rows[index * micro : (index + 1) * micro]
            numbers = np.array2string(rows, separator=", ", threshold=64)
            text = (
                f"rank {self.engine.ranks.rank}: mlm_loss {float(loss.mlm_loss)}, "
                f"disc_loss {float(loss.disc_loss)} in rows {numbers}"
            )
            described.append((float(loss.total), text))
        return described

    # ------------------------------------------------------------------------------------- logging

    def _say_batch_size(self, batch: StepBatch, state: TrainingState) -> None:
        """Print the rows of the next steps when they are not those of the last one."""
        rows = self.schedule.sizes.rows(state.attempts)
        if rows != batch.global_rows:
            self.logger.say(
                f"step {state.step}  from here on a step is {rows:,} rows, before "
                f"{batch.global_rows:,} (train.batch_schedule)"
            )

    def _say_running(self, state: TrainingState) -> None:
        """Print the rate once, if the first log line takes longer than FIRST_LINE_SECONDS.

        It needs no other rank and does not wait for the device.
        """
        seconds = time.perf_counter() - self.timing.began
        if seconds > FIRST_LINE_SECONDS:
            every = self.config.logging.every
            seconds_left = seconds / self.timing.rows * self._rows_left(state)
            self.logger.running(state.step, seconds / self.timing.attempts, every, seconds_left)
            self._says_running = False

    def _rows_left(self, state: TrainingState) -> float:
        """Rows to the end of the run, those of later phases by their tokens."""
        last = last_position(state, self.schedule.sizes, self.schedule.end_step)
        return last - state.consumed_rows + self.schedule.rows_after

    def _record_pause(self, step: int, pause_seconds: float) -> None:
        self.timing.pause_seconds += pause_seconds
        self.logger.saved(step, pause_seconds)

    def _log(
        self, state: TrainingState, losses: list[Losses], lr: float, result: StepResult
    ) -> None:
        """Log the interval: losses averaged over it, rates of its last step. Collective.

        This waits for the device. Other steps do so only where DeepSpeed reads the gradient norm.
        """
        sums, counts, waits, tokens, last_disc = self._gather_interval(losses)
        mlm, disc, steps = sums.tolist()
        timing, now = self.timing, time.perf_counter()
        seconds = now - timing.began
        gen_weight, disc_weight = self.config.objective.loss_weights
        of_counts = rates(counts)
        values = {
            "loss": (gen_weight * mlm + disc_weight * disc) / steps,
            "mlm_loss": mlm / steps,
            "disc_loss": disc / steps,
            # Both of the last step: the share of replaced tokens differs between steps.
            "disc_gain": entropy(of_counts["replaced_fraction"]) - last_disc,
            **of_counts,
            "lr": lr,
            "grad_norm": float(result.grad_norm),
            "loss_scale": result.loss_scale,
            "skipped_steps": float(state.skipped),
            "tokens": float(state.tokens),
            "epoch": state.consumed_rows / self.schedule.epoch_rows,
            "tokens_per_second": tokens / seconds,
            "data_wait_share": float(waits.max()) / seconds,  # all ranks wait for the slowest
            "checkpoint_pause_seconds": timing.pause_seconds,
            "seconds": time.monotonic() - self.began,
        }
        seconds_left = seconds / timing.rows * self._rows_left(state)
        values = metrics_of_kind(values, self.config.objective)
        is_new = self.verdict.add(state.step, values)
        text = ""
        if self.config.objective.detects:
            values |= self.verdict.verdict.to_metrics()
            text = str(self.verdict.verdict)
        self.logger.train(state.step, values, seconds_left, text)
        if is_new or self.verdict.verdict.word == COLLAPSED:
            self._report_verdict(state.step)
        if values["data_wait_share"] > WAIT_SHARE:
            self.logger.say(
                f"WARNING: rank {int(waits.argmax())} waited for data in "
                f"{values['data_wait_share']:.0%} of the time since the last line: stage the data "
                "on local disks, or give each rank one more CPU core"
            )
        self.sums.reset()
        self.timing = Timing(now)

    def _report_verdict(self, step: int) -> None:
        """Print what helps, once for each word. Raises RunFailure on every rank to end the run."""
        word = self.verdict.verdict.word
        text = advice(word, self.config)
        if text and word not in self._advised:
            self.logger.say(f"step {step}  {word}: {text}")
            self._advised.add(word)
        if word == COLLAPSED and self.config.train.on_collapse == "stop":
            raise RunFailure(
                f"step {step}: {word} (train.on_collapse = stop): {text}; last checkpoint: "
                f"{self.checkpointer.last_checkpoint()}"
            )

    def _gather_interval(self, losses: list[Losses]) -> tuple[Tensor, Counts, Tensor, float, float]:
        """Return sums over all ranks: losses and steps [3], counts, wait seconds, tokens, disc_loss.

        The wait seconds are those of each rank, [world_size]; disc_loss is that of the last step.
        Collective.
        """
        counts = sum(loss.counts.to_vector() for loss in losses if loss.counts is not None)
        assert isinstance(counts, Tensor)
        disc_loss = float(sum(loss.disc_loss for loss in losses))
        numbers = [self.timing.wait_seconds, float(self.timing.tokens), disc_loss]
        timed = torch.tensor(numbers, dtype=torch.float64)
        own = torch.cat([self.sums.values.cpu(), timed, counts.cpu()])
        per_rank = torch.stack(self.engine.control.all_gather(own))
        total = per_rank.sum(0)
        counted = Counts.from_vector(total[6:])
        return total[:3], counted, per_rank[:, 3], float(total[4]), float(total[5])
