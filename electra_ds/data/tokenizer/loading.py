"""Loading of a tokenizer from a vocabulary file or a folder, with its options."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import Record, read_record, read_small
from electra_ds.common.printable import printable
from electra_ds.data.tokenizer.base import Tokenizer
from electra_ds.data.tokenizer.hugging_face import (
    TOKENIZER_JSON,
    Options,
    normalizer_options,
    read_tokenizer_config,
    read_tokenizer_json,
)
from electra_ds.data.tokenizer.normalization import Form
from electra_ds.data.tokenizer.saving import VOCABULARY_FILES, next_vocabulary
from electra_ds.data.tokenizer.sentencepiece import SentencePiece
from electra_ds.data.tokenizer.wordpiece import WordPiece

LFS_POINTER = b"version https://git-lfs"


class StoredOptions(Record):
    """options.json. Users may write one with lowercase and strip_accents only."""

    kind: Literal["wordpiece", "sentencepiece"] | None = None
    vocab_size: int | None = Field(None, ge=1, lt=1 << 31)
    lowercase: bool | None = None
    strip_accents: bool | None = None
    # Version 0.1 had no such key, and its `prepare` put all text into NFC.
    normalization: Form = "nfc"
    special_ids: dict[str, int] | None = None
    fingerprint: str | None = None


def load_tokenizer(
    path: str | Path,
    *,
    lowercase: bool | None = None,
    strip_accents: bool | None = None,
    normalization: Form | None = None,
) -> Tokenizer:
    """Load a vocab.txt, an spm .model file, or a folder with one of them (ours or Hugging Face's).

    A folder may also hold a tokenizer.json alone, if it is a WordPiece of BERT.

    The options of a vocab.txt are read from options.json, tokenizer_config.json or tokenizer.json
    in its folder. For those that no file states, the arguments count. Without these, text is
    lower-cased if no entry has an upper-case letter, accents are stripped if text is lower-cased,
    and the text is not normalized before, as in BERT's own code.

    Raises UserError when the vocabulary is missing, malformed, or lacks a special token, and when
    an argument contradicts a file.
    """
    try:
        file = _vocabulary_file(Path(path))
    except OSError as error:  # a name that is too long, a folder that cannot be read
        raise UserError(
            f"{printable(path)}: cannot be read ({error.strerror}); expected a vocabulary"
        ) from None
    chosen = Options(lowercase, strip_accents, normalization)
    if file.name == TOKENIZER_JSON:
        content, stated = read_tokenizer_json(file)
        return _wordpiece(content, stated, chosen, file, file)
    content = read_small(file, "a vocabulary")
    if content.startswith(LFS_POINTER):
        raise UserError(
            f"{printable(file)}: found a pointer of Git LFS instead of the file; get it with "
            "`git lfs pull`"
        )
    folder = file.parent
    ours = _read_options(folder)
    if file.suffix == ".model":
        return _checked(_sentencepiece(content, ours, chosen, file), ours, folder)
    source = folder / "options.json"
    if ours:
        stated = Options(ours.lowercase, ours.strip_accents, ours.normalization)
    else:
        source, stated = _hugging_face_options(folder)
    return _checked(_wordpiece(content, stated, chosen, file, source, ours), ours, folder)


def _vocabulary_file(path: Path) -> Path:
    names = (*VOCABULARY_FILES, TOKENIZER_JSON)
    if path.is_dir():
        if interrupted := next_vocabulary(path):
            return interrupted
        for name in names:
            if (path / name).is_file():
                return path / name
        raise UserError(
            f"{printable(path)}: no vocabulary in this folder; expected one of {', '.join(names)}"
        )
    if not path.is_file():
        is_there = os.path.lexists(path)
        problem = "is a pipe, a device or a link to nothing" if is_there else "not found"
        raise UserError(
            f"{printable(path)}: {problem}; expected a vocab.txt, an spm .model file or a folder "
            "with one of them"
        )
    return path


def _read_options(folder: Path) -> StoredOptions | None:
    file = folder / "options.json"
    return read_record(file, StoredOptions, "a tokenizer's options") if file.is_file() else None


def _hugging_face_options(folder: Path) -> tuple[Path, Options]:
    """(file, options that it states) for a folder without options.json."""
    stated = Options()
    file = folder / "tokenizer_config.json"
    if file.is_file():
        stated = read_tokenizer_config(file)
    if (folder / TOKENIZER_JSON).is_file():
        other = normalizer_options(folder / TOKENIZER_JSON)
        if stated.lowercase is None:
            file = folder / TOKENIZER_JSON
        stated = stated.or_else(other)
    return file, stated


def _sentencepiece(
    content: bytes, ours: StoredOptions | None, chosen: Options, file: Path
) -> SentencePiece:
    form: Form = "nfc"
    config = file.parent / "tokenizer_config.json"
    if ours:
        form = ours.normalization
    elif config.is_file():
        form = read_tokenizer_config(config).normalization or form
    for name, value in (("lowercase", chosen.lowercase), ("strip_accents", chosen.strip_accents)):
        if value is not None:
            raise UserError(
                f"{printable(file)}: {name} = {value}; a SentencePiece model has rules of its own; "
                "expected no such option"
            )
    if chosen.normalization not in (None, form):
        raise UserError(
            f"{printable(file)}: normalization = {chosen.normalization}; expected {form}, which "
            "the model was trained with"
        )
    return SentencePiece(content, {}, printable(file), form)


def _wordpiece(
    content: bytes,
    stated: Options,
    chosen: Options,
    file: Path,
    source: Path,
    ours: StoredOptions | None = None,
) -> WordPiece:
    """The WordPiece with the options that `source` states, else those chosen, else guesses."""
    for key, told, wanted in zip(Options._fields, stated, chosen, strict=True):
        if told is not None and wanted not in (None, told):
            raise UserError(
                f"{printable(source)}: {key} = {told}, but {wanted} was requested; expected the "
                "same, since the vocabulary was made so; for another choice, copy the vocabulary "
                "alone to a new folder"
            )
    known = stated.or_else(chosen)
    lowercase = _is_lower_case(content) if known.lowercase is None else known.lowercase
    strip_accents = lowercase if known.strip_accents is None else known.strip_accents
    tokenizer = WordPiece(
        content,
        {"lowercase": lowercase, "strip_accents": strip_accents},
        printable(file),
        known.normalization or "none",
        entries=ours.vocab_size if ours else None,
    )
    tokenizer.guessed = known.lowercase is None
    return tokenizer


def _checked(tokenizer: Tokenizer, ours: StoredOptions | None, folder: Path) -> Tokenizer:
    """The tokenizer, if its options.json belongs to it."""
    if ours is None:
        return tokenizer
    found: dict[str, Any] = {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "special_ids": tokenizer.special_ids.model_dump(),
        "fingerprint": tokenizer.fingerprint,
    }
    for key, value in found.items():
        recorded = getattr(ours, key)
        if recorded not in (None, value):
            raise UserError(
                f"{printable(folder)}: options.json records {key} = {recorded}, but the vocabulary "
                f"with these options has {value}; one of the two files was changed; copy both "
                "again, or remove the key to use them as they are"
            )
    return tokenizer


def _is_lower_case(content: bytes) -> bool:
    """Whether no entry of a vocab.txt, besides special tokens, has an upper-case letter."""
    text = re.sub(rb"(?m)^(\[\w+\]|<\w+>)\r?$", b"", content).decode("utf-8", "replace")
    return text == text.lower()
