"""Pause of a checkpoint in training, and its whole cost.

    python bench/saving.py --data D --out B --ranks 2 --engine zero1

Trains `small` twice, with synchronous and with asynchronous checkpoints, and reads the metrics of
each run.

pause: median of checkpoint_pause_seconds.
cost:  seconds of the steps up to the next checkpoint, minus as many median steps; a median, too.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
from pathlib import Path

from report import make_parser, run_main

from electra_ds.training import checkpoint
from electra_ds.training.metrics_file import read_metrics

SETTINGS = [
    "train.global_batch_size=16",
    "train.micro_batch_size=8",
    "train.eval_every=0",
    "logging.every=1",
    "logging.tensorboard=false",
]


def train(options: argparse.Namespace, out: Path, asynchronous: bool) -> None:
    """Run `pretrain` on the ranks of this machine."""
    settings = [
        *SETTINGS,
        f"train.total_steps={options.every * (options.saves + 1)}",
        f"checkpoint.every={options.every}",
        f"checkpoint.asynchronous={str(asynchronous).lower()}",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={options.ranks}", "-m", "electra_ds", "pretrain", "small"]
    command += ["--data", str(options.data), "--out", str(out), "--engine", options.engine]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def report(out: Path, every: int) -> None:
    """Print pause, cost, step time and size of the checkpoints of a run."""
    records = [
        record for record in read_metrics(out / "metrics.jsonl") if record["split"] == "train"
    ]
    pauses = [record["checkpoint_pause_seconds"] for record in records]
    pauses = [pause for pause in pauses if pause]
    ends = [record["seconds"] for record in records]  # of steps 1, 2, ...
    step_seconds = statistics.median(end - start for start, end in itertools.pairwise(ends))
    saved_steps = range(every - 1, len(ends) - every, every)  # indices
    cost = statistics.median(ends[i + every] - ends[i] - every * step_seconds for i in saved_steps)
    files = checkpoint.read_meta(out / "ckpt" / "final").files
    size = sum(facts["bytes"] for facts in files.values())
    print(
        f"{out.name}: pause {statistics.median(pauses):.3f} s "
        f"({min(pauses):.3f}-{max(pauses):.3f}), cost {cost:.3f} s, "
        f"step {step_seconds:.3f} s, checkpoint {size / 1e6:.0f} MB"
    )


def main() -> None:
    parser = make_parser(__doc__, has_json=False)
    parser.add_argument(
        "--data", type=Path, required=True, help="a data folder of rows of 128 tokens"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the two runs")
    parser.add_argument("--ranks", type=int, default=1, help="ranks on this machine")
    parser.add_argument("--engine", default="zero1", help="engine file")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--saves", type=int, default=4, help="checkpoints before the last one")
    options = parser.parse_args()
    for asynchronous in (False, True):
        kind = "asynchronous" if asynchronous else "synchronous"
        out = options.out / f"{options.ranks}-{kind}"
        train(options, out, asynchronous)
        report(out, options.every)


if __name__ == "__main__":
    run_main(main)
