"""Comparison of optimizers at equal tokens, each at several learning rates.

    python bench/optimizers.py --data D --out O --steps 6000
    python bench/optimizers.py --data D --out O --kinds adam,muon --rates adam=5e-4,1e-3,2e-3 \\
        --rates muon=1e-3,2e-3,4e-3 --set section.field=value

D: a data folder with rows of any length. All runs have the same model, rows, order, masked
positions, warmup and number of steps, and Adam's moments are bias-corrected; only optimizer.kind and
optimizer.peak_lr differ. A repeated call resumes.
O/optimizers.json and O/optimizers.md hold the results of every run: the held-out MLM loss, the
accuracy of the MLM head, the AUC on the fixed corruption and the minutes of training.
"""

import argparse
from pathlib import Path
from typing import Any

from report import make_parser, run_main
from runs import format_table, pretrain

from electra_ds.common.files import write_bytes
from electra_ds.common.json_files import write_json
from electra_ds.data.shard_format import read_manifest

RECIPE = (
    "model.num_layers=4",
    "model.ffn_size=512",
    "generator.num_layers=2",
    "generator.ffn_size=512",
    "model.init=fan_in",
    "model.embedding_init_std=0.2",
    "train.global_batch_size=16",
    "train.micro_batch_size=16",
    "optimizer.warmup_steps=300",
    "optimizer.beta2=0.98",
    "optimizer.bias_correction=true",
    "objective.mask_prob=0.15",
)
RATES = {
    "adam": (5e-4, 1e-3, 2e-3),
    "muon": (5e-4, 1e-3, 2e-3),  # its updates are as large as Adam's
    "stable_adamw": (5e-4, 1e-3, 2e-3),
    "lamb": (2e-3, 5e-3, 1e-2),  # relative to the norm of the weights
}


def measure(kind: str, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Pretrain one kind at one rate; returns the metrics at the end."""
    settings = [
        *RECIPE,
        f"data.sequence_length={read_manifest(options.data).sequence_length}",
        f"train.total_steps={options.steps}",
        f"train.seed={options.seed}",
        f"optimizer.kind={kind}",
        f"optimizer.peak_lr={rate}",
        *options.set,
    ]
    out = options.out / f"{kind}-{rate:g}"
    return pretrain(options.run, options.data, out, options.engine, settings)


def parse_rates(text: str) -> tuple[str, tuple[float, ...]]:
    """KIND=RATE,RATE,... as (kind, rates)."""
    kind, _, rates = text.partition("=")
    if kind not in RATES:
        raise argparse.ArgumentTypeError(f"{kind!r}: expected one of {', '.join(RATES)}")
    return kind, tuple(map(float, rates.split(",")))


def parse_kinds(text: str) -> list[str]:
    """KIND,KIND,... as a list."""
    kinds = text.split(",")
    if unknown := [kind for kind in kinds if kind not in RATES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected one of {', '.join(RATES)}")
    return kinds


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, has_json=False)
    parser.add_argument("--data", type=Path, required=True, help="data folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--steps", type=int, default=6000, help="steps of every run")
    parser.add_argument(
        "--kinds",
        type=parse_kinds,
        default=parse_kinds("adam,muon,stable_adamw"),
        help=f"optimizers, separated by commas: {', '.join(RATES)}",
    )
    parser.add_argument(
        "--rates",
        type=parse_rates,
        action="append",
        default=[],
        metavar="KIND=RATE,...",
        help="peak learning rates of a kind; repeatable",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of every run")
    parser.add_argument("--run", default="tiny", help="run config")
    parser.add_argument("--engine", default="zero0", help="engine file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of the verb pretrain, for every run; repeatable",
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    rates = RATES | dict(options.rates)
    results: dict[str, dict[str, Any]] = {}
    for kind in options.kinds:
        for rate in rates[kind]:
            results[f"{kind} {rate:g}"] = measure(kind, rate, options)
            write_json(options.out / "optimizers.json", results)
            table = format_table(results)
            write_bytes(options.out / "optimizers.md", (table + "\n").encode())
    print(table)


if __name__ == "__main__":
    run_main(main)
