"""The architecture `modernbert`: ModernBERT's pre-LN transformer (Warner et al. 2024, section 2.1).

It has rotary positions, a gated feed-forward layer (GEGLU), layers with global and with local
attention, and no biases in the layers. The mathematics is that of ModernBertModel in transformers.

Dimensions: B rows, S sequence, H hidden, N selected positions.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_ds.config.architectures import (
    AttentionKind,
    EncoderConfig,
    ModernBertEncoderConfig,
    ModernBertModelConfig,
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
from electra_ds.model.kernels.linear import GegluLinear, Linear
from electra_ds.model.kernels.rotary import Rotary, rotary_tables


class Embeddings(EmbeddingsBase):
    """Word embeddings, LayerNorm, dropout: [B, S] -> [B, S, H].

    Segments and positions are not used: positions are applied in the layers.
    """

    def __init__(self, vocab_size: int, sizes: ModernBertEncoderConfig, eps: float) -> None:
        super().__init__(vocab_size, sizes.hidden_size, sizes.embedding_dropout)
        self.norm = nn.LayerNorm(sizes.hidden_size, eps, bias=False)


class Layer(nn.Module):
    """One pre-LN layer: x = x + attention(norm(x)); x = x + ffn(norm(x)).

    The first layer has no LayerNorm before its attention, because the embeddings end with one.
    """

    stacked: ClassVar = {
        "qkv.weight": 3,
        "ffn_in.weight": 2,
    }  # matrices on the first axis of a parameter

    def __init__(self, sizes: ModernBertEncoderConfig, eps: float, is_first: bool) -> None:
        super().__init__()
        hidden = sizes.hidden_size
        self.num_heads = sizes.num_heads
        self.attention_dropout = sizes.attention_dropout
        self.mlp_dropout = sizes.mlp_dropout
        self.attention_norm = None if is_first else nn.LayerNorm(hidden, eps, bias=False)
        self.qkv = Linear(hidden, 3 * hidden, bias=False)
        self.out = Linear(hidden, hidden, bias=False)
        self.ffn_norm = nn.LayerNorm(hidden, eps, bias=False)
        self.ffn_in = Linear(hidden, 2 * sizes.ffn_size, bias=False)
        self.ffn_out = GegluLinear(sizes.ffn_size, hidden, bias=False)

    def forward(
        self, x: Tensor, mask: PackedMask, rotary: Rotary, positions: Tensor | None = None
    ) -> Tensor:
        """x [B, S, H] -> [B, S, H], or [N, H] at positions [N] of the flattened batch."""
        dtype = compute_dtype(x)
        normed = x if self.attention_norm is None else self.attention_norm(x)
        attention_dropout = self.attention_dropout if self.training else 0.0
        qkv = self.qkv(normed.to(dtype))
        attended = attention(qkv, self.num_heads, mask, attention_dropout, rotary=rotary)
        if positions is not None:
            x = x.flatten(0, 1).index_select(0, positions)  # [N, H]
            attended = attended.flatten(0, 1).index_select(0, positions)
        x = x + dropout(self.out(attended), self.attention_dropout, self.training)
        mlp_dropout = self.mlp_dropout if self.training else 0.0
        return x + self.ffn_out(self.ffn_in(self.ffn_norm(x).to(dtype)), mlp_dropout)


class Encoder(EncoderBase):
    """ModernBERT's encoder with its final LayerNorm.

    The sum over the layers stays in the dtype of the embedded rows: fp32 under autocast.
    """

    def __init__(self, sizes: ModernBertEncoderConfig, model: ModernBertModelConfig) -> None:
        super().__init__()
        self.head_size = sizes.head_size
        self.kinds = model.layer_kinds(sizes.num_layers)
        self.window = model.local_attention // 2
        self.apply_phase(model)
        eps = model.layer_norm_eps
        self.layers = nn.ModuleList(Layer(sizes, eps, i == 0) for i in range(sizes.num_layers))
        self.final_norm = nn.LayerNorm(sizes.hidden_size, eps, bias=False)

    def apply_phase(self, model: ModernBertModelConfig) -> None:
        self.thetas = {"global": model.global_theta, "local": model.local_theta}

    def forward(
        self,
        x: Tensor,
        document_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        assert position_ids is not None
        dtype = compute_dtype(x)
        inputs = self._inputs(document_ids, position_ids, cu_seqlens, dtype)
        for i, (kind, layer) in enumerate(zip(self.kinds, self.layers, strict=True), 1):
            layer_positions = positions if i == len(self.layers) else None
            x = self.run_layer(layer, x, *inputs[kind], layer_positions)
        return self.final_norm(x).to(dtype)

    def _inputs(
        self,
        document_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor | None,
        dtype: torch.dtype,
    ) -> dict[AttentionKind, tuple[PackedMask, Rotary]]:
        """The mask and the rotary tables of each kind of layer, once per micro-batch."""
        inputs: dict[AttentionKind, tuple[PackedMask, Rotary]] = {}
        rotary = {
            theta: rotary_tables(position_ids, self.head_size, theta)
            for theta in {self.thetas[kind] for kind in self.kinds}
        }
        for kind in set(self.kinds):
            mask = packed_mask(
                document_ids,
                dtype,
                cu_seqlens,
                self.head_size,
                window=self.window if kind == "local" else None,
                is_compiled=self.layers_are_compiled,
            )
            inputs[kind] = mask, rotary[self.thetas[kind]]
        return inputs


class TaskHead(nn.Module):
    """ModernBertPredictionHead, dropout and a linear layer: [..., H] -> [..., outputs]."""

    def __init__(
        self, hidden_size: int, outputs: int, eps: float, classifier_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = classifier_dropout
        self.dense = Linear(hidden_size, hidden_size, bias=False)
        self.norm = nn.LayerNorm(hidden_size, eps, bias=False)
        self.classify = Linear(hidden_size, outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(F.gelu(self.dense(hidden)))
        return self.classify(dropout(x.to(hidden.dtype), self.dropout, self.training))


class DiscriminatorHead(TaskHead):
    """Hidden states [B, S, H] -> logits [B, S] fp32 that each token was replaced.

    It is the head of ModernBertForTokenClassification with one label.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, 1, eps)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).squeeze(-1).float()


class ModernBertArchitecture(Architecture):
    """Modules of the architecture `modernbert`. The word table is as wide as its encoder."""

    model: ModernBertModelConfig

    def __init__(self, model: ModernBertModelConfig) -> None:
        self.model = model

    def embeddings(self, sizes: EncoderConfig, embedding_size: int) -> Embeddings:
        assert isinstance(sizes, ModernBertEncoderConfig) and embedding_size == sizes.hidden_size
        return Embeddings(known_vocab_size(self.model), sizes, self.model.layer_norm_eps)

    def encoder(self, sizes: EncoderConfig, embedding_size: int) -> Encoder:
        assert isinstance(sizes, ModernBertEncoderConfig) and embedding_size == sizes.hidden_size
        return Encoder(sizes, self.model)

    def masked_lm_head(self, sizes: EncoderConfig, embedding_size: int) -> MaskedLMHead:
        return MaskedLMHead(
            known_vocab_size(self.model),
            sizes.hidden_size,
            embedding_size,
            self.model.layer_norm_eps,
            with_inner_biases=False,
        )

    def discriminator_head(self) -> DiscriminatorHead:
        return DiscriminatorHead(self.model.hidden_size, self.model.layer_norm_eps)

    def task_head(self, outputs: int) -> TaskHead:
        model = self.model
        return TaskHead(model.hidden_size, outputs, model.layer_norm_eps, model.mlp_dropout)

    def initialize_linear(
        self, name: str, linear: nn.Linear, generator: torch.Generator | None
    ) -> None:
        """Truncated normal of init_std times `output_scale`; 1 / sqrt(H) for the last layer of a head.

        These are the values of transformers for the discriminator.
        """
        std = self.model.init_std * self.output_scale(name)
        if name.rpartition(".")[2] in ("classify", "copy_gate"):
            std = self.model.hidden_size**-0.5
        truncated_normal(linear.weight, std, generator)

    def output_scale(self, name: str) -> float:
        """1 / sqrt(2 L) for the outputs of attention and feed-forward, and dense layers of heads.

        L is the number of layers of the discriminator, in the generator as well.
        """
        is_scaled = name.rpartition(".")[2] in ("out", "ffn_out", "dense")
        return (2 * self.model.num_layers) ** -0.5 if is_scaled else 1.0

    def initialize_task_head(self, head: nn.Module, seed: int) -> None:
        """Do nothing: `initialize` has set the weights."""
