"""The forward pass on CUDA tensors without data: no GPU is needed, but a CUDA build of torch.

    python -m pytest tests/gpu/test_fake_cuda.py -m fake_cuda

docs/testing.md describes the environment. Devices and dtypes of every operation agree, flash
attention over the documents is used where it serves, and the host reads nothing: a read of a tensor
without data raises. Of the backward pass, the functions of the kernels run one by one. Values,
speed and the whole backward pass need a GPU (tests/gpu/test_cuda.py).
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.loading import load_run
from electra_ds.config.schema import RunConfig
from electra_ds.data.batch import Batch
from electra_ds.finetuning.batches import TaskBatch
from electra_ds.finetuning.model import Classifier
from electra_ds.model.build import build_objective
from electra_ds.model.encoder import EncoderBase
from electra_ds.model.losses import Totals

pytestmark = [
    pytest.mark.fake_cuda,
    pytest.mark.skipif(
        torch.version.cuda is None, reason=f"torch {torch.__version__} is no CUDA build"
    ),
]
ROWS, LENGTH, MASKED = 4, 256, 38
IDS = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
PRESETS = {"electra": "tiny", "modernbert": "modern-tiny", "deberta_v2": "deberta-tiny"}
KINDS = ("electra", "electra_15", "mlm", "replace_mlm", "all_tokens_mlm", "uniform")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Operators(TorchDispatchMode):
    """Counts the operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA tensors without data can be made, and the device has flash attention."""
    if hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        torch._C._ensureCUDADeviceGuardSet()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    # torch.autocast("cuda") warns and has no effect without a device.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)


def config_of(architecture: str, kind: str = "electra") -> RunConfig:
    """A small run with dropout in every place; rows are longer than the local window."""
    key = "objective.generator" if kind == "uniform" else "objective.kind"
    sets = [f"{key}={kind}", f"data.sequence_length={LENGTH}"]
    preset = PRESETS[architecture]
    sets += [f"model.{name}=0.1" for name in load_run(preset).model.dropout_fields()]
    sets += [f"generator.{name}=0.1" for name in load_run(preset).model.dropout_fields()]
    return load_run(preset, sets).with_data(600, IDS, LENGTH)


def on_cuda(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The module with parameters without data, in place. Call it in fake mode."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:  # .to("cuda") would start CUDA
                empty = torch.empty(value.shape, dtype=dtype, device="cuda")
                part._parameters[name] = torch.nn.Parameter(empty)
    return module


def ids(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device="cuda")


def document_starts(documents_per_row: int) -> torch.Tensor:
    """A tensor of the size of cu_seqlens for so many documents in each row."""
    return torch.empty(documents_per_row * ROWS + 1, dtype=torch.int32, device="cuda")


def batch_of(documents_per_row: int) -> Batch:
    return Batch(
        input_ids=ids(ROWS, LENGTH),
        segment_ids=ids(ROWS, LENGTH),
        document_ids=ids(ROWS, LENGTH) + 1,
        position_ids=ids(ROWS, LENGTH),
        masked_positions=ids(ROWS, MASKED),
        masked_weights=ids(ROWS, MASKED, dtype=torch.float32),
        keep_original=ids(ROWS, MASKED, dtype=torch.bool),
        uniforms=ids(ROWS, MASKED, dtype=torch.float32),
        cu_seqlens=document_starts(documents_per_row),
    )


def layers_run(module: torch.nn.Module) -> Counter[str]:
    """Counts the layers that run from now on: those with a window as "local", others as "global"."""
    found: Counter[str] = Counter()
    for encoder in module.modules():
        if isinstance(encoder, EncoderBase):
            kinds = getattr(encoder, "kinds", ["global"] * len(encoder.layers))
            for kind, layer in zip(kinds, encoder.layers, strict=True):
                layer.register_forward_hook(lambda *_, kind=kind: found.update([kind]))
    return found


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("documents_per_row", [2, 1], ids=["packed", "full"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", PRESETS)
def test_losses_are_computed_on_the_device(
    architecture: str, kind: str, documents_per_row: int, precision: str
) -> None:
    module = build_objective(config_of(architecture, kind), seed=0)
    layers, operators = layers_run(module), Operators()
    with FakeTensorMode(allow_non_fake_inputs=True), operators:
        on_cuda(module, DTYPES[precision])
        losses = module(batch_of(documents_per_row), Totals(76.0, 512.0), with_counts=True)
    assert losses.total.device.type == "cuda" and losses.total.dtype == torch.float32
    assert losses.counts is not None
    assert sum(layers.values()) >= 2
    # Rows of one document need flash attention over documents for the window only.
    expected = layers["local"] + (layers["global"] if documents_per_row > 1 else 0)
    if precision == "fp32" or architecture == "deberta_v2":  # positions are part of the scores
        expected = 0
    assert operators.count["_flash_attention_forward"] == expected
    assert not operators.count["_local_scalar_dense"]


def own_functions(loss: torch.Tensor) -> list[Any]:
    """The autograd functions of the kernels in the graph of a loss."""
    nodes, pending = {}, [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and id(node) not in nodes:
            nodes[id(node)] = node
            pending += [source for source, _ in node.next_functions]
    return [node for node in nodes.values() if hasattr(node, "_forward_cls")]


def gradients_of(node: Any) -> list[torch.Tensor]:
    """A gradient without data for each output of an autograd function."""
    return [
        torch.empty(data.shape, dtype=data.dtype, device=data.device)
        for data in node._input_metadata
    ]


@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "plain"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", PRESETS)
def test_backward_functions_accept_what_forward_saved_under_autocast(
    architecture: str, kind: str, dropout: bool
) -> None:
    """Forward runs under autocast, which computes softmax and others in fp32, backward does not."""
    module = build_objective(config_of(architecture, kind), seed=0).train(dropout)
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_cuda(module, torch.float32)
        with torch.autocast("cuda", torch.bfloat16):
            assert ids(2, dtype=torch.bfloat16).softmax(0).dtype == torch.float32
            losses = module(batch_of(2), Totals(76.0, 512.0), with_counts=True)
        assert losses.total.dtype == torch.float32
        found = own_functions(losses.total)
        for node in found:
            node.apply(*gradients_of(node))
    names = {node._forward_cls.__name__ for node in found}
    expected = {"electra": {"_LinearFunction"}, "modernbert": set()}
    expected["deberta_v2"] = {"_LinearFunction", "_LinearAndPart", "_Attention"}
    if kind != "uniform":
        expected[architecture].add("_FusedHead")
    if architecture == "modernbert" and not dropout:
        expected[architecture].add("_GegluLinearFunction")
    assert names == expected[architecture]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("architecture", PRESETS)
def test_fine_tuning_is_computed_on_the_device(architecture: str, per_token: bool) -> None:
    """On a packed row, in bf16."""
    module = Classifier(config_of(architecture).model, 3, per_token, regression=False)
    layers, operators = layers_run(module), Operators()
    examples = ROWS * 2
    labels = ROWS * LENGTH if per_token else examples
    with FakeTensorMode(allow_non_fake_inputs=True), operators:
        on_cuda(module, torch.bfloat16)
        row = ids(1, ROWS * LENGTH)
        batch = TaskBatch(
            input_ids=row,
            segment_ids=row,
            document_ids=row + 1,
            position_ids=row,
            cls_positions=ids(examples),
            labels=ids(labels),
            weights=ids(labels, dtype=torch.float32),
            cu_seqlens=document_starts(2),
        )
        loss = module(batch).total
    assert loss.device.type == "cuda" and loss.dtype == torch.float32
    flash = 0 if architecture == "deberta_v2" else sum(layers.values())
    assert operators.count["_flash_attention_forward"] == flash and layers


def test_a_read_by_the_host_is_found() -> None:
    """The check of this file can fail."""
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.ones(1, device="cuda").any())
