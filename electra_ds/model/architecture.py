"""Interface of an architecture: the modules of encoders and heads, and their initial weights.

Dimensions: H hidden, E embedding.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from electra_ds.config.architectures import EncoderConfig, ModelConfig
from electra_ds.model.encoder import EmbeddingsBase, EncoderBase
from electra_ds.model.heads import MaskedLMHead


class Architecture(ABC):
    """Makes the modules of one architecture, with the settings of the section `model`.

    sizes: the section `model` or `generator`, for the encoder that a module belongs to.
    embedding_size: E, the width of the word table of that encoder.
    """

    model: ModelConfig

    @abstractmethod
    def embeddings(self, sizes: EncoderConfig, embedding_size: int) -> EmbeddingsBase:
        """Return embeddings of width E."""

    @abstractmethod
    def encoder(self, sizes: EncoderConfig, embedding_size: int) -> EncoderBase:
        """Return an encoder of embedded rows of width E."""

    @abstractmethod
    def masked_lm_head(self, sizes: EncoderConfig, embedding_size: int) -> MaskedLMHead:
        """Return a head that predicts tokens."""

    @abstractmethod
    def discriminator_head(self) -> nn.Module:
        """Return a head [B, S, H] -> logits [B, S] fp32 that each token was replaced."""

    @abstractmethod
    def task_head(self, outputs: int) -> nn.Module:
        """Return a head for fine-tuning, with its dropout: [..., H] -> [..., outputs]."""

    @abstractmethod
    def initialize_linear(
        self, name: str, linear: nn.Linear, generator: torch.Generator | None
    ) -> None:
        """Set the initial weight of a linear layer for model.init = normal. name: in its module."""

    @abstractmethod
    def output_scale(self, name: str) -> float:
        """Return the factor of the initial weight of a linear layer. name: in its module."""

    @abstractmethod
    def initialize_task_head(self, head: nn.Module, seed: int) -> None:
        """Change the initial weights of a head for fine-tuning, after those of the whole module."""
