"""The training loop, shared by pretraining and fine-tuning."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from electra_ds.training.checkpointer import Checkpointer
from electra_ds.training.engine import Engine, StepResult
from electra_ds.training.state import TrainingState


class Trainer(ABC):
    """The loop over optimizer steps.

    A subclass provides the batches, the schedule, the requests to stop, and the work after a step.
    Every rank runs the same loop. All decisions depend on votes or on values that are equal on all
    ranks.

    batches: endless; each has `micro_batches`, NamedTuples of tensors, and `first_rows`.
    refuses: see `Engine.forward_backward`.
    """

    engine: Engine
    checkpointer: Checkpointer
    batches: Iterator[Any]
    refuses: Callable[[float], bool] | None = None
    stop_voted = False  # whether the last `run` ended by a vote

    def run(self, state: TrainingState) -> TrainingState:
        """Train from `state` until `is_finished` or a vote to stop. Returns the last state.

        The last state is not saved here. Collective.
        """
        engine = self.engine
        batch = next(self.batches)
        self._send_votes(batch, state)
        while True:
            votes = engine.control.wait_votes()
            self.checkpointer.commit_if_written(votes)
            if votes.save:
                self.checkpointer.save(self.snapshot(state))
            if votes.stop or self.is_finished(state):
                self.stop_voted = votes.stop > 0
                return state
            losses = engine.forward_backward(
                batch.micro_batches,
                batch.first_rows,
                votes.totals,
                self.refuses,
                **self.forward_options(state),
            )
            next_batch = next(self.batches)
            self._send_votes(next_batch, state)  # travels during the optimizer step
            lr = self.learning_rate(state)
            result = engine.step(lr)
            state = self.after_attempt(state, batch, votes.totals, losses, lr, result)
            batch = next_batch

    def _send_votes(self, batch: Any, state: TrainingState) -> None:
        self.engine.control.send_votes(
            self.totals(batch),
            stop=self.should_stop(state),
            save=self.should_save(state),
            written=self.checkpointer.is_written(),
        )

    @abstractmethod
    def totals(self, batch: Any) -> tuple:
        """This rank's counts of a batch: a NamedTuple of integers, summed over the ranks."""

    @abstractmethod
    def is_finished(self, state: TrainingState) -> bool:
        """Return whether this was the last step. The result must be equal on all ranks."""

    @abstractmethod
    def should_stop(self, state: TrainingState) -> bool:
        """Whether this rank asks to save and stop."""

    @abstractmethod
    def should_save(self, state: TrainingState) -> bool:
        """Whether this rank asks to save."""

    def forward_options(self, state: TrainingState) -> dict[str, Any]:
        """Options of the module's forward in the next step."""
        return {}

    @abstractmethod
    def learning_rate(self, state: TrainingState) -> float:
        """Learning rate of the next step, before the factors of the parameter groups."""

    @abstractmethod
    def snapshot(self, state: TrainingState) -> TrainingState:
        """The state as it is saved, with the sums of the open interval. Collective."""

    @abstractmethod
    def after_attempt(
        self,
        state: TrainingState,
        batch: Any,
        totals: Any,
        losses: list[Any],
        lr: float,
        result: StepResult,
    ) -> TrainingState:
        """The state after an attempt; logs, evaluates and saves when due.

        state: before the attempt. totals: counts of the whole global batch. losses: one per
        micro-batch of this rank. lr: the learning rate of the step.
        """
