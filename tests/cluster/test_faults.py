"""Unfit machines are named before a run; a lost machine ends all ranks, and the run resumes."""

import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Machines, wait_until
from nodes import arguments, hostfile, needs_pdsh, ranks_of, start, wait_for, weights

SILENCE = 8  # train.silence_seconds


@pytest.fixture
def unfit(machines: Machines, data: Path, tmp_path: Path) -> Iterator[Path]:
    """node2 without the data, with a full /dev/shm and a broken environment.

    Returns the interpreter that PYTHON has to name.
    """
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$(uname -n)" != node2 ] && exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    machines.run("node2", "mount", "-t", "tmpfs", "tmpfs", data)
    machines.run("node2", "mount", "-o", "remount,size=1M", "/dev/shm")
    yield python
    machines.run("node2", "umount", data)
    machines.run("node2", "mount", "-o", "remount,size=50%", "/dev/shm")


@pytest.mark.parametrize("script", ["deepspeed.sh", pytest.param("mpi.sh", marks=pytest.mark.slow)])
def test_a_node_that_is_not_fit_is_named_before_the_run(
    script: str, unfit: Path, machines: Machines, data: Path, tmp_path: Path
) -> None:
    if shutil.which("pdsh" if script == "deepspeed.sh" else "mpirun") is None:
        pytest.skip("no pdsh or no mpirun here")
    places = {"MPIRUN": "-hosts node1,node2 -ppn 1 -iface eth0"} | hostfile(tmp_path)
    process = start(
        script, *arguments(data, tmp_path / "run"), on=machines.on("head"), PYTHON=unfit, **places
    )
    output = process.communicate(timeout=100)[0]
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    for wrong in ("cannot read", "left in /dev/shm", "cannot import torch"):
        assert re.search(f"bad node node2: .*{wrong}", output), output
    assert "bad node node1" not in output


@needs_pdsh
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut", "crash"])
@pytest.mark.parametrize("victim", ["node1", "node2"])
def test_a_lost_node_ends_the_job(
    fault: str, victim: str, machines: Machines, uninterrupted: Path, data: Path, tmp_path: Path
) -> None:
    out, sets = tmp_path / "run", (f"train.silence_seconds={SILENCE}",)
    process = start(
        "deepspeed.sh", *arguments(data, out, *sets), on=machines.on("head"), **hostfile(tmp_path)
    )
    wait_for(out / "ckpt/latest", process)
    began = time.monotonic()
    getattr(machines, fault)(victim)
    try:
        wait_until(lambda: not ranks_of(out), "ranks are left", SILENCE + 30)
        ended = time.monotonic() - began
        output = process.communicate(timeout=60)[0]
        launcher_ended = time.monotonic() - began
        print(f"{fault} {victim}: ranks ended after {ended:.0f} s, launcher {launcher_ended:.0f} s")
    finally:
        (machines.heal if fault == "cut" else machines.boot)(victim)
    assert process.returncode not in (0, 85), output[-4000:]
    lost, other = (0, 1) if victim == "node1" else (1, 0)
    named = f"rank {lost} on {victim} failed first: "
    assert (
        f"(rank {other}): error: {named}" in output
        and named in (out / f"log/rank-{other}.log").read_text()
    )
    if fault == "cut":  # the nodes on the other side of the cut name this node
        assert (
            f"rank {other} on node{other + 1} failed first: "
            in (out / f"log/rank-{lost}.log").read_text()
        )
    again = start(
        "deepspeed.sh", *arguments(data, out, *sets), on=machines.on("head"), **hostfile(tmp_path)
    )
    output = again.communicate(timeout=300)[0]
    assert (
        again.returncode == 0 and "resuming" in output and weights(out) == weights(uninterrupted)
    ), output[-4000:]
