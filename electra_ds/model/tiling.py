"""Weights of a deeper or wider encoder from those of a smaller one, by tiling.

It is the start of ModernBERT-large from ModernBERT-base (Warner et al. 2024, section 2.2), with the
indices of its code (`tile_weights_from_middle`): the smaller matrix stands in the centre of the
larger one, and its rows and columns repeat around it. No value is scaled.

Layer i of L takes layer round(i * l / L) of l (Gopher's pattern), at most l - 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from electra_ds.config.architectures import EncoderConfig, ModelConfig, ModernBertModelConfig


def centred(small: int, large: int) -> Tensor:
    """Return the index of the smaller axis at each place of the larger one: [large] int64.

    Places (large - small) // 2 and on hold 0, 1, ..., small - 1; the others continue the period.
    """
    return (torch.arange(large) - (large - small) // 2) % small


def layer_sources(small: Sequence[str], large: Sequence[str]) -> list[int]:
    """Return the layer of the smaller encoder from which each layer of the larger one starts.

    small, large: the kind of attention of each layer. The pattern of the module's docstring is
    applied to the layers of each kind on their own, so that a global layer starts from a global
    one. Layers of a kind that the smaller encoder does not have start by the pattern over all layers.
    """
    found = [0] * len(large)
    for kind in dict.fromkeys(large):
        places = [i for i, other in enumerate(large) if other == kind]
        sources = [i for i, other in enumerate(small) if other == kind]
        if not sources:
            places, sources = list(range(len(large))), list(range(len(small)))
        for i, place in enumerate(places):
            if large[place] == kind:
                source = round(i * len(sources) / len(places))
                found[place] = sources[min(source, len(sources) - 1)]
    return found


def layer_kinds(model: ModelConfig, num_layers: int) -> list[str]:
    """Return the kind of attention of each of num_layers layers; all are global without a pattern."""
    if isinstance(model, ModernBertModelConfig):
        return [*model.layer_kinds(num_layers)]
    return ["global"] * num_layers


class GrownEncoder(NamedTuple):
    """The sizes of one encoder, and where its layers come from.

    small, large: before and after. layers: the layer of the smaller one for each layer.
    embeddings: what stands before the names of the embeddings that it reads.
    """

    small: EncoderConfig
    large: EncoderConfig
    layers: list[int]
    embeddings: str


def source_names(name: str, encoders: dict[str, GrownEncoder]) -> tuple[str, ...]:
    """Return the names of the smaller model for a parameter; the first that exists is meant.

    encoders: by their prefix, such as "discriminator.". The first layer of `modernbert` has no
    LayerNorm before its attention, because the embeddings end with one; in its place that one is
    meant.
    """
    encoder, prefix = _encoder_of(name, encoders)
    if encoder is None:
        return (name,)
    number, _, rest = name.removeprefix(prefix).partition(".")
    same = f"{prefix}{encoder.layers[int(number)]}.{rest}"
    if rest.startswith("attention_norm."):
        return same, f"{encoder.embeddings}{rest.removeprefix('attention_')}"
    return (same,)


def tiled(
    value: Tensor, name: str, shape: tuple[int, ...], encoders: dict[str, GrownEncoder]
) -> Tensor:
    """Return a parameter of the smaller model in the shape of the larger one.

    value: of the smaller model. name: in the larger model. shape: of the result; each axis is at
    least as long as that of value. The parts of a fused matrix (query, key and value; both halves
    of a gated feed-forward layer) are tiled on their own, and the axes of attention heads by whole
    heads. Returns `value` itself if the shapes are equal.
    """
    encoder, _ = _encoder_of(name, encoders)
    for axis, size in enumerate(shape):
        if value.shape[axis] != size:
            index = _index(name, axis, value.shape[axis], size, encoder)
            value = value.index_select(axis, index)
    return value


def _encoder_of(name: str, encoders: dict[str, GrownEncoder]) -> tuple[GrownEncoder | None, str]:
    """The encoder of a parameter of a layer, with what stands before the number of the layer."""
    for part, encoder in encoders.items():
        if name.startswith(f"{part}layers."):
            return encoder, f"{part}layers."
    return None, ""


def _index(name: str, axis: int, old: int, new: int, encoder: GrownEncoder | None) -> Tensor:
    """The index of the smaller axis at each place of the larger one."""
    if encoder is None:
        return centred(old, new)
    module, kind = name.split(".")[-2:]
    small, large = encoder.small, encoder.large
    if module == "qkv" and axis == 0:
        return _repeated(_by_heads(small, large), small.hidden_size, 3)
    if (module, kind, axis) == ("out", "weight", 1):
        return _by_heads(small, large)
    if module == "ffn_in" and axis == 0:
        return _repeated(
            centred(small.ffn_size, large.ffn_size), small.ffn_size, old // small.ffn_size
        )
    return centred(old, new)


def _by_heads(small: EncoderConfig, large: EncoderConfig) -> Tensor:
    """The index of an axis of heads of equal sizes: whole heads are placed."""
    heads = centred(small.num_heads, large.num_heads)[:, None] * small.head_size
    return (heads + torch.arange(small.head_size)).flatten()


def _repeated(index: Tensor, size: int, parts: int) -> Tensor:
    """The index of an axis of several parts side by side. size: of each part of the smaller axis."""
    return torch.cat([index + part * size for part in range(parts)])
