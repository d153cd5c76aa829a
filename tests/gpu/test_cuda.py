"""What only CUDA can show; skipped without it. Not yet run on a GPU (README: what is not verified).

TEST_DEVICE=cpu runs what makes sense there, to try the tests themselves.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plain_attention import value_and_grads, written_out_attention

from electra_ds.model.kernels.attention import (
    PackedMask,
    attention,
    document_cu_seqlens,
    packed_mask,
)
from electra_ds.model.kernels.vocab_head import sample_tokens
from electra_ds.training import checkpoint
from electra_ds.training.metrics_file import TIMED, read_metrics
from electra_ds.training.precision import resolve_precision

ROOT = Path(__file__).resolve().parents[2]
DEVICE = os.environ.get("TEST_DEVICE", "cuda")
IS_CUDA = DEVICE == "cuda"
needs_cuda = pytest.mark.skipif(not IS_CUDA, reason="needs a CUDA device")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(IS_CUDA and not torch.cuda.is_available(), reason="needs CUDA"),
]
SETS = [
    "train.total_steps=60",
    "logging.every=1",
    "train.eval_every=30",
    "optimizer.warmup_steps=10",
]
DROPOUT = [
    f"{part}.{kind}_dropout=0.1"
    for part in ("model", "generator")
    for kind in ("hidden", "attention")
]


def call(*command: object, device: str = DEVICE, code: int = 0) -> None:
    environ = os.environ | {"DS_ACCELERATOR": device, "PYTHONPATH": str(ROOT)}
    environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if device == "cpu" else {}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-8000:]


def train(
    data: Path,
    out: Path,
    engine: str,
    *sets: str,
    device: str = DEVICE,
    stop: int | None = None,
    ranks: int = 1,
) -> list[dict]:
    """Sixty steps of `tiny` in processes of their own; what its metrics say of training, without times."""
    command = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    command += [
        "-m",
        "electra_ds",
        "pretrain",
        "tiny",
        "--data",
        data,
        "--out",
        out,
        "--engine",
        engine,
    ]
    command += [part for setting in (*SETS, *sets) for part in ("--set", setting)]
    call(
        *command, *(["--stop-at-step", stop] if stop else []), device=device, code=85 if stop else 0
    )
    records = [
        record for record in read_metrics(out / "metrics.jsonl") if record["split"] == "train"
    ]
    return [{key: value for key, value in record.items() if key not in TIMED} for record in records]


def losses(records: list[dict]) -> list[float]:
    return [record["loss"] for record in records]


def weights(out: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(out / "ckpt")
    meta = checkpoint.read_meta(found)
    return dict(checkpoint.tensors(found, meta)) | dict(checkpoint.tensors(found, meta, "optim"))


def is_bit_equal(ours: Path, theirs: Path) -> bool:
    a, b = weights(ours), weights(theirs)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ----------------------------------------------------------------------------------------------------------- kernels


def packed_rows(length: int = 96) -> torch.Tensor:
    """[4, S]: one piece, two, many of two tokens, and one with padding."""
    ids = torch.ones(4, length, dtype=torch.long)
    ids[1, 37:], ids[2], ids[3, 50:] = 2, torch.arange(length) // 2 + 1, 0
    return ids


def structure(kind: str, document_ids: torch.Tensor, dtype: torch.dtype) -> PackedMask:
    cu_seqlens = document_cu_seqlens(document_ids).to(DEVICE) if kind == "varlen" else None
    pieces = packed_mask(document_ids.to(DEVICE), dtype, cu_seqlens)
    if IS_CUDA and kind == "varlen" and torch.cuda.get_device_capability() >= (8, 0):
        assert len(cu_seqlens) == 5 or pieces.cu_seqlens is not None
    return pieces


@pytest.mark.parametrize(
    "rows", [packed_rows(), torch.ones(4, 96, dtype=torch.long)], ids=["packed", "full"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["varlen", "sdpa", "bmm"])
def test_every_backend_is_the_formula(kind: str, dtype: torch.dtype, rows: torch.Tensor) -> None:
    if kind == "varlen" and dtype == torch.float32:
        pytest.skip("flash attention is for half precision")
    qkv, pieces = (
        torch.randn(4, 96, 3 * 4 * 32, device=DEVICE, dtype=dtype),
        structure(kind, rows, dtype),
    )
    backend = "auto" if kind == "varlen" else kind
    ours = value_and_grads(lambda t: attention(t, 4, pieces, backend=backend), qkv)
    formula = lambda t: written_out_attention(t, 4, rows.to(DEVICE))  # noqa: E731
    for a, b in zip(ours, value_and_grads(formula, qkv.float()), strict=True):
        torch.testing.assert_close(
            a.float(), b, rtol=0.02, atol=1e-5 if dtype == torch.float32 else 0.02
        )


@pytest.mark.parametrize("kind", ["varlen", "sdpa"])
def test_attention_dropout_keeps_the_mean_and_follows_the_seed(kind: str) -> None:
    qkv = torch.randn(4, 96, 3 * 4 * 32, device=DEVICE, dtype=torch.bfloat16)
    pieces, drawn = structure(kind, packed_rows(), qkv.dtype), []
    for seed in (*range(300), 0):
        torch.manual_seed(seed)
        drawn.append(attention(qkv, 4, pieces, dropout=0.3).float())
    assert torch.equal(drawn[0], drawn[-1]) and not torch.equal(drawn[0], drawn[1])
    mean = torch.stack(drawn).mean(0)
    assert float((mean - attention(qkv, 4, pieces).float()).abs().mean()) < 0.03


def test_the_gradient_of_dropout_in_pieces_is_that_of_the_forward() -> None:
    """Values are the one linear input: <grad, v> equals <upstream, out> exactly but for rounding."""
    qkv = torch.randn(4, 96, 3 * 4 * 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    torch.manual_seed(3)
    out = attention(qkv, 4, structure("varlen", packed_rows(), qkv.dtype), dropout=0.3)
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, upstream)
    through = (grad[..., 256:].double() * qkv[..., 256:].double()).sum()
    torch.testing.assert_close(
        through, (upstream.double() * out.double()).sum(), rtol=0.02, atol=1.0
    )


def test_draws_are_those_of_a_cpu() -> None:
    logits, uniforms = torch.randn(64, 640), torch.rand(64)
    assert torch.equal(
        sample_tokens(logits.to(DEVICE), uniforms.to(DEVICE)).cpu(), sample_tokens(logits, uniforms)
    )


@needs_cuda
def test_batches_are_copied_from_pinned_memory(data: Path) -> None:
    from electra_ds.config.loading import load_run
    from electra_ds.data.dataset import open_data
    from electra_ds.data.loader import Loader
    from electra_ds.data.masking import masking_recipe

    config, source = load_run("tiny"), open_data(data)
    reader, order = source.training(0, 16)
    recipe, options = (
        masking_recipe(source.manifest, config.objective, 0),
        {"global_batch_size": 16, "micro_batch_size": 8},
    )
    pinned, plain = (
        Loader(reader, order, recipe, pin_memory=pin, **options) for pin in (True, False)
    )
    for _ in range(20):
        ours, theirs = next(pinned).micro_batches, next(plain).micro_batches
        assert all(tensor.is_pinned() for micro in ours for tensor in micro)
        on_device = [micro.map(lambda value: value.to(DEVICE, non_blocking=True)) for micro in ours]
        del ours
        for copied, kept in zip(on_device, theirs, strict=True):
            assert all(torch.equal(a.cpu(), b) for a, b in zip(copied[:8], kept[:8], strict=True))
            assert torch.equal(copied.cu_seqlens.cpu(), document_cu_seqlens(kept.document_ids))
    pinned.close(), plain.close()


# ---------------------------------------------------------------------------------------------------------- training


@needs_cuda
@pytest.mark.parametrize("stage", (0, 1, 2, 3))
@pytest.mark.parametrize("kind", ("fp32", "bf16", "fp16"))
def test_every_precision_learns_at_every_stage(
    data: Path, tmp_path: Path, stage: int, kind: str
) -> None:
    found = losses(train(data, tmp_path / "run", f"zero{stage}-{kind}"))
    assert sum(found[-5:]) < 0.9 * sum(found[:5])


@needs_cuda
def test_auto_is_bf16_where_the_device_has_it() -> None:
    has = torch.cuda.is_bf16_supported(including_emulation=False)
    assert resolve_precision({"bf16": {"enabled": "auto"}}, torch.device("cuda")) == {
        ("bf16" if has else "fp16"): {"enabled": True}
    }


@needs_cuda
def test_a_loss_scale_that_overflows_skips_steps_and_recovers(data: Path, tmp_path: Path) -> None:
    engine = tmp_path / "fp16.json"
    scaler = {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 40,
        "loss_scale_window": 100,
        "hysteresis": 1,
    }
    engine.write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": scaler}))
    records = train(data, tmp_path / "run", str(engine), "train.max_skipped_steps=60")
    assert records[-1]["skipped_steps"] > 0 and records[-1]["step"] == 60


@needs_cuda
def test_fp32_on_cuda_trains_like_a_cpu(data: Path, tmp_path: Path) -> None:
    ours = losses(train(data, tmp_path / "gpu", "zero0-fp32"))
    theirs = losses(train(data, tmp_path / "cpu", "zero0-fp32", device="cpu"))
    assert ours[:20] == pytest.approx(theirs[:20], rel=1e-3)


@pytest.mark.parametrize("option", ("train.compile=true", "train.activation_checkpointing=true"))
def test_compiled_and_recomputed_layers_train_like_plain_ones(
    data: Path, tmp_path: Path, option: str
) -> None:
    ours, theirs = (
        losses(train(data, tmp_path / name, "zero1-bf16", *sets))
        for name, *sets in (("a", option), ("b",))
    )
    assert ours[:10] == pytest.approx(theirs[:10], rel=1e-2)  # rounding flips a sample now and then


@pytest.mark.parametrize(
    "engine", ("zero1-bf16", "zero3-bf16", *(["zero1-fp16"] if IS_CUDA else []))
)
def test_a_deterministic_run_resumes_bit_for_bit(data: Path, tmp_path: Path, engine: str) -> None:
    sets = ["train.deterministic=true", *DROPOUT]
    whole = train(data, tmp_path / "whole", engine, *sets)
    train(data, tmp_path / "cut", engine, *sets, stop=20)
    assert train(data, tmp_path / "cut", engine, *sets) == whole
    assert is_bit_equal(tmp_path / "cut", tmp_path / "whole")


@needs_cuda
def test_a_deterministic_run_compiled_is_the_same_again(data: Path, tmp_path: Path) -> None:
    sets = ["train.deterministic=true", "train.compile=true", *DROPOUT]
    first, again = (train(data, tmp_path / name, "zero1-bf16", *sets) for name in "ab")
    assert first == again and is_bit_equal(tmp_path / "a", tmp_path / "b")


@needs_cuda
@pytest.mark.parametrize(("first", "then"), (("cpu", "cuda"), ("cuda", "cpu")))
def test_a_checkpoint_moves_between_cpu_and_gpu(
    data: Path, tmp_path: Path, first: str, then: str
) -> None:
    train(data, tmp_path / "run", "zero1-fp32", device=first, stop=20)
    on_progress = losses(train(data, tmp_path / "run", "zero2-fp32", device=then))
    stayed = losses(train(data, tmp_path / "stayed", "zero1-fp32", device="cpu"))
    assert len(on_progress) == 60 and on_progress[:30] == pytest.approx(stayed[:30], rel=1e-3)


@needs_cuda
@two_gpus
@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_two_gpus_train_like_one(data: Path, tmp_path: Path, stage: int) -> None:
    sets = ["train.global_batch_size=32", "train.micro_batch_size=16"]
    ours = losses(train(data, tmp_path / "two", f"zero{stage}-fp32", *sets, ranks=2))
    theirs = losses(train(data, tmp_path / "one", f"zero{stage}-fp32", *sets))
    assert ours[:20] == pytest.approx(theirs[:20], rel=1e-4)


@needs_cuda
def test_no_step_between_log_lines_waits_for_the_device(data: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    call(*launcher, ROOT / "tests/support/scenarios.py", "never-waits", data, tmp_path)


@pytest.mark.parametrize(
    "engine", ("zero0-fp32", *(("zero0-bf16", "zero1-fp16", "zero3-bf16") if IS_CUDA else ()))
)
def test_fine_tuning_learns_in_every_precision(tmp_path: Path, engine: str) -> None:
    import run_folders
    from small_tasks import write_tasks

    run_folders.pretrained(tmp_path / "model")
    tasks, config = write_tasks(tmp_path / "tasks"), tmp_path / "config.json"
    values = {"epochs": 4.0, "max_length": 24, "micro_batch_size": 8, "global_batch_size": 16}
    config.write_text(
        json.dumps({"train": values, "optimizer": {"peak_lr": 3e-3}, "engine": engine})
    )
    options = ["--tasks", tasks / "classes.json", "--out", tmp_path / "out"]
    call("-m", "electra_ds", "finetune", tmp_path / "model", config, *options)
    result = json.loads((tmp_path / "out/classes/seed-0/result.json").read_text())
    assert result["scores"]["valid"]["accuracy"] > 0.9


@needs_cuda
def test_the_bench_runs(tmp_path: Path) -> None:
    names = [
        f"tiny-128-{kind}-{plan}"
        for kind in ("bf16", "fp16")
        for plan in ("zero1", "zero1-packed", "zero2")
    ]
    call(
        ROOT / "bench/gpu.py",
        "--seconds",
        "0.2",
        "--json",
        tmp_path / "found.json",
        "--cases",
        *names,
    )
    found = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["case"] for row in found] == names and all(
        0 < row["share_of_peak"] < 1 for row in found
    )
