"""Optimizers other than Adam against their formulas in float64: every ZeRO stage and precision."""

import math

import pytest
import torch
from known_gradients import LIMIT, RATES, SHAPES, TRUE_ROWS, Known, config_of, gradients
from optimizer_scenarios import CASES, ENGINES, OPTIMIZERS, VARIANTS
from run_results import curve, distance, is_bit_equal, tensors
from running import read_json
from safetensors.torch import load_file

from electra_ds.config.loading import load_run
from electra_ds.config.schema import OptimizerConfig
from electra_ds.model.build import meta_model
from electra_ds.model.encoder import hidden_matrices
from electra_ds.training import checkpoint
from electra_ds.training.muon import newton_schulz, update_scale

MATRICES = {"encoder.layers.0.qkv.weight": 3, "encoder.layers.0.out.weight": 1}
QKV = "encoder.layers.0.qkv.weight"


def orthogonalized(matrix, steps):
    """Jordan's quintic iteration on a float64 matrix."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.mT if len(x) <= x.shape[1] else x.mT @ x
        polynomial = -4.7750 * a + 2.0315 * a @ a
        x = 3.4445 * x + (polynomial @ x if len(x) <= x.shape[1] else x @ polynomial)
    return x


class Reference:
    """Each parameter whole and in float64; `step` is the formula of one kind, written out."""

    def __init__(self, options: OptimizerConfig):
        self.options = options
        self.weights = {n: p.detach().double() for n, p in Known().named_parameters()}
        self.first = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        self.second = {n: torch.zeros_like(w) for n, w in self.weights.items()}

    def run(self):
        """The tensors that `known_steps` returns."""
        for step, rate in enumerate(RATES):
            found = [torch.cat([g.flatten() for g in gradients(step, row)]) for row in (0, 1)]
            total = (found[0] + found[1]).double()
            total *= min(1.0, LIMIT / (total.norm().item() + 1e-6))
            sizes = [math.prod(shape) for shape in SHAPES.values()]
            parts = dict(zip(SHAPES, total.split(sizes), strict=True))
            for name, weight in self.weights.items():
                self.step(name, weight, parts[name].view_as(weight), rate, step + 1)
        result = {f"master/{n}": w for n, w in self.weights.items()}
        for name in self.weights:
            if self.options.kind == "muon" and name in MATRICES:
                result[f"momentum_buffer/{name}"] = self.first[name]
            else:
                result |= {f"exp_avg/{name}": self.first[name]}
                result |= {f"exp_avg_sq/{name}": self.second[name]}
        return result

    def step(self, name, w, g, rate, number):
        """Update one parameter in place."""
        options = self.options
        decay = options.weight_decay if w.ndim > 1 else 0.0
        if options.kind == "muon" and name in MATRICES:
            w += rate * (self.muon_update(name, g) - decay * w)
            return
        b1, b2 = options.beta1, options.beta2
        m, v = self.first[name], self.second[name]
        m += (1 - b1) * (g - m)
        v += (1 - b2) * (g**2 - v)
        if options.bias_correction:
            m, v = m / (1 - b1**number), v / (1 - b2**number)
        update = m / (v.sqrt() + options.eps)
        if options.kind == "stable_adamw":
            rows = TRUE_ROWS if name == "word.weight" else len(w)
            ratio = g[:rows] ** 2 / v[:rows].clamp_min(options.eps**2)
            update = update / max(1.0, ratio.mean().sqrt().item())
        update = update + decay * w
        if options.kind == "lamb" and w.ndim > 1:
            update = update * (w.norm() / update.norm())
        w -= rate * update

    def muon_update(self, name, g):
        """The change by Muon, for a rate of 1 and without the decay."""
        momentum = 0.95 if self.options.muon_momentum is None else self.options.muon_momentum
        m = self.first[name]
        m += (1 - momentum) * (g - m)
        blended = momentum * m + (1 - momentum) * g
        parts = []
        for block in blended.chunk(MATRICES[name]):
            n, k = block.shape
            is_spectral = self.options.muon_adjust == "spectral"
            factor = math.sqrt(max(1, n / k)) if is_spectral else 0.2 * math.sqrt(max(n, k))
            parts.append(factor * orthogonalized(block, self.options.muon_ns_steps or 5))
        return -(self.options.muon_lr_scale or 1) * torch.cat(parts)


def reference(variant):
    config = config_of(variant.partition("-")[0], *VARIANTS[variant])
    return Reference(config.optimizer).run()


def read(optimizer_runs, case, ranks):
    return load_file(optimizer_runs / f"formula-{case}-{ranks}.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_the_formula(optimizer_runs, case):
    expected, found = reference(case.rpartition("-z")[0]), read(optimizer_runs, case, 2)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(),
            value,
            rtol=2e-6,
            atol=2e-6,
            msg=lambda text, n=name: f"{n}: {text}",
        )


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_one_rank_computes_what_two_compute(optimizer_runs, kind):
    one, two = (read(optimizer_runs, f"{kind}-z1-fp32", ranks) for ranks in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-6, atol=1e-6)


def test_the_steps_of_the_reference_differ_where_the_formulas_do():
    """The tests above can fail: no two variants have the same weights."""
    found = [reference(variant)[f"master/{QKV}"] for variant in VARIANTS]
    for index, value in enumerate(found):
        assert all((value - other).abs().max() > 1e-4 for other in found[:index])


# -------------------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_newton_schulz_brings_the_singular_values_near_one(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(matrix, 5, torch.float32))
    assert values.min() > 0.6 and values.max() < 1.3
    assert newton_schulz(matrix, 5, torch.bfloat16).dtype == torch.float32


def test_muon_is_that_of_torch():
    """torch.optim.Muon computes in bf16, so the weights differ by its rounding."""
    weight = torch.nn.Parameter(torch.zeros(12, 20))
    theirs = torch.optim.Muon(
        [weight], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", momentum=0.0
    )
    weight.grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    ours = newton_schulz(weight.grad, 5, torch.float32) * update_scale(12, 20, "rms")
    theirs.step()
    torch.testing.assert_close(-weight.detach(), ours, rtol=0, atol=0.03)


@pytest.mark.parametrize("preset", ["tiny", "modern-tiny", "deberta-tiny"])
def test_muon_has_the_projections_in_the_layers_and_adam_the_rest(preset):
    module = meta_model(load_run(preset))
    found = hidden_matrices(module)
    expected = {
        name
        for name, parameter in module.named_parameters()
        if ".layers." in name and parameter.ndim == 2
    }
    assert found.keys() == expected
    kinds = {name.split(".", 3)[3] for name in found}
    assert kinds == {"qkv.weight", "out.weight", "ffn_in.weight", "ffn_out.weight"}
    halves = 2 if preset == "modern-tiny" else 1  # GeGLU's two projections
    for name, stacked in found.items():
        assert stacked == {"qkv": 3, "ffn_in": halves}.get(name.split(".")[-2], 1)


# -------------------------------------------------------------------------------------------- runs


RUNS = [(kind, engine) for kind in OPTIMIZERS for engine in ENGINES[kind]]


@pytest.mark.parametrize(("kind", "engine"), RUNS)
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(optimizer_runs, kind, engine):
    resumed, whole = optimizer_runs / f"{kind}-cut-{engine}", optimizer_runs / f"{kind}-{engine}"
    assert is_bit_equal(resumed, whole) and curve(resumed) == curve(whole)


@pytest.mark.parametrize("other", ["zero3-fp32", "moved", "for-one"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_another_stage_or_number_of_ranks_continues_the_run(optimizer_runs, kind, other):
    assert (
        distance(optimizer_runs / f"{kind}-{other}", optimizer_runs / f"{kind}-zero1-fp32") < 1e-5
    )


def test_a_checkpoint_names_its_optimizer_and_has_the_moments_of_each_parameter(optimizer_runs):
    for kind in OPTIMIZERS:
        folder = checkpoint.latest(optimizer_runs / f"{kind}-zero1-fp32" / "ckpt")
        assert checkpoint.read_meta(folder).optimizer == kind
    names = tensors(optimizer_runs / "muon-zero1-fp32").keys()
    layer = "discriminator.layers.1.qkv.weight"
    assert f"momentum_buffer/{layer}" in names and f"exp_avg/{layer}" not in names
    others = ("embeddings.word.weight", "discriminator_head.dense.weight", "generator_head.bias")
    assert {f"{kind}/{n}" for n in others for kind in ("exp_avg", "exp_avg_sq")} <= names


def test_a_resume_with_another_optimizer_is_refused_and_a_start_from_its_weights_is_not(
    optimizer_runs,
):
    assert "optimizer.kind: muon -> adam" in read_json(optimizer_runs / "optimizers-0.json")["kind"]
    assert curve(optimizer_runs / "adam-from-muon")[-1]["step"] == 6
