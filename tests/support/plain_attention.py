"""Attention inside documents and windows written as its formula, and gradients of a function."""

import math
from collections.abc import Callable

import torch


def written_out_attention(
    qkv: torch.Tensor,
    heads: int,
    document_ids: torch.Tensor,
    window: int | None = None,
    rotary: tuple[torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """Attention over positions of the same document: qkv [B, S, 3 * width] -> [B, S, width].

    window: tokens before and after a token that it attends to. rotary: position_ids [B, S] and
    theta, by which queries and keys are rotated.
    """
    batch, length, _ = qkv.shape
    q, k, v = (t.view(batch, length, heads, -1).transpose(1, 2) for t in qkv.chunk(3, -1))
    if rotary is not None:
        q, k = written_out_rotation(q, *rotary), written_out_rotation(k, *rotary)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    seen = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    if window is not None:
        places = torch.arange(length, device=qkv.device)
        seen = seen & ((places[:, None] - places).abs() <= window)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(batch, length, -1)


def written_out_rotation(x: torch.Tensor, position_ids: torch.Tensor, theta: float) -> torch.Tensor:
    """x [B, N, S, D] with each pair (i, i + D / 2), as a complex number, rotated by its angle."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angles = position_ids[:, None, :, None] * frequencies
    turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


def value_and_grads(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The value of a function and the gradients of its inputs for a fixed gradient of the value."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    gradient = torch.linspace(-1, 1, out.numel(), device=out.device)
    out.backward(gradient.view(out.shape).to(out.dtype))
    return out.detach(), *(leaf.grad for leaf in leaves)
