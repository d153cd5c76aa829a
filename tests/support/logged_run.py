"""A run folder with logged metrics and no training."""

import math
from collections.abc import Iterable
from pathlib import Path

from electra_ds.training.run_logger import RunLogger


def train_values(step: int) -> dict[str, float]:
    """Values of every key that the console line reads; they depend on the step."""
    return {
        "loss": 50.0 + step,
        "mlm_loss": 10.0 - step / 100,
        "disc_loss": 0.5 / step,
        "lr": 1e-3 / step,
        "grad_norm": 1.0,
        "tokens": 1000.0 * step,
        "epoch": step / 100,
        "tokens_per_second": 12345.0,
        "disc_auc": math.nan,
    }


def valid_values(step: int) -> dict[str, float]:
    """Values of every held-out metric; they depend on the step."""
    keys = "mlm_loss unigram_loss mlm_accuracy replaced_fraction"
    keys += " disc_loss base_rate_loss disc_auc fixed_auc"
    return {key: step + number / 10 for number, key in enumerate(keys.split())}


def log_run(out: Path, steps: Iterable[int], start: int = 0, tensorboard: bool = False) -> None:
    """Log the steps of an attempt, and a held-out evaluation at every fifth."""
    with RunLogger(out, start, 100, 1.0, tensorboard) as metrics:
        for step in steps:
            metrics.train(step, train_values(step), seconds_left=3725.0)
            if step % 5 == 0:
                metrics.valid(step, valid_values(step))
            metrics.advance(step)
        metrics.flush()
