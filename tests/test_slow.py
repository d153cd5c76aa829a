"""Minutes rather than seconds: bash tests/run.sh -m slow."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import CPU, ROOT, run_cli

from electra_ds.metrics import read_metrics

pytestmark = pytest.mark.slow
SETS = ["train.total_steps=20", "logging.every=1", "train.eval_every=0", "optimizer.warmup_steps=5"]


def curve(data: Path, out: Path, engine: str, *sets: str) -> list[float]:
    options = [part for setting in (*SETS, *sets) for part in ("--set", setting)]
    run_cli("pretrain", "tiny", "--data", data, "--out", out, "--engine", engine, *options)
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl") if record["split"] == "train"]


def test_the_quickstart_learns_and_resumes(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "launch/quickstart.sh"), "--out", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | CPU, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "resuming" in done.stdout and "What next" in done.stdout
    held_out = [record for record in read_metrics(tmp_path / "run/metrics.jsonl") if record["split"] == "valid"]
    assert held_out[-1]["mlm_loss"] < held_out[-1]["unigram_loss"] - 1.2
    assert held_out[-1]["fixed_auc"] > 0.55 and held_out[-1]["fixed_auc"] > held_out[0]["fixed_auc"]


def test_offloaded_adam_trains_like_the_fused_one(data: Path, tmp_path: Path) -> None:
    """DeepSpeed's own CPU Adam, without bias correction, against torch's, until rounding flips a sample."""
    engine = tmp_path / "offload.json"
    engine.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    ours, theirs = (curve(data, tmp_path / name, e) for name, e in (("a", "zero2-fp32"), ("b", str(engine))))
    assert ours[:10] == pytest.approx(theirs[:10], rel=1e-5) and ours == pytest.approx(theirs, rel=1e-2)


def test_compiled_layers_train_like_plain_ones(data: Path, tmp_path: Path) -> None:
    ours, theirs = (curve(data, tmp_path / str(c), "zero1-fp32", f"train.compile={c}") for c in ("true", "false"))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_recomputed_layers_give_the_same_bits(data: Path, tmp_path: Path) -> None:
    sets = ["model.hidden_dropout=0.1", "generator.hidden_dropout=0.1", "model.attention_dropout=0.1"]
    recomputed = curve(data, tmp_path / "a", "zero1-fp32", "train.activation_checkpointing=true", *sets)
    assert recomputed == curve(data, tmp_path / "b", "zero1-fp32", *sets)
