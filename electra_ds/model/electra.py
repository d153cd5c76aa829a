"""The architecture `electra`: BERT's post-LN transformer (ELECTRA, section 3.1).

Dimensions: B rows, S sequence, H hidden, E embedding, N selected positions.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_ds.config.architectures import (
    ElectraEncoderConfig,
    ElectraModelConfig,
    EncoderConfig,
)
from electra_ds.model.architecture import Architecture
from electra_ds.model.encoder import (
    EmbeddingsBase,
    EncoderBase,
    compute_dtype,
    known_vocab_size,
)
from electra_ds.model.heads import MaskedLMHead
from electra_ds.model.initialization import truncated_normal
from electra_ds.model.kernels.attention import attention
from electra_ds.model.kernels.attention_mask import PackedMask, packed_mask
from electra_ds.model.kernels.dropout import dropout
from electra_ds.model.kernels.linear import GeluLinear, Linear


class Embeddings(EmbeddingsBase):
    """Sum of word, token type and position embeddings, LayerNorm, dropout: [B, S] -> [B, S, E]."""

    def __init__(
        self, config: ElectraModelConfig, embedding_size: int, hidden_dropout: float
    ) -> None:
        super().__init__(known_vocab_size(config), embedding_size, hidden_dropout)
        self.position = nn.Embedding(config.max_positions, embedding_size)
        self.token_type = nn.Embedding(config.type_vocab_size, embedding_size)
        self.norm = nn.LayerNorm(embedding_size, config.layer_norm_eps)

    def tables(self) -> list[tuple[nn.Embedding, int]]:
        others = [(table, len(table.weight)) for table in (self.position, self.token_type)]
        return super().tables() + others

    def look_up(self, input_ids: Tensor, segment_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.word(input_ids) + self.token_type(segment_ids) + self.position(position_ids)


class Layer(nn.Module):
    """One post-LN transformer layer: x = norm(x + attention(x)); x = norm(x + ffn(x))."""

    stacked: ClassVar = {"qkv.weight": 3}  # matrices on the first axis of a parameter

    def __init__(self, sizes: ElectraEncoderConfig, eps: float) -> None:
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

    def __init__(self, sizes: ElectraEncoderConfig, embedding_size: int, eps: float) -> None:
        super().__init__()
        self.head_size = sizes.head_size
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
            x = self.run_layer(layer, x, mask, layer_positions)
        return x


class DiscriminatorHead(nn.Module):
    """Hidden states [B, S, H] -> logits [B, S] fp32 that each token was replaced."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = Linear(hidden_size, hidden_size)
        self.classify = Linear(hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classify(F.gelu(self.dense(hidden))).squeeze(-1).float()


class TaskHead(Linear):
    """Dropout and one linear layer (ELECTRA, appendix B): [..., H] -> [..., outputs]."""

    def __init__(self, hidden_size: int, outputs: int, hidden_dropout: float) -> None:
        super().__init__(hidden_size, outputs)
        self.dropout = hidden_dropout

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(dropout(hidden, self.dropout, self.training))


class ElectraArchitecture(Architecture):
    """Modules of the architecture `electra`."""

    model: ElectraModelConfig

    def __init__(self, model: ElectraModelConfig) -> None:
        self.model = model

    def embeddings(self, sizes: EncoderConfig, embedding_size: int) -> Embeddings:
        assert isinstance(sizes, ElectraEncoderConfig)
        return Embeddings(self.model, embedding_size, sizes.hidden_dropout)

    def encoder(self, sizes: EncoderConfig, embedding_size: int) -> Encoder:
        assert isinstance(sizes, ElectraEncoderConfig)
        return Encoder(sizes, embedding_size, self.model.layer_norm_eps)

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
        """Truncated normal; Xavier uniform, TensorFlow's default in the authors' code, for the
        layers named project, classify and copy_gate."""
        if name.rpartition(".")[2] in ("project", "classify", "copy_gate"):
            nn.init.xavier_uniform_(linear.weight, generator=generator)
        else:
            truncated_normal(linear.weight, self.model.init_std, generator)

    def output_scale(self, name: str) -> float:
        return 1.0

    def initialize_task_head(self, head: nn.Module, seed: int) -> None:
        """Xavier uniform, as in the authors' code."""
        assert isinstance(head, TaskHead)
        generator = torch.Generator().manual_seed(seed)
        nn.init.xavier_uniform_(head.weight, generator=generator)
