"""Reading of WordPiece options and vocabularies from the files of Hugging Face tokenizers.

Only a WordPiece with the normalizer and the pre-tokenizer of BERT is supported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import Record, parse_record, read_json, read_record
from electra_ds.common.printable import printable, shortened
from electra_ds.data.tokenizer.normalization import FORMS, Form, steps_as_json

TOKENIZER_JSON = "tokenizer.json"
# Key of tokenizer_config.json that records the normalization of an exported tokenizer.
NORMALIZATION_KEY = "electra_ds_normalization"
OTHERWISE = "put vocab.txt or a SentencePiece .model into the folder, or give it with --tokenizer"


class Options(NamedTuple):
    """Options of a WordPiece; None for an option that a source does not state."""

    lowercase: bool | None = None
    strip_accents: bool | None = None
    normalization: Form | None = None

    def or_else(self, other: Options) -> Options:
        """Return these options, with the values of `other` for those that are None."""
        return Options(
            other.lowercase if self.lowercase is None else self.lowercase,
            other.strip_accents if self.strip_accents is None else self.strip_accents,
            other.normalization if self.normalization is None else self.normalization,
        )


class _Foreign(Record):
    """A part of another program's file. Undeclared keys are ignored."""

    model_config = ConfigDict(extra="ignore")


class _Config(_Foreign):
    """The keys of tokenizer_config.json that are read."""

    do_lower_case: bool | None = None
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool | None = None
    word_tokenizer_type: str | None = None
    electra_ds_normalization: Form | None = None


class _BertNormalizer(_Foreign):
    lowercase: bool
    strip_accents: bool | None = None
    clean_text: bool = True
    handle_chinese_chars: bool = True


class _WordPieceModel(_Foreign):
    vocab: dict[str, int]
    continuing_subword_prefix: str | None = "##"
    max_input_chars_per_word: int | None = 100


class _AddedToken(_Foreign):
    id: int
    content: str
    special: bool = False


class _Pretokenizer(_Foreign):
    type: str


class _TokenizerJson(_Foreign):
    """The keys of the tokenizer.json of a WordPiece that are read, without its normalizer."""

    model: _WordPieceModel
    added_tokens: tuple[_AddedToken, ...] = ()
    pre_tokenizer: _Pretokenizer | None = None


def read_tokenizer_config(file: Path) -> Options:
    """Return the options in a tokenizer_config.json.

    Raises UserError if it is malformed, or if it states a pre-tokenization other than BERT's.
    """
    stored = read_record(file, _Config, "the options of a Hugging Face tokenizer")
    if stored.tokenize_chinese_chars is False or stored.word_tokenizer_type not in (None, "basic"):
        raise UserError(
            f"{printable(file)}: found tokenize_chinese_chars = false or word_tokenizer_type; only "
            "BERT's pre-tokenization is supported"
        )
    return Options(stored.do_lower_case, stored.strip_accents, stored.electra_ds_normalization)


def normalizer_options(file: Path) -> Options:
    """Return the options that the normalizer of a tokenizer.json states.

    All options are None if the normalizer is not BERT's. Raises UserError if it is malformed.
    """
    content = read_json(file, "a tokenizer of Hugging Face")
    form, bert = _divided(content.get("normalizer"))
    if bert is None:
        return Options()
    normalizer = _part(bert, _BertNormalizer, file, "normalizer")
    return Options(normalizer.lowercase, normalizer.strip_accents, form)


def read_tokenizer_json(file: Path) -> tuple[bytes, Options]:
    """Return (content of a vocab.txt, options) of the WordPiece in a tokenizer.json.

    Raises UserError for any other tokenizer, and for settings that are not BERT's.
    """
    content = read_json(file, "a tokenizer of Hugging Face")
    form, bert = _divided(content.get("normalizer"))
    kind = _type_of(content.get("model"))
    if kind != "WordPiece" or bert is None:
        raise UserError(
            f"{printable(file)}: found a model of type {shortened(kind)} and a normalizer of type "
            f"{shortened(_type_of(content.get('normalizer')))}; expected WordPiece and "
            f"BertNormalizer, or BPE and NFC; otherwise {OTHERWISE}"
        )
    normalizer = _part(bert, _BertNormalizer, file, "normalizer")
    tokenizer = _part(content, _TokenizerJson, file, "")
    if unsupported := _unsupported_settings(tokenizer, normalizer):
        raise UserError(
            f"{printable(file)}: found {', '.join(unsupported)}; expected those of BERT; "
            f"otherwise {OTHERWISE}"
        )
    vocabulary = _vocabulary(tokenizer)
    names = sorted(vocabulary, key=lambda name: vocabulary[name])
    lowercase, strip_accents = normalizer.lowercase, normalizer.strip_accents
    options = Options(lowercase, lowercase if strip_accents is None else strip_accents, form)
    return "".join(f"{name}\n" for name in names).encode(), options


def _type_of(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else None


def _part(value: Any, kind: type, file: Path, name: str) -> Any:
    place = f"{file}: {name}" if name else file
    return parse_record(value, place, kind, "a tokenizer of Hugging Face")


def _divided(normalizer: Any) -> tuple[Form, dict | None]:
    """Return (our normalization, BERT's normalizer) of the normalizer of a tokenizer.json.

    BERT's normalizer is None if the file has any other normalizer.
    """
    if _type_of(normalizer) == "BertNormalizer":
        return "none", normalizer
    steps = normalizer.get("normalizers") if _type_of(normalizer) == "Sequence" else None
    if isinstance(steps, list) and steps and _type_of(steps[-1]) == "BertNormalizer":
        for form in FORMS:
            if form != "none" and steps[:-1] == steps_as_json(form):
                return form, steps[-1]
    return "none", None


def _vocabulary(tokenizer: _TokenizerJson) -> dict[str, int]:
    """Return {entry: id}, with the special tokens that are not entries of the model."""
    added = {token.content: token.id for token in tokenizer.added_tokens if token.special}
    return {**added, **tokenizer.model.vocab}


def _unsupported_settings(tokenizer: _TokenizerJson, normalizer: _BertNormalizer) -> list[str]:
    """Return descriptions of the settings in a tokenizer.json that differ from BERT's."""
    model = tokenizer.model
    vocabulary = _vocabulary(tokenizer)
    found = []
    for key in ("clean_text", "handle_chinese_chars"):
        if not getattr(normalizer, key):
            found.append(f"{key} = false")
    if model.continuing_subword_prefix not in (None, "##"):
        found.append("a prefix other than ##")
    if model.max_input_chars_per_word not in (None, 100):
        found.append(f"max_input_chars_per_word = {model.max_input_chars_per_word}")
    if tokenizer.pre_tokenizer and tokenizer.pre_tokenizer.type != "BertPreTokenizer":
        found.append(f"pre_tokenizer = {printable(tokenizer.pre_tokenizer.type)}")
    own = [token.content for token in tokenizer.added_tokens if token.content not in vocabulary]
    if own:
        found.append(f"added tokens such as {shortened(own[0])}")
    if any("\n" in name or "\r" in name for name in vocabulary):
        found.append("an entry with a line end")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        found.append("ids with gaps")
    return found
