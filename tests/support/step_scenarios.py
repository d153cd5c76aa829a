"""Scenarios: what a step sends, reads and holds; slow data; stop requests; a lost run folder."""

import contextlib
import itertools
import signal
import time
from collections.abc import Callable
from pathlib import Path

import host_reads
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from engine_memory import engine_memory
from engine_memory import run as known_run
from scenario_tools import finish, here, in_step, kill_self, note, train, write_engine
from small_run import STAGES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from electra_ds.common import folder_lock
from electra_ds.config.engine_files import load_engine
from electra_ds.data import loader
from electra_ds.data.shard_reader import ShardReader
from electra_ds.reporting.status import status
from electra_ds.training import engine as engine_module
from electra_ds.training import stop_requests
from electra_ds.training.engine import Engine

AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
MEMORY_CASES = {  # of tiny: sequence length, rows of a micro-batch, settings
    "long": (128, 8),
    "recomputed": (128, 8, "train.activation_checkpointing=true"),
    "short": (32, 16, "generator.hidden_dropout=0.1", "model.attention_dropout=0.1"),
}
MODERN_MEMORY = {  # of modern-tiny: settings, and (stage, precision) of its engines
    "local": (
        ("model.local_attention=16", "model.attention_dropout=0.1", "model.mlp_dropout=0.1"),
        [(0, "fp32"), (1, "autocast"), (2, "bf16")],
    ),
    "local recomputed": (
        ("model.local_attention=16", "train.activation_checkpointing=true"),
        [(3, "fp32")],
    ),
}
DEBERTA_MEMORY = {  # of deberta-tiny, as MODERN_MEMORY
    "disentangled": (("model.attention_dropout=0.1",), [(0, "bf16"), (1, "fp32")]),
    "disentangled recomputed": (("train.activation_checkpointing=true",), [(2, "autocast")]),
}
# Optimizer -> its engine; tiny with short rows, where the update needs most.
OPTIMIZER_MEMORY = {"muon": (1, "fp32"), "stable_adamw": (3, "fp32"), "lamb": (2, "bf16")}


class Collectives(TorchDispatchMode):
    """Every collective of this thread, as [name, dtype, elements of the largest tensor]."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = (leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
            largest = max(tensors, key=torch.Tensor.numel)
            dtype = str(largest.dtype).removeprefix("torch.")
            self.seen.append([func._opname.strip("_"), dtype, largest.numel()])
        return func(*args, **(kwargs or {}))


def traffic() -> None:
    """The collectives between the ends of steps 4 and 5, and the shapes of the parameters."""
    owners = {"zero_optimization": {"stage": 1, "use_multi_rank_bucket_allreduce": False}}
    owners_file = write_engine("zero1-owners", owners)
    runs = [
        (f"zero{stage}-{kind}", accumulation)
        for stage in STAGES
        for kind, accumulation in (("fp32", 1), ("fp32", 2), ("bf16", 2))
    ]
    runs += [("zero1-autocast", 1), (owners_file, 1)]
    original = Engine.step
    for engine, accumulation in runs:
        ends, shapes = [], []

        def step(self, lr, ends=ends, shapes=shapes):
            result = original(self, lr)
            ends.append(len(sent.seen))
            shapes[:] = [list(self.shape(name)) for name in self.parameters]
            return result

        Engine.step = step
        name = f"traffic-{Path(engine).stem}-{accumulation}"
        micro_batch_size = f"train.micro_batch_size={8 // accumulation}"
        with Collectives() as sent:
            finish(name, engine, "train.total_steps=5", "logging.every=1000", micro_batch_size)
        note(name, {"sent": sent.seen[ends[3] : ends[4]], "shapes": shapes})
    Engine.step = original


def slow_reader() -> None:
    """The rows of rank 1 take longer to read than a step takes."""
    read, read_tokens = ShardReader.read, loader.READ_TOKENS

    def slow_read(self, rows):
        time.sleep(0.5 if here.rank == 1 else 0)
        return read(self, rows)

    ShardReader.read, loader.READ_TOKENS = slow_read, 1  # rows of one step at a time
    with (
        open(here.outs / f"slow-console-{here.rank}", "w") as console,
        contextlib.redirect_stdout(console),
    ):
        finish("slow", "zero1-fp32", "train.total_steps=6", "logging.every=2")
    ShardReader.read, loader.READ_TOKENS = read, read_tokens


def signals_and_files() -> None:
    """A signal only to rank 1, OUT/STOP and OUT/SAVE, each in the fourth step."""

    def requested(name: str, rank: int, request: Callable[[], None]) -> int | str:
        def act() -> None:
            note(f"status-{name}", status(here.outs / name))
            if here.rank == rank:
                request()

        with in_step(4, act):
            return train(name, "zero1-fp32")

    def touch(name: str, file: str) -> Callable[[], None]:
        return lambda: (here.outs / name / file).touch()

    found = {
        "signal": requested("signal", 1, lambda: kill_self(signal.SIGUSR1)),
        "term": requested("term", 1, lambda: kill_self(signal.SIGTERM)),
    }
    look_seconds, stop_requests.LOOK_SECONDS = stop_requests.LOOK_SECONDS, 0.0
    found["stop-file"] = requested("stop-file", 0, touch("stop-file", "STOP"))
    found["save-file"] = requested("save-file", 0, touch("save-file", "SAVE"))
    stop_requests.LOOK_SECONDS = look_seconds
    note("stops", found)


def lost_folder() -> None:
    """Another machine takes OUT in the third step: noticed by the next heartbeat, or by a save."""

    def lose(name: str, every: int, beat_seconds: float) -> int | str:
        def take_over() -> None:
            (here.outs / name / "lock").write_text('{"host": "node7", "pid": 1}')
            time.sleep(min(10 * beat_seconds, 0.5))

        original, folder_lock.BEAT_SECONDS = folder_lock.BEAT_SECONDS, beat_seconds
        with in_step(3, take_over):
            ended = train(name, "zero0-fp32", f"checkpoint.every={every}")
        folder_lock.BEAT_SECONDS = original
        return ended

    note("lost", [lose("lost-voting", 1000, 0.05), lose("lost-saving", 5, 60.0)])


def needed_memory() -> None:
    """Model states and the peak of a step, measured and predicted, at every stage and precision."""
    found, cases = {}, itertools.cycle(MEMORY_CASES)
    micro_batches = ["model.vocab_size=3000", f"train.global_batch_size={16 * here.world_size}"]
    buckets = {"reduce_bucket_size": 3_000_000, "stage3_prefetch_bucket_size": 3_000_000}
    precisions = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "autocast": AUTOCAST}
    for kind, precision in precisions.items():
        for stage in STAGES:
            zero = load_engine(f"zero{stage}-fp32")["zero_optimization"] | buckets
            case = next(cases)
            length, rows, *sets = MEMORY_CASES[case]
            engine = {"zero_optimization": zero} | precision
            config = known_run("tiny", engine, length, rows, *micro_batches, *sets)
            found[f"{case} z{stage} {kind}"] = engine_memory(config, here.ranks, here.device)
    for preset, cases_of in (("modern-tiny", MODERN_MEMORY), ("deberta-tiny", DEBERTA_MEMORY)):
        for case, (sets, engines) in cases_of.items():
            for stage, kind in engines:
                zero = load_engine(f"zero{stage}-fp32")["zero_optimization"] | buckets
                engine = {"zero_optimization": zero} | precisions[kind]
                config = known_run(preset, engine, 128, 8, *micro_batches, *sets)
                found[f"{case} z{stage} {kind}"] = engine_memory(config, here.ranks, here.device)
    for optimizer, (stage, kind) in OPTIMIZER_MEMORY.items():
        zero = load_engine(f"zero{stage}-fp32")["zero_optimization"] | buckets
        engine = {"zero_optimization": zero} | precisions[kind]
        sets = (*micro_batches, f"optimizer.kind={optimizer}")
        config = known_run("tiny", engine, 32, 8, *sets)
        found[f"{optimizer} z{stage} {kind}"] = engine_memory(config, here.ranks, here.device)
    note(f"memory-of-{here.world_size}", found)


def single_rank() -> None:
    """Functions that read tensors between two log lines; stages that reduce gradients.

    Then the same runs with the ZeRO options that several ranks need.
    """
    sets = ("logging.every=100", "train.total_steps=10")
    reduce, reduced_at = DeepSpeedEngine.allreduce_gradients, set()

    def counted(self, *arguments, **options):
        reduced_at.add(self.zero_optimization_stage())
        return reduce(self, *arguments, **options)

    DeepSpeedEngine.allreduce_gradients = counted
    for stage in STAGES:
        readers = set()
        probe = host_reads.during(7, 9, host_reads.Operators(readers), host_reads.Calls(readers))
        with (
            open(here.outs / f"alone-console-z{stage}", "w") as console,
            contextlib.redirect_stdout(console),
            probe,
        ):
            finish(f"alone-z{stage}", f"zero{stage}-fp32", *sets)
        note(f"reads-z{stage}", sorted(readers))
    DeepSpeedEngine.allreduce_gradients = reduce
    note("reduced-at", sorted(reduced_at))
    options, engine_module.SINGLE_RANK_ZERO = engine_module.SINGLE_RANK_ZERO, {}
    for stage in (1, 2):
        finish(f"as-many-z{stage}", f"zero{stage}-fp32", *sets)
    engine_module.SINGLE_RANK_ZERO = options


def never_waits() -> None:
    """On CUDA: torch raises if our part of a step waits for the device; DeepSpeed may wait."""
    for name in ("step", "_backward_epilogue"):
        method = getattr(DeepSpeedEngine, name)
        setattr(DeepSpeedEngine, name, host_reads.waiting("default")(method))
    for precision in ("bf16", "fp16"):
        with host_reads.during(7, 9, host_reads.waiting("error")):
            sets = ("logging.every=100", "train.total_steps=10")
            finish(f"never-waits-{precision}", f"zero1-{precision}", *sets)
