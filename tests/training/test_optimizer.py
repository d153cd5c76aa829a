"""The optimizer: Adam with and without bias correction, the parameter groups."""

import pytest
import torch
from torch import nn

from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.architectures import ElectraModelConfig
from electra_ds.config.loading import load_run
from electra_ds.config.schema import OptimizerConfig
from electra_ds.model.objective import ElectraObjective
from electra_ds.training.optimizer import (
    NO_BIAS_CORRECTION_STEP,
    AdamW,
    make_state,
    parameter_groups,
)
from electra_ds.training.schedule import linear

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
# eps is as large as the gradients, so that its place (outside the root) matters.
OPTIONS = OptimizerConfig(
    peak_lr=0.01, warmup_steps=10, beta1=0.9, beta2=0.98, eps=1e-2, weight_decay=0.1
)


def tables():
    """A matrix with weight decay and a vector without, the same at every call."""
    random = torch.Generator().manual_seed(0)
    return nn.ParameterDict(
        {name: nn.Parameter(torch.randn(*shape, generator=random)) for name, shape in SHAPES}
    )


SHAPES = (("matrix", (5, 3)), ("bias", (7,)))


def gradients(steps=20):
    random = torch.Generator().manual_seed(1)
    for step in range(steps):
        size = 10.0 ** -(step % 4)  # from 1 to 0.001, around eps
        yield {name: size * torch.randn(*shape, generator=random) for name, shape in SHAPES}


def train(optimizer, module, rates, steps=slice(0, 20)):
    for rate, found in list(zip(rates, gradients(), strict=True))[steps]:
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in module.items():
            parameter.grad = found[name].clone()
        optimizer.step()


RATES = [linear(OPTIONS.peak_lr, OPTIONS.warmup_steps, step, 40) for step in range(20)]


def test_adam_without_bias_correction_is_the_formula_written_out():
    module = tables()
    train(AdamW(parameter_groups(module, OPTIONS.weight_decay), OPTIONS), module, RATES)

    expected = {name: value.detach().double() for name, value in tables().items()}
    m, v = ({name: torch.zeros_like(value) for name, value in expected.items()} for _ in range(2))
    for rate, found in zip(RATES, gradients(), strict=True):
        for name, weight in expected.items():
            gradient, decay = found[name].double(), OPTIONS.weight_decay if weight.ndim > 1 else 0.0
            m[name] = OPTIONS.beta1 * m[name] + (1 - OPTIONS.beta1) * gradient
            v[name] = OPTIONS.beta2 * v[name] + (1 - OPTIONS.beta2) * gradient**2
            weight -= rate * (m[name] / (v[name].sqrt() + OPTIONS.eps) + decay * weight)
    for name, parameter in module.items():
        torch.testing.assert_close(
            parameter.detach().double(), expected[name], rtol=1e-6, atol=1e-6
        )


def test_adam_with_bias_correction_is_that_of_torch():
    ours, theirs = tables(), tables()
    corrected = OPTIONS.model_copy(update={"bias_correction": True})
    train(AdamW(parameter_groups(ours, OPTIONS.weight_decay), corrected), ours, RATES)
    groups = parameter_groups(theirs, OPTIONS.weight_decay)
    train(
        torch.optim.AdamW(
            groups, betas=(OPTIONS.beta1, OPTIONS.beta2), eps=OPTIONS.eps, fused=True
        ),
        theirs,
        RATES,
    )
    for name in ours:
        assert torch.equal(ours[name], theirs[name])


def test_bias_correction_changes_the_weights():
    found = []
    for corrected in (False, True):
        module = tables()
        options = OPTIONS.model_copy(update={"bias_correction": corrected})
        train(AdamW(parameter_groups(module, 0.1), options), module, RATES)
        found.append(module["matrix"].detach())
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("beta", [0.9, 0.98, 0.999, 0.9999])
def test_the_starting_step_makes_the_correction_exactly_one(beta):
    assert 1 - torch.tensor(beta) ** torch.tensor(float(NO_BIAS_CORRECTION_STEP)) == 1
    # After the steps of the longest preset, adding 1 is still exact.
    far = torch.tensor(float(NO_BIAS_CORRECTION_STEP + 4_000_000))
    assert far + 1 - far == 1


def test_a_rate_of_zero_moves_no_weight():
    module, before = tables(), tables()
    train(AdamW(parameter_groups(module, 0.1), OPTIONS), module, [0.0] * 20)
    assert all(torch.equal(module[name], before[name]) for name in module)


def test_the_moments_of_a_checkpoint_continue_exactly():
    straight = tables()
    train(AdamW(parameter_groups(straight, 0.1), OPTIONS), straight, RATES)

    resumed = tables()
    first = AdamW(parameter_groups(resumed, 0.1), OPTIONS)
    train(first, resumed, RATES, slice(0, 8))
    second = AdamW(parameter_groups(resumed, 0.1), OPTIONS)
    for parameter in resumed.values():
        make_state(second, parameter, 8, bias_correction=False)
        for kind in ("exp_avg", "exp_avg_sq"):
            second.state[parameter][kind].copy_(first.state[parameter][kind])
        assert second.state[parameter]["step"] == first.state[parameter]["step"]
    train(second, resumed, RATES, slice(8, 20))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


# ------------------------------------------------------------------------------------------ groups


def objective(**changes):
    run = load_run("tiny")
    sizes = {"vocab_size": 100, "hidden_size": 64, "embedding_size": 32}
    model = ElectraModelConfig(**run.model.model_dump() | sizes | changes)
    return ElectraObjective(model, run.generator, run.objective, SPECIAL, seed=0)


@pytest.mark.parametrize("sharing", ["shared", "untied"])
def test_every_parameter_is_in_one_group_and_biases_and_layer_norms_do_not_decay(sharing):
    module = objective(sharing=sharing)
    decayed, plain = parameter_groups(module, 0.01)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    grouped = [
        [names.pop(id(parameter)) for parameter in group["params"]] for group in (decayed, plain)
    ]
    assert not names and len(grouped[0]) > 10

    norms = {
        f"{where}.{name}"
        for where, part in module.named_modules()
        if isinstance(part, nn.LayerNorm)
        for name, _ in part.named_parameters()
    }
    expected = {name for name, _ in module.named_parameters() if name.endswith("bias")} | norms
    assert set(grouped[1]) == expected and norms
    tables_of = [name for name in grouped[0] if name.startswith("embeddings.")]
    assert len(tables_of) == 3  # word, position and token type


def test_each_factor_of_the_learning_rate_has_groups_of_its_own():
    module = objective()
    groups = parameter_groups(
        module, 0.01, lambda name: 0.5 if name.startswith("embeddings.") else 1.0
    )
    assert [(g["weight_decay"], g["lr_scale"]) for g in groups] == [
        (0.01, 0.5),
        (0.01, 1.0),
        (0.0, 0.5),
        (0.0, 1.0),
    ]
    slow = {id(p) for p in module.embeddings.parameters()}
    assert {id(p) for g in groups if g["lr_scale"] == 0.5 for p in g["params"]} == slow


def test_frozen_parameters_are_left_out():
    module = tables()
    module["bias"].requires_grad_(False)
    (group,) = parameter_groups(module, 0.01)
    assert group["params"] == [module["matrix"]] and group["weight_decay"] == 0.01
