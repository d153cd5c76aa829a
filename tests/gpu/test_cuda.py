"""Tests that need CUDA; without it they are skipped. They have not yet run on a GPU.

With TEST_DEVICE=cpu, the tests that can run on a CPU run there; this checks the tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plain_attention import value_and_grads, written_out_attention

from electra_ds.model.kernels.attention import attention
from electra_ds.model.kernels.attention_mask import (
    PackedMask,
    document_cu_seqlens,
    packed_mask,
    with_cu_seqlens,
)
from electra_ds.model.kernels.disentangled import disentangled_attention
from electra_ds.model.kernels.rotary import rotary_tables
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
    """Run python with these arguments on a device; the exit code must be `code`."""
    environment = os.environ | {"DS_ACCELERATOR": device, "PYTHONPATH": str(ROOT)}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
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
    preset: str = "tiny",
) -> list[dict]:
    """Train a preset for 60 steps in new processes; returns its training metrics without times.

    stop: the step at which the run saves and stops, with exit code 85.
    """
    command: list[object] = []
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", "electra_ds", "pretrain", preset, "--data", data, "--out", out]
    command += ["--engine", engine]
    for setting in (*SETS, *sets):
        command += ["--set", setting]
    if stop:
        command += ["--stop-at-step", stop]
    call(*command, device=device, code=85 if stop else 0)
    records = [
        record for record in read_metrics(out / "metrics.jsonl") if record["split"] == "train"
    ]
    return [{key: value for key, value in record.items() if key not in TIMED} for record in records]


def losses(records: list[dict]) -> list[float]:
    """The loss of each step."""
    return [record["loss"] for record in records]


def saved_tensors(out: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of the latest checkpoint of a run."""
    path = checkpoint.latest(out / "ckpt")
    meta = checkpoint.read_meta(path)
    weights = dict(checkpoint.tensors(path, meta))
    return weights | dict(checkpoint.tensors(path, meta, "optim"))


def is_bit_equal(run: Path, other: Path) -> bool:
    """Whether two runs saved the same weights and moments."""
    a = saved_tensors(run)
    b = saved_tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------ kernels


def packed_rows(length: int = 96) -> torch.Tensor:
    """document_ids [4, S] of rows with one document, two, many of two tokens, and with padding."""
    document_ids = torch.ones(4, length, dtype=torch.long)
    document_ids[1, 37:] = 2
    document_ids[2] = torch.arange(length) // 2 + 1
    document_ids[3, 50:] = 0
    return document_ids


def make_mask(
    kind: str, document_ids: torch.Tensor, dtype: torch.dtype, window: int | None = None
) -> PackedMask:
    """The attention structure on the device. kind: "varlen" passes cu_seqlens."""
    cu_seqlens = document_cu_seqlens(document_ids).to(DEVICE) if kind == "varlen" else None
    mask = packed_mask(document_ids.to(DEVICE), dtype, cu_seqlens, window=window)
    if IS_CUDA and kind == "varlen" and torch.cuda.get_device_capability() >= (8, 0):
        is_full = len(cu_seqlens) == 5 and window is None
        assert is_full or mask.cu_seqlens is not None
    return mask


@pytest.mark.parametrize(
    "rows", [packed_rows(), torch.ones(4, 96, dtype=torch.long)], ids=["packed", "full"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["varlen", "sdpa", "bmm"])
def test_every_backend_computes_the_formula(
    kind: str, dtype: torch.dtype, rows: torch.Tensor
) -> None:
    if kind == "varlen" and dtype == torch.float32:
        pytest.skip("flash attention is for half precision")
    qkv = torch.randn(4, 96, 3 * 4 * 32, device=DEVICE, dtype=dtype)
    mask = make_mask(kind, rows, dtype)
    backend = "auto" if kind == "varlen" else kind

    def formula(qkv: torch.Tensor) -> torch.Tensor:
        return written_out_attention(qkv, 4, rows.to(DEVICE))

    results = value_and_grads(lambda t: attention(t, 4, mask, backend=backend), qkv)
    expected = value_and_grads(formula, qkv.float())
    atol = 1e-5 if dtype == torch.float32 else 0.02
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=atol)


@pytest.mark.parametrize("window", [1, 8, 64, None])
@pytest.mark.parametrize(
    "rows", [packed_rows(), torch.ones(4, 96, dtype=torch.long)], ids=["packed", "full"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["varlen", "sdpa", "bmm"])
def test_every_backend_computes_the_formula_with_a_window_and_rotary_positions(
    kind: str, dtype: torch.dtype, rows: torch.Tensor, window: int | None
) -> None:
    if kind == "varlen" and dtype == torch.float32:
        pytest.skip("flash attention is for half precision")
    qkv = torch.randn(4, 96, 3 * 4 * 32, device=DEVICE, dtype=dtype)
    position_ids = torch.arange(96, device=DEVICE).expand(4, -1)
    rotary = rotary_tables(position_ids, 32, 500.0)
    mask = make_mask(kind, rows, dtype, window)
    backend = "auto" if kind == "varlen" else kind

    def formula(qkv: torch.Tensor) -> torch.Tensor:
        return written_out_attention(qkv, 4, rows.to(DEVICE), window, (position_ids, 500.0))

    results = value_and_grads(lambda t: attention(t, 4, mask, backend=backend, rotary=rotary), qkv)
    atol = 1e-4 if dtype == torch.float32 else 0.03
    for a, b in zip(results, value_and_grads(formula, qkv.float()), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=atol)


@pytest.mark.parametrize("kind", ["varlen", "sdpa"])
def test_attention_dropout_keeps_the_mean_and_depends_on_the_seed(kind: str) -> None:
    qkv = torch.randn(4, 96, 3 * 4 * 32, device=DEVICE, dtype=torch.bfloat16)
    mask = make_mask(kind, packed_rows(), qkv.dtype)
    outputs = []
    for seed in (*range(300), 0):
        torch.manual_seed(seed)
        outputs.append(attention(qkv, 4, mask, dropout=0.3).float())
    assert torch.equal(outputs[0], outputs[-1]) and not torch.equal(outputs[0], outputs[1])
    mean = torch.stack(outputs).mean(0)
    assert float((mean - attention(qkv, 4, mask).float()).abs().mean()) < 0.03


def test_backward_of_packed_attention_uses_the_dropout_of_the_forward() -> None:
    """The output is linear in the values, so <grad, values> is <upstream, out> up to rounding."""
    qkv = torch.randn(4, 96, 3 * 4 * 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    torch.manual_seed(3)
    out = attention(qkv, 4, make_mask("varlen", packed_rows(), qkv.dtype), dropout=0.3)
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, upstream)
    at_values = (grad[..., 256:].double() * qkv[..., 256:].double()).sum()
    at_output = (upstream.double() * out.double()).sum()
    torch.testing.assert_close(at_values, at_output, rtol=0.02, atol=1.0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["bmm", "disentangled"])
def test_attention_under_autocast_has_the_gradients_of_bf16(name: str, dropout: float) -> None:
    """Autocast on CUDA computes softmax in fp32, but not in our functions."""
    qkv = torch.randn(2, 70, 3 * 4 * 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.randn(139, 2 * 4 * 32, device=DEVICE, dtype=torch.bfloat16)
    results = []
    for enabled in (True, False):
        torch.manual_seed(0)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            if name == "bmm":
                out = attention(qkv, 4, dropout=dropout, backend="bmm")
            else:
                out = disentangled_attention(qkv, positions, 4, dropout=dropout)
        results.append((out, *torch.autograd.grad(out.float().sum(), qkv)))
    for with_autocast, without in zip(*results, strict=True):
        assert with_autocast.dtype == torch.bfloat16 and torch.equal(with_autocast, without)


def test_sampled_tokens_equal_those_on_a_cpu() -> None:
    logits = torch.randn(64, 640)
    uniforms = torch.rand(64)
    sampled = sample_tokens(logits.to(DEVICE), uniforms.to(DEVICE))
    assert torch.equal(sampled.cpu(), sample_tokens(logits, uniforms))


@needs_cuda
def test_batches_are_copied_from_pinned_memory(data: Path) -> None:
    from electra_ds.config.loading import load_run
    from electra_ds.data.dataset import open_data
    from electra_ds.data.loader import Loader
    from electra_ds.data.masking import masking_recipe

    source = open_data(data)
    recipe = masking_recipe(source.manifest, load_run("tiny").objective, 0)
    reader, order = source.training(0, 16)
    sizes = {"global_batch_size": 16, "micro_batch_size": 8}

    pinned = Loader(reader, order, recipe, pin_memory=True, transform=with_cu_seqlens, **sizes)
    plain = Loader(reader, order, recipe, pin_memory=False, **sizes)
    for _ in range(20):
        pinned_batches = next(pinned).micro_batches
        assert all(tensor.is_pinned() for batch in pinned_batches for tensor in batch)
        copies = [
            batch.map(lambda tensor: tensor.to(DEVICE, non_blocking=True))
            for batch in pinned_batches
        ]
        del pinned_batches
        for copy, batch in zip(copies, next(plain).micro_batches, strict=True):
            assert all(torch.equal(a.cpu(), b) for a, b in zip(copy[:8], batch[:8], strict=True))
            assert torch.equal(copy.cu_seqlens.cpu(), document_cu_seqlens(batch.document_ids))
    pinned.close()
    plain.close()


# ----------------------------------------------------------------------------------- training

MODERN = ["model.local_attention=16"]  # a window smaller than a row of 32 tokens
DEBERTA = ["model.position_buckets=8"]  # fewer buckets than distances in a row of 32 tokens
OTHERS = pytest.mark.parametrize(
    ("preset", "sizes"), [("modern-tiny", MODERN), ("deberta-tiny", DEBERTA)]
)


@needs_cuda
@OTHERS
@pytest.mark.parametrize(
    "engine", ("zero0-fp32", "zero1-autocast", "zero1-bf16", "zero1-fp16", "zero3-bf16")
)
def test_other_architectures_learn_in_every_precision(
    data: Path, tmp_path: Path, engine: str, preset: str, sizes: list[str]
) -> None:
    curve = losses(train(data, tmp_path / "run", engine, *sizes, preset=preset))
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])


@needs_cuda
@OTHERS
def test_other_architectures_in_fp32_on_cuda_train_like_a_cpu(
    data: Path, tmp_path: Path, preset: str, sizes: list[str]
) -> None:
    on_gpu, on_cpu = (
        losses(train(data, tmp_path / kind, "zero0-fp32", *sizes, device=kind, preset=preset))
        for kind in ("cuda", "cpu")
    )
    assert on_gpu[:20] == pytest.approx(on_cpu[:20], rel=1e-3)


@OTHERS
@pytest.mark.parametrize("option", ("train.compile=true", "train.activation_checkpointing=true"))
def test_compiled_and_recomputed_layers_of_other_architectures_train_like_plain_ones(
    data: Path, tmp_path: Path, option: str, preset: str, sizes: list[str]
) -> None:
    with_option, plain = (
        losses(train(data, tmp_path / name, "zero1-bf16", *sizes, *sets, preset=preset))
        for name, sets in (("option", [option]), ("plain", []))
    )
    # Rounding changes a sampled token now and then.
    assert with_option[:10] == pytest.approx(plain[:10], rel=3e-2)


@OTHERS
def test_a_deterministic_run_of_other_architectures_resumes_bit_for_bit(
    data: Path, tmp_path: Path, preset: str, sizes: list[str]
) -> None:
    from electra_ds.config.loading import load_run

    sets = ["train.deterministic=true", *sizes]
    sets += [f"model.{name}=0.1" for name in load_run(preset).model.dropout_fields()]
    options = {"preset": preset}
    records = train(data, tmp_path / "uninterrupted", "zero1-bf16", *sets, **options)
    train(data, tmp_path / "resumed", "zero1-bf16", *sets, stop=20, **options)
    assert train(data, tmp_path / "resumed", "zero1-bf16", *sets, **options) == records
    assert is_bit_equal(tmp_path / "resumed", tmp_path / "uninterrupted")


@needs_cuda
@pytest.mark.parametrize("stage", (0, 1, 2, 3))
@pytest.mark.parametrize("kind", ("fp32", "autocast", "bf16", "fp16"))
def test_every_precision_learns_at_every_stage(
    data: Path, tmp_path: Path, stage: int, kind: str
) -> None:
    curve = losses(train(data, tmp_path / "run", f"zero{stage}-{kind}"))
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])


@needs_cuda
def test_auto_is_bf16_if_the_device_has_it() -> None:
    kind = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    resolved = resolve_precision({"bf16": {"enabled": "auto"}}, torch.device("cuda"))
    assert resolved == {kind: {"enabled": True}}


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
    on_gpu = losses(train(data, tmp_path / "gpu", "zero0-fp32"))
    on_cpu = losses(train(data, tmp_path / "cpu", "zero0-fp32", device="cpu"))
    assert on_gpu[:20] == pytest.approx(on_cpu[:20], rel=1e-3)


@pytest.mark.parametrize("option", ("train.compile=true", "train.activation_checkpointing=true"))
def test_compiled_and_recomputed_layers_train_like_plain_ones(
    data: Path, tmp_path: Path, option: str
) -> None:
    with_option = losses(train(data, tmp_path / "option", "zero1-bf16", option))
    plain = losses(train(data, tmp_path / "plain", "zero1-bf16"))
    # Rounding changes a sampled token now and then.
    assert with_option[:10] == pytest.approx(plain[:10], rel=1e-2)


@pytest.mark.parametrize(
    "engine", ("zero1-bf16", "zero3-bf16", *(["zero1-fp16"] if IS_CUDA else []))
)
def test_a_deterministic_run_resumes_bit_for_bit(data: Path, tmp_path: Path, engine: str) -> None:
    sets = ["train.deterministic=true", *DROPOUT]
    records = train(data, tmp_path / "uninterrupted", engine, *sets)
    train(data, tmp_path / "resumed", engine, *sets, stop=20)
    assert train(data, tmp_path / "resumed", engine, *sets) == records
    assert is_bit_equal(tmp_path / "resumed", tmp_path / "uninterrupted")


@needs_cuda
def test_a_deterministic_compiled_run_repeats_bit_for_bit(data: Path, tmp_path: Path) -> None:
    sets = ["train.deterministic=true", "train.compile=true", *DROPOUT]
    records = train(data, tmp_path / "first", "zero1-bf16", *sets)
    assert train(data, tmp_path / "second", "zero1-bf16", *sets) == records
    assert is_bit_equal(tmp_path / "first", tmp_path / "second")


@needs_cuda
@pytest.mark.parametrize(("first", "second"), (("cpu", "cuda"), ("cuda", "cpu")))
def test_a_run_resumes_on_another_kind_of_device(
    data: Path, tmp_path: Path, first: str, second: str
) -> None:
    train(data, tmp_path / "moved", "zero1-fp32", device=first, stop=20)
    moved = losses(train(data, tmp_path / "moved", "zero2-fp32", device=second))
    on_cpu = losses(train(data, tmp_path / "cpu", "zero1-fp32", device="cpu"))
    assert len(moved) == 60
    assert moved[:30] == pytest.approx(on_cpu[:30], rel=1e-3)


@needs_cuda
@two_gpus
@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_two_gpus_train_like_one(data: Path, tmp_path: Path, stage: int) -> None:
    sets = ["train.global_batch_size=32", "train.micro_batch_size=16"]
    two = losses(train(data, tmp_path / "two", f"zero{stage}-fp32", *sets, ranks=2))
    one = losses(train(data, tmp_path / "one", f"zero{stage}-fp32", *sets))
    assert two[:20] == pytest.approx(one[:20], rel=1e-4)


@needs_cuda
def test_no_step_between_log_lines_waits_for_the_device(data: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    call(*launcher, ROOT / "tests/support/scenarios.py", data, tmp_path, "never-waits")


@pytest.mark.parametrize(
    "engine", ("zero0-fp32", *(("zero0-bf16", "zero1-fp16", "zero3-bf16") if IS_CUDA else ()))
)
def test_fine_tuning_learns_in_every_precision(tmp_path: Path, engine: str) -> None:
    import run_folders
    from small_tasks import write_tasks

    run_folders.pretrained(tmp_path / "model")
    tasks = write_tasks(tmp_path / "tasks")
    train_values = {"epochs": 4.0, "max_length": 24, "micro_batch_size": 8, "global_batch_size": 16}
    values = {"train": train_values, "optimizer": {"peak_lr": 3e-3}, "engine": engine}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(values))
    options = ["--tasks", tasks / "classes.json", "--out", tmp_path / "out"]
    call("-m", "electra_ds", "finetune", tmp_path / "model", config, *options)
    result = json.loads((tmp_path / "out/classes/seed-0/result.json").read_text())
    assert result["scores"]["valid"]["accuracy"] > 0.9


@needs_cuda
def test_bench_gpu_measures_every_case_that_is_named(tmp_path: Path) -> None:
    names = [
        f"tiny-128-{kind}-{plan}"
        for kind in ("bf16", "fp16")
        for plan in ("zero1", "zero1-packed", "zero2")
    ]
    results = tmp_path / "results.json"
    call(ROOT / "bench/gpu.py", "--seconds", "0.2", "--json", results, "--cases", *names)
    records = json.loads(results.read_text())["rows"]
    assert [record["case"] for record in records] == names
    assert all(0 < record["share_of_peak"] < 1 for record in records)
