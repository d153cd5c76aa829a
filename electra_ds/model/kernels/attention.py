"""Attention within the documents of packed rows, on one fused qkv tensor.

Dimensions: B rows, S sequence, H hidden, N heads, D = H / N, T = B * S tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from electra_ds.model.kernels.attention_mask import (
    Blocks,
    PackedMask,
    add_neighbors,
    neighbors,
)
from electra_ds.model.kernels.dropout import dropout_factors
from electra_ds.model.kernels.rotary import Rotary, rotate, rotate_


def attention(
    qkv: Tensor,
    num_heads: int,
    mask: PackedMask = PackedMask(),
    dropout: float = 0.0,
    backend: str = "auto",
    rotary: Rotary | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V per head, within documents (Vaswani et al. 2017, section 3.2).

    qkv:     [B, S, 3H] any float dtype, the projections for query, key and value side by side
    num_heads: divides H
    mask:    the tokens that each token attends to, from `packed_mask`; all tokens by default
    dropout: on the probabilities; 0 outside training
    backend: "bmm" (batched products in one autograd function, the fastest on CPUs), "sdpa"
             (scaled_dot_product_attention), "varlen" (flash attention over cu_seqlens; needs
             mask.cu_seqlens), or "auto"
    rotary:  cosines and sines [B, S, D / 2] by which queries and keys are rotated; None: they are
             not rotated
    Returns [B, S, H] in the dtype of qkv.
    """
    if mask.runs is not None:
        return _attention_by_document(qkv, num_heads, mask.runs, dropout, rotary)
    cos, sin = (None, None) if rotary is None else rotary
    if mask.blocks is not None:
        return _BlockAttention.apply(qkv, num_heads, mask.blocks, cos, sin, dropout)
    if backend == "auto":
        backend = "bmm" if qkv.device.type == "cpu" else "sdpa"
        if mask.cu_seqlens is not None:
            backend = "varlen"
    if backend == "bmm":
        # Compiled code must not depend on row numbers.
        rows = None if torch.compiler.is_compiling() else mask.rows
        return _BmmAttention.apply(qkv, num_heads, mask.bias, rows, cos, sin, dropout)
    q, k, v = _separate(qkv, num_heads, rotary)  # [B, S, N, D] each
    if backend == "varlen":
        return _flash_attention(q, k, v, mask, dropout)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bias, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)


def _separate(qkv: Tensor, num_heads: int, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries, rotated keys and values, [B, S, N, D] each."""
    batch, length, width = qkv.shape
    heads = qkv.view(batch, length, 3, num_heads, width // 3 // num_heads)
    if rotary is None:
        q, k, v = heads.unbind(2)
        return q, k, v
    cos, sin = (table[:, :, None, None] for table in rotary)
    q, k = rotate(heads[:, :, :2], cos, sin).unbind(2)
    return q, k, heads[:, :, 2]


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: PackedMask, dropout: float) -> Tensor:
    """Flash attention over mask.cu_seqlens with mask.window: [B, S, N, D] -> [B, S, H]."""
    batch, length = q.shape[:2]
    # The operator that torch's varlen_attn and jagged attention call; varlen_attn has no dropout.
    outputs = torch.ops.aten._flash_attention_forward(
        *(x.flatten(0, 1) for x in (q, k, v)),
        mask.cu_seqlens,
        mask.cu_seqlens,
        length,
        length,
        dropout,
        False,
        False,
        window_size_left=mask.window,
        window_size_right=mask.window,
    )
    return outputs[0].reshape(batch, length, -1)


def _attention_by_document(
    qkv: Tensor,
    num_heads: int,
    runs: list[tuple[int, int]],
    dropout: float,
    rotary: Rotary | None,
) -> Tensor:
    """Attention of [B, S, 3H], one batched product per run of documents of equal lengths."""
    tokens = [count * size for count, size in runs]
    parts = qkv.flatten(0, 1).split(tokens)
    tables: list[Any] = [[None] * len(runs)] * 2
    if rotary is not None:
        tables = [table.flatten(0, 1).split(tokens) for table in rotary]
    outputs = []
    for part, cos, sin, (count, size) in zip(parts, *tables, runs, strict=True):
        if rotary is not None:
            cos, sin = cos.view(count, size, -1), sin.view(count, size, -1)
        part = part.view(count, size, -1)
        out = _BmmAttention.apply(part, num_heads, None, None, cos, sin, dropout)
        outputs.append(out.flatten(0, 1))
    return torch.cat(outputs).view(*qkv.shape[:2], -1)


class _BmmAttention(torch.autograd.Function):
    """Attention by batched products on contiguous heads.

    The probabilities are kept for backward in the compute dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        num_heads: int,
        bias: Tensor | None,
        rows: list[int] | None,
        cos: Tensor | None,
        sin: Tensor | None,
        dropout: float,
    ) -> Tensor:
        batch, length, width = qkv.shape
        size = width // 3 // num_heads
        heads = qkv.view(batch, length, 3, num_heads, size).permute(2, 0, 3, 1, 4).contiguous()
        if cos is not None and sin is not None:
            if batch * length == 1:  # the view was contiguous, so that heads is not a copy
                heads = heads.clone()
            rotate_(heads[:2], cos[:, None], sin[:, None])
        q, k, v = heads.view(3, batch * num_heads, length, size)
        scores = _scores(q, k)  # [B*N, S, S]
        if bias is not None:
            if rows is None:
                scores.view(batch, num_heads, length, length).add_(bias)
            else:
                for row in rows:
                    scores[row * num_heads : (row + 1) * num_heads].add_(bias[row])
        out, probs, factors = _weighted(scores, v, dropout)
        ctx.save_for_backward(heads, probs, factors, cos, sin)
        return out.view(batch, num_heads, length, size).transpose(1, 2).reshape(batch, length, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        heads, probs, factors, cos, sin = ctx.saved_tensors
        _, batch, num_heads, length, size = heads.shape
        q, k, v = heads.view(3, batch * num_heads, length, size)
        grad = (
            grad.view(batch, length, num_heads, size)
            .transpose(1, 2)
            .reshape(batch * num_heads, length, size)
        )
        dheads = torch.empty_like(heads)
        _gradients(q, k, v, probs, factors, grad, dheads.view(3, batch * num_heads, length, size))
        if cos is not None:
            rotate_(dheads[:2], cos[:, None], -sin[:, None])
        dqkv = dheads.permute(1, 3, 0, 2, 4).reshape(batch, length, -1)
        return dqkv, *[None] * 6


class _BlockAttention(torch.autograd.Function):
    """Attention in a local window: each block of queries with the keys of the blocks around it.

    The flattened batch is divided into blocks. The probabilities are kept for backward in the
    compute dtype, and keys and values once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        num_heads: int,
        blocks: Blocks,
        cos: Tensor | None,
        sin: Tensor | None,
        dropout: float,
    ) -> Tensor:
        count, size, keys = blocks.bias.shape
        ctx.shape, ctx.blocks = qkv.shape, blocks
        heads = _pad(qkv.flatten(0, 1), count * size).view(count * size, 3, num_heads, -1)
        heads = heads.permute(1, 2, 0, 3).contiguous()  # [3, N, T, D]
        if cos is not None and sin is not None:
            cos, sin = (_pad(table.flatten(0, 1), count * size) for table in (cos, sin))
            rotate_(heads[:2], cos, sin)
        q, k, v = _blocks_of_heads(heads, blocks)
        scores = _scores(q, k)  # [N * count, size, keys]
        scores.view(num_heads, count, size, keys).add_(blocks.bias)
        out, probs, factors = _weighted(scores, v, dropout)
        ctx.save_for_backward(heads, probs, factors, cos, sin)
        out = out.view(num_heads, count * size, -1).transpose(0, 1).flatten(1)
        return out[: qkv.shape[0] * qkv.shape[1]].reshape(*qkv.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        heads, probs, factors, cos, sin = ctx.saved_tensors
        _, num_heads, tokens, width = heads.shape
        q, k, v = _blocks_of_heads(heads, ctx.blocks)
        grad = _pad(grad.flatten(0, 1), tokens).view(tokens, num_heads, width)
        grad = grad.transpose(0, 1).reshape(q.shape)
        changes = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _gradients(q, k, v, probs, factors, grad, changes)
        dheads = torch.stack(
            [
                changes[0].view(num_heads, tokens, width),
                *(
                    add_neighbors(x, num_heads, ctx.blocks.size, ctx.blocks.reach)
                    for x in changes[1:]
                ),
            ]
        )
        if cos is not None:
            rotate_(dheads[:2], cos, -sin)
        dqkv = dheads.permute(2, 0, 1, 3).reshape(tokens, -1)
        batch, length, _ = ctx.shape
        return dqkv[: batch * length].view(ctx.shape), *[None] * 5


def _pad(x: Tensor, tokens: int) -> Tensor:
    """Return x [T, ...] with zeros appended up to `tokens`; x itself where nothing is missing."""
    return x if len(x) == tokens else F.pad(x, (0, 0, 0, tokens - len(x)))


def _blocks_of_heads(heads: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [N * blocks, size, D], keys and values [N * blocks, keys, D] of heads [3, N, T, D]."""
    q, k, v = heads
    return (
        q.view(-1, blocks.size, q.shape[-1]),
        neighbors(k, blocks.size, blocks.reach),
        neighbors(v, blocks.size, blocks.reach),
    )


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Return q k^T / sqrt(D) for q [M, Q, D] and k [M, K, D]."""
    scale = 1 / math.sqrt(q.shape[-1])
    return torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale)


def _weighted(scores: Tensor, v: Tensor, dropout: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the attended values [M, Q, D], the probabilities, and the factors of dropout."""
    # With a dtype: autocast on CUDA would return fp32, which backward, outside autocast, cannot use.
    probs = torch.softmax(scores, -1, dtype=scores.dtype)
    factors = dropout_factors(probs, dropout) if dropout else None
    return torch.bmm(probs if factors is None else probs * factors, v), probs, factors


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probs: Tensor,
    factors: Tensor | None,
    grad: Tensor,
    out: Any,
) -> None:
    """Write the gradients of q, k and v for that of the attended values into out, three tensors."""
    dq, dk, dv = out
    torch.bmm((probs if factors is None else probs * factors).transpose(1, 2), grad, out=dv)
    dprobs = torch.bmm(grad, v.transpose(1, 2))
    if factors is not None:
        dprobs.mul_(factors)
    dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
    scale = 1 / math.sqrt(q.shape[-1])
    torch.baddbmm(q.new_empty(1), dscores, k, beta=0, alpha=scale, out=dq)
    torch.baddbmm(q.new_empty(1), dscores.transpose(1, 2), q, beta=0, alpha=scale, out=dk)
