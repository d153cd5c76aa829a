"""Runs on real ranks, many in one process group: `torchrun tests/support/scenarios.py PHASE DATA OUTS`. Not a test file itself.

The tests in test_ranks_train.py read what the runs left in OUTS/<name>.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import host_reads
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from engine_memory import engine_memory
from engine_memory import run as known_run
from shard_data import write_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from web import served

from electra_ds.cluster import stop_signals
from electra_ds.cluster.launchers import find_ranks
from electra_ds.common import folder_lock
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.config.engine_files import load_engine
from electra_ds.config.loading import find_config, load_run
from electra_ds.data import loader
from electra_ds.data.loader import READ_TOKENS, Loader
from electra_ds.data.shard_reader import ShardReader
from electra_ds.model.objective import ElectraObjective
from electra_ds.reporting.status import status
from electra_ds.training import checkpointer, spike_guard, stop_requests
from electra_ds.training import engine as engine_module
from electra_ds.training.collectives import leave
from electra_ds.training.engine import Engine, start
from electra_ds.training.pretrain import Limits, pretrain_on_ranks

STEPS, CUT = 20, 7
STAGES = (0, 1, 2, 3)
GUARDED_ENGINES = {f"z{stage}": f"zero{stage}-fp32" for stage in STAGES} | {
    "bf16-z0": "zero0-bf16",
    "bf16-z2": "zero2-bf16",
}
MOVES = [
    (old, new) for old in STAGES for new in STAGES if old != new
]  # written at one stage, read at another
SMALL = [
    "model.hidden_size=32",
    "model.ffn_size=64",
    "model.embedding_size=24",
    "model.num_layers=1",
    "generator.hidden_size=16",
    "generator.ffn_size=32",
    "generator.num_layers=1",
    "train.global_batch_size=16",
    "train.micro_batch_size=4",
    f"train.total_steps={STEPS}",
    "train.eval_every=1000",
    "optimizer.warmup_steps=4",
    "optimizer.peak_lr=0.003",
    "checkpoint.every=5",
    "logging.every=1",
    "logging.tensorboard=false",
]
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
MEMORY_CASES = {  # sequence length, rows a micro-batch, settings
    "long": (128, 8),
    "recomputed": (128, 8, "train.activation_checkpointing=true"),
    "short": (32, 16, "generator.hidden_dropout=0.1", "model.attention_dropout=0.1"),
}
DATA, OUTS = Path(sys.argv[2]), Path(sys.argv[3])
OTHER = DATA.with_name(DATA.name + "-other")  # the same sizes, other rows
RANKS = find_ranks()
DEVICE = start(RANKS, timeout_minutes=2)
spike_guard.WINDOW = 4  # runs are short here


def train(name: str, engine: str, *sets: str, data: Path | str = DATA, **limits) -> int | str:
    """One run in OUTS/name; the exit code, or the message of the error that ended it."""
    config, limits = load_run("tiny", [*SMALL, *sets], engine), Limits(**limits)
    stop_signals.on_stop_signal(limits.asked.append)
    try:
        return pretrain_on_ranks(config, data, OUTS / name, RANKS, DEVICE, limits)
    except (UserError, RunFailure) as error:
        return f"{type(error).__name__}: {error}"


def copy(source: str, target: str) -> None:
    """Rank 0 copies a run folder; the others wait."""
    if RANKS.rank == 0:
        shutil.copytree(OUTS / source, OUTS / target)
    if RANKS.world_size > 1:
        torch.distributed.barrier()


def write_engine(name: str, values: dict) -> str:
    """Rank 0 writes an engine file into OUTS; its path, on every rank."""
    path = OUTS / f"{name}.json"
    if RANKS.rank == 0:
        path.write_text(json.dumps(values))
    if RANKS.world_size > 1:
        torch.distributed.barrier()
    return str(path)


def note(name: str, value: object) -> None:
    """Leave this rank's findings for the tests."""
    (OUTS / f"{name}-{RANKS.rank}.json").write_text(json.dumps(value))


def uninterrupted() -> None:
    for stage in STAGES:
        assert train(f"full-z{stage}", f"zero{stage}-fp32") == 0
    assert train("full-whole-micro", "zero1-fp32", "train.micro_batch_size=8") == 0
    assert (
        train(
            "full-dropout",
            "zero1-fp32",
            "model.hidden_dropout=0.1",
            "generator.attention_dropout=0.1",
        )
        == 0
    )
    for stage in STAGES:
        assert train(f"full-bf16-z{stage}", f"zero{stage}-bf16", "train.total_steps=60") == 0
    for stage in (1, 2, 3):
        engine = load_engine(f"zero{stage}-fp32")
        engine["zero_optimization"]["reduce_bucket_size"] = 5000  # a third of the word table
        assert train(f"buckets-z{stage}", write_engine(f"buckets-z{stage}", engine)) == 0


class Collectives(TorchDispatchMode):
    """Every collective of this thread, as [name, dtype, elements of the largest tensor]."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            largest = max(
                (t for t in tree_leaves(args) if isinstance(t, torch.Tensor)),
                key=torch.Tensor.numel,
            )
            self.seen.append(
                [
                    func._opname.strip("_"),
                    str(largest.dtype).removeprefix("torch."),
                    largest.numel(),
                ]
            )
        return func(*args, **(kwargs or {}))


def traffic() -> None:
    """What the whole loop sends between the ends of its fourth and its fifth step, and the parameters' sizes."""
    owners = {"zero_optimization": {"stage": 1, "use_multi_rank_bucket_allreduce": False}}
    owners_file = write_engine("zero1-owners", owners)
    runs = [
        (f"zero{stage}-{kind}", a)
        for stage in STAGES
        for kind, a in (("fp32", 1), ("fp32", 2), ("bf16", 2))
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

        Engine.step, name = step, f"traffic-{Path(engine).stem}-{accumulation}"
        limits = [
            "train.total_steps=6",
            "logging.every=1000",
            f"train.micro_batch_size={8 // accumulation}",
        ]
        with Collectives() as sent:
            assert train(name, engine, *limits) == 0
        note(name, {"sent": sent.seen[ends[3] : ends[4]], "shapes": shapes})
    Engine.step = original


def wrong_split() -> None:
    """Both ranks read the first slice: what a broken data split would do."""
    original = Loader.__init__

    def broken(self, *arguments, **options):
        original(self, *arguments, **(options | {"rank": 0}))

    Loader.__init__ = broken
    train("full-broken", "zero1-fp32")
    train("full-broken-bf16", "zero1-bf16", "train.total_steps=60")
    Loader.__init__ = original


def slow_reader() -> None:
    """Rank 1's rows come from a disk that takes longer than the steps do."""
    original = ShardReader.read

    def read(self, rows):
        time.sleep(0.25 if RANKS.rank == 1 else 0)
        return original(self, rows)

    ShardReader.read, loader.READ_TOKENS = read, 1  # one step at a time
    with (
        open(OUTS / f"slow-console-{RANKS.rank}", "w") as console,
        contextlib.redirect_stdout(console),
    ):
        assert train("slow", "zero1-fp32", "train.total_steps=6", "logging.every=2") == 0
    ShardReader.read, loader.READ_TOKENS = original, READ_TOKENS


def interrupted() -> None:
    """Stopped by vote at CUT, then resumed, at every stage; and moved between stages and precisions."""
    for stage in STAGES:
        assert train(f"cut-z{stage}", f"zero{stage}-fp32", stop_at_step=CUT) in (0, 85)
    for old, new in MOVES:
        copy(f"cut-z{old}", f"move-z{old}-z{new}")
        assert train(f"move-z{old}-z{new}", f"zero{new}-fp32") == 0
    for stage in STAGES:
        copy(f"cut-z{stage}", f"for-one-z{stage}")
        assert train(f"cut-z{stage}", f"zero{stage}-fp32") == 0
    for stage in STAGES:
        name = f"cut-bf16-z{stage}"
        assert train(name, f"zero{stage}-bf16", "train.total_steps=60", stop_at_step=CUT) in (0, 85)
        assert train(name, f"zero{stage}-bf16", "train.total_steps=60") == 0


def streamed() -> None:
    """Rows over http, from a server of each rank's own: whole, stopped and resumed, and kept for one rank."""
    web_data = OUTS / f"served-{RANKS.rank}-of-{RANKS.world_size}"
    shutil.copytree(DATA, web_data)
    write_tokenizer(web_data / "tokenizer")
    options = ("zero1-fp32", "train.eval_every=10")
    with served(web_data) as web:
        assert train("streamed", *options, data=web.url) == 0
        assert train("streamed-cut", *options, data=web.url, stop_at_step=CUT) in (0, 85)
        copy("streamed-cut", "streamed-for-one")
        assert train("streamed-cut", *options, data=web.url) == 0


def streamed_for_one() -> None:
    assert (
        train(
            "streamed-for-one",
            "zero1-fp32",
            "train.eval_every=10",
            data=f"file://{OUTS}/served-0-of-2",
        )
        == 0
    )


def evaluated() -> None:
    """Held-out figures on the way, on both ranks, whole and resumed, with TensorBoard."""
    sets = [
        "train.eval_every=4",
        "train.eval_rows=30",
        "logging.tensorboard=true",
        "logging.every=3",
    ]
    for stage in (0, 1, 3):
        assert train(f"evaluated-z{stage}", f"zero{stage}-fp32", *sets) == 0
        assert train(f"evaluated-cut-z{stage}", f"zero{stage}-fp32", *sets, stop_at_step=CUT) in (
            0,
            85,
        )
        assert train(f"evaluated-cut-z{stage}", f"zero{stage}-fp32", *sets) == 0


def mixed() -> None:
    """Two folders in shares: whole and resumed, with TensorBoard; the first alone; and a resume with other shares."""

    def mixture(name: str, *weights: int) -> Path:
        sources = [
            {"data": f"{DATA.with_name(DATA.name + end)}", "name": source, "weight": weight}
            for end, source, weight in zip(("", "-other"), ("de", "ja"), weights, strict=False)
        ]
        (OUTS / name).write_text(json.dumps(sources))
        return OUTS / name

    sets = ["train.eval_every=10", "train.eval_rows=30", "logging.tensorboard=true"]
    both = mixture(f"mixture-{RANKS.rank}.json", 7, 3)
    assert train("mixed", "zero2-fp32", *sets, data=both) == 0
    assert train("mixed-cut", "zero2-fp32", *sets, data=both, stop_at_step=CUT) in (0, 85)
    note(
        "mixed",
        train("mixed-cut", "zero2-fp32", *sets, data=mixture(f"other-{RANKS.rank}.json", 6, 4)),
    )
    assert train("mixed-cut", "zero2-fp32", *sets, data=both) == 0
    assert train("mixed-one", "zero1-fp32", data=mixture(f"one-{RANKS.rank}.json", 1)) == 0


def refused_resumes() -> None:
    copy("for-one-z1", "refused")
    found = {
        "science": train("refused", "zero1-fp32", "optimizer.peak_lr=0.001"),
        "seed": train("refused", "zero1-fp32", "train.seed=3"),
    }
    copy("full-z1", "extended")
    found["done"] = train("extended", "zero1-fp32")
    found["extend"] = train("extended", "zero1-fp32", "train.total_steps=24", extend=True)
    found["data"] = train("refused", "zero1-fp32", data=OTHER)
    found["copies"] = train("refused-copies", "zero0-fp32", data=(DATA, OTHER)[RANKS.rank])
    if RANKS.rank == 0:
        failures = {
            "failures": 5,
            "in_a_row": 3,
            "step": CUT,
            "errors": [{"rank": 1, "host": "node7", "error": "why"}],
        }
        (OUTS / "refused" / "restarts.json").write_text(json.dumps(failures))
    found["restarts"] = train("refused", "zero1-fp32", "train.max_restarts=2")
    found["machine"] = train("refused", "zero1-fp32", "logging.every=2")
    found["init_from"] = train(
        "init-from", "zero2-fp32", "optimizer.peak_lr=0.001", init_from=OUTS / "full-z0"
    )
    note("refused", found)


def poison(step: int, rank: int, factor: float = float("nan")):
    """Multiply the loss of one rank at one attempt."""
    original, seen, micro_batches = ElectraObjective.forward, [], 4 // RANKS.world_size

    def forward(self, *arguments, **options):
        losses = original(self, *arguments, **options)
        if self.training and RANKS.rank == rank:
            seen.append(1)
            if len(seen) == micro_batches * step:
                return losses._replace(
                    total=losses.total * factor, mlm_loss=losses.mlm_loss * factor
                )
        return losses

    ElectraObjective.forward = forward
    return lambda: setattr(ElectraObjective, "forward", original)


def not_finite() -> None:
    for stage in STAGES:
        restore = poison(step=7, rank=1)
        note(f"nan-z{stage}", train(f"nan-z{stage}", f"zero{stage}-fp32"))
        restore()
        assert train(f"nan-z{stage}", f"zero{stage}-fp32") == 0  # the last good checkpoint is whole


GUARDED = ("train.spike_factor=2", "train.on_bad_loss=skip")


def spoiled(
    name: str,
    engine: str,
    *sets: str,
    attempt: int = CUT + 1,
    rank: int = 1,
    factor: float = 1000.0,
    **limits,
):
    """A run to step 12 that meets a bad loss on one rank."""
    restore = poison(attempt, rank, factor)
    ended = train(name, engine, *sets, stop_at_step=12)
    restore()
    return ended


def passed_over(name: str, engine: str, *sets: str) -> None:
    """A run to step 12 that never saw the rows of attempt CUT + 1: stopped, and its position moved on."""
    assert train(name, engine, *sets, stop_at_step=CUT) in (0, 85)
    meta = OUTS / name / "ckpt" / str(CUT) / "meta.json"
    if RANKS.rank == 0:
        values = json.loads(meta.read_text())
        values["data"]["position"] += 16
        values["skipped"] += 1
        meta.write_text(json.dumps(values))
    assert train(name, engine, *sets, stop_at_step=12) in (0, 85)


def bad_losses() -> None:
    """A spike, or NaN, on rank 1 alone: left out at every stage and by a resumed run, or the end of the run."""
    for name, engine in GUARDED_ENGINES.items():
        passed_over(f"passed-{name}", engine)
        assert spoiled(f"spiked-{name}", engine, *GUARDED) in (0, 85)
    assert spoiled(
        "nan-passed-z2", "zero2-fp32", "train.on_bad_loss=skip", factor=float("nan")
    ) in (0, 85)
    assert train("spiked-cut", "zero1-fp32", *GUARDED, stop_at_step=CUT) in (0, 85)
    copy("spiked-cut", "spiked-for-one")
    assert spoiled("spiked-cut", "zero1-fp32", *GUARDED, attempt=1) in (0, 85)
    note("spiked-stop", spoiled("spiked-stop", "zero1-fp32", GUARDED[0]))
    assert train("spiked-stop", "zero1-fp32", GUARDED[0]) == 0


def signals_and_files() -> None:
    """A signal to one rank alone, and files touched in OUT, at the third step."""
    original = Engine.step

    def act(name: str, stop) -> object:
        def step(self, lr):
            result = original(self, lr)
            step.count += 1
            if step.count == 3:
                note(f"status-{name}", status(OUTS / name))
                stop()
            return result

        step.count = 0
        Engine.step = step
        code = train(name, "zero1-fp32", "checkpoint.every=1000")
        Engine.step = original
        return code

    def signal_self(number: int):
        return lambda: os.kill(os.getpid(), number) if RANKS.rank == 1 else None

    def touch(name: str, run: str):
        return lambda: (OUTS / run / name).touch() if RANKS.rank == 0 else None

    found = {
        "signal": act("signal", signal_self(signal.SIGUSR1)),
        "term": act("term", signal_self(signal.SIGTERM)),
    }
    stop_requests.LOOK_SECONDS = 0.0
    found["stop-file"] = act("stop-file", touch("STOP", "stop-file"))
    found["save-file"] = act("save-file", touch("SAVE", "save-file"))
    note("stops", found)


def sharing() -> None:
    """Every way of sharing weights trains, saves and resumes at every stage."""
    same = ["generator.hidden_size=32", "generator.ffn_size=64", "model.num_layers=1"]
    for kind, sets in (("untied", []), ("all", same)):
        sets = [f"model.sharing={kind}", *sets]
        for stage in STAGES:
            assert (
                train(f"{kind}-full-z{stage}", f"zero{stage}-fp32", "train.total_steps=6", *sets)
                == 0
            )
            assert train(
                f"{kind}-z{stage}",
                f"zero{stage}-fp32",
                "train.total_steps=6",
                *sets,
                stop_at_step=3,
            ) in (
                0,
                85,
            )
            assert train(f"{kind}-z{stage}", f"zero{stage}-fp32", "train.total_steps=6", *sets) == 0


def half_precision_overflow() -> None:
    """fp16 with a loss scale that must overflow first, stopped and resumed (DeepSpeed made to believe in fp16 here)."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    original, engine_module.resolve_precision = (
        engine_module.resolve_precision,
        lambda config, device: config,
    )
    scaler = {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 18,
        "loss_scale_window": 5,
        "hysteresis": 1,
    }
    for stage in (0, 1):
        engine = OUTS / f"fp16-z{stage}.json"
        engine.write_text(json.dumps({"zero_optimization": {"stage": stage}, "fp16": scaler}))
        assert train(f"overflow-z{stage}", str(engine)) == 0
        assert train(f"overflow-cut-z{stage}", str(engine), stop_at_step=CUT) in (0, 85)
        assert train(f"overflow-cut-z{stage}", str(engine)) == 0
        note(
            f"overflow-z{stage}", train(f"limit-z{stage}", str(engine), "train.max_skipped_steps=2")
        )
        passed_over(f"passed-fp16-z{stage}", str(engine))
        assert train(f"spiked-fp16-z{stage}", str(engine), *GUARDED, stop_at_step=CUT) in (0, 85)
        assert spoiled(f"spiked-fp16-z{stage}", str(engine), *GUARDED, attempt=1, rank=0) in (0, 85)
    engine_module.resolve_precision = original


def needed_memory() -> None:
    """Model states and the peak of a step, measured and predicted, at every stage and precision."""
    found, cases = {}, itertools.cycle(MEMORY_CASES)
    micro_batches = ["model.vocab_size=3000", f"train.global_batch_size={16 * RANKS.world_size}"]
    buckets = {"reduce_bucket_size": 3_000_000, "stage3_prefetch_bucket_size": 3_000_000}
    for kind, switch in (
        ("fp32", {}),
        ("bf16", {"bf16": {"enabled": True}}),
        ("autocast", AUTOCAST),
    ):
        for stage in STAGES:
            zero = load_engine(f"zero{stage}-fp32")["zero_optimization"] | buckets
            engine, case = {"zero_optimization": zero} | switch, next(cases)
            length, rows, *sets = MEMORY_CASES[case]
            config = known_run("tiny", engine, length, rows, *micro_batches, *sets)
            found[f"{case} z{stage} {kind}"] = engine_memory(config, RANKS, DEVICE)
    note(f"memory-of-{RANKS.world_size}", found)


def on_one_rank() -> None:
    assert train("one", "zero0-fp32") == 0
    assert train("one-cut", "zero1-fp32", stop_at_step=CUT) in (0, 85)
    for stage in STAGES:
        assert train(f"for-one-z{stage}", "zero0-fp32") == 0
    assert spoiled("spiked-for-one", "zero0-fp32", *GUARDED, attempt=1, rank=0) in (0, 85)
    note("fp16", train("fp16", "zero1-fp16"))
    note(
        "lost",
        [lose_the_lock("lost-voting", 1000, beat=0.01), lose_the_lock("lost-saving", 5, beat=60.0)],
    )


def lose_the_lock(name: str, every: int, beat: float) -> str:
    """Another machine takes OUT in the third step, seen at the next beat of the thread, or by the save itself."""
    original, folder_lock.BEAT_SECONDS = Engine.step, beat

    def step(self, lr):
        step.count += 1
        if step.count == 3:
            (OUTS / name / "lock").write_text('{"host": "node7", "pid": 1}')
            time.sleep(5 * min(beat, 0.1))
        return original(self, lr)

    step.count = 0
    Engine.step = step
    ended = train(name, "zero0-fp32", f"checkpoint.every={every}")
    Engine.step, folder_lock.BEAT_SECONDS = original, 5.0
    return ended


def alone() -> None:
    """Who reads tensors between two log lines, without a save; whether gradients are reduced; and one rank with the
    switches that several need."""
    sets, reduce, reduced = (
        ("logging.every=100", "train.total_steps=10"),
        DeepSpeedEngine.allreduce_gradients,
        [],
    )

    def counted(self, *arguments, **options):
        reduced.append(self.zero_optimization_stage())
        return reduce(self, *arguments, **options)

    DeepSpeedEngine.allreduce_gradients = counted
    for stage in STAGES:
        found = set()
        probe = host_reads.during(7, 9, host_reads.Operators(found), host_reads.Calls(found))
        with (
            open(OUTS / f"alone-console-z{stage}", "w") as console,
            contextlib.redirect_stdout(console),
            probe,
        ):
            assert train(f"alone-z{stage}", f"zero{stage}-fp32", *sets) == 0
        note(f"reads-z{stage}", sorted(found))
    DeepSpeedEngine.allreduce_gradients = reduce
    note("reduced-at", sorted(set(reduced)))
    switches, engine_module.SINGLE_RANK_ZERO = engine_module.SINGLE_RANK_ZERO, {}
    for stage in (1, 2):
        assert train(f"as-many-z{stage}", f"zero{stage}-fp32", *sets) == 0
    engine_module.SINGLE_RANK_ZERO = switches


def never_waits() -> None:
    """On CUDA: torch raises where our part of a step waits for the device; DeepSpeed's step and reductions may."""
    for name in ("step", "_backward_epilogue"):
        setattr(
            DeepSpeedEngine, name, host_reads.waiting("default")(getattr(DeepSpeedEngine, name))
        )
    for precision in ("bf16", "fp16"):
        with host_reads.during(7, 9, host_reads.waiting("error")):
            sets = ("logging.every=100", "train.total_steps=10")
            assert train(f"never-waits-{precision}", f"zero1-{precision}", *sets) == 0


def one_to_two() -> None:
    for stage in STAGES:
        copy("one-cut", f"one-to-two-z{stage}")
        assert train(f"one-to-two-z{stage}", f"zero{stage}-fp32") == 0


def die(kind: str) -> None:
    """kill -9 of this process, both ranks, at a step or inside a save: `die STAGE-WHERE`."""
    stage, where = kind.split("-", 1)
    if where.startswith("step"):
        original, wanted = Engine.step, int(where[4:])

        def step(self, lr):
            step.count += 1
            if step.count == wanted:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, lr)

        step.count = 0
        Engine.step = step
    else:  # in the second save
        name = {"tensors": "save_file", "latest": "write_bytes"}[where]
        original, count = getattr(checkpointer, name), []

        def killed(*arguments, **options):
            count.append(1)
            if len(count) == (3 if where == "tensors" else 2):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(checkpointer, name, killed)
    train(f"killed-{kind}", f"zero{stage}-fp32")


def after_death() -> None:
    for folder in sorted(OUTS.glob("killed-*")):
        stage = folder.name.split("-")[1]
        assert train(folder.name, f"zero{stage}-fp32") == 0


def kinds() -> None:
    """Every other kind of objective: whole at one stage; stopped at another and gone on with at a third."""
    for kind in ("electra_15", "mlm", "replace_mlm", "all_tokens_mlm", "uniform"):
        sets = ["objective.generator=uniform"] if kind == "uniform" else [f"objective.kind={kind}"]
        assert train(f"{kind}-whole", "zero0-fp32", *sets) == 0
        assert train(f"{kind}-moved", "zero2-fp32", *sets, stop_at_step=CUT) in (0, 85)
        assert train(f"{kind}-moved", "zero3-fp32", *sets) == 0


def own_encoders() -> None:
    """model.factory at ZeRO 2, with a hidden layer of the discriminator."""
    run = json.loads(find_config("tiny", "pretrain").read_text())
    factory = {
        "factory": "own_pair:build",
        "options": {"width": 16},
        "discr_dim": 16,
        "discr_layer": "conv",
    }
    run |= {"model": factory, "engine": "zero2-fp32"}
    del run["generator"]
    (OUTS / "own.json").write_text(json.dumps(run))
    for name, limits in (("own-whole", {}), ("own-cut", {"stop_at_step": CUT}), ("own-cut", {})):
        sets = [line for line in SMALL if not line.startswith(("model.", "generator."))]
        config = load_run(str(OUTS / "own.json"), sets)
        assert pretrain_on_ranks(config, DATA, OUTS / name, RANKS, DEVICE, Limits(**limits)) in (
            0,
            85,
        )


PHASES = {
    "kinds": (kinds, own_encoders),
    "two": (
        uninterrupted,
        traffic,
        streamed,
        wrong_split,
        slow_reader,
        interrupted,
        evaluated,
        mixed,
        refused_resumes,
        not_finite,
        bad_losses,
        signals_and_files,
        sharing,
        needed_memory,
    ),
    "one": (on_one_rank, needed_memory, alone, streamed_for_one, half_precision_overflow),
    "memory": (needed_memory,),  # alone: torchrun tests/support/scenarios.py memory DATA OUTS
    "two-again": (one_to_two, after_death),
    "never-waits": (never_waits,),
}

if __name__ == "__main__":
    if sys.argv[1] == "die":
        die(sys.argv[4])
    for phase in PHASES[sys.argv[1]]:
        phase()
    leave()
