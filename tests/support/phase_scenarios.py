"""Scenarios: runs in phases, stopped in, at and around the borders, resumed and moved.

PHASES has 3 + 4 + 3 steps. Each phase changes something else: the length of the rows and the batch,
then the mask rate and the bases of the rotary positions, with moments that start at zero. The first
and the last phase have the same data.
"""

import json
import shutil
from pathlib import Path

import scenario_tools
from scenario_tools import copy, here, in_step, kill_self, note, wait_for_ranks
from shard_data import best_fit_rows, write_data
from small_run import STAGES

BORDERS, STEPS = (3, 7), 10
STOPS = (2, 3, 4, 7)  # in the first phase, at a border, in the second one, at the other border
PHASES = [
    {"name": "short", "steps": 3, "data": "d32"},
    {
        "name": "long",
        "steps": 4,
        "set": {
            "data.sequence_length": 64,
            "train.global_batch_size": 12,
            "train.micro_batch_size": 2,
            "train.eval_every": 2,
            "objective.mask_prob": 0.3,
            "objective.masking": "whole_word",
            "optimizer.weight_decay": 0.1,
        },
    },
    {
        "name": "end",
        "steps": 3,
        "data": "d32",
        "moments": "reset",
        "set": {
            "optimizer.peak_lr": 0.002,
            "optimizer.warmup_steps": 1,
            "optimizer.schedule": "cosine",
            "objective.mask_token_prob": 0.5,
            "objective.temperature": 2.0,
        },
    },
]
THETAS = {"model.global_theta": 500.0, "model.local_theta": 100.0}
LENGTHS = ["train.total_steps=null", "train.eval_rows=8", "optimizer.bias_correction=true"]


def settings(phases: list[dict] = PHASES) -> list[str]:
    """The settings of a run with these phases."""
    return [*LENGTHS, "checkpoint.every=3", f"phases={json.dumps(phases)}"]


def data_of_phases() -> dict[str, Path]:
    """The data of the phases by name; rank 0 makes the longer rows."""
    longer = here.outs / "d64"
    if here.rank == 0 and not longer.exists():
        longer.mkdir()
        shards = [best_fit_rows(20, 64, seed=seed) for seed in range(2)]
        write_data(longer, shards, valid=best_fit_rows(10, 64, seed=9))
    wait_for_ranks()
    return {"d32": here.data, "long": longer}


def finish(name: str, engine: str, **options) -> None:
    """The run in phases, to its end."""
    scenario_tools.finish(name, engine, *settings(), data=data_of_phases(), **options)


def stop(name: str, engine: str, at: int) -> None:
    """The run in phases, stopped at a step."""
    scenario_tools.stop(name, engine, *settings(), at=at, data=data_of_phases())


def in_phases() -> None:
    """Whole at every stage; stopped at a step each and resumed; at two borders at one stage."""
    for stage in STAGES:
        finish(f"phases-z{stage}", f"zero{stage}-fp32")
    for stage, at in zip(STAGES, STOPS, strict=True):
        stop(f"phases-cut-{at}", f"zero{stage}-fp32", at)
        copy(f"phases-cut-{at}", f"phases-for-one-{at}")
        finish(f"phases-cut-{at}", f"zero{stage}-fp32")
    for at in BORDERS:
        stop("phases-borders", "zero2-fp32", at)
    finish("phases-borders", "zero2-fp32")


def in_phases_on_one_rank() -> None:
    """Whole, the stopped runs of two ranks, and one that is stopped for two."""
    finish("phases-one", "zero0-fp32")
    for at in STOPS:
        finish(f"phases-for-one-{at}", "zero0-fp32")
    stop("phases-for-two", "zero0-fp32", 3)


def in_phases_again() -> None:
    """The run that one rank stopped at the border, on two."""
    finish("phases-for-two", "zero3-fp32")
