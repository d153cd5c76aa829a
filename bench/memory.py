"""How much memory does the bare training step take beside Hugging Face's classes?

    python bench/memory.py                    every case and contender
    python bench/memory.py small-bf16 --json memory.json

Each contender in a process of its own, one step to warm up and one that counts: forward, backward, clipping, AdamW on
random full rows, after the same small batch has given ours and HF the same loss. "allocated" is the most that PyTorch's
allocator holds at once in a step (by its profiler, in the second one), weights and moments included. "resident" is the
rise of VmHWM from before the model to the end of the first step: pages, so what glibc keeps, the kernels that oneDNN
and the compiler make, and the import of what is loaded late come on top. Who the contenders are: bench/peers.py.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from peers import HuggingFace, Ours, contenders_of, random_batch, run_config, step
from report import bench, parser_of

from electra_ds.common.files import write_json

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from engine_memory import allocated

CASES = {  # size, tokens a row, rows, bf16 autocast, recomputed layers
    "small-bf16": ("small", 128, 64, True, False),
    "small-fp32": ("small", 128, 64, False, False),
    "small-512-bf16": ("small", 512, 16, True, False),
    "small-512-bf16-recomputed": ("small", 512, 16, True, True),
    "base-bf16": ("base", 128, 16, True, False),
}
CONTENDERS = {
    "ours": lambda ours: ours,
    "HF": HuggingFace,
    "tuned HF": lambda ours: HuggingFace(ours, tuned=True),
}


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )
    return int(line.split()[1]) * 1024


def measure(case: str, name: str) -> dict[str, int]:
    """Bytes of one contender, in this process."""
    size, length, rows, bf16, recomputed = CASES[case]
    torch.manual_seed(0)
    before = status("VmRSS")
    contender = CONTENDERS[name](Ours(run_config(size, length, rows, 0.0)))
    if recomputed and name == "ours":
        contender.module.recompute_layers()
    elif recomputed:
        for part in contender.module.values():
            part.gradient_checkpointing_enable({"use_reentrant": False})
    batch = random_batch(rows, length)
    step(contender, batch, bf16)
    resident = status("VmHWM") - before
    _, during = allocated(lambda: step(contender, batch, bf16))
    states = 3 * sum(p.nbytes for p in contender.module.parameters())  # weights and two moments
    return {"allocated": states + during, "resident": resident, "states": states}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (default: all)"
    )
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"no case {sorted(unknown)[0]!r}; there are {', '.join(CASES)}")
    if options.contender:
        return print(json.dumps(measure(options.cases[0], options.contender)))
    print(
        "| case | contender | allocated MB | ours / it | resident MB | ours / it |\n|---|---|---|---|---|---|"
    )
    found = {}
    for case in options.cases or CASES:
        size, length, rows, *_ = CASES[case]
        contenders_of(run_config(size, length, rows, 0.0), ["HF"])  # stops where the losses differ
        for name in CONTENDERS:
            command = [sys.executable, __file__, case, "--contender", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            mine = found.setdefault(case, {})[name] = json.loads(done.stdout.splitlines()[-1])
            ours = found[case]["ours"]
            cells = (
                f"{mine[k] / 1e6:.0f} | {ours[k] / mine[k]:.2f}" for k in ("allocated", "resident")
            )
            print(f"| {case} (S{length} B{rows}) | {name} | {' | '.join(cells)} |", flush=True)
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    bench(main)
