"""Learning rate as a function of the step."""


def learning_rate(peak_lr: float, warmup_steps: int, applied_steps: int, total_steps: int) -> float:
    """lr = peak * (1 - t/T) * min(1, t/W): warmup times linear decay, as in the authors' code.

    applied_steps: t, the steps applied before this one, so the very first step has rate 0.
    """
    warmup = min(1.0, applied_steps / warmup_steps) if warmup_steps else 1.0
    return peak_lr * max(0.0, 1 - applied_steps / total_steps) * warmup
