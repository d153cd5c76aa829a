"""Time and memory of the bare training step for each way to share embeddings.

    python bench/sharing.py                        small, modern-small and deberta-v3-small
    python bench/sharing.py small --rounds 9 --bf16

A step is forward, backward, clipping and AdamW on random full rows of 128 tokens, without DeepSpeed.
All cases of a preset run in one process and take turns, so that other work on the machine slows
them alike. The result is the CPU time relative to `shared`, as the median over the rounds, and the
peak of PyTorch's allocator in a step with weights, gradients and moments, relative to `shared`.
`frozen` is objective.generator = frozen with a generator of the same sizes.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from peers import Ours, measure_seconds, random_batch, run_config, train_step
from report import make_parser, median_and_range, print_heading, print_row, run_main

from electra_ds.common.json_files import write_json
from electra_ds.config.loading import parse_run
from electra_ds.config.schema import RunConfig

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from engine_memory import allocated

PRESETS = ("small", "modern-small", "deberta-v3-small")
LENGTH = 128
SHARINGS = {  # name -> model.sharing, objective.generator
    "shared": ("shared", "model"),
    "gdes": ("gdes", "model"),
    "untied": ("untied", "model"),
    "frozen": ("untied", "frozen"),
}


def config_of(preset: str, sharing: str, rows: int) -> RunConfig:
    """A preset without dropout that shares embeddings in one of the ways."""
    values = run_config(preset, LENGTH, rows, 0.0).model_dump(mode="json")
    values["model"]["sharing"], values["objective"]["generator"] = SHARINGS[sharing]
    return parse_run(values, preset)


def measure(preset: str, options: argparse.Namespace) -> list[dict]:
    """Print and return one record for each way."""
    contenders = {name: Ours(config_of(preset, name, options.rows)) for name in SHARINGS}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(options.rounds + 1):
        batch = random_batch(options.rows, LENGTH)
        for name in np.roll(list(contenders), turn):
            contender = contenders[name]
            seconds[name].append(measure_seconds(train_step, contender, batch, options.bf16)[0])
    records = []
    for name, contender in contenders.items():
        # The first round warms up.
        pairs = zip(seconds[name][1:], seconds["shared"][1:], strict=True)
        ratio, low, high = median_and_range([own / shared for own, shared in pairs])
        records.append(
            {
                "preset": preset,
                "sharing": name,
                "seconds": statistics.median(seconds[name][1:]),
                "ratio": ratio,
                "spread": (low, high),
                "bytes": peak_bytes(contender, options),
            }
        )
    for record in records:
        print_row(
            preset,
            record["sharing"],
            f"{record['seconds'] * 1000:.0f} ms",
            f"{record['ratio']:.2f} ({record['spread'][0]:.2f}-{record['spread'][1]:.2f})",
            f"{record['bytes'] / 1e6:.0f} MB",
            f"{record['bytes'] / records[0]['bytes']:.2f}",
        )
    return records


def peak_bytes(contender: Ours, options: argparse.Namespace) -> int:
    """Weights, moments of the trained ones, and the peak of a step, which has the gradients."""
    batch = random_batch(options.rows, LENGTH)
    _, peak = allocated(lambda: train_step(contender, batch, options.bf16))
    parameters = list(contender.module.parameters())
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    return sum(parameter.nbytes for parameter in parameters) + 2 * trained + peak


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("presets", nargs="*", help=f"presets (default: {', '.join(PRESETS)})")
    parser.add_argument("--rounds", type=int, default=5, help="rounds")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print_heading("preset", "sharing", "CPU time", "to shared", "peak memory", "to shared")
    records = [
        record for preset in options.presets or PRESETS for record in measure(preset, options)
    ]
    if options.json:
        write_json(options.json, records)


if __name__ == "__main__":
    run_main(main)
