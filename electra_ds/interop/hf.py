"""Parameter names and config keys of Hugging Face's stock ELECTRA classes <-> ours.

`part` is "discriminator" (ElectraForPreTraining) or "generator" (ElectraForMaskedLM) everywhere.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from electra_ds.config import EncoderConfig, GeneratorConfig, ModelConfig
from electra_ds.errors import UserError

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
    "mlm_head.dense": "generator_predictions.dense",
    "mlm_head.norm": "generator_predictions.LayerNorm",
    "generator_head.dense": "generator_predictions.dense",
    "generator_head.norm": "generator_predictions.LayerNorm",
    "discriminator_head.dense": "discriminator_predictions.dense",
    "discriminator_head.classify": "discriminator_predictions.dense_prediction",
}


def hf_names(name: str) -> tuple[str, ...]:
    """What Hugging Face calls one of our parameters, inside the class of its part: one name, three for a fused qkv."""
    if name in ("generator_head.bias", "mlm_head.bias"):
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
        embeddings = "generator_embeddings" if any(n.startswith("generator_embeddings.") for n in names) else embeddings
    heads = (f"{part}_head.",) if part == "generator" else (f"{part}_head.", "mlm_head.")  # by the objective's kind
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
        return "ElectraForTokenClassification", out | {"classifier.weight": weight, "classifier.bias": bias}
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
                raise UserError(f"Hugging Face {part}: no tensor {foreign} for {name}; is this the {part}'s folder?")
            parts.append(found.detach().float())
        state[name] = torch.cat(parts)
    return state


SIZES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}


def hf_config(model: ModelConfig, generator: GeneratorConfig | None, part: str, pad_id: int) -> dict:
    """The config.json of one part for the stock class; the discriminator's needs no generator."""
    sizes: EncoderConfig = model if part == "discriminator" else generator
    untied = part == "generator" and model.sharing == "untied"
    return {
        "model_type": "electra",
        "architectures": ["ElectraForPreTraining" if part == "discriminator" else "ElectraForMaskedLM"],
        **{theirs: getattr(sizes, ours) for ours, theirs in SIZES.items()},
        "vocab_size": model.vocab_size,
        "embedding_size": generator.hidden_size if untied else model.embedding_size,
        "max_position_embeddings": model.max_positions,
        "type_vocab_size": model.type_vocab_size,
        "layer_norm_eps": model.layer_norm_eps,
        "initializer_range": model.init_std,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "pad_token_id": pad_id,
        "tie_word_embeddings": True,
    }


def from_hf_config(discriminator: Mapping, generator: Mapping | None = None) -> tuple[ModelConfig, GeneratorConfig]:
    """Our sizes from the config.json of the discriminator and, where there is one, of the generator.

    UserError for what our encoder does not do (another activation, relative positions) and for generator sizes
    that cannot share the discriminator's embeddings.
    """
    generator = discriminator if generator is None else generator
    shared = ["vocab_size", "embedding_size", "max_position_embeddings", "type_vocab_size"]
    for config in (discriminator, generator):
        for key, only in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if config.get(key, only) != only:
                raise UserError(f"config.json: {key} = {config[key]!r}; only {only!r} is supported")
        for key in (*shared, *SIZES.values()):
            if not isinstance(config.get(key), (int, float)):
                raise UserError(f"config.json: {key} = {config.get(key)!r}; sizes must be numbers, not strings")
    sharing = "shared"
    if discriminator["embedding_size"] != generator["embedding_size"] == generator["hidden_size"]:
        sharing = "untied"
        shared.remove("embedding_size")
    ours = {"layer_norm_eps": 1e-12}  # the library's default where it is not said
    mine, theirs = ours | dict(discriminator), ours | dict(generator)
    differs = [key for key in (*shared, *ours) if mine[key] != theirs[key]]
    if differs:
        found = f"{mine[differs[0]]} and {theirs[differs[0]]}"
        raise UserError(f"config.json: {differs[0]} of discriminator and generator differ ({found})")
    sizes = [{ours: config[theirs] for ours, theirs in SIZES.items()} for config in (discriminator, generator)]
    model = ModelConfig(
        **sizes[0],
        embedding_size=discriminator["embedding_size"],
        max_positions=discriminator["max_position_embeddings"],
        type_vocab_size=discriminator["type_vocab_size"],
        layer_norm_eps=discriminator.get("layer_norm_eps", 1e-12),
        vocab_size=discriminator["vocab_size"],
        sharing=sharing,
    )
    return model, GeneratorConfig(**sizes[1])


def bert_as_electra(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name in a BERT folder (old ones say gamma and beta) -> the name the same tensor would have in an ELECTRA one."""
    renamed = {}
    for name in tensors:
        plain = name.replace(".gamma", ".weight").replace(".beta", ".bias").removeprefix("bert.")
        plain = plain.replace("cls.predictions.transform.", "generator_predictions.")
        plain = {"cls.predictions.bias": "generator_lm_head.bias",
                 "cls.predictions.decoder.weight": "generator_lm_head.weight"}.get(plain, plain)  # fmt: skip
        if plain == "cls.predictions.decoder.bias" and "cls.predictions.bias" not in tensors:
            plain = "generator_lm_head.bias"
        renamed[name] = f"electra.{plain}" if plain.startswith(("embeddings.", "encoder.")) else plain
    return renamed
