"""Heads of both encoders.

Letters: B rows, S sequence, K masked positions, H hidden, E embedding, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_ds.config.schema import ModelConfig
from electra_ds.model.encoder import compute_dtype, padded_size
from electra_ds.model.kernels.linear import Linear, linear
from electra_ds.model.kernels.vocab_head import HeadResult, vocab_head


class GeneratorHead(nn.Module):
    """Hidden states at the masked positions -> logits over the vocabulary by the word table, or loss and samples."""

    def __init__(self, config: ModelConfig, hidden_size: int, embedding_size: int):
        super().__init__()
        self.vocab_size = config.vocab_size
        self.dense = Linear(hidden_size, embedding_size)
        self.norm = nn.LayerNorm(embedding_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(padded_size(config.vocab_size)))
        self.true_rows = {"bias": config.vocab_size}

    def forward(
        self, hidden: Tensor, word: nn.Embedding, draw: dict | None = None
    ) -> Tensor | HeadResult:
        """hidden [B, K, H], the embedding whose table is the output matrix; logits [B, K, V], or with `draw`
        (the other arguments of ops.vocab_head: targets, weights, uniforms [B, K], ...) its HeadResult."""
        x = self.norm(F.gelu(self.dense(hidden)))  # [B, K, E]
        x = x.to(compute_dtype(x))
        if draw is None:
            return linear(x, word.weight.to(x.dtype), self.bias.to(x.dtype))[..., : self.vocab_size]
        return vocab_head(x, word.weight, self.bias, vocab_size=self.vocab_size, **draw)


class DiscriminatorHead(nn.Module):
    """Hidden states -> one logit per token: was it replaced? [B, S, H] -> [B, S] fp32."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.dense = Linear(hidden_size, hidden_size)
        self.classify = Linear(hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classify(F.gelu(self.dense(hidden))).squeeze(-1).float()
