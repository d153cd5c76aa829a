"""launch/prepare.sbatch on two virtual nodes of a real SLURM."""

import subprocess
import sys
from pathlib import Path

import pytest
from running import CPU, ROOT, needs_mpi
from slurm import MISSING, Slurm
from small_corpus import contents

from data_tools.prepare import prepare


@needs_mpi
@pytest.mark.skipif(
    bool(MISSING), reason=f"no {', '.join(MISSING)} here (apt-get install slurm-wlm munge)"
)
def test_tasks_on_two_nodes_write_the_bytes_of_one_process(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    slurm = Slurm(tmp_path / "slurm", 2)
    out = tmp_path / "my data"
    options = ["--input", corpus / "in", "--tokenizer", corpus / "tok", "--sequence-length", 16]
    options += ["--valid-fraction", 0.1, "--out", out]

    def at_its_end(job: str) -> tuple[str, str]:
        """(state, log) of a job."""
        slurm.until(
            lambda: slurm.state(job) not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), 120
        )
        return slurm.state(job), (tmp_path / "log").read_text()

    def submit(*words: object, **environ: str) -> str:
        queue = [
            "sbatch",
            "--parsable",
            "--ntasks=3",
            f"--output={tmp_path}/log",
            "--open-mode=truncate",
        ]
        environ = CPU | {"PYTHON": sys.executable} | environ
        return slurm.run(*queue, *words, cwd=ROOT, **environ).strip()

    script = ["--nodes=2", "launch/prepare.sbatch", *options]
    try:
        state, log = at_its_end(submit(*script, SLURM_MPI_TYPE="none"))
        assert (
            state == "FAILED" and "srun started 3 ranks, mpi4py meets 1" in log and not out.exists()
        ), log
        state, log = at_its_end(submit(*script))
        assert (
            state == "COMPLETED" and "my data is finished" in log and log.count("train: ") == 1
        ), log
        prepare(
            [str(corpus / "in")],
            corpus / "tok",
            tmp_path / "one",
            sequence_length=16,
            valid_fraction=0.1,
        )
        assert contents(out) == contents(tmp_path / "one")

        state, log = at_its_end(submit(*script, "--seed", 1))
        assert state == "FAILED" and log.count("other data (seed: found 0, expected 1)") == 1, log
        # Without --kill-on-bad-exit.
        bare = [
            "timeout",
            "60",
            "srun",
            "--mpi=pmi2",
            "--nodes=2",
            "--ntasks=3",
            sys.executable,
            "-m",
            "electra_ds",
        ]
        bare += ["prepare", *map(str, options), "--seed=1"]
        refused = subprocess.run(bare, env=slurm.environ | CPU, capture_output=True, text=True)
        assert refused.returncode not in (0, 124) and "holds other data" in refused.stderr, (
            refused.stderr
        )
    finally:
        slurm.down()
