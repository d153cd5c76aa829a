"""How does training scale? Measured from one rank to two on this machine; on paper from 8 GPUs to 512.

    python bench/scaling.py                     weak scaling, ZeRO 0 to 2, one thread a rank, 7 paired rounds
    python bench/scaling.py --model --stages 1  the model of scaling; no rank is started
    either with --json FILE

Measured: one rank alone and two ranks take turns on the engine's steps, each rank on 16 rows of 128 tokens (Small, the
precision of the engine files). All draw the same rows, so their losses must agree in every round. "compute" is the CPU
time of the thread that trains, which sleeps while it waits for others; "process" adds gloo's threads, which send and
add; "wall" holds the waiting, too, and needs two idle cores.

The model: step = accumulation x micro-batch + what communication the backward does not hide + a fixed cost. The bytes
are those of `cost.step_traffic`, which tests/test_ranks_train.py holds against the counted collectives.
"""

import math
import multiprocessing
import os
import statistics
import time
from typing import NamedTuple

import torch
from cost import step_flops, step_traffic
from peers import VOCAB, random_batch, run_config
from report import bench, heading, parser_of, row, spread

from electra_ds.cluster.launchers import find_ranks
from electra_ds.common.files import write_json
from electra_ds.common.processes import free_port
from electra_ds.config.engine_files import load_engine
from electra_ds.config.loading import load_run
from electra_ds.model.build import build_objective, parameter_count
from electra_ds.training.engine import Engine, start

LENGTH, ROWS = 128, 16  # of a rank's step
MEASURES = ("compute", "process", "wall")

# ------------------------------------------------------------------------------------------------ one rank against two


def rank(pipe, place: dict[str, str], stages: list[int]) -> None:
    """A process: takes a stage from the pipe, trains a step, gives back [loss, seconds of each measure]."""
    os.environ.update(place | {"DS_ACCELERATOR": "cpu"})
    torch.set_num_threads(1)
    ranks = find_ranks()
    device = start(ranks, timeout_minutes=10)
    world = ranks.world_size
    config = run_config("small", LENGTH, ROWS, 0.0)
    train = config.train.model_copy(
        update={"global_batch_size": world * ROWS, "micro_batch_size": ROWS}
    )
    config = config.model_copy(update={"train": train})
    engines = {
        s: Engine(build_objective(config, 0), config, load_engine(f"zero{s}"), ranks, device)
        for s in stages
    }
    torch.manual_seed(0)
    batches = [random_batch(ROWS, LENGTH) for _ in range(8)]
    pipe.send("ready")
    for count, stage in enumerate(iter(pipe.recv, None)):
        engine, batch = engines[stage], batches[count // len(stages) % len(batches)]
        began = time.thread_time(), time.process_time(), time.perf_counter()
        (losses,) = engine.forward_backward(
            [batch], [count], (world * batch.masked_positions.numel(), world * ROWS * LENGTH)
        )
        engine.send_votes(batch.masked_positions.numel(), ROWS * LENGTH, False, False, False)
        engine.step(lr=1e-4)
        engine.wait_votes()
        ended = time.thread_time(), time.process_time(), time.perf_counter()
        pipe.send(
            [world * float(losses.total), *(b - a for a, b in zip(began, ended, strict=True))]
        )
    os._exit(0)  # there is nothing to save, and the peers are told to leave as well


class Job:
    """So many ranks in processes of their own, which train when asked to."""

    def __init__(self, world_size: int, stages: list[int]):
        spawn, place = (
            multiprocessing.get_context("spawn"),
            {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()},
        )
        place |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        self.pipes = []
        for index in range(world_size):
            ours, theirs = spawn.Pipe()
            own = {
                key: str(value)
                for key, value in (place | {"RANK": index, "LOCAL_RANK": index}).items()
            }
            spawn.Process(target=rank, args=(theirs, own, stages), daemon=True).start()
            theirs.close()  # so that a rank that dies ends the wait for it
            self.pipes.append(ours)
        for pipe in self.pipes:
            pipe.recv()

    def step(self, stage: int) -> tuple[float, list[float]]:
        """One step of all ranks: the loss, and the mean over the ranks of each measure."""
        for pipe in self.pipes:
            pipe.send(stage)
        found = [pipe.recv() for pipe in self.pipes]
        loss, *taken = (statistics.mean(column) for column in zip(*found, strict=True))
        return loss, taken


def measure(stages: list[int], rounds: int) -> list[dict]:
    """Per stage and measure the efficiency of two ranks: seconds of one rank alone over those of each of two."""
    one, two = Job(1, stages), Job(2, stages)
    taken = {stage: [] for stage in stages}
    for turn in range(rounds + 2):
        for stage in stages:
            (loss, alone), (other, paired) = one.step(stage), two.step(stage)
            if abs(loss / other - 1) > 1e-2:  # bf16, and a token in a thousand sampled otherwise
                raise SystemExit(
                    f"ZeRO {stage}, step {turn}: one rank has loss {loss}, two ranks {other}"
                )
            if turn >= 2:  # the first steps make the optimizer's state and warm up
                taken[stage].append((alone, paired))
    for pipe in one.pipes + two.pipes:
        pipe.send(None)
    found = []
    for stage, pairs in taken.items():
        found.append(
            {"stage": stage, "ms": 1000 * statistics.median(alone[0] for alone, _ in pairs)}
        )
        for index, name in enumerate(MEASURES):
            found[-1][name] = sorted(alone[index] / paired[index] for alone, paired in pairs)
    return found


def print_measured(found: list[dict]) -> None:
    """The markdown table; efficiencies as median and spread over the rounds."""
    heading("ZeRO", "CPU of one rank's step", "compute", "compute and communication", "wall")
    for stage in found:
        cells = ["{:.2f} ({:.2f}-{:.2f})".format(*spread(stage[measure])) for measure in MEASURES]
        row(stage["stage"], f"{stage['ms']:.0f} ms", *cells)


# ------------------------------------------------------------------------------------------------------------ on paper


class Hardware(NamedTuple):
    """A node of 8 GPUs: peak bf16 FLOP/s of one, bytes/s a collective reaches in the node, and all network adapters."""

    peak: float
    bus: float
    network: float


# Data sheets: peaks without sparsity; NVLink 600 and 900 GB/s, of which all-reduce reaches 235 and 370 (published
# nccl-tests); one adapter of 200 and 400 Gb/s per GPU.
NODES = {"A100": Hardware(312e12, 235e9, 8 * 25e9), "H100": Hardware(989e12, 370e9, 8 * 50e9)}
NETWORK_SHARE = 0.8  # of an adapter's rate that a collective reaches
# Tokens/s of one GPU that a good implementation reaches at S128: an estimate, nothing run.
TOKENS_PER_SECOND = {
    "A100": {"small": 1.3e6, "base": 255e3, "large": 85e3},
    "H100": {"small": 2.4e6, "base": 530e3, "large": 184e3},
}
MICRO_TOKENS = {
    "small": 65536,
    "base": 32768,
    "large": 16384,
}  # the most of a micro-batch, for 40 GB
LAUNCH, KERNELS = (
    5e-6,
    60,
)  # seconds a kernel's launch takes, kernels of a layer's forward and backward
HOP = 10e-6  # seconds that a small message takes to the next node; a tree passes log2(nodes) of them twice
FIXED = 10e-3  # seconds of a step that no rank shares: optimizer, DeepSpeed's bookkeeping
BUCKET, WIDTH = 5e6, 2  # the engine files: elements of a bucket; bytes of a number in bf16
BACKWARD = 2 / 3  # of a micro-batch's time


class Model:
    """Step times of one preset on one kind of node."""

    def __init__(self, size: str, length: int, kind: str, adapters: int = 8):
        config = load_run(size, [f"data.sequence_length={length}", f"model.vocab_size={VOCAB}"])
        self.length, self.hardware = length, NODES[kind]
        self.network = NETWORK_SHARE * self.hardware.network * adapters / 8
        self.parameters = parameter_count(config).joint
        flops, short = (
            step_flops(c) / c.train.global_batch_size
            for c in (config, run_config(size, 128, 1, 0.0))
        )
        self.row = flops / (short / 128 * TOKENS_PER_SECOND[kind][size])  # seconds
        self.floor = LAUNCH * KERNELS * (config.model.num_layers + config.generator.num_layers)
        self.micro_rows = MICRO_TOKENS[size] // length
        # The word table gets its last gradient at the very end of the backward, when nothing is left to hide it.
        self.tail = max(VOCAB * config.model.embedding_size, BUCKET) / self.parameters

    def send(self, shares: float, calls: float, gpus: int) -> float:
        """Seconds for so many times parameters x (n - 1)/n numbers a rank: NVLink in a node, the network beyond."""
        gather = step_traffic(self.parameters, 1, gpus, 1, WIDTH) - step_traffic(
            self.parameters, 0, gpus, 1, WIDTH
        )
        nodes = max(1, gpus // 8)
        rate = self.hardware.bus if nodes == 1 else min(self.hardware.bus, self.network)
        return shares * gather / rate + calls * HOP * (1 + 2 * math.log2(nodes))

    def step(self, stage: int, gpus: int, rows: float) -> float:
        """Seconds of an optimizer step of so many rows a GPU."""
        accumulation = math.ceil(rows / self.micro_rows)
        micro = max(self.row * rows / accumulation, self.floor)
        if gpus == 1:
            return accumulation * micro + FIXED
        buckets = math.ceil(self.parameters / BUCKET)
        if stage == 0:
            return accumulation * micro + self.send(2, 1, gpus) + FIXED
        reduce = self.send(2, buckets, gpus)
        exposed = max(self.tail * reduce, reduce - BACKWARD * micro)
        times = accumulation if stage == 2 else 1
        return accumulation * micro + times * exposed + self.send(1, 2, gpus) + FIXED

    def strong(self, stage: int, gpus: int, batch: int) -> float | None:
        """Efficiency against one GPU with the same global batch, None where a GPU has no row."""
        return (
            None
            if batch < gpus
            else self.step(0, 1, batch) / gpus / self.step(stage, gpus, batch / gpus)
        )

    def weak(self, stage: int, gpus: int) -> float:
        """Efficiency against one GPU with the same rows a GPU, one full micro-batch."""
        return self.step(0, 1, self.micro_rows) / self.step(stage, gpus, self.micro_rows)


GPUS = (8, 16, 64, 128, 512)
PRESETS = {
    "small": (128, 128),
    "base": (512, 256),
    "large": (512, 2048),
}  # sequence_length, global_batch_size


def model_rows(stages: list[int]) -> list[dict]:
    """The table of the model: efficiency at each number of GPUs."""
    rows = []
    for kind, adapters in (("A100", 8), ("H100", 8), ("A100", 1)):
        node = f"{kind}, {adapters} adapter{'s' * (adapters > 1)} a node"
        for size, (length, preset) in PRESETS.items():
            model = Model(size, length, kind, adapters)
            for stage in stages:
                for batch in dict.fromkeys((preset, 2048, None)):
                    found = [
                        model.strong(stage, n, batch) if batch else model.weak(stage, n)
                        for n in GPUS
                    ]
                    case = {"node": node, "size": size, "length": length, "stage": stage}
                    rows.append(
                        case
                        | {
                            "global_batch_size": batch,
                            "efficiency": dict(zip(GPUS, found, strict=True)),
                        }
                    )
    return rows


def print_model(found: list[dict]) -> None:
    """The markdown table, and what the published scaling of another implementation says of the model."""
    print(
        "Efficiency against one GPU, on paper. batch: rows of all GPUs; weak: a full micro-batch each\n"
    )
    heading("node", "run", "ZeRO", *(f"{n} GPUs" for n in GPUS))
    for case in found:
        batch = f"batch {case['global_batch_size']:,}" if case["global_batch_size"] else "weak"
        cells = ["-" if share is None else f"{share:.0%}" for share in case["efficiency"].values()]
        row(case["node"], f"{case['size']} S{case['length']} {batch}", case["stage"], *cells)
    print("\n" + check_published())


def check_published() -> str:
    """NVIDIA's TensorFlow 2 ELECTRA-Base (its README: 67,584 rows a step at S128, 176 a micro-batch, A100-40G)."""
    rows, one, eight = 384 * 176, 955.0, 7512.0  # rows/s of one GPU and of eight
    micro = (rows / one - rows / eight) / (384 - 48)  # seconds; both have one fixed cost a step
    fixed = rows / eight - 48 * micro
    predicted = rows / eight / 48 / (micro + fixed)
    model = Model("base", 128, "A100")
    return (
        f"Published: 8 GPUs 7.87 x 1, 48 nodes (384 GPUs) 56 % of one node's rate a node. Both fit "
        f"{1000 * micro:.0f} ms a micro-batch and a fixed {1000 * fixed:.0f} ms a step, which predicts {predicted:.0%} "
        f"for 48 nodes; what is sent takes "
        f"{1000 * model.send(2, 1, 384):.1f} ms in this model."
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", action="store_true", help="the model on paper")
    parser.add_argument(
        "--stages", type=int, nargs="+", default=[0, 1, 2], choices=range(3), help="of ZeRO"
    )
    parser.add_argument("--rounds", type=int, default=7, help="paired rounds per stage")
    options = parser.parse_args()
    found = model_rows(options.stages) if options.model else measure(options.stages, options.rounds)
    (print_model if options.model else print_measured)(found)
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    bench(main)
