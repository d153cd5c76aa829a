"""Initial weights of every module."""

import torch
from torch import Tensor, nn

from electra_ds.model.architecture import Architecture
from electra_ds.model.encoder import EmbeddingsBase, EncoderBase
from electra_ds.model.heads import MaskedLMHead


@torch.no_grad()
def initialize(module: nn.Module, architecture: Architecture, seed: int | None = None) -> None:
    """Initialize all linear, embedding and LayerNorm weights of module in place.

    Biases are 0, LayerNorm weights 1. model.init is one of:

    normal: truncated at two standard deviations, init_std for matrices and embedding_init_std for
            tables, with the exceptions of the architecture
    fan_in: plain normal, 1 / sqrt(inputs) for matrices, times the factor `output_scale` of the
            architecture, and embedding_init_std for tables

    Tables of deltas (`EmbeddingsBase.is_delta`) are 0. Rows that pad the word table are 0 and take
    no random numbers, so that the padding does not change other weights. With a seed, the random
    numbers come from a separate generator.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    is_fan_in = architecture.model.init == "fan_in"
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            if is_fan_in:
                std = part.in_features**-0.5 * architecture.output_scale(name)
                part.weight.normal_(0, std, generator=generator)
            else:
                architecture.initialize_linear(name, part, generator)
            if part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, EmbeddingsBase | EncoderBase):
            _initialize_tables(part, architecture, generator)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif isinstance(part, MaskedLMHead):
            part.bias.zero_()


def _initialize_tables(
    part: EmbeddingsBase | EncoderBase,
    architecture: Architecture,
    generator: torch.Generator | None,
) -> None:
    std = architecture.model.embedding_init_std
    for table, rows in part.tables():
        table.weight.zero_()
        if isinstance(part, EmbeddingsBase) and part.is_delta:
            continue
        if architecture.model.init == "fan_in":
            table.weight[:rows].normal_(0, std, generator=generator)
        else:
            truncated_normal(table.weight[:rows], std, generator)


def truncated_normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Draw weight in place from a normal distribution that is cut at two standard deviations."""
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
