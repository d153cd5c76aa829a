"""Which tokens of packed rows attend to each other: documents, and a local window.

Dimensions: B rows, S sequence.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU documents are computed one by one, instead of whole rows with a mask, where that needs
# fewer scores. One more run of documents costs as much as this number of scores.
SCORES_OF_A_RUN = 200**2
# Sizes of the blocks of a local window.
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 64


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


class Blocks(NamedTuple):
    """Division of the flattened batch into blocks for a local window, on a CPU.

    The queries of a block attend to the keys of `reach` blocks before it, of itself, and of `reach`
    blocks after it.
    """

    size: int  # tokens of a block
    reach: int
    bias: Tensor  # [blocks, size, (2 reach + 1) size] in the compute dtype: -inf or 0


class PackedMask(NamedTuple):
    """Which tokens attend to each other, computed once per micro-batch.

    All fields None: every token attends to its whole row.
    """

    # [B or 1, 1, S queries, S keys] in the compute dtype, added to the scores: -inf or 0
    bias: Tensor | None = None
    cu_seqlens: Tensor | None = None  # as `document_cu_seqlens` returns it, on the device
    rows: list[int] | None = None  # on a CPU: the rows with a bias that is not 0
    # on a CPU: (documents, tokens of each) for each run of equal lengths in the flattened batch
    runs: list[tuple[int, int]] | None = None
    # tokens before and after a token that it attends to; applied by the flash kernel only
    window: int | None = None
    blocks: Blocks | None = None


def packed_mask(
    document_ids: Tensor,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None = None,
    head_size: int = 64,
    *,
    window: int | None = None,
    is_compiled: bool = False,
    has_flash: bool = True,
) -> PackedMask:
    """Return the attention structure of document_ids [B, S].

    Padding (0) counts as one more document, so that no row of scores is empty. Rows of a single
    document need no mask. On a CPU each row is inspected, and long rows of several documents are
    computed document by document. On other devices only the length of cu_seqlens is used and
    nothing is copied to the host, so that the step has no host sync.

    dtype:       the dtype in which attention computes
    cu_seqlens:  int32, as `document_cu_seqlens` returns it; None computes a bias
    head_size:   width of an attention head; decides whether flash attention is available
    window:      tokens before and after a token that it attends to; None: the whole document
    is_compiled: whether the layers are compiled. Lengths of documents are then not passed as Python
                 numbers, because these would cause a compilation for every batch.
    has_flash:   whether the attention may be computed by the flash kernel, which takes no scores
    """
    batch, length = document_ids.shape
    if window is not None and window >= length - 1:
        window = None
    if document_ids.device.type == "cpu":
        if window is not None:
            return _local_mask_on_cpu(document_ids, dtype, window)
        return _global_mask_on_cpu(document_ids, dtype, None if is_compiled else cu_seqlens)
    if cu_seqlens is not None:
        is_one_document = len(cu_seqlens) == batch + 1  # in every row
        if window is None and is_one_document:
            return PackedMask()
        if has_flash and _has_varlen(document_ids.device, dtype, head_size):
            return PackedMask(cu_seqlens=cu_seqlens, window=window)
        if is_one_document:
            document_ids = document_ids[:1]
    return PackedMask(_bias(document_ids, dtype, window))


def _global_mask_on_cpu(
    document_ids: Tensor, dtype: torch.dtype, cu_seqlens: Tensor | None
) -> PackedMask:
    """The mask without a window. cu_seqlens: None excludes the computation by documents."""
    is_packed = (document_ids != 1).any(1).tolist()
    rows = [row for row, several_documents in enumerate(is_packed) if several_documents]
    if not rows:
        return PackedMask()
    if cu_seqlens is not None:
        sizes, counts = torch.unique_consecutive(cu_seqlens.diff(), return_counts=True)
        pairs = zip(counts.tolist(), sizes.tolist(), strict=True)
        runs = [(count, size) for count, size in pairs if size]
        scores = sum(count * size**2 + SCORES_OF_A_RUN for count, size in runs)
        if len(document_ids) == 1 or scores < len(document_ids) * document_ids.shape[1] ** 2:
            return PackedMask(runs=runs)
    return PackedMask(_bias(document_ids, dtype), rows=rows)


def _local_mask_on_cpu(document_ids: Tensor, dtype: torch.dtype, window: int) -> PackedMask:
    """The mask with a window: blocks, or a bias where blocks would need more scores than rows."""
    length = document_ids.shape[1]
    size = max(SMALLEST_BLOCK, min(window, LARGEST_BLOCK))
    reach = -(-window // size)
    if (2 * reach + 1) * size < length:
        return PackedMask(blocks=_blocks(document_ids, dtype, window, size, reach))
    is_packed = bool((document_ids != 1).any())
    return PackedMask(_bias(document_ids if is_packed else document_ids[:1], dtype, window))


def _bias(document_ids: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Return [B, 1, S, S]: 0 where two tokens attend to each other, else -inf."""
    apart = document_ids[:, None, :, None] != document_ids[:, None, None, :]
    if window is not None:
        positions = torch.arange(
            document_ids.shape[1], dtype=torch.int32, device=document_ids.device
        )
        apart |= (positions[:, None] - positions).abs() > window
    return torch.zeros(apart.shape, dtype=dtype, device=apart.device).masked_fill_(apart, -math.inf)


def _blocks(document_ids: Tensor, dtype: torch.dtype, window: int, size: int, reach: int) -> Blocks:
    """The blocks of document_ids [B, S]. size, reach: see `Blocks`. window: as in `packed_mask`."""
    batch, length = document_ids.shape
    tokens = batch * length
    count = -(-tokens // size)
    row_starts = torch.arange(batch)[:, None] * (length + 1)  # documents of two rows differ
    ids = F.pad((document_ids + row_starts).view(-1), (0, count * size - tokens), value=-1)
    keys = neighbors(ids.view(1, -1, 1), size, reach, fill=-2).view(count, 1, -1)
    apart = ids.view(count, size, 1) != keys
    offsets = torch.arange(size)[:, None] + reach * size - torch.arange((2 * reach + 1) * size)
    apart |= offsets.abs() > window
    bias = torch.zeros(apart.shape, dtype=dtype).masked_fill_(apart, -math.inf)
    return Blocks(size, reach, bias)


def neighbors(x: Tensor, size: int, reach: int, fill: float = 0.0) -> Tensor:
    """Return each block of x [N, T, D] with the blocks around it, [N * T / size, keys, D].

    keys = (2 reach + 1) size. T is a multiple of size. Blocks beyond the ends are filled.
    """
    heads, tokens, width = x.shape
    padded = F.pad(x, (0, 0, reach * size, reach * size), value=fill)
    shifted = [
        padded[:, j * size : j * size + tokens].reshape(heads, -1, size, width)
        for j in range(2 * reach + 1)
    ]
    return torch.cat(shifted, 2).flatten(0, 1)


def add_neighbors(grad: Tensor, heads: int, size: int, reach: int) -> Tensor:
    """Return the gradient [N, T, D] of x in `neighbors`, for the gradient of its result."""
    width = grad.shape[-1]
    parts = grad.view(heads, -1, 2 * reach + 1, size, width)
    tokens = parts.shape[1] * size
    padded = grad.new_zeros(heads, tokens + 2 * reach * size, width)
    for j in range(2 * reach + 1):
        padded[:, j * size : j * size + tokens] += parts[:, :, j].reshape(heads, tokens, width)
    return padded[:, reach * size : reach * size + tokens]


def _has_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Return whether flash attention over cu_seqlens is available.

    It needs half precision, a head size of a multiple of 8 up to 256, and Ampere or later.
    """
    is_fit = dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0 and head_size <= 256
    return is_fit and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
