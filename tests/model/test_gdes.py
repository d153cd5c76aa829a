"""model.sharing = gdes: the discriminator embeds with the generator's tables, without a gradient."""

import pytest
import small_objective
import torch

from electra_ds.common.errors import UserError
from electra_ds.config.loading import load_run
from electra_ds.model.gdes import with_deltas, with_sums
from electra_ds.model.weights import true_state

ARCHITECTURES = ("electra", "modernbert", "deberta_v2")


def build(architecture, sharing="gdes", **objective):
    """An objective of one architecture, in training mode and without dropout."""
    return small_objective.build(architecture=architecture, sharing=sharing, **objective)


def gradients(module, **weights):
    """name -> gradient of the total loss; None for a parameter that it does not depend on."""
    module.objective = module.objective.model_copy(update=weights)
    module(small_objective.make_batch()).total.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def moved(gradient):
    return gradient is not None and bool(gradient.abs().max() > 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_losses_are_those_of_shared_embeddings(architecture):
    batch = small_objective.make_batch()
    gdes, shared = build(architecture)(batch), build(architecture, "shared")(batch)
    assert torch.equal(gdes.mlm_loss, shared.mlm_loss)
    assert torch.equal(gdes.disc_loss, shared.disc_loss)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_loss_moves_the_tables_of_its_own_encoder(architecture):
    own = {"generator": ("generator",), "discriminator": ("embedding_deltas", "discriminator")}
    for part, weights in (
        ("generator", {"gen_weight": 1.0, "disc_weight": 0.0}),
        ("discriminator", {"gen_weight": 0.0, "disc_weight": 1.0}),
    ):
        for name, gradient in gradients(build(architecture), **weights).items():
            assert moved(gradient) == name.startswith(own[part]), (part, name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_table_has_deltas_that_start_at_zero(architecture):
    state = true_state(build(architecture))
    tables = {
        name.removeprefix("generator_embeddings.")
        for name in state
        if name.startswith("generator_embeddings.") and ".norm." not in name
    }
    expected = {"word.weight"}
    if architecture == "electra":
        expected |= {"position.weight", "token_type.weight"}
    assert tables == expected
    assert all(not state[f"embedding_deltas.{name}"].any() for name in tables)
    assert not any(name.startswith("embeddings.") for name in state)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_and_deltas_are_converted_into_each_other(architecture):
    state = true_state(build(architecture))
    generator = torch.Generator().manual_seed(0)
    for value in state.values():
        value.copy_(torch.randint(-8, 8, value.shape, generator=generator) / 8)
    sums = with_sums(state)
    word = state["generator_embeddings.word.weight"] + state["embedding_deltas.word.weight"]
    assert torch.equal(sums["embeddings.word.weight"], word)
    assert torch.equal(sums["embeddings.norm.weight"], state["embedding_deltas.norm.weight"])
    back = with_deltas(sums)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    shared = true_state(build(architecture, "shared"))
    assert with_sums(shared).keys() == shared.keys()


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("objective.generator=uniform", "objective.generator = uniform has no embeddings"),
        ("objective.kind=mlm", "objective.kind = mlm trains no discriminator"),
        ("objective.kind=replace_mlm", "objective.kind = replace_mlm trains no discriminator"),
        ("objective.kind=all_tokens_mlm", "objective.kind = all_tokens_mlm trains no"),
    ],
)
@pytest.mark.parametrize("preset", ["tiny", "modern-tiny"])
def test_an_objective_without_both_encoders_is_refused(preset, setting, found):
    with pytest.raises(UserError) as caught:
        load_run(preset, ["model.sharing=gdes", setting])
    assert f"model.sharing = gdes, but {found}" in str(caught.value)
    assert "set model.sharing = shared" in str(caught.value)


def test_widths_that_differ_are_refused_where_there_is_no_projection():
    load_run("tiny", ["model.sharing=gdes", "generator.hidden_size=64"])
    with pytest.raises(UserError, match="shared embeddings need equal widths"):
        load_run("modern-tiny", ["model.sharing=gdes", "generator.hidden_size=64"])
