"""Heads of generator and discriminator.

Dimensions: B rows, S sequence, K masked positions, H hidden, E embedding, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_ds.config.schema import ModelConfig
from electra_ds.model.encoder import compute_dtype, known_vocab_size, padded_size
from electra_ds.model.kernels.linear import Linear, linear
from electra_ds.model.kernels.vocab_head import HeadResult, vocab_head


class MaskedLMHead(nn.Module):
    """Head that predicts tokens: hidden states -> logits over the vocabulary, or loss and samples.

    The output matrix is the word table. The main encoder has such a head (`mlm_head`) in the
    objectives in which it predicts tokens.
    """

    def __init__(self, config: ModelConfig, hidden_size: int, embedding_size: int) -> None:
        super().__init__()
        self.vocab_size = known_vocab_size(config)
        self.dense = Linear(hidden_size, embedding_size)
        self.norm = nn.LayerNorm(embedding_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(padded_size(self.vocab_size)))
        self.true_rows = {"bias": self.vocab_size}

    def forward(
        self, hidden: Tensor, word: nn.Embedding, loss_inputs: dict[str, Any] | None = None
    ) -> Tensor | HeadResult:
        """Return logits [B, K, V] in the compute dtype, or a HeadResult with `loss_inputs`.

        hidden:      [B, K, H]
        word:        word embedding; its table [P, E] is the output matrix
        loss_inputs: other arguments of `vocab_head`: targets, weights, uniforms [B, K], ...
        """
        x = self.norm(F.gelu(self.dense(hidden)))  # [B, K, E]
        x = x.to(compute_dtype(x))
        if loss_inputs is None:
            logits = linear(x, word.weight.to(x.dtype), self.bias.to(x.dtype))
            return logits[..., : self.vocab_size]
        return vocab_head(x, word.weight, self.bias, vocab_size=self.vocab_size, **loss_inputs)


class DiscriminatorHead(nn.Module):
    """Hidden states [B, S, H] -> logits [B, S] fp32 that each token was replaced."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = Linear(hidden_size, hidden_size)
        self.classify = Linear(hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classify(F.gelu(self.dense(hidden))).squeeze(-1).float()
