"""The command line under real launchers: start, refusal, stop, resume, exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running import CPU, ROOT, needs_mpi, run_cli

from electra_ds.common.processes import free_port
from electra_ds.training import checkpoint
from electra_ds.training.metrics_file import read_metrics

TINY = [
    "--set=train.total_steps=40",
    "--set=checkpoint.every=10",
    "--set=logging.every=5",
    "--set=optimizer.warmup_steps=5",
    "--set=train.eval_every=0",
    "--engine=zero1-fp32",
]


def launch(*command: object) -> subprocess.CompletedProcess:
    arguments = [str(Path(sys.executable).parent / command[0]), *map(str, command[1:])]
    return subprocess.run(
        arguments, env=os.environ | CPU, capture_output=True, text=True, timeout=300
    )


def test_the_deepspeed_launcher_stops_and_resumes(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    module = ["--no_local_rank", "--module", "electra_ds"]
    run = ["pretrain", "tiny", "--data", data, "--out", out, *TINY]

    def deepspeed(*options: object) -> subprocess.CompletedProcess:
        ranks = ["--num_gpus", 2, "--master_port", free_port()]
        return launch("deepspeed", *ranks, *module, *run, *options)

    stopped = deepspeed("--stop-at-step", 20)
    assert json.loads((out / "stopped.0").read_text())["step"] == 20, stopped.stderr[-3000:]
    done = deepspeed()
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "done").read_text())["step"] == 40
    records = read_metrics(out / "metrics.jsonl")
    steps = [record["step"] for record in records if record["split"] == "train"]
    assert steps == list(range(5, 45, 5))
    assert "2 rank(s) under torchrun or deepspeed" in done.stdout
    assert not (out / "stopped.0").exists()


def test_a_number_of_ranks_other_than_world_size_is_refused(data: Path, tmp_path: Path) -> None:
    run = ["-m", "electra_ds", "pretrain", "tiny", "--data", data, "--out", tmp_path / "run"]
    ranks = ["--standalone", "--nproc_per_node=2"]
    refused = launch("torchrun", *ranks, *run, "--world-size", 3)
    assert refused.returncode != 0
    message = "--world-size is 3, but torchrun or deepspeed started 2 rank(s)"
    assert message in refused.stderr
    assert not (tmp_path / "run").exists()


@needs_mpi
def test_mpirun_trains_with_two_ranks(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = ["pretrain", "tiny", "--data", data, "--out", out, *TINY, "--world-size", 2]
    command = ["mpirun", "-n", "2", sys.executable, "-m", "electra_ds", *map(str, run)]
    done = subprocess.run(command, env=os.environ | CPU, capture_output=True, text=True)
    assert json.loads((out / "done").read_text())["step"] == 40, done.stderr[-3000:]


def test_a_signal_saves_and_exits_with_85_and_the_same_command_resumes(
    data: Path, tmp_path: Path
) -> None:
    run = ["pretrain", "tiny", "--data", data, "--out", tmp_path / "run"]
    arguments = [*run, *TINY, "--set=train.total_steps=2000"]
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


def test_the_config_of_a_run_folder_repeats_the_run(data: Path, tmp_path: Path) -> None:
    short = [*TINY, "--set=train.total_steps=6"]
    run_cli("pretrain", "tiny", "--data", data, "--out", tmp_path / "run", *short)
    config = tmp_path / "run/config.json"
    again = run_cli("pretrain", config, "--data", data, "--out", tmp_path / "again")
    assert again.returncode == 0
    first, second = (
        read_metrics(tmp_path / name / "metrics.jsonl")[-1]["mlm_loss"] for name in ("run", "again")
    )
    assert first == second
    finished = run_cli("pretrain", "tiny", "--data", data, "--out", tmp_path / "run", *short)
    assert finished.returncode == 0 and "is finished" in finished.stdout


def test_the_main_job_runs_from_text_to_detection(tmp_path: Path) -> None:
    words = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew"]
    words += ["on", "under", "mat", "tree", "house", "quickly"]
    random = np.random.default_rng(0)
    text = "\n\n".join(" ".join(random.choice(words, 40)) + " ." for _ in range(400))
    (tmp_path / "text.txt").write_text(text)
    source = ("--input", tmp_path / "text.txt")
    run_cli("train-tokenizer", *source, "--vocab-size", 100, "--out", tmp_path / "tokenizer")
    shape = ("--sequence-length", 32, "--valid-fraction", 0.1)
    folders = ("--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "data")
    run_cli("prepare", *source, *folders, *shape)
    assert "as written" in run_cli("verify", tmp_path / "data").stdout
    shown = run_cli("inspect", tmp_path / "data", "--source").stdout
    assert "row 0 (shard 0, block 0): 32 tokens" in shown
    short = [*TINY, "--set=train.total_steps=10"]
    run_cli("pretrain", "tiny", "--data", tmp_path / "data", "--out", tmp_path / "run", *short)
    evaluated = run_cli("evaluate", tmp_path / "run", "--data", tmp_path / "data", "--json")
    metrics = json.loads(evaluated.stdout)
    logged = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert metrics["mlm_loss"] == pytest.approx(logged["mlm_loss"], rel=1e-5)
    assert {"disc_auc", "fixed_auc", "disc_precision", "disc_recall"} <= metrics.keys()
    assert "disc_accuracy_original" in metrics

    sentence = "the cat sat on the tree ."
    original = "the cat sat on the mat ."
    table = run_cli("detect", tmp_path / "run", sentence, "--original", original).stdout
    assert [line.split()[0] for line in table.splitlines()[2:]] == sentence.split()
    assert "mat" in table
    scores = json.loads(run_cli("detect", tmp_path / "run/ckpt/final", sentence, "--json").stdout)
    assert [sentence[s["start"] : s["end"]] for s in scores] == sentence.split()
    (tmp_path / "sentence.txt").write_text(sentence)
    for given in (("--file", tmp_path / "sentence.txt"), ()):
        again = run_cli("detect", tmp_path / "run", *given, "--json", input=sentence)
        assert json.loads(again.stdout) == scores


def test_the_data_of_each_phase_is_staged_below_the_folder_of_the_node(
    data: Path, tmp_path: Path
) -> None:
    """`begin` replaces the values of --data for the ranks; health.sh copies each of them."""
    stage = tmp_path / "stage"
    own = ["--data", f"short={data}", f"--data=long={data}", "--out", tmp_path / "out"]
    script = f'source {ROOT}/launch/common.sh; begin "$@"; printf "%s\\n" "${{options[@]}}"'
    environment = os.environ | CPU | {"STAGE": str(stage), "PYTHON": sys.executable}
    shown = subprocess.run(
        ["bash", "-euc", script, "bash", *own], env=environment, capture_output=True, text=True
    )
    expected = ["--data", f"short={stage}/short", f"--data=long={stage}/long"]
    assert shown.stdout.splitlines() == [*expected, "--out", str(tmp_path / "out")], shown.stderr
    for given, copies in ([f"short={data}", f"long={data}"], ["short", "long"]), ([data], [""]):
        done = subprocess.run(
            ["bash", ROOT / "launch/health.sh", *given],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        for name in copies:
            assert (stage / name / "manifest.json").exists()
        shutil.rmtree(stage)
    missing = [ROOT / "launch/health.sh", f"short={data}", f"long={tmp_path}/none"]
    environment.pop("STAGE")
    done = subprocess.run(["bash", *missing], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "none/manifest.json" in done.stderr
