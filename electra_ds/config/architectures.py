"""Config sections of the encoders: the common sizes, and those of each architecture.

`model` holds the sizes of the discriminator (main encoder) and the settings of both encoders,
`generator` the sizes of the generator. Both have the architecture `model.architecture`.
"""

import json
from typing import Literal

from pydantic import field_validator, model_validator

from electra_ds.common.section import Section, science

# Upper limits. They are far above every useful value, and small enough that no product of them
# leaves the range of int64 or float64, and that a config read from a file of another person is
# refused before memory is allocated.
MAX_WIDTH = 2**16  # of a layer or a table
MAX_LAYERS = 1024
MAX_ROWS = 2**24  # of a table, and of a batch
# With a base below 1 the frequencies of rotary positions grow, up to the infinity of fp32.
MIN_THETA = 1.0
# A larger share of zeros leaves no signal, and 1 - p of the kernel may be rounded to 0.
MAX_DROPOUT = 0.9
KNOWN = "electra (BERT's), modernbert or deberta_v2"  # values of model.architecture


class EncoderConfig(Section):
    """Sizes of one encoder, common to all architectures."""

    hidden_size: int = science(..., "width of the encoder", ge=1, le=MAX_WIDTH)
    num_layers: int = science(..., "transformer layers", ge=1, le=MAX_LAYERS)
    num_heads: int = science(..., "attention heads; must divide hidden_size", ge=1, le=MAX_WIDTH)
    ffn_size: int = science(..., "width of the feed-forward layer", ge=1, le=MAX_WIDTH)

    @model_validator(mode="after")
    def _heads_divide(self) -> "EncoderConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        return self

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def dropout_fields(cls) -> list[str]:
        """Names of the fields that are probabilities of dropout."""
        return [name for name in cls.model_fields if name.endswith("_dropout")]


class ModelConfig(EncoderConfig):
    """Sizes of the discriminator's encoder, and settings of both encoders, of any architecture."""

    architecture: str
    max_positions: int
    layer_norm_eps: float
    init: Literal["normal", "fan_in"] = science(
        "normal",
        "initial matrices: truncated normal with std init_std, or normal with std 1/sqrt(inputs)",
    )
    init_std: float = science(0.02, "standard deviation of `normal`", gt=0, le=100)
    embedding_init_std: float = science(
        0.02, "standard deviation of the embedding tables", gt=0, le=100
    )
    sharing: Literal["shared", "untied", "all", "gdes"] = science(
        "shared",
        "generator and discriminator share the embeddings, share nothing (untied), share the "
        "encoder as well (all), or share the embeddings without the discriminator's gradient (gdes)",
    )
    vocab_size: int | None = science(
        None, "word table rows; filled from the data", ge=6, le=MAX_ROWS
    )

    @property
    def word_width(self) -> int:
        """Width of the word table of the discriminator."""
        raise NotImplementedError

    @property
    def segments(self) -> int | None:
        """Number of token types; None for an architecture without token types."""
        raise NotImplementedError

    def generator_width(self, generator: EncoderConfig) -> int:
        """Width of the word table with which the generator embeds."""
        return generator.hidden_size if self.sharing == "untied" else self.word_width

    def check_generator(self, generator: EncoderConfig) -> None:
        """Raise ValueError for a generator that does not fit `sharing`."""
        if self.sharing != "all":
            return
        for name in type(generator).model_fields:
            own, other = getattr(self, name), getattr(generator, name)
            if own != other and other is not None:
                raise ValueError(
                    "model.sharing = 'all' is one encoder: every field of generator must equal "
                    f"that of model, but {name} is {other} in generator and {own} in model: set "
                    "equal values, or model.sharing = shared"
                )

    def _check_equal_widths(self, generator: EncoderConfig) -> None:
        """Raise ValueError where both encoders share embeddings and differ in width."""
        if self.sharing in ("shared", "gdes") and generator.hidden_size != self.hidden_size:
            raise ValueError(
                f"generator.hidden_size {generator.hidden_size} differs from model.hidden_size "
                f"{self.hidden_size}; {self.architecture} has no projection after the embeddings, "
                "so that shared embeddings need equal widths: change generator.hidden_size, or set "
                "model.sharing = untied"
            )


# ------------------------------------------------------------------------------------- electra


class ElectraEncoderConfig(EncoderConfig):
    """Sizes of one encoder of the architecture `electra`."""

    hidden_dropout: float = science(
        0.1, "dropout after embeddings and sublayers", ge=0, le=MAX_DROPOUT
    )
    attention_dropout: float = science(
        0.1, "dropout on attention probabilities", ge=0, le=MAX_DROPOUT
    )


class ElectraGeneratorConfig(ElectraEncoderConfig):
    """Sizes of the generator's encoder, as integers and not as fractions of the discriminator."""

    embedding_size: int | None = science(
        None,
        "width of its own tables with model.sharing = untied; null: hidden_size",
        ge=1,
        le=MAX_WIDTH,
    )


class ElectraModelConfig(ElectraEncoderConfig, ModelConfig):
    """BERT's post-LN encoder with learned positions, as in ELECTRA."""

    architecture: Literal["electra"] = science(
        "electra", f"encoder of discriminator and generator: {KNOWN}"
    )
    embedding_size: int = science(
        ..., "width of the word, position and token-type tables", ge=1, le=MAX_WIDTH
    )
    max_positions: int = science(512, "rows of the position table", ge=1, le=MAX_WIDTH)
    type_vocab_size: int = science(2, "rows of the token-type table", ge=1, le=MAX_WIDTH)
    layer_norm_eps: float = science(1e-12, "epsilon of every LayerNorm", gt=0, le=1)

    @property
    def word_width(self) -> int:
        return self.embedding_size

    @property
    def segments(self) -> int | None:
        return self.type_vocab_size

    def generator_width(self, generator: EncoderConfig) -> int:
        assert isinstance(generator, ElectraGeneratorConfig)
        if self.sharing == "untied" and generator.embedding_size is not None:
            return generator.embedding_size
        return super().generator_width(generator)

    def check_generator(self, generator: EncoderConfig) -> None:
        super().check_generator(generator)
        assert isinstance(generator, ElectraGeneratorConfig)
        if generator.embedding_size is not None and self.sharing != "untied":
            raise ValueError(
                f"generator.embedding_size = {generator.embedding_size}, but model.sharing = "
                f"{self.sharing} gives the generator the tables of the discriminator: leave it "
                "out, or set model.sharing = untied"
            )


# ---------------------------------------------------------------------------------- modernbert

AttentionKind = Literal["global", "local"]


class ModernBertEncoderConfig(EncoderConfig):
    """Sizes of one encoder of the architecture `modernbert`.

    ffn_size is the width after the gate (intermediate_size of transformers); the first matrix of
    the feed-forward layer has twice as many outputs.
    """

    embedding_dropout: float = science(0.0, "dropout after the embeddings", ge=0, le=MAX_DROPOUT)
    attention_dropout: float = science(
        0.0,
        "dropout on attention probabilities and on the output of attention",
        ge=0,
        le=MAX_DROPOUT,
    )
    mlp_dropout: float = science(0.0, "dropout inside the feed-forward layer", ge=0, le=MAX_DROPOUT)

    @model_validator(mode="after")
    def _heads_are_even(self) -> "ModernBertEncoderConfig":
        if self.head_size % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} / num_heads {self.num_heads} = {self.head_size} "
                "is odd; rotary positions need an even width of a head: choose another num_heads"
            )
        return self


class ModernBertGeneratorConfig(ModernBertEncoderConfig):
    """Sizes of the generator's encoder, as integers and not as fractions of the discriminator."""


class ModernBertModelConfig(ModernBertEncoderConfig, ModelConfig):
    """ModernBERT's pre-LN encoder: rotary positions, gated feed-forward, local attention."""

    architecture: Literal["modernbert"] = science(
        "modernbert", f"encoder of discriminator and generator: {KNOWN}"
    )
    max_positions: int = science(
        8192, "longest row; a limit only, because there is no position table", ge=1, le=MAX_WIDTH
    )
    layer_norm_eps: float = science(1e-5, "epsilon of every LayerNorm", gt=0, le=1)
    attention_pattern: list[AttentionKind] = science(
        ["global", "local", "local"],
        "attention of the layers from the first one on, repeated; needs a global layer",
        max_length=MAX_LAYERS,
    )
    local_attention: int = science(
        128,
        "window of the local layers in tokens, even: half of it before a token, half after it",
        le=2 * MAX_WIDTH,
    )
    global_theta: float = science(
        160_000.0, "base of the rotary positions in global layers, from 1 on", le=1e12
    )
    local_theta: float = science(
        10_000.0, "base of the rotary positions in local layers, from 1 on", le=1e12
    )

    @field_validator("local_attention")
    @classmethod
    def _is_a_window(cls, value: int) -> int:
        if value < 2 or value % 2:
            raise ValueError(
                f"{value}: expected an even number of at least 2, such as 128; for layers without "
                'a window use model.attention_pattern = ["global"]'
            )
        return value

    @field_validator("global_theta", "local_theta")
    @classmethod
    def _is_a_base(cls, value: float) -> float:
        if value < MIN_THETA:
            raise ValueError(f"{value}: expected a number from 1 on, such as 10000 or 160000")
        return value

    @model_validator(mode="after")
    def _has_a_global_layer(self) -> "ModernBertModelConfig":
        if "global" not in self.layer_kinds(self.num_layers):
            raise ValueError(
                f"attention_pattern = {json.dumps(self.attention_pattern)} gives "
                f"{self.num_layers} layers without a global one; expected a list such as "
                '["global", "local", "local"]'
            )
        return self

    def layer_kinds(self, num_layers: int) -> list[AttentionKind]:
        """The attention of each of num_layers layers."""
        pattern = self.attention_pattern
        return [pattern[i % len(pattern)] for i in range(num_layers)] if pattern else []

    @property
    def word_width(self) -> int:
        return self.hidden_size

    @property
    def segments(self) -> int | None:
        return None

    def check_generator(self, generator: EncoderConfig) -> None:
        super().check_generator(generator)
        self._check_equal_widths(generator)
        if "global" not in self.layer_kinds(generator.num_layers):
            raise ValueError(
                f"attention_pattern = {json.dumps(self.attention_pattern)} gives the generator's "
                f"{generator.num_layers} layers no global one; expected a list such as "
                '["global", "local", "local"]'
            )


# ---------------------------------------------------------------------------------- deberta_v2


class DebertaV2EncoderConfig(EncoderConfig):
    """Sizes of one encoder of the architecture `deberta_v2`."""

    hidden_dropout: float = science(
        0.1, "dropout after embeddings, relative embeddings and sublayers", ge=0, le=MAX_DROPOUT
    )
    attention_dropout: float = science(
        0.1, "dropout on attention probabilities", ge=0, le=MAX_DROPOUT
    )


class DebertaV2GeneratorConfig(DebertaV2EncoderConfig):
    """Sizes of the generator's encoder, as integers and not as fractions of the discriminator."""


class DebertaV2ModelConfig(DebertaV2EncoderConfig, ModelConfig):
    """DeBERTa's post-LN encoder with disentangled attention and relative positions."""

    architecture: Literal["deberta_v2"] = science(
        "deberta_v2", f"encoder of discriminator and generator: {KNOWN}"
    )
    max_positions: int = science(
        512,
        "longest row, and the distance at which the last bucket of positions begins",
        ge=1,
        le=MAX_WIDTH,
    )
    position_buckets: int = science(
        256,
        "buckets of relative positions in each direction, even; the table has twice as many rows",
        le=MAX_WIDTH,
    )
    layer_norm_eps: float = science(1e-7, "epsilon of every LayerNorm", gt=0, le=1)

    @field_validator("position_buckets")
    @classmethod
    def _is_a_number_of_buckets(cls, value: int) -> int:
        if value < 2 or value % 2:
            raise ValueError(
                f"{value}: expected an even number of at least 2, such as 256: one half are single "
                "distances, the other half logarithmic steps"
            )
        return value

    @model_validator(mode="after")
    def _buckets_fit_positions(self) -> "DebertaV2ModelConfig":
        if self.max_positions - 1 <= self.position_buckets // 2:
            raise ValueError(
                f"max_positions {self.max_positions} is too small for position_buckets "
                f"{self.position_buckets}; expected at least {self.position_buckets // 2 + 2}: "
                "raise max_positions, or use fewer buckets"
            )
        return self

    @property
    def word_width(self) -> int:
        return self.hidden_size

    @property
    def segments(self) -> int | None:
        return None

    def check_generator(self, generator: EncoderConfig) -> None:
        super().check_generator(generator)
        self._check_equal_widths(generator)


# model.architecture -> the section `model`.
MODELS: dict[str, type[ModelConfig]] = {
    "electra": ElectraModelConfig,
    "modernbert": ModernBertModelConfig,
    "deberta_v2": DebertaV2ModelConfig,
}
DEFAULT_ARCHITECTURE = "electra"  # of a config without model.architecture
