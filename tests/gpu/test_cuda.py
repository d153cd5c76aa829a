"""What only CUDA can show; skipped without it. Not yet run on a GPU (README: what is not verified)."""

import json
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def train(data: Path, out: Path, engine: str, *sets: str) -> list[dict]:
    """Sixty steps of `tiny` in a process of its own; the records of its metrics."""
    import os
    import subprocess
    import sys

    from electra_ds.metrics import read_metrics

    options = ["train.total_steps=60", "logging.every=1", "train.eval_every=30", "optimizer.warmup_steps=10", *sets]
    command = [sys.executable, "-m", "electra_ds", "pretrain", "tiny", "--data", str(data), "--out", str(out)]
    command += ["--engine", engine, *(part for setting in options for part in ("--set", setting))]
    environ = os.environ | {"DS_ACCELERATOR": "cuda", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run(command, env=environ, check=True, timeout=600)
    return [record for record in read_metrics(out / "metrics.jsonl") if record["split"] == "train"]


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
@pytest.mark.parametrize("precision", ("fp32", "bf16", "fp16"))
def test_every_precision_learns_at_every_stage(data: Path, tmp_path: Path, stage: int, precision: str) -> None:
    records = train(data, tmp_path / "run", f"zero{stage}-{precision}")
    losses = [record["loss"] for record in records]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_loss_scale_that_overflows_skips_steps_and_recovers(data: Path, tmp_path: Path) -> None:
    engine = tmp_path / "fp16.json"
    scaler = {"enabled": True, "loss_scale": 0, "initial_scale_power": 40, "loss_scale_window": 100, "hysteresis": 1}
    engine.write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": scaler}))
    records = train(data, tmp_path / "run", str(engine), "train.max_skipped_steps=60")
    assert records[-1]["skipped_steps"] > 0 and records[-1]["step"] == 60


def test_fp32_on_cuda_trains_like_a_cpu(data: Path, tmp_path: Path) -> None:
    from conftest import run_cli

    from electra_ds.metrics import read_metrics

    ours = train(data, tmp_path / "run", "zero0-fp32")
    sets = ["train.total_steps=60", "logging.every=1", "train.eval_every=30", "optimizer.warmup_steps=10"]
    options = [part for setting in sets for part in ("--set", setting)]
    run_cli("pretrain", "tiny", "--data", data, "--out", tmp_path / "cpu", "--engine", "zero0-fp32", *options)
    theirs = [r for r in read_metrics(tmp_path / "cpu/metrics.jsonl") if r["split"] == "train"]
    assert [r["loss"] for r in ours[:20]] == pytest.approx([r["loss"] for r in theirs[:20]], rel=1e-3)


@pytest.mark.parametrize("engine", ("zero0-fp32", "zero0-bf16", "zero1-fp16", "zero3-bf16"))
def test_fine_tuning_learns_in_every_precision(tmp_path: Path, engine: str) -> None:
    import os
    import subprocess
    import sys

    import run_folders
    from test_finetune import write_tasks

    run_folders.pretrained(tmp_path / "model")
    tasks, config = write_tasks(tmp_path / "tasks"), tmp_path / "config.json"
    train = {"epochs": 4.0, "max_length": 24, "micro_batch_size": 8, "global_batch_size": 16}
    config.write_text(json.dumps({"train": train, "optimizer": {"peak_lr": 3e-3}, "engine": engine}))
    command = [sys.executable, "-m", "electra_ds", "finetune", tmp_path / "model", config]
    command += ["--tasks", tasks / "classes.json", "--out", tmp_path / "out"]
    environ = os.environ | {"DS_ACCELERATOR": "cuda", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run(list(map(str, command)), env=environ, check=True, timeout=600)
    result = json.loads((tmp_path / "out/classes/seed-0/result.json").read_text())
    assert result["scores"]["valid"]["accuracy"] > 0.9
