"""The verb finetune: for each task and seed, train a head on a pretrained encoder, score, predict, keep; then report.

DIR/config.json                     the suite
DIR/rte/task.json                   the task, and a fingerprint of its examples
DIR/rte/seed-0/result.json          written last: a seed with one is finished
DIR/rte/seed-0/predictions-test.tsv
DIR/rte/seed-0/model, tokenizer     the fine-tuned model (train.keep says whose)
DIR/rte/seed-0/ckpt                 of a seed that was stopped, or takes long
DIR/report.json, report.md
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from electra_ds.cluster.launchers import Ranks, alone
from electra_ds.cluster.run_folder import DONE, on_stop_signal, provenance, stop_exit_code
from electra_ds.cluster.watchdog import Watchdog
from electra_ds.common.errors import UserError
from electra_ds.common.files import read_json, write_json
from electra_ds.common.folder_lock import Lock
from electra_ds.common.suggestions import nearest
from electra_ds.config.engine_files import load_engine
from electra_ds.config.loading import differences, parse_config
from electra_ds.config.schema import CheckpointConfig
from electra_ds.finetuning.batches import (
    Encoded,
    TaskBatch,
    encode,
    epoch_batches,
    micro_batches,
    swapped,
)
from electra_ds.finetuning.config import FinetuneConfig
from electra_ds.finetuning.examples import Example, read_examples
from electra_ds.finetuning.metrics import score
from electra_ds.finetuning.model import layerwise
from electra_ds.finetuning.predict import classifier, logits_of, predictions_of, write_predictions
from electra_ds.finetuning.report import best_seed, read_results, write_report
from electra_ds.finetuning.tasks import GLUE, Task, glue_name, load_task
from electra_ds.interop.load_model import Pretrained, load_pretrained
from electra_ds.model.weights import load_true_state, padded_rows
from electra_ds.training import checkpoint, checkpointer
from electra_ds.training.engine import Engine, leave, on_rank0, start
from electra_ds.training.schedule import learning_rate
from electra_ds.training.state import Progress

SAVE_SECONDS = 60.0  # a seed that takes longer is saved now and then
LOOK_STEPS = 20  # steps between two looks at the clock and at what was asked


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


class Stopped(Exception):
    """Asked to stop; everything is saved."""


def finetune(
    config: FinetuneConfig,
    model: Path,
    names: list[str],
    seeds: int,
    data: Path | None,
    out: Path,
    ranks: Ranks,
    *,
    spread: bool = False,
    random_init: bool = False,
) -> int:
    """Run every task with every seed (from train.seed on) that has no result in `out` yet; the report is on all of it.

    model: what `load_pretrained` reads. names: for `load_task`, with data: the GLUE root, or a task's own folder.
    spread: each rank takes its share of the seeds, alone. random_init: the same budget from random weights, for
    comparison. Returns the exit code (0 done, 85 saved and stopped by a signal). Raises UserError for bad data,
    settings that do not fit, an `out` of another suite, or a seed that another process is at.
    """
    share = slice(ranks.rank, None, ranks.world_size) if spread else slice(None)
    ranks = alone(ranks) if spread else ranks
    train = config.train
    device = start(ranks, train.timeout_minutes)
    with Watchdog(ranks, train.silence_seconds, train.timeout_minutes, on_rank0):
        try:
            finetune_on_ranks(
                config,
                model,
                names,
                seeds,
                data,
                out,
                ranks,
                device,
                share=share,
                random_init=random_init,
            )
        except Stopped:
            return stop_exit_code()
    leave()
    return DONE


def finetune_on_ranks(
    config: FinetuneConfig,
    model: Path,
    names: list[str],
    seeds: int,
    data: Path | None,
    out: Path,
    ranks: Ranks,
    device: torch.device,
    *,
    share: slice = slice(None),
    random_init: bool = False,
) -> None:
    """`finetune` among ranks that have met; share: which of all (task, seed) are theirs. Raises Stopped on a signal."""
    config = config.model_copy(update={"engine": load_engine(config.engine)})
    suite = Suite(config, load_pretrained(model), random_init, out, ranks, device)
    tasks = [load_task(name, data) for name in names]
    _check(suite, tasks)
    _open(suite)
    jobs = [(task, config.train.seed + i) for task in tasks for i in range(seeds)][share]
    for task in tasks:
        own = [seed for other, seed in jobs if other is task]
        left = on_rank0(partial(_unfinished, out, task, own))
        splits = _read(suite, task) if left else None
        for seed in left:
            with Lock(
                _folder(out, task, seed), on_rank0
            ):  # other ranks and jobs have other seeds of this suite
                Seed(suite, task, splits, seed).run()
    if ranks.rank == 0 and any(out.glob("*/seed-*/result.json")):
        write_report(out)


def _unfinished(out: Path, task: Task, seeds: list[int]) -> list[int]:
    return [seed for seed in seeds if not (_folder(out, task, seed) / "result.json").exists()]


def _folder(out: Path, task: Task, seed: int) -> Path:
    return out / task.name / f"seed-{seed}"


def _check(suite: Suite, tasks: list[Task]) -> None:
    """Refuse what would fail, or would silently count for nothing, hours later."""
    config, model, names = suite.config, suite.pretrained.model, [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"--tasks holds two tasks named {twice[0]!r}: give one of them another name in its description"
        )
    known = [*GLUE, *names]
    if odd := [name for name in config.tasks if name not in known]:
        raise UserError(f"tasks.{odd[0]}: no task of that name{nearest(glue_name(odd[0]), known)}")
    for task in tasks:
        own = config.of(task.name, task.epochs, 0, suite.ranks.world_size)
        own.accumulation(suite.ranks.world_size)
        if own.train.max_length > model.max_positions:
            raise UserError(
                f"train.max_length = {own.train.max_length}, but the model has {model.max_positions} "
                f"positions: --set train.max_length={model.max_positions}"
            )
        if task.text_b is not None and model.type_vocab_size < 2:
            raise UserError(
                f"{task.name}: texts in pairs, but the model knows one segment only (type_vocab_size = 1)"
            )
        if "train" not in task.splits:
            raise UserError(
                f"{task.name}: no split train; it is for predictions alone (ax: by mnli's model)"
            )


def _open(suite: Suite) -> None:
    """Write DIR/config.json, or compare it: one folder holds one suite."""
    digest = hashlib.sha256(suite.pretrained.model.model_dump_json().encode())
    for name, tensor in sorted({} if suite.random_init else suite.pretrained.state.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    facts = {
        "weights": digest.hexdigest(),
        "model": suite.pretrained.origin,
        "random_init": suite.random_init,
    }

    def differs(found: dict) -> list[str]:
        before = found.get("provenance") or {}
        if "weights" not in before:
            raise UserError(f"--out {suite.out} holds a run of another kind; choose another folder")
        science, _ = differences(
            parse_config(found, f"{suite.out}/config.json", FinetuneConfig), suite.config
        )
        is_same = before["weights"] == facts["weights"]
        return science if is_same else [f"weights: {before['model']} -> {facts['model']}", *science]

    asked = suite.config.model_dump(mode="json") | {"provenance": provenance("") | facts}
    _settle(suite, "config.json", asked, differs)


def _read(suite: Suite, task: Task) -> Splits:
    """A task's examples; DIR/TASK/task.json is written, or compared: all its seeds see the same task and rows."""
    max_length = suite.config.of(task.name, task.epochs, 0).train.max_length
    examples = {split: read_examples(task, split) for split in task.splits}
    encoded = {}
    for split, found in examples.items():
        found = found + swapped(found) if split == "train" and task.both_orders else found
        encoded[split] = encode(found, task, suite.pretrained.tokenizer, max_length)
    digest = hashlib.sha256(
        json.dumps([examples["train"], examples[task.valid_splits[0]]]).encode()
    ).hexdigest()

    def differs(found: dict) -> list[str]:
        science, _ = differences(parse_config(found["task"], f"{task.name}/task.json", Task), task)
        return science or ["other examples in train or dev"] * (found["examples"] != digest)

    _settle(
        suite,
        f"{task.name}/task.json",
        {"task": task.model_dump(mode="json"), "examples": digest},
        differs,
    )
    return Splits(examples, encoded)


def _settle(suite: Suite, name: str, asked: dict, differs: Callable[[dict], list[str]]) -> None:
    """Write what was asked; where seeds have been trained already, it must be what they were. Collective."""
    path = suite.out / name

    def compare_and_write() -> None:
        listed = (
            "; ".join(differs(read_json(path, "an earlier attempt's settings")))
            if path.exists()
            else ""
        )
        trained = [*path.parent.rglob("seed-*/ckpt"), *path.parent.rglob("seed-*/result.json")]
        if listed and trained:
            raise UserError(
                f"{path} is of another fine-tuning: {listed}. Take the old values, or another --out"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asked)

    on_rank0(compare_and_write)


class Seed:
    """One task with one seed on this rank."""

    def __init__(self, suite: Suite, task: Task, splits: Splits, seed: int):
        self.suite, self.task, self.splits, self.seed = suite, task, splits, seed
        self.config = suite.config.of(task.name, task.epochs, seed, suite.ranks.world_size)
        self.folder = _folder(suite.out, task, seed)
        self.pad_id = suite.pretrained.tokenizer.special_ids.pad
        self.lengths = np.array([len(example.ids) for example in splits.encoded["train"]])
        self.epoch_steps = math.ceil(len(self.lengths) / self.config.train.global_batch_size)
        self.total_steps = max(1, round(self.config.train.epochs * self.epoch_steps))
        self.is_rank0 = suite.ranks.rank == 0
        self.asked_to_stop = False

    def run(self) -> None:
        """Train from the start or from what was saved, score, write everything, result.json last."""
        began = time.monotonic()
        self.engine = self._engine()
        self.padded = padded_rows(self.engine.module)
        on_stop_signal(self._ask_to_stop)
        progress = self._resume()
        while attempts(progress) < self.total_steps and not self._has_diverged(progress):
            progress = self._steps(progress)
            if attempts(progress) % self.epoch_steps == 0 or attempts(progress) == self.total_steps:
                self._after_epoch(progress)
            self._save_or_stop(progress)
        scores = {} if self._has_diverged(progress) else self._finish(progress)
        diverged = (
            not all(math.isfinite(value) for found in scores.values() for value in found.values())
            or not scores
        )
        result = {
            "task": self.task.name,
            "seed": self.seed,
            "status": "diverged" if diverged else "done",
            "selected": "best epoch on dev" if self.config.train.select == "best" else "last",
            "epochs": self.config.train.epochs,
            "steps": progress.step,
            "skipped": progress.skipped,
            "train_loss": None if diverged else self._mean_loss(),
            "origin": "random initialisation"
            if self.suite.random_init
            else self.suite.pretrained.origin,
            "scores": {} if diverged else scores,
            "seconds": round(time.monotonic() - began, 1),
        }
        if self.is_rank0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "result.json", result)
            shutil.rmtree(self.folder / "ckpt", ignore_errors=True)
            prune_models(self.suite.out / self.task.name, self.config.train.keep)
            write_report(self.suite.out)
            told = [
                f"{split} {name} {x:.4f}"
                for split, found in result["scores"].items()
                for name, x in found.items()
            ]
            print(
                f"{self.task.name} seed {self.seed}: {', '.join([result['status'], *told])}",
                flush=True,
            )
        self.engine.close()

    def _ask_to_stop(self, _reason: str) -> None:
        self.asked_to_stop = True

    def _engine(self) -> Engine:
        suite, train = self.suite, self.config.train
        dropout = {"hidden_dropout": train.dropout, "attention_dropout": train.dropout}
        self.model = suite.pretrained.model.model_copy(update=dropout)
        state = None if suite.random_init else suite.pretrained.state
        module = classifier(self.model, self.task).start(self.model, state, self.seed)
        scale = layerwise(self.model.num_layers, self.config.optimizer.layerwise_lr_decay)
        return Engine(module, self.config, suite.config.engine, suite.ranks, suite.device, scale)

    def _resume(self) -> Progress:
        self.lost = torch.zeros(
            2, dtype=torch.float64, device=self.suite.device
        )  # this epoch's losses, applied steps
        self.saved = time.monotonic()
        found = on_rank0(lambda: checkpoint.latest(self.folder / "ckpt"))
        if found is None:
            if self.is_rank0:  # of an attempt that left nothing to go on from
                shutil.rmtree(self.folder / "model", ignore_errors=True)
            return Progress()
        progress = checkpoint.load(self.engine, found, self.padded).progress
        self.lost += (
            torch.tensor(progress.interval[0], device=self.suite.device) if self.is_rank0 else 0.0
        )
        return progress

    # ------------------------------------------------------------------------------------------------------- training

    def _steps(self, progress: Progress) -> Progress:
        """Train up to the next look at the world: LOOK_STEPS, the epoch's end, or the end of the schedule."""
        options, done = self.config.optimizer, attempts(progress)
        epoch, first = divmod(done, self.epoch_steps)
        if first == 0:
            self.lost.zero_()
        batches = epoch_batches(self.lengths, self.config.train.global_batch_size, self.seed, epoch)
        warmup = round(options.warmup_fraction * self.total_steps)
        for batch in batches[first : first + min(LOOK_STEPS, self.total_steps - done)]:
            micro_batches, positions, count = self._micro_batches(batch, attempts(progress))
            losses = self.engine.forward_backward(micro_batches, positions, (count,))
            lr = learning_rate(options.peak_lr, warmup, progress.step, self.total_steps)
            if self.engine.step(lr).applied:
                self.lost[0] += sum(found.total for found in losses)
                self.lost[1] += 1 if self.is_rank0 else 0
                progress = replace(progress, step=progress.step + 1, skipped_in_a_row=0)
            else:
                in_a_row = progress.skipped_in_a_row + 1
                progress = replace(
                    progress, skipped=progress.skipped + 1, skipped_in_a_row=in_a_row
                )
                if self._has_diverged(progress):
                    break
        return progress

    def _has_diverged(self, progress: Progress) -> bool:
        return progress.skipped_in_a_row > self.config.train.max_skipped_steps

    def _mean_loss(self) -> float:
        loss, steps = self.engine.sum(self.lost).tolist()
        return loss / max(1.0, steps)

    def _micro_batches(
        self, batch: np.ndarray, number: int
    ) -> tuple[list[TaskBatch], list[int], int]:
        """This rank's micro-batches of the number-th global batch, the positions, and the labels in all of it."""
        train, accumulation = self.config.train, self.engine.accumulation
        examples, share = self.splits.encoded["train"], train.micro_batch_size * accumulation
        first = self.suite.ranks.rank * share
        mine = batch[first : first + share]
        form = self.pad_id, self.task.kind, train.batching == "packed"
        own = micro_batches(mine, train.micro_batch_size, accumulation, examples, *form)
        positions = [
            number * train.global_batch_size + first + i * train.micro_batch_size
            for i in range(accumulation)
        ]
        labels = (examples[i].label for i in batch)
        count = sum(
            sum(v >= 0 for v in label) if isinstance(label, list) else 1 for label in labels
        )
        return own, positions, max(1, count)

    def _after_epoch(self, progress: Progress) -> None:
        """Say where the seed stands; keep the best epoch where the config asks for it."""
        loss = self._mean_loss()
        if self.is_rank0:
            place = f"step {attempts(progress)}/{self.total_steps}"
            print(f"{self.task.name} seed {self.seed}: {place} loss {loss:.4f}", flush=True)
        if self.config.train.select == "best":
            metric, scores = self.task.main_metric, self._score(self.task.valid_splits[0])[0]
            kept = self.folder / "model"
            before = on_rank0(
                lambda: checkpoint.read_meta(kept).config["scores"] if kept.exists() else None
            )
            if before is None or scores[metric] > before[metric]:
                self._save_model(progress, scores)

    def _save_or_stop(self, progress: Progress) -> None:
        """Save a long seed now and then, and everything when any rank was asked to stop; then all leave together."""
        late = time.monotonic() - self.saved > SAVE_SECONDS
        votes = self.engine.all_gather_object((self.asked_to_stop, late and self.is_rank0))
        stop = any(asked for asked, _ in votes)
        if not stop and not any(late for _, late in votes):
            return
        self.saved, folder = time.monotonic(), self.folder / "ckpt"
        progress = replace(progress, interval=[self.engine.sum(self.lost).tolist()])
        checkpointer.save(
            self.engine, folder, str(attempts(progress)), progress, self._facts({}), self.padded
        )
        if self.is_rank0:
            checkpointer.prune(folder, CheckpointConfig(), attempts(progress))
        if stop:
            if self.is_rank0:
                print(
                    f"{self.task.name} seed {self.seed}: stopped and saved; the same command goes on",
                    flush=True,
                )
            self.engine.close()
            raise Stopped

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
            if self.is_rank0:
                path = self.folder / f"predictions-{split}.tsv"
                write_predictions(path, self.task, self.splits.examples[split], predictions, logits)
        if self.config.train.keep != "none" and self.config.train.select == "last":
            self._save_model(progress, scores)
        return scores

    def _score(self, split: str) -> tuple[dict[str, float], list, list[np.ndarray]]:
        """Scores, predictions and logits, in fp32 whatever the engine trains in, as `predict` and exports give them."""
        examples, encoded, engine = (
            self.splits.examples[split],
            self.splits.encoded[split],
            self.engine,
        )
        whole = {
            name: engine.full_tensor(name, "master")[: self.padded.get(name)].cpu()
            for name in engine.parameters
        }
        module = classifier(self.model, self.task)
        load_true_state(module, whole)
        module.to(engine.device).eval()
        with torch.no_grad():
            logits = logits_of(
                module,
                self.task.kind,
                encoded,
                self.pad_id,
                self.suite.ranks,
                engine.all_gather_object,
            )
        predictions = predictions_of(self.task, examples, encoded, logits)
        labelled = all(example.label is not None for example in examples)
        return score(self.task, predictions, examples) if labelled else {}, predictions, logits

    def _save_model(self, progress: Progress, scores: dict) -> None:
        if self.is_rank0:
            self.suite.pretrained.tokenizer.save(
                self.folder / "tokenizer"
            )  # first: a model is never without
        facts = self._facts(scores)
        checkpointer.save(
            self.engine, self.folder, "model", progress, facts, self.padded, weights_only=True
        )

    def _facts(self, scores: dict) -> dict[str, Any]:
        """What meta.json says beside the tensors: enough to predict with and to export."""
        own = {
            "model": self.model.model_dump(mode="json"),
            "task": self.task.model_dump(mode="json"),
            "scores": scores,
        }
        return self.config.model_dump(mode="json") | own


def attempts(progress: Progress) -> int:
    """Steps taken, applied or skipped: they decide which batch is next."""
    return progress.step + progress.skipped


def prune_models(folder: Path, keep: str) -> None:
    """Remove the models of DIR/TASK's finished seeds that `keep` does not name; a diverged seed's always."""
    seeds = read_results(folder.parent)[folder.name]
    done = {seed for seed, result in seeds.items() if result and result["status"] == "done"}
    best = best_seed(seeds)
    kept = {"all": done, "best": {best[0]} if best else set(), "none": set()}[keep]
    for seed, result in seeds.items():
        if result and seed not in kept:
            shutil.rmtree(folder / f"seed-{seed}" / "model", ignore_errors=True)
