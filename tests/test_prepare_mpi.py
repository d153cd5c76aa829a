"""`prepare` on MPI ranks: the bytes of one process, errors and deaths that end all ranks, and going on after them."""

import gzip
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CPU, ROOT, needs_mpi
from test_prepare import contents, corpus, run, text_of  # noqa: F401 (corpus is a fixture)

pytestmark = needs_mpi
JOB = """
import os, sys, time
from pathlib import Path
from data_tools.workers import mpi_ranks
from mpi4py import MPI
from tests.test_prepare import run
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


def mpirun(ranks: int, *command: object, script: bool = False) -> subprocess.CompletedProcess:
    """Ends within half a minute or fails."""
    launcher = ["bash", str(ROOT / "launch/prepare.sh")] if script else ["mpirun", "-n", str(ranks), sys.executable]
    environ = os.environ | CPU | {"PYTHON": sys.executable, "RANKS": str(ranks)}
    return subprocess.run([*launcher, *map(str, command)], env=environ, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize(("victim", "at"), [(0, "tokenize"), (1, "pack")])
def test_the_death_of_a_rank_ends_all_and_another_number_goes_on(corpus, tmp_path, victim, at):  # noqa: F811
    run(corpus, tmp_path / "whole")
    (tmp_path / "job.py").write_text(JOB)
    died = mpirun(3, tmp_path / "job.py", corpus, tmp_path / "data", victim, at)
    pids = died.stdout.splitlines()[0].split()  # mpirun says more
    assert died.returncode != 0 and len(pids) == 3 and not (tmp_path / "data" / "manifest.json").exists()
    ended = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < ended
        time.sleep(0.05)
    done = mpirun(2, tmp_path / "job.py", corpus, tmp_path / "data", 0, "never")
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_the_script_says_what_a_rank_found_once_and_leaves_as_prepare_does(corpus, tmp_path):  # noqa: F811
    (tmp_path / "in").mkdir()
    for number in range(6):
        text = "\n\n".join(text_of(i) for i in range(30 * number, 30 * number + 30))
        (tmp_path / "in" / f"{number}.gz").write_bytes(gzip.compress(text.encode()))
    whole = (tmp_path / "in" / "3.gz").read_bytes()
    (tmp_path / "in" / "3.gz").write_bytes(whole[:-100])
    options = ["--input", tmp_path / "in", "--tokenizer", corpus / "tok", "--valid-fraction", 0.1, "--out"]
    broken = mpirun(3, *options, tmp_path / "broken", script=True)
    assert broken.returncode == 2 and broken.stderr.count("3.gz: broken after byte") == 1, broken.stderr
    assert "Traceback" not in broken.stderr and "failed (the launcher left with 2)" in broken.stderr
    (tmp_path / "in" / "3.gz").write_bytes(whole)
    done = mpirun(3, *options, tmp_path / "my data", script=True)
    assert done.returncode == 0 and "my data is finished" in done.stderr, done.stderr
    assert done.stdout.count("train: ") == 1
    refused = mpirun(3, *options, tmp_path / "my data", "--workers", 2, script=True)  # before any work is handed out
    assert refused.returncode == 2 and refused.stderr.count("workers = 2; expected") == 1, refused
