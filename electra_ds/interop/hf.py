"""Parameter names and config keys of Hugging Face's stock ELECTRA classes <-> ours.

`part` is "discriminator" (ElectraForPreTraining) or "generator" (ElectraForMaskedLM) everywhere.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.config.schema import EncoderConfig, GeneratorConfig, ModelConfig

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
    """What Hugging Face calls one of our parameters, inside the class of its part: one name, three for a fused qkv."""
    name = name.replace("mlm_head.", "generator_head.")
    if name == "generator_head.bias":
        return ("generator_lm_head.bias",)
    module, _, kind = name.rpartition(".")
    if module in HEADS:
        return (f"{HEADS[module]}.{kind}",)
    part, *middle, last = module.split(".")
    if part.endswith("embeddings"):
        return (f"electra.embeddings.{EMBEDDINGS[last]}.{kind}",)
    if last == "project":
        return (f"electra.embeddings_project.{kind}",)
    return tuple(f"electra.encoder.layer.{middle[1]}.{foreign}.{kind}" for foreign in LAYER[last])


def part_names(names: Iterable[str], part: str) -> list[str]:
    """The parameters of ours that make up one part; the generator falls back on what it shares with the other."""
    names = list(names)
    encoder, embeddings = part, "embeddings"
    if part == "generator":
        encoder = "generator" if any(n.startswith("generator.") for n in names) else "discriminator"
        embeddings = (
            "generator_embeddings"
            if any(n.startswith("generator_embeddings.") for n in names)
            else embeddings
        )
    heads = (
        (f"{part}_head.",) if part == "generator" else (f"{part}_head.", "mlm_head.")
    )  # by the objective's kind
    return [n for n in names if n.startswith((f"{embeddings}.", f"{encoder}.", *heads))]


def to_hf(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """One part of our tensors (true rows) as the state_dict of its stock class; the tied output matrix is named too."""
    out = {}
    for name in part_names(state, part):
        foreign = hf_names(name)
        out.update(zip(foreign, state[name].chunk(len(foreign)), strict=True))
    if "generator_lm_head.bias" in out:
        out["generator_lm_head.weight"] = out["electra.embeddings.word_embeddings.weight"]
    return out


def classifier_to_hf(
    state: Mapping[str, Tensor], kind: str, label_range: tuple[float, float] | None = None
) -> tuple[str, dict[str, Tensor]]:
    """A fine-tuned encoder with head.weight [labels, H], head.bias as (stock class, its state_dict), logits equal.

    The stock sentence head is dense, gelu, linear, ours one linear: gelu(z) - gelu(-z) = z makes them equal, with
    2 x labels of its H dense rows. With more labels the class is that of token classification: read its logits at
    [CLS]. label_range: of a regression, folded in, so that the logit is in the label's own unit.
    """
    out, weight, bias = to_hf(state, "discriminator"), state["head.weight"], state["head.bias"]
    labels, hidden = weight.shape
    if kind == "token_classification" or 2 * labels > hidden:
        return "ElectraForTokenClassification", out | {
            "classifier.weight": weight,
            "classifier.bias": bias,
        }
    low, high = label_range or (0.0, 1.0)
    weight, bias, rest = weight * (high - low), bias * (high - low) + low, hidden - 2 * labels
    one = torch.eye(labels)
    return "ElectraForSequenceClassification", out | {
        "classifier.dense.weight": torch.cat([weight, -weight, torch.zeros(rest, hidden)]),
        "classifier.dense.bias": torch.cat([bias, -bias, torch.zeros(rest)]),
        "classifier.out_proj.weight": torch.cat([one, -one, torch.zeros(labels, rest)], dim=1),
        "classifier.out_proj.bias": torch.zeros(labels),
    }


def from_hf(tensors: Mapping[str, Tensor], names: Iterable[str], part: str) -> dict[str, Tensor]:
    """Our tensors (fp32, true rows) of one part from a state_dict of its stock class.

    names are all parameters of ours (those of other parts are passed over). A bare ElectraModel without the
    "electra." prefix is understood. UserError names the first tensor that is missing.
    """
    state = {}
    for name in part_names(names, part):
        parts = []
        for foreign in hf_names(name):
            found = tensors.get(foreign, tensors.get(foreign.removeprefix("electra.")))
            if found is None:
                raise UserError(
                    f"Hugging Face {part}: no tensor {foreign} for {name}; is this the {part}'s folder?"
                )
            parts.append(found.detach().float())
        state[name] = torch.cat(parts)
    return state


# Fields of our configs -> keys of config.json: what each encoder owns, and what both share.
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


def hf_config(
    model: ModelConfig, generator: GeneratorConfig | None, part: str, pad_id: int
) -> dict:
    """The config.json of one part for the stock class; the discriminator's needs no generator."""
    sizes: EncoderConfig = model if part == "discriminator" else generator
    untied = part == "generator" and model.sharing == "untied"
    return {
        "model_type": "electra",
        "architectures": [
            "ElectraForPreTraining" if part == "discriminator" else "ElectraForMaskedLM"
        ],
        **{theirs: getattr(sizes, ours) for ours, theirs in SIZES.items()},
        **{theirs: getattr(model, ours) for ours, theirs in TABLES.items()},
        **({"embedding_size": generator.hidden_size} if untied else {}),
        "initializer_range": model.init_std,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "pad_token_id": pad_id,
        "tie_word_embeddings": True,
    }


def from_hf_config(
    discriminator: Mapping, generator: Mapping | None = None
) -> tuple[ModelConfig, GeneratorConfig]:
    """Our sizes from the config.json of the discriminator and, where there is one, of the generator.

    UserError for what our encoder does not do (another activation, relative positions) and for generator sizes
    that cannot share the discriminator's embeddings.
    """
    default = {"layer_norm_eps": 1e-12}  # the library's, where it is not said
    mine, theirs = (
        default | dict(config) for config in (discriminator, generator or discriminator)
    )
    for config in (mine, theirs):
        for key, only in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if config.get(key, only) != only:
                raise UserError(f"config.json: {key} = {config[key]!r}; only {only!r} is supported")
        for key in (*TABLES.values(), *SIZES.values()):
            if not isinstance(config.get(key), (int, float)):
                raise UserError(
                    f"config.json: {key} = {config.get(key)!r}; sizes must be numbers, not strings"
                )
    is_untied = mine["embedding_size"] != theirs["embedding_size"] == theirs["hidden_size"]
    for key in TABLES.values():
        if mine[key] != theirs[key] and not (is_untied and key == "embedding_size"):
            raise UserError(
                f"config.json: {key} of discriminator and generator differ ({mine[key]} and {theirs[key]})"
            )
    model = {ours: mine[key] for ours, key in (SIZES | TABLES).items()}
    made = GeneratorConfig(**{ours: theirs[key] for ours, key in SIZES.items()})
    return ModelConfig(**model, sharing="untied" if is_untied else "shared"), made


def electra_names(tensors: Iterable[str]) -> dict[str, str]:
    """Name in an ELECTRA or BERT folder -> name in a stock ELECTRA class with a head.

    A bare ElectraModel has no prefix; BERT names its head otherwise, an old one its LayerNorms too (gamma, beta).
    """
    renamed = {}
    for name in tensors:
        plain = name.replace(".gamma", ".weight").replace(".beta", ".bias").removeprefix("bert.")
        plain = plain.replace("cls.predictions.transform.", "generator_predictions.")
        plain = {
            "cls.predictions.bias": "generator_lm_head.bias",
            "cls.predictions.decoder.weight": "generator_lm_head.weight",
        }.get(plain, plain)
        if plain == "cls.predictions.decoder.bias" and "cls.predictions.bias" not in tensors:
            plain = "generator_lm_head.bias"
        renamed[name] = (
            f"electra.{plain}" if plain.startswith(("embeddings", "encoder.")) else plain
        )
    return renamed
