"""What does a run cost? Floating-point operations of a step, bytes on a rank.

Letters: B rows, S tokens a row.
"""

import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from electra_ds.config.engine_files import load_engine
from electra_ds.config.schema import RunConfig
from electra_ds.data.batch import Batch
from electra_ds.data.masking import max_masked_positions
from electra_ds.model.build import meta_model
from electra_ds.training.optimizer import parameter_groups

PRECISIONS = ("fp32", "bf16 autocast", "half (bf16, fp16)")


class Memory(NamedTuple):
    """Bytes on a rank, at most, as DeepSpeed 0.19 allocates them (tests/engine_memory.py measures it)."""

    states: int  # weights, gradients, fp32 master weights and two moments, padding included
    gradients: int  # the part of the states that is gone between a step and the next backward, but at stage 3
    buckets: int  # through which gradients are reduced, and weights gathered (stage 3)
    activations: int  # of forward and backward of one micro-batch, the gradients of stage 0 on their way included
    update: int  # copies of gradients that the optimizer's step makes

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        forward_backward = self.states - self.gradients + self.buckets + self.activations
        return max(forward_backward, self.states + self.update)


def memory(
    config: RunConfig,
    world_size: int,
    stages: Iterable[int] = range(4),
    precisions: Iterable[str] = PRECISIONS,
) -> dict[tuple[int, str], Memory]:
    """What a rank needs at each ZeRO stage and precision, the optimizer on the device, layers not compiled.

    The buckets are those of the run's own engine file at its stage, elsewhere those of the shipped zeroN.json.
    """
    groups = parameter_groups(meta_model(config), 1.0)
    sizes = [[parameter.numel() for parameter in group["params"]] for group in groups]
    own = load_engine(config.engine).get("zero_optimization", {})
    found = {}
    for precision in precisions:
        activations = activation_bytes(config, precision)
        for stage in stages:
            zero = (
                own
                if own.get("stage", 0) == stage
                else load_engine(f"zero{stage}")["zero_optimization"]
            )
            found[stage, precision] = _at_stage(
                stage, precision, sizes, config, world_size, zero, activations
            )
    return found


def _at_stage(stage, precision, sizes, config, world_size, zero, activations) -> Memory:
    width = 2 if precision == PRECISIONS[2] else 4
    states, gradients = model_state_bytes(sizes, world_size)[stage, precision]
    largest, count = max(map(sum, sizes)), sum(map(sum, sizes))
    bucket = (
        int(zero.get("reduce_bucket_size", 5e8)) * width
        if zero.get("contiguous_gradients", True)
        else 0
    )
    if world_size == 1 and stage in (1, 2):
        bucket = 0  # engine.SINGLE_RANK_ZERO
    buckets, update = (
        0,
        (4 + width % 4) * largest // world_size,
    )  # a flat copy, for half precision one in fp32 too
    if stage == 0:
        update = 4 * count if width == 2 else 0
    elif stage == 3:
        gathered = count + min(
            count, int(zero.get("stage3_prefetch_bucket_size", 5e7))
        )  # flat, then one by one
        buckets = bucket + (width * gathered if world_size > 1 else 0)
        update += bucket
    else:
        buckets = bucket * (2 if zero.get("overlap_comm") else 1)
    whole = (
        width * count if stage == 1 else gradients
    )  # stage 1 reduces at the last micro-batch alone
    accumulated = whole if config.accumulation(world_size) > 1 else 0
    return Memory(states, gradients, buckets, accumulated + activations[stage == 0], update)


def model_state_bytes(
    sizes: list[list[int]], world_size: int
) -> dict[tuple[int, str], tuple[int, int]]:
    """Weights, gradients, fp32 master weights and two moments on the rank that holds most, and the gradients alone.

    sizes: elements of the parameters in memory, group by group as the optimizer has them. Stages 1 and 2 cut a flat
    group into shares, padded to 2 elements a rank, and keep whole the gradients of parameters that a cut goes through
    (stage 1 as little as stage 2). Stage 3 cuts each parameter. fp32 has a second copy of the weights from stage 1 on.
    Adam's step counters are in it, 4 bytes for each tensor that the optimizer has.
    """
    found, count = {}, sum(map(sum, sizes))
    padded = [-(-sum(group) // (2 * world_size)) * 2 * world_size for group in sizes]
    shares = sum(-(-size // world_size) for group in sizes for size in group)
    kept = max(
        sum(_gradients_kept(*pair, rank, world_size) for pair in zip(sizes, padded, strict=True))
        for rank in range(world_size)
    )
    for precision, width in zip(PRECISIONS, (4, 4, 2), strict=True):
        moments = 8 if width == 4 else 12  # stage 0 in fp32 updates the weights in place
        found[0, precision] = (
            (2 * width + moments) * count + 4 * sum(map(len, sizes)),
            width * count,
        )
        for stage in (1, 2):
            states = width * (sum(padded) + kept) + 12 * sum(padded) // world_size + 4 * len(sizes)
            found[stage, precision] = states, width * kept
        found[3, precision] = (2 * width + 12) * shares + 4 * len(sizes), 0
    return found


def _gradients_kept(group: list[int], padded: int, rank: int, world_size: int) -> int:
    """Elements of the gradients that a rank keeps of one flat group: the whole of each parameter it has a part of."""
    share, first, kept = padded // world_size, 0, 0
    for size in group:
        kept += size if first < share * (rank + 1) and first + size > share * rank else 0
        first += size
    return kept + (padded - first if rank == world_size - 1 else 0)


def activation_bytes(config: RunConfig, precision: str) -> tuple[int, int]:
    """Most bytes alive beside the weights in forward and backward of one micro-batch, each gradient given away as soon
    as it is there, and all kept. On the kind of device that is here: attention on a CPU keeps its probabilities,
    [B, heads, S, S] a layer, flash attention does not. Rows hold several pieces.
    """
    live = MemoryTracker(bool_is=True)
    at_rest = _run(config, precision, device_here(), live)
    return live.peak_without - at_rest, live.peak - at_rest


def device_here() -> str:
    """The kind of device whose activations are counted: cuda or cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _run(config: RunConfig, precision: str, device: str, live: "MemoryTracker") -> int:
    """Forward and backward of one micro-batch on tensors that have shapes alone: what is counted holds for any
    kind, size and way of computing. Returns the bytes that were there before."""
    module = meta_model(config).to(torch.bfloat16 if precision == PRECISIONS[2] else torch.float32)
    module.recompute_layers(config.train.activation_checkpointing)
    rows, length = config.train.micro_batch_size, config.data.sequence_length
    with FakeTensorMode(allow_non_fake_inputs=True), live, torch.device(device):
        module.to_empty(device=device)
        ids = torch.zeros(rows, length, dtype=torch.long)
        places = torch.zeros(
            rows, max_masked_positions(config.objective.mask_prob, length), dtype=torch.long
        )
        batch = Batch(ids, ids, ids, ids, places, places.float(), places.bool(), places.float())
        at_rest = live.now
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(live.give_away)
        with torch.autocast(device, torch.bfloat16, enabled=precision == PRECISIONS[1]):
            loss = module(batch).total
        loss.backward()
    return at_rest


class MemoryTracker(TorchDispatchMode):
    """Bytes of the tensors that come to life while it is on: `now`, the `peak`, that without what was given away, and
    the `largest` one. Of tensors without data (bool_is) a question is answered so."""

    def __init__(self, bool_is: bool | None = None):
        super().__init__()
        self.now = self.peak = self.peak_without = self.largest = self._given = 0
        self._held, self._bool_is = {}, bool_is

    def give_away(self, parameter: torch.Tensor) -> None:
        """Count the gradient as not there from now on in `peak_without`."""
        self._given += parameter.grad.untyped_storage().nbytes()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and self._bool_is is not None:
            return self._bool_is
        made = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._held:
                self._held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
                self.now += storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, self.now)
        self.peak_without = max(self.peak_without, self.now - self._given)
        return made

    def _gone(self, key: int) -> None:
        self.now -= self._held.pop(key)
