"""Tokens per second and the share of the device's peak that the whole engine reaches on one GPU.

    python bench/gpu.py                                 every case, in under 8 minutes
    python bench/gpu.py --cases 'base-128-*' --json F   the cases that match
    python bench/gpu.py --list                          the names of the cases

A case is SIZE-LENGTH-PRECISION-PLAN. The plans:

    zero1          DeepSpeed at ZeRO stage 1 with compiled layers; also zero0, zero2, zero3
    zero1-eager    the same without compiled layers
    zero1-packed   the same with two documents in each row
    hf             Hugging Face's classes, joined, compiled, under autocast, without DeepSpeed

SIZE is a preset; the goal for modern-base at 1,024 and 8,192 tokens is 35 % of the peak of one H200
(ModernBERT's own pretraining: 26 and 33 %).

The configs are the shipped ones, with their dropout. Rows are random and stay in host memory; each step
copies its rows to the device. Cases for which no time is left are named at the end. --cases takes
any name of this form, also one that --list does not print. To try the bench on a CPU:

    DS_ACCELERATOR=cpu python bench/gpu.py --cases tiny-32-fp32-zero1 --rows 4

The peak is the dense one of the datasheet, or the measured rate of a large matrix product.
"""

import argparse
import copy
import fnmatch
import functools
import gc
import itertools
import math
import re
import time
from typing import NamedTuple

import torch
from cost import step_flops
from peers import (
    HuggingFace,
    Ours,
    batch_totals,
    check_losses,
    layers_of,
    random_batch,
    run_config,
)
from report import make_parser, print_heading, print_row, run_main

from electra_ds.cluster.launchers import Ranks, find_ranks
from electra_ds.common.errors import UserError
from electra_ds.common.json_files import write_json
from electra_ds.config.engine_files import load_engine
from electra_ds.config.schema import RunConfig
from electra_ds.data.batch import Batch
from electra_ds.model.build import build_objective
from electra_ds.training.collectives import destroy_process_groups
from electra_ds.training.engine import Engine, start

# Part of a device name -> dense bf16 or fp16 TFLOP/s of the datasheet. The first match is used.
PEAKS = {
    "B200": 2250,
    "H200": 989,
    "GH200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "RTX 4090": 165,
    "V100": 125,
    "T4": 65,
}
FULL_MEMORY = 80e9  # bytes
# Tokens of a micro-batch on a device with FULL_MEMORY or more.
MICRO_TOKENS = {"small": 65536, "base": 32768, "large": 16384}
MODERN_TOKENS = {"modern-base": 32768}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CASE_PATTERN = r"(.+)-(\d+)-(bf16|fp16|fp32)-(zero[0-3](-eager|-packed)?|hf)"
WARM_UP_STEPS = 3
MIN_STEPS = 3


class Case(NamedTuple):
    size: str
    length: int
    precision: str
    plan: str

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


def all_cases() -> list[Case]:
    """The listed cases, the most important first; compiled layers are shared by neighbours."""
    shapes = list(itertools.product(MICRO_TOKENS, (128, 512)))
    cases = [
        Case("modern-base", length, "bf16", plan)
        for length in (1024, 8192)
        for plan in ("zero1", "zero1-packed")
    ]
    for precision in ("bf16", "fp16"):
        cases += [Case(*shape, precision, "zero1") for shape in shapes]
    for plan in ("zero1-eager", "zero1-packed", "hf"):
        cases += [Case(size, 128, "bf16", plan) for size in MICRO_TOKENS]
    for precision, plan in itertools.product(("bf16", "fp16"), ("zero0", "zero2")):
        cases += [Case(*shape, precision, plan) for shape in shapes]
    return cases


def matching_cases(pattern: str) -> list[Case]:
    """The listed cases that match, or the case of a full name. UserError if there is none."""
    cases = [case for case in all_cases() if fnmatch.fnmatch(case.name, pattern)]
    if cases:
        return cases
    parts = re.fullmatch(CASE_PATTERN, pattern)
    if parts is None:
        raise UserError(
            f"no case has the name {pattern}: --list prints the names; "
            "others are SIZE-LENGTH-PRECISION-PLAN"
        )
    return [Case(parts[1], int(parts[2]), parts[3], parts[4])]


# ------------------------------------------------------------------------------------- batches


def host_batches(config: RunConfig, packed: bool, pin: bool) -> list[Batch]:
    """Four micro-batches as the loader returns them, equal for all cases of one shape."""
    torch.manual_seed(0)
    rows = config.train.micro_batch_size
    documents = 2 if packed else 1
    batches = [random_batch(rows, config.data.sequence_length, documents) for _ in range(4)]
    return [batch.map(torch.Tensor.pin_memory) for batch in batches] if pin else batches


# ---------------------------------------------------------------------------------- contenders


@functools.cache
def initial_module(size: str) -> torch.nn.Module:
    """The objective with its initial weights, on the host; they do not depend on the length."""
    return build_objective(run_config(size, 128, 1, None), seed=0)


class WithEngine:
    """The whole engine, with one micro-batch per step."""

    def __init__(self, case: Case, config: RunConfig, ranks: Ranks, device: torch.device):
        stage, _, variant = case.plan.partition("-")
        module = copy.deepcopy(initial_module(case.size))
        if variant != "eager":
            module.compile_layers()
        engine_config = load_engine(f"{stage}-{case.precision}")
        self.engine = Engine(module, config, engine_config, ranks, device)
        self.skipped_steps = 0

    def step(self, batch: Batch) -> torch.Tensor:
        losses = self.engine.forward_backward([batch], [0], batch_totals(batch))
        self.skipped_steps += not self.engine.step(1e-5).applied
        return losses[0].total

    def close(self) -> None:
        self.engine.close()


class WithHuggingFace:
    """The stock classes with the weights of electra_ds: compiled layers, fused AdamW, autocast.

    Their loss is first compared with that of electra_ds on a CPU.
    """

    skipped_steps = None  # reading them from the scaler would wait for the device

    def __init__(self, case: Case, config: RunConfig, ranks: Ranks, device: torch.device):
        self.device = device
        self.dtype = DTYPES[case.precision]
        ours = Ours(config)
        self.peer = HuggingFace(ours)
        check_losses({"ours": ours, "HF": self.peer}, random_batch(2, case.length))
        self.peer.module.to(device)
        for part in self.peer.module.values():
            for layer in layers_of(part):
                layer.compile(dynamic=False)
        self.optimizer = torch.optim.AdamW(
            self.peer.module.parameters(), lr=1e-5, eps=1e-6, fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def step(self, batch: Batch) -> torch.Tensor:
        batch = batch.map(lambda tensor: tensor.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.peer.loss(batch)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.peer.module.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def close(self) -> None:
        del self.peer, self.optimizer


# --------------------------------------------------------------------------------- measurement


def measure(case: Case, rows: int, seconds: float, ranks: Ranks, device: torch.device) -> dict:
    """Measure one case for about `seconds` seconds; returns a row of the table."""
    began = time.perf_counter()
    on_gpu = device.type == "cuda"
    config = run_config(case.size, case.length, rows, None)
    is_packed = case.plan.endswith("packed")
    batches = host_batches(config, is_packed, pin=on_gpu)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    make_contender = WithHuggingFace if case.plan == "hf" else WithEngine
    contender = make_contender(case, config, ranks, device)

    def run(steps: int) -> tuple[float, torch.Tensor]:
        """(seconds per step, loss of the first step)"""
        started = time.perf_counter()
        losses = [contender.step(batches[index % len(batches)]) for index in range(steps)]
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps, losses[0]

    _, first_loss = run(WARM_UP_STEPS)
    setup_seconds = time.perf_counter() - began
    estimate, _ = run(MIN_STEPS)
    step_seconds, _ = run(max(MIN_STEPS, math.ceil(seconds / estimate)))
    contender.close()
    peak_rate, _ = device_peak(case.precision, device)
    return {
        "case": case.name,
        "rows": rows,
        "tokens_per_second": rows * case.length / step_seconds,
        # step_flops counts rows of one document, which need more products than packed ones.
        "share_of_peak": None if is_packed else step_flops(config) / step_seconds / peak_rate,
        "step_ms": 1000 * step_seconds,
        "skipped_steps": contender.skipped_steps,
        "first_loss": float(first_loss),
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
        "seconds_before": setup_seconds,
    }


def default_rows(case: Case, device: torch.device) -> int:
    """Rows of a micro-batch by the size of the model and the memory of the device."""
    memory = FULL_MEMORY
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    tokens = (MICRO_TOKENS | MODERN_TOKENS).get(case.size, 4096) * min(1.0, memory / FULL_MEMORY)
    return max(1, int(tokens) // case.length)


@functools.cache
def device_peak(precision: str, device: torch.device) -> tuple[float, str]:
    """(peak FLOP/s, to which the reported shares refer; source of this number)."""
    on_gpu = device.type == "cuda"
    dtype = DTYPES[precision]
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    datasheet = next((peak for part, peak in PEAKS.items() if part in name), None)
    if datasheet and dtype != torch.float32:
        return datasheet * 1e12, f"{name} datasheet"
    size = 8192 if on_gpu else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times), f"{name}, measured product of {size}"


def print_record(record: dict) -> None:
    print_row(
        record["case"],
        record["rows"],
        f"{record['tokens_per_second']:,.0f}",
        "" if record["share_of_peak"] is None else f"{record['share_of_peak']:.1%}",
        f"{record['step_ms']:.1f}",
        record["skipped_steps"],
        f"{record['first_loss']:.4f}",
        f"{record['memory_gb']:.1f}",
        f"{record['seconds_before']:.0f}",
    )


def measure_cases(
    cases: list[Case], options: argparse.Namespace, ranks: Ranks, device: torch.device
) -> tuple[list[dict], list[str]]:
    """Measure and print cases until the time is over: (records, names of cases left out)."""
    began = time.perf_counter()
    print_heading(
        "case",
        "rows",
        "tokens/s",
        "share of peak",
        "ms per step",
        "skipped steps",
        "first loss",
        "GB",
        "set-up seconds",
    )
    records: list[dict] = []
    left_out: list[str] = []
    longest = 0.0
    for case in cases:
        case_began = time.perf_counter()
        if case_began - began + longest > 60 * options.minutes:
            left_out.append(case.name)
            continue
        rows = options.rows or default_rows(case, device)
        try:
            records.append(measure(case, rows, options.seconds, ranks, device))
            print_record(records[-1])
        except torch.OutOfMemoryError:
            print_row(case.name, rows, "out of memory: give a smaller --rows", *[""] * 6)
        gc.collect()
        longest = max(longest, time.perf_counter() - case_began)
    return records, left_out


# ---------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument(
        "--rows", type=int, help="rows of a micro-batch (default: by model size and memory)"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="for all cases; those left out are named"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of measurement per case")
    parser.add_argument(
        "--list", action="store_true", help="print the names of the cases that match"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    matches = (case for pattern in options.cases for case in matching_cases(pattern))
    cases = list(dict.fromkeys(matches))
    if options.list:
        print("\n".join(case.name for case in cases))
        return
    ranks = find_ranks()
    device = start(ranks, timeout_minutes=2)
    records, left_out = measure_cases(cases, options, ranks, device)
    destroy_process_groups()
    sources = sorted({device_peak(case.precision, device)[1] for case in cases})
    print(f"\nPeak: {'; '.join(sources)}. torch {torch.__version__}.")
    if left_out:
        print(f"No time was left for {', '.join(left_out)}.")
    if options.json:
        results = {
            "peak": sources,
            "torch": torch.__version__,
            "rows": records,
            "left_out": left_out,
        }
        write_json(options.json, results)


if __name__ == "__main__":
    run_main(main)
