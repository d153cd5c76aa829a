"""Dropout that takes 16 random bits per element on a CPU.

On CPUs torch's own dropout takes a seventh of a training step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 2**16


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero elements of x with probability p and scale the others by 1 / (1 - p).

    Returns x itself outside training and for p = 0.
    """
    if not training or not p:
        return x
    return x * dropout_factors(x, p) if x.device.type == "cpu" else F.dropout(x, p)


def dropout_factors(like: Tensor, p: float) -> Tensor:
    """Return 1 / (1 - p) with probability 1 - p, else 0, in the shape and dtype of `like`.

    The numbers are drawn from torch's default generator. On a CPU p is rounded to a multiple of
    2**-16, in the factor too, so that the mean is 1.
    """
    if like.device.type != "cpu" or torch.compiler.is_compiling():  # random_ would break the graph
        return factors_of_kept(torch.rand_like(like, dtype=torch.float32) >= p, p, like.dtype)
    dropped_levels = round(p * LEVELS)
    bits64 = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits16 = bits64.view(torch.int16)[: like.numel()].view(like.shape)
    # The comparison in place is ten times as fast as one that returns bool. This saves 3.6 % of a
    # bf16 step of Small.
    kept = bits16.ge_(dropped_levels - LEVELS // 2)
    return kept.to(like.dtype).mul_(LEVELS / (LEVELS - dropped_levels))


def factors_of_kept(kept: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Return 1 / (1 - p) where `kept` is True, else 0; equal to `dropout_factors` off the CPU."""
    return kept.to(dtype).div_(1 - p)
