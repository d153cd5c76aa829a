"""What does a training step hold, and at most, beside what `electra_ds.cost.memory` says of it? Not a test file itself.

python tests/support/engine_memory.py          tiny, small, and small with recomputed layers, ZeRO 0 and 1, one rank
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


def packed_batch(config: RunConfig) -> Batch:
    """Rows of two pieces and random ids."""
    rows, length = config.train.micro_batch_size, config.data.sequence_length
    k = max_masked_positions(config.objective.mask_prob, length)
    ids = torch.randint(104, config.model.vocab_size, (rows, length))
    pieces = (torch.arange(length) >= length // 2).long().expand(rows, -1) + 1
    chosen = torch.rand(rows, length - 2).argsort(1)[:, :k] + 1
    uniforms = torch.rand(rows, k)
    places = torch.arange(length).expand(rows, -1) % (length // 2)
    return Batch(
        ids,
        torch.zeros_like(ids),
        pieces,
        places,
        chosen,
        torch.ones(rows, k),
        uniforms > 0.85,
        uniforms,
    )


def allocated(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that work() leaves allocated on a CPU, and the most at once, as PyTorch's allocator tells its profiler."""
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
    """Address -> bytes of every storage of a tensor of this process (profilers miss what gloo's threads free)."""
    gc.collect()  # engines are made of cycles
    tensors = [
        thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)
    ]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def engine_memory(config: RunConfig, ranks: Ranks, device: torch.device) -> dict[str, list[int]]:
    """[measured, predicted] bytes of the model states, and of a step's peak."""
    made, batch = [], packed_batch(config)

    def make():
        module = build_objective(config, seed=0)
        module.recompute_layers(config.train.activation_checkpointing)
        made.append(Engine(module, config, load_engine(config.engine), ranks, device))
        gc.collect()

    def forward_backward():
        micro_batches = config.accumulation(ranks.world_size)
        engine.forward_backward([batch] * micro_batches, [0] * micro_batches, Totals(1.0, 1.0))
        gc.collect()

    before = held()
    resting, _ = allocated(make)
    engine = made.pop()
    forward_backward()
    engine.step(1e-4)  # the first step makes what stays
    gradients, during = allocated(forward_backward)
    measured = sum(size for address, size in held().items() if address not in before)
    _, update = allocated(lambda: engine.step(1e-4))
    precision = PRECISIONS[
        ("torch_autocast" in engine.deepspeed_config) + 2 * ("bf16" in engine.deepspeed_config)
    ]
    predicted = memory(config, ranks.world_size, [engine.stage], [precision])[
        engine.stage, precision
    ]
    zero = engine.deepspeed_config["zero_optimization"]
    engine.close()
    peak, states = resting + max(during, gradients + update), predicted.states
    if zero["stage"] == 3:  # keeps its bucket for good
        states += int(zero["reduce_bucket_size"]) * (2 if precision == PRECISIONS[2] else 4)
    return {"states": [measured, states], "peak": [peak, predicted.peak]}


def run(size: str, engine: str | dict, length: int, rows: int, *sets: str) -> RunConfig:
    """A run of one micro-batch a step and rank, the vocabulary's size known."""
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
