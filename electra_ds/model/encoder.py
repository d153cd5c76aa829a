"""The encoder with its embeddings and heads (ELECTRA, section 3.1; BERT's post-LN transformer), and how they start.

Letters: B rows, S sequence, K masked positions, H hidden, E embedding, V vocabulary, P = V padded in memory.
"""

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
    """Rows of the word table in memory: the next multiple of 64, for the matrix units and the sampling chunks."""
    return -(-vocab_size // CHUNK) * CHUNK


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of x are made: autocast's where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Embeddings(nn.Module):
    """Word + token type + position, LayerNorm, dropout: [B, S] ids -> [B, S, E]."""

    def __init__(self, config: ModelConfig, embedding_size: int, hidden_dropout: float):
        super().__init__()
        if config.vocab_size is None:
            raise UserError("model.vocab_size is not known: it comes with the data, or set it")
        self.dropout = hidden_dropout
        self.word = nn.Embedding(padded_size(config.vocab_size), embedding_size)
        self.position = nn.Embedding(config.max_positions, embedding_size)
        self.token_type = nn.Embedding(config.type_vocab_size, embedding_size)
        self.norm = nn.LayerNorm(embedding_size, config.layer_norm_eps)
        self.true_rows = {"word.weight": config.vocab_size}

    def forward(self, input_ids: Tensor, segment_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.word(input_ids) + self.token_type(segment_ids) + self.position(position_ids)
        return dropout(self.norm(x), self.dropout, self.training)


class Layer(nn.Module):
    """One post-LN transformer layer: x = norm(x + attention(x)); x = norm(x + ffn(x))."""

    def __init__(self, sizes: EncoderConfig, eps: float):
        super().__init__()
        hidden = sizes.hidden_size
        self.num_heads, self.dropout = sizes.num_heads, sizes.hidden_dropout
        self.attention_dropout = sizes.attention_dropout
        self.qkv = Linear(hidden, 3 * hidden)
        self.out = Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps)
        self.ffn_in = Linear(hidden, sizes.ffn_size)
        self.ffn_out = GeluLinear(sizes.ffn_size, hidden)
        self.ffn_norm = nn.LayerNorm(hidden, eps)

    def forward(
        self, x: Tensor, pieces: PackedMask, places: Tensor | None = None
    ) -> Tensor:  # [B, S, H]
        seen = attention(
            self.qkv(x), self.num_heads, pieces, self.attention_dropout if self.training else 0.0
        )
        if (
            places is not None
        ):  # [N] in the flattened batch: the result is needed there alone, [N, H]
            x, seen = (t.flatten(0, 1).index_select(0, places) for t in (x, seen))
        x = self.attention_norm(x + dropout(self.out(seen), self.dropout, self.training))
        change = self.ffn_out(self.ffn_in(x))
        return self.ffn_norm(x + dropout(change, self.dropout, self.training))


class Encoder(nn.Module):
    """Embedded rows [B, S, E] -> hidden [B, S, H], or at places [N] of the flattened batch alone [N, H]; a projection
    first where E != H."""

    def __init__(self, sizes: EncoderConfig, embedding_size: int, eps: float):
        super().__init__()
        self.recompute_layers = False  # activation checkpointing: less memory, the same numbers
        self.head_size = sizes.hidden_size // sizes.num_heads
        same = sizes.hidden_size == embedding_size
        self.project = None if same else Linear(embedding_size, sizes.hidden_size)
        self.layers = nn.ModuleList(Layer(sizes, eps) for _ in range(sizes.num_layers))

    def forward(
        self,
        x: Tensor,
        document_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        dtype = compute_dtype(x)
        x = x.to(dtype) if self.project is None else self.project(x)
        pieces = packed_mask(document_ids, dtype, cu_seqlens, self.head_size)
        for i, layer in enumerate(self.layers, 1):
            at = places if i == len(self.layers) else None
            if self.recompute_layers and torch.is_grad_enabled():
                x = checkpoint(layer, x, pieces, at, use_reentrant=False)
            else:
                x = layer(x, pieces, at)
        return x
