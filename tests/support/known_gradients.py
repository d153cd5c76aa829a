"""A module with given gradients: steps of an engine against a formula written out.

The gradients are small integers, so that their sums are exact in bf16 and fp16 as well.
"""

import contextlib
from collections.abc import Iterator
from typing import ClassVar, NamedTuple
from unittest import mock

import torch
from scenario_tools import here
from torch import Tensor, nn

from electra_ds.config.engine_files import load_engine
from electra_ds.config.loading import load_run
from electra_ds.model.encoder import EncoderBase
from electra_ds.model.losses import Totals
from electra_ds.training import engine as engine_module
from electra_ds.training.engine import Engine

KNOWN_STEPS = 4
RATES = (0.02, 0.04, 0.01, 0.03)
# Two ranks share `word` and the third matrix of `qkv` at stages 1 and 2.
SHAPES = {
    "word.weight": (13, 8),  # 10 rows, and 3 that pad
    "encoder.layers.0.qkv.weight": (30, 8),
    "encoder.layers.0.out.weight": (8, 12),
    "head.weight": (1, 8),
    "bias.weight": (7,),
}
TRUE_ROWS = 10
LIMIT = 20.0  # of the gradient norm: some steps are clipped
OPTIONS = {
    "beta2": 0.98,
    "eps": 1e-3,
    "weight_decay": 0.1,
    "gradient_clipping": LIMIT,
    "peak_lr": 0.04,
    "warmup_steps": 0,
}


class Gradients(NamedTuple):
    """A micro-batch: the gradient of each parameter, in the order of SHAPES."""

    word: Tensor
    qkv: Tensor
    out: Tensor
    head: Tensor
    bias: Tensor


class Losses(NamedTuple):
    """The output of `Known`."""

    total: Tensor


class Weight(nn.Module):
    """The sum of weight * gradient."""

    def __init__(self, name: str):
        super().__init__()
        random = torch.Generator().manual_seed(len(name))
        weight = 0.1 * torch.randn(SHAPES[name], generator=random)
        if name == "word.weight":
            weight[TRUE_ROWS:] = 0
            self.true_rows = {"weight": TRUE_ROWS}
        self.weight = nn.Parameter(weight.bfloat16().float())  # the same in every precision

    def forward(self, gradient: Tensor) -> Tensor:
        """A scalar."""
        return (self.weight.float() * gradient).sum()


class Layer(nn.Module):
    """A layer with a fused projection."""

    stacked: ClassVar = {"qkv.weight": 3}

    def __init__(self) -> None:
        super().__init__()
        self.qkv = Weight("encoder.layers.0.qkv.weight")
        self.out = Weight("encoder.layers.0.out.weight")

    def forward(self, batch: Gradients) -> Tensor:
        """A scalar."""
        return self.qkv(batch.qkv) + self.out(batch.out)


class Encoder(EncoderBase):
    """An encoder of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer()])

    def forward(self, batch: Gradients) -> Tensor:  # type: ignore[override]
        """A scalar."""
        return self.layers[0](batch)


class Known(nn.Module):
    """A loss with given gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.encoder = Weight("word.weight"), Encoder()
        self.head, self.bias = Weight("head.weight"), Weight("bias.weight")

    def forward(self, batch: Gradients, divisors: Totals) -> Losses:
        """The sum over all parameters of weight * gradient."""
        total = self.word(batch.word) + self.encoder(batch)
        return Losses(total + self.head(batch.head) + self.bias(batch.bias))


def gradients(step: int, row: int) -> Gradients:
    """The gradients of one row of the global batch of two rows."""
    random = torch.Generator().manual_seed(10 * step + row)
    most = (2, 20, 3, 100)[step]
    found = [
        torch.randint(-most, most + 1, shape, generator=random).float() for shape in SHAPES.values()
    ]
    found[0][TRUE_ROWS:] = 0
    return Gradients(*found)


def config_of(kind: str, *sets: str):
    """A run of two rows per step with this optimizer."""
    options = [f"optimizer.{key}={value}" for key, value in OPTIONS.items()]
    batch = ["train.global_batch_size=2", "train.micro_batch_size=1"]
    return load_run("tiny", [*options, f"optimizer.kind={kind}", *batch, *sets])


@contextlib.contextmanager
def accepting_fp16() -> Iterator[None]:
    """Make DeepSpeed and `Engine` accept fp16 on a CPU."""
    from deepspeed.accelerator import get_accelerator

    accelerator, accepts = type(get_accelerator()), (lambda *_: True)
    with (
        mock.patch.object(accelerator, "is_fp16_supported", accepts),
        mock.patch.object(engine_module, "resolve_precision", lambda config, device: config),
    ):
        yield


def known_steps(stage: str, precision: str, kind: str, *sets: str) -> dict[str, Tensor]:
    """Take all steps on the ranks of this process; {kind/name: tensor} of weights and moments."""
    config = config_of(kind, *sets)
    values = load_engine(f"zero{stage}-{precision}")
    if precision == "fp16":
        values["fp16"] = {"enabled": True, "loss_scale": 16}
    with accepting_fp16() if precision == "fp16" else contextlib.nullcontext():
        engine = Engine(Known(), config, values, here.ranks, here.device)
        count = config.accumulation(here.world_size)
        for step, rate in enumerate(RATES):
            rows = [here.rank * count + index for index in range(count)]
            batches = [gradients(step, row) for row in rows]
            engine.forward_backward(batches, rows, Totals(1.0, 1.0))
            assert engine.step(rate).applied
        found = {
            f"{moment}/{name}": engine.full_tensor(name, moment).clone()
            for name in engine.parameters
            for moment in ("master", *engine.moments[name])
        }
        engine.close()
    return found
