"""How many tokens a second, and what share of the device's peak, does the whole engine reach on one GPU?

    python bench/gpu.py                                 every case, in under 8 minutes
    python bench/gpu.py --cases 'base-128-*' --json F   those that match
    python bench/gpu.py --list                          the names of the cases

A case is SIZE-LENGTH-PRECISION-PLAN: DeepSpeed at that stage with compiled layers (zero1), without (zero1-eager), with
two pieces in each row (zero1-packed), or Hugging Face's classes joined, compiled, under autocast, without DeepSpeed
(hf). The configs are the shipped ones, dropout too; rows are random and lie on the host, and each step copies its own.
Cases that no time is left for are named. Any such name may be given: DS_ACCELERATOR=cpu python bench/gpu.py --cases
tiny-32-fp32-zero1 --rows 4 tries the bench itself. The peak is the datasheet's (dense), else that of a large product.

Letters: B rows, S sequence.
"""

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
from peers import HuggingFace, Ours, check_losses, random_batch, run_config
from report import bench, heading, parser_of, row

from electra_ds.cluster.launchers import Ranks, find_ranks
from electra_ds.common.errors import UserError
from electra_ds.common.files import write_json
from electra_ds.config.engine_files import load_engine
from electra_ds.config.schema import RunConfig
from electra_ds.data.batch import Batch
from electra_ds.model.build import build_objective
from electra_ds.model.kernels.attention import document_cu_seqlens
from electra_ds.training.collectives import leave
from electra_ds.training.engine import Engine, start

# Dense bf16 or fp16 TFLOP/s by the vendor's datasheets; the first name that the device's holds.
PEAKS = {
    "B200": 2250,
    "H200": 989,
    "GH200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
}
PEAKS |= {"A10": 125, "RTX 4090": 165, "V100": 125, "T4": 65}
TOKENS = {
    "small": 65536,
    "base": 32768,
    "large": 16384,
}  # of a micro-batch where the device has 80 GB or more
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WARM_UP, LEAST_STEPS, DROPOUT = 3, 3, 0.1


class Case(NamedTuple):
    size: str
    length: int
    precision: str
    plan: str

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


def every_case() -> list[Case]:
    """What matters most comes first; those that share compiled layers stand together."""
    shapes = list(itertools.product(TOKENS, (128, 512)))
    found = [Case(*shape, precision, "zero1") for precision in ("bf16", "fp16") for shape in shapes]
    found += [
        Case(size, 128, "bf16", plan)
        for plan in ("zero1-eager", "zero1-packed", "hf")
        for size in TOKENS
    ]
    stages = itertools.product(("bf16", "fp16"), ("zero0", "zero2"), shapes)
    return found + [Case(*shape, precision, plan) for precision, plan, shape in stages]


def cases_of(word: str) -> list[Case]:
    """Those that a pattern matches, or the case of a full name, known or not."""
    found = [case for case in every_case() if fnmatch.fnmatch(case.name, word)]
    if not found and (
        parts := re.fullmatch(r"(.+)-(\d+)-(bf16|fp16|fp32)-(zero[0-3](-eager|-packed)?|hf)", word)
    ):
        found = [Case(parts[1], int(parts[2]), parts[3], parts[4])]
    if not found:
        raise UserError(
            f"no case is called {word}: --list names them, others are SIZE-LENGTH-PRECISION-PLAN"
        )
    return found


def two_pieces(batch: Batch) -> Batch:
    """The rows cut in two at a place of each row's own."""
    rows, length = batch.input_ids.shape
    cuts, places = torch.randint(8, length - 8, (rows, 1)), torch.arange(length)
    second = (places >= cuts).long()
    return batch._replace(document_ids=1 + second, position_ids=places - cuts * second)


def host_batches(config: RunConfig, packed: bool, pin: bool) -> list[Batch]:
    """Four micro-batches as the loader leaves them, the same for every case of a shape."""
    torch.manual_seed(0)
    drawn = [
        random_batch(config.train.micro_batch_size, config.data.sequence_length) for _ in range(4)
    ]
    drawn = [two_pieces(batch) if packed else batch for batch in drawn]
    drawn = [batch._replace(cu_seqlens=document_cu_seqlens(batch.document_ids)) for batch in drawn]
    return [batch.map(torch.Tensor.pin_memory) for batch in drawn] if pin else drawn


@functools.cache
def drawn(size: str) -> torch.nn.Module:
    """Our module with its weights, on the host; the same for every length."""
    return build_objective(run_config(size, 128, 1, DROPOUT), seed=0)


class WithEngine:
    """The whole engine, one micro-batch a step."""

    def __init__(self, case: Case, config: RunConfig, ranks: Ranks, device: torch.device):
        stage, _, variant = case.plan.partition("-")
        module = copy.deepcopy(drawn(case.size))
        if variant != "eager":
            module.compile_layers()
        self.engine = Engine(
            module, config, load_engine(f"{stage}-{case.precision}"), ranks, device
        )
        self.close, self.skipped = self.engine.close, 0

    def step(self, batch: Batch) -> torch.Tensor:
        counts = batch.masked_positions.numel(), batch.input_ids.numel()
        losses = self.engine.forward_backward([batch], [0], counts)
        self.skipped += not self.engine.step(1e-5).applied
        return losses[0].total


class WithHuggingFace:
    """The stock classes with our weights and, on a CPU, our losses; compiled, fused AdamW, autocast."""

    skipped = None  # the scaler tells nobody without a wait for the device

    def __init__(self, case: Case, config: RunConfig, ranks: Ranks, device: torch.device):
        self.device, self.dtype = device, DTYPES[case.precision]
        ours = Ours(config)
        self.theirs = HuggingFace(ours)
        check_losses({"ours": ours, "HF": self.theirs}, case.length)
        self.theirs.module.to(device)
        for part in self.theirs.module.values():
            for layer in part.electra.encoder.layer:
                layer.compile(dynamic=False)
        self.optimizer = torch.optim.AdamW(
            self.theirs.module.parameters(), lr=1e-5, eps=1e-6, fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def step(self, batch: Batch) -> torch.Tensor:
        batch = batch.map(lambda value: value.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.theirs.loss(batch)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.theirs.module.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def close(self) -> None:
        del self.theirs, self.optimizer


def measure(case: Case, rows: int, seconds: float, ranks: Ranks, device: torch.device) -> dict:
    """One row of the table."""
    began, on_gpu = time.perf_counter(), device.type == "cuda"
    config = run_config(case.size, case.length, rows, DROPOUT)
    batches = host_batches(config, case.plan.endswith("packed"), pin=on_gpu)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    contender = (WithHuggingFace if case.plan == "hf" else WithEngine)(case, config, ranks, device)

    def run(steps: int) -> tuple[float, torch.Tensor]:
        """(seconds a step, the first loss)"""
        started = time.perf_counter()
        losses = [contender.step(batches[index % len(batches)]) for index in range(steps)]
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps, losses[0]

    _, first_loss = run(WARM_UP)
    before = time.perf_counter() - began
    taken, _ = run(LEAST_STEPS)
    taken, _ = run(max(LEAST_STEPS, math.ceil(seconds / taken)))
    contender.close()
    return {
        "case": case.name,
        "rows": rows,
        "tokens_per_second": rows * case.length / taken,
        "share_of_peak": step_flops(config) / taken / peak(case.precision, device)[0],
        "step_ms": 1000 * taken,
        "skipped_steps": contender.skipped,
        "first_loss": float(first_loss),
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
        "seconds_before": before,
    }


def rows_of(case: Case, device: torch.device) -> int:
    memory = (
        torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 80e9
    )
    tokens = TOKENS.get(case.size, 4096) * min(1.0, memory / 80e9)
    return max(1, int(tokens) // case.length)


@functools.cache
def peak(precision: str, device: torch.device) -> tuple[float, str]:
    """(FLOP/s that the shares are of, where it is from)."""
    on_gpu, dtype = device.type == "cuda", DTYPES[precision]
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    known = next((value for key, value in PEAKS.items() if key in name), None)
    if known and dtype != torch.float32:
        return known * 1e12, f"{name} datasheet"
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


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--cases", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--rows", type=int, help="of a micro-batch (default: by size and memory)")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="for all cases; what does not fit is named"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="measured per case")
    parser.add_argument(
        "--list", action="store_true", help="print the names of the cases that match"
    )
    options = parser.parse_args()
    cases = dict.fromkeys(case for word in options.cases for case in cases_of(word))
    if options.list:
        return print("\n".join(case.name for case in cases))
    began, ranks = time.perf_counter(), find_ranks()
    device = start(ranks, timeout_minutes=2)
    heading(
        "case",
        "rows",
        "tokens/s",
        "share of peak",
        "ms a step",
        "skipped",
        "first loss",
        "GB",
        "seconds before",
    )
    found, longest, left_out = [], 0.0, []
    for case in cases:
        at = time.perf_counter()
        if at - began + longest > 60 * options.minutes:
            left_out.append(case.name)
            continue
        rows = options.rows or rows_of(case, device)
        try:
            found.append(measure(case, rows, options.seconds, ranks, device))
            cells = "{case}/{rows}/{tokens_per_second:,.0f}/{share_of_peak:.1%}/{step_ms:.1f}/{skipped_steps}/"
            cells += "{first_loss:.4f}/{memory_gb:.1f}/{seconds_before:.0f}"
            row(*cells.format(**found[-1]).split("/"))
        except torch.OutOfMemoryError:
            row(case.name, rows, "out of memory: give --rows", *[""] * 6)
        gc.collect()
        longest = max(longest, time.perf_counter() - at)
    leave()
    sources = sorted({peak(case.precision, device)[1] for case in cases})
    print(f"\nPeak: {'; '.join(sources)}. torch {torch.__version__}.")
    if left_out:
        print(f"No time was left for {', '.join(left_out)}.")
    if options.json:
        values = {"peak": sources, "torch": torch.__version__, "rows": found, "left_out": left_out}
        write_json(options.json, values)


if __name__ == "__main__":
    bench(main)
