"""objective.temperature_decay: the temperature of sampling as a function of the progress."""

import math

import pytest
import small_objective
import torch

from electra_ds.common.errors import UserError
from electra_ds.config.loading import load_run
from electra_ds.config.schema import ObjectiveConfig


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 2.0), (0.1, 1 + math.exp(-1)), (1.0, 1 + math.exp(-10))]
)
def test_it_falls_from_the_temperature_to_one(progress, expected):
    objective = ObjectiveConfig(temperature=2.0, temperature_decay=0.1)
    assert objective.temperature_at(progress) == pytest.approx(expected, rel=1e-12)
    assert objective.temperature_at(math.inf) == 1.0


def test_without_a_decay_it_is_constant():
    objective = ObjectiveConfig(temperature=0.5)
    assert {objective.temperature_at(u) for u in (0.0, 0.3, 1.0, math.inf)} == {0.5}


@pytest.mark.parametrize("architecture", ["electra", "modernbert", "deberta_v2"])
def test_samples_are_those_of_the_temperature_at_the_progress(architecture):
    """Only the detection depends on the samples, so equal samples give equal losses."""
    batch = small_objective.make_batch(rows=16, length=32, masked=10)
    decayed = small_objective.build(
        architecture=architecture, temperature=8.0, temperature_decay=0.5
    )
    hot, cold = (
        small_objective.build(architecture=architecture, temperature=t)
        for t in (decayed.objective.temperature_at(0.25), 1.0)
    )
    assert torch.equal(decayed(batch, progress=0.25).disc_loss, hot(batch).disc_loss)
    assert torch.equal(decayed(batch).disc_loss, cold(batch).disc_loss)
    assert not torch.equal(hot(batch).disc_loss, cold(batch).disc_loss)


@pytest.mark.parametrize("value", ["0", "-0.1", "nan"])
def test_a_decay_that_is_not_positive_is_refused(value):
    with pytest.raises(UserError, match=r"objective\.temperature_decay"):
        load_run("tiny", [f"objective.temperature_decay={value}"])


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (["objective.kind=mlm", "objective.temperature=2"], "kind = mlm"),
        (["objective.generator=uniform", "objective.temperature=2"], "generator = uniform"),
        ([], "temperature = 1 is its limit"),
    ],
)
def test_a_decay_without_an_effect_is_refused(settings, found):
    with pytest.raises(UserError) as caught:
        load_run("tiny", ["objective.temperature_decay=0.1", *settings])
    assert "temperature_decay = 0.1" in str(caught.value) and found in str(caught.value)


def test_the_weight_of_a_frozen_generator_is_refused():
    with pytest.raises(UserError, match=r"gen_weight = 5\.0 has no effect, because the generator"):
        sets = ["objective.generator=frozen", "model.sharing=untied", "objective.gen_weight=5"]
        load_run("tiny", sets)
