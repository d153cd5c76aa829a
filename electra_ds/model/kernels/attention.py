"""Attention within the documents of packed rows, on one fused qkv tensor, and its mask.

Dimensions: B rows, S sequence, H hidden, N heads, D = H / N.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from electra_ds.model.kernels.dropout import dropout_factors


class _PackedBatch(Protocol):
    """A NamedTuple with the fields document_ids and cu_seqlens."""

    @property
    def document_ids(self) -> Tensor: ...

    @property
    def cu_seqlens(self) -> Tensor | None: ...

    def _replace(self, *, cu_seqlens: Tensor | None = ...) -> Any: ...


PackedBatch = TypeVar("PackedBatch", bound=_PackedBatch)


def with_cu_seqlens(batch: PackedBatch) -> PackedBatch:
    """Return the batch with cu_seqlens derived from its document_ids, on the host.

    Training, evaluation and fine-tuning call this for every batch, before it is copied to the
    device. cu_seqlens is pinned when document_ids is.
    """
    cu_seqlens = document_cu_seqlens(batch.document_ids)
    if batch.document_ids.is_pinned():
        cu_seqlens = cu_seqlens.pin_memory()
    return batch._replace(cu_seqlens=cu_seqlens)


def document_cu_seqlens(document_ids: Tensor) -> Tensor:
    """Return the starts of the documents in the flattened batch, [B * 2**n + 1] int32.

    document_ids: [B, S]. Padding counts as a document.
    n is the smallest that fits; unused entries are B * S. The few lengths limit the number of
    compilations. A length of B + 1 means that every row is one document.

    The length is not that for the largest possible number of documents, because the flash kernel
    starts blocks for every document and its backward allocates 128 fp32 rows for each (26 MB per
    row of Base at S = 128 with documents of 2 tokens).
    """
    batch, length = document_ids.shape
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.view(-1).nonzero().view(-1)
    documents_per_row = -(-len(starts) // batch)  # rounded up
    size = batch << (documents_per_row - 1).bit_length()
    return F.pad(starts, (0, size + 1 - len(starts)), value=batch * length).to(torch.int32)


class PackedMask(NamedTuple):
    """Which tokens attend to each other, computed once per micro-batch.

    All fields None: every token attends to its whole row.
    """

    # [B, 1, S, S] in the compute dtype, added to the scores: -inf between documents, else 0
    bias: Tensor | None = None
    cu_seqlens: Tensor | None = None  # as `document_cu_seqlens` returns it, on the device
    rows: list[int] | None = None  # on a CPU: the rows with a bias that is not 0
    # on a CPU, of a single row: (documents, tokens of each) for each run of equal lengths
    runs: list[tuple[int, int]] | None = None


def packed_mask(
    document_ids: Tensor,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None = None,
    head_size: int = 64,
    *,
    is_compiled: bool = False,
) -> PackedMask:
    """Return the attention structure of document_ids [B, S].

    Padding (0) counts as one more document, so that no row of scores is empty. Rows of a single
    document need no mask. On a CPU each row is inspected, and a single row with cu_seqlens is
    computed document by document. On other devices only the length of cu_seqlens is used and
    nothing is copied to the host, so that the step has no host sync.

    dtype:       the dtype in which attention computes
    cu_seqlens:  int32, as `document_cu_seqlens` returns it; None computes a bias [B, 1, S, S]
    head_size:   width of an attention head; decides whether flash attention is available
    is_compiled: whether the layers are compiled. Lengths of documents are then not passed as Python
                 numbers, because these would cause a compilation for every batch.
    """
    rows = None
    if document_ids.device.type == "cpu":
        is_packed = (document_ids != 1).any(1).tolist()
        rows = [row for row, several_documents in enumerate(is_packed) if several_documents]
        if not rows:
            return PackedMask()
        if len(document_ids) == 1 and cu_seqlens is not None and not is_compiled:
            sizes, counts = torch.unique_consecutive(cu_seqlens.diff(), return_counts=True)
            runs = zip(counts.tolist(), sizes.tolist(), strict=True)
            return PackedMask(runs=[(count, size) for count, size in runs if size])
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
    mask: PackedMask = PackedMask(),
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V per head, within documents (Vaswani et al. 2017, section 3.2).

    qkv:     [B, S, 3H] any float dtype, the projections for query, key and value side by side
    num_heads: divides H
    mask:    the tokens that each token attends to, from `packed_mask`; all tokens by default
    dropout: on the probabilities; 0 outside training
    backend: "bmm" (batched products in one autograd function, the fastest on CPUs), "sdpa"
             (scaled_dot_product_attention), "varlen" (flash attention over cu_seqlens; needs
             mask.cu_seqlens), or "auto"
    Returns [B, S, H] in the dtype of qkv.
    """
    if mask.runs is not None:
        return _attention_by_document(qkv, num_heads, mask.runs, dropout)
    if backend == "auto":
        backend = "bmm" if qkv.device.type == "cpu" else "sdpa"
        if mask.cu_seqlens is not None:
            backend = "varlen"
    if backend == "bmm":
        # Compiled code must not depend on row numbers.
        rows = None if torch.compiler.is_compiling() else mask.rows
        return _BmmAttention.apply(qkv, num_heads, mask.bias, rows, dropout)
    batch, length, width = qkv.shape
    heads = qkv.view(batch, length, 3, num_heads, width // 3 // num_heads)
    if backend == "varlen":
        q, k, v = heads.flatten(0, 1).unbind(1)  # [B*S, N, D] each
        # The operator that torch's varlen_attn and jagged attention call; varlen_attn has no
        # dropout.
        lengths = (mask.cu_seqlens, mask.cu_seqlens, length, length)
        outputs = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, dropout, False, False)
        return outputs[0].reshape(batch, length, -1)
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # [B, N, S, D] each
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bias, dropout_p=dropout)
    return out.transpose(1, 2).reshape(batch, length, -1)


def _attention_by_document(
    qkv: Tensor, num_heads: int, runs: list[tuple[int, int]], dropout: float
) -> Tensor:
    """Attention of a single row [1, S, 3H], one batched product per run of equal lengths."""
    parts = qkv[0].split([count * size for count, size in runs])
    outputs = [
        _BmmAttention.apply(part.view(count, size, -1), num_heads, None, None, dropout).flatten(
            0, 1
        )
        for part, (count, size) in zip(parts, runs, strict=True)
    ]
    return torch.cat(outputs)[None]


def _has_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Return whether flash attention over cu_seqlens is available.

    It needs half precision, a head size of a multiple of 8 up to 256, and Ampere or later.
    """
    is_fit = dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0 and head_size <= 256
    return is_fit and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


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
        dropout: float,
    ) -> Tensor:
        batch, length, width = qkv.shape
        size = width // 3 // num_heads
        heads = qkv.view(batch, length, 3, num_heads, size).permute(2, 0, 3, 1, 4).contiguous()
        q, k, v = heads.view(3, batch * num_heads, length, size)
        scores = torch.baddbmm(
            q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=1 / math.sqrt(size)
        )  # [B*N, S, S]
        if bias is not None:
            if rows is None:
                scores.view(batch, num_heads, length, length).add_(bias)
            else:
                for row in rows:
                    scores[row * num_heads : (row + 1) * num_heads].add_(bias[row])
        probs = torch.softmax(scores, -1)
        factors = dropout_factors(probs, dropout) if dropout else None
        out = torch.bmm(probs if factors is None else probs * factors, v)  # [B*N, S, D]
        ctx.save_for_backward(heads, probs, factors)
        return out.view(batch, num_heads, length, size).transpose(1, 2).reshape(batch, length, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        heads, probs, factors = ctx.saved_tensors
        _, batch, num_heads, length, size = heads.shape
        q, k, v = heads.view(3, batch * num_heads, length, size)
        grad = (
            grad.view(batch, length, num_heads, size)
            .transpose(1, 2)
            .reshape(batch * num_heads, length, size)
        )
        dheads = torch.empty_like(heads)
        dq, dk, dv = dheads.view(3, batch * num_heads, length, size)
        torch.bmm((probs if factors is None else probs * factors).transpose(1, 2), grad, out=dv)
        dprobs = torch.bmm(grad, v.transpose(1, 2))
        if factors is not None:
            dprobs.mul_(factors)
        dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
        scale = 1 / math.sqrt(size)
        torch.baddbmm(q.new_empty(1), dscores, k, beta=0, alpha=scale, out=dq)
        torch.baddbmm(q.new_empty(1), dscores.transpose(1, 2), q, beta=0, alpha=scale, out=dk)
        dqkv = dheads.permute(1, 3, 0, 2, 4).reshape(batch, length, -1)
        return dqkv, None, None, None, None
