"""Scenarios: fine-tuning on one rank and on two, in OUTS/finetune/one and OUTS/finetune/two."""

import os
import signal
from pathlib import Path

import run_folders
from scenario_tools import here, wait_for_ranks
from small_questions import write_spans
from small_superglue import write_superglue_files
from small_tasks import write_tasks

from electra_ds.config.loading import parse_config
from electra_ds.finetuning import finetune, seed
from electra_ds.finetuning.config import FinetuneConfig
from electra_ds.finetuning.superglue_tasks import SUPERGLUE
from electra_ds.training.engine import Engine


def base() -> Path:
    """The folder of the model, the tasks and the suites."""
    return here.outs / "finetune"


def suite_folder(name: str) -> Path:
    return base() / ("one", "two")[here.world_size - 1] / name


def run(
    name: str,
    task: str,
    engine: str = "zero0-fp32",
    seeds: int = 1,
    random_init: bool = False,
    peak_lr: float = 3e-3,
    model: str = "model",
    **train,
) -> None:
    """Run one suite in the folder of its name. model: the folder of the pretrained model."""
    values = {
        "train": {"epochs": 3.0, "max_length": 24, "micro_batch_size": 8, "global_batch_size": 16}
        | train,
        "optimizer": {"peak_lr": peak_lr, "layerwise_lr_decay": 0.9},
        "engine": engine,
    }
    config = parse_config(values, name, FinetuneConfig)
    names, out = [str(base() / "tasks" / f"{task}.json")], suite_folder(name)
    finetune.finetune_on_ranks(
        config,
        base() / model,
        names,
        seeds,
        None,
        out,
        here.ranks,
        here.device,
        random_init=random_init,
    )


def run_superglue() -> None:
    """One epoch of each task of SuperGLUE in the suite `superglue`."""
    values = {
        "train": {"epochs": 1.0, "max_length": 24, "micro_batch_size": 4, "global_batch_size": 8},
        "optimizer": {"peak_lr": 3e-3},
        "engine": "zero0-fp32",
    }
    config = parse_config(values, "superglue", FinetuneConfig)
    data = write_superglue_files(base() / "superglue")
    finetune.finetune_on_ranks(
        config,
        base() / "model",
        list(SUPERGLUE),
        1,
        data,
        suite_folder("superglue"),
        here.ranks,
        here.device,
    )


def interrupted(name: str, task: str, **train) -> None:
    """Run a suite in two attempts; the first one receives SIGTERM in its second epoch."""
    untouched = seed.SeedRun.after_attempt

    def signalled(self, *arguments):
        state = untouched(self, *arguments)
        if state.step == 18:  # of 39, 13 an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return state

    seed.SeedRun.after_attempt = signalled
    try:
        run(name, task, **train)
        raise AssertionError("the signal did not stop the run")
    except seed.Stopped:
        assert not (suite_folder(name) / task / "seed-0" / "result.json").exists()
    seed.SeedRun.after_attempt = untouched
    run(name, task, **train)


def recorded(owner: type, method: str) -> list:
    """Record the calls of a method from now on.

    Returns a list: the original method, to restore it, then (arguments, result) of each call.
    """
    untouched, calls = getattr(owner, method), []

    def record(self, *arguments):
        calls.append((arguments, untouched(self, *arguments)))
        return calls[-1][1]

    setattr(owner, method, record)
    calls.append(untouched)
    return calls


def check_schedule() -> None:
    """Learning rates warm up and decay, and decrease from the head to the embeddings.

    Each epoch has its order, and every label of the global batch is counted.
    """
    groups = []
    steps, attempts = recorded(Engine, "step"), recorded(seed.SeedRun, "after_attempt")
    untouched = Engine.step

    def record_rates(self, lr):
        result = untouched(self, lr)
        groups.append(
            {round(group["lr"] / lr, 6) for group in self.optimizer.param_groups} if lr else {0}
        )
        return result

    Engine.step = record_rates
    run("schedule", "words", epochs=2.0, peak_lr=1e-3)
    Engine.step, seed.SeedRun.after_attempt = steps[0], attempts[0]
    rates = [arguments[0] for arguments, _ in steps[1:]]
    assert (
        rates[0] == 0
        and rates.index(max(rates)) == round(0.1 * 26)
        and rates[-1] < 0.05 * max(rates)
    ), rates
    assert groups[1] == {1.0, 0.9, 0.81, 0.729}, groups[1]
    batches = [arguments[1].examples.tolist() for arguments, _ in attempts[1:]]
    orders = [
        [i for batch in batches[part] for i in batch] for part in (slice(13), slice(13, None))
    ]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(200))
    assert all(
        totals.label_count == sum(int(micro.weights.sum()) for micro in batch.micro_batches)
        for (_, batch, totals, *_), _ in attempts[1:]
    )


def check_best() -> None:
    """The kept weights are those of the epoch with the highest dev score."""
    calls = recorded(seed.SeedRun, "_predict")
    run("best", "classes", select="best", keep="all", peak_lr=0.02, epochs=5.0)
    seed.SeedRun._predict = calls[0]
    valid = [predictions for arguments, predictions in calls[1:] if arguments == ("valid",)]
    scores = [predictions.scores["accuracy"] for predictions in valid]
    assert len(set(scores[:-1])) > 1 and scores[-1] == max(scores[:-1]), scores


def fine_tuned() -> None:
    """Four tasks; on two ranks at ZeRO 2 and 3."""
    if here.rank == 0 and not base().exists():
        run_folders.pretrained(base() / "model")
        run_folders.pretrained(base() / "modern", architecture="modernbert")
        run_folders.pretrained(base() / "deberta", architecture="deberta_v2")
        write_tasks(base() / "tasks")
        write_spans(base() / "tasks")
    wait_for_ranks()
    engines = {1: ("zero0-fp32", "zero1-fp32"), 2: ("zero2-fp32", "zero3-fp32")}
    pairs_engine, words_engine = engines[here.world_size]
    run("classes", "classes", seeds=2)
    run("pairs", "pairs", pairs_engine, epochs=2.0, dropout=0.0)
    run("words", "words", words_engine, epochs=3.5, peak_lr=1e-3)
    run("spans", "spans", pairs_engine, epochs=2.0, dropout=0.0)
    run("choices", "choices", pairs_engine)
    for name, epochs in (("modern", 1.0), ("deberta", 2.0)):
        run(name, "pairs", words_engine, model=name, peak_lr=1e-3, epochs=epochs, dropout=0.0)


def fine_tuned_in_other_ways() -> None:
    """Stopped and resumed, the best epoch kept, bf16, batches of both kinds, random, diverging."""
    interrupted("cut", "classes")
    interrupted("spans-cut", "spans", epochs=2.0, dropout=0.0)
    for name in ("modern", "deberta"):
        run(f"spans-{name}", "spans", model=name, epochs=1.0, batching="packed")
    interrupted("choices-cut", "choices")
    for batching in ("padded", "packed"):
        run(f"choices-{batching}", "choices", epochs=1.0, dropout=0.0, batching=batching)
    run_superglue()
    check_best()
    check_schedule()
    run("half", "classes", "zero0-bf16", keep="all", epochs=1.0)
    run("padded", "classes", epochs=1.0, dropout=0.0, batching="padded")
    run("packed", "classes", epochs=1.0, dropout=0.0, batching="packed")
    run("random", "classes", random_init=True, keep="none", epochs=0.5)
    run("blown", "classes", peak_lr=1e30, max_skipped_steps=2)


def fine_tuned_modern() -> None:
    """Encoders of the architecture modernbert: packed, padded, interrupted, token by token."""
    alike = {"model": "modern", "epochs": 1.0, "dropout": 0.0}
    for batching in ("padded", "packed"):
        run(f"modern-{batching}", "classes", batching=batching, **alike)
    run("modern-whole", "classes", model="modern")
    interrupted("modern-cut", "classes", model="modern")
    run("modern-words", "words", model="modern", epochs=1.0)


def fine_tuned_deberta() -> None:
    """Encoders of the architecture deberta_v2: packed, padded, interrupted."""
    alike = {"model": "deberta", "epochs": 1.0, "dropout": 0.0}
    for batching in ("padded", "packed"):
        run(f"deberta-{batching}", "classes", batching=batching, **alike)
    run("deberta-whole", "classes", model="deberta")
    interrupted("deberta-cut", "classes", model="deberta")
