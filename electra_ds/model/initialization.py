"""Initial weights of every module."""

import torch
from torch import Tensor, nn

from electra_ds.config.schema import ModelConfig
from electra_ds.model.encoder import Embeddings
from electra_ds.model.heads import GeneratorHead


@torch.no_grad()
def initialize(module: nn.Module, config: ModelConfig, seed: int | None = None) -> None:
    """Set every weight of module in place; biases 0, LayerNorm 1 and 0.

    `normal`: truncated at two deviations, init_std for matrices and embedding_init_std for tables; Xavier-uniform for
    the embedding projection and the last layer of the discriminator (the authors' code leaves TensorFlow's default
    there). `fan_in`: plain normal, 1 / sqrt(inputs) for matrices, embedding_init_std for tables. Rows that only pad
    the word table stay 0 and draw nothing, so that the padding never changes the others. With a seed, drawn from a
    stream of its own.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            if config.init == "fan_in":
                part.weight.normal_(0, part.in_features**-0.5, generator=generator)
            elif name.rpartition(".")[2] in ("project", "classify", "copy_gate"):
                nn.init.xavier_uniform_(part.weight, generator=generator)
            else:
                _truncated(part.weight, config.init_std, generator)
            part.bias.zero_()
        elif isinstance(part, Embeddings):
            for table, rows in (
                (part.word, config.vocab_size),
                (part.position, None),
                (part.token_type, None),
            ):
                table.weight.zero_()
                if config.init == "fan_in":
                    table.weight[:rows].normal_(0, config.embedding_init_std, generator=generator)
                else:
                    _truncated(table.weight[:rows], config.embedding_init_std, generator)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif isinstance(part, GeneratorHead):
            part.bias.zero_()


def _truncated(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
