"""The scripts of launch/ on two machines: every launcher trains the same run, bit for bit.

`python -m pytest tests/cluster -m 'slow or not slow'` runs all.
"""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from machines import Machines, wait_until
from nodes import (
    BRIEF,
    arguments,
    hostfile,
    needs_pdsh,
    ranks_of,
    start,
    wait_for,
    weights,
)
from running import ROOT, needs_mpi, read_json

from electra_ds.training import checkpoint


@needs_pdsh
def test_the_nodes_of_a_hostfile_train_one_world_from_their_own_disks(
    machines: Machines, brief: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    words = arguments(tmp_path / "data", tmp_path / "run", *BRIEF)
    own = "/dev/shm/data"  # each machine has its own
    process = start("deepspeed.sh", *words, on=machines.on("head"), STAGE=own, **hostfile(tmp_path))
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and weights(tmp_path / "run") == weights(brief), output[-4000:]
    for node in machines.nodes:
        assert (
            f"{node}: {own}: " in output and "unigrams.npy" in machines.run(node, "ls", own).split()
        )
        machines.run(node, "rm", "-r", own)
    assert f"electra_ds pretrain tiny --data {own} " in output


def test_torchrun_on_each_node_trains_one_world(
    machines: Machines, brief: Path, data: Path, tmp_path: Path
) -> None:
    meeting = {"NODES": 2, "RANKS": 1, "RENDEZVOUS": "node1:29400"}
    words = arguments(data, tmp_path / "run with a space", *BRIEF)
    agents = [
        start("torchrun.sh", *words, on=machines.on(node), **meeting) for node in machines.nodes
    ]
    output = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(
        text[-4000:] for text in output
    )
    assert weights(tmp_path / "run with a space") == weights(brief)


@needs_mpi
def test_mpirun_trains_one_world(
    machines: Machines, brief: Path, data: Path, tmp_path: Path
) -> None:
    words = {"MPIRUN": "-hosts node1,node2 -ppn 1 -iface eth0"}
    process = start(
        "mpi.sh", *arguments(data, tmp_path / "run", *BRIEF), on=machines.on("head"), **words
    )
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and weights(tmp_path / "run") == weights(brief), output[-4000:]


@pytest.mark.slow
@needs_pdsh
@needs_mpi
@pytest.mark.parametrize(
    ("script", "stop"), [("deepspeed.sh", "STOP"), ("deepspeed.sh", "^C"), ("mpi.sh", "^C")]
)
def test_a_run_on_two_nodes_saves_at_a_stop(
    script: str, stop: str, machines: Machines, data: Path, tmp_path: Path
) -> None:
    out, places = (
        tmp_path / "run",
        {"MPIRUN": "-hosts node1,node2 -ppn 1 -iface eth0"} | hostfile(tmp_path),
    )
    words = arguments(data, out, "train.total_steps=100000")
    process = start(script, *words, on=machines.on("head"), **places)
    wait_for(out / "ckpt/latest", process)
    (out / "STOP").touch() if stop == "STOP" else os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=100)[0]
    assert output.endswith("is saved and stopped; the same command resumes it\n"), output[-4000:]
    assert not list(out.glob("error-rank-*"))
    assert checkpoint.latest(out / "ckpt").name == str(read_json(out / "stopped.0")["step"])
    wait_until(lambda: not ranks_of(out), "ranks are left")


@pytest.mark.slow
def test_torchrun_resumes_after_the_death_of_a_rank(
    uninterrupted: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start("torchrun.sh", *arguments(data, out))
    wait_for(out / "ckpt/latest", process)
    os.kill(ranks_of(out)["1"], signal.SIGKILL)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-4000:]
    assert re.search(r"resuming .* at step \d+", output)
    assert weights(out) == weights(uninterrupted)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_scripts_pass_shellcheck() -> None:
    scripts = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), ROOT / "tests/run.sh"]
    done = subprocess.run(["shellcheck", "-x", *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "line", ["-oProxyCommand=touch${IFS}x slots=1", "$(id) slots=1", "node1", "node1 slots=1;id"]
)
def test_a_hostfile_line_that_is_no_host_is_refused(line: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(f"# nodes\nnode0 slots=1\n{line}\n")
    process = start("deepspeed.sh", *arguments(data, tmp_path / "run"), HOSTFILE=tmp_path / "hosts")
    assert (
        "expected a line such as" in process.communicate(timeout=60)[0] and process.returncode == 2
    )


@pytest.mark.parametrize("word", ["--set=$(touch x)", "a b", "x;id", "`id`", "two\nlines", "it's"])
def test_a_word_that_a_remote_shell_would_interpret_is_refused(
    word: str, data: Path, tmp_path: Path
) -> None:
    process = start(
        "deepspeed.sh",
        *arguments(data, tmp_path / "run"),
        word,
        HOSTFILE=ROOT / "launch/hostfile.example",
    )
    assert (
        "cannot be passed through ssh" in process.communicate(timeout=60)[0]
        and process.returncode == 2
    )
