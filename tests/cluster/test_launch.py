"""The scripts of launch/, run as a user would: each launcher trains the same run, to the bit, through stops and deaths.

SLURM is real, on virtual nodes (slurm.py). `python -m pytest tests/cluster -m 'slow or not slow'` runs all.
"""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CPU, ROOT, needs_mpi, read_json
from slurm import MISSING, PATH, Slurm

from electra_ds.ranks import free_port

SMALL = [
    "model.hidden_size=32", "model.ffn_size=64", "model.embedding_size=24", "model.num_layers=1",
    "generator.hidden_size=16", "generator.ffn_size=32", "generator.num_layers=1", "train.global_batch_size=8",
    "train.micro_batch_size=4", "train.total_steps=400", "train.eval_every=0", "checkpoint.every=50",
    "logging.tensorboard=false",
]  # fmt: skip
ENVIRON = CPU | {"PYTHON": sys.executable, "RANKS": "2"}
SBATCH = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]


def arguments(data: Path, out: Path) -> list[object]:
    sets = itertools.chain.from_iterable(("--set", value) for value in SMALL)
    return ["tiny", "--data", data, "--out", out, "--engine", "zero1-fp32", *sets]


def start(script: str, *words: object, **environ: object) -> subprocess.Popen:
    command = ["bash", str(ROOT / "launch" / script), *map(str, words)]
    environ = os.environ | ENVIRON | {key: str(value) for key, value in environ.items()}
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def weights(out: Path) -> bytes:
    """The bytes of the final weights."""
    return b"".join(path.read_bytes() for path in sorted((out / "ckpt/final").glob("model-*.safetensors")))


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by local.sh on two ranks, to its end."""
    out = tmp_path_factory.mktemp("local") / "run"
    process = start("local.sh", *arguments(data, out))
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and read_json(out / "done")["step"] == 400, said[-4000:]
    assert f"{out} is finished" in said and "--world-size 2" in said
    return out


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two idle nodes."""
    if MISSING:
        pytest.skip(f"no {', '.join(MISSING)} here (apt-get install slurm-wlm munge)")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"), 2)
    yield cluster
    cluster.down()


def submit(slurm: Slurm, out: Path, data: Path, *options: str, **environ: str) -> str:
    """Queue pretrain.sbatch from this checkout; the job's number. Its log is OUT.log."""
    words = [*SBATCH, f"--output={out}.log", *options, "launch/pretrain.sbatch", *arguments(data, out)]
    return slurm.run(*words, cwd=ROOT, **(ENVIRON | {"MASTER_ADDR": "127.0.0.1"} | environ)).strip()


def rank_of(process: int) -> str | None:
    """RANK of a process, or None of one that is no rank, or gone."""
    try:
        if b"electra_ds" in Path(f"/proc/{process}/cmdline").read_bytes():
            found = re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{process}/environ").read_bytes())
            return found[1].decode() if found else None
    except OSError:
        pass
    return None


def descendants(process: int) -> list[int]:
    found = [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return found + [below for p in found for below in descendants(p)]


def wait_for(path: Path, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline and (process is None or process.poll() is None), path
        time.sleep(0.05)


def test_torchrun_goes_on_after_the_death_of_a_rank(uninterrupted: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run with a space"
    process = start("torchrun.sh", *arguments(data, out))
    wait_for(out / "ckpt/latest", process)
    victim = next(p for p in descendants(process.pid) if rank_of(p) == "1")
    os.kill(victim, signal.SIGKILL)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-4000:]
    assert re.search(r"resuming .* at step \d+", said)
    assert weights(out) == weights(uninterrupted)


def test_a_job_on_two_nodes_trains_one_world(slurm: Slurm, uninterrupted: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = submit(slurm, out, data)
    slurm.until(lambda: slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), 300)
    log = Path(f"{out}.log").read_text()
    assert slurm.state(job) == "COMPLETED" and read_json(out / "done")["step"] == 400, log[-4000:]
    assert "2 rank(s) under srun" in log and weights(out) == weights(uninterrupted)


def test_a_node_that_is_not_fit_is_named_before_the_run(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "python"  # an environment that one node does not have
    broken.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" != node2 ] && exec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    job = submit(slurm, tmp_path / "run", data, PYTHON=str(broken))
    slurm.until(lambda: slurm.state(job) == "FAILED")
    log = (tmp_path / "run.log").read_text()
    assert "bad node node2: " in log and "bad node node1" not in log and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signalled_job_saves_queues_itself_once_and_ends_the_same(
    slurm: Slurm, uninterrupted: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = submit(slurm, out, data)
    wait_for(out / "ckpt/latest")
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # as before the time limit: to the shell alone
    slurm.until(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), 400)
    log = Path(f"{out}.log").read_text()
    assert slurm.state(job) == "COMPLETED", log[-4000:]
    assert log.count("+ scontrol requeue") == 1 and "restart 0" in log and "restart 1" in log
    assert re.search(r"stopped and saved at step \d+", log) and re.search(r"resuming .* at step \d+", log)
    assert weights(out) == weights(uninterrupted)


@pytest.mark.slow
def test_what_the_user_ends_stays_ended(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    """scancel, though all is saved at its SIGTERM; OUT/STOP; a cap on restarts."""
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
    assert "scontrol requeue" not in "".join((tmp_path / f"{name}.log").read_text() for name in jobs)


@needs_mpi
def test_mpirun_trains_one_world(uninterrupted: Path, data: Path, tmp_path: Path) -> None:
    said = (process := start("mpi.sh", *arguments(data, tmp_path / "run"))).communicate(timeout=300)[0]
    assert process.returncode == 0 and weights(tmp_path / "run") == weights(uninterrupted), said[-4000:]


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[str]:
    """An sshd on 127.0.0.1 and 127.0.0.2, two "nodes"; the words that ssh needs to enter."""
    sshd = shutil.which("sshd", path=PATH)
    if sshd is None or shutil.which("pdsh") is None or os.getuid() != 0:
        pytest.skip("needs root, sshd and pdsh (apt-get install openssh-server pdsh)")
    for name in ("id", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    port = free_port()
    options = [f"Port={port}", f"HostKey={tmp_path}/host", f"AuthorizedKeysFile={tmp_path}/id.pub", "StrictModes=no",
               "ListenAddress=127.0.0.1", "ListenAddress=127.0.0.2", "PidFile=none", "UsePAM=no"]  # fmt: skip
    command = [sshd, "-D", "-f", "/dev/null", *itertools.chain.from_iterable(("-o", option) for option in options)]
    hidden = 'mount -t tmpfs tmpfs /run && mkdir /run/sshd && exec "$@"'  # the folder it insists on, for it alone
    with (tmp_path / "sshd.log").open("w") as log:
        process = subprocess.Popen(["unshare", "--mount", "sh", "-c", hidden, "_", *command], stderr=log)
        client = f"-p {port} -i {tmp_path}/id -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        time.sleep(0.5)
        yield f"{client} -o LogLevel=ERROR"
    process.terminate()
    process.wait(10)


@pytest.mark.slow
def test_the_nodes_of_a_hostfile_train_one_world(ssh: str, uninterrupted: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n\n127.0.0.2 slots=1 # the second\n")
    (tmp_path / "environ").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    nodes = {"HOSTFILE": tmp_path / "hosts", "DS_ENV_FILE": tmp_path / "environ", "PDSH_SSH_ARGS_APPEND": ssh}
    process = start("deepspeed.sh", *arguments(data, tmp_path / "run"), **nodes)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and weights(tmp_path / "run") == weights(uninterrupted), said[-4000:]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_scripts_pass_shellcheck() -> None:
    scripts = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), ROOT / "tests/run.sh"]
    done = subprocess.run(["shellcheck", "-x", *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("line", ["-oProxyCommand=touch${IFS}x slots=1", "$(id) slots=1", "node1", "node1 slots=1;id"])
def test_a_hostfile_line_that_is_no_host_is_refused(line: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(f"# nodes\nnode0 slots=1\n{line}\n")
    process = start("deepspeed.sh", *arguments(data, tmp_path / "run"), HOSTFILE=tmp_path / "hosts")
    assert "is not a line such as" in process.communicate(timeout=60)[0] and process.returncode == 2


@pytest.mark.parametrize("word", ["--set=$(touch x)", "a b", "x;id", "`id`", "two\nlines", "it's"])
def test_a_word_that_a_remote_shell_would_read_is_refused(word: str, data: Path, tmp_path: Path) -> None:
    process = start("deepspeed.sh", *arguments(data, tmp_path / "run"), word, HOSTFILE=ROOT / "launch/hostfile.example")
    assert "cannot go through ssh" in process.communicate(timeout=60)[0] and process.returncode == 2
