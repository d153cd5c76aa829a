"""Fields of the section optimizer that belong to one kind, and kinds that an engine excludes."""

import json

import pytest

from electra_ds.common.errors import UserError
from electra_ds.config.loading import differences, find_config, load_run
from electra_ds.reporting.check import check

OPTIONS = {
    "muon_momentum": ("0.9", 0.9),
    "muon_ns_steps": ("3", 3),
    "muon_adjust": ("spectral", "spectral"),
    "muon_lr_scale": ("2.0", 2.0),
}
KINDS = ("muon", "stable_adamw", "lamb")


@pytest.mark.parametrize("kind", ["adam", "stable_adamw", "lamb"])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_muon_is_refused_with_another_kind(kind, name):
    value = OPTIONS[name][0]
    with pytest.raises(UserError) as refused:
        load_run("tiny", [f"optimizer.kind={kind}", f"optimizer.{name}={value}"])
    message = str(refused.value)
    assert f"{name} = {value}, but kind = {kind}" in message and "optimizer.kind = muon" in message


def test_options_of_muon_have_defaults_only_with_muon():
    run = load_run("tiny", ["optimizer.kind=muon"])
    assert run.optimizer.muon == (0.95, 5, "rms", 1.0)
    sets = [f"optimizer.{name}={text}" for name, (text, _) in OPTIONS.items()]
    changed = load_run("tiny", ["optimizer.kind=muon", *sets])
    assert changed.optimizer.muon == tuple(value for _, value in OPTIONS.values())


def test_a_momentum_of_zero_is_a_value():
    run = load_run("tiny", ["optimizer.kind=muon", "optimizer.muon_momentum=0"])
    assert run.optimizer.muon.momentum == 0


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("kind=sgd", "'adam', 'muon', 'stable_adamw' or 'lamb'"),
        ("muon_momentum=1", "less than 1"),
        ("muon_ns_steps=0", "greater than or equal to 1"),
        ("muon_lr_scale=0", "greater than 0"),
        ("muon_adjust=both", "'rms' or 'spectral'"),
    ],
)
def test_impossible_values_are_refused_with_their_field(setting, expected):
    with pytest.raises(UserError) as refused:
        load_run("tiny", ["optimizer.kind=muon", f"optimizer.{setting}"])
    assert f"optimizer.{setting.split('=')[0]}" in str(refused.value)
    assert expected in str(refused.value)


def test_the_kind_is_part_of_the_science():
    science, machine = differences(load_run("tiny"), load_run("tiny", ["optimizer.kind=lamb"]))
    assert science == ["optimizer.kind: adam -> lamb"] and not machine


def test_muon_is_refused_for_encoders_of_a_factory(tmp_path):
    values = json.loads(find_config("tiny", "pretrain").read_text())
    values |= {"model": {"factory": "own_pair:build"}}
    del values["generator"]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(values))
    assert load_run(str(path), ["optimizer.kind=lamb"]).optimizer.kind == "lamb"
    with pytest.raises(UserError, match=r"optimizer\.kind = muon works with the built-in encoders"):
        load_run(str(path), ["optimizer.kind=muon"])


@pytest.mark.parametrize("kind", KINDS)
def test_offload_is_refused_before_a_run_starts(kind):
    run = load_run("tiny", [f"optimizer.kind={kind}"], "zero2-offload")
    with pytest.raises(UserError) as refused:
        check(run, 1)
    assert f"optimizer.kind = {kind}" in str(refused.value)
    assert "offload_optimizer" in str(refused.value)
    check(load_run("tiny", [], "zero2-offload"), 1)
