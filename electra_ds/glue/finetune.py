"""The verb finetune: for each task and seed, train a head on a pretrained encoder, score, predict, keep; then report.

DIR/config.json                     the suite
DIR/rte/seed-0/result.json          written last: a seed with one is finished
DIR/rte/seed-0/predictions-test.tsv
DIR/rte/seed-0/model, tokenizer     the fine-tuned model (train.keep says whose)
DIR/rte/seed-0/ckpt                 of an unfinished seed, at an epoch's end
DIR/report.json, report.md
"""

import hashlib
import math
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from electra_ds import checkpoint
from electra_ds.checkpoint import Progress
from electra_ds.config import CheckpointConfig, differences, load_engine, parse_config
from electra_ds.engine import Engine, from_first, leave, start
from electra_ds.errors import UserError
from electra_ds.files import read_json, write_json
from electra_ds.glue.batches import Encoded, encode, epoch_batches, micro_batches, swapped
from electra_ds.glue.classifier import layerwise
from electra_ds.glue.config import FinetuneConfig
from electra_ds.glue.examples import Example, read_examples
from electra_ds.glue.metrics import score
from electra_ds.glue.predict import classifier, logits_of, predictions_of, write_predictions
from electra_ds.glue.report import best_seed, read_results, write_report
from electra_ds.glue.tasks import Task, load_task
from electra_ds.model import padded_rows
from electra_ds.optim import learning_rate
from electra_ds.pretrained import Pretrained, load_pretrained
from electra_ds.ranks import Ranks
from electra_ds.run_folder import provenance

SAVE_SECONDS = 60.0  # a seed that takes longer is saved at its epochs' ends


class Suite(NamedTuple):
    """What all seeds of a fine-tuning share."""

    config: FinetuneConfig
    pretrained: Pretrained
    random_init: bool
    out: Path
    ranks: Ranks
    device: torch.device


class Splits(NamedTuple):
    """A task's examples as read and as encoded, by split; `train` holds both orders where the task wants them."""

    examples: dict[str, list[Example]]
    encoded: dict[str, list[Encoded]]


def finetune(
    config: FinetuneConfig, model: Path, jobs: list[tuple[str, int]], data: Path | None, out: Path, ranks: Ranks,
    random_init: bool = False,
) -> dict:  # fmt: skip
    """Run every (task, seed) of jobs that has no result yet; returns the report on all of `out`.

    model: what `load_pretrained` reads. data: the GLUE root, or a task's own folder. random_init: the same budget
    from random weights, for comparison. Raises UserError for bad data, or an `out` of another suite.
    """
    device = start(ranks, config.train.timeout_minutes)
    report = finetune_among(config, model, jobs, data, out, ranks, device, random_init)
    leave()
    return report


def finetune_among(
    config: FinetuneConfig, model: Path, jobs: list[tuple[str, int]], data: Path | None, out: Path, ranks: Ranks,
    device: torch.device, random_init: bool = False,
) -> dict:  # fmt: skip
    """`finetune` among ranks that have met."""
    config = config.model_copy(update={"engine": load_engine(config.engine)})
    suite = Suite(config, load_pretrained(model), random_init, out, ranks, device)
    tasks = {name: load_task(name, data) for name in dict.fromkeys(name for name, _ in jobs)}
    _open(suite)
    for name, task in tasks.items():
        seeds = [seed for job, seed in jobs if job == name]
        left = from_first([seed for seed in seeds if not (_folder(out, task, seed) / "result.json").exists()])
        if not left:
            continue
        splits = _read(task, config.of(task.name, task.epochs, 0).train.max_length, suite.pretrained)
        for seed in left:
            Seed(suite, task, splits, seed).run()
    return write_report(out) if ranks.rank == 0 else {}


def _folder(out: Path, task: Task, seed: int) -> Path:
    return out / task.name / f"seed-{seed}"


def _open(suite: Suite) -> None:
    """Write DIR/config.json, or compare it: one folder holds one suite."""
    digest = hashlib.sha256()
    for name, tensor in sorted(suite.pretrained.state.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    origin = {"weights": "random" if suite.random_init else digest.hexdigest(), "model": suite.pretrained.origin}
    path = suite.out / "config.json"
    if from_first(path.exists()):
        found = read_json(path, "a fine-tuning's config")
        science, _ = differences(parse_config(found, str(path), FinetuneConfig), suite.config)
        before = found["provenance"]
        if before["weights"] != origin["weights"]:
            science.insert(0, f"weights: {before['model']} -> {origin['model']}")
        if science:
            differ = "; ".join(science)
            raise UserError(f"{suite.out} holds another fine-tuning: {differ}. Take the old values, or another --out")
    elif suite.ranks.rank == 0:
        suite.out.mkdir(parents=True, exist_ok=True)
        write_json(path, suite.config.model_dump(mode="json") | {"provenance": provenance("") | origin})


def _read(task: Task, max_length: int, pretrained: Pretrained) -> Splits:
    examples = {split: read_examples(task, split) for split in task.splits}
    if "train" not in examples:
        raise UserError(f"{task.name}: no training file; it is for predictions alone")
    encoded = {}
    for split, found in examples.items():
        found = found + swapped(found) if split == "train" and task.both_orders else found
        encoded[split] = encode(found, task, pretrained.tokenizer, max_length)
    return Splits(examples, encoded)


class Seed:
    """One task with one seed on this rank."""

    def __init__(self, suite: Suite, task: Task, splits: Splits, seed: int):
        self.suite, self.task, self.splits, self.seed = suite, task, splits, seed
        self.config = suite.config.of(task.name, task.epochs, seed)
        self.folder = _folder(suite.out, task, seed)
        self.pad_id = suite.pretrained.tokenizer.special_ids.pad
        self.lengths = np.array([len(example.ids) for example in splits.encoded["train"]])
        steps = math.ceil(len(self.lengths) / self.config.train.global_batch_size)
        self.total_steps = max(1, round(self.config.train.epochs * steps))
        self.is_first = suite.ranks.rank == 0

    def run(self) -> None:
        """Train (from the last saved epoch), score, write everything, result.json last."""
        began = time.monotonic()
        self.engine = self._engine()
        self.padded = padded_rows(self.engine.module)
        progress, loss = self._resume(), math.nan
        while progress.step < self.total_steps:
            progress, loss = self._epoch(progress)
            if math.isnan(loss):
                break
            self._after_epoch(progress, loss)
        diverged = math.isnan(loss)
        result = {
            "task": self.task.name, "seed": self.seed, "status": "diverged" if diverged else "done",
            "selected": "best epoch on dev" if self.config.train.select == "best" else "last",
            "epochs": self.config.train.epochs, "steps": progress.step, "train_loss": None if diverged else loss,
            "origin": "random initialisation" if self.suite.random_init else self.suite.pretrained.origin, "scores": {},
        }  # fmt: skip
        if not diverged:
            result["scores"] = self._finish(progress)
        if self.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "result.json", result | {"seconds": round(time.monotonic() - began, 1)})
            shutil.rmtree(self.folder / "ckpt", ignore_errors=True)
            prune_models(self.suite.out / self.task.name, self.config.train.keep)
            print(f"{self.task.name} seed {self.seed}: {_line(result)}", flush=True)
        self.engine.close()

    def _engine(self) -> Engine:
        suite, train = self.suite, self.config.train
        dropout = {"hidden_dropout": train.dropout, "attention_dropout": train.dropout}
        self.model = suite.pretrained.model.model_copy(update=dropout)
        state = None if suite.random_init else suite.pretrained.state
        module = classifier(self.model, self.task).start(self.model, state, self.seed)
        scale = layerwise(self.model.num_layers, self.config.optimizer.layerwise_lr_decay)
        return Engine(module, self.config, suite.config.engine, suite.ranks, suite.device, scale)

    def _resume(self) -> Progress:
        found = from_first(checkpoint.latest(self.folder / "ckpt"))
        self.saved = time.monotonic()
        return checkpoint.load(self.engine, found, self.padded).progress if found else Progress()

    # ------------------------------------------------------------------------------------------------------- training

    def _epoch(self, progress: Progress) -> tuple[Progress, float]:
        """One pass over the examples, or what is left of the schedule; (progress, mean loss), nan when it diverged."""
        train, options, engine = self.config.train, self.config.optimizer, self.engine
        batches = epoch_batches(self.lengths, train.global_batch_size, self.seed, progress.data.get("epoch", 0))
        batches = batches[: self.total_steps - progress.step]
        warmup, lost, skipped = round(options.warmup_fraction * self.total_steps), [], 0
        for step, batch in enumerate(batches, progress.step):
            micros, positions, count = self._micros(batch, step)
            lost += [result.total for result in engine.forward_backward(micros, positions, (count,))]
            lr = learning_rate(options.peak_lr, warmup, step, self.total_steps)
            skipped = 0 if engine.step(lr).applied else skipped + 1
            if skipped > train.max_skipped_steps:
                return progress, math.nan
        data = {"epoch": progress.data.get("epoch", 0) + 1}
        return Progress(step=progress.step + len(batches), data=data), float(engine.sum(sum(lost))) / len(batches)

    def _micros(self, batch: np.ndarray, step: int):
        """This rank's micro-batches of a global batch, the position of each, and the labels in the whole batch."""
        train, accumulation = self.config.train, self.engine.accumulation
        examples, share = self.splits.encoded["train"], train.micro_batch_size * accumulation
        first = self.suite.ranks.rank * share
        mine = batch[first : first + share]
        micros = micro_batches(mine, train.micro_batch_size, accumulation, examples, self.pad_id, self.task.kind)
        positions = [step * train.global_batch_size + first + i * train.micro_batch_size for i in range(accumulation)]
        labels = (examples[i].label for i in batch)
        count = sum(sum(v >= 0 for v in label) if isinstance(label, list) else 1 for label in labels)
        return micros, positions, max(1, count)

    def _after_epoch(self, progress: Progress, loss: float) -> None:
        """Keep the best epoch where the config asks for it; save a long seed so that it can go on from here."""
        if self.config.train.select == "best":
            metric, scores = self.task.main_metric, self._score(self.task.valid_splits[0])[0]
            before = from_first(_scores(self.folder / "model"))
            if before is None or scores[metric] > before[metric]:
                self._save_model(progress, scores)
        if progress.step < self.total_steps and from_first(time.monotonic() - self.saved > SAVE_SECONDS):
            folder, self.saved = self.folder / "ckpt", time.monotonic()
            checkpoint.save(self.engine, folder, str(progress.step), progress, self._facts({}), self.padded)
            if self.is_first:
                checkpoint.prune(folder, CheckpointConfig(), progress.step)
        if self.is_first:
            place = f"step {progress.step}/{self.total_steps}"
            print(f"{self.task.name} seed {self.seed}: {place} loss {loss:.4f}", flush=True)

    # -------------------------------------------------------------------------------------------------------- scoring

    def _finish(self, progress: Progress) -> dict[str, dict[str, float]]:
        """Scores of the dev splits; the predictions of every split but train, and the model, are written."""
        if self.config.train.select == "best":
            checkpoint.load(self.engine, self.folder / "model", self.padded, weights_only=True)
        scores = {}
        for split in self.task.splits:
            if split == "train":
                continue
            found, predictions, logits = self._score(split)
            if found:
                scores[split] = found
            if self.is_first:
                path = self.folder / f"predictions-{split}.tsv"
                write_predictions(path, self.task, self.splits.examples[split], predictions, logits)
        if self.config.train.keep != "none" and self.config.train.select == "last":
            self._save_model(progress, scores)
        return scores

    def _score(self, split: str) -> tuple[dict[str, float], list, list[np.ndarray]]:
        examples, encoded = self.splits.examples[split], self.splits.encoded[split]
        ranks, engine = self.suite.ranks, self.engine
        with engine.evaluating(autocast=False) as module:  # as `predict` and exported models do
            logits = logits_of(module, self.task.kind, encoded, self.pad_id, engine.to_device, ranks, engine.exchange)
        predictions = predictions_of(self.task, examples, encoded, logits)
        labelled = all(example.label is not None for example in examples)
        return score(self.task, predictions, examples) if labelled else {}, predictions, logits

    def _save_model(self, progress: Progress, scores: dict) -> None:
        facts = self._facts(scores)
        checkpoint.save(self.engine, self.folder, "model", progress, facts, self.padded, weights_only=True)
        if self.is_first:
            self.suite.pretrained.tokenizer.save(self.folder / "tokenizer")

    def _facts(self, scores: dict) -> dict[str, Any]:
        """What meta.json says beside the tensors: enough to predict with and to export."""
        own = {"model": self.model.model_dump(mode="json"), "task": self.task.model_dump(mode="json"), "scores": scores}
        return self.config.model_dump(mode="json") | own


def _line(result: dict) -> str:
    """A seed's result for people."""
    found = [f"{split} {metric} {value:.4f}" for split, scores in result["scores"].items()
             for metric, value in scores.items()]  # fmt: skip
    return ", ".join([result["status"], *found])


def _scores(model: Path) -> dict | None:
    return checkpoint.read_meta(model).config["scores"] if model.exists() else None


def prune_models(folder: Path, keep: str) -> None:
    """Under keep = best, remove the models of all seeds of DIR/TASK but the one with the best dev score."""
    best = best_seed(read_results(folder.parent)[folder.name])
    for model in folder.glob("seed-*/model"):
        finished = (model.parent / "result.json").exists()
        if finished and (keep == "none" or (keep == "best" and best and model.parent.name != f"seed-{best[0]}")):
            shutil.rmtree(model, ignore_errors=True)
