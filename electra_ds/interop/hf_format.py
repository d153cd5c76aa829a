"""Interface of the Hugging Face folders of one architecture: names, tensors and config keys.

"Stock" means a class of the transformers library without changes. `part` is "discriminator" (the
main encoder) or "generator". A folder holds one part.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import Record
from electra_ds.common.printable import printable, shortened
from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.architectures import EncoderConfig, ModelConfig
from electra_ds.model.weights import WEIGHT_TYPES, check_type

# What the stock class of a folder does: one logit for each token that it was replaced, one for each
# entry of the vocabulary, one for each label of a text, one for each label of a token, one for each
# choice, start and end logits of each token.
Role = Literal[
    "detection",
    "prediction",
    "sequence_classification",
    "token_classification",
    "question_answering",
    "multiple_choice",
]
# A head of pretraining in a folder: that of the discriminator, or one that predicts tokens.
Head = Literal["discriminator", "generator"]

# Limits of the sizes in the config.json of a foreign model.
MAX_LAYERS, MAX_WIDTH, MAX_ROWS = 10_000, 2**24, 2**31 - 1
OF_GENERATOR = "config.json of the generator"  # in messages
# Fields of our configs -> keys of config.json, of every architecture.
ENCODER_SIZES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
}


class EncoderSizes(Record):
    """The sizes in the config.json of every architecture; other keys are ignored."""

    model_config = ConfigDict(extra="ignore")

    vocab_size: int = Field(ge=1, le=MAX_ROWS)
    hidden_size: int = Field(ge=1, le=MAX_WIDTH)
    num_hidden_layers: int = Field(ge=1, le=MAX_LAYERS)
    num_attention_heads: int = Field(ge=1, le=MAX_WIDTH)
    intermediate_size: int = Field(ge=1, le=MAX_WIDTH)


class HfFormat(ABC):
    """Conversion between an architecture of electra_ds and its stock classes."""

    architecture: ClassVar[str]  # model.architecture
    model_type: ClassVar[str]  # of the stock classes
    imported_types: ClassVar[tuple[str, ...]]  # model types of folders that can be imported
    classes: ClassVar[Mapping[Role, str]]  # the stock class of each role
    prefix: ClassVar[str]  # of encoder tensors, which a bare model lacks
    before_layer: ClassVar[str]  # what stands before the number of a layer in a name
    word_table: ClassVar[str]
    output_matrix: ClassVar[str]  # of the head that predicts tokens; tied to the word table
    output_bias: ClassVar[str]
    copies: ClassVar[Mapping[str, str]]  # tensors that repeat another one -> that one
    rows_of_words: ClassVar[tuple[str, ...]]  # ends of names with a row per vocabulary entry
    has_token_types: ClassVar[bool]  # whether the stock classes take token_type_ids
    predicting_folder_starts_both: ClassVar[bool]  # in an import; otherwise it is a generator
    discriminator_alone_shares: ClassVar[bool]  # its embeddings, in an import, whatever --run says
    # Python code of cards: the call of a discriminator, and the logits of the first text's tokens
    detection_call: ClassVar[str] = "model(**inputs).logits"
    detection_logits: ClassVar[str]
    sizes_text: ClassVar[str]  # template for the card; its fields are keys of config.json
    default_run: ClassVar[str]  # preset for an import
    sizes: ClassVar[frozenset[str]]  # fields of `model` and `generator` that a config.json holds
    tables: ClassVar[frozenset[str]]  # other fields of `model` that a config.json holds
    free: ClassVar[frozenset[str]]  # those of both that an import may change
    # Free fields of `model` on which equal rows have other logits -> what a change of them does.
    effects: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def foreign_names(self, name: str) -> tuple[str, ...]:
        """The stock names of one of our parameters: one, or several that are joined in ours."""

    @abstractmethod
    def config(
        self,
        model: ModelConfig,
        generator: EncoderConfig | None,
        special_ids: SpecialIds,
        role: Role,
    ) -> dict[str, Any]:
        """The config.json of one part for its stock class, without the labels of a task.

        generator: sizes of the generator, if it is the part; None for the discriminator.
        """

    @abstractmethod
    def parse(
        self,
        main: Mapping[str, Any],
        generator: Mapping[str, Any] | None = None,
        where: str = "config.json",
    ) -> tuple[ModelConfig, EncoderConfig]:
        """The sections `model` and `generator` of the config.json of both parts.

        generator: that of the generator; None for a folder alone: its sizes are used for both.
        where: the file of `main`, for messages. Raises UserError for a missing key, for values
        that the encoder of electra_ds does not support, and for parts that do not fit together.
        """

    @abstractmethod
    def heads(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Head, ...]:
        """The heads of pretraining in a folder. tensors: by their stock names."""

    @abstractmethod
    def head_of(self, name: str, heads: tuple[Head, ...]) -> Head | Literal["task"] | None:
        """The head that a foreign tensor belongs to; None if it is of the encoder or unknown.

        heads: the `heads` of its folder.
        """

    @abstractmethod
    def classifier(
        self,
        state: Mapping[str, Tensor],
        kind: str,
        label_range: tuple[float, float] | None = None,
    ) -> tuple[Role, dict[str, Tensor]]:
        """The role and the state_dict of a fine-tuned encoder, with equal logits.

        state: fp32 tensors of the encoder and of the task head (head.*). kind: that of the task.
        label_range: the range of a regression's labels; it is folded into the weights, so that
        the stock logit is in the unit of the labels.
        """

    @abstractmethod
    def stock_names(self, tensors: Iterable[str]) -> dict[str, str]:
        """Tensor names of a folder that can be imported -> names in a stock class with a head."""

    def renamed(
        self, tensors: Mapping[str, Tensor], where: str
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(tensors by their stock names, stock name -> name in the folder).

        A tensor with the stock name of another one is left under its own name if both are equal.
        Raises UserError if they differ, because it is not known which one was trained.
        """
        originals: dict[str, str] = {}
        for name, new in sorted(self.stock_names(tensors).items(), key=_stock_first):
            other = originals.get(new)
            if other is None:
                originals[new] = name
            elif _are_equal(tensors[other], tensors[name]):
                originals[name] = name
            else:
                raise UserError(
                    f"{where}: {printable(other)} and {printable(name)} are the same parameter with "
                    "different values; expected one of them: remove the other one"
                )
        return {new: tensors[name] for new, name in originals.items()}, originals

    def requirement(self, config: Mapping[str, Any]) -> str | None:
        """What a folder with this config.json needs beside transformers 4.57 or newer."""
        return None

    def to_hf(self, state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
        """One part of our tensors (without padded rows) as the state_dict of its stock class.

        The output matrix of a head that predicts tokens is listed as well.
        """
        tensors: dict[str, Tensor] = {}
        for name in part_names(state, part):
            foreign = self.foreign_names(name)
            tensors.update(zip(foreign, state[name].chunk(len(foreign)), strict=True))
        if self.output_bias in tensors:
            tensors[self.output_matrix] = tensors[self.word_table]
        return tensors

    def from_hf(
        self, tensors: Mapping[str, Tensor], names: Iterable[str], part: str
    ) -> dict[str, Tensor]:
        """Our tensors of one part (fp32, without padded rows) from those of its stock class.

        names: all our parameters; those of other parts are ignored. A bare model, which has no
        prefix, is accepted. Raises UserError with the name of the first missing tensor.
        """
        stock, _ = self.renamed(tensors, f"Hugging Face {part}")
        state = {}
        for name in part_names(names, part):
            chunks = []
            for foreign in self.foreign_names(name):
                chunk = stock.get(foreign)
                if chunk is None:
                    raise UserError(
                        f"Hugging Face {part}: no tensor {foreign} for {name}; "
                        f"expected the folder of a {part}"
                    )
                chunks.append(chunk)
            state[name] = joined(chunks, name, f"Hugging Face {part}")
        return state

    def check_tied(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
    ) -> None:
        """Raise UserError unless the output matrix of the head that predicts tokens is the word
        table, the only one that electra_ds has.

        tensors: those of a folder with such a head, by their stock names.
        """
        table = tensors.get(self.word_table, tensors.get(self.word_table.removeprefix(self.prefix)))
        matrix = tensors.get(self.output_matrix)
        for name, value in ((self.word_table, table), (self.output_matrix, matrix)):
            if value is not None:
                check_type(value, name, where)
        if matrix is None:
            if config.get("tie_word_embeddings") is not False:
                return
            problem = "tie_word_embeddings = false, but the weights have no such matrix"
        elif table is not None and torch.equal(matrix.float(), table.float()):
            return
        else:
            problem = "it differs from the word table"
        raise UserError(
            f"{where}: {self.output_matrix}, the output matrix of the language-modelling head: "
            f"{problem}; expected tied embeddings: use a model that was trained with them, or "
            "`electra-ds import`, which leaves this matrix out"
        )


def _stock_first(names: tuple[str, str]) -> tuple[bool, str]:
    name, stock = names
    return name != stock, name


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype in WEIGHT_TYPES and torch.equal(one, other)


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


def joined(chunks: list[Tensor], name: str, where: str) -> Tensor:
    """One of our tensors (fp32) from those of a foreign model: one, or query, key and value.

    UserError when they are no floating-point weights, or differ in shape.
    """
    for chunk in chunks:
        check_type(chunk, f"the tensor of {name}", where)
    if len(chunks) == 1:
        return chunks[0].detach().float()
    shapes = [tuple(chunk.shape) for chunk in chunks]
    if len(set(shapes)) > 1 or not shapes[0]:
        raise UserError(f"{where}: the tensors of {name} have the shapes {shapes}; expected one")
    return torch.cat([chunk.detach().float() for chunk in chunks])


def check_only(config: Mapping[str, Any], where: str, only: Mapping[str, Any]) -> None:
    """Raise UserError unless each of these keys is missing or has the one supported value."""
    for key, value in only.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{where}: {key} = {shortened(config[key])}; only {value!r} is supported; use a "
                "model that was trained with it"
            )


def unequal(where: str, key: str, main: Any, generator: Any) -> UserError:
    """The error for a key that must be equal in both parts."""
    return UserError(
        f"{where}: {key} of discriminator and generator differ ({main} and {generator}); "
        "expected equal values"
    )
