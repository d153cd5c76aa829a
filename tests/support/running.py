"""Commands that tests run: the command line, and real ranks under torchrun."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "tests" / "files"
SHARED = ROOT.parent / "shared"  # tests that need it are skipped if it is missing
CPU = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),
}
WITH_SUPPORT = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])}


def has_mpi() -> bool:
    """Whether mpirun is installed and mpi4py in this environment loads an MPI library."""
    load = [sys.executable, "-c", "from mpi4py import MPI"]
    return (
        shutil.which("mpirun") is not None
        and subprocess.run(load, capture_output=True).returncode == 0
    )


needs_mpi = pytest.mark.skipif(
    not has_mpi(), reason="no mpirun with an MPI library that mpi4py loads"
)


def run_ranks(
    world_size: int, script: str, *arguments: object, check: bool = True
) -> subprocess.CompletedProcess:
    """Run a script of tests/support on ranks (gloo) under torchrun.

    Fails with its output unless check is False.
    """
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={world_size}",
    ]
    command = [*launcher, str(ROOT / "tests" / "support" / script), *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | CPU, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0 or not check, done.stdout[-4000:] + done.stderr[-8000:]
    return done


def mpirun(ranks: int, *command: object, script: bool = False) -> subprocess.CompletedProcess:
    """Run a Python command under mpirun, or prepare.sh (`script`); fails after 30 seconds."""
    launcher = (
        ["bash", str(ROOT / "launch/prepare.sh")]
        if script
        else ["mpirun", "-n", str(ranks), sys.executable]
    )
    environ = os.environ | CPU | WITH_SUPPORT | {"PYTHON": sys.executable, "RANKS": str(ranks)}
    return subprocess.run(
        [*launcher, *map(str, command)], env=environ, capture_output=True, text=True, timeout=30
    )


def run_cli(
    *arguments: object, check: bool = True, input: str = "", **environ: str
) -> subprocess.CompletedProcess:
    """`python -m electra_ds ...` on this CPU."""
    command = [sys.executable, "-m", "electra_ds", *map(str, arguments)]
    environ = os.environ | CPU | environ
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=600, input=input
    )
    assert done.returncode == 0 or not check, done.stdout[-4000:] + done.stderr[-8000:]
    return done


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())
