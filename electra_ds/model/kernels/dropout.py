"""Dropout from 16 random bits per element on a CPU, where the usual one takes a seventh of a training step."""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 2**16


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Drop elements of x with probability p and scale up the others; x itself when there is nothing to drop."""
    if not training or not p:
        return x
    return x * dropout_factors(x, p) if x.device.type == "cpu" else F.dropout(x, p)


def dropout_factors(like: Tensor, p: float) -> Tensor:
    """1 / (1 - p) with probability 1 - p, else 0, in the shape and dtype of `like`, from torch's default generator.

    On a CPU p is rounded to a multiple of 2**-16, in the factor too, so that the mean stays 1.
    """
    if like.device.type != "cpu" or torch.compiler.is_compiling():  # random_ would break the graph
        return (torch.rand_like(like, dtype=torch.float32) >= p).to(like.dtype).div_(1 - p)
    dropped = round(p * LEVELS)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    # compared in place: ten times as fast as by way of bools, 3.6 % of a small bf16 step
    kept = words.view(torch.int16)[: like.numel()].view(like.shape).ge_(dropped - LEVELS // 2)
    return kept.to(like.dtype).mul_(LEVELS / (LEVELS - dropped))
