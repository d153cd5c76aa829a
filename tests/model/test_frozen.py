"""objective.generator = frozen: the generator computes without gradients and is set apart."""

import pytest
import small_objective
import torch

from electra_ds.common.errors import UserError
from electra_ds.config.loading import load_run
from electra_ds.model.weights import true_state
from electra_ds.training.optimizer import parameter_groups

ARCHITECTURES = ("electra", "modernbert", "deberta_v2")
PARTS = ("generator_embeddings.", "generator.", "generator_head.")


def build(architecture, **options):
    return small_objective.build(architecture=architecture, sharing="untied", **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_are_those_of_a_generator_that_trains(architecture):
    batch = small_objective.make_batch()
    frozen = build(architecture, generator="frozen", disc_weight=3.0)(batch)
    trained = build(architecture, disc_weight=3.0)(batch)
    assert torch.equal(frozen.mlm_loss, trained.mlm_loss)
    assert torch.equal(frozen.disc_loss, trained.disc_loss)
    assert torch.equal(frozen.total.detach(), 3.0 * frozen.disc_loss)  # without mlm_loss


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_main_encoder_has_gradients_and_moments(architecture):
    module = build(architecture, generator="frozen")
    module(small_objective.make_batch()).total.backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == name.startswith(PARTS), name
    optimized = {id(p) for group in parameter_groups(module, 0.01) for p in group["params"]}
    names = {name for name, p in module.named_parameters() if id(p) in optimized}
    assert names and not any(name.startswith(PARTS) for name in names)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_generator_that_is_set_apart_computes_as_before_without_dropout(architecture):
    batch = small_objective.make_batch()
    module = build(architecture, generator="frozen", dropout=0.0)
    whole, before = set(true_state(module)), module(batch)
    parts = module.set_generator_apart()
    names = set(true_state(parts))
    assert names == {name for name in whole if name.startswith(PARTS)}
    assert set(true_state(module)) == whole - names
    module.train()
    assert not parts.training
    after = module(batch)
    assert torch.equal(before.total, after.total)
    with torch.no_grad():
        parts["generator_head"].bias += torch.arange(len(parts["generator_head"].bias)) / 10
    assert not torch.equal(module(batch).mlm_loss, after.mlm_loss)  # the same tensors


@pytest.mark.parametrize("sharing", ["shared", "all", "gdes"])
def test_sharing_with_a_frozen_generator_is_refused(sharing):
    same = ["generator.num_layers=3"] if sharing == "all" else []
    with pytest.raises(UserError) as caught:
        sets = [f"model.sharing={sharing}", "objective.generator=frozen", *same]
        load_run("modern-tiny", sets)
    assert f"model.sharing = {sharing}, but objective.generator = frozen" in str(caught.value)
    assert "set model.sharing = untied" in str(caught.value)


def test_tables_of_the_generator_have_a_width_of_their_own_only_if_untied():
    load_run("tiny", ["model.sharing=untied", "generator.embedding_size=48"])
    with pytest.raises(
        UserError, match=r"generator.embedding_size = 48, but model.sharing = shared"
    ):
        load_run("tiny", ["generator.embedding_size=48"])
