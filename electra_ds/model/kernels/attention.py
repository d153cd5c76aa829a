"""Attention inside the pieces of each row, on one fused qkv tensor, by the backend that suits the device.

Letters: B rows, S sequence, H hidden, N heads, D = H / N.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from electra_ds.model.kernels.dropout import dropout_factors


class PackedMask(NamedTuple):
    """Who attends to whom, made once per micro-batch. All None: every token of a row sees the whole row."""

    bias: Tensor | None = (
        None  # [B, 1, S, S] in the compute dtype, added to the scores: -inf between pieces, else 0
    )
    cu_seqlens: Tensor | None = (
        None  # int32, starts of the pieces in the flattened batch (`document_cu_seqlens`)
    )
    rows: list[int] | None = None  # on a CPU those whose bias is not 0
    runs: list[tuple[int, int]] | None = (
        None  # of one row: (pieces, tokens of each) of each stretch of equal lengths
    )


def document_cu_seqlens(document_ids: Tensor) -> Tensor:
    """Starts of the pieces of document_ids [B, S] in the flattened batch, and its length; int32, made on the host.

    Filled up with the length to B x 1, 2, 4, ... starts (and one), so that compiled layers meet few sizes: B x 1 says
    that every row is one piece. Not to the most that could be: the flash kernel starts blocks for every piece and holds
    128 rows of fp32 more in backward, 26 MB a row of Base at S = 128 were each of 2 tokens.
    """
    batch, length = document_ids.shape
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.view(-1).nonzero().view(-1)
    size = batch << (-(-len(starts) // batch) - 1).bit_length()
    return F.pad(starts, (0, size + 1 - len(starts)), value=batch * length).to(torch.int32)


def packed_mask(
    document_ids: Tensor, dtype: torch.dtype, cu_seqlens: Tensor | None = None, head_size: int = 64
) -> PackedMask:
    """The attention structure of document_ids [B, S]; padding (0) is a piece of its own, so no row of scores is empty.

    dtype is the one attention will compute in. Rows of a single piece take the path without a mask: a CPU looks at
    each (with `cu_seqlens`, one row alone goes piece by piece there); elsewhere the size of `cu_seqlens` tells, and nothing is
    read back, so that the step has no host sync.
    """
    rows = None
    if document_ids.device.type == "cpu":
        rows = [
            row for row, is_packed in enumerate((document_ids != 1).any(1).tolist()) if is_packed
        ]
        if not rows:
            return PackedMask()
        if len(document_ids) == 1 and cu_seqlens is not None:
            sizes, counts = torch.unique_consecutive(cu_seqlens.diff(), return_counts=True)
            return PackedMask(
                runs=[run for run in zip(counts.tolist(), sizes.tolist(), strict=True) if run[1]]
            )
    elif cu_seqlens is not None:
        if len(cu_seqlens) == len(document_ids) + 1:
            return PackedMask()
        if _has_varlen(document_ids.device, dtype, head_size):
            return PackedMask(cu_seqlens=cu_seqlens)
    apart = document_ids[:, None, :, None] != document_ids[:, None, None, :]
    bias = torch.zeros(apart.shape, dtype=dtype, device=apart.device).masked_fill_(apart, -math.inf)
    return PackedMask(bias, rows=rows)


def attention(
    qkv: Tensor,
    num_heads: int,
    pieces: PackedMask = PackedMask(),
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V per head, inside pieces (Vaswani et al. 2017, 3.2).

    qkv:     [B, S, 3H] any float dtype, the outputs for query, key and value side by side
    dropout: on the probabilities; 0 outside training
    backend: "bmm" (plain products, one autograd function: the fast one on CPUs), "sdpa", "varlen", or "auto"
    Returns [B, S, H] in qkv's dtype.
    """
    if pieces.runs is not None:
        parts = qkv[0].split([count * size for count, size in pieces.runs])
        seen = [
            _BmmAttention.apply(part.view(*run, -1), num_heads, None, None, dropout).flatten(0, 1)
            for part, run in zip(parts, pieces.runs, strict=True)
        ]
        return torch.cat(seen)[None]
    if backend == "auto":
        backend = (
            "varlen"
            if pieces.cu_seqlens is not None
            else "bmm"
            if qkv.device.type == "cpu"
            else "sdpa"
        )
    if backend == "bmm":
        rows = (
            None if torch.compiler.is_compiling() else pieces.rows
        )  # compiled code may not depend on their numbers
        return _BmmAttention.apply(qkv, num_heads, pieces.bias, rows, dropout)
    batch, length, width = qkv.shape
    heads = qkv.view(batch, length, 3, num_heads, width // 3 // num_heads)
    if backend == "varlen":
        q, k, v = heads.flatten(0, 1).unbind(1)  # [B*S, N, D] each
        # What torch's varlen_attn and jagged attention call; the first of these has no dropout.
        cu_seqlens = (pieces.cu_seqlens, pieces.cu_seqlens, length, length)
        out = torch.ops.aten._flash_attention_forward(q, k, v, *cu_seqlens, dropout, False, False)[
            0
        ]
        return out.reshape(batch, length, -1)
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # [B, N, S, D] each
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=pieces.bias, dropout_p=dropout)
    return out.transpose(1, 2).reshape(batch, length, -1)


def _has_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Flash attention over packed pieces: half precision on Ampere or later."""
    is_fit = dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0 and head_size <= 256
    return is_fit and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


class _BmmAttention(torch.autograd.Function):
    """Batched products on contiguous heads; the probabilities stay in the compute dtype (speed.md, 2)."""

    @staticmethod
    def forward(
        ctx,
        qkv: Tensor,
        num_heads: int,
        bias: Tensor | None,
        rows: list[int] | None,
        dropout: float,
    ):
        batch, length, width = qkv.shape
        size = width // 3 // num_heads
        heads = qkv.view(batch, length, 3, num_heads, size).permute(2, 0, 3, 1, 4).contiguous()
        q, k, v = heads.view(3, batch * num_heads, length, size)
        scores = torch.baddbmm(
            q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=1 / math.sqrt(size)
        )  # [B*N, S, S]
        if rows is not None:
            for row in rows:
                scores[row * num_heads : (row + 1) * num_heads].add_(bias[row])
        elif bias is not None:
            scores.view(batch, num_heads, length, length).add_(bias)
        probs = torch.softmax(scores, -1)
        kept = dropout_factors(probs, dropout) if dropout else None
        out = torch.bmm(probs if kept is None else probs * kept, v)  # [B*N, S, D]
        ctx.save_for_backward(heads, probs, kept)
        return out.view(batch, num_heads, length, size).transpose(1, 2).reshape(batch, length, -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        heads, probs, kept = ctx.saved_tensors
        _, batch, num_heads, length, size = heads.shape
        q, k, v = heads.view(3, batch * num_heads, length, size)
        grad = (
            grad.view(batch, length, num_heads, size)
            .transpose(1, 2)
            .reshape(batch * num_heads, length, size)
        )
        grads = torch.empty_like(heads)
        dq, dk, dv = grads.view(3, batch * num_heads, length, size)
        torch.bmm((probs if kept is None else probs * kept).transpose(1, 2), grad, out=dv)
        dprobs = torch.bmm(grad, v.transpose(1, 2))
        if kept is not None:
            dprobs.mul_(kept)
        dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
        scale = 1 / math.sqrt(size)
        torch.baddbmm(q.new_empty(1), dscores, k, beta=0, alpha=scale, out=dq)
        torch.baddbmm(q.new_empty(1), dscores.transpose(1, 2), q, beta=0, alpha=scale, out=dk)
        return grads.permute(1, 3, 0, 2, 4).reshape(batch, length, -1), None, None, None, None
