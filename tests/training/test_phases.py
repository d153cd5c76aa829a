"""Phases at training: schedules, steps, rows of each data, refusals, and runs on real ranks.

The runs are those of tests/support/phase_scenarios.py.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import run_folders
import shard_data
import torch
from phase_scenarios import PHASES, STOPS
from run_results import curve, distance, is_bit_equal
from running import read_json
from small_run import STAGES

from electra_ds.common.errors import UserError
from electra_ds.config.loading import load_run
from electra_ds.data.dataset import open_data
from electra_ds.evaluation.evaluate import evaluate_checkpoint
from electra_ds.interop.load_model import load_objective
from electra_ds.model.build import build_objective
from electra_ds.reporting.check import check
from electra_ds.training.checkpoint_config import config_of_weights
from electra_ds.training.phases import (
    check_resume,
    current_index,
    entered,
)
from electra_ds.training.run_plan import plan
from electra_ds.training.state import TrainingState


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training rows of 64 tokens, with the tokenizer of `data`."""
    folder = tmp_path_factory.mktemp("longer")
    return shard_data.write_data(folder, [shard_data.best_fit_rows(40, 64)])


def run(phases: list[dict], *sets: str):
    lengths = ["train.total_steps=null", f"phases={json.dumps(phases)}"]
    return load_run("tiny", [*lengths, "train.micro_batch_size=4", *sets])


def planned(data: Path, longer: Path, phases: list[dict], *sets: str):
    """The phases of a plan on one rank."""
    sources = {"d32": open_data(data), "long": open_data(longer)}
    return plan(run(phases, *sets), sources, 1).phases


# --------------------------------------------------------------------------- schedules and steps


def test_a_schedule_spans_its_phases_and_starts_anew_where_a_field_is_set(data: Path) -> None:
    """Written out: linear with warmup over 3 + 4 steps, then cosine over 3."""
    phases = [
        {"name": "a", "steps": 3},
        {"name": "b", "steps": 4, "set": {"objective.mask_prob": 0.3}},
        {
            "name": "c",
            "steps": 3,
            "set": {
                "optimizer.schedule": "cosine",
                "optimizer.peak_lr": 0.5,
                "optimizer.warmup_steps": 1,
                "optimizer.final_lr_ratio": 0.1,
            },
        },
    ]
    sets = ("optimizer.warmup_steps=4", "optimizer.peak_lr=0.2")
    found = plan(run(phases, *sets), open_data(data), 1)
    linear = [0.2 * (1 - t / 7) * min(1, t / 4) for t in range(7)]
    cosine = [0.0] + [0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * (t - 1) / 2)) / 2) for t in (1, 2)]
    of_step = [phase for phase in found.phases for _ in range(phase.steps)]
    rates = [phase.span.rate(step) for step, phase in enumerate(of_step)]
    assert rates == pytest.approx(linear + cosine, rel=1e-12)
    assert found.total_steps == 10
    assert [(p.first_step, p.end_step) for p in found.phases] == [(0, 3), (3, 7), (7, 10)]


def test_epochs_of_a_phase_are_passes_over_its_data(data: Path, longer: Path) -> None:
    """300 rows and 40 rows; 2 epochs in steps of 32 rows, 3 epochs in steps of 8."""
    sets = {"data.sequence_length": 64, "train.global_batch_size": 8}
    phases = [
        {"name": "a", "epochs": 2.0, "data": "d32"},
        {"name": "long", "epochs": 3.0, "set": sets},
    ]
    steps = [phase.steps for phase in planned(data, longer, phases)]
    assert steps == [round(2 * 300 / 32), 15]


def test_a_run_without_phases_is_one_phase(data: Path) -> None:
    (phase,) = plan(load_run("tiny"), open_data(data), 2).phases
    assert (phase.name, phase.first_step, phase.end_step) == ("", 0, 3000)
    assert entered(TrainingState(), [phase], 0).data == phase.data.state() | {"position": 0}


# ------------------------------------------------------------------------------ rows of each data


def attempted(state: TrainingState, phase, applied: bool) -> TrainingState:
    """The state after an attempt, as the trainer counts it."""
    position = state.consumed_rows + phase.config.train.global_batch_size
    return state.advanced(applied, data=state.data | {"position": position})


def states(phases, skips: set[int]) -> list[tuple[int, TrainingState]]:
    """(phase, state) from the start, after every attempt and at every begin of a phase."""
    found, attempt, state = [], 0, TrainingState()
    for phase in phases:
        state = entered(state, phases, phase.index)
        found.append((phase.index, state))
        while state.step < phase.end_step:
            state = attempted(state, phase, attempt not in skips)
            attempt += 1
            found.append((phase.index, state))
    return found


@pytest.mark.parametrize("skips", [set(), {1}, {2, 3}, {0, 5, 6, 9}])
def test_each_data_continues_where_its_last_phase_ended(
    data: Path, longer: Path, skips: set[int]
) -> None:
    phases = planned(data, longer, PHASES)
    rows = {"d32": 0, "long": 0}
    before = TrainingState()
    for index, state in states(phases, skips):
        phase = phases[index]
        rows[phase.data_name] += (state.attempts - before.attempts) * (
            phase.config.train.global_batch_size
        )
        assert state.consumed_rows == rows[phase.data_name]
        assert current_index(state, phases) == index
        check_resume(state, phases, "meta.json")
        before = state
    assert rows["d32"] and rows["long"]


def test_the_same_data_in_another_order_begins_at_its_first_row(data: Path) -> None:
    """A streamed order depends on the rows of a step."""
    phases = [
        {"name": "a", "steps": 2},
        {"name": "b", "steps": 2, "set": {"train.global_batch_size": 16}},
        {"name": "c", "steps": 2},
    ]
    source = open_data(f"file://{data}")
    found = plan(run(phases), source, 1).phases
    positions = {index: state.consumed_rows for index, state in states(found, set())[::-1]}
    assert positions == {0: 0, 1: 0, 2: 64}


def test_moments_are_as_old_as_the_last_reset(data: Path, longer: Path) -> None:
    phases = planned(data, longer, PHASES)
    ages = [(i, s.step, s.step - s.reset_step) for i, s in states(phases, set())]
    assert [age for i, _, age in ages if i == 2] == [0, 1, 2, 3]
    assert all(step == age for i, step, age in ages if i < 2)


def test_a_damaged_data_state_is_refused(data: Path, longer: Path) -> None:
    phases = planned(data, longer, PHASES)
    state = states(phases, {1})[-1][1]
    begun, earlier = state.data["phase"], state.data["earlier"]

    def refusal(**changes) -> str:
        with pytest.raises(UserError) as error:
            check_resume(replace(state, data=state.data | changes), phases, "meta.json")
        return str(error.value)

    assert "data.position = 7; expected" in refusal(position=7)
    assert "short, long, other" in refusal(phase=begun | {"name": "other"})
    assert "short" in refusal(earlier=earlier[1:])
    assert "first_position" in refusal(earlier=[earlier[0] | {"rows": 1}, earlier[1]])
    other = earlier[1] | {"data": earlier[1]["data"] | {"dataset_id": "x"}}
    assert "phase long had other data" in refusal(earlier=[earlier[0], other])
    for wrong in ({"first_position": 5}, {"first_attempt": 99}):
        with pytest.raises(UserError, match="expected"):
            check_resume(replace(state, **wrong), phases, "meta.json")
    steps = begun["steps"] | {"long": 5}
    assert "phase long had 5 steps, now 4" in refusal(phase=begun | {"steps": steps})
    for damaged in ({"phase": 3}, {"phase": {}}, {"earlier": "x"}):
        assert "meta.json" in refusal(**damaged)
    wrong_step = replace(state, step=2, skipped=state.skipped + state.step - 2)
    with pytest.raises(UserError, match="step 2 in the phase end; expected one from 7 to 10"):
        check_resume(wrong_step, phases, "meta.json")


# --------------------------------------------------------------------------------------- refusals


def refusal(config, sources, world_size: int = 1) -> str:
    """The message of `pretrain`'s plan, which `check` repeats."""
    found = []
    for act in (
        lambda: plan(config, sources, world_size),
        lambda: check(config, world_size, sources),
    ):
        with pytest.raises(UserError) as error:
            act()
        found.append(str(error.value))
    assert found[0] == found[1]
    return found[0]


def test_what_does_not_fit_a_phase_is_refused_with_its_name(
    data: Path, longer: Path, tmp_path: Path
) -> None:
    def second(**values) -> list[dict]:
        fields = {key.replace("__", "."): value for key, value in values.items()}
        return [{"name": "a", "steps": 3}, {"name": "b", "steps": 4, "set": fields}]

    one = open_data(data)
    message = refusal(run(second(train__global_batch_size=30)), one, 4)
    assert message.startswith("phase b: train.global_batch_size = 30 rows cannot be split")
    message = refusal(run(second(train__global_batch_size=14)), one)
    # --set changes the run, and not the value that a phase sets.
    assert '("train.micro_batch_size": 2 in the `set` of the phase)' in message
    message = refusal(run(second(data__sequence_length=64)), one)
    assert message.startswith("phase b: data.sequence_length = 64, but the data has rows of 32")
    assert message.endswith('or "data.sequence_length": 32 in the `set` of the phase')
    wsd = {"optimizer__schedule": "wsd", "optimizer__decay_steps": 5, "optimizer__warmup_steps": 0}
    message = refusal(run(second(**wsd)), one)
    assert message.startswith("phase b: optimizer.decay_steps = 5, but the schedule has 4 steps")
    assert "the phase b has no data" in refusal(run(second()), {"a": one})
    assert "no phase uses it" in refusal(run(second()), {"a": one, "b": one, "c": one})
    other = tmp_path / "other"
    other.mkdir()
    rows = [shard_data.best_fit_rows(40, 32, vocab_size=500)]
    shard_data.write_data(other, rows, vocab_size=500)
    message = refusal(run(second()), {"a": one, "b": open_data(other)})
    assert "different tokenizers" in message and "a: tokenizer" in message


# ------------------------------------------------------------------------------------- the module


def test_the_weights_do_not_depend_on_the_order_of_the_phases(data: Path, longer: Path) -> None:
    """The position table is whole: it has the rows of the longest phase, and more."""
    short, long, end = PHASES

    def state(phases):
        sources = {"d32": open_data(data), "long": open_data(longer)}
        config = plan(run(phases, "model.max_positions=70"), sources, 1).config
        return build_objective(config, config.train.seed).state_dict()

    first, second = state([short, long, end]), state([long, short, end])
    assert first["embeddings.position.weight"].shape[0] == 70
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_phase_changes_the_rotary_bases_of_both_encoders_and_the_objective() -> None:
    config = run_folders.config(architecture="modernbert")
    values = config.model_dump(mode="json")
    values["model"] |= {"global_theta": 50.0, "local_theta": 20.0}
    values["objective"]["temperature"] = 2.0
    other = type(config).model_validate(values)
    here, there = run_folders.objective(config), run_folders.objective(other)
    here.apply_phase(other.objective, other.model)
    assert here.objective.temperature == 2.0
    for part in ("discriminator", "generator"):
        assert getattr(here, part).thetas == {"global": 50.0, "local": 20.0}
        x = torch.randn(2, 20, config.model.hidden_size)
        inputs = {
            "document_ids": torch.ones(2, 20, dtype=torch.long),
            "position_ids": torch.arange(20).expand(2, -1),
        }
        assert torch.equal(getattr(here, part)(x, **inputs), getattr(there, part)(x, **inputs))


def test_the_config_of_weights_is_that_of_the_phase() -> None:
    phases = [
        {"name": "a", "steps": 3},
        {"name": "b", "steps": 4, "set": {"objective.mask_prob": 0.3}},
    ]
    values = run(phases).model_dump(mode="json")

    def mask_prob(step: int, data: dict) -> float:
        meta = SimpleNamespace(config=values, state=TrainingState(step=step, data=data))
        return config_of_weights(meta, "meta.json").objective.mask_prob

    assert mask_prob(3, {"phase": {"name": "a"}}) == 0.16
    assert mask_prob(4, {"phase": {"name": "b"}}) == 0.3
    assert mask_prob(0, {}) == 0.16
    for damaged in ({}, {"phase": 1}, {"phase": {"name": "c"}}):
        with pytest.raises(UserError, match="expected one of a, b"):
            mask_prob(4, damaged)


# -------------------------------------------------------------------------------- runs on ranks

BRANCHED = ("phases-branch", "phases-one")


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_like_one_in_every_phase(outs: Path, stage: int) -> None:
    assert distance(outs / f"phases-z{stage}", outs / "phases-one") < 1e-5
    steps = [(r["phase"], r["step"]) for r in curve(outs / "phases-one") if r["split"] == "train"]
    names = ["short"] * 3 + ["long"] * 4 + ["end"] * 3
    assert steps == list(zip(names, range(1, 11), strict=True))


@pytest.mark.parametrize(("stage", "at"), [*zip(STAGES, STOPS, strict=True)])
def test_a_resume_in_and_at_a_border_is_bit_equal(outs: Path, stage: int, at: int) -> None:
    cut, whole = outs / f"phases-cut-{at}", outs / f"phases-z{stage}"
    assert is_bit_equal(cut, whole) and curve(cut) == curve(whole)


@pytest.mark.parametrize("at", STOPS)
def test_two_ranks_resume_on_one_in_every_phase(outs: Path, at: int) -> None:
    assert distance(outs / f"phases-for-one-{at}", outs / "phases-one") < 1e-5


def test_one_rank_resumes_on_two_at_a_border(outs: Path) -> None:
    assert distance(outs / "phases-for-two", outs / "phases-one") < 1e-5


def test_a_branch_in_a_phase_is_bit_equal(outs: Path) -> None:
    assert is_bit_equal(outs / "phases-branch", outs / "phases-one")
    train = [[r for r in curve(outs / name) if r["split"] == "train"] for name in BRANCHED]
    assert train[0] == train[1][5:]


def test_a_failure_behind_a_border_changes_nothing(outs: Path) -> None:
    """Resumed from the checkpoints of step 3, at the border, and of step 6, before the other."""
    assert is_bit_equal(outs / "phases-failed", outs / "phases-z2")
    assert curve(outs / "phases-failed") == curve(outs / "phases-z2")


def test_the_engine_of_another_phase_continues_like_one_of_this_phase(outs: Path) -> None:
    assert is_bit_equal(outs / "phases-second-engine", outs / "phases-one")


def test_phases_with_equal_values_are_a_run_without_phases(outs: Path) -> None:
    assert is_bit_equal(outs / "phases-equal", outs / "phases-none")
    assert distance(outs / "phases-equal", outs / "phases-none") == 0
    held_out = [r["step"] for r in curve(outs / "phases-equal") if r["split"] == "valid"]
    assert held_out == [2, 4, 6]  # at the border, by eval_every of the second phase, at the end


def test_moments_that_start_at_zero_change_the_second_step_of_the_phase(outs: Path) -> None:
    """Its first step has the rate 0 and the weights of the phase before."""
    kept, reset = (
        [r for r in curve(outs / name) if r["split"] == "train"]
        for name in ("phases-kept", "phases-one")
    )
    assert kept[:9] == reset[:9] and kept[9]["loss"] != reset[9]["loss"]


def test_rotary_bases_of_a_phase_are_those_of_its_weights(outs: Path) -> None:
    assert is_bit_equal(outs / "phases-modern-cut", outs / "phases-modern")
    folder = outs / "phases-modern" / "ckpt" / "final"
    module, config = load_objective(folder)
    assert (config.model.global_theta, config.data.sequence_length) == (500.0, 32)
    assert module.discriminator.thetas == {"global": 500.0, "local": 100.0}


def test_resumes_with_other_phases_or_data_are_refused(outs: Path) -> None:
    found = read_json(outs / "phases-refused-0.json")
    assert "phases.long.set.objective.mask_prob: 0.3 -> 0.2" in found["set"]
    assert "phases: short, long, end -> long, short, end" in found["order"]
    assert "phases.end.steps: 3 -> 4" in found["longer"]
    assert "phases: short, long, end -> none" in found["none"]
    assert "the phase short had other data" in found["past"]
    assert "the phase long has no data: give --data long=D" in found["missing"]
    assert not found["made"]


def test_a_finished_run_is_extended_by_a_longer_phase_and_another_one(outs: Path) -> None:
    steps = [
        (r["phase"], r["step"]) for r in curve(outs / "phases-longer") if r["split"] == "train"
    ]
    assert steps[9:] == [("end", 10), ("end", 11), ("more", 12)]
    assert curve(outs / "phases-longer")[:8] == curve(outs / "phases-one")[:8]


def test_evaluate_takes_the_data_of_any_phase(outs: Path, data: Path) -> None:
    for folder in (data, outs / "d64"):
        values = evaluate_checkpoint(outs / "phases-one", folder, None)
        assert values["tokens"] > 0 and math.isfinite(values["mlm_loss"])
    with pytest.raises(UserError, match="data has rows of 64"):
        evaluate_checkpoint(outs / "one", outs / "d64", None)
