"""Fine-tunings on real ranks, many in one process group: `torchrun tests/finetune_scenario.py MODEL TASKS OUT`.

The tests in test_finetune.py read what they left in OUT/NAME. Not a test file itself.
"""

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
    jobs = [(str(TASKS / f"{task}.json"), seed) for seed in range(seeds)]
    finetune.finetune_among(config, MODEL, jobs, None, OUT / name, RANKS, DEVICE, random_init)


def interrupted(name: str, task: str, **train) -> None:
    """The same in two attempts: the first one ends after its second epoch."""
    untouched = finetune.Seed._after_epoch

    def stops(self, progress, loss):
        untouched(self, progress, loss)
        if progress.data["epoch"] == 2:
            self.engine.close()
            raise InterruptedError

    finetune.SAVE_SECONDS, finetune.Seed._after_epoch = 0.0, stops
    try:
        run(name, task, **train)
    except InterruptedError:
        assert not (OUT / name / task / "seed-0" / "result.json").exists()
    finetune.Seed._after_epoch = untouched
    run(name, task, **train)
    finetune.SAVE_SECONDS = 60.0


run("classes", "classes", seeds=2)
run("pairs", "pairs", "zero2-fp32" if RANKS.world_size > 1 else "zero0-fp32", epochs=2.0)
run("words", "words", "zero3-fp32" if RANKS.world_size > 1 else "zero1-fp32", epochs=3.5, peak_lr=1e-3)
if RANKS.world_size == 1:
    interrupted("cut", "classes")
    run("best", "classes", select="best", keep="all")
    run("random", "classes", random_init=True, keep="none", epochs=0.5)
    run("blown", "classes", peak_lr=1e30, max_skipped_steps=2)
leave()
