"""Runs that learn to detect replaced tokens, that stay on the plateau, and that collapse."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import shard_data
import torch
from scenario_tools import finish, here, note, stop, train, wait_for_ranks

from electra_ds.training import pretrain

STEPS = 120
SETS = [
    f"train.total_steps={STEPS}",
    "optimizer.warmup_steps=10",
    "optimizer.peak_lr=0.01",
    "logging.every=4",
    "model.init=fan_in",
    "model.embedding_init_std=0.2",
]


def topic_rows(n: int, length: int, seed: int, topics: int) -> np.ndarray:
    """Rows of one document, each with 10 tokens of one topic: another token stands out.

    topics: 1 gives rows of random tokens.
    """
    random = np.random.default_rng(seed)
    words = 10 if topics > 1 else 590
    first = random.integers(0, topics, (n, 1)) * (590 // topics)
    rows = (5 + first + random.integers(0, words, (n, length))).astype(np.uint16)
    rows[:, 0], rows[:, -1] = shard_data.SPECIAL.cls, shard_data.SPECIAL.sep
    return rows


def write_rows(name: str, topics: int) -> Path:
    """Rank 0 writes a data folder; its path."""
    folder = here.data.with_name(f"{here.data.name}-{name}")
    if here.rank == 0:
        folder.mkdir()
        shard_data.write_data(folder, [topic_rows(400, 32, seed, topics) for seed in range(3)])
    wait_for_ranks()
    return folder


@contextlib.contextmanager
def constant_head() -> Iterator[None]:
    """The last layer of the discriminator's head is zero and does not change."""
    made = pretrain.build_objective

    def build(config, seed):
        objective = made(config, seed)
        for parameter in objective.discriminator_head.classify.parameters():
            torch.nn.init.zeros_(parameter)
            parameter.register_hook(torch.zeros_like)
        return objective

    pretrain.build_objective = build
    yield
    pretrain.build_objective = made


def verdicts() -> None:
    """The runs, named by what happens to them."""
    topics, random = write_rows("topics", 4), write_rows("random", 1)
    uniform, engine = "objective.generator=uniform", "zero0-fp32"
    finish("verdict-learning", engine, *SETS, uniform, data=topics)
    stop("verdict-resumed", engine, *SETS, uniform, data=topics, at=STEPS // 2)
    finish("verdict-resumed", engine, *SETS, uniform, data=topics)
    finish("verdict-plateau", engine, *SETS, uniform, data=random)
    finish("verdict-rate", engine, *SETS, uniform, "optimizer.peak_lr=0.1", data=topics)
    with constant_head():
        finish("verdict-head", engine, *SETS, uniform, data=topics)
        ends = [*SETS, uniform, "train.on_collapse=stop"]
        note("verdict-stop", train("verdict-stop", engine, *ends, data=topics))
