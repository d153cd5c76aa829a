"""Scaling of training: 1 and 2 ranks measured on this machine, 8 to 512 GPUs calculated by a model.

    python bench/scaling.py                     weak scaling, ZeRO 0 to 2, one thread a rank
    python bench/scaling.py --model --stages 1  the model of scaling; no rank is started

Measured: one rank alone and two ranks take turns with the steps of the engine. Each rank has 16
rows of 128 tokens (Small, the precision of the engine files). All ranks have the same rows, so the
losses must agree in every round. The efficiency is the time of the single rank divided by the mean
time of the two ranks, for three clocks:

    compute   CPU time of the training thread, which sleeps while it waits for the other rank
    process   CPU time of the process, with the threads of gloo, which send and add
    wall      wall time, with the waiting; it needs two idle cores

Modelled: step = accumulation x micro-batch + the communication that the backward does not hide + a
fixed cost. The bytes are those of `cost.step_traffic`, which tests/training/test_ranks_train.py
compares with the counted collectives.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from cost import step_flops, step_traffic
from peers import VOCAB_SIZE, random_batch, run_config
from report import make_parser, median_and_range, print_heading, print_row, run_main

from electra_ds.cluster.launchers import find_ranks
from electra_ds.common.json_files import write_json
from electra_ds.common.processes import free_port
from electra_ds.config.engine_files import load_engine
from electra_ds.config.loading import load_run
from electra_ds.config.schema import RunConfig
from electra_ds.data.batch import Batch
from electra_ds.model.build import build_objective, parameter_count
from electra_ds.model.losses import Totals
from electra_ds.training.engine import Engine, start

# ------------------------------------------------------------------------------- one rank and two

LENGTH = 128
RANK_ROWS = 16  # of a step
MEASURES = ("compute", "process", "wall")
WARM_UP_ROUNDS = 2  # the first step makes the optimizer's state


def run_rank(pipe: Connection, environment: dict[str, str], stages: list[int]) -> None:
    """Main function of a rank's process.

    For each ZeRO stage received through the pipe it trains one step and sends back
    [loss, seconds of each measure]. None ends the process.
    """
    os.environ.update(environment | {"DS_ACCELERATOR": "cpu"})
    torch.set_num_threads(1)
    ranks = find_ranks()
    device = start(ranks, timeout_minutes=10)
    config = rank_config(ranks.world_size)
    engines = {
        stage: Engine(
            build_objective(config, 0), config, load_engine(f"zero{stage}"), ranks, device
        )
        for stage in stages
    }
    torch.manual_seed(0)
    batches = [random_batch(RANK_ROWS, LENGTH) for _ in range(8)]
    pipe.send("ready")
    for count, stage in enumerate(iter(pipe.recv, None)):
        batch = batches[count // len(stages) % len(batches)]
        pipe.send(timed_step(engines[stage], batch, count))
    os._exit(0)  # nothing is saved, and the other ranks end, too


def rank_config(world_size: int) -> RunConfig:
    """Small without dropout, with one micro-batch of RANK_ROWS per rank and step."""
    config = run_config("small", LENGTH, RANK_ROWS, 0.0)
    train = config.train.model_copy(
        update={"global_batch_size": world_size * RANK_ROWS, "micro_batch_size": RANK_ROWS}
    )
    return config.model_copy(update={"train": train})


def timed_step(engine: Engine, batch: Batch, first_row: int) -> list[float]:
    """One step with its votes: [loss, seconds of each measure]."""
    world_size = engine.ranks.world_size
    masked_count = batch.masked_positions.numel()
    token_count = RANK_ROWS * LENGTH
    began = read_clocks()
    (losses,) = engine.forward_backward(
        [batch], [first_row], Totals(world_size * masked_count, world_size * token_count)
    )
    engine.control.send_votes(
        Totals(masked_count, token_count), stop=False, save=False, written=False
    )
    engine.step(lr=1e-4)
    engine.control.wait_votes()
    ended = read_clocks()
    seconds = [end - start for start, end in zip(began, ended, strict=True)]
    return [world_size * float(losses.total), *seconds]


def read_clocks() -> tuple[float, float, float]:
    """Seconds, in the order of MEASURES."""
    return time.thread_time(), time.process_time(), time.perf_counter()


class Job:
    """Ranks in separate processes; each trains one step per request."""

    def __init__(self, world_size: int, stages: list[int]):
        spawn = multiprocessing.get_context("spawn")
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
        }
        self.pipes: list[Connection] = []
        for rank in range(world_size):
            variables = shared | {"RANK": rank, "LOCAL_RANK": rank}
            environment = {key: str(value) for key, value in variables.items()}
            pipe, rank_pipe = spawn.Pipe()
            arguments = (rank_pipe, environment, stages)
            spawn.Process(target=run_rank, args=arguments, daemon=True).start()
            rank_pipe.close()  # so that recv() fails if the rank dies
            self.pipes.append(pipe)
        for pipe in self.pipes:
            pipe.recv()

    def step(self, stage: int) -> tuple[float, list[float]]:
        """One step of all ranks: (loss, each measure), as means over the ranks."""
        for pipe in self.pipes:
            pipe.send(stage)
        answers = [pipe.recv() for pipe in self.pipes]
        loss, *seconds = (statistics.mean(column) for column in zip(*answers, strict=True))
        return loss, seconds

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)


def measure(stages: list[int], rounds: int) -> list[dict[str, Any]]:
    """For each stage the milliseconds of a single rank's step, and sorted efficiencies by measure.

    An efficiency is the seconds of one rank alone over the mean seconds of two ranks.
    """
    single = Job(1, stages)
    pair = Job(2, stages)
    times: dict[int, list[tuple[list[float], list[float]]]] = {stage: [] for stage in stages}
    for turn in range(WARM_UP_ROUNDS + rounds):
        for stage in stages:
            single_loss, single_seconds = single.step(stage)
            pair_loss, pair_seconds = pair.step(stage)
            # The bound allows for bf16 and for one token in a thousand that is sampled differently.
            if abs(single_loss / pair_loss - 1) > 1e-2:
                raise SystemExit(
                    f"ZeRO {stage}, step {turn}: loss {pair_loss} on two ranks; expected "
                    f"{single_loss}, as on one rank"
                )
            if turn >= WARM_UP_ROUNDS:
                times[stage].append((single_seconds, pair_seconds))
    single.end()
    pair.end()
    return [stage_record(stage, seconds) for stage, seconds in times.items()]


def stage_record(stage: int, times: list[tuple[list[float], list[float]]]) -> dict[str, Any]:
    """times: per round the measures of the single rank, and the means of the two."""
    record: dict[str, Any] = {
        "stage": stage,
        "ms": 1000 * statistics.median(single[0] for single, _ in times),
    }
    for index, name in enumerate(MEASURES):
        record[name] = sorted(single[index] / pair[index] for single, pair in times)
    return record


def print_measured(records: list[dict[str, Any]]) -> None:
    """Print the efficiencies, as median and range over the rounds."""
    print_heading("ZeRO", "CPU of one rank's step", "compute", "compute and communication", "wall")
    for record in records:
        cells = []
        for name in MEASURES:
            median, low, high = median_and_range(record[name])
            cells.append(f"{median:.2f} ({low:.2f}-{high:.2f})")
        print_row(record["stage"], f"{record['ms']:.0f} ms", *cells)


# ------------------------------------------------------------------------------ model of scaling


class Hardware(NamedTuple):
    """A node of 8 GPUs."""

    peak: float  # bf16 FLOP/s of one GPU
    bus: float  # bytes/s that a collective reaches in the node
    network: float  # bytes/s of all network adapters


# Data sheets: peaks without sparsity; NVLink 600 and 900 GB/s, of which all-reduce reaches 235 and
# 370 (published nccl-tests); one adapter of 200 and 400 Gb/s per GPU.
NODES = {"A100": Hardware(312e12, 235e9, 8 * 25e9), "H100": Hardware(989e12, 370e9, 8 * 50e9)}
NODE_GPUS = 8
NETWORK_SHARE = 0.8  # of an adapter's rate that a collective reaches
# Tokens/s of one GPU that a good implementation reaches at S128: an estimate, nothing was run.
TOKENS_PER_SECOND = {
    "A100": {"small": 1.3e6, "base": 255e3, "large": 85e3},
    "H100": {"small": 2.4e6, "base": 530e3, "large": 184e3},
}
MICRO_TOKENS = {"small": 65536, "base": 32768, "large": 16384}  # largest micro-batch, for 40 GB
LAUNCH_SECONDS = 5e-6  # to launch one kernel
LAYER_KERNELS = 60  # of one layer, forward and backward
# Seconds of a small message to the next node; a tree passes log2(nodes) of them twice.
HOP_SECONDS = 10e-6
# Seconds of a step that ranks do not divide: optimizer, bookkeeping of DeepSpeed.
FIXED_SECONDS = 10e-3
BUCKET = 5e6  # elements of a bucket, in the engine files
WIDTH = 2  # bytes of a number in bf16
BACKWARD_SHARE = 2 / 3  # of a micro-batch's time


class ScalingModel:
    """Step times of one preset on one kind of node."""

    def __init__(self, size: str, length: int, kind: str, adapters: int = 8):
        config = load_run(
            size, [f"data.sequence_length={length}", f"model.vocab_size={VOCAB_SIZE}"]
        )
        self.hardware = NODES[kind]
        self.network = NETWORK_SHARE * self.hardware.network * adapters / NODE_GPUS
        self.parameters = parameter_count(config).trained
        row_flops = step_flops(config) / config.train.global_batch_size
        flops_per_second = step_flops(run_config(size, 128, 1, 0.0)) / 128
        flops_per_second *= TOKENS_PER_SECOND[kind][size]
        self.row_seconds = row_flops / flops_per_second
        layers = config.model.num_layers + config.generator.num_layers
        self.launch_seconds = LAUNCH_SECONDS * LAYER_KERNELS * layers  # of a micro-batch
        self.micro_rows = MICRO_TOKENS[size] // length
        # The gradient of the word table is complete at the end of the backward, so its reduction
        # does not overlap with the backward.
        word_table = VOCAB_SIZE * config.model.embedding_size
        self.exposed_share = max(word_table, BUCKET) / self.parameters

    def send_seconds(self, shares: float, calls: float, gpus: int) -> float:
        """Seconds to send `shares` x parameters x (n - 1)/n numbers per rank in so many calls.

        They go through NVLink within a node, and through the network between nodes.
        """
        stage0 = step_traffic(self.parameters, 0, gpus, 1, WIDTH)
        stage1 = step_traffic(self.parameters, 1, gpus, 1, WIDTH)
        gather_bytes = stage1 - stage0  # of one share
        nodes = max(1, gpus // NODE_GPUS)
        rate = self.hardware.bus
        if nodes > 1:
            rate = min(rate, self.network)
        latency = calls * HOP_SECONDS * (1 + 2 * math.log2(nodes))
        return shares * gather_bytes / rate + latency

    def step_seconds(self, stage: int, gpus: int, rows: float) -> float:
        """Seconds of an optimizer step. rows: of one GPU."""
        accumulation = math.ceil(rows / self.micro_rows)
        micro_seconds = max(self.row_seconds * rows / accumulation, self.launch_seconds)
        compute = accumulation * micro_seconds
        if gpus == 1:
            return compute + FIXED_SECONDS
        if stage == 0:
            return compute + self.send_seconds(2, 1, gpus) + FIXED_SECONDS
        buckets = math.ceil(self.parameters / BUCKET)
        reduction = self.send_seconds(2, buckets, gpus)
        hidden = BACKWARD_SHARE * micro_seconds
        exposed = max(self.exposed_share * reduction, reduction - hidden)
        reductions = accumulation if stage == 2 else 1
        gather = self.send_seconds(1, 2, gpus)
        return compute + reductions * exposed + gather + FIXED_SECONDS

    def strong_efficiency(self, stage: int, gpus: int, batch: int) -> float | None:
        """Efficiency against one GPU with the same global batch; None if a GPU has no row."""
        if batch < gpus:
            return None
        single = self.step_seconds(0, 1, batch)
        return single / gpus / self.step_seconds(stage, gpus, batch / gpus)

    def weak_efficiency(self, stage: int, gpus: int) -> float:
        """Efficiency against one GPU with the same rows per GPU, one full micro-batch."""
        single = self.step_seconds(0, 1, self.micro_rows)
        return single / self.step_seconds(stage, gpus, self.micro_rows)


GPUS = (8, 16, 64, 128, 512)
PRESETS = {"small": (128, 128), "base": (512, 256), "large": (512, 2048)}  # length, global batch


def model_scaling(stages: list[int]) -> list[dict[str, Any]]:
    """The efficiency at each number of GPUs, for every node, preset, stage and batch."""
    records = []
    for kind, adapters in (("A100", 8), ("H100", 8), ("A100", 1)):
        node = f"{kind}, {adapters} adapter{'s' * (adapters > 1)} a node"
        for size, (length, preset_batch) in PRESETS.items():
            model = ScalingModel(size, length, kind, adapters)
            for stage in stages:
                for batch in dict.fromkeys((preset_batch, 2048, None)):
                    record = {
                        "node": node,
                        "size": size,
                        "length": length,
                        "stage": stage,
                        "global_batch_size": batch,
                        "efficiency": efficiencies(model, stage, batch),
                    }
                    records.append(record)
    return records


def efficiencies(model: ScalingModel, stage: int, batch: int | None) -> dict[int, float | None]:
    """Number of GPUs -> efficiency. batch: rows of all GPUs; None: a full micro-batch each."""
    if batch is None:
        return {gpus: model.weak_efficiency(stage, gpus) for gpus in GPUS}
    return {gpus: model.strong_efficiency(stage, gpus, batch) for gpus in GPUS}


def print_model(records: list[dict[str, Any]]) -> None:
    """Print the table of the model, and its comparison with a published result."""
    print(
        "Efficiency against one GPU, calculated by a model. "
        "batch: rows of all GPUs; weak: a full micro-batch per GPU\n"
    )
    print_heading("node", "run", "ZeRO", *(f"{gpus} GPUs" for gpus in GPUS))
    for record in records:
        batch = record["global_batch_size"]
        kind = f"batch {batch:,}" if batch else "weak"
        run = f"{record['size']} S{record['length']} {kind}"
        cells = [
            "-" if efficiency is None else f"{efficiency:.0%}"
            for efficiency in record["efficiency"].values()
        ]
        print_row(record["node"], run, record["stage"], *cells)
    print("\n" + compare_published())


def compare_published() -> str:
    """Comparison with NVIDIA's TensorFlow 2 ELECTRA-Base.

    Its README: 67,584 rows per step at S128, micro-batches of 176 rows, A100-40G.
    """
    rows = 384 * 176
    rate_1 = 955.0  # rows/s of one GPU
    rate_8 = 7512.0
    # One GPU has 384 micro-batches per step, each of eight GPUs has 48; both have one fixed cost.
    micro_seconds = (rows / rate_1 - rows / rate_8) / (384 - 48)
    fixed_seconds = rows / rate_8 - 48 * micro_seconds
    predicted = rows / rate_8 / 48 / (micro_seconds + fixed_seconds)
    sent_seconds = ScalingModel("base", 128, "A100").send_seconds(2, 1, 384)
    return (
        "Published: 8 GPUs have 7.87 times the rate of one; 48 nodes (384 GPUs) have 56 % of one "
        f"node's rate per node. {1000 * micro_seconds:.0f} ms per micro-batch and a fixed cost of "
        f"{1000 * fixed_seconds:.0f} ms per step fit the rates of 1 and 8 GPUs and predict "
        f"{predicted:.0%} for 48 nodes. The communication takes {1000 * sent_seconds:.1f} ms in "
        "this model."
    )


# ---------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", action="store_true", help="print the model of scaling")
    parser.add_argument(
        "--stages", type=int, nargs="+", default=[0, 1, 2], choices=range(3), help="ZeRO stages"
    )
    parser.add_argument("--rounds", type=int, default=7, help="paired rounds per stage")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.model:
        records = model_scaling(options.stages)
        print_model(records)
    else:
        records = measure(options.stages, options.rounds)
        print_measured(records)
    if options.json:
        write_json(options.json, records)


if __name__ == "__main__":
    run_main(main)
