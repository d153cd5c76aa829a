"""The head that predicts tokens, for all architectures.

Dimensions: B rows, S sequence, K masked positions, H hidden, E embedding, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_ds.model.encoder import compute_dtype, padded_size
from electra_ds.model.kernels.linear import Linear, linear
from electra_ds.model.kernels.vocab_head import HeadResult, vocab_head


class MaskedLMHead(nn.Module):
    """Head that predicts tokens: hidden states -> logits over the vocabulary, or loss and samples.

    The output matrix is the word table. The main encoder has such a head (`mlm_head`) in the
    objectives in which it predicts tokens.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        embedding_size: int,
        eps: float,
        with_inner_biases: bool = True,
    ) -> None:
        """with_inner_biases: whether the dense layer and the LayerNorm have a bias."""
        super().__init__()
        self.vocab_size = vocab_size
        self.dense = Linear(hidden_size, embedding_size, bias=with_inner_biases)
        self.norm = nn.LayerNorm(embedding_size, eps, bias=with_inner_biases)
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
