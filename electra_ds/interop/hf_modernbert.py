"""Conversion of names, tensors and config keys to and from Hugging Face's ModernBERT.

The discriminator is a ModernBertForTokenClassification with one label, the generator a
ModernBertForMaskedLM. A written config.json has the keys of transformers 5 (layer_types,
rope_parameters) and of 4.x (global_attn_every_n_layers, thetas); one with either is read.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import Record, parse_record
from electra_ds.common.printable import printable, shortened
from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.architectures import (
    MAX_DROPOUT,
    MIN_THETA,
    AttentionKind,
    EncoderConfig,
    ModelConfig,
    ModernBertEncoderConfig,
    ModernBertGeneratorConfig,
    ModernBertModelConfig,
)
from electra_ds.config.loading import parse_config
from electra_ds.interop.hf_format import (
    ENCODER_SIZES,
    MAX_ROWS,
    OF_GENERATOR,
    EncoderSizes,
    Head,
    HfFormat,
    Role,
    check_only,
    unequal,
)

CLASSES: dict[Role, str] = {
    "detection": "ModernBertForTokenClassification",
    "prediction": "ModernBertForMaskedLM",
    "sequence_classification": "ModernBertForSequenceClassification",
    "token_classification": "ModernBertForTokenClassification",
    "question_answering": "ModernBertForQuestionAnswering",
    "multiple_choice": "ModernBertForMultipleChoice",
}
# Module names in electra_ds -> those in Hugging Face, for embeddings, one layer and the heads.
EMBEDDINGS = {"word": "tok_embeddings", "norm": "norm"}
LAYER = {
    "attention_norm": "attn_norm",
    "qkv": "attn.Wqkv",
    "out": "attn.Wo",
    "ffn_norm": "mlp_norm",
    "ffn_in": "mlp.Wi",
    "ffn_out": "mlp.Wo",
}
HEAD = {"dense": "head.dense", "norm": "head.norm", "classify": "classifier"}

# Fields of our configs -> keys of config.json: sizes of each encoder, and what both have in common.
SIZES = {
    **ENCODER_SIZES,
    "embedding_dropout": "embedding_dropout",
    "attention_dropout": "attention_dropout",
    "mlp_dropout": "mlp_dropout",
}
TABLES = {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "layer_norm_eps": "norm_eps",
    "local_attention": "local_attention",
    "global_theta": "global_rope_theta",
    "local_theta": "local_rope_theta",
}
LAYER_TYPES: dict[AttentionKind, str] = {
    "global": "full_attention",
    "local": "sliding_attention",
}
KINDS = {layer_type: kind for kind, layer_type in LAYER_TYPES.items()}
# Keys with one supported value, which is also the library's default.
ONLY = {
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
}
TRANSFORMERS_5 = (
    "transformers 5: version 4 supports only a global layer every n layers, from the first one on; "
    "it raises a TypeError for this model"
)


class Rope(Record):
    """The rotary positions of one kind of layer. rope_theta: None means the key of 4.x."""

    model_config = ConfigDict(extra="allow")

    rope_type: str | None = None
    type: str | None = None  # an older name of rope_type
    rope_theta: float | None = Field(None, ge=MIN_THETA)

    @model_validator(mode="after")
    def _is_default(self) -> "Rope":
        changed = [
            f"{key} = {shortened(value)}"
            for key, value in {
                "rope_type": self.rope_type or "default",
                "type": self.type or "default",
                **(self.model_extra or {}),
            }.items()
            if value not in (None, "default")
        ]
        if changed:
            raise ValueError(
                f"found {printable(', '.join(changed))}; expected rope_type = 'default' and a "
                "rope_theta only; scaled rotary positions are not supported: use a model without"
            )
        return self


class RopeParameters(Record):
    """rope_parameters of transformers 5."""

    full_attention: Rope = Rope(rope_theta=None)
    sliding_attention: Rope = Rope(rope_theta=None)


class HfConfig(EncoderSizes):
    """A config.json; a missing key has the default of transformers' ModernBertConfig."""

    max_position_embeddings: int = Field(8192, ge=1, le=MAX_ROWS)
    norm_eps: float = Field(1e-5, gt=0)
    embedding_dropout: float = Field(0.0, ge=0, le=MAX_DROPOUT)
    attention_dropout: float = Field(0.0, ge=0, le=MAX_DROPOUT)
    mlp_dropout: float = Field(0.0, ge=0, le=MAX_DROPOUT)
    local_attention: int = Field(128, ge=2, le=MAX_ROWS)
    # Half of local_attention. transformers sets local_attention by it if it is there.
    sliding_window: int | None = Field(None, ge=1, le=MAX_ROWS // 2)
    layer_types: list[str] | None = None
    rope_parameters: RopeParameters | None = None
    rope_scaling: Rope | None = None
    # Keys of 4.x. null: of local_rope_theta the other theta, of the others no such value.
    global_attn_every_n_layers: int | None = Field(3, ge=1, le=MAX_ROWS)
    global_rope_theta: float = Field(160_000.0, ge=MIN_THETA)
    local_rope_theta: float | None = Field(10_000.0, ge=MIN_THETA)

    @model_validator(mode="after")
    def _names_known_layers(self) -> "HfConfig":
        types = self.layer_types
        if types is None:
            return self
        unknown = sorted(set(types) - set(KINDS))
        if unknown:
            raise ValueError(
                f"layer_types: found {shortened(unknown[0])}; expected {' or '.join(KINDS)}"
            )
        if len(types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(types)} entries; expected num_hidden_layers = "
                f"{self.num_hidden_layers}"
            )
        return self

    @model_validator(mode="after")
    def _has_a_global_layer(self) -> "HfConfig":
        if self.layer_types is not None and LAYER_TYPES["global"] not in self.layer_types:
            raise ValueError(
                "layer_types: no layer has full_attention; a model needs one global layer: use "
                "another model"
            )
        if self.layer_types is None and self.global_attn_every_n_layers is None:
            raise ValueError(
                "global_attn_every_n_layers = null without layer_types; expected one of both: copy "
                "the config.json of the model again"
            )
        return self

    @property
    def kinds(self) -> list[AttentionKind]:
        """The attention of each layer."""
        if self.layer_types is not None:
            return [KINDS[layer_type] for layer_type in self.layer_types]
        n = self.global_attn_every_n_layers
        assert n is not None
        return ["local" if i % n else "global" for i in range(self.num_hidden_layers)]

    @property
    def window(self) -> int:
        """Tokens before a token, and after it, in the attention of a local layer."""
        if self.sliding_window is not None:
            return self.sliding_window
        return self.local_attention // 2  # transformers rounds down

    @property
    def thetas(self) -> tuple[float, float]:
        """Bases of the rotary positions in global and in local layers."""
        local = self.local_rope_theta
        rope = self.rope_parameters or RopeParameters()
        return (
            rope.full_attention.rope_theta or self.global_rope_theta,
            rope.sliding_attention.rope_theta or local or self.global_rope_theta,
        )


class ModernBertFormat(HfFormat):
    """Folders of ModernBertForMaskedLM and of ModernBert's classes for texts and tokens."""

    architecture = "modernbert"
    model_type = "modernbert"
    imported_types = ("modernbert",)
    classes = CLASSES
    prefix = "model."
    before_layer = "layers."
    word_table = "model.embeddings.tok_embeddings.weight"
    output_matrix = "decoder.weight"
    output_bias = "decoder.bias"
    copies: ClassVar[Mapping[str, str]] = {}
    rows_of_words = ("tok_embeddings.weight", "decoder.weight", "decoder.bias")
    has_token_types = False
    predicting_folder_starts_both = True
    discriminator_alone_shares = False
    detection_logits = "logits[0, :, 0]"
    sizes_text = (
        "{num_hidden_layers} layers, hidden {hidden_size}, {num_attention_heads} heads, "
        "feed-forward {intermediate_size}, local attention {local_attention}, "
        "vocabulary {vocab_size:,}"
    )
    default_run = "modern-small"
    sizes = frozenset(SIZES)
    tables = frozenset({*TABLES, "attention_pattern"})
    free = frozenset(
        {
            *ModernBertEncoderConfig.dropout_fields(),
            "max_positions",
            "local_attention",
            "global_theta",
            "local_theta",
        }
    )

    def foreign_names(self, name: str) -> tuple[str, ...]:
        """Always one name."""
        module, _, kind = name.rpartition(".")  # kind: weight or bias
        part, *middle = module.split(".")
        if part.endswith("head"):
            if not middle:  # the output bias
                return (self.output_bias,)
            return (f"{HEAD[middle[0]]}.{kind}",)
        if part.endswith("embeddings"):
            return (f"model.embeddings.{EMBEDDINGS[middle[0]]}.{kind}",)
        if middle[0] == "final_norm":
            return (f"model.final_norm.{kind}",)
        _, layer, module = middle  # discriminator.layers.LAYER.qkv
        return (f"model.layers.{layer}.{LAYER[module]}.{kind}",)

    def config(
        self,
        model: ModelConfig,
        generator: EncoderConfig | None,
        special_ids: SpecialIds,
        role: Role,
    ) -> dict[str, Any]:
        assert isinstance(model, ModernBertModelConfig)
        sizes: EncoderConfig = model if generator is None else generator
        kinds = model.layer_kinds(sizes.num_layers)
        thetas = {"global": model.global_theta, "local": model.local_theta}
        values = {
            "model_type": self.model_type,
            "architectures": [self.classes[role]],
            **{key: getattr(sizes, field) for field, key in SIZES.items()},
            **{key: getattr(model, field) for field, key in TABLES.items()},
            "layer_types": [LAYER_TYPES[kind] for kind in kinds],
            "rope_parameters": {
                LAYER_TYPES[kind]: {"rope_type": "default", "rope_theta": thetas[kind]}
                for kind in LAYER_TYPES
            },
            # null, which stops 4.x: with a missing key it would use another attention.
            "global_attn_every_n_layers": every_n(kinds),
            "initializer_range": model.init_std,
            **ONLY,
            "classifier_pooling": "cls",
            "classifier_dropout": model.mlp_dropout,
            "pad_token_id": special_ids.pad,
            "cls_token_id": special_ids.cls,
            "sep_token_id": special_ids.sep,
            "bos_token_id": special_ids.cls,
            "eos_token_id": special_ids.sep,
            "tie_word_embeddings": True,
        }
        if role == "detection":
            values |= {"id2label": {"0": "replaced"}, "label2id": {"replaced": 0}}
        return values

    def requirement(self, config: Mapping[str, Any]) -> str | None:
        return TRANSFORMERS_5 if config["global_attn_every_n_layers"] is None else None

    def parse(
        self,
        main: Mapping[str, Any],
        generator: Mapping[str, Any] | None = None,
        where: str = "config.json",
    ) -> tuple[ModernBertModelConfig, ModernBertGeneratorConfig]:
        """Both parts need the attention of one pattern, and equal windows and thetas."""
        first = _read(main, where)
        second = _read(generator, OF_GENERATOR) if generator else first
        for field, key in TABLES.items():
            if first.tables[field] != second.tables[field]:
                raise unequal(where, key, first.tables[field], second.tables[field])
        shorter, longer = sorted((first.kinds, second.kinds), key=len)
        if longer[: len(shorter)] != shorter:
            raise UserError(
                f"{where}: layer_types of discriminator and generator have different patterns; "
                "expected equal types in the layers that both have: import one part alone"
            )
        widths = {part.sizes["hidden_size"] for part in (first, second)}
        values = {
            **first.sizes,
            **first.tables,
            "architecture": self.architecture,
            "attention_pattern": shortest_pattern(longer),
            "sharing": "untied" if len(widths) > 1 else "shared",
        }
        model = parse_config(values, where, ModernBertModelConfig)
        return model, parse_config(second.sizes, where, ModernBertGeneratorConfig)

    def heads(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Head, ...]:
        """The class in config.json decides between a discriminator and a regression of texts."""
        if self.output_bias in tensors:
            return ("generator",)
        named = config.get("architectures")
        is_of_tokens = isinstance(named, list) and self.classes["detection"] in named
        classifier = tensors.get("classifier.weight")
        if is_of_tokens and classifier is not None and classifier.shape[:1] == (1,):
            return ("discriminator",)
        return ()

    def head_of(self, name: str, heads: tuple[Head, ...]) -> Head | Literal["task"] | None:
        if not name.startswith(("head.", "decoder.", "classifier.")):
            return None
        return heads[0] if heads else "task"

    def classifier(
        self,
        state: Mapping[str, Tensor],
        kind: str,
        label_range: tuple[float, float] | None = None,
    ) -> tuple[Role, dict[str, Tensor]]:
        """The head is that of the stock classes."""
        tensors = self.to_hf(state, "discriminator")
        for name, value in state.items():
            if name.startswith("head."):
                tensors[self.foreign_names(name)[0]] = value
        if kind == "token_classification":
            return "token_classification", tensors
        if kind == "multiple_choice":
            return "multiple_choice", tensors
        if kind == "question_answering":
            return "question_answering", tensors
        low, high = label_range or (0.0, 1.0)
        tensors["classifier.weight"] = tensors["classifier.weight"] * (high - low)
        tensors["classifier.bias"] = tensors["classifier.bias"] * (high - low) + low
        return "sequence_classification", tensors

    def stock_names(self, tensors: Iterable[str]) -> dict[str, str]:
        bare = ("embeddings.", "layers.", "final_norm.")
        return {name: f"model.{name}" if name.startswith(bare) else name for name in tensors}


class _Values(NamedTuple):
    """The values of one config.json by the fields of our configs."""

    sizes: dict[str, Any]
    tables: dict[str, Any]
    kinds: list[AttentionKind]


def _read(config: Mapping[str, Any], where: str) -> _Values:
    """UserError for missing or unsupported values."""
    check_only(config, where, ONLY)
    record = parse_record(dict(config), where, HfConfig)
    global_theta, local_theta = record.thetas
    values = record.model_dump() | {
        "local_attention": 2 * record.window,
        "global_rope_theta": global_theta,
        "local_rope_theta": local_theta,
    }
    return _Values(
        {field: values[key] for field, key in SIZES.items()},
        {field: values[key] for field, key in TABLES.items()},
        record.kinds,
    )


def shortest_pattern(kinds: list[AttentionKind]) -> list[AttentionKind]:
    """The shortest list that gives `kinds` when it is repeated; the last copy may be cut."""
    size = next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n])
    return kinds[:size]


def every_n(kinds: list[AttentionKind]) -> int | None:
    """n if the layers 0, n, 2 n, ... are the global ones; None for another pattern."""
    pattern = shortest_pattern(kinds)
    is_first_only = pattern[0] == "global" and "global" not in pattern[1:]
    return len(pattern) if is_first_only else None
