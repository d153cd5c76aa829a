"""Rotary positions: the tables, and the rotation of queries and keys (RoFormer, section 3.2.2).

The two elements that are rotated together are D / 2 apart ("rotate half", as in transformers).

Dimensions: B rows, S sequence, D width of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """Cosines and sines of the angles of every token, [B, S, D / 2] fp32."""

    cos: Tensor
    sin: Tensor


def rotary_tables(position_ids: Tensor, head_size: int, theta: float) -> Rotary:
    """Return the tables for position_ids [B, S] int64, the positions inside the documents.

    head_size: D, even. theta: base of the frequencies theta**(-2i / D).
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=position_ids.device)
    frequencies = 1.0 / (theta ** (exponents / head_size))
    angles = position_ids[..., None].float() * frequencies
    return Rotary(angles.cos(), angles.sin())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [..., D] rotated by tables that broadcast to [..., D / 2]; at least in fp32."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x [..., D] in place. It is not differentiable; with -sin it is its own inverse."""
    if x.dtype != torch.float32:
        x.copy_(rotate(x, cos, sin))
        return
    first, second = x.chunk(2, -1)
    rotated = torch.addcmul(first * cos, second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated)
