"""prepare on MPI ranks: the bytes of one process, failures end all ranks, later runs resume."""

import contextlib
import gzip
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from running import CPU, WITH_SUPPORT, mpirun, needs_mpi
from small_corpus import contents, text_of
from small_corpus import prepare_corpus as run

pytestmark = needs_mpi
# Kills rank `victim` in stage `at`.
JOB = """
import os, sys, time
from pathlib import Path
from data_tools.workers import mpi_ranks
from mpi4py import MPI
from small_corpus import prepare_corpus as run
victim, at = int(sys.argv[3]), sys.argv[4]
pids = MPI.COMM_WORLD.allgather(os.getpid())
def progress(stage, done, total):
    if stage == at and done:
        print(*pids, flush=True)
        os.kill(pids[victim], 9)
        time.sleep(60)
with mpi_ranks(MPI.COMM_WORLD) as others:
    if others is not None:
        run(Path(sys.argv[1]), Path(sys.argv[2]), ranks=others, progress=progress)
"""
# Runs with so many local workers, or with 0 on MPI ranks.
KILLED = """
import sys
from pathlib import Path
from data_tools.workers import mpi_ranks
from small_corpus import prepare_corpus as run
if __name__ == "__main__":
    corpus, out, units = map(Path, sys.argv[1:4])
    workers, world = int(sys.argv[4]), None
    if not workers:
        from mpi4py import MPI
        world = MPI.COMM_WORLD
    with mpi_ranks(world) as others:
        if others is not None:
            run(corpus, out, units=units, unit_bytes=1000, workers=workers or 1, ranks=others)
"""


@pytest.mark.parametrize(("victim", "at"), [(0, "tokenize"), (1, "pack")])
def test_a_killed_rank_ends_all_and_another_number_of_ranks_resumes(corpus, tmp_path, victim, at):
    run(corpus, tmp_path / "whole")
    (tmp_path / "job.py").write_text(JOB)
    killed = mpirun(3, tmp_path / "job.py", corpus, tmp_path / "data", victim, at)
    pids = killed.stdout.splitlines()[0].split()  # the other lines are mpirun's
    assert killed.returncode != 0 and len(pids) == 3
    assert not (tmp_path / "data" / "manifest.json").exists()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    done = mpirun(2, tmp_path / "job.py", corpus, tmp_path / "data", 0, "never")
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def processes_with(text: str) -> list[int]:
    """The processes, launchers included, with a text in their environment."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if text.encode() in path.read_bytes():
                pids.append(int(path.parent.name))
    return pids


def kill_some(pids: list[int], random: Random) -> None:
    """Kill one Python process of a job, or with probability 0.4 all its processes."""
    pythons = [pid for pid in pids if "python" in os.path.realpath(f"/proc/{pid}/exe")]
    victims = pids if not pythons or random.random() < 0.4 else [random.choice(pythons)]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["workers", "ranks"])
def test_20_random_kills_repeat_only_unfinished_work(corpus, tmp_path, driver):
    """Kill one process or all, then start another number of them; sometimes damage a unit."""
    random = Random(int(os.environ.get("CHAOS_SEED", "1")))
    whole, out, units = (tmp_path / name for name in ("whole", "data", "units"))
    job = tmp_path / "job.py"
    job.write_text(KILLED)
    manifest = run(corpus, whole, unit_bytes=1000)
    kills = 0
    launches = 0
    finished = {}  # marker of a unit -> time at which it was written
    while not (out / "manifest.json").exists():
        launches += 1
        count = random.choice([1, 2, 3, 4, 7])
        on_ranks = driver == "ranks"
        command = [*(["mpirun", "-n", str(count)] if on_ranks else []), sys.executable, job]
        command += [corpus, out, units, "0" if on_ranks else str(count)]
        label = f"{tmp_path}/{launches}."
        environ = os.environ | CPU | WITH_SUPPORT | {"JOB_LABEL": label}
        process = subprocess.Popen(
            command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        last = kills == 20
        files_at_kill = random.randrange(1, 2 * len(manifest.source.units) + 10)
        while process.poll() is None and (
            last or len([*out.rglob("*.*"), *units.glob("unit-*")]) < files_at_kill
        ):
            time.sleep(0.002)
        if process.poll() is None:
            kill_some(processes_with(label), random)
            kills += 1
        process.wait(30)
        while processes_with(label):
            time.sleep(0.01)
        for marker, written in finished.items():
            assert marker.stat().st_mtime_ns == written
        if not last and (out / "manifest.json").exists():
            shutil.rmtree(out)  # it finished before the kill: repeat from the units
        markers = sorted(units.glob("unit-*.json"))
        if not last and markers and random.random() < 0.3:
            random.choice(markers).with_suffix(".ids").write_bytes(b"damaged")
        finished = {
            marker: marker.stat().st_mtime_ns
            for marker in markers
            if marker.with_suffix(".ids").read_bytes() != b"damaged"
        }
    assert kills == 20 and contents(out) == contents(whole)


def test_the_script_prints_the_error_of_a_rank_once_and_has_its_exit_code(corpus, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(6):
        text = "\n\n".join(text_of(i) for i in range(30 * number, 30 * number + 30))
        (tmp_path / "in" / f"{number}.gz").write_bytes(gzip.compress(text.encode()))
    whole = (tmp_path / "in" / "3.gz").read_bytes()
    (tmp_path / "in" / "3.gz").write_bytes(whole[:-100])
    options = ["--input", tmp_path / "in", "--tokenizer", corpus / "tok", "--valid-fraction", 0.1]
    broken = mpirun(3, *options, "--out", tmp_path / "broken", script=True)
    assert broken.returncode == 2, broken.stderr
    assert broken.stderr.count("3.gz: broken after byte") == 1, broken.stderr
    assert "Traceback" not in broken.stderr
    assert "failed (exit code 2 of the launcher)" in broken.stderr
    (tmp_path / "in" / "3.gz").write_bytes(whole)
    out = ["--out", tmp_path / "my data"]
    done = mpirun(3, *options, *out, script=True)
    assert done.returncode == 0 and "my data is finished" in done.stderr, done.stderr
    assert done.stdout.count("train: ") == 1
    refused = mpirun(3, *options, *out, "--workers", 2, script=True)
    assert refused.returncode == 2 and refused.stderr.count("workers = 2; expected") == 1, refused


def test_the_module_under_mpi4py_is_the_verb(corpus, tmp_path):
    command = ["-m", "mpi4py", "-m", "data_tools.prepare"]
    command += ["--tokenizer", corpus / "tok", "--out", tmp_path / "data"]
    done = mpirun(2, *command, "--input", corpus / "in", "--valid-fraction", 0.1)
    assert done.returncode == 0 and (tmp_path / "data" / "manifest.json").exists(), done.stderr
    refused = mpirun(2, *command, "--input", tmp_path / "none")
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.count("none: no such file") == 1, refused.stderr
