"""Cost of a training step: floating-point operations, and bytes that a rank sends.

Dimensions: B rows, S tokens of a row, K masked positions of a row.
"""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from electra_ds.config.schema import RunConfig
from electra_ds.model.build import meta_model
from electra_ds.reporting.memory import zero_batch


def step_flops(config: RunConfig) -> float:
    """Floating-point operations of the matrix products of one training step.

    A multiply-add counts as 2. PyTorch counts them while the objective runs forward and backward on
    tensors without data. All rows count as full. Table look-ups, norms, the recomputation of layers
    (activation checkpointing) and the optimizer are not counted.
    """
    module = meta_model(config).to(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), _ReadsAreTrue(), torch.device("cpu"):
        module.to_empty(device="cpu")
        batch = zero_batch(config)
        with FlopCounterMode(display=False) as counter:
            module(batch).total.backward()
    micro_batches = config.train.global_batch_size / config.train.micro_batch_size
    return counter.get_total_flops() * micro_batches


class _ReadsAreTrue(TorchDispatchMode):
    """Every read of a value returns True, because a fake tensor has no values."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        return func(*args, **(kwargs or {}))


def step_traffic(
    parameters: int, stage: int, world_size: int, accumulation: int, width: int
) -> float:
    """Bytes that one rank sends for the weights in an optimizer step under DeepSpeed 0.19.

    stage: of ZeRO. accumulation: micro-batches of a step and rank.
    width: bytes of a number (4: fp32 and torch_autocast, 2: bf16 and fp16).

    A ring of n ranks sends parameters x (n - 1)/n numbers for a reduce-scatter or an all-gather; an
    all-reduce is both. Stage 0 all-reduces once per step. Stage 1 also gathers the new weights.
    Stage 2 reduces every micro-batch. Stage 3 gathers and reduce-scatters every micro-batch; below
    1e9 parameters it keeps the weights of the forward for the backward. Stages 1 and 2 all-reduce
    where a reduce-scatter would be enough; with "use_multi_rank_bucket_allreduce": false stage 1
    sends a third less, with one call for each owner of a bucket. Padding, norms and votes (a few
    hundred bytes) are left out.
    """
    shares = {0: 2, 1: 3, 2: 2 * accumulation + 1, 3: 2 * accumulation}
    return shares[stage] * parameters * width * (world_size - 1) / world_size
