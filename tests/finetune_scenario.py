"""Fine-tunings on real ranks, many in one process group: `torchrun tests/finetune_scenario.py MODEL TASKS OUT`.

The tests in test_finetune.py read what they left in OUT/NAME. Not a test file itself.
"""

import os
import signal
import sys
from pathlib import Path

from electra_ds.config import parse_config
from electra_ds.engine import leave, start
from electra_ds.glue import finetune
from electra_ds.glue.config import FinetuneConfig
from electra_ds.ranks import find_ranks

MODEL, TASKS, OUT = map(Path, sys.argv[1:])
RANKS = find_ranks()
DEVICE = start(RANKS, 2)


def run(name: str, task: str, engine: str = "zero0-fp32", seeds: int = 1, random_init: bool = False,
        peak_lr: float = 3e-3, **train) -> None:  # fmt: skip
    """One suite in OUT/NAME."""
    values = {
        "train": {"epochs": 3.0, "max_length": 24, "micro_batch_size": 8, "global_batch_size": 16} | train,
        "optimizer": {"peak_lr": peak_lr, "layerwise_lr_decay": 0.9}, "engine": engine,
    }  # fmt: skip
    config = parse_config(values, name, FinetuneConfig)
    names = [str(TASKS / f"{task}.json")]
    finetune.finetune_among(config, MODEL, names, seeds, None, OUT / name, RANKS, DEVICE, random_init=random_init)


def interrupted(name: str, task: str, **train) -> None:
    """The same in two attempts: the first one is asked to stop in the middle of its second epoch."""
    untouched = finetune.Seed._steps

    def signalled(self, progress):
        progress = untouched(self, progress)
        if progress.step == 18:  # of 39, 13 an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return progress

    finetune.LOOK_STEPS, finetune.Seed._steps = 5, signalled
    try:
        run(name, task, **train)
        raise AssertionError("the signal was not heard")
    except finetune.Stopped:
        assert not (OUT / name / task / "seed-0" / "result.json").exists()
    finetune.Seed._steps = untouched
    run(name, task, **train)


run("classes", "classes", seeds=2)
run("pairs", "pairs", "zero2-fp32" if RANKS.world_size > 1 else "zero0-fp32", epochs=2.0)
run("words", "words", "zero3-fp32" if RANKS.world_size > 1 else "zero1-fp32", epochs=3.5, peak_lr=1e-3)
if RANKS.world_size == 1:
    interrupted("cut", "classes")
    run("best", "classes", select="best", keep="all")
    run("half", "classes", "zero0-bf16", keep="all", epochs=1.0)
    run("random", "classes", random_init=True, keep="none", epochs=0.5)
    run("blown", "classes", peak_lr=1e30, max_skipped_steps=2)
leave()
