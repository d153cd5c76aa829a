"""launch/pretrain.sbatch under a real SLURM: stops and failures do not change the weights."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from machines import wait_until
from nodes import BRIEF, ranks_of, submit, wait_for, weights
from running import read_json
from slurm import Slurm

from electra_ds.training.metrics_file import read_metrics

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def end_of(slurm: Slurm, job: str, out: Path, seconds: float = 400) -> str:
    """The log of a job, after its successful end."""
    slurm.until(lambda: slurm.state(job) in ENDED, seconds)
    log = Path(f"{out}.log").read_text()
    assert slurm.state(job) == "COMPLETED" and (out / "done").exists(), log[-6000:]
    return log


def test_a_job_on_two_nodes_trains_one_world(
    slurm: Slurm, brief: Path, data: Path, tmp_path: Path
) -> None:
    log = end_of(slurm, submit(slurm, tmp_path / "run", data, sets=BRIEF), tmp_path / "run")
    assert "2 rank(s) under srun" in log and weights(tmp_path / "run") == weights(brief)


def test_a_node_that_is_not_fit_is_named_before_the_run(
    slurm: Slurm, data: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "python"  # an environment that one node does not have
    broken.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" != node2 ] && exec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    job = submit(slurm, tmp_path / "run", data, PYTHON=str(broken))
    slurm.until(lambda: slurm.state(job) == "FAILED")
    log = (tmp_path / "run.log").read_text()
    assert (
        "bad node node2: " in log
        and "bad node node1" not in log
        and not (tmp_path / "run").exists()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop",
    [
        [
            "scancel",
            "--batch",
            "--signal=USR1",
            "JOB",
        ],  # as before the time limit: only to the shell
        ["scancel", "--signal=TERM", "JOB"],  # to the ranks
        ["scontrol", "requeue", "JOB"],
        [
            "sbatch",
            "--partition=urgent",
            "--nodes=2",
            "--exclusive",
            "--output=/dev/null",
            "--wrap=true",
        ],
    ],
    ids=["USR1", "TERM", "requeue", "urgent"],
)
def test_a_stopped_job_is_queued_again_once_and_ends_the_same(
    stop: list[str], slurm: Slurm, uninterrupted: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = submit(slurm, out, data)
    wait_for(out / "ckpt/latest")
    slurm.run(*(job if word == "JOB" else word for word in stop))
    log = end_of(slurm, job, out)
    assert "restart 0" in log and "restart 1" in log and "restart 2" not in log
    saved = re.search(r"stopped and saved at step (\d+)", log)
    assert f"resuming {out}/ckpt/{saved[1]} at step {saved[1]}" in log  # nothing is lost
    assert weights(out) == weights(uninterrupted)


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_and_resumes(
    slurm: Slurm, data: Path, tmp_path: Path
) -> None:
    out, long = tmp_path / "run", ("train.total_steps=100000",)
    job = submit(slurm, out, data, "--time=1", "--signal=B:USR1@45", sets=long)
    wait_until(lambda: (out / "stopped.0").exists(), "the job got no signal before its limit", 120)
    saved = read_json(out / "stopped.0")["step"]
    wait_until(
        lambda: f"at step {saved}\n" in Path(f"{out}.log").read_text().partition("restart 1")[2],
        "no resume",
        120,
    )
    slurm.run("scancel", job)
    slurm.until(lambda: slurm.state(job) == "CANCELLED")


@pytest.mark.slow
def test_a_run_that_the_user_ends_is_not_queued_again(
    slurm: Slurm, data: Path, tmp_path: Path
) -> None:
    """scancel, although its SIGTERM saves; OUT/STOP; a limit of restarts."""
    jobs = {}
    for name in ("cancelled", "stopped", "capped"):
        out = tmp_path / name
        jobs[name] = submit(slurm, out, data, MAX_RESTARTS="0" if name == "capped" else "9")
        wait_for(out / "ckpt/latest")
        if name == "stopped":
            (out / "STOP").touch()
        else:
            slurm.run("scancel", *(["--signal=USR1"] if name == "capped" else []), jobs[name])
        slurm.until(lambda job=jobs[name]: slurm.state(job) in ("CANCELLED", "FAILED"))
        assert (out / "stopped.0").exists() and not (out / "done").exists()
    time.sleep(5)
    assert [slurm.state(job) for job in jobs.values()] == ["CANCELLED", "FAILED", "FAILED"]
    assert "scontrol requeue" not in "".join(
        (tmp_path / f"{name}.log").read_text() for name in jobs
    )


@pytest.mark.slow
def test_a_mistake_of_the_user_ends_a_job_at_once(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    """OUT in use or another science, although there is a checkpoint to resume from."""
    out, long = tmp_path / "run", ("train.total_steps=100000",)
    first = submit(slurm, out, data, sets=long)
    wait_for(out / "ckpt/latest")
    second = submit(slurm, out, data, sets=long)
    slurm.until(lambda: slurm.state(second) in ENDED)
    (out / "STOP").touch()
    slurm.until(lambda: slurm.state(first) in ENDED)
    third = submit(slurm, out, data, sets=(*long, "optimizer.peak_lr=1"))
    slurm.until(lambda: slurm.state(third) in ENDED)
    output = Path(f"{out}.log").read_text()
    assert (
        f"names job {first} (restart 0)" in output and "was trained with another config" in output
    ), output[-6000:]
    assert "+ scontrol requeue" not in output and not (out / "restarts.json").exists()


@pytest.mark.slow
def test_failures_are_queued_again_until_no_checkpoint_is_gained(
    slurm: Slurm, uninterrupted: Path, data: Path, tmp_path: Path
) -> None:
    sets = ("checkpoint.every=200", "train.max_restarts=1", "train.silence_seconds=8")
    out = tmp_path / "run"
    job = submit(slurm, out, data, sets=sets)
    wait_for(out / "ckpt/latest")
    os.kill(ranks_of(out)["1"], signal.SIGKILL)
    log = Path(f"{out}.log")
    slurm.until(lambda: "at step 200" in log.read_text().partition("restart 1")[2])
    os.kill(
        ranks_of(out)["0"], signal.SIGKILL
    )  # without a new checkpoint: the next attempt is refused
    slurm.until(lambda: slurm.state(job) in ENDED)
    output = log.read_text()
    assert slurm.state(job) == "FAILED" and output.count("+ scontrol requeue") == 2, output[-6000:]
    assert "failed 2 times in a row at step 200" in output
    lost = [(error["rank"], error["host"]) for error in read_json(out / "restarts.json")["errors"]]
    assert (
        lost == [(1, "node2"), (0, "node1")]
        if slurm.machines
        else [rank for rank, _ in lost] == [1, 0]
    )
    (out / "restarts.json").unlink()
    end_of(slurm, submit(slurm, out, data, sets=sets), out)
    assert weights(out) == weights(uninterrupted)


@pytest.mark.slow
def test_gpus_of_whole_nodes_and_another_mpi(
    slurm: Slurm, uninterrupted: Path, data: Path, tmp_path: Path
) -> None:
    """Two ranks of a node see both of its GPUs; srun under pmi2 sets the names of MPICH, too."""
    whole = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-task=0", "--gpus-per-node=2"]
    job, out = (
        submit(slurm, tmp_path / "run", data, *whole, SLURM_MPI_TYPE="pmi2"),
        tmp_path / "run",
    )
    wait_for(out / "ckpt/latest")
    seen = [
        Path(f"/proc/{process}/environ").read_text().split("\0")
        for process in ranks_of(out).values()
    ]
    assert all("CUDA_VISIBLE_DEVICES=0,1" in names and "PMI_SIZE=2" in names for names in seen)
    assert "2 rank(s) under srun" in end_of(slurm, job, out) and weights(out) == weights(
        uninterrupted
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["node1", "node2"])
def test_a_job_resumes_after_a_power_failure_of_a_node(
    victim: str, slurm: Slurm, uninterrupted: Path, data: Path, tmp_path: Path
) -> None:
    if not slurm.machines:
        pytest.skip("needs virtual nodes")
    out = tmp_path / "run"
    job = submit(slurm, out, data)
    wait_for(out / "ckpt/latest")
    slurm.machines.crash(victim)
    try:
        slurm.until(lambda: slurm.state(job) == "PENDING")
    finally:
        slurm.machines.boot(victim)
        slurm.boot(victim)
    log = end_of(slurm, job, out)
    assert "restart 1" in log and re.search(r"resuming .* at step \d+", log)
    assert weights(out) == weights(uninterrupted)


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_nodes(
    slurm: Slurm, uninterrupted: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for nodes, step in ((2, 100), (1, 250), (2, 400)):
        job = submit(slurm, out, data, f"--nodes={nodes}", words=["--stop-at-step", str(step)])
        slurm.until(lambda job=job: slurm.state(job) in ENDED, 200)
    assert read_json(out / "done")["step"] == 400
    assert len(re.findall(r"([12]) rank\(s\) under srun", Path(f"{out}.log").read_text())) == 3
    ours, theirs = (read_metrics(run / "metrics.jsonl") for run in (out, uninterrupted))
    assert [(r["step"], r["split"]) for r in ours] == [(r["step"], r["split"]) for r in theirs]
    assert [r["mlm_loss"] for r in ours] == pytest.approx([r["mlm_loss"] for r in theirs], rel=1e-5)
