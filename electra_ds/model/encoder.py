"""Embeddings and encoder: BERT's post-LN transformer (ELECTRA, section 3.1).

The objectives and fine-tuning use an encoder only through `encode` and the interface of
`EncoderBase`.

Dimensions: B rows, S sequence, H hidden, E embedding, V vocabulary, N selected positions.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from electra_ds.common.errors import UserError
from electra_ds.config.schema import EncoderConfig, ModelConfig
from electra_ds.model.kernels.attention import PackedMask, attention, packed_mask
from electra_ds.model.kernels.dropout import dropout
from electra_ds.model.kernels.linear import GeluLinear, Linear
from electra_ds.model.kernels.vocab_head import CHUNK


def padded_size(vocab_size: int) -> int:
    """Return the rows of the word table in memory: the next multiple of 64.

    Matrix units and the chunks of sampling need such a multiple.
    """
    return -(-vocab_size // CHUNK) * CHUNK


def known_vocab_size(config: ModelConfig) -> int:
    """Return config.vocab_size; UserError when it is not set."""
    if config.vocab_size is None:
        raise UserError(
            "model.vocab_size = null; expected the size of the vocabulary: pass the data, or set "
            "model.vocab_size"
        )
    return config.vocab_size


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products of x: that of autocast if it is on, else x.dtype."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Embeddings(nn.Module):
    """Sum of word, token type and position embeddings, LayerNorm, dropout: [B, S] -> [B, S, E]."""

    def __init__(self, config: ModelConfig, embedding_size: int, hidden_dropout: float) -> None:
        super().__init__()
        vocab_size = known_vocab_size(config)
        self.dropout = hidden_dropout
        self.word = nn.Embedding(padded_size(vocab_size), embedding_size)
        self.position = nn.Embedding(config.max_positions, embedding_size)
        self.token_type = nn.Embedding(config.type_vocab_size, embedding_size)
        self.norm = nn.LayerNorm(embedding_size, config.layer_norm_eps)
        self.true_rows = {"word.weight": vocab_size}

    def forward(self, input_ids: Tensor, segment_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.word(input_ids) + self.token_type(segment_ids) + self.position(position_ids)
        return dropout(self.norm(x), self.dropout, self.training)


class EncoderBase(nn.Module):
    """Interface of an encoder: embedded rows [B, S, E] -> hidden states [B, S, H].

    A subclass sets `layers` and `head_size` in its constructor.
    """

    layers: nn.ModuleList  # the units of compilation and of activation checkpointing
    head_size: int  # width of an attention head

    def __init__(self) -> None:
        super().__init__()
        self.recompute_layers = False  # activation checkpointing: less memory, the same results
        self.layers_are_compiled = False

    def forward(
        self,
        x: Tensor,
        document_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states of x.

        x:            [B, S, E] embedded rows
        document_ids: [B, S] int64, 0 = padding; tokens attend within their document
        position_ids: [B, S] int64, for encoders that use positions in their layers
        cu_seqlens:   int32 starts of the documents (`kernels.attention.document_cu_seqlens`)
        positions:    [N] int64 positions in the flattened batch, for which states are returned
        Returns [B, S, H] in the compute dtype (`compute_dtype`), or [N, H] with `positions`.
        """
        raise NotImplementedError

    def compile_layers(self) -> None:
        """torch.compile every layer in place; parameter names do not change."""
        self.layers_are_compiled = True
        for layer in self.layers:
            layer.compile(dynamic=False)


class Layer(nn.Module):
    """One post-LN transformer layer: x = norm(x + attention(x)); x = norm(x + ffn(x))."""

    def __init__(self, sizes: EncoderConfig, eps: float) -> None:
        super().__init__()
        hidden = sizes.hidden_size
        self.num_heads = sizes.num_heads
        self.dropout = sizes.hidden_dropout
        self.attention_dropout = sizes.attention_dropout
        self.qkv = Linear(hidden, 3 * hidden)
        self.out = Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps)
        self.ffn_in = Linear(hidden, sizes.ffn_size)
        self.ffn_out = GeluLinear(sizes.ffn_size, hidden)
        self.ffn_norm = nn.LayerNorm(hidden, eps)

    def forward(self, x: Tensor, mask: PackedMask, positions: Tensor | None = None) -> Tensor:
        """x [B, S, H] -> [B, S, H], or [N, H] at positions [N] of the flattened batch."""
        attention_dropout = self.attention_dropout if self.training else 0.0
        attended = attention(self.qkv(x), self.num_heads, mask, attention_dropout)
        if positions is not None:
            x = x.flatten(0, 1).index_select(0, positions)  # [N, H]
            attended = attended.flatten(0, 1).index_select(0, positions)
        x = self.attention_norm(x + dropout(self.out(attended), self.dropout, self.training))
        change = self.ffn_out(self.ffn_in(x))
        return self.ffn_norm(x + dropout(change, self.dropout, self.training))


class Encoder(EncoderBase):
    """BERT's encoder, with a projection before the layers where E != H."""

    def __init__(self, sizes: EncoderConfig, embedding_size: int, eps: float) -> None:
        super().__init__()
        self.head_size = sizes.hidden_size // sizes.num_heads
        is_projected = sizes.hidden_size != embedding_size
        self.project = Linear(embedding_size, sizes.hidden_size) if is_projected else None
        self.layers = nn.ModuleList(Layer(sizes, eps) for _ in range(sizes.num_layers))

    def forward(
        self,
        x: Tensor,
        document_ids: Tensor,
        *,
        position_ids: Tensor | None = None,  # unused: positions are embedded
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        dtype = compute_dtype(x)
        x = x.to(dtype) if self.project is None else self.project(x)
        mask = packed_mask(
            document_ids, dtype, cu_seqlens, self.head_size, is_compiled=self.layers_are_compiled
        )
        for i, layer in enumerate(self.layers, 1):
            layer_positions = positions if i == len(self.layers) else None
            if self.recompute_layers and torch.is_grad_enabled():
                x = checkpoint(layer, x, mask, layer_positions, use_reentrant=False)
            else:
                x = layer(x, mask, layer_positions)
        return x


class EncoderInputs(Protocol):
    """The fields of a batch that embeddings and encoder use: [B, S] int64, and cu_seqlens."""

    @property
    def segment_ids(self) -> Tensor: ...

    @property
    def document_ids(self) -> Tensor: ...

    @property
    def position_ids(self) -> Tensor: ...

    @property
    def cu_seqlens(self) -> Tensor | None: ...


def encode(
    embeddings: nn.Module,
    encoder: EncoderBase,
    input_ids: Tensor,
    batch: EncoderInputs,
    positions: Tensor | None = None,
) -> Tensor:
    """Embed and encode input_ids [B, S] with the segments, documents and positions of batch.

    Returns hidden states [B, S, H], or [N, H] at positions [N] of the flattened batch.
    """
    embedded = embeddings(input_ids, batch.segment_ids, batch.position_ids)
    return encoder(
        embedded,
        batch.document_ids,
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        positions=positions,
    )
