"""Initial weights of every module."""

import torch
from torch import Tensor, nn

from electra_ds.config.schema import ModelConfig
from electra_ds.model.encoder import Embeddings
from electra_ds.model.heads import MaskedLMHead


@torch.no_grad()
def initialize(module: nn.Module, config: ModelConfig, seed: int | None = None) -> None:
    """Initialize all linear, embedding and LayerNorm weights of module in place.

    Biases are 0, LayerNorm weights 1. config.init is one of:

    normal: truncated at two standard deviations, init_std for matrices and embedding_init_std for
            tables. Xavier uniform, TensorFlow's default in the authors' code, for the layers named
            project, classify and copy_gate.
    fan_in: plain normal, 1 / sqrt(inputs) for matrices and embedding_init_std for tables

    Rows that pad the word table are 0 and take no random numbers, so that the padding does not
    change other weights. With a seed, the random numbers come from a separate generator.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            if config.init == "fan_in":
                part.weight.normal_(0, part.in_features**-0.5, generator=generator)
            elif name.rpartition(".")[2] in ("project", "classify", "copy_gate"):
                nn.init.xavier_uniform_(part.weight, generator=generator)
            else:
                _truncated_normal(part.weight, config.init_std, generator)
            part.bias.zero_()
        elif isinstance(part, Embeddings):
            _initialize_tables(part, config, generator)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif isinstance(part, MaskedLMHead):
            part.bias.zero_()


def _initialize_tables(
    embeddings: Embeddings, config: ModelConfig, generator: torch.Generator | None
) -> None:
    true_rows = ((embeddings.word, config.vocab_size), (embeddings.position, None))
    for table, rows in (*true_rows, (embeddings.token_type, None)):
        table.weight.zero_()
        if config.init == "fan_in":
            table.weight[:rows].normal_(0, config.embedding_init_std, generator=generator)
        else:
            _truncated_normal(table.weight[:rows], config.embedding_init_std, generator)


def _truncated_normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
