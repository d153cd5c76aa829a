"""Memory of a training step: measured on an engine, and predicted by `electra_ds.reporting.memory`.

python tests/support/engine_memory.py     # tiny, small, small with recomputed layers; one rank
"""

import gc
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from electra_ds.cluster.launchers import Ranks, find_ranks
from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.engine_files import load_engine
from electra_ds.config.loading import load_run
from electra_ds.config.schema import RunConfig
from electra_ds.data.batch import Batch
from electra_ds.data.masking import max_masked_positions
from electra_ds.model.build import build_objective
from electra_ds.model.losses import Totals
from electra_ds.reporting.memory import PRECISIONS, memory
from electra_ds.training.engine import Engine, start

IDS = SpecialIds(pad=0, unk=100, cls=101, sep=102, mask=103)


def packed_batch(config: RunConfig, documents: int = 2) -> Batch:
    """A micro-batch of random ids; each row holds documents of equal lengths."""
    rows, length = config.train.micro_batch_size, config.data.sequence_length
    k = max_masked_positions(config.objective.mask_prob, length)
    positions = torch.arange(length).expand(rows, -1)
    input_ids = torch.randint(104, config.model.vocab_size, (rows, length))
    masked_positions = torch.rand(rows, length - 2).argsort(1)[:, :k] + 1
    uniforms = torch.rand(rows, k)
    return Batch(
        input_ids,
        torch.zeros_like(input_ids),
        positions // (length // documents) + 1,
        positions % (length // documents),
        masked_positions,
        torch.ones(rows, k),
        uniforms > 0.85,
        uniforms,
    )


def allocated(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that work() leaves allocated on the CPU, and the most at once (PyTorch's profiler)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = work()
    events = (
        event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"
    )
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del kept
    return now, peak


def held() -> dict[int, int]:
    """Address -> bytes of every storage of a tensor of this process.

    Profilers miss what the threads of gloo free.
    """
    gc.collect()  # an engine refers to itself in cycles
    tensors = [
        thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)
    ]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def predicted_memory(config: RunConfig, engine: Engine, world_size: int) -> tuple[int, int]:
    """Bytes of a rank's model states and peak, as `check` reports them."""
    values = engine.deepspeed_config
    precision = PRECISIONS[("torch_autocast" in values) + 2 * ("bf16" in values)]
    predicted = memory(config, world_size, [engine.stage], [precision])[engine.stage, precision]
    states, zero = predicted.states, values["zero_optimization"]
    if zero["stage"] == 3:  # DeepSpeed never frees its bucket
        states += int(zero["reduce_bucket_size"]) * (2 if precision == PRECISIONS[2] else 4)
    return states, predicted.peak


def engine_memory(
    config: RunConfig, ranks: Ranks, device: torch.device, batch: Batch | None = None
) -> dict[str, list[int]]:
    """[measured, predicted] bytes of the model states and of a step's peak.

    Rank 0 predicts for all ranks; the others return 0 in its place. batch: of each micro-batch;
    by default `packed_batch`.
    """
    made = []
    batch = packed_batch(config) if batch is None else batch

    def make() -> None:
        module = build_objective(config, seed=0)
        module.recompute_layers(config.train.activation_checkpointing)
        made.append(Engine(module, config, load_engine(config.engine), ranks, device))
        gc.collect()

    def forward_backward() -> None:
        micro_batches = config.accumulation(ranks.world_size)
        engine.forward_backward([batch] * micro_batches, [0] * micro_batches, Totals(1.0, 1.0))
        gc.collect()

    before = held()
    resting, _ = allocated(make)
    engine = made.pop()
    forward_backward()
    engine.step(1e-4)  # the first step allocates what later ones keep
    peaks = []
    for _ in range(2):  # a busy machine frees what gloo has sent later: the smaller peak counts
        gradients, during = allocated(forward_backward)
        states = sum(size for address, size in held().items() if address not in before)
        _, update = allocated(lambda: engine.step(1e-4))
        peaks.append(resting + max(during, gradients + update))
    peak = min(peaks)
    predicted = predicted_memory(config, engine, ranks.world_size) if ranks.rank == 0 else (0, 0)
    engine.close()
    return {"states": [states, predicted[0]], "peak": [peak, predicted[1]]}


def run(size: str, engine: str | dict, length: int, rows: int, *sets: str) -> RunConfig:
    """A run of one micro-batch per step and rank, with the size of the vocabulary filled in."""
    shape = [
        f"data.sequence_length={length}",
        f"train.micro_batch_size={rows}",
        f"train.global_batch_size={rows}",
    ]
    config = load_run(size, [*shape, *sets], engine)
    return config.with_data(config.model.vocab_size or 30522, IDS, length)


if __name__ == "__main__":
    RANKS = find_ranks()
    DEVICE = start(RANKS, timeout_minutes=2)
    print("| run | engine | states, measured | predicted | peak, measured | predicted | ratio |")
    print("|---|---|---|---|---|---|---|")
    for size, *shape in (
        ("tiny", 128, 16),
        ("small", 128, 16),
        ("small", 512, 4),
        ("small", 512, 4, "train.activation_checkpointing=true"),
    ):
        for engine in sys.argv[1:] or ("zero0-fp32", "zero1-autocast", "zero1-bf16"):
            found = engine_memory(run(size, engine, *shape), RANKS, DEVICE)
            cells = [f"{value / 1e6:.1f} MB" for value in found["states"] + found["peak"]]
            ratio = found["peak"][1] / found["peak"][0]
            print(f"| {size} {shape} | {engine} | {' | '.join(cells)} | {ratio:.3f} |", flush=True)
