"""Phases in a run config: their values, lengths and names, refusals, differences of two configs."""

import json

import pytest

from electra_ds.common.errors import UserError
from electra_ds.config.loading import differences, load_run, parse_run, phase_runs
from electra_ds.config.phases import FIELDS, MACHINE_FIELDS, SCHEDULE_FIELDS, is_extension

TWO = [{"name": "one", "steps": 3}, {"name": "two", "epochs": 2.0}]


def run(phases, *sets, preset="tiny"):
    """A run with these phases."""
    lengths = ["train.total_steps=null", f"phases={json.dumps(phases)}"]
    return load_run(preset, [*lengths, *sets])


def refusal(phases, *sets, **options):
    with pytest.raises(UserError) as error:
        run(phases, *sets, **options)
    return str(error.value)


def with_set(**values):
    """Two phases; the second one sets fields, written section__field."""
    second = {key.replace("__", "."): value for key, value in values.items()}
    return [TWO[0], {"name": "two", "steps": 4, "set": second}]


# ------------------------------------------------------------------------------ config of a phase


def test_the_config_of_a_phase_is_that_of_the_run_with_its_values():
    values = {
        "data__sequence_length": 64,
        "train__global_batch_size": 96,
        "train__micro_batch_size": 4,
        "train__eval_every": 7,
        "objective__mask_prob": 0.3,
        "objective__masking": "span",
        "objective__mask_token_prob": 1.0,
        "objective__temperature": 2.0,
        "optimizer__weight_decay": 0.5,
    }
    first, second = phase_runs(run(with_set(**values)))
    base = load_run("tiny").model_dump()
    expected = {**base, "train": base["train"] | {"total_steps": 3}}
    assert first.model_dump() == expected
    expected["train"]["total_steps"] = 4
    for key, value in values.items():
        section, field = key.split("__")
        expected[section] = expected[section] | {field: value}
    assert second.model_dump() == expected


def test_the_bases_of_rotary_positions_can_be_set():
    values = {"model__global_theta": 160000.0, "model__local_theta": 500.0}
    first, second = phase_runs(run(with_set(**values), preset="modern-tiny"))
    assert (second.model.global_theta, second.model.local_theta) == (160000.0, 500.0)
    assert first.model == load_run("modern-tiny").model


def test_a_run_without_phases_has_one_config_and_is_written_without_the_field():
    plain = load_run("tiny")
    assert phase_runs(plain) == [plain]
    assert "phases" not in plain.model_dump(mode="json")


def test_phases_survive_the_file_of_a_run():
    config = run(with_set(optimizer__peak_lr=0.5))
    assert parse_run(json.loads(json.dumps(config.model_dump(mode="json"))), "x") == config


def test_a_phase_without_a_schedule_continues_that_of_the_phase_before():
    """Also with values that only the earlier phase sets; weight_decay is no part of a schedule."""
    wsd = {"optimizer.schedule": "wsd", "optimizer.decay_steps": 5, "optimizer.peak_lr": 0.5}
    phases = [
        {"name": "a", "steps": 3},
        {"name": "b", "steps": 3, "set": {**wsd, "optimizer.weight_decay": 0.2}},
        {"name": "c", "steps": 3, "set": {"objective.mask_prob": 0.3}},
        {"name": "d", "steps": 3, "set": {"optimizer.warmup_steps": 2}},
    ]
    base = load_run("tiny").optimizer
    a, b, c, d = (part.optimizer for part in phase_runs(run(phases)))
    assert a == base
    assert (b.schedule, b.decay_steps, b.peak_lr) == ("wsd", 5, 0.5)
    assert all(getattr(b, name) == getattr(c, name) for name in SCHEDULE_FIELDS)
    assert (b.weight_decay, c.weight_decay) == (0.2, base.weight_decay)
    assert d == base.model_copy(update={"warmup_steps": 2})


def test_every_field_of_the_list_exists_and_has_the_scope_that_resumes_use():
    for key in FIELDS:
        section, field = key.split(".")
        schema = type(getattr(load_run("modern-tiny"), section))
        scope = schema.model_fields[field].json_schema_extra["scope"]
        assert (scope == "machine") == (key in MACHINE_FIELDS), key


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ([{"name": "a"}], ["phases.0", "give steps or epochs, exactly one"]),
        ([{"name": "a", "steps": 2, "epochs": 1.0}], ["give steps or epochs, exactly one"]),
        ([{"name": "a", "steps": 0}], ["phases.0.steps = 0"]),
        ([{"name": "Long", "steps": 2}], ["phases.0.name"]),
        ([{"name": "", "steps": 2}], ["phases.0.name"]),
        ([{"name": "a", "steps": 2}] * 2, ["a is the name of more than one phase"]),
        ([{"name": "a", "step": 2}], ["phases.0.step: unknown key; did you mean 'steps'?"]),
        ([{"name": "a", "steps": 2, "moments": "zero"}], ["phases.0.moments", "reset"]),
        (
            with_set(objective__mask_prb=0.3),
            ["phases.1.set", "'objective.mask_prb'; did you mean 'objective.mask_prob'?"],
        ),
        (with_set(train__seed=1), ["phases.1.set", "'train.seed'"]),
        (with_set(objective__mask_prob=2), ["phase two", "objective.mask_prob = 2"]),
        (with_set(data__sequence_length=1024), ["phase two", "max_positions 512"]),
        (with_set(optimizer__schedule="wsd"), ["phase two", "decay_steps"]),
        (with_set(optimizer__decay_shape="cosine"), ["phase two", "schedule = linear"]),
        (
            with_set(model__global_theta=1e5),
            ["phase two", "model.global_theta", "of the architecture modernbert"],
        ),
    ],
)
def test_a_phase_that_is_not_possible_is_refused_with_its_name_and_field(phases, words):
    found = refusal(phases)
    assert "tiny.json" in found and all(word in found for word in words), found


def test_the_length_is_that_of_the_run_or_of_its_phases():
    assert "the run has phases" in refusal(TWO, "train.total_steps=9")
    assert "the run has phases" in refusal(TWO, "train.epochs=9")
    assert "give total_steps or epochs" in refusal([])
    assert run(with_set()).total_steps(None) == 7
    with pytest.raises(UserError, match="phases with epochs need the data"):
        run(TWO).total_steps(None)


def test_a_frozen_generator_keeps_its_rotary_bases():
    frozen = ["objective.generator=frozen", "model.sharing=untied"]
    phases = with_set(model__local_theta=500.0)
    found = refusal(phases, *frozen, preset="modern-tiny")
    assert "phase two: model.local_theta, but objective.generator = frozen" in found


# ------------------------------------------------------------------------------------ differences


def test_differences_name_the_phase_and_the_field_by_scope():
    old = run(with_set(objective__mask_prob=0.3, train__eval_every=5))
    new = run(with_set(objective__mask_prob=0.2, train__eval_every=6, optimizer__peak_lr=0.5))
    science, machine = differences(old, new)
    assert science == [
        "phases.two.set.objective.mask_prob: 0.3 -> 0.2",
        "phases.two.set.optimizer.peak_lr: not set -> 0.5",
    ]
    assert machine == ["phases.two.set.train.eval_every: 5 -> 6"]
    assert differences(old, old) == ([], [])
    renamed = run([TWO[0], {"name": "third", "steps": 4}])
    assert differences(old, renamed)[0] == ["phases: one, two -> one, third"]


def test_an_extension_is_a_longer_last_phase_or_phases_after_it():
    old = run([{"name": "a", "steps": 3}, {"name": "b", "steps": 4}])

    def extends(*phases):
        science, _ = differences(old, run([{"name": p[0], "steps": p[1]} for p in phases]))
        return [is_extension(line, old.phases) for line in science]

    assert extends(("a", 3), ("b", 9)) == [True]
    assert extends(("a", 3), ("b", 9), ("c", 1)) == [True, True]
    assert extends(("a", 5), ("b", 4)) == [False]
    assert extends(("a", 3)) == [False]
    assert extends(("b", 4), ("a", 3)) == [False]
    other = run([{"name": "a", "steps": 3}, {"name": "b", "steps": 4, "moments": "reset"}])
    assert [is_extension(line, old.phases) for line in differences(old, other)[0]] == [False]


def test_a_run_with_phases_has_no_schedule_of_batches():
    values = run([{"name": "a", "steps": 3}]).model_dump(mode="json")
    values["train"]["batch_schedule"] = [[1, 64]]
    with pytest.raises(UserError, match=r"batch_schedule = \[\[1, 64\]\].*train.global_batch_size"):
        parse_run(values, "test")
