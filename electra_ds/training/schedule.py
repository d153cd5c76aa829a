"""Learning rate as a function of the step.

The rate is a pure function of the step, so a resumed run continues with the same rates. In the
formulas t is the number of steps applied before a step, T the number of steps of the run, W the
number of warmup steps, and f the share of the peak that remains at t = T (`final_ratio`). The steps
of a run have t = 0 to T - 1. With warmup the first step has the rate 0; without warmup (W = 0) it
has the peak.

Every function has these arguments first:
    peak_lr: the largest rate. warmup_steps: W. applied_steps: t. total_steps: T.
"""

import math
from typing import Literal

from electra_ds.config.schema import OptimizerConfig

Shape = Literal["linear", "cosine", "1-sqrt"]


def learning_rate(options: OptimizerConfig, applied_steps: int, total_steps: int) -> float:
    """Return the rate of `optimizer.schedule`.

    options: the section `optimizer` of a run, with a decay that fits the run (`run_plan`).
    """
    step = (options.peak_lr, options.warmup_steps, applied_steps, total_steps)
    final_ratio = options.final_lr_ratio
    if options.schedule == "linear":
        return linear(*step, final_ratio)
    if options.schedule == "cosine":
        return cosine(*step, final_ratio)
    if options.schedule == "constant":
        return constant(*step)
    if options.schedule == "inverse_sqrt":
        return inverse_sqrt(*step)
    assert options.decay_steps is not None  # the schema refuses wsd without it
    return wsd(*step, options.decay_steps, options.decay_shape or "linear", final_ratio)


def linear(
    peak_lr: float,
    warmup_steps: int,
    applied_steps: int,
    total_steps: int,
    final_ratio: float = 0.0,
) -> float:
    """Return peak * (f + (1 - f) * (1 - t / T)) * min(1, t / W).

    It is the product of a linear decay over the whole run and a linear warmup, as in the authors'
    code (google-research/electra, model/optimization.py: polynomial_decay with power 1, times the
    warmup). The rate at the end of the warmup is therefore below the peak.
    """
    decay = _between(max(0.0, 1 - applied_steps / total_steps), final_ratio)
    return peak_lr * decay * _warmup(applied_steps, warmup_steps)


def cosine(
    peak_lr: float,
    warmup_steps: int,
    applied_steps: int,
    total_steps: int,
    final_ratio: float = 0.0,
) -> float:
    """Return peak * t / W for t < W, else peak * (f + (1 - f) * (1 + cos(pi * x)) / 2).

    x = (t - W) / (T - W), at most 1. Half a period of the cosine after the warmup, without restarts
    (Loshchilov and Hutter 2017, SGDR, equation 5).
    """
    if applied_steps < warmup_steps:
        return constant(peak_lr, warmup_steps, applied_steps, total_steps)
    share = _share(applied_steps - warmup_steps, total_steps - warmup_steps)
    return peak_lr * _between(_falling("cosine", share), final_ratio)


def constant(peak_lr: float, warmup_steps: int, applied_steps: int, total_steps: int) -> float:
    """Return peak * min(1, t / W), a linear warmup and no decay; T has no effect."""
    return peak_lr * _warmup(applied_steps, warmup_steps)


def wsd(
    peak_lr: float,
    warmup_steps: int,
    applied_steps: int,
    total_steps: int,
    decay_steps: int,
    shape: Shape,
    final_ratio: float = 0.0,
) -> float:
    """Return peak * min(1, t / W) for t <= T - D, else peak * (f + (1 - f) * g(x)).

    Warmup, stable rate, decay (Hu et al. 2024, MiniCPM, section 4). x = (t - (T - D)) / D, at most
    1. g(x) is 1 - x (linear), (1 + cos(pi * x)) / 2 (cosine) or 1 - sqrt(x) (1-sqrt, Haegele et al.
    2024, Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations, section 3.1).

    decay_steps: D, from 1 to T - W. shape: of the decay.
    """
    decayed = applied_steps - (total_steps - decay_steps)
    if decayed <= 0:
        return constant(peak_lr, warmup_steps, applied_steps, total_steps)
    return peak_lr * _between(_falling(shape, _share(decayed, decay_steps)), final_ratio)


def inverse_sqrt(peak_lr: float, warmup_steps: int, applied_steps: int, total_steps: int) -> float:
    """Return peak * min(t / W, sqrt(W / t)); T has no effect.

    The schedule of Vaswani et al. 2017, Attention Is All You Need, equation 3, scaled to the peak
    at t = W. The schema requires W >= 1.
    """
    if applied_steps <= warmup_steps:
        return constant(peak_lr, warmup_steps, applied_steps, total_steps)
    return peak_lr * math.sqrt(warmup_steps / applied_steps)


def _warmup(applied_steps: int, warmup_steps: int) -> float:
    """min(1, t / W), and 1 without warmup."""
    return min(1.0, applied_steps / warmup_steps) if warmup_steps else 1.0


def _share(done: int, steps: int) -> float:
    """The share of the steps that is done, at most 1; 1 if there are none."""
    return min(1.0, done / steps) if steps > 0 else 1.0


def _between(factor: float, final_ratio: float) -> float:
    """f + (1 - f) * factor: it falls from 1 to f while the factor falls from 1 to 0."""
    return final_ratio + (1 - final_ratio) * factor


def _falling(shape: Shape, share: float) -> float:
    """The factor of a decay, from 1 at share 0 to 0 at share 1."""
    if shape == "linear":
        return 1 - share
    if shape == "cosine":
        return (1 + math.cos(math.pi * share)) / 2
    return 1 - math.sqrt(share)
