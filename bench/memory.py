"""Peak memory of the bare training step compared with Hugging Face's classes.

    python bench/memory.py                    every case and contender
    python bench/memory.py small-bf16 --json memory.json

Each contender runs in its own process: one step warms up, one step is measured. A step is forward,
backward, clipping and AdamW on random full rows. Before that, ours and HF must give the same loss
on a small batch. The contenders are described in bench/peers.py.

allocated: the peak of PyTorch's allocator in the second step, from its profiler, with weights and
           moments.
resident:  the rise of VmHWM from before the model is built to the end of the first step. It counts
           pages, so it includes memory that glibc keeps, the kernels that oneDNN and the compiler
           make, and modules that are imported late.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from peers import (
    HuggingFace,
    Ours,
    make_contenders,
    random_batch,
    run_config,
    train_step,
)
from report import make_parser, print_heading, print_row, run_main

from electra_ds.common.json_files import write_json

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from engine_memory import allocated

CASES = {  # size, tokens per row, rows, bf16 autocast, recomputed layers, documents of each row
    "small-bf16": ("small", 128, 64, True, False, 1),
    "small-fp32": ("small", 128, 64, False, False, 1),
    "small-512-bf16": ("small", 512, 16, True, False, 1),
    "small-512-bf16-recomputed": ("small", 512, 16, True, True, 1),
    "base-bf16": ("base", 128, 16, True, False, 1),
    "modern-bf16": ("modern-small", 128, 32, True, False, 1),
    "modern-fp32": ("modern-small", 128, 32, False, False, 1),
    "modern-bf16-1024": ("modern-small", 1024, 4, True, False, 3),
    "modern-fp32-1024": ("modern-small", 1024, 4, False, False, 3),
}
CONTENDERS = {
    "ours": lambda ours: ours,
    "HF": HuggingFace,
    "tuned HF": lambda ours: HuggingFace(ours, tuned=True),
}


def status_bytes(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure(case: str, name: str) -> dict[str, int]:
    """Bytes of one contender, measured in this process."""
    size, length, rows, bf16, recomputed, documents = CASES[case]
    torch.manual_seed(0)
    resident_before = status_bytes("VmRSS")
    contender = CONTENDERS[name](Ours(run_config(size, length, rows, 0.0)))
    if recomputed and name == "ours":
        contender.module.recompute_layers()
    elif recomputed:
        for part in contender.module.values():
            part.gradient_checkpointing_enable({"use_reentrant": False})
    batch = random_batch(rows, length, documents)
    train_step(contender, batch, bf16)
    resident = status_bytes("VmHWM") - resident_before
    _, peak = allocated(lambda: train_step(contender, batch, bf16))
    weights = sum(parameter.nbytes for parameter in contender.module.parameters())
    states = 3 * weights  # weights and two moments
    return {"allocated": states + peak, "resident": resident, "states": states}


def measure_in_process(case: str, name: str) -> dict[str, int]:
    """`measure` in a new process."""
    command = [sys.executable, __file__, case, "--contender", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_case(case: str) -> dict[str, dict[str, int]]:
    """Measure and print every contender of a case. Contender -> bytes."""
    size, length, rows, *_ = CASES[case]
    make_contenders(run_config(size, length, rows, 0.0), ["HF"])  # stops if the losses differ
    results = {}
    for name in CONTENDERS:
        results[name] = measure_in_process(case, name)
        cells = []
        for kind in ("allocated", "resident"):
            size_bytes = results[name][kind]
            cells += [f"{size_bytes / 1e6:.0f}", f"{results['ours'][kind] / size_bytes:.2f}"]
        print_row(f"{case} (S{length} B{rows})", name, *cells)
    return results


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "cases",
        nargs="*",
        metavar="CASE",
        help=f"names of cases: {', '.join(CASES)} (default: all)",
    )
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"no case {sorted(unknown)[0]!r}; there are {', '.join(CASES)}")
    return options


def main() -> None:
    options = parse_arguments()
    if options.contender:
        print(json.dumps(measure(options.cases[0], options.contender)))
        return
    print_heading("case", "contender", "allocated MB", "ours / it", "resident MB", "ours / it")
    results = {case: measure_case(case) for case in options.cases or CASES}
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    run_main(main)
