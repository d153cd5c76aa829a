"""Interface of embeddings and encoders, for all architectures.

The objectives and fine-tuning use an encoder only through `encode` and the interfaces
`EmbeddingsBase` and `EncoderBase`. model/electra.py, model/modernbert.py and model/deberta_v2.py
implement them.

Dimensions: B rows, S sequence, H hidden, E embedding, V vocabulary, N selected positions.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from electra_ds.common.errors import UserError
from electra_ds.config.architectures import ModelConfig
from electra_ds.model.kernels.dropout import dropout
from electra_ds.model.kernels.vocab_head import CHUNK


def padded_size(vocab_size: int) -> int:
    """Return the rows of the word table in memory: the next multiple of 64.

    Matrix units and the chunks of sampling need such a multiple.
    """
    return -(-vocab_size // CHUNK) * CHUNK


def known_vocab_size(config: ModelConfig) -> int:
    """Return config.vocab_size; UserError when it is not set."""
    if config.vocab_size is None:
        raise UserError(
            "model.vocab_size = null; expected the size of the vocabulary: pass the data, or set "
            "model.vocab_size"
        )
    return config.vocab_size


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products of x: that of autocast if it is on, else x.dtype."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class EmbeddingsBase(nn.Module):
    """Interface of embeddings: input_ids [B, S] -> embedded rows [B, S, E].

    A subclass has a constructor that calls this one, and sets `norm` in it. With further tables it
    overrides `tables` and `look_up`.

    is_delta: the tables hold differences from those of other embeddings (`model.gdes`), at first 0.
    """

    norm: nn.Module

    def __init__(self, vocab_size: int, embedding_size: int, dropout: float) -> None:
        super().__init__()
        self.word = nn.Embedding(padded_size(vocab_size), embedding_size)
        self.true_rows = {"word.weight": vocab_size}
        self.dropout = dropout
        self.is_delta = False

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor,
        position_ids: Tensor,
        base: "EmbeddingsBase | None" = None,
    ) -> Tensor:
        """Return the normalized sum of the tables, with dropout.

        input_ids, segment_ids, position_ids: [B, S] int64
        base: embeddings with tables that are added, without a gradient
        """
        x = self.look_up(input_ids, segment_ids, position_ids)
        if base is not None:
            x = x + base.look_up(input_ids, segment_ids, position_ids).detach()
        return dropout(self.norm(x), self.dropout, self.training)

    def look_up(self, input_ids: Tensor, segment_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return the sum of the rows of all tables, [B, S, E]."""
        return self.word(input_ids)

    def tables(self) -> list[tuple[nn.Embedding, int]]:
        """The embedding tables, each with its number of rows without padding."""
        return [(self.word, self.true_rows["word.weight"])]


class EncoderBase(nn.Module):
    """Interface of an encoder: embedded rows [B, S, E] -> hidden states [B, S, H].

    A subclass sets `layers` and `head_size` in its constructor.
    """

    layers: nn.ModuleList  # the units of compilation and of activation checkpointing
    head_size: int  # width of an attention head

    def __init__(self) -> None:
        super().__init__()
        self.recompute_layers = False  # activation checkpointing: less memory, the same results
        self.layers_are_compiled = False

    def tables(self) -> list[tuple[nn.Embedding, int]]:
        """The embedding tables inside the encoder, as in `EmbeddingsBase.tables`."""
        return []

    def apply_phase(self, model: Any) -> None:
        """Continue with the values of another phase that no parameter depends on.

        model: the section `model` of the phase. Most encoders have no such value.
        """

    def forward(
        self,
        x: Tensor,
        document_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states of x.

        x:            [B, S, E] embedded rows
        document_ids: [B, S] int64, 0 = padding; tokens attend within their document
        position_ids: [B, S] int64, for encoders that use positions in their layers
        cu_seqlens:   int32 starts of the documents (`kernels.attention_mask.document_cu_seqlens`)
        positions:    [N] int64 positions in the flattened batch, for which states are returned
        Returns [B, S, H] in the compute dtype (`compute_dtype`), or [N, H] with `positions`.
        """
        raise NotImplementedError

    def run_layer(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """Return layer(*inputs), which is recomputed in backward if `recompute_layers` is set."""
        if self.recompute_layers and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def compile_layers(self) -> None:
        """torch.compile every layer in place; parameter names do not change."""
        self.layers_are_compiled = True
        for layer in self.layers:
            layer.compile(dynamic=False)


class EncoderInputs(Protocol):
    """The fields of a batch that embeddings and encoder use: [B, S] int64, and cu_seqlens."""

    @property
    def segment_ids(self) -> Tensor: ...

    @property
    def document_ids(self) -> Tensor: ...

    @property
    def position_ids(self) -> Tensor: ...

    @property
    def cu_seqlens(self) -> Tensor | None: ...


def encode(
    embeddings: EmbeddingsBase,
    encoder: EncoderBase,
    input_ids: Tensor,
    batch: EncoderInputs,
    positions: Tensor | None = None,
    base: EmbeddingsBase | None = None,
) -> Tensor:
    """Embed and encode input_ids [B, S] with the segments, documents and positions of batch.

    base: see `EmbeddingsBase.forward`.
    Returns hidden states [B, S, H], or [N, H] at positions [N] of the flattened batch.
    """
    embedded = embeddings(input_ids, batch.segment_ids, batch.position_ids, base)
    return encoder(
        embedded,
        batch.document_ids,
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        positions=positions,
    )


def hidden_matrices(module: nn.Module) -> dict[str, int]:
    """Return {parameter name: number of matrices it stacks} of the matrices in encoder layers.

    These are the projections of attention and feed-forward layers. Embeddings, the projections of
    embeddings, tables of positions and heads are not among them. A layer names parameters that
    stack several matrices on their first axis in its attribute `stacked`.
    """
    found: dict[str, int] = {}
    for prefix, encoder in module.named_modules():
        if not isinstance(encoder, EncoderBase):
            continue
        path = f"{prefix}.layers" if prefix else "layers"
        for index, layer in enumerate(encoder.layers):
            stacked = getattr(layer, "stacked", {})
            for name, parameter in layer.named_parameters():
                if parameter.ndim == 2:
                    found[f"{path}.{index}.{name}"] = stacked.get(name, 1)
    return found
