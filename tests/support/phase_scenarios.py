"""Scenarios: runs in phases, stopped in, at and around the borders, resumed and moved.

PHASES has 3 + 4 + 3 steps. Each phase changes something else: the length of the rows and the batch,
then the mask rate and the bases of the rotary positions, with moments that start at zero. The first
and the last phase have the same data.
"""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import scenario_tools
from scenario_tools import SHORT, copy, here, in_step, note, wait_for_ranks
from shard_data import best_fit_rows, write_data
from small_run import SMALL_MODEL, STAGES

from electra_ds.common.errors import RunFailure
from electra_ds.config.loading import load_run, phase_runs
from electra_ds.training import pretrain
from electra_ds.training.engine import Engine

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
# The same values in every phase: weights and losses are those of a run without phases.
EQUAL = [{"name": "a", "steps": 2}, {"name": "b", "steps": 4, "set": {"train.eval_every": 2}}]
MODERN = [
    {"name": "near", "steps": 2},
    {"name": "far", "steps": 2, "set": {"model.global_theta": 500.0, "model.local_theta": 100.0}},
]
BASE = ["train.eval_rows=8", "optimizer.bias_correction=true", "checkpoint.every=3"]


def settings(phases: list[dict]) -> list[str]:
    """The settings of a run with these phases."""
    return [*BASE, "train.total_steps=null", f"phases={json.dumps(phases)}"]


def data_of_phases() -> dict[str, Path]:
    """The data of the phases by name; rank 0 makes the longer rows."""
    longer = here.outs / "d64"
    if here.rank == 0 and not longer.exists():
        longer.mkdir()
        shards = [best_fit_rows(20, 64, seed=seed) for seed in range(2)]
        write_data(longer, shards, valid=best_fit_rows(10, 64, seed=9))
    wait_for_ranks()
    return {"d32": here.data, "long": longer}


def run(name: str, engine: str, phases: list[dict] = PHASES, **options) -> int | str:
    """A run in phases; its exit code, or the message of its error."""
    options = {"data": data_of_phases()} | options
    return scenario_tools.train(name, engine, *settings(phases), **options)


def finish(name: str, engine: str, **options) -> None:
    """The run in phases, to its end."""
    ended = run(name, engine, **options)
    assert ended == 0, (name, ended)


def stop(name: str, engine: str, at: int, **options) -> None:
    """The run in phases, stopped at a step."""
    ended = run(name, engine, stop_at_step=at, **options)
    assert ended in scenario_tools.STOPPED, (name, ended)


def fail(name: str, engine: str, step: int) -> None:
    """The run in phases, ended by an error before the update of a step; nothing is saved then."""

    def act() -> None:
        raise RunFailure("failed here")

    with in_step(step, act):
        assert "failed here" in str(run(name, engine))


def in_phases() -> None:
    """Whole at every stage; stopped at a step each and resumed; failed behind both borders."""
    for stage in STAGES:
        finish(f"phases-z{stage}", f"zero{stage}-fp32")
    for stage, at in zip(STAGES, STOPS, strict=True):
        stop(f"phases-cut-{at}", f"zero{stage}-fp32", at)
        copy(f"phases-cut-{at}", f"phases-for-one-{at}")
        finish(f"phases-cut-{at}", f"zero{stage}-fp32")
    fail("phases-failed", "zero2-fp32", 4)
    fail("phases-failed", "zero2-fp32", 5)
    finish("phases-failed", "zero2-fp32")


def in_phases_on_one_rank() -> None:
    """Whole, refused, extended, and the stopped runs of two ranks; equal phases; rotary bases."""
    refused_in_phases("phases-for-one-4")
    finish("phases-one", "zero0-fp32")
    kept = [*PHASES[:2], PHASES[2] | {"moments": "keep"}]
    finish("phases-kept", "zero0-fp32", phases=kept)
    copy("phases-one", "phases-longer")
    longer = [*PHASES[:2], PHASES[2] | {"steps": 4}, {"name": "more", "steps": 1, "data": "long"}]
    longer[3]["set"] = {"data.sequence_length": 64}
    finish("phases-longer", "zero0-fp32", phases=longer, extend=True)
    for at in STOPS:
        finish(f"phases-for-one-{at}", "zero0-fp32")
    stop("phases-for-two", "zero0-fp32", 3)
    scenario_tools.finish("phases-none", "zero1-fp32", *BASE, "train.total_steps=6")
    finish("phases-equal", "zero1-fp32", phases=EQUAL, data=here.data)
    modern = {"preset": "modern-tiny", "phases": MODERN, "data": [str(here.data)]}
    finish("phases-modern", "zero1-fp32", **modern)
    stop("phases-modern-cut", "zero1-fp32", 2, **modern)
    finish("phases-modern-cut", "zero1-fp32", **modern)
    in_an_engine_of_the_second_phase("phases-second-engine")
    # A branch that begins in the second phase, at the next row of the data of the first one.
    stop("phases-parent", "zero0-fp32", 5)
    stop("phases-branch", "zero0-fp32", 8, branch_from=here.outs / "phases-parent")
    finish("phases-branch", "zero0-fp32")


def in_an_engine_of_the_second_phase(name: str) -> None:
    """Stopped behind the border, resumed in an engine that is made with the phase's own config."""
    stop(name, "zero0-fp32", 4)
    second = phase_runs(load_run("tiny", [*SMALL_MODEL, *SHORT, *settings(PHASES)]))[1]

    def engine(objective: Any, config: Any, *rest: Any) -> Engine:
        return Engine(objective, second, *rest)

    with mock.patch.object(pretrain, "Engine", engine):
        finish(name, "zero0-fp32")


def refused_in_phases(stopped: str) -> None:
    """Resumes with other phases or other data of a phase; longer phases without --extend."""
    changed = [dict(phase) for phase in PHASES]
    changed[1]["set"] = PHASES[1]["set"] | {"objective.mask_prob": 0.2}
    longer = [*PHASES[:2], PHASES[2] | {"steps": 4}]
    data = data_of_phases()
    found = {
        "set": run(stopped, "zero0-fp32", changed),
        "order": run(stopped, "zero0-fp32", [PHASES[1], PHASES[0], PHASES[2]]),
        "longer": run(stopped, "zero0-fp32", longer),
        "none": scenario_tools.train(stopped, "zero0-fp32", *BASE, "train.total_steps=10"),
        "past": run(stopped, "zero0-fp32", data=data | {"d32": here.other_data}),
        "missing": run("phases-missing", "zero0-fp32", data={"d32": here.data}),
    }
    found["made"] = (here.outs / "phases-missing").exists()
    note("phases-refused", found)


def in_phases_again() -> None:
    """The run that one rank stopped at the border, on two."""
    finish("phases-for-two", "zero3-fp32")
