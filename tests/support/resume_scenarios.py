"""Scenarios: runs at every ZeRO stage, stopped, killed, resumed, moved and refused."""

import json
import shutil
from unittest import mock

from scenario_tools import (
    SAVED,
    copy,
    finish,
    here,
    kill_self,
    note,
    stop,
    train,
    write_engine,
)
from small_run import CUT, STAGES
from web import served

from electra_ds.common.errors import UserError
from electra_ds.config.engine_files import load_engine
from electra_ds.interop.frozen_generator import generator_reader
from electra_ds.training import checkpoint, checkpointer
from electra_ds.training.engine import Engine


def uninterrupted() -> None:
    """Whole runs: every stage in fp32 and bf16; other micro-batches, dropout, small buckets."""
    for stage in STAGES:
        finish(f"full-z{stage}", f"zero{stage}-fp32", SAVED)
    # The first engine of ZeRO 3 in a process replaces F.linear, which changes bf16
    # results in the last bits: all runs in bf16 come after it.
    for stage in STAGES:
        finish(f"full-bf16-z{stage}", f"zero{stage}-bf16")
    finish("full-whole-micro", "zero1-fp32", "train.micro_batch_size=8")
    dropout = ("model.hidden_dropout=0.1", "generator.attention_dropout=0.1")
    finish("full-dropout", "zero1-fp32", *dropout)
    for stage in (1, 2, 3):
        engine = load_engine(f"zero{stage}-fp32")
        engine["zero_optimization"]["reduce_bucket_size"] = 5000  # a third of the word table
        finish(f"buckets-z{stage}", write_engine(f"buckets-z{stage}", engine))


def interrupted() -> None:
    """Stopped at CUT; resumed at the same stage and at every other one, in bf16 too."""
    for stage in STAGES:
        stop(f"cut-z{stage}", f"zero{stage}-fp32")
    for old in STAGES:
        copy(f"cut-z{old}", f"for-one-z{old}")
        for new in STAGES:
            if old != new:
                copy(f"cut-z{old}", f"move-z{old}-z{new}")
                finish(f"move-z{old}-z{new}", f"zero{new}-fp32")
    for stage in STAGES:
        finish(f"cut-z{stage}", f"zero{stage}-fp32")
        stop(f"cut-bf16-z{stage}", f"zero{stage}-bf16")
        finish(f"cut-bf16-z{stage}", f"zero{stage}-bf16")


def from_one_to_two() -> None:
    """The stopped run of one rank, resumed on two."""
    for stage in STAGES:
        copy("one-cut", f"one-to-two-z{stage}")
        finish(f"one-to-two-z{stage}", f"zero{stage}-fp32")


def on_one_rank() -> None:
    """Whole, stopped, and the stopped runs of two ranks resumed on one."""
    finish("one", "zero0-fp32")
    stop("one-cut", "zero1-fp32")
    for stage in STAGES:
        finish(f"for-one-z{stage}", "zero0-fp32")
    note("fp16", train("fp16", "zero1-fp16"))


STREAMED = ("zero1-fp32", "train.eval_every=10")


def streamed() -> None:
    """Rows over http, from a server in each rank: whole, stopped and resumed; kept for one rank."""
    web_data = here.outs / f"served-{here.rank}-of-{here.world_size}"
    shutil.copytree(here.data, web_data)
    with served(web_data) as web:
        finish("streamed", *STREAMED, data=web.url)
        stop("streamed-cut", *STREAMED, data=web.url)
        copy("streamed-cut", "streamed-for-one")
        finish("streamed-cut", *STREAMED, data=web.url)


def streamed_on_one_rank() -> None:
    """The stopped streamed run of two ranks, resumed on one from a file:// URL."""
    finish("streamed-for-one", *STREAMED, data=f"file://{here.outs}/served-0-of-2")


def evaluated() -> None:
    """Held-out evaluations during training, whole and resumed, with TensorBoard."""
    sets = [
        "train.eval_every=4",
        "train.eval_rows=30",
        "logging.tensorboard=true",
        "logging.every=3",
    ]
    for stage in (0, 1, 3):
        finish(f"evaluated-z{stage}", f"zero{stage}-fp32", *sets)
        stop(f"evaluated-cut-z{stage}", f"zero{stage}-fp32", *sets)
        finish(f"evaluated-cut-z{stage}", f"zero{stage}-fp32", *sets)


def mixture(name: str, *weights: int) -> str:
    """Write a mixture of the data folder and, with a second weight, the other one; its path."""
    folders = [(here.data, "de"), (here.other_data, "ja")]
    sources = [
        {"data": str(folder), "name": source, "weight": weight}
        for (folder, source), weight in zip(folders, weights, strict=False)
    ]
    path = here.outs / f"{name}-{here.rank}.json"
    path.write_text(json.dumps(sources))
    return str(path)


def mixed() -> None:
    """Two folders in shares: whole, resumed, refused with other shares; one folder."""
    sets = ["train.eval_every=10", "train.eval_rows=30", "logging.tensorboard=true"]
    both, other = mixture("mixture", 7, 3), mixture("other", 6, 4)
    finish("mixed", "zero2-fp32", *sets, data=both)
    stop("mixed-cut", "zero2-fp32", *sets, data=both)
    note("mixed", train("mixed-cut", "zero2-fp32", *sets, data=other))
    finish("mixed-cut", "zero2-fp32", *sets, data=both)
    finish("mixed-one", "zero1-fp32", data=mixture("one", 1))


def refused_resumes() -> None:
    """Resumes with other settings or data, after many failures; extended and initialized runs."""
    copy("for-one-z1", "refused")
    copy("full-z1", "extended")
    found = {
        "science": train("refused", "zero1-fp32", "optimizer.peak_lr=0.001"),
        "seed": train("refused", "zero1-fp32", "train.seed=3"),
        "done": train("extended", "zero1-fp32", SAVED),
        "extend": train("extended", "zero1-fp32", SAVED, "train.total_steps=24", extend=True),
        "data": train("refused", "zero1-fp32", data=here.other_data),
    }
    folders = (here.data, here.other_data)
    found["copies"] = train("refused-copies", "zero0-fp32", data=folders[here.rank])
    if here.rank == 0:
        failures = {
            "failures": 5,
            "in_a_row": 3,
            "step": CUT,
            "errors": [{"rank": 1, "host": "node7", "error": "why"}],
        }
        (here.outs / "refused" / "restarts.json").write_text(json.dumps(failures))
    found["restarts"] = train("refused", "zero1-fp32", "train.max_restarts=2")
    found["machine"] = train("refused", "zero1-fp32", "logging.every=2")
    read_meta = checkpoint.read_meta
    found["init_from"] = train(
        "init-from", "zero2-fp32", "optimizer.peak_lr=0.001", init_from=here.outs / "full-z0"
    )
    with mock.patch.object(Engine, "__init__", side_effect=AssertionError("was built")):
        sources = {"missing": here.outs / f"nowhere-{here.rank}", "shape": here.outs / "full-z0"}
        for kind, source in sources.items():
            width = "generator.ffn_size=48"
            ended = train(f"init-{kind}", "zero2-fp32", width, init_from=source)
            found[f"init_{kind}"] = [ended, (here.outs / f"init-{kind}").exists()]
        if here.rank == 1:  # a node without the folder
            checkpoint.read_meta = mock.Mock(side_effect=UserError("no folder here"))
        found["init_one"] = train("init-one", "zero2-fp32", init_from=here.outs / "full-z0")
        checkpoint.read_meta = read_meta
    note("refused", found)


def sharing() -> None:
    """Every way of sharing weights trains, saves and resumes at every stage."""
    same = ["generator.hidden_size=32", "generator.ffn_size=64", "model.num_layers=1"]
    for kind, sizes in (("untied", []), ("all", same), ("gdes", [])):
        sets = [f"model.sharing={kind}", "train.total_steps=6", *sizes]
        for stage in STAGES:
            finish(f"{kind}-full-z{stage}", f"zero{stage}-fp32", *sets)
            stop(f"{kind}-z{stage}", f"zero{stage}-fp32", *sets, at=3)
            finish(f"{kind}-z{stage}", f"zero{stage}-fp32", *sets)


def frozen() -> None:
    """A frozen generator of the finished run full-z0 trains, saves and resumes at every stage."""
    sets = [
        "objective.generator=frozen",
        "objective.temperature=2",
        "objective.temperature_decay=0.3",
        "model.sharing=untied",
        "generator.embedding_size=24",
        "train.total_steps=6",
    ]
    reader = generator_reader(here.outs / "full-z0")
    for stage in STAGES:
        engine = f"zero{stage}-fp32"
        finish(f"frozen-full-z{stage}", engine, *sets, read_generator=reader)
        stop(f"frozen-z{stage}", engine, *sets, at=3, read_generator=reader)
        finish(f"frozen-z{stage}", engine, *sets)
    # In half precision only rank 0 has the fp32 values, which are saved and compared.
    half = ("zero1-bf16", *sets)
    finish("frozen-full-half", *half, read_generator=reader)
    stop("frozen-half", *half, at=3, read_generator=reader)
    finish("frozen-half", *half, read_generator=reader)
    other = generator_reader(here.outs / "gdes-full-z0")
    longer = {"extend": True, "read_generator": other}
    refused = {
        "missing": train("frozen-refused", "zero1-fp32", *sets),
        "trained": train("frozen-refused", "zero1-fp32", read_generator=reader),
        "other": train("frozen-z1", "zero1-fp32", *sets, "train.total_steps=8", **longer),
        "other_half": train("frozen-half", *half, "train.total_steps=8", **longer),
    }
    note("frozen", refused)


# ----------------------------------------------------------------------------------------- kill -9


def killed(kill: str) -> None:
    """A run with ranks that kill themselves: `STAGE-stepN`, `STAGE-tensors` or `STAGE-latest`.

    `stepN` is before the update of step N. The others are inside the second save: before its first
    tensors are written, and before `latest` names it (on rank 0, which alone writes it).
    """
    stage, where = kill.split("-", 1)
    if where.startswith("step"):
        owner, name, call = Engine, "step", int(where.removeprefix("step"))
    else:
        owner = checkpointer
        name, call = {"tensors": ("save_file", 3), "latest": ("write_bytes", 2)}[where]
    original, calls = getattr(owner, name), []

    def deadly(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            kill_self(9)
        return original(*arguments, **options)

    setattr(owner, name, deadly)
    train(f"killed-{kill}", f"zero{stage}-fp32", SAVED)


def resumed_after_kills() -> None:
    """The killed runs, to their last step."""
    for folder in sorted(here.outs.glob("killed-*")):
        if folder.is_dir():
            finish(folder.name, f"zero{folder.name.split('-')[1]}-fp32", SAVED)
