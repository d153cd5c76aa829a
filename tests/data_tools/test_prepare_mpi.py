"""`prepare` on MPI ranks: the bytes of one process, errors and deaths that end all ranks, and going on after them."""

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
from running import CPU, mpirun, needs_mpi
from small_corpus import contents, text_of
from small_corpus import prepare_corpus as run

pytestmark = needs_mpi
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
with mpi_ranks() as others:
    if others is not None:
        run(Path(sys.argv[1]), Path(sys.argv[2]), ranks=others, progress=progress)
"""
KILLED = """
import sys
from pathlib import Path
from data_tools.workers import mpi_ranks
from small_corpus import prepare_corpus as run
if __name__ == "__main__":
    corpus, out, units = map(Path, sys.argv[1:4])
    with mpi_ranks() as others:
        if others is not None:
            run(corpus, out, units=units, unit_bytes=1000, workers=int(sys.argv[4]), ranks=others)
"""


@pytest.mark.parametrize(("victim", "at"), [(0, "tokenize"), (1, "pack")])
def test_the_death_of_a_rank_ends_all_and_another_number_goes_on(corpus, tmp_path, victim, at):
    run(corpus, tmp_path / "whole")
    (tmp_path / "job.py").write_text(JOB)
    died = mpirun(3, tmp_path / "job.py", corpus, tmp_path / "data", victim, at)
    pids = died.stdout.splitlines()[0].split()  # mpirun says more
    assert (
        died.returncode != 0
        and len(pids) == 3
        and not (tmp_path / "data" / "manifest.json").exists()
    )
    ended = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < ended
        time.sleep(0.05)
    done = mpirun(2, tmp_path / "job.py", corpus, tmp_path / "data", 0, "never")
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def processes_of(word: str) -> list[int]:
    """The processes, of all launchers, whose environment holds a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found += [int(path.parent.name)] if word.encode() in path.read_bytes() else []
    return found


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["workers", "ranks"])
def test_20_random_kills_cost_only_what_was_not_finished(corpus, tmp_path, driver):
    """Of one process or of all, each followed by another number of them; now and then a finished unit is damaged."""
    random, kills, launches, kept = Random(int(os.environ.get("CHAOS_SEED", "1"))), 0, 0, {}
    whole, out, units, job = (
        tmp_path / "whole",
        tmp_path / "data",
        tmp_path / "units",
        tmp_path / "job.py",
    )
    manifest = run(corpus, whole, unit_bytes=1000)
    job.write_text(KILLED)
    while not (out / "manifest.json").exists():
        launches += 1
        count, word = random.choice([1, 2, 3, 4, 7]), f"{tmp_path}/{launches}."
        launcher = ["mpirun", "-n", str(count)] if driver == "ranks" else []
        command = [
            *launcher,
            sys.executable,
            job,
            corpus,
            out,
            units,
            str(1 if launcher else count),
        ]
        environ = os.environ | CPU | {"WORD": word}
        process = subprocess.Popen(
            command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        last = kills == 20
        wanted = random.randrange(
            1, 2 * len(manifest.source.units) + 10
        )  # files when the kill comes
        while process.poll() is None and (
            last or len([*out.rglob("*.*"), *units.glob("unit-*")]) < wanted
        ):
            time.sleep(0.002)
        if process.poll() is None:
            victims = processes_of(word)
            own = [
                pid for pid in victims if "python" in os.path.realpath(f"/proc/{pid}/exe")
            ]  # not the launcher's
            for pid in victims if not own or random.random() < 0.4 else [random.choice(own)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            kills += 1
        process.wait(30)
        while processes_of(word):
            time.sleep(0.01)
        assert all(
            marker.stat().st_mtime_ns == written for marker, written in kept.items()
        )  # none was made again
        if not last and (out / "manifest.json").exists():
            shutil.rmtree(out)  # the kill came too late: once more from the units
        if not last and random.random() < 0.3 and (finished := sorted(units.glob("unit-*.json"))):
            random.choice(finished).with_suffix(".ids").write_bytes(b"damaged")
        kept = {
            marker: marker.stat().st_mtime_ns
            for marker in units.glob("unit-*.json")
            if marker.with_suffix(".ids").read_bytes() != b"damaged"
        }
    assert kills == 20 and contents(out) == contents(whole)


def test_the_script_says_what_a_rank_found_once_and_leaves_as_prepare_does(corpus, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(6):
        text = "\n\n".join(text_of(i) for i in range(30 * number, 30 * number + 30))
        (tmp_path / "in" / f"{number}.gz").write_bytes(gzip.compress(text.encode()))
    whole = (tmp_path / "in" / "3.gz").read_bytes()
    (tmp_path / "in" / "3.gz").write_bytes(whole[:-100])
    options = [
        "--input",
        tmp_path / "in",
        "--tokenizer",
        corpus / "tok",
        "--valid-fraction",
        0.1,
        "--out",
    ]
    broken = mpirun(3, *options, tmp_path / "broken", script=True)
    assert broken.returncode == 2 and broken.stderr.count("3.gz: broken after byte") == 1, (
        broken.stderr
    )
    assert (
        "Traceback" not in broken.stderr and "failed (exit code 2 of the launcher)" in broken.stderr
    )
    (tmp_path / "in" / "3.gz").write_bytes(whole)
    done = mpirun(3, *options, tmp_path / "my data", script=True)
    assert done.returncode == 0 and "my data is finished" in done.stderr, done.stderr
    assert done.stdout.count("train: ") == 1
    refused = mpirun(
        3, *options, tmp_path / "my data", "--workers", 2, script=True
    )  # before any work is handed out
    assert refused.returncode == 2 and refused.stderr.count("workers = 2; expected") == 1, refused


def test_the_module_under_mpi4py_is_the_verb(corpus, tmp_path):
    command = [
        "-m",
        "mpi4py",
        "-m",
        "data_tools.prepare",
        "--tokenizer",
        corpus / "tok",
        "--out",
        tmp_path / "data",
    ]
    done = mpirun(2, *command, "--input", corpus / "in", "--valid-fraction", 0.1)
    assert done.returncode == 0 and (tmp_path / "data" / "manifest.json").exists(), done.stderr
    refused = mpirun(2, *command, "--input", tmp_path / "none")
    assert refused.returncode == 2 and refused.stderr.count("none: no such file") == 1, (
        refused.stderr
    )
