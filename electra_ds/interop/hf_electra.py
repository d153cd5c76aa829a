"""Conversion of names, tensors and config keys to and from Hugging Face's ELECTRA.

The discriminator is an ElectraForPreTraining, the generator an ElectraForMaskedLM. BERT folders can
be imported.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from electra_ds.common.json_files import parse_record
from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.architectures import (
    MAX_DROPOUT,
    ElectraEncoderConfig,
    ElectraGeneratorConfig,
    ElectraModelConfig,
    EncoderConfig,
    ModelConfig,
)
from electra_ds.config.loading import parse_config
from electra_ds.interop.hf_bert_names import BertNamesFormat
from electra_ds.interop.hf_format import (
    ENCODER_SIZES,
    MAX_ROWS,
    MAX_WIDTH,
    OF_GENERATOR,
    EncoderSizes,
    Head,
    Role,
    check_only,
    unequal,
)

CLASSES: dict[Role, str] = {
    "detection": "ElectraForPreTraining",
    "prediction": "ElectraForMaskedLM",
    "sequence_classification": "ElectraForSequenceClassification",
    "token_classification": "ElectraForTokenClassification",
    "question_answering": "ElectraForQuestionAnswering",
    "multiple_choice": "ElectraForMultipleChoice",
}
COPIES = {"cls.predictions.decoder.bias": "generator_lm_head.bias"}  # in some BERT folders
# Module names in electra_ds -> those in Hugging Face, for embeddings, encoder, one layer and heads.
EMBEDDINGS = {
    "word": "word_embeddings",
    "position": "position_embeddings",
    "token_type": "token_type_embeddings",
    "norm": "LayerNorm",
}
ENCODER = {"project": "embeddings_project"}
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


# Fields of our configs -> keys of config.json: sizes of each encoder, and of the shared tables.
SIZES = {
    **ENCODER_SIZES,
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
# Keys of a folder for multiple choice: the first token, a linear layer and gelu before the last one.
CHOICE_HEAD = {
    "summary_type": "first",
    "summary_use_proj": True,
    "summary_activation": "gelu",
}
# Keys with one supported value, which is also the library's default.
ONLY = {"hidden_act": "gelu", "position_embedding_type": "absolute"}


class HfConfig(EncoderSizes):
    """The sizes in a config.json; a missing key has the default of transformers' ElectraConfig."""

    embedding_size: int = Field(ge=1, le=MAX_WIDTH)
    max_position_embeddings: int = Field(512, ge=1, le=MAX_ROWS)
    type_vocab_size: int = Field(2, ge=1, le=MAX_ROWS)
    layer_norm_eps: float = Field(1e-12, gt=0)
    hidden_dropout_prob: float = Field(0.1, ge=0, le=MAX_DROPOUT)
    attention_probs_dropout_prob: float = Field(0.1, ge=0, le=MAX_DROPOUT)


class ElectraFormat(BertNamesFormat):
    """Folders of ElectraForPreTraining, ElectraForMaskedLM and the classes of tasks; BERT's."""

    architecture = "electra"
    model_type = "electra"
    imported_types = ("electra", "bert")
    classes = CLASSES
    prefix = "electra."
    before_layer = "encoder.layer."
    word_table = "electra.embeddings.word_embeddings.weight"
    output_matrix = "generator_lm_head.weight"
    output_bias = "generator_lm_head.bias"
    copies = COPIES
    rows_of_words = (
        "word_embeddings.weight",
        "generator_lm_head.weight",
        "generator_lm_head.bias",
        "predictions.decoder.weight",
        "predictions.decoder.bias",
        "predictions.bias",
    )
    embeddings = EMBEDDINGS
    encoder = ENCODER
    layer = LAYER
    head_names = HEADS
    sentence_head = ("classifier.dense", "classifier.out_proj")
    choice_head = ("sequence_summary.summary", "classifier")
    has_token_types = True
    predicting_folder_starts_both = False
    discriminator_alone_shares = True
    detection_logits = "logits[0]"
    sizes_text = (
        "{num_hidden_layers} layers, hidden {hidden_size}, {num_attention_heads} heads, "
        "feed-forward {intermediate_size}, embedding {embedding_size}, vocabulary {vocab_size:,}"
    )
    default_run = "small"
    sizes = frozenset(SIZES)
    tables = frozenset(TABLES)
    free = frozenset({"hidden_dropout", "attention_dropout"})

    def config(
        self,
        model: ModelConfig,
        generator: EncoderConfig | None,
        special_ids: SpecialIds,
        role: Role,
    ) -> dict[str, Any]:
        assert isinstance(model, ElectraModelConfig)
        sizes: EncoderConfig = model if generator is None else generator
        assert isinstance(sizes, ElectraEncoderConfig)
        return {
            "model_type": self.model_type,
            "architectures": [self.classes[role]],
            **{key: getattr(sizes, field) for field, key in SIZES.items()},
            **{key: getattr(model, field) for field, key in TABLES.items()},
            "embedding_size": model.embedding_size
            if generator is None
            else model.generator_width(generator),
            "initializer_range": model.init_std,
            **ONLY,
            "pad_token_id": special_ids.pad,
            "tie_word_embeddings": True,
            **(CHOICE_HEAD if role == "multiple_choice" else {}),
        }

    def parse(
        self,
        main: Mapping[str, Any],
        generator: Mapping[str, Any] | None = None,
        where: str = "config.json",
    ) -> tuple[ElectraModelConfig, ElectraGeneratorConfig]:
        """Tables of different sizes are refused."""
        first = _checked_sizes(main, where)
        second = _checked_sizes(generator, OF_GENERATOR) if generator else first
        is_untied = first["embedding_size"] != second["embedding_size"] == second["hidden_size"]
        for key in TABLES.values():
            if first[key] != second[key] and not (is_untied and key == "embedding_size"):
                raise unequal(where, key, first[key], second[key])
        sizes = {field: first[key] for field, key in (SIZES | TABLES).items()}
        generator_sizes = {field: second[key] for field, key in SIZES.items()}
        sizes["sharing"] = "untied" if is_untied else "shared"
        model = parse_config(sizes, where, ElectraModelConfig)
        return model, parse_config(generator_sizes, where, ElectraGeneratorConfig)

    def heads(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Head, ...]:
        found: list[Head] = []
        if "discriminator_predictions.dense.weight" in tensors:
            found.append("discriminator")
        if "generator_predictions.dense.weight" in tensors:
            found.append("generator")
        return tuple(found)

    def head_of(self, name: str, heads: tuple[Head, ...]) -> Head | Literal["task"] | None:
        is_predicting = name.startswith(("generator_lm_head.", "generator_predictions."))
        return "generator" if is_predicting else None

    def stock_names(self, tensors: Iterable[str]) -> dict[str, str]:
        """BERT has other names for its head, an old BERT also for its LayerNorms (gamma, beta)."""
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


def _checked_sizes(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of `HfConfig` by their keys. UserError for missing or unsupported values."""
    check_only(config, where, ONLY)
    if config.get("model_type") == "bert":
        config = {**config, "embedding_size": config.get("hidden_size")}
    return parse_record(dict(config), where, HfConfig).model_dump()
