"""Attention inside documents written as its formula, and the gradients of a function."""

import math
from collections.abc import Callable

import torch


def written_out_attention(
    qkv: torch.Tensor, heads: int, document_ids: torch.Tensor
) -> torch.Tensor:
    """Attention over positions of the same document: qkv [B, S, 3 * width] -> [B, S, width]."""
    batch, length, _ = qkv.shape
    q, k, v = (t.view(batch, length, heads, -1).transpose(1, 2) for t in qkv.chunk(3, -1))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    weights = scores.masked_fill(~same, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(batch, length, -1)


def value_and_grads(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The value of a function and the gradients of its inputs for a fixed gradient of the value."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    gradient = torch.linspace(-1, 1, out.numel(), device=out.device)
    out.backward(gradient.view(out.shape).to(out.dtype))
    return out.detach(), *(leaf.grad for leaf in leaves)
