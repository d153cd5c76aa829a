"""Learning rate as a function of the step."""


def learning_rate(peak_lr: float, warmup_steps: int, applied_steps: int, total_steps: int) -> float:
    """Return peak * (1 - t / T) * min(1, t / W): linear warmup times linear decay to 0.

    This is the schedule of the authors' code. With warmup the first step has learning rate 0;
    without warmup (W = 0) it has peak_lr.

    warmup_steps: W.
    applied_steps: t, the steps applied before this one.
    total_steps: T.
    """
    warmup = min(1.0, applied_steps / warmup_steps) if warmup_steps else 1.0
    return peak_lr * max(0.0, 1 - applied_steps / total_steps) * warmup
