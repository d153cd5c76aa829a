"""Fixtures and helpers of tests/cluster: runs, virtual nodes, SLURM, the scripts of launch/.

A plugin of pytest (tests/conftest.py names it), so that machines and SLURM are started once.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import machines as virtual
import pytest
import slurm as scheduler
from machines import Machines, wait_until
from running import CPU, ROOT
from slurm import Slurm
from small_run import SMALL_MODEL

SMALL = [
    *SMALL_MODEL,
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.total_steps=400",
    "train.eval_every=0",
    "checkpoint.every=50",
    "logging.tensorboard=false",
]
BRIEF = ("train.total_steps=40", "checkpoint.every=20")  # for runs without a fault
needs_pdsh = pytest.mark.skipif(
    shutil.which("pdsh") is None, reason="no pdsh here (apt-get install pdsh)"
)
ENVIRON = CPU | {"PYTHON": sys.executable, "RANKS": "2"}


def arguments(data: Path, out: Path, *sets: str) -> list[object]:
    """The options of a short run."""
    words = itertools.chain.from_iterable(("--set", value) for value in (*SMALL, *sets))
    return ["tiny", "--data", data, "--out", out, "--engine", "zero1-fp32", *words]


def start(
    script: str, *words: object, on: list[str] | None = None, **environ: object
) -> subprocess.Popen:
    """Start a script of launch/, here or on a machine (`on`: Machines.on)."""
    command = [*(on or []), "bash", str(ROOT / "launch" / script), *map(str, words)]
    environ = os.environ | ENVIRON | {key: str(value) for key, value in environ.items()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # In a session of its own, so that a test can send what Ctrl-C sends.
    return subprocess.Popen(command, env=environ, start_new_session=True, **pipes)


def hostfile(folder: Path) -> dict[str, Path]:
    """The variables of deepspeed.sh for node1 and node2."""
    (folder / "hosts").write_text("node1 slots=1\n\nnode2 slots=1 # the second\n")
    (folder / "environ").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    return {"HOSTFILE": folder / "hosts", "DS_ENV_FILE": folder / "environ"}


def submit(
    slurm: Slurm,
    out: Path,
    data: Path,
    *options: str,
    sets: tuple[str, ...] = (),
    words: Sequence[str] = (),
    **environ: str,
) -> str:
    """Queue pretrain.sbatch with a rank on each of two nodes; the number of the job.

    The job writes its log to OUT.log.
    """
    shape = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={out}.log"]
    run = ["launch/pretrain.sbatch", *arguments(data, out, *sets), *words]
    meeting = {} if slurm.machines else {"MASTER_ADDR": "127.0.0.1"}
    return slurm.run(
        "sbatch", "--parsable", *shape, *options, *run, cwd=ROOT, **(ENVIRON | meeting | environ)
    ).strip()


def weights(out: Path) -> bytes:
    """The bytes of the final weights."""
    return b"".join(
        path.read_bytes() for path in sorted((out / "ckpt/final").glob("model-*.safetensors"))
    )


def wait_for(path: Path, process: subprocess.Popen | None = None) -> None:
    """Wait for a file; fails when the process that should write it ends."""
    wait_until(
        lambda: path.exists() or (process and process.poll() is not None),
        f"{path} is not written",
        200,
    )
    assert path.exists(), process.communicate()[0][-4000:]


def ranks_of(out: Path) -> dict[str, int]:
    """RANK -> process number of the ranks (not of launchers) that write to `out`."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = [
                word for word in (process / "cmdline").read_bytes().split(b"\0") if word != b"-u"
            ]
            rank = re.search(
                rb"\0(?:RANK|SLURM_PROCID|PMI_RANK)=(\d+)\0", (process / "environ").read_bytes()
            )
        except OSError:
            continue
        if rank and words[1:3] == [b"-m", b"electra_ds"] and str(out).encode() in words:
            found[rank[1].decode()] = int(process.name)
    return found


def run_here(data: Path, out: Path, *sets: str) -> Path:
    """A finished run by local.sh on two ranks."""
    process = start("local.sh", *arguments(data, out, *sets))
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and (out / "done").exists(), said[-4000:]
    assert f"{out} is finished" in said and "--world-size 2" in said
    return out


@pytest.fixture(scope="session")
def brief(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on this machine with the values of BRIEF."""
    return run_here(data, tmp_path_factory.mktemp("brief") / "run", *BRIEF)


@pytest.fixture(scope="session")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 400 steps on this machine, to compare with runs that had faults."""
    return run_here(data, tmp_path_factory.mktemp("uninterrupted") / "run")


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """The virtual nodes head, node1 and node2."""
    if problem := virtual.missing():
        pytest.skip(problem)
    made = Machines(tmp_path_factory.mktemp("machines"), 2)
    yield made
    made.down()


@pytest.fixture(scope="session")
def slurm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Slurm]:
    """SLURM with two idle nodes: virtual ones, or without root both on 127.0.0.1."""
    if scheduler.MISSING:
        pytest.skip(f"no {', '.join(scheduler.MISSING)} here (apt-get install slurm-wlm munge)")
    on = None if virtual.missing() else request.getfixturevalue("machines")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"), 2, on)
    yield cluster
    cluster.down()
