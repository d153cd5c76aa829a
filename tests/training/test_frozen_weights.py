"""A frozen generator in memory: one copy in fp32, fp32 values beside half precision on rank 0 only."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import small_objective
import torch
from fake_weights import FakeWeights

from electra_ds.common.errors import UserError
from electra_ds.config.loading import load_run
from electra_ds.model.weights import true_state
from electra_ds.reporting import memory as memory_module
from electra_ds.reporting.memory import PRECISIONS, memory
from electra_ds.training import checkpointer, generator_from
from electra_ds.training.frozen_modules import FrozenModules

CPU = torch.device("cpu")


def generator() -> torch.nn.ModuleDict:
    return small_objective.build(sharing="untied", generator="frozen").set_generator_apart()


def kept(precision: torch.dtype, is_saved: bool) -> tuple[FrozenModules, torch.nn.ModuleDict]:
    modules = generator()
    return FrozenModules(modules, CPU, precision, is_saved=is_saved), modules


def addresses(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


@pytest.mark.parametrize("is_saved", [True, False])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_copy_is_held_only_where_the_modules_have_other_values(precision, is_saved):
    held, modules = kept(precision, is_saved)
    is_copy = is_saved and precision != torch.float32
    assert (addresses(held.values) != addresses(true_state(modules))) == is_copy
    expected = true_state(generator())
    for name, value in held.values.items():
        assert value.shape == expected[name].shape
        wanted = expected[name] if is_copy else expected[name].to(precision)
        assert torch.equal(value, wanted)
        assert true_state(modules)[name].dtype == precision


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_tensor_is_set_in_the_modules_and_in_the_values(precision):
    held, modules = kept(precision, is_saved=True)
    name = "generator_head.bias"
    value = torch.rand(held.values[name].shape)
    held.set(name, value)
    assert torch.equal(held.values[name], value)
    assert torch.equal(true_state(modules)[name], value.to(precision))


def test_a_checkpoint_holds_the_values_of_rank_0(tmp_path: Path):
    """Views of padded tables are stored without the padding."""
    engine = FakeWeights()
    engine.frozen = kept(torch.float32, is_saved=True)[0].values
    gathered = checkpointer._gather(engine, {}, ("master",))["model"]
    checkpointer._write({"model": gathered}, tmp_path, engine.ranks)
    from safetensors.torch import load_file

    found = load_file(next(tmp_path.glob("model*")))
    assert found.keys() == {*engine.frozen, *engine.parameters}
    assert all(torch.equal(found[name], value) for name, value in engine.frozen.items())


@pytest.fixture
def on_one_rank(monkeypatch):
    monkeypatch.setattr(generator_from, "on_rank0", lambda function: function())


def engine_with(held: FrozenModules) -> SimpleNamespace:
    return SimpleNamespace(frozen=held.values, set_frozen=held.set)


@pytest.mark.parametrize("is_new", [True, False])
def test_the_weights_that_were_read_are_released(on_one_rank, is_new):
    """The attempt holds the dict for the whole run."""
    engine = engine_with(kept(torch.bfloat16, is_saved=True)[0])
    expected = true_state(generator())
    read = dict(expected)
    generator_from.set_weights(engine, read, Path("O"), is_new=is_new)
    assert read == {}
    assert all(torch.equal(engine.frozen[name], value) for name, value in expected.items())


def test_other_weights_are_refused_on_every_rank_by_the_values_of_rank_0(monkeypatch):
    engine = engine_with(kept(torch.bfloat16, is_saved=False)[0])  # values are rounded here
    read = true_state(generator())
    monkeypatch.setattr(generator_from, "on_rank0", lambda function: None)  # as on another rank
    generator_from.set_weights(engine, dict(read), Path("O"), is_new=False)
    monkeypatch.setattr(generator_from, "on_rank0", lambda function: function())
    with pytest.raises(UserError, match="tensors differ from those of the generator in O"):
        generator_from.set_weights(engine, dict(read), Path("O"), is_new=False)


@pytest.mark.parametrize(
    ("device", "precision", "width"),
    [("cpu", "fp32", 4), ("cpu", PRECISIONS[2], 6), ("cuda", PRECISIONS[2], 2)],
)
def test_check_counts_the_bytes_of_a_frozen_generator(monkeypatch, device, precision, width):
    """On a GPU the copy for checkpoints is in the memory of the host."""
    monkeypatch.setattr(memory_module, "activation_bytes", lambda *_: (0, 0))
    monkeypatch.setattr(memory_module, "device_here", lambda: device)

    def states(kind: str) -> int:
        sets = ["model.sharing=untied", "model.vocab_size=600", *kind.split()]
        return memory(load_run("tiny", sets), 1, [1], [precision])[1, precision].states

    sizes = memory_module.meta_model(
        load_run(
            "tiny", ["model.sharing=untied", "objective.generator=frozen", "model.vocab_size=600"]
        )
    )
    frozen = sum(p.numel() for p in sizes.parameters() if not p.requires_grad)
    without = states("objective.generator=uniform")
    assert states("objective.generator=frozen") - without == width * frozen
