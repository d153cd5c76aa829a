"""Fifty losses of `tiny`, kept as text: bit-equal on the kind of machine that wrote them.

After an intended change of the mathematics, write them again:
PYTHONPATH=.:tests/support python tests/training/test_golden.py
"""

import platform
import sys
import tempfile
from pathlib import Path

import pytest
import shard_data
from running import run_cli

from electra_ds.training.metrics_file import read_metrics

GOLDEN = Path(__file__).parents[1] / "files" / "golden_tiny.txt"


def processor() -> str:
    """The processor and torch's version, on which matrix products depend to the last bit."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    wanted = ("vendor_id", "cpu family", "model\t", "stepping")
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith(wanted)][:4]
    return " ".join([platform.machine(), *found, "torch", torch.__version__])


def losses(folder: Path, *more: str) -> list[float]:
    """The losses of the first 50 steps of `tiny` (one rank, ZeRO 0, fp32) on random rows."""
    data = shard_data.write_data(
        folder, [shard_data.best_fit_rows(100, 32, seed=seed) for seed in range(3)]
    )
    sets = [
        "train.total_steps=50",
        "logging.every=1",
        "train.eval_every=0",
        "optimizer.warmup_steps=10",
        *more,
    ]
    options = [part for setting in sets for part in ("--set", setting)]
    run_cli(
        "pretrain",
        "tiny",
        "--data",
        data,
        "--out",
        folder / "run",
        "--engine",
        "zero0-fp32",
        *options,
    )
    return [record["loss"] for record in read_metrics(folder / "run" / "metrics.jsonl")]


@pytest.mark.parametrize("deterministic", ("false", "true"))  # which changes nothing on a CPU
def test_fifty_steps_give_the_golden_losses(tmp_path: Path, deterministic: str) -> None:
    machine, *lines = GOLDEN.read_text().splitlines()
    golden = [float(line) for line in lines]
    found = losses(tmp_path, f"train.deterministic={deterministic}")
    assert found == pytest.approx(golden, rel=1e-4)
    if machine == processor():
        assert found == golden


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.write_text("\n".join([processor(), *map(repr, losses(Path(scratch)))]) + "\n")
    sys.stdout.write(GOLDEN.read_text())
