"""Conversion of names, tensors and config keys to and from Hugging Face's DeBERTa-v2 (DeBERTaV3).

The generator is a DebertaV2ForMaskedLM. The discriminator is a DebertaV2ForSequenceClassification
with one label: its pooler and classifier are our dense layer, gelu and linear layer, which are
applied to every token. Folders with Microsoft's names of heads can be imported.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import parse_record
from electra_ds.common.printable import shortened
from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.architectures import (
    MAX_DROPOUT,
    DebertaV2EncoderConfig,
    DebertaV2GeneratorConfig,
    DebertaV2ModelConfig,
    EncoderConfig,
    ModelConfig,
)
from electra_ds.config.loading import parse_config
from electra_ds.interop.hf_bert_names import BertNamesFormat
from electra_ds.interop.hf_format import (
    ENCODER_SIZES,
    MAX_ROWS,
    OF_GENERATOR,
    EncoderSizes,
    Head,
    Role,
    check_only,
    unequal,
)

CLASSES: dict[Role, str] = {
    "detection": "DebertaV2ForSequenceClassification",
    "prediction": "DebertaV2ForMaskedLM",
    "sequence_classification": "DebertaV2ForSequenceClassification",
    "token_classification": "DebertaV2ForTokenClassification",
    "question_answering": "DebertaV2ForQuestionAnswering",
    "multiple_choice": "DebertaV2ForMultipleChoice",
}
DETECTION_LABEL = "replaced"  # the only label of a discriminator
# Module names in electra_ds -> those in Hugging Face, for embeddings, encoder, one layer and heads.
EMBEDDINGS = {"word": "word_embeddings", "norm": "LayerNorm"}
ENCODER = {"relative": "encoder.rel_embeddings", "relative_norm": "encoder.LayerNorm"}
LAYER = {
    "qkv": ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
    "out": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "ffn_in": ("intermediate.dense",),
    "ffn_out": ("output.dense",),
    "ffn_norm": ("output.LayerNorm",),
}
HEADS = {
    "generator_head.dense": "cls.predictions.transform.dense",
    "generator_head.norm": "cls.predictions.transform.LayerNorm",
    "discriminator_head.dense": "pooler.dense",
    "discriminator_head.classify": "classifier",
}
# Microsoft's names of the head that predicts tokens, also those of legacy = false.
MICROSOFT_HEAD = {
    "lm_predictions.lm_head.dense.": "cls.predictions.transform.dense.",
    "lm_predictions.lm_head.LayerNorm.": "cls.predictions.transform.LayerNorm.",
    "lm_predictions.lm_head.bias": "cls.predictions.bias",
}

# Fields of our configs -> keys of config.json: sizes of each encoder, and what both have in common.
SIZES = {
    **ENCODER_SIZES,
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
TABLES = {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "position_buckets": "position_buckets",
    "layer_norm_eps": "layer_norm_eps",
}
# Keys with one supported value.
ONLY = {
    "hidden_act": "gelu",
    "relative_attention": True,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
# Values of the stock classes for missing keys, where these are not supported.
DEFAULTS = {
    "relative_attention": False,
    "share_att_key": False,
    "norm_rel_ebd": "none",
    "position_biased_input": True,
    "pos_att_type": None,
}
POS_ATT_TYPE = ("p2c", "c2p")


class HfConfig(EncoderSizes):
    """The sizes in a config.json; a missing key has the default of transformers' DebertaV2Config."""

    max_position_embeddings: int = Field(512, ge=1, le=MAX_ROWS)
    position_buckets: int = Field(-1, ge=-1, le=MAX_ROWS)
    layer_norm_eps: float = Field(1e-7, gt=0)
    hidden_dropout_prob: float = Field(0.1, ge=0, le=MAX_DROPOUT)
    attention_probs_dropout_prob: float = Field(0.1, ge=0, le=MAX_DROPOUT)


class DebertaV2Format(BertNamesFormat):
    """Folders of DebertaV2ForMaskedLM and of DeBERTa's classes for texts and tokens."""

    architecture = "deberta_v2"
    model_type = "deberta-v2"
    imported_types = ("deberta-v2",)
    classes = CLASSES
    prefix = "deberta."
    before_layer = "encoder.layer."
    word_table = "deberta.embeddings.word_embeddings.weight"
    output_matrix = "cls.predictions.decoder.weight"
    output_bias = "cls.predictions.bias"
    copies: Mapping[str, str] = {"cls.predictions.decoder.bias": output_bias}  # type: ignore[misc]
    rows_of_words = (
        "word_embeddings.weight",
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
        "cls.predictions.bias",
        "lm_predictions.lm_head.bias",
    )
    embeddings = EMBEDDINGS
    encoder = ENCODER
    layer = LAYER
    head_names = HEADS
    sentence_head = ("pooler.dense", "classifier")
    choice_head = sentence_head
    has_token_types = False
    predicting_folder_starts_both = True
    discriminator_alone_shares = False
    detection_call = (
        "model.classifier(model.pooler(model.deberta(**inputs).last_hidden_state[0, :, None]))"
    )
    detection_logits = "logits[:, 0]"
    sizes_text = (
        "{num_hidden_layers} layers, hidden {hidden_size}, {num_attention_heads} heads, "
        "feed-forward {intermediate_size}, position buckets {position_buckets}, "
        "vocabulary {vocab_size:,}"
    )
    default_run = "deberta-v3-small"
    sizes = frozenset(SIZES)
    tables = frozenset(TABLES)
    free = frozenset({*DebertaV2EncoderConfig.dropout_fields(), "max_positions"})
    effects: ClassVar[Mapping[str, str]] = {
        "max_positions": "the buckets of distances change, so that the logits differ from those of "
        "the imported model until the weights have been trained further"
    }

    def config(
        self,
        model: ModelConfig,
        generator: EncoderConfig | None,
        special_ids: SpecialIds,
        role: Role,
    ) -> dict[str, Any]:
        assert isinstance(model, DebertaV2ModelConfig)
        sizes: EncoderConfig = model if generator is None else generator
        values = {
            "model_type": self.model_type,
            "architectures": [self.classes[role]],
            **{key: getattr(sizes, field) for field, key in SIZES.items()},
            **{key: getattr(model, field) for field, key in TABLES.items()},
            "max_relative_positions": -1,  # max_position_embeddings
            "pos_att_type": "|".join(POS_ATT_TYPE),
            "initializer_range": model.init_std,
            **ONLY,
            "pooler_hidden_size": sizes.hidden_size,
            "pooler_hidden_act": "gelu",
            "pooler_dropout": 0.0,
            "legacy": True,
            "pad_token_id": special_ids.pad,
            "bos_token_id": special_ids.cls,
            "eos_token_id": special_ids.sep,
            "tie_word_embeddings": True,
        }
        if role == "detection":
            values |= {"id2label": {"0": DETECTION_LABEL}, "label2id": {DETECTION_LABEL: 0}}
        return values

    def parse(
        self,
        main: Mapping[str, Any],
        generator: Mapping[str, Any] | None = None,
        where: str = "config.json",
    ) -> tuple[DebertaV2ModelConfig, DebertaV2GeneratorConfig]:
        """Both parts need equal tables of relative positions, which each has for itself."""
        first = _checked_sizes(main, where)
        second = _checked_sizes(generator, OF_GENERATOR) if generator else first
        for key in TABLES.values():
            if first[key] != second[key]:
                raise unequal(where, key, first[key], second[key])
        values = {field: first[key] for field, key in (SIZES | TABLES).items()}
        values["architecture"] = self.architecture
        is_untied = first["hidden_size"] != second["hidden_size"]
        values["sharing"] = "untied" if is_untied else "shared"
        model = parse_config(values, where, DebertaV2ModelConfig)
        sizes = {field: second[key] for field, key in SIZES.items()}
        return model, parse_config(sizes, where, DebertaV2GeneratorConfig)

    def heads(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Head, ...]:
        """The label in config.json decides between a discriminator and a regression of texts."""
        if self.output_bias in tensors or "lm_predictions.lm_head.bias" in tensors:
            return ("generator",)
        if _is_labelled(config) and "pooler.dense.weight" in tensors:
            return ("discriminator",)
        return ()

    def head_of(self, name: str, heads: tuple[Head, ...]) -> Head | Literal["task"] | None:
        if name.startswith("cls.predictions."):
            return "generator"
        if name.startswith(("pooler.", "classifier.")):
            return "discriminator" if "discriminator" in heads else "task"
        return None

    def stock_names(self, tensors: Iterable[str]) -> dict[str, str]:
        """Microsoft has other names for the head that predicts tokens."""
        renamed = {}
        for name in tensors:
            new = name
            for theirs, stock in MICROSOFT_HEAD.items():
                if name.startswith(theirs):
                    new = name.replace(theirs, stock, 1)
            if new.startswith(("embeddings.", "encoder.")):
                new = f"{self.prefix}{new}"
            renamed[name] = new
        return renamed


def _is_labelled(config: Mapping[str, Any]) -> bool:
    """Whether a config.json has the label of a discriminator."""
    labels = config.get("id2label")
    is_labelled = isinstance(labels, dict) and list(labels.values()) == [DETECTION_LABEL]
    return is_labelled and config.get("problem_type") is None


def _checked_sizes(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of `HfConfig` by their keys. UserError for missing or unsupported values."""
    stated = {**DEFAULTS, **config}
    if stated.get("conv_kernel_size"):
        raise UserError(
            f"{where}: conv_kernel_size = {shortened(stated['conv_kernel_size'])}, a convolution "
            "after the first layer; only models without one are supported; use such a model, for "
            "example a DeBERTaV3"
        )
    check_only(stated, where, ONLY)
    if _is_labelled(config):
        check_only(stated, where, {"pooler_hidden_act": "gelu"})
    kinds = stated["pos_att_type"]
    kinds = kinds.lower().split("|") if isinstance(kinds, str) else kinds
    is_known = isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)
    if not is_known or sorted(kind.strip() for kind in kinds) != sorted(POS_ATT_TYPE):
        raise UserError(
            f"{where}: pos_att_type = {shortened(stated['pos_att_type'])}; only "
            f"'{'|'.join(POS_ATT_TYPE)}' is supported; use a model that was trained with it"
        )
    record = parse_record(dict(config), where, HfConfig).model_dump()
    # Derived by the stock classes where they are not stated.
    derived = {
        "embedding_size": (record["hidden_size"], None),
        "attention_head_size": (record["hidden_size"] // record["num_attention_heads"], None),
        "max_relative_positions": (record["max_position_embeddings"], -1, 0, None),
    }
    for key, allowed in derived.items():
        if config.get(key) not in allowed:
            raise UserError(
                f"{where}: {key} = {shortened(config[key])}; expected {allowed[0]}, as the other "
                "sizes give; use another model"
            )
    return record
