"""Conversion of parameter names, tensors and config keys to and from Hugging Face's ELECTRA.

"Stock" means a class of the transformers library without changes. `part` is always "discriminator"
(ElectraForPreTraining) or "generator" (ElectraForMaskedLM).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import Record, parse_record
from electra_ds.common.printable import shortened
from electra_ds.config.architectures import (
    ElectraEncoderConfig,
    ElectraGeneratorConfig,
    ElectraModelConfig,
)
from electra_ds.config.loading import parse_config

# Module names in electra_ds -> those in Hugging Face, for embeddings, one layer and the heads.
EMBEDDINGS = {
    "word": "word_embeddings",
    "position": "position_embeddings",
    "token_type": "token_type_embeddings",
    "norm": "LayerNorm",
}
LAYER = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "out": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "ffn_in": ("intermediate.dense",),
    "ffn_out": ("output.dense",),
    "ffn_norm": ("output.LayerNorm",),
}
HEADS = {
    "generator_head.dense": "generator_predictions.dense",
    "generator_head.norm": "generator_predictions.LayerNorm",
    "discriminator_head.dense": "discriminator_predictions.dense",
    "discriminator_head.classify": "discriminator_predictions.dense_prediction",
}


def hf_names(name: str) -> tuple[str, ...]:
    """Hugging Face's names for one of our parameters, inside the class of its part.

    One name, or three for the fused qkv of a layer.
    """
    name = name.replace("mlm_head.", "generator_head.")
    if name == "generator_head.bias":
        return ("generator_lm_head.bias",)
    module, _, kind = name.rpartition(".")  # kind: weight or bias
    if module in HEADS:
        return (f"{HEADS[module]}.{kind}",)
    part, *middle, last = module.split(".")
    if part.endswith("embeddings"):
        return (f"electra.embeddings.{EMBEDDINGS[last]}.{kind}",)
    if last == "project":
        return (f"electra.embeddings_project.{kind}",)
    layer = middle[1]  # discriminator.layers.LAYER.qkv
    return tuple(f"electra.encoder.layer.{layer}.{module}.{kind}" for module in LAYER[last])


def part_names(names: Iterable[str], part: str) -> list[str]:
    """The names among our parameters that make up one part.

    Without an encoder or embeddings of its own, the generator consists of the shared ones.
    """
    names = list(names)
    encoder, embeddings = part, "embeddings"
    if part == "generator":
        if not any(name.startswith("generator.") for name in names):
            encoder = "discriminator"
        if any(name.startswith("generator_embeddings.") for name in names):
            embeddings = "generator_embeddings"
    heads = [f"{part}_head."]
    if part == "discriminator":
        heads.append("mlm_head.")  # of a main encoder that predicts tokens
    return [name for name in names if name.startswith((f"{embeddings}.", f"{encoder}.", *heads))]


def to_hf(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """One part of our tensors (without padded rows) as the state_dict of its stock class.

    The output matrix of language modelling is tied to the word table and listed as well.
    """
    tensors: dict[str, Tensor] = {}
    for name in part_names(state, part):
        foreign_names = hf_names(name)
        chunks = state[name].chunk(len(foreign_names))
        tensors.update(zip(foreign_names, chunks, strict=True))
    if "generator_lm_head.bias" in tensors:
        tensors["generator_lm_head.weight"] = tensors["electra.embeddings.word_embeddings.weight"]
    return tensors


def classifier_to_hf(
    state: Mapping[str, Tensor], kind: str, label_range: tuple[float, float] | None = None
) -> tuple[str, dict[str, Tensor]]:
    """(stock class, its state_dict) of a fine-tuned encoder, with equal logits.

    state: fp32 tensors of the encoder, head.weight [labels, H] and head.bias [labels].
    kind: the kind of the task.
    label_range: the range of a regression's labels; it is folded into the weights, so that the
    stock logit is in the unit of the labels.

    The stock sentence head is linear, gelu, linear; that of electra_ds is one linear layer. Since
    gelu(z) - gelu(-z) = z, 2 x labels rows of the first stock layer reproduce it, and the other
    rows are zero. With more than H / 2 labels the class is ElectraForTokenClassification, and the
    logits at [CLS] are those of the text.
    """
    tensors = to_hf(state, "discriminator")
    weight, bias = state["head.weight"], state["head.bias"]
    labels, hidden = weight.shape
    if kind == "token_classification" or 2 * labels > hidden:
        tensors |= {"classifier.weight": weight, "classifier.bias": bias}
        return "ElectraForTokenClassification", tensors
    low, high = label_range or (0.0, 1.0)
    weight = weight * (high - low)
    bias = bias * (high - low) + low
    unused = hidden - 2 * labels
    identity = torch.eye(labels)
    output = torch.cat([identity, -identity, torch.zeros(labels, unused)], dim=1)
    tensors |= {
        "classifier.dense.weight": torch.cat([weight, -weight, torch.zeros(unused, hidden)]),
        "classifier.dense.bias": torch.cat([bias, -bias, torch.zeros(unused)]),
        "classifier.out_proj.weight": output,
        "classifier.out_proj.bias": torch.zeros(labels),
    }
    return "ElectraForSequenceClassification", tensors


def from_hf(tensors: Mapping[str, Tensor], names: Iterable[str], part: str) -> dict[str, Tensor]:
    """Our tensors of one part (fp32, without padded rows) from a state_dict of its stock class.

    names: all our parameters; those of other parts are ignored. A bare ElectraModel, which has no
    prefix "electra.", is accepted. Raises UserError with the name of the first missing tensor.
    """
    state = {}
    for name in part_names(names, part):
        chunks = []
        for foreign in hf_names(name):
            chunk = tensors.get(foreign, tensors.get(foreign.removeprefix("electra.")))
            if chunk is None:
                raise UserError(
                    f"Hugging Face {part}: no tensor {foreign} for {name}; "
                    f"expected the folder of a {part}"
                )
            chunks.append(chunk)
        state[name] = joined(chunks, name, f"Hugging Face {part}")
    return state


def joined(chunks: list[Tensor], name: str, where: str) -> Tensor:
    """One of our tensors (fp32) from those of a foreign model: one, or query, key and value.

    UserError when they are no floating-point weights, or differ in shape.
    """
    if not all(chunk.is_floating_point() for chunk in chunks):
        raise UserError(
            f"{where}: the tensor of {name} has the type {chunks[0].dtype}; expected "
            "floating-point weights; quantized weights are not read"
        )
    if len(chunks) == 1:
        return chunks[0].detach().float()
    shapes = [tuple(chunk.shape) for chunk in chunks]
    if len(set(shapes)) > 1 or not shapes[0]:
        raise UserError(f"{where}: the tensors of {name} have the shapes {shapes}; expected one")
    return torch.cat([chunk.detach().float() for chunk in chunks])


# Fields of our configs -> keys of config.json: sizes of each encoder, and of the shared tables.
SIZES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
TABLES = {
    "vocab_size": "vocab_size",
    "embedding_size": "embedding_size",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
}
# Keys with one supported value, which is also the library's default.
ONLY = {"hidden_act": "gelu", "position_embedding_type": "absolute"}
# Limits of the sizes of a foreign model.
MAX_LAYERS, MAX_WIDTH, MAX_ROWS = 10_000, 2**24, 2**31 - 1


def hf_config(
    model: ElectraModelConfig, generator: ElectraGeneratorConfig | None, part: str, pad_id: int
) -> dict[str, Any]:
    """The config.json of one part for its stock class.

    generator: sizes of the generator; not needed for the discriminator.
    """
    sizes: ElectraEncoderConfig = model
    architecture, embedding_size = "ElectraForPreTraining", model.embedding_size
    if part == "generator":
        assert generator is not None
        sizes, architecture = generator, "ElectraForMaskedLM"
        if model.sharing == "untied":
            embedding_size = generator.hidden_size
    return {
        "model_type": "electra",
        "architectures": [architecture],
        **{key: getattr(sizes, field) for field, key in SIZES.items()},
        **{key: getattr(model, field) for field, key in TABLES.items()},
        "embedding_size": embedding_size,
        "initializer_range": model.init_std,
        **ONLY,
        "pad_token_id": pad_id,
        "tie_word_embeddings": True,
    }


class HfConfig(Record):
    """The sizes in a config.json; a missing key has the default of transformers' ElectraConfig."""

    model_config = ConfigDict(extra="ignore")

    vocab_size: int = Field(ge=1, le=MAX_ROWS)
    embedding_size: int = Field(ge=1, le=MAX_WIDTH)
    max_position_embeddings: int = Field(512, ge=1, le=MAX_ROWS)
    type_vocab_size: int = Field(2, ge=1, le=MAX_ROWS)
    layer_norm_eps: float = Field(1e-12, gt=0)
    hidden_size: int = Field(ge=1, le=MAX_WIDTH)
    num_hidden_layers: int = Field(ge=1, le=MAX_LAYERS)
    num_attention_heads: int = Field(ge=1, le=MAX_WIDTH)
    intermediate_size: int = Field(ge=1, le=MAX_WIDTH)
    hidden_dropout_prob: float = Field(0.1, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(0.1, ge=0, lt=1)


def from_hf_config(
    discriminator: Mapping[str, Any],
    generator: Mapping[str, Any] | None = None,
    where: str = "config.json",
) -> tuple[ElectraModelConfig, ElectraGeneratorConfig]:
    """The sizes in the config.json of the discriminator and of the generator, if there is one.

    where: the file, for messages. Raises UserError for a missing key, for values that the encoder
    of electra_ds does not support (another activation, relative positions), and for tables of
    different sizes.
    """
    main = _checked_sizes(discriminator, where)
    other = _checked_sizes(generator, "config.json of the generator") if generator else main
    is_untied = main["embedding_size"] != other["embedding_size"] == other["hidden_size"]
    for key in TABLES.values():
        if main[key] != other[key] and not (is_untied and key == "embedding_size"):
            raise UserError(
                f"{where}: {key} of discriminator and generator differ "
                f"({main[key]} and {other[key]}); expected equal values"
            )
    sizes = {field: main[key] for field, key in (SIZES | TABLES).items()}
    generator_sizes = {field: other[key] for field, key in SIZES.items()}
    sizes["sharing"] = "untied" if is_untied else "shared"
    model = parse_config(sizes, where, ElectraModelConfig)
    return model, parse_config(generator_sizes, where, ElectraGeneratorConfig)


def _checked_sizes(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of `HfConfig` by their keys. UserError for missing or unsupported values."""
    for key, only in ONLY.items():
        if config.get(key, only) != only:
            raise UserError(
                f"{where}: {key} = {shortened(config[key])}; only {only!r} is supported"
            )
    return parse_record(dict(config), where, HfConfig).model_dump()


def electra_names(tensors: Iterable[str]) -> dict[str, str]:
    """Tensor names of an ELECTRA or BERT folder -> names in a stock ELECTRA class with a head.

    A bare ElectraModel has no prefix. BERT has other names for its head, an old BERT also for its
    LayerNorms (gamma, beta).
    """
    heads = {
        "cls.predictions.bias": "generator_lm_head.bias",
        "cls.predictions.decoder.weight": "generator_lm_head.weight",
    }
    if "cls.predictions.bias" not in tensors:
        heads["cls.predictions.decoder.bias"] = "generator_lm_head.bias"
    renamed = {}
    for name in tensors:
        new = name.replace(".gamma", ".weight").replace(".beta", ".bias").removeprefix("bert.")
        new = new.replace("cls.predictions.transform.", "generator_predictions.")
        new = heads.get(new, new)
        if new.startswith(("embeddings", "encoder.")):
            new = f"electra.{new}"
        renamed[name] = new
    return renamed
