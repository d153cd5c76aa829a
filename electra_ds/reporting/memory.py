"""Memory of a run: bytes on a rank at each ZeRO stage and precision, as DeepSpeed 0.19 allocates.

Model states follow from the sizes of the parameters. Activations are counted while the model runs
on fake tensors, which have shapes but no data. tests/support/engine_memory.py compares both with
measured memory. Dimensions: B rows, S tokens of a row.
"""

import weakref
from collections.abc import Sequence
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
from electra_ds.reporting.optimizer_memory import (
    GroupSizes,
    counter_bytes,
    group_sizes,
    moment_elements,
    update_copies,
)

PRECISIONS = ("fp32", "bf16 autocast", "half (bf16, fp16)")


class Memory(NamedTuple):
    """Largest numbers of bytes on a rank.

    states: weights, gradients, fp32 master weights and moments, padding included.
    gradients: bytes of `states` that are freed between a step and the next backward (0 at stage 3).
    buckets: buffers in which gradients are reduced and (stage 3) weights are gathered.
    activations: of forward and backward of one micro-batch; at stage 0 with the gradients that
        autograd produces.
    update: copies that the optimizer step makes, of gradients and of updates.
    """

    states: int
    gradients: int
    buckets: int
    activations: int
    update: int

    @property
    def peak(self) -> int:
        """The largest number of bytes held at once."""
        forward_backward = self.states - self.gradients + self.buckets + self.activations
        return max(forward_backward, self.states + self.update)


def memory(
    config: RunConfig,
    world_size: int,
    stages: Sequence[int] = range(4),
    precisions: Sequence[str] = PRECISIONS,
) -> dict[tuple[int, str], Memory]:
    """(stage, precision) -> memory of a rank, without offload and without compiled layers.

    Bucket sizes are read from the run's own engine file at its stage, and from the shipped
    zeroN.json at the other stages.
    """
    module = meta_model(config)
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    kind = config.optimizer.kind
    groups = group_sizes(module, kind)
    copies = {
        (stage, precision): update_copies(
            module, kind, stage, precision == PRECISIONS[2], world_size
        )
        for stage in stages
        for precision in precisions
    }
    own = load_engine(config.engine).get("zero_optimization", {})
    needs = {}
    for precision in precisions:
        activations = activation_bytes(config, precision)
        for stage in stages:
            is_own = own.get("stage", 0) == stage
            zero = own if is_own else load_engine(f"zero{stage}")["zero_optimization"]
            held = copies[stage, precision]
            need = _at_stage(stage, precision, groups, config, world_size, zero, activations, held)
            # Every rank holds the weights of a frozen generator whole. In half precision rank 0 has
            # their fp32 values for checkpoints as well, in the memory of the host.
            width = 4
            if precision == PRECISIONS[2]:
                width = 2 + 4 * (device_here() == "cpu")
            needs[stage, precision] = need._replace(states=need.states + width * frozen)
    return needs


def _at_stage(
    stage: int,
    precision: str,
    groups: list[GroupSizes],
    config: RunConfig,
    world_size: int,
    zero: dict[str, Any],
    activations: tuple[int, int],
    copies: int,
) -> Memory:
    """Memory at one stage.

    zero: DeepSpeed's zero_optimization. activations: activation_bytes. copies: update_copies.
    """
    width = 2 if precision == PRECISIONS[2] else 4
    states, gradients = model_state_bytes(groups, world_size)[stage, precision]
    sizes = [group.sizes for group in groups]
    largest_group = max(map(sum, sizes))
    count = sum(map(sum, sizes))
    bucket = 0
    # One rank at stage 1 or 2 uses no bucket, see engine.SINGLE_RANK_ZERO.
    is_bucketed = zero.get("contiguous_gradients", True) and (world_size > 1 or stage in (0, 3))
    if is_bucketed:
        bucket = int(zero.get("reduce_bucket_size", 5e8)) * width
    # The step makes a flat copy of the gradients; for half precision also one in fp32.
    update = (4 + width % 4) * largest_group // world_size
    if stage == 0:
        buckets = 0
        update = max(4 * count if width == 2 else 0, copies)
    elif stage == 3:
        # Stage 3 gathers the weights flat, and then one by one.
        gathered = count + min(count, int(zero.get("stage3_prefetch_bucket_size", 5e7)))
        buckets = bucket + (width * gathered if world_size > 1 else 0)
        update = max(update, copies) + bucket
    else:
        update = max(update, copies)
        buckets = bucket * (2 if zero.get("overlap_comm") else 1)
    # Stage 1 reduces at the last micro-batch only, so it accumulates whole gradients until then.
    accumulated = width * count if stage == 1 else gradients
    if config.accumulation(world_size) == 1:
        accumulated = 0
    return Memory(states, gradients, buckets, accumulated + activations[stage == 0], update)


def model_state_bytes(
    groups: list[GroupSizes], world_size: int
) -> dict[tuple[int, str], tuple[int, int]]:
    """(stage, precision) -> (bytes of all model states, bytes of the gradients among them).

    The numbers are those of the rank that holds most. Model states are weights, gradients, fp32
    master weights, moments, and Adam's step counters (4 bytes per tensor of the optimizer).
    Stages 1 and 2 split a flat group into shares, padded to 2 elements per rank. A rank keeps the
    whole gradient of a parameter that lies in its share only partly. Stage 3 splits each parameter.
    From stage 1 on, fp32 has a second copy of the weights.
    """
    needs: dict[tuple[int, str], tuple[int, int]] = {}
    sizes = [group.sizes for group in groups]
    counts = [sum(group) for group in sizes]
    count = sum(counts)
    padded = [-(-sum(group) // (2 * world_size)) * 2 * world_size for group in sizes]
    shares = [sum(-(-size // world_size) for size in group) for group in sizes]
    kept = max(
        sum(_gradients_kept(*pair, rank, world_size) for pair in zip(sizes, padded, strict=True))
        for rank in range(world_size)
    )
    flat_moments = 4 * moment_elements(groups, padded) // world_size
    flat_counters = counter_bytes(groups, [1] * len(groups))
    for precision, width in zip(PRECISIONS, (4, 4, 2), strict=True):
        masters = 0 if width == 4 else 4  # stage 0 in fp32 updates the weights in place
        states = (2 * width + masters) * count + 4 * moment_elements(groups, counts)
        states += counter_bytes(groups, list(map(len, sizes)))
        needs[0, precision] = states, width * count
        for stage in (1, 2):
            states = width * (sum(padded) + kept) + 4 * sum(padded) // world_size
            needs[stage, precision] = states + flat_moments + flat_counters, width * kept
        states = (2 * width + 4) * sum(shares) + 4 * moment_elements(groups, shares)
        needs[3, precision] = states + flat_counters, 0
    return needs


def _gradients_kept(group: list[int], padded: int, rank: int, world_size: int) -> int:
    """Elements of the gradients of one flat group that a rank keeps.

    A rank keeps the whole gradient of each parameter that lies at least partly in its share. The
    last rank also keeps the padding.
    """
    share = padded // world_size
    first, kept = 0, 0
    for size in group:
        is_in_share = first < share * (rank + 1) and first + size > share * rank
        kept += size if is_in_share else 0
        first += size
    return kept + (padded - first if rank == world_size - 1 else 0)


def activation_bytes(config: RunConfig, precision: str) -> tuple[int, int]:
    """Peak bytes of activations in forward and backward of one micro-batch.

    Returns (without the gradients of parameters, with all of them). The numbers are those of the
    device kind of this machine: attention on a CPU keeps its probabilities, [B, heads, S, S] per
    layer (with a local window [B, heads, S, keys of the blocks around]), and flash attention does
    not. Rows hold several documents, but attention is counted as if a row were one; long rows of
    several documents need less on a CPU.
    """
    tracker = MemoryTracker(read_value=True)
    at_rest = _forward_backward(config, precision, device_here(), tracker)
    return tracker.peak_without_released - at_rest, tracker.peak - at_rest


def device_here() -> str:
    """The kind of device for which activations are counted: cuda or cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _forward_backward(
    config: RunConfig, precision: str, device: str, tracker: "MemoryTracker"
) -> int:
    """Run forward and backward of one micro-batch on fake tensors.

    Returns the bytes of weights and batch, which exist before forward.
    """
    module = meta_model(config).to(torch.bfloat16 if precision == PRECISIONS[2] else torch.float32)
    module.recompute_layers(config.train.activation_checkpointing)
    with FakeTensorMode(allow_non_fake_inputs=True), tracker, torch.device(device):
        module.to_empty(device=device)
        batch = zero_batch(config)
        if device == "cuda":  # full rows of one document, as flash attention takes them
            rows, length = batch.input_ids.shape
            starts = torch.arange(rows + 1, dtype=torch.int32) * length
            batch = batch._replace(cu_seqlens=starts)
        at_rest = tracker.now
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(tracker.release_gradient)
        with torch.autocast(device, torch.bfloat16, enabled=precision == PRECISIONS[1]):
            loss = module(batch).total
        loss.backward()
    return at_rest


def zero_batch(config: RunConfig) -> Batch:
    """Return one micro-batch of zeros, [B, S] and [B, K], on torch's default device."""
    rows, length = config.train.micro_batch_size, config.data.sequence_length
    ids = torch.zeros(rows, length, dtype=torch.long)
    masked = max_masked_positions(config.objective.mask_prob, length)
    positions = torch.zeros(rows, masked, dtype=torch.long)
    return Batch(
        input_ids=ids,
        segment_ids=ids,
        document_ids=ids,
        position_ids=ids,
        masked_positions=positions,
        masked_weights=positions.float(),
        keep_original=positions.bool(),
        uniforms=positions.float(),
    )


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of tensors that are created while the mode is active.

    now: bytes allocated. peak: maximum of `now`. largest: bytes of the largest storage.
    peak_without_released: the peak without the gradients passed to `release_gradient`.
    read_value: returned for every read of a value (`bool(tensor)`), because fake tensors have none.
    """

    def __init__(self, read_value: bool | None = None):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.peak_without_released = 0
        self.largest = 0
        self._released = 0
        self._bytes: dict[int, int] = {}  # of each storage
        self._read_value = read_value

    def release_gradient(self, parameter: torch.Tensor) -> None:
        """Leave this gradient out of `peak_without_released` from now on."""
        if parameter.grad is not None:
            self._released += parameter.grad.untyped_storage().nbytes()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        is_read = func is torch.ops.aten._local_scalar_dense.default
        if is_read and self._read_value is not None:
            return self._read_value
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        self.peak_without_released = max(self.peak_without_released, self.now - self._released)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._bytes:
            return
        self._bytes[key] = storage.nbytes()
        weakref.finalize(storage, self._remove, key)
        self.now += storage.nbytes()
        self.largest = max(self.largest, storage.nbytes())

    def _remove(self, key: int) -> None:
        self.now -= self._bytes.pop(key)
