"""The command line under real launchers: what is started, refused, stopped and resumed, and with which exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running import CPU, needs_mpi, run_cli

from electra_ds.common.processes import free_port
from electra_ds.training import checkpoint
from electra_ds.training.metrics_file import read_metrics

TINY = [
    "--set",
    "train.total_steps=40",
    "--set",
    "checkpoint.every=10",
    "--set",
    "logging.every=5",
    "--set",
    "optimizer.warmup_steps=5",
    "--set",
    "train.eval_every=0",
    "--engine",
    "zero1-fp32",
]


def launch(*command: object) -> subprocess.CompletedProcess:
    arguments = [str(Path(sys.executable).parent / command[0]), *map(str, command[1:])]
    return subprocess.run(
        arguments, env=os.environ | CPU, capture_output=True, text=True, timeout=300
    )


def test_the_deepspeed_launcher_stops_and_resumes(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [
        "--no_local_rank",
        "--module",
        "electra_ds",
        "pretrain",
        "tiny",
        "--data",
        data,
        "--out",
        out,
        *TINY,
    ]
    stopped = launch(
        "deepspeed", "--num_gpus", 2, "--master_port", free_port(), *arguments, "--stop-at-step", 20
    )
    assert json.loads((out / "stopped.0").read_text())["step"] == 20, stopped.stderr[-3000:]
    done = launch("deepspeed", "--num_gpus", 2, "--master_port", free_port(), *arguments)
    assert done.returncode == 0 and json.loads((out / "done").read_text())["step"] == 40, (
        done.stderr[-3000:]
    )
    records = [
        record for record in read_metrics(out / "metrics.jsonl") if record["split"] == "train"
    ]
    assert [record["step"] for record in records] == list(range(5, 45, 5))
    assert (
        "2 rank(s) under torchrun or deepspeed" in done.stdout and not (out / "stopped.0").exists()
    )


def test_another_number_of_ranks_than_promised_is_refused(data: Path, tmp_path: Path) -> None:
    arguments = [
        "-m",
        "electra_ds",
        "pretrain",
        "tiny",
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--world-size",
        3,
    ]
    refused = launch("torchrun", "--standalone", "--nproc_per_node=2", *arguments)
    assert refused.returncode != 0
    assert (
        "--world-size 3 was promised, but torchrun or deepspeed started 2 rank(s)" in refused.stderr
    )
    assert not (tmp_path / "run").exists()


@needs_mpi
def test_mpirun_trains_one_world(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [
        "-m",
        "electra_ds",
        "pretrain",
        "tiny",
        "--data",
        data,
        "--out",
        out,
        *TINY,
        "--world-size",
        2,
    ]
    done = subprocess.run(
        ["mpirun", "-n", "2", sys.executable, *map(str, arguments)],
        env=os.environ | CPU,
        capture_output=True,
        text=True,
    )
    assert json.loads((out / "done").read_text())["step"] == 40, done.stderr[-3000:]


def test_alone_a_signal_saves_and_leaves_with_85_and_the_same_command_resumes(
    data: Path, tmp_path: Path
) -> None:
    arguments = [
        "pretrain",
        "tiny",
        "--data",
        data,
        "--out",
        tmp_path / "run",
        *TINY,
        "--set",
        "train.total_steps=2000",
    ]
    command = [sys.executable, "-m", "electra_ds", *map(str, arguments)]
    with subprocess.Popen(command, env=os.environ | CPU, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 600
        while not (tmp_path / "run/ckpt/latest").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 85
    step = json.loads((tmp_path / "run/stopped.0").read_text())["step"]
    assert checkpoint.latest(tmp_path / "run/ckpt").name == str(step)
    resumed = run_cli(*arguments, "--max-minutes", 0, check=False)
    assert resumed.returncode == 85 and f"from step {step}" in resumed.stdout
    assert json.loads((tmp_path / "run/stopped.0").read_text())["reason"] == "--max-minutes 0.0"


def test_a_run_folder_is_enough_to_run_again(data: Path, tmp_path: Path) -> None:
    short = [*TINY, "--set", "train.total_steps=6"]
    run_cli("pretrain", "tiny", "--data", data, "--out", tmp_path / "run", *short)
    again = run_cli(
        "pretrain", tmp_path / "run/config.json", "--data", data, "--out", tmp_path / "again"
    )
    assert again.returncode == 0
    ours, theirs = (
        read_metrics(tmp_path / name / "metrics.jsonl")[-1]["mlm_loss"] for name in ("run", "again")
    )
    assert ours == theirs
    finished = run_cli("pretrain", "tiny", "--data", data, "--out", tmp_path / "run", *short)
    assert finished.returncode == 0 and "is finished" in finished.stdout


def test_the_main_job_runs_from_text_to_detection(tmp_path: Path) -> None:
    words = [
        "the",
        "a",
        "cat",
        "dog",
        "bird",
        "sat",
        "ran",
        "flew",
        "on",
        "under",
        "mat",
        "tree",
        "house",
        "quickly",
    ]
    random = np.random.default_rng(0)
    text = "\n\n".join(" ".join(random.choice(words, 40)) + " ." for _ in range(400))
    (tmp_path / "text.txt").write_text(text)
    source = ("--input", tmp_path / "text.txt")
    run_cli("train-tokenizer", *source, "--vocab-size", 100, "--out", tmp_path / "tokenizer")
    shape = ("--sequence-length", 32, "--valid-fraction", 0.1)
    run_cli(
        "prepare",
        *source,
        "--tokenizer",
        tmp_path / "tokenizer",
        "--out",
        tmp_path / "data",
        *shape,
    )
    assert "as written" in run_cli("verify", tmp_path / "data").stdout
    assert (
        "row 0 (shard 0, block 0): 32 tokens"
        in run_cli("inspect", tmp_path / "data", "--source").stdout
    )
    short = [*TINY, "--set", "train.total_steps=10"]
    run_cli("pretrain", "tiny", "--data", tmp_path / "data", "--out", tmp_path / "run", *short)
    figures = json.loads(
        run_cli("evaluate", tmp_path / "run", "--data", tmp_path / "data", "--json").stdout
    )
    logged = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert figures["mlm_loss"] == pytest.approx(logged["mlm_loss"], rel=1e-5)
    assert {
        "disc_auc",
        "fixed_auc",
        "disc_precision",
        "disc_recall",
        "disc_accuracy_original",
    } <= figures.keys()

    sentence = "the cat sat on the tree ."
    table = run_cli(
        "detect", tmp_path / "run", sentence, "--original", "the cat sat on the mat ."
    ).stdout
    assert [
        line.split()[0] for line in table.splitlines()[2:]
    ] == sentence.split() and "mat" in table
    scores = json.loads(run_cli("detect", tmp_path / "run/ckpt/final", sentence, "--json").stdout)
    assert [sentence[s["start"] : s["end"]] for s in scores] == sentence.split()
    (tmp_path / "sentence.txt").write_text(sentence)
    for given in (("--file", tmp_path / "sentence.txt"), ()):
        again = run_cli("detect", tmp_path / "run", *given, "--json", input=sentence)
        assert json.loads(again.stdout) == scores
