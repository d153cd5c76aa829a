"""Memory of a run per rank: model states, buckets, activations, and the peak of a step."""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

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
    """Most bytes on a rank, as DeepSpeed 0.19 allocates them.

    tests/support/engine_memory.py measures them.

    states: weights, gradients, fp32 master weights and two moments, padding included.
    gradients: the part of `states` that is freed between a step and the next backward; 0 at stage 3.
    buckets: for the reduction of gradients and, at stage 3, the gathering of weights.
    activations: of forward and backward of one micro-batch, with the gradients of stage 0.
    update: copies of gradients that the optimizer's step makes.
    """

    states: int
    gradients: int
    buckets: int
    activations: int
    update: int

    @property
    def peak(self) -> int:
        """Most bytes that are held at once."""
        forward_backward = self.states - self.gradients + self.buckets + self.activations
        return max(forward_backward, self.states + self.update)


def memory(
    config: RunConfig,
    world_size: int,
    stages: Iterable[int] = range(4),
    precisions: Iterable[str] = PRECISIONS,
) -> dict[tuple[int, str], Memory]:
    """Memory of a rank by (ZeRO stage, precision), with the optimizer on the device, not compiled.

    The buckets are those of the run's engine file at its stage, and of the shipped zeroN.json at the
    other stages.
    """
    groups = parameter_groups(meta_model(config), 1.0)
    sizes = [[parameter.numel() for parameter in group["params"]] for group in groups]
    own = load_engine(config.engine).get("zero_optimization", {})
    found = {}
    for precision in precisions:
        activations = activation_bytes(config, precision)
        for stage in stages:
            is_own = own.get("stage", 0) == stage
            zero = own if is_own else load_engine(f"zero{stage}")["zero_optimization"]
            found[stage, precision] = _at_stage(
                stage, precision, sizes, config, world_size, zero, activations
            )
    return found


def _at_stage(
    stage: int,
    precision: str,
    sizes: list[list[int]],
    config: RunConfig,
    world_size: int,
    zero: dict[str, Any],
    activations: tuple[int, int],
) -> Memory:
    """sizes: see `model_state_bytes`. activations: see `activation_bytes`."""
    width = 2 if precision == PRECISIONS[2] else 4  # bytes of a number
    states, gradients = model_state_bytes(sizes, world_size)[stage, precision]
    largest, count = max(map(sum, sizes)), sum(map(sum, sizes))
    bucket = 0
    reduces = world_size > 1 or stage not in (1, 2)  # see engine.SINGLE_RANK_ZERO
    if reduces and zero.get("contiguous_gradients", True):
        bucket = int(zero.get("reduce_bucket_size", 5e8)) * width
    buckets = 0
    # A flat copy of the gradients; in half precision one more in fp32.
    update = (4 + width % 4) * largest // world_size
    if stage == 0:
        update = 4 * count if width == 2 else 0
    elif stage == 3:
        # Gathered weights: a flat buffer, then one parameter after the other.
        gathered = count + min(count, int(zero.get("stage3_prefetch_bucket_size", 5e7)))
        buckets = bucket + (width * gathered if world_size > 1 else 0)
        update += bucket
    else:
        buckets = bucket * (2 if zero.get("overlap_comm") else 1)
    # Between micro-batches stage 1 holds whole gradients: it reduces with the last one only.
    held = width * count if stage == 1 else gradients
    accumulated = held if config.accumulation(world_size) > 1 else 0
    return Memory(states, gradients, buckets, accumulated + activations[stage == 0], update)


def model_state_bytes(
    sizes: list[list[int]], world_size: int
) -> dict[tuple[int, str], tuple[int, int]]:
    """(bytes of states, bytes of gradients) by (stage, precision), on the rank that holds most.

    States are weights, gradients, fp32 master weights, two moments, and Adam's step counters (4 bytes
    per tensor of the optimizer).

    sizes: elements of the parameters in memory, by group of the optimizer.
    Stages 1 and 2 cut a flat group into shares, padded to 2 elements per rank, and keep the whole
    gradients of parameters that are cut. Stage 3 cuts each parameter. From stage 1 on, fp32 holds a
    second copy of the weights.
    """
    found: dict[tuple[int, str], tuple[int, int]] = {}
    count = sum(map(sum, sizes))
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
    """Elements of gradients that a rank keeps of a flat group: of every parameter in its share."""
    share, first, kept = padded // world_size, 0, 0
    for size in group:
        kept += size if first < share * (rank + 1) and first + size > share * rank else 0
        first += size
    return kept + (padded - first if rank == world_size - 1 else 0)


def activation_bytes(config: RunConfig, precision: str) -> tuple[int, int]:
    """Most bytes alive beside the weights in forward and backward of one micro-batch.

    Returns (with each gradient freed once it is computed, with all gradients kept), for the kind of
    device of this machine: attention on a CPU keeps its probabilities, [B, heads, S, S] per layer,
    flash attention does not. Rows hold several documents.
    """
    live = MemoryTracker(bool_is=True)
    at_rest = _run(config, precision, device_here(), live)
    return live.peak_without - at_rest, live.peak - at_rest


def device_here() -> str:
    """The kind of device whose activations are counted: cuda or cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _run(config: RunConfig, precision: str, device: str, live: "MemoryTracker") -> int:
    """Run forward and backward of one micro-batch on tensors without data.

    So the result holds for every objective, size and way of computing. Returns the bytes that
    existed before.
    """
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
    """Bytes of the tensors that are created while the mode is active.

    now: bytes alive. peak: the most so far. peak_without: the most so far without gradients that
    `give_away` counted. largest: bytes of the largest tensor.
    bool_is: the answer to every question about a value, for tensors without data.
    """

    def __init__(self, bool_is: bool | None = None):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.peak_without = 0
        self.largest = 0
        self._given = 0
        self._held: dict[int, int] = {}
        self._bool_is = bool_is

    def give_away(self, parameter: torch.Tensor) -> None:
        """Leave the gradient of a parameter out of `peak_without` from now on."""
        assert parameter.grad is not None
        self._given += parameter.grad.untyped_storage().nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
