"""Fine-tuning of one task with one seed: training steps, epochs, scores, files.

DIR/TASK/seed-N/result.json             written last; marks a finished seed
DIR/TASK/seed-N/predictions-SPLIT.tsv   predictions of each split except train
DIR/TASK/seed-N/predictions-SPLIT.json  the same in the official shape, for questions; null_odds-*.json
DIR/TASK/seed-N/model, tokenizer        the fine-tuned model, if train.keep keeps it
DIR/TASK/seed-N/ckpt                    checkpoints of an unfinished seed, every SAVE_SECONDS
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from electra_ds.cluster.launchers import Ranks
from electra_ds.cluster.stop_signals import on_stop_signal
from electra_ds.common.files import write_bytes
from electra_ds.common.json_files import write_json
from electra_ds.common.own_folder import own_path, remove_own
from electra_ds.config.schema import CheckpointConfig
from electra_ds.finetuning.answer_metrics import BEST_F1_THRESHOLD
from electra_ds.finetuning.answers import answer_files
from electra_ds.finetuning.batches import Encoded, TaskBatch, epoch_batches, micro_batches
from electra_ds.finetuning.config import FinetuneConfig
from electra_ds.finetuning.examples import Example
from electra_ds.finetuning.model import TaskLoss, TaskTotals, layerwise
from electra_ds.finetuning.predict import (
    Predictions,
    classifier,
    predict_split,
    predictions_table,
)
from electra_ds.finetuning.report import best_seed, read_results, write_report
from electra_ds.finetuning.tasks import Task
from electra_ds.interop.load_model import Pretrained
from electra_ds.model.weights import load_true_state, true_rows
from electra_ds.training import checkpoint, checkpointer
from electra_ds.training.checkpointer import Checkpointer
from electra_ds.training.collectives import on_rank0
from electra_ds.training.engine import Engine, StepResult
from electra_ds.training.loss_sums import LossSums
from electra_ds.training.schedule import linear
from electra_ds.training.state import TrainingState
from electra_ds.training.trainer import Trainer

SAVE_SECONDS = 60.0  # between two checkpoints of a seed

Scores = dict[str, float]


class Suite(NamedTuple):
    """Values that all seeds of a suite share.

    pretrained: the encoder and tokenizer to start from. random_init: ignore its weights. out: DIR.
    """

    config: FinetuneConfig
    pretrained: Pretrained
    random_init: bool
    out: Path
    ranks: Ranks
    device: torch.device


class Splits(NamedTuple):
    """The examples of a task by split, as read and as encoded.

    encoded["train"] also has the pairs in the other order if the task trains on both orders.
    """

    examples: dict[str, list[Example]]
    encoded: dict[str, list[Encoded]]


class TaskStep(NamedTuple):
    """This rank's part of one global batch."""

    examples: np.ndarray  # [<= global batch size] numbers of all examples of the global batch
    micro_batches: list[TaskBatch]
    first_rows: list[int]  # first example of each micro-batch over all attempts; seeds its dropout
    label_count: int  # scored labels of this rank


class Stopped(Exception):
    """Raised after a stop signal, when the state is saved."""


def seed_folder(out: Path, task: Task, seed: int) -> Path:
    """Return the folder of a seed, DIR/TASK/seed-N. out: DIR."""
    return out / task.name / f"seed-{seed}"


def check_seed_folder(out: Path, task: Task, seed: int) -> None:
    """Raise UserError when the folder of a seed, or one that it contains, is a link out of DIR."""
    names = seed_folder(out, task, seed).relative_to(out).parts
    for name in ("ckpt", "model", "tokenizer"):
        own_path(out, *names, name)


class SeedRun(Trainer):
    """Training of one task with one seed on this rank. splits: the examples of the task.

    null_threshold: that of questions without an answer, once a dev split has tuned it.
    """

    null_threshold: float | None = None

    def __init__(self, suite: Suite, task: Task, splits: Splits, seed: int):
        self.suite = suite
        self.task = task
        self.splits = splits
        self.seed = seed
        self.config = suite.config.of(task.name, task.epochs, seed, suite.ranks.world_size)
        self.folder = seed_folder(suite.out, task, seed)
        self.pad_id = suite.pretrained.tokenizer.special_ids.pad
        self.lengths = np.array([len(example.ids) for example in splits.encoded["train"]])
        self.epoch_steps = math.ceil(len(self.lengths) / self.config.train.global_batch_size)
        self.total_steps = max(1, round(self.config.train.epochs * self.epoch_steps))
        self.is_rank0 = suite.ranks.rank == 0
        self.stop_requested = False

    def fit(self) -> None:
        """Train from the start or from a checkpoint, score, and write all files. Collective.

        Raises Stopped after a signal, when the state of the seed is saved.
        """
        began = time.monotonic()
        self.engine = self._make_engine()
        self.true_rows = true_rows(self.engine.module)
        self.checkpointer = Checkpointer(
            self.engine,
            self.folder / "ckpt",
            CheckpointConfig(asynchronous=False),
            self._facts({}),
            self.true_rows,
        )
        on_stop_signal(self._request_stop)
        state = self._resume()
        self.batches = self._steps(state.attempts)
        state = self.run(state)
        if self.stop_voted:
            self._stop(state)
        scores = {} if self._has_diverged(state) else self._finish(state)
        result = self._result(state, scores, time.monotonic() - began)
        if self.is_rank0:
            self._write_result(result)
        self.engine.close()

    def _request_stop(self, _reason: str) -> None:
        self.stop_requested = True

    def _make_engine(self) -> Engine:
        suite, train = self.suite, self.config.train
        dropout = dict.fromkeys(suite.pretrained.model.dropout_fields(), train.dropout)
        self.model = suite.pretrained.model.model_copy(update=dropout)
        weights = None if suite.random_init else suite.pretrained.state
        module = classifier(self.model, self.task).start(self.model, weights, self.seed)
        scale = layerwise(self.model.num_layers, self.config.optimizer.layerwise_lr_decay)
        engine_config = suite.config.engine
        assert isinstance(engine_config, dict)
        return Engine(module, self.config, engine_config, suite.ranks, suite.device, scale)

    def _resume(self) -> TrainingState:
        self.saved_at = time.monotonic()
        found = checkpoint.latest_on_rank0(self.folder / "ckpt")
        state = TrainingState()
        if found is not None:
            state = checkpoint.load(self.engine, found, self.true_rows).state
        elif self.is_rank0:  # the seed starts again: remove the model of an earlier attempt
            remove_own(self.folder, "model")
        device = self.suite.device
        self.sums = LossSums(1, self.suite.ranks, device, state.interval)  # of this epoch
        return state

    # ------------------------------------------------------------------------------- the loop

    def _steps(self, attempts: int) -> Iterator[TaskStep]:
        """Yield batches without end, beginning after `attempts` attempted steps."""
        batch_size = self.config.train.global_batch_size
        while True:
            epoch, first = divmod(attempts, self.epoch_steps)
            for batch in epoch_batches(self.lengths, batch_size, self.seed, epoch)[first:]:
                yield self._step(batch, attempts)
                attempts += 1

    def _step(self, batch: np.ndarray, attempts: int) -> TaskStep:
        """Return this rank's part of a global batch.

        batch: [<= global batch size] example numbers. attempts: attempted steps before this one.
        """
        train, accumulation = self.config.train, self.engine.accumulation
        share = train.micro_batch_size * accumulation
        first = self.suite.ranks.rank * share
        own = micro_batches(
            batch[first : first + share],
            train.micro_batch_size,
            accumulation,
            self.splits.encoded["train"],
            self.pad_id,
            self.task.kind,
            train.batching == "packed",
        )
        first_row = attempts * train.global_batch_size + first
        first_rows = [first_row + i * train.micro_batch_size for i in range(accumulation)]
        label_count = sum(int(micro_batch.weights.sum()) for micro_batch in own)
        return TaskStep(batch, own, first_rows, label_count)

    def totals(self, batch: TaskStep) -> TaskTotals:
        """Return the number of scored labels of this rank."""
        return TaskTotals(batch.label_count)

    def is_finished(self, state: TrainingState) -> bool:
        """Return whether all steps were attempted, or too many in a row were skipped."""
        return state.attempts >= self.total_steps or self._has_diverged(state)

    def _has_diverged(self, state: TrainingState) -> bool:
        return state.skipped_in_a_row > self.config.train.max_skipped_steps

    def should_stop(self, state: TrainingState) -> bool:
        """Return whether this rank received a stop signal."""
        return self.stop_requested

    def should_save(self, state: TrainingState) -> bool:
        """Return whether the last checkpoint is older than SAVE_SECONDS; False on ranks > 0."""
        return self.is_rank0 and time.monotonic() - self.saved_at > SAVE_SECONDS

    def learning_rate(self, state: TrainingState) -> float:
        """Return the learning rate: linear warmup and decay as a function of the applied steps."""
        options = self.config.optimizer
        warmup_steps = round(options.warmup_fraction * self.total_steps)
        return linear(options.peak_lr, warmup_steps, state.step, self.total_steps)

    def snapshot(self, state: TrainingState) -> TrainingState:
        """Return the state with the loss sums of each rank in this epoch. Collective."""
        self.saved_at = time.monotonic()
        return replace(state, interval=self.sums.per_rank(self.engine.control))

    def after_attempt(
        self,
        state: TrainingState,
        batch: TaskStep,
        totals: TaskTotals,
        losses: list[TaskLoss],
        lr: float,
        result: StepResult,
    ) -> TrainingState:
        """Count the attempt; at the end of an epoch, print the loss and keep the best model."""
        if state.attempts % self.epoch_steps == 0:
            self.sums.reset()
        if result.applied:
            self.sums.add_step([sum(loss.total for loss in losses).reshape(1)])  # type: ignore[union-attr]
        state = state.advanced(result.applied)
        is_epoch_end = state.attempts % self.epoch_steps == 0
        if is_epoch_end or state.attempts == self.total_steps:
            self._after_epoch(state)
        return state

    def _after_epoch(self, state: TrainingState) -> None:
        """Print the mean loss; keep the model if the config selects the best epoch. Collective."""
        loss = self._mean_loss()
        self._print(f"step {state.attempts}/{self.total_steps} loss {loss:.4f}")
        if self.config.train.select != "best":
            return
        kept = self.folder / "model"
        metric, split = self.task.main_metric, self.task.valid_splits[0]

        def kept_scores() -> Scores | None:
            if not kept.exists():
                return None
            found = checkpoint.read_meta(kept).config.get("scores", {})
            scores = found.get(split, found)  # earlier versions did not name the split
            return scores if metric in scores else None

        predictions = self._predict(split)
        scores = predictions.scores
        if not predictions.is_finite or not math.isfinite(scores[metric]):
            return
        before = on_rank0(kept_scores)
        if before is None or scores[metric] > before[metric]:
            self._save_model(state, {split: scores})

    def _mean_loss(self) -> float:
        """Return the mean loss of the epoch over all ranks. Collective."""
        return self.sums.means(self.engine.control)[0]

    def _stop(self, state: TrainingState) -> None:
        self.checkpointer.save(self.snapshot(state))
        self._print("stopped and saved; the same command resumes it")
        self.engine.close()
        raise Stopped

    def _print(self, text: str) -> None:
        if self.is_rank0:
            print(f"{self.task.name} seed {self.seed}: {text}", flush=True)

    # --------------------------------------------------------------------- scores and results

    def _finish(self, state: TrainingState) -> dict[str, Scores]:
        """Return the scores of all labelled splits except train. Collective.

        Writes the predictions of each split, then the model. Returns {} and writes no more files
        without an applied step, and after the first split with logits that are not finite.
        """
        if state.step == 0:
            return {}
        if self.config.train.select == "best":
            if not on_rank0((self.folder / "model").exists):  # no epoch had a finite score
                return {}
            checkpoint.load(self.engine, self.folder / "model", self.true_rows, weights_only=True)
        scores = {}
        # The first dev split tunes the null threshold of the others.
        for split in sorted(self.task.splits, key=lambda split: not split.startswith("valid")):
            if split == "train":
                continue
            predictions = self._predict(split)
            if not predictions.is_finite:
                return {}
            if predictions.scores:
                scores[split] = predictions.scores
            if self.null_threshold is None:
                self.null_threshold = predictions.scores.get(BEST_F1_THRESHOLD)
            if self.is_rank0:
                self._write_predictions(split, predictions)
        if self.config.train.keep != "none" and self.config.train.select == "last":
            self._save_model(state, scores)
        return scores

    def _write_predictions(self, split: str, predictions: Predictions) -> None:
        examples, values = self.splits.examples[split], predictions.values
        table = predictions_table(self.task, examples, values, predictions.logits)
        files = {f"predictions-{split}.tsv": table}
        if self.task.kind == "question_answering":
            files |= answer_files(self.task, split, examples, values)
        for name, content in files.items():
            write_bytes(self.folder / name, content)

    def _predict(self, split: str) -> Predictions:
        """Return the predictions and scores of a split. Collective.

        They are computed in fp32 for every precision of the engine, so that `predict` and exported
        models give the same values.
        """
        engine = self.engine
        weights = {
            name: engine.full_tensor(name, "master")[: self.true_rows.get(name)].cpu()
            for name in engine.parameters
        }
        module = classifier(self.model, self.task)
        load_true_state(module, weights)
        module.to(engine.device).eval()
        return predict_split(
            module,
            self.task,
            self.splits.examples[split],
            self.splits.encoded[split],
            self.pad_id,
            self.suite.ranks,
            engine.control.all_gather_object,
            threshold=self.null_threshold,
        )

    def _save_model(self, state: TrainingState, scores: Any) -> None:
        if self.is_rank0:  # before the model, so that every model has a tokenizer
            self.suite.pretrained.tokenizer.save(self.folder / "tokenizer")
        facts = self._facts(scores)
        checkpointer.save(
            self.engine, self.folder, "model", state, facts, self.true_rows, weights_only=True
        )

    def _facts(self, scores: Any) -> dict[str, Any]:
        """Return the config for meta.json, with all values that `predict` and `export` need."""
        return self.config.model_dump(mode="json") | {
            "model": self.model.model_dump(mode="json"),
            "task": self.task.model_dump(mode="json"),
            "scores": scores,
            "tokenizer": self.suite.pretrained.tokenizer.fingerprint,
            "trained_length": self.suite.pretrained.trained_length,
        }

    def _result(
        self, state: TrainingState, scores: dict[str, Scores], seconds: float
    ) -> dict[str, Any]:
        """Return the content of result.json. Collective.

        A seed without scores, or with a score that is not finite, has diverged.
        """
        values = [value for split in scores.values() for value in split.values()]
        diverged = not scores or not all(map(math.isfinite, values))
        origin = self.suite.pretrained.origin
        loss = None if diverged else self._mean_loss()
        return {
            "task": self.task.name,
            "seed": self.seed,
            "status": "diverged" if diverged else "done",
            "selected": "best epoch on dev" if self.config.train.select == "best" else "last",
            "epochs": self.config.train.epochs,
            "steps": state.step,
            "skipped": state.skipped,
            "train_loss": loss if loss is not None and math.isfinite(loss) else None,
            "origin": "random initialisation" if self.suite.random_init else origin,
            "scores": {} if diverged else scores,
            "seconds": round(seconds, 1),
        }

    def _write_result(self, result: dict[str, Any]) -> None:
        write_json(self.folder / "result.json", result)
        remove_own(self.folder, "ckpt")
        prune_models(self.suite.out / self.task.name, self.config.train.keep)
        write_report(self.suite.out)
        scores = [
            f"{split} {name} {value:.4f}"
            for split, values in result["scores"].items()
            for name, value in values.items()
        ]
        self._print(", ".join([result["status"], *scores]))


def prune_models(folder: Path, keep: str) -> None:
    """Remove the models of finished seeds that `keep` does not name. folder: DIR/TASK.

    keep: best (the model of the best seed on dev), all, or none. The model of a diverged seed is
    always removed.
    """
    seeds = read_results(folder.parent)[folder.name]
    done = {seed for seed, result in seeds.items() if result and result.status == "done"}
    best = best_seed(seeds)
    kept = {"all": done, "best": {best[0]} if best else set(), "none": set()}[keep]
    for seed, result in seeds.items():
        if result and seed not in kept:
            remove_own(folder, f"seed-{seed}", "model")
