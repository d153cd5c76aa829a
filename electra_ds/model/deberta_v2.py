"""The architecture `deberta_v2`: DeBERTa's post-LN transformer with disentangled attention.

Relative positions are in the layers (He et al. 2021, section 3.1; DeBERTaV3, arXiv 2111.09543). The
mathematics is that of DebertaV2Model in transformers with shared key and query projections, log
buckets, and without convolution, position table and token types.

Dimensions: B rows, S sequence, H hidden, N selected positions, R rows of the relative table.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from electra_ds.config.architectures import (
    DebertaV2EncoderConfig,
    DebertaV2ModelConfig,
    EncoderConfig,
)
from electra_ds.model.architecture import Architecture
from electra_ds.model.electra import DiscriminatorHead, TaskHead
from electra_ds.model.encoder import (
    EmbeddingsBase,
    EncoderBase,
    compute_dtype,
    known_vocab_size,
)
from electra_ds.model.heads import MaskedLMHead
from electra_ds.model.initialization import truncated_normal
from electra_ds.model.kernels.attention_mask import PackedMask, packed_mask
from electra_ds.model.kernels.disentangled import disentangled_attention, distance_rows
from electra_ds.model.kernels.dropout import dropout
from electra_ds.model.kernels.linear import GeluLinear, Linear, linear_and_part

MAX_KEPT = 64  # results of `rows_on`, of up to 16 bytes per token of the longest document
_kept_rows: dict[tuple[int, int, int, torch.device], Tensor] = {}


def rows_on(length: int, buckets: int, max_positions: int, device: torch.device) -> Tensor:
    """Return `distance_rows` on a device, [2 S - 1] int64. The last MAX_KEPT results are kept.

    Without them, each forward of each encoder would compute the rows on the CPU and wait for their
    copy. The result must not be changed.
    """
    key = (length, buckets, max_positions, device)
    if key not in _kept_rows:
        with torch.inference_mode(False):  # autograd cannot keep a tensor of inference mode
            rows = distance_rows(length, buckets, max_positions).to(device)
        if type(rows) is not Tensor:  # a fake tensor has no data
            return rows
        while len(_kept_rows) >= MAX_KEPT:
            del _kept_rows[next(iter(_kept_rows))]
        _kept_rows[key] = rows
    return _kept_rows[key]


class Embeddings(EmbeddingsBase):
    """Word embeddings, LayerNorm, dropout: [B, S] -> [B, S, H].

    Segments and positions are not used: positions are applied in the layers.
    """

    def __init__(self, vocab_size: int, sizes: DebertaV2EncoderConfig, eps: float) -> None:
        super().__init__(vocab_size, sizes.hidden_size, sizes.hidden_dropout)
        self.norm = nn.LayerNorm(sizes.hidden_size, eps)


class Relative(NamedTuple):
    """Embeddings of the relative positions of a micro-batch.

    embeddings: [R, H] in the compute dtype: those of all distances, or the whole table.
    rows:       [2 L - 1] int64, the row of each distance from L - 1 down to 1 - L, for documents of
                up to L tokens; None: they are the embeddings themselves.
    """

    embeddings: Tensor
    rows: Tensor | None


class QkvLinear(Linear):
    """Projections for query, key and value, of which the first two also project positions."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 3 * hidden_size)

    def forward(self, x: Tensor, relative: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x [B, S, H], relative [R, H] -> [B, S, 3H], [R, 2H]."""
        dtype = compute_dtype(x)
        query_and_key = 2 * self.in_features
        return linear_and_part(
            x.to(dtype), relative.to(dtype), self.weight, self.bias, query_and_key
        )


class Layer(nn.Module):
    """One post-LN layer: x = norm(x + attention(x)); x = norm(x + ffn(x))."""

    stacked: ClassVar = {"qkv.weight": 3}  # matrices on the first axis of a parameter

    def __init__(self, sizes: DebertaV2EncoderConfig, eps: float) -> None:
        super().__init__()
        hidden = sizes.hidden_size
        self.num_heads = sizes.num_heads
        self.dropout = sizes.hidden_dropout
        self.attention_dropout = sizes.attention_dropout
        self.qkv = QkvLinear(hidden)
        self.out = Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps)
        self.ffn_in = Linear(hidden, sizes.ffn_size)
        self.ffn_out = GeluLinear(sizes.ffn_size, hidden)
        self.ffn_norm = nn.LayerNorm(hidden, eps)

    def forward(
        self, x: Tensor, mask: PackedMask, relative: Relative, positions: Tensor | None = None
    ) -> Tensor:
        """x [B, S, H] -> [B, S, H], or [N, H] at positions [N] of the flattened batch."""
        embeddings = dropout(relative.embeddings, self.dropout, self.training)
        qkv, of_positions = self.qkv(x, embeddings)
        if relative.rows is not None:
            of_positions = of_positions.index_select(0, relative.rows)  # [2 L - 1, 2H]
        attention_dropout = self.attention_dropout if self.training else 0.0
        attended = disentangled_attention(
            qkv, of_positions, self.num_heads, mask, attention_dropout
        )
        if positions is not None:
            x = x.flatten(0, 1).index_select(0, positions)  # [N, H]
            attended = attended.flatten(0, 1).index_select(0, positions)
        x = self.attention_norm(x + dropout(self.out(attended), self.dropout, self.training))
        change = self.ffn_out(self.ffn_in(x))
        return self.ffn_norm(x + dropout(change, self.dropout, self.training))


class Encoder(EncoderBase):
    """DeBERTa's encoder, with the table of relative positions that all its layers use.

    The tokens of a document are neighbours in a row, so their distances are those in the row.
    """

    def __init__(self, sizes: DebertaV2EncoderConfig, model: DebertaV2ModelConfig) -> None:
        super().__init__()
        self.head_size = sizes.head_size
        self.buckets, self.max_positions = model.position_buckets, model.max_positions
        eps = model.layer_norm_eps
        self.relative = nn.Embedding(2 * self.buckets, sizes.hidden_size)
        self.relative_norm = nn.LayerNorm(sizes.hidden_size, eps)
        self.layers = nn.ModuleList(Layer(sizes, eps) for _ in range(sizes.num_layers))

    def tables(self) -> list[tuple[nn.Embedding, int]]:
        return [(self.relative, len(self.relative.weight))]

    def forward(
        self,
        x: Tensor,
        document_ids: Tensor,
        *,
        position_ids: Tensor | None = None,  # unused: distances are those in the row
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        dtype = compute_dtype(x)
        x = x.to(dtype)
        mask = packed_mask(
            document_ids,
            dtype,
            cu_seqlens,
            self.head_size,
            is_compiled=self.layers_are_compiled,
            has_flash=False,
        )
        longest = document_ids.shape[1]
        if mask.runs is not None:
            longest = max(size for _, size in mask.runs)
        relative = self._relative(longest, x.device, dtype)
        for i, layer in enumerate(self.layers, 1):
            layer_positions = positions if i == len(self.layers) else None
            x = self.run_layer(layer, x, mask, relative, layer_positions)
        return x

    def _relative(self, length: int, device: torch.device, dtype: torch.dtype) -> Relative:
        """The embeddings of the distances in documents of up to `length` tokens."""
        rows = None
        if 2 * length - 1 <= self.buckets + 1:  # each distance has a row of its own
            used = torch.arange(self.buckets + length - 1, self.buckets - length, -1, device=device)
        else:
            used = torch.arange(2 * self.buckets, device=device)
            rows = rows_on(length, self.buckets, self.max_positions, device)
        return Relative(self.relative_norm(self.relative(used)).to(dtype), rows)


class DebertaV2Architecture(Architecture):
    """Modules of the architecture `deberta_v2`. The word table is as wide as its encoder."""

    model: DebertaV2ModelConfig

    def __init__(self, model: DebertaV2ModelConfig) -> None:
        self.model = model

    def embeddings(self, sizes: EncoderConfig, embedding_size: int) -> Embeddings:
        assert isinstance(sizes, DebertaV2EncoderConfig) and embedding_size == sizes.hidden_size
        return Embeddings(known_vocab_size(self.model), sizes, self.model.layer_norm_eps)

    def encoder(self, sizes: EncoderConfig, embedding_size: int) -> Encoder:
        assert isinstance(sizes, DebertaV2EncoderConfig) and embedding_size == sizes.hidden_size
        return Encoder(sizes, self.model)

    def masked_lm_head(self, sizes: EncoderConfig, embedding_size: int) -> MaskedLMHead:
        vocab_size = known_vocab_size(self.model)
        return MaskedLMHead(
            vocab_size, sizes.hidden_size, embedding_size, self.model.layer_norm_eps
        )

    def discriminator_head(self) -> DiscriminatorHead:
        return DiscriminatorHead(self.model.hidden_size)

    def task_head(self, outputs: int) -> TaskHead:
        return TaskHead(self.model.hidden_size, outputs, self.model.hidden_dropout)

    def initialize_linear(
        self, name: str, linear: nn.Linear, generator: torch.Generator | None
    ) -> None:
        """Truncated normal of init_std for every layer."""
        truncated_normal(linear.weight, self.model.init_std, generator)

    def output_scale(self, name: str) -> float:
        return 1.0

    def initialize_task_head(self, head: nn.Module, seed: int) -> None:
        """Do nothing: `initialize` has set the weights."""
