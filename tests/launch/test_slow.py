"""Slow tests of some minutes each: bash tests/run.sh -m slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import CPU, ROOT, run_cli

from electra_ds.model.losses import Totals
from electra_ds.training.metrics_file import read_metrics

pytestmark = pytest.mark.slow
SETS = ["train.total_steps=20", "logging.every=1", "train.eval_every=0", "optimizer.warmup_steps=5"]


def curve(data: Path, out: Path, engine: str, *sets: str, preset: str = "tiny") -> list[float]:
    options = [part for setting in (*SETS, *sets) for part in ("--set", setting)]
    run_cli("pretrain", preset, "--data", data, "--out", out, "--engine", engine, *options)
    return [
        record["loss"]
        for record in read_metrics(out / "metrics.jsonl")
        if record["split"] == "train"
    ]


def test_the_quickstart_learns_and_resumes(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "launch/quickstart.sh"), "--out", str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | CPU, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "resuming" in done.stdout and "Next steps" in done.stdout
    held_out = [
        record
        for record in read_metrics(tmp_path / "run/metrics.jsonl")
        if record["split"] == "valid"
    ]
    assert held_out[-1]["mlm_loss"] < held_out[-1]["unigram_loss"] - 1.2
    assert held_out[-1]["fixed_auc"] > 0.55 and held_out[-1]["fixed_auc"] > held_out[0]["fixed_auc"]


def test_offloaded_adam_trains_like_the_fused_one(data: Path, tmp_path: Path) -> None:
    """DeepSpeed's CPU Adam without bias correction against PyTorch's.

    The losses differ more once rounding changes a sampled token.
    """
    engine = tmp_path / "offload.json"
    engine.write_text(
        json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    )
    ours, theirs = (
        curve(data, tmp_path / name, e) for name, e in (("a", "zero2-fp32"), ("b", str(engine)))
    )
    assert ours[:10] == pytest.approx(theirs[:10], rel=1e-5) and ours == pytest.approx(
        theirs, rel=1e-2
    )


@pytest.mark.parametrize(
    ("preset", "sets"),
    [
        ("tiny", []),
        ("modern-tiny", ["data.sequence_length=32", "model.local_attention=16"]),
        ("deberta-tiny", ["data.sequence_length=32", "model.position_buckets=8"]),
    ],
)
def test_compiled_layers_train_like_plain_ones(
    data: Path, tmp_path: Path, preset: str, sets: list[str]
) -> None:
    ours, theirs = (
        curve(data, tmp_path / c, "zero1-fp32", f"train.compile={c}", *sets, preset=preset)
        for c in ("true", "false")
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_recomputed_layers_give_the_same_bits(data: Path, tmp_path: Path) -> None:
    sets = [
        "model.hidden_dropout=0.1",
        "generator.hidden_dropout=0.1",
        "model.attention_dropout=0.1",
    ]
    recomputed = curve(
        data, tmp_path / "a", "zero1-fp32", "train.activation_checkpointing=true", *sets
    )
    assert recomputed == curve(data, tmp_path / "b", "zero1-fp32", *sets)


@pytest.mark.parametrize(
    ("architecture", "graphs"),
    [
        # Two encoders x (packed or not) x (training or evaluation).
        ("electra", 8),
        # Both encoders have equal widths. The first layer has one LayerNorm less. In packed rows all
        # other layers have a mask of one shape; in full rows only the local ones have a mask.
        ("modernbert", 10),
        ("deberta_v2", 4),  # both encoders have equal widths
    ],
)
def test_each_layer_is_compiled_once_per_packing_and_mode(architecture: str, graphs: int) -> None:
    """There are no graph breaks, and other values in the same shapes compile nothing again."""
    import small_objective
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    module = small_objective.build(dropout=0.1, architecture=architecture)
    module.compile_layers()
    packed = small_objective.make_batch()
    full = packed._replace(document_ids=torch.ones_like(packed.document_ids))

    def pass_through() -> int:
        for batch in (packed, full):
            losses = module.train()(batch, Totals(12, 70))
            losses.total.backward()
            # The inductor of torch 2.13 produced NaN for bernoulli_ beside a bias.
            assert losses.total.isfinite()
            with torch.no_grad():
                module.eval()(batch, Totals(12, 70))
        return counters["stats"]["unique_graphs"]

    assert pass_through() == pass_through() == graphs
    assert not counters["graph_break"]


def bench(name: str, folder: Path, *options: str) -> dict | list:
    """Run bench/NAME.py; returns its JSON."""
    command = [sys.executable, ROOT / f"bench/{name}.py", "--json", folder / "found.json", *options]
    subprocess.run(command, env=os.environ | CPU, check=True, timeout=600)
    return json.loads((folder / "found.json").read_text())


def test_benches_run(tmp_path: Path) -> None:
    """Each bench compares the losses of all contenders."""
    pytest.importorskip("transformers", reason="needs the extra [bench]")
    against = {
        record["against"] for record in bench("step", tmp_path, "small-fp32", "--rounds", "1")
    }
    assert against >= {"HF", "GEMM ceiling"}
    (loop,) = bench("trainer", tmp_path, "zero1-fp32", "--rounds", "2", "--peers")
    assert loop["precision"] == "fp32" and {"HF", "tuned HF"} <= loop["peers"].keys()
    assert [
        row["stage"] for row in bench("scaling", tmp_path, "--rounds", "1", "--stages", "1")
    ] == [1]
    assert all(0 < row["efficiency"]["8"] <= 1 for row in bench("scaling", tmp_path, "--model"))


def test_the_gpu_bench_runs_on_a_cpu(tmp_path: Path) -> None:
    names = [
        f"tiny-32-fp32-{plan}" for plan in ("zero1-eager", "zero2-eager", "zero1-packed", "hf")
    ]
    found = bench("gpu", tmp_path, "--rows", "4", "--seconds", "0.1", "--cases", *names)
    assert [row["case"] for row in found["rows"]] == names and not found["left_out"]
    losses = [row["first_loss"] for row in found["rows"]]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2:] == pytest.approx(
        losses[:2], rel=0.2
    )
    assert all(0 < row["share_of_peak"] < 2 for row in found["rows"])
