"""Disentangled attention: contents and relative positions attend to each other (DeBERTa, section 3.1).

The score of query i and key j is (q_i . k_j + q_i . kp_{i-j} + k_j . qp_{i-j}) / sqrt(3 D), where qp
and kp are the queries and keys of the distance i - j. The products with positions are computed for
blocks of tokens as matrices [tokens, distances]. A strided view of such a matrix is the block of
scores, so that no index is read.

Dimensions: B rows, S sequence, H hidden, N heads, D = H / N, T = B * S tokens, C documents of L
tokens each, P blocks of `size` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from electra_ds.model.kernels.attention_mask import PackedMask
from electra_ds.model.kernels.dropout import dropout_factors, factors_of_kept

BLOCK = 64  # tokens for which the products with positions are computed together


def distance_rows(length: int, buckets: int, max_positions: int) -> Tensor:
    """Return the row of the relative table for each distance, [2 S - 1] int64 on the CPU.

    The distances i - j descend from S - 1 to 1 - S, and so do the rows. The table has 2 x buckets
    rows. Distances up to buckets / 2 have a row of their own, larger ones share rows in logarithmic
    steps up to max_positions. The arithmetic is that of transformers in fp32, on the CPU so that
    every device uses the same rows.
    """
    distances = torch.arange(length - 1, -length, -1, device="cpu")
    middle = buckets // 2
    far = distances.abs().clamp(min=middle)
    scale = torch.log(torch.tensor((max_positions - 1) / middle, device="cpu"))
    steps = torch.ceil(torch.log(far / middle) / scale * (middle - 1)) + middle
    near = distances.abs() <= middle
    bucket = torch.where(near, distances.to(steps.dtype), steps * distances.sign()).long()
    return (bucket + buckets).clamp(0, 2 * buckets - 1)


def disentangled_attention(
    qkv: Tensor,
    positions: Tensor,
    num_heads: int,
    mask: PackedMask = PackedMask(),
    dropout: float = 0.0,
) -> Tensor:
    """Attention within documents, with the products with relative positions in its scores.

    qkv:       [B, S, 3H] any float dtype, the projections for query, key and value side by side
    positions: [2 M - 1, 2H] the projections for query and key of the distances from M - 1 down to
               1 - M, where M is S, or with mask.runs at least the longest document
    num_heads: divides H
    mask:      the tokens that each token attends to, from `packed_mask` without flash attention
    dropout:   on the probabilities; 0 outside training
    Returns [B, S, H] in the dtype of qkv.
    """
    assert mask.cu_seqlens is None and mask.blocks is None
    # Compiled code must not depend on row numbers.
    rows = None if torch.compiler.is_compiling() else mask.rows
    return _Attention.apply(qkv, positions, num_heads, mask.bias, rows, mask.runs, dropout)


class _Run(NamedTuple):
    """Consecutive documents of equal lengths: views of the heads and of the positions."""

    q: Tensor  # [N, C, L, D], scaled
    k: Tensor
    v: Tensor
    position_q: Tensor  # [N, 2 L - 1, D] of ascending distances, scaled
    position_k: Tensor  # [N, 2 L - 1, D] of descending distances


class _Attention(torch.autograd.Function):
    """Disentangled attention by batched products; the probabilities are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        positions: Tensor,
        num_heads: int,
        bias: Tensor | None,
        rows: list[int] | None,
        runs: list[tuple[int, int]] | None,
        dropout: float,
    ) -> Tensor:
        batch, length, width = qkv.shape
        ctx.runs, ctx.shape = runs or [(batch, length)], qkv.shape
        heads = qkv.view(batch * length, 3, num_heads, -1).permute(1, 2, 0, 3)
        heads = heads.clone(memory_format=torch.contiguous_format)  # [3, N, T, D]
        tables = positions.view(len(positions), 2, num_heads, -1).permute(1, 2, 0, 3)
        tables = torch.stack([tables[0].flip(1), tables[1]])  # [2, N, 2 M - 1, D]
        scale = 1 / math.sqrt(3 * heads.shape[-1])
        heads[0].mul_(scale)
        tables[0].mul_(scale)
        kept, outputs = [], []
        for run in _runs(heads, tables, ctx.runs):
            scores = _scores(run)
            if bias is not None:
                _add_bias(scores, bias, rows)
            # With a dtype: autocast on CUDA would return fp32, which backward cannot use.
            probs = torch.softmax(scores, -1, dtype=scores.dtype)
            factors = dropout_factors(probs, dropout) if dropout else None
            out = torch.matmul(probs if factors is None else probs * factors, run.v)
            outputs.append(out.permute(1, 2, 0, 3).reshape(-1, width // 3))
            is_bool = factors is not None and _saves_bools(qkv.device)
            kept += [probs, factors != 0 if is_bool else factors]
        ctx.dropout = dropout
        ctx.save_for_backward(heads, tables, *kept)
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return out.view(batch, length, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        heads, tables, *kept = ctx.saved_tensors
        _, num_heads, tokens, width = heads.shape
        grad = grad.reshape(tokens, num_heads, width).transpose(0, 1)  # [N, T, D]
        dheads = torch.empty_like(heads)
        # Every run of documents adds to the positions.
        dtables = torch.zeros_like(tables, dtype=torch.promote_types(tables.dtype, torch.float32))
        runs = _runs(heads, tables, ctx.runs)
        changes = _runs(dheads, dtables, ctx.runs)
        start = 0
        for i, (run, change) in enumerate(zip(runs, changes, strict=True)):
            shape = run.v.shape
            count = shape[1] * shape[2]
            dout = grad[:, start : start + count].reshape(shape)
            start += count
            probs, factors = kept[2 * i], kept[2 * i + 1]
            if factors is not None and factors.dtype == torch.bool:
                factors = factors_of_kept(factors, ctx.dropout, probs.dtype)
            _gradients(run, probs, factors, dout, change)
        scale = 1 / math.sqrt(3 * width)
        dheads[0].mul_(scale)
        dtables[0].mul_(scale)
        dpositions = torch.stack([dtables[0].flip(1), dtables[1]]).permute(2, 0, 1, 3)
        dqkv = dheads.permute(2, 0, 1, 3).reshape(ctx.shape)
        return dqkv, dpositions.reshape(len(dpositions), -1).to(tables.dtype), *[None] * 5


def _saves_bools(device: torch.device) -> bool:
    """Whether the kept elements of dropout are saved instead of its factors, for less memory.

    On a CPU the factors come from another computation, and the conversion takes time.
    """
    return device.type != "cpu"


def _runs(heads: Tensor, tables: Tensor, runs: list[tuple[int, int]]) -> Iterator[_Run]:
    """The runs of heads [3, N, T, D] and tables [2, N, 2 M - 1, D]; `runs`: (C, L) of each."""
    num_heads, _, width = heads.shape[1:]
    middle = tables.shape[2] // 2  # the distance 0
    start = 0
    for count, length in runs:
        part = heads[:, :, start : start + count * length]
        start += count * length
        near = tables[:, :, middle - length + 1 : middle + length]
        yield _Run(*part.view(3, num_heads, count, length, width), *near)


def _blocks(length: int) -> list[tuple[slice, slice]]:
    """(tokens of a block, their distances among 2 L - 1) for the blocks of a document."""
    starts = range(0, length, BLOCK)
    ends = [min(start + BLOCK, length) for start in starts]
    return [
        (slice(start, end), slice(length - end, 2 * length - 1 - start))
        for start, end in zip(starts, ends, strict=True)
    ]


def _diagonals(matrix: Tensor, size: int) -> Tensor:
    """The scores [N, C, size, L] in the products [N, C * size, L + size - 1] with the distances.

    The result is a view: its element (i, j) is element (i, j - i + size - 1) of a matrix, which is
    found one place earlier in each row of the flattened matrix.
    """
    heads, tokens, width = matrix.shape
    if size == 1:
        return matrix.view(heads, tokens, 1, width)
    flat = matrix.view(heads, tokens // size, size * width)
    rows = flat[..., size - 1 : size * width - 1].view(heads, -1, size, width - 1)
    return rows[..., : width - size + 1]


def _products(x: Tensor, table: Tensor) -> Tensor:
    """Scores [N, C, size, L] of x [N, C, size, D] with the distances table [N, L + size - 1, D]."""
    return _diagonals(torch.bmm(_flat(x), table.transpose(1, 2)), x.shape[2])


def _flat(x: Tensor) -> Tensor:
    """[N, C, size, D] -> [N, C * size, D]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _batched(x: Tensor) -> Tensor:
    """[N, C, L, D] -> [N * C, L, D]."""
    return x.reshape(-1, *x.shape[2:])


def _scores(run: _Run) -> Tensor:
    """The scores of queries and keys, [N, C, L, L]."""
    heads, count, length, _ = run.q.shape
    scores = run.q.new_empty(heads, count, length, length)
    for tokens, distances in _blocks(length):
        scores[:, :, tokens] = _products(run.q[:, :, tokens], run.position_k[:, distances])
    for tokens, distances in _blocks(length):
        products = _products(run.k[:, :, tokens], run.position_q[:, distances])
        scores[..., tokens] += products.transpose(2, 3)
    flat = _batched(scores)
    torch.baddbmm(flat, _batched(run.q), _batched(run.k).transpose(1, 2), out=flat)
    return scores


def _add_bias(scores: Tensor, bias: Tensor, rows: list[int] | None) -> None:
    """Add bias [B or 1, 1, S, S] to scores [N, B, S, S] in place, in these rows only."""
    bias = bias.transpose(0, 1)
    if rows is None:
        scores.add_(bias)
        return
    for row in rows:
        scores[:, row].add_(bias[:, row])


def _gradients(
    run: _Run, probs: Tensor, factors: Tensor | None, grad: Tensor, change: _Run
) -> None:
    """Write the gradients of a run for that of its values, and add those of the positions."""
    weights = probs if factors is None else probs * factors
    change.v.copy_(torch.matmul(weights.transpose(2, 3), grad))
    dprobs = torch.matmul(grad, run.v.transpose(2, 3))
    if factors is not None:
        dprobs.mul_(factors)
    dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
    change.q.copy_(torch.matmul(dscores, run.k))
    change.k.copy_(torch.matmul(dscores.transpose(2, 3), run.q))
    _add_gradients(dscores, run.q, run.position_k, change.q, change.position_k)
    _add_gradients(dscores.transpose(2, 3), run.k, run.position_q, change.k, change.position_q)


def _add_gradients(dscores: Tensor, x: Tensor, table: Tensor, dx: Tensor, dtable: Tensor) -> None:
    """Add the gradients of x and table for that of `_products`, by blocks."""
    heads, count, length, _ = x.shape
    matrix, size = x, 0
    for tokens, distances in _blocks(length):
        if tokens.stop - tokens.start != size:  # of the first block, and of a smaller last one
            size = tokens.stop - tokens.start
            matrix = x.new_zeros(heads, count * size, length + size - 1)
        _diagonals(matrix, size).copy_(dscores[:, :, tokens])
        part = x[:, :, tokens]
        dx[:, :, tokens] += torch.bmm(matrix, table[:, distances]).view(part.shape)
        dtable[:, distances] += torch.bmm(matrix.transpose(1, 2), _flat(part))
