"""How long does training stand still for a checkpoint, and what does the checkpoint cost in all?

    python bench/saving.py --data D --out B --ranks 2 --engine zero1

Trains `small` with checkpoints awaited and written beside, and reads metrics.jsonl. pause: the median of
checkpoint_pause_seconds. cost: what the steps up to the next checkpoint took beyond as many median steps.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
from pathlib import Path

from electra_ds.training import checkpoint
from electra_ds.training.metrics_file import read_metrics

SETS = [
    "train.global_batch_size=16",
    "train.micro_batch_size=8",
    "train.eval_every=0",
    "logging.every=1",
    "logging.tensorboard=false",
]


def run(options: argparse.Namespace, out: Path, asynchronous: bool) -> None:
    sets = [
        *SETS,
        f"train.total_steps={options.every * (options.saves + 1)}",
        f"checkpoint.every={options.every}",
        f"checkpoint.asynchronous={str(asynchronous).lower()}",
    ]
    launcher = [
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={options.ranks}",
        "-m",
        "electra_ds",
    ]
    command = [
        sys.executable,
        "-m",
        *launcher,
        "pretrain",
        "small",
        "--data",
        str(options.data),
        "--out",
        str(out),
    ]
    command += ["--engine", options.engine, *(part for line in sets for part in ("--set", line))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="rows of 128 tokens")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--engine", default="zero1")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--saves", type=int, default=4)
    options = parser.parse_args()
    for asynchronous in (False, True):
        out = options.out / f"{options.ranks}-{'asynchronous' if asynchronous else 'synchronous'}"
        run(options, out, asynchronous)
        records = [
            record for record in read_metrics(out / "metrics.jsonl") if record["split"] == "train"
        ]
        pauses = [pause for record in records if (pause := record["checkpoint_pause_seconds"])]
        ends = [record["seconds"] for record in records]  # of step 1, 2, ...
        step = statistics.median(b - a for a, b in itertools.pairwise(ends))
        saves = range(options.every - 1, len(ends) - options.every, options.every)
        cost = statistics.median(
            ends[i + options.every] - ends[i] - options.every * step for i in saves
        )
        size = sum(
            facts["bytes"] for facts in checkpoint.read_meta(out / "ckpt" / "final").files.values()
        )
        print(
            f"{out.name}: pause {statistics.median(pauses):.3f} s ({min(pauses):.3f}-{max(pauses):.3f}), "
            f"cost {cost:.3f} s, step {step:.3f} s, checkpoint {size / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()
