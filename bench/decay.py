"""Comparison of a stable run with branches that decay, and of linear runs of the same lengths.

    python bench/decay.py --data D --out O --lengths 6000,10000
    python bench/decay.py --data D --out O --share 0.2 --set section.field=value

One run has a constant learning rate after its warmup. For each of --lengths a branch of it
(`--branch-from`) decays over the last --share of that length to zero, as 1 - sqrt. A run of the
same length with the linear schedule is compared with it. Model, data, order, masked positions,
warmup and peak rate are equal. The stable run is trained once, so the branches share its steps.
A repeated call resumes. O/decay.json and O/decay.md hold the results, O/decay.png the curves.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from report import make_parser, run_main
from runs import call, format_table, pretrain

from electra_ds.common.files import write_bytes
from electra_ds.common.json_files import write_json


def parse_lengths(text: str) -> list[int]:
    """STEPS,STEPS,... as ascending integers."""
    return sorted(int(part) for part in text.split(","))


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, has_json=False)
    parser.add_argument("--data", type=Path, required=True, help="data folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument(
        "--lengths", type=parse_lengths, default=[6000, 10000], help="steps of each comparison"
    )
    parser.add_argument("--share", type=float, default=0.2, help="share of a length that decays")
    parser.add_argument("--run", default="modern-tiny", help="run config")
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
    decays = {length: round(options.share * length) for length in options.lengths}
    starts = [length - decay for length, decay in decays.items()]
    every = math.gcd(*starts)  # each of the starts has a checkpoint
    stable = options.out / "stable"

    def train(out: Path, schedule: str, steps: int, *settings: str, **more: Any) -> dict:
        values = [f"optimizer.schedule={schedule}", f"train.total_steps={steps}", *settings]
        return pretrain(
            options.run, options.data, out, options.engine, [*options.set, *values], **more
        )

    kept = (f"checkpoint.every={every}", f"checkpoint.keep_every={every}")
    results = {"stable": train(stable, "constant", starts[-1], *kept)}
    runs = [stable]
    for length, decay in decays.items():
        start = length - decay
        parent = stable / "ckpt" / ("final" if start == starts[-1] else str(start))
        branch, linear = (options.out / f"{name}-{length}" for name in ("branch", "linear"))
        shape = (f"optimizer.decay_steps={decay}", "optimizer.decay_shape=1-sqrt")
        more = {"more": ["--branch-from", parent]}
        results[branch.name] = train(branch, "wsd", length, *shape, **more)
        results[linear.name] = train(linear, "linear", length)
        runs += [branch, linear]
    write_json(options.out / "decay.json", results)
    table = format_table(results)
    write_bytes(options.out / "decay.md", (table + "\n").encode())
    call("plot", *runs, "--out", options.out / "decay.png")
    print(table)


if __name__ == "__main__":
    run_main(main)
