"""Entropy of the share of replaced tokens. This module does not import torch."""

import math


def entropy(probability: float) -> float:
    """Return the binary entropy in nats: the loss of a constant prediction of this probability."""
    return -sum(p * math.log(p) for p in (probability, 1 - probability) if p > 0)
