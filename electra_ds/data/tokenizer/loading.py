"""Loading of a tokenizer and its options from a vocabulary file or a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from electra_ds.common.errors import UserError
from electra_ds.common.files import is_lfs_pointer
from electra_ds.common.folder_kinds import found_at
from electra_ds.common.json_files import Record, parse_json, read_json, read_record, read_small
from electra_ds.common.printable import printable
from electra_ds.data.tokenizer.base import Tokenizer
from electra_ds.data.tokenizer.byte_bpe import ByteBpe
from electra_ds.data.tokenizer.byte_bpe_file import check_tokenizer_config, is_byte_bpe
from electra_ds.data.tokenizer.hugging_face import (
    TOKENIZER_JSON,
    Options,
    normalizer_options,
    read_tokenizer_config,
    read_tokenizer_json,
)
from electra_ds.data.tokenizer.normalization import Form
from electra_ds.data.tokenizer.saving import VOCABULARY_FILES, next_vocabulary
from electra_ds.data.tokenizer.sentencepiece import SentencePiece, with_mask_piece
from electra_ds.data.tokenizer.wordpiece import MAX_ENTRY, WordPiece, without_accents


class StoredOptions(Record):
    """The content of options.json. A user may write one with lowercase and strip_accents only."""

    kind: Literal["wordpiece", "sentencepiece", "byte_bpe"] | None = None
    vocab_size: int | None = Field(None, ge=1, lt=1 << 31)
    lowercase: bool | None = None
    strip_accents: bool | None = None
    # Version 0.1 did not write this key, and its `prepare` put all text into NFC.
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
    """Load a vocab.txt, a SentencePiece .model file, a tokenizer.json, or a folder with one of them.

    A tokenizer.json is read if it is a byte-level BPE, or a WordPiece with BERT's settings, and if
    the folder has none of the other files.

    The options of a vocab.txt are read from options.json in its folder, where a missing
    `normalization` means nfc. Without options.json, they are read from tokenizer_config.json and
    tokenizer.json. An option that no file states is set by the argument. Without an argument, text
    is lower-cased if no entry has an upper-case letter, accents are stripped if text is lower-cased
    and no entry has an accent, and the normalization is none, as in BERT's own code. If a file
    states `lowercase` alone, accents are stripped if text is lower-cased, as in BERT.

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
    if file.name.endswith(TOKENIZER_JSON):  # also the file of an interrupted save
        return _tokenizer_json(file, chosen)
    content = read_small(file, "a vocabulary")
    if is_lfs_pointer(content):
        raise UserError(
            f"{printable(file)}: is a Git LFS pointer, not the vocabulary; run: git lfs pull"
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
    if path.is_dir():
        if interrupted := next_vocabulary(path):
            return interrupted
        for name in VOCABULARY_FILES:
            if (path / name).is_file():
                return path / name
        inner = path / "tokenizer"
        hint = f"; its tokenizer is {printable(inner)}" if inner.is_dir() else found_at(path).clause
        raise UserError(
            f"{printable(path)}: no vocabulary in this folder{hint}; expected one of "
            f"{', '.join(VOCABULARY_FILES)}"
        )
    if not path.is_file():
        is_there = os.path.lexists(path)
        problem = "is a pipe, a device or a link to nothing" if is_there else "not found"
        raise UserError(
            f"{printable(path)}: {problem}; expected a vocab.txt, an spm .model file, a "
            "tokenizer.json or a folder with one of them"
        )
    return path


def _read_options(folder: Path) -> StoredOptions | None:
    file = folder / "options.json"
    return read_record(file, StoredOptions, "a tokenizer's options") if file.is_file() else None


def _hugging_face_options(folder: Path) -> tuple[Path, Options]:
    """Return (file, options) of a folder without options.json.

    The file is the one that states `lowercase`, for messages.
    """
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


def _tokenizer_json(file: Path, chosen: Options) -> Tokenizer:
    """Return the byte-level BPE or the WordPiece in a tokenizer.json."""
    content = read_small(file, "a tokenizer of Hugging Face")
    if is_lfs_pointer(content):
        raise UserError(
            f"{printable(file)}: is a Git LFS pointer, not the vocabulary; run: git lfs pull"
        )
    if not is_byte_bpe(parse_json(content, file, "a tokenizer of Hugging Face")):
        entries, stated = read_tokenizer_json(file)
        return _wordpiece(entries, stated, chosen, file, file)
    tokenizer = ByteBpe(content, printable(file))
    config = file.parent / "tokenizer_config.json"
    ours = _read_options(file.parent)
    if ours is None and config.is_file():
        check_tokenizer_config(config, tokenizer.vocabulary, tokenizer.special_names)
    for key, value in zip(Options._fields, chosen, strict=True):
        if value is not None and not (key == "normalization" and value == tokenizer.normalization):
            raise UserError(
                f"{printable(file)}: {key} = {value}; expected no such option, because a "
                "tokenizer.json contains its own normalization"
            )
    return _checked(tokenizer, ours, file.parent)


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
                f"{printable(file)}: {name} = {value}; expected no such option, because a "
                "SentencePiece model contains its own rules"
            )
    if chosen.normalization not in (None, form):
        raise UserError(
            f"{printable(file)}: normalization = {chosen.normalization}; expected {form}, which "
            "the model was trained with"
        )
    if not ours and _is_of_deberta(file.parent):
        content = with_mask_piece(content)
    return SentencePiece(content, {}, printable(file), form)


def _is_of_deberta(folder: Path) -> bool:
    """Return whether a folder holds a DeBERTa model of another program."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    return read_json(file, "the config.json of a model").get("model_type") == "deberta-v2"


def _wordpiece(
    content: bytes,
    stated: Options,
    chosen: Options,
    file: Path,
    source: Path,
    ours: StoredOptions | None = None,
) -> WordPiece:
    """Return the WordPiece of a vocabulary.

    stated: options in the file `source`, which take precedence. chosen: options of the caller. An
    option that neither gives is guessed from the entries.
    """
    for key, found, wanted in zip(Options._fields, stated, chosen, strict=True):
        if found is not None and wanted not in (None, found):
            raise UserError(
                f"{printable(source)}: {key} = {found}, but {wanted} was requested; expected the "
                "value with which the vocabulary was made; to use another value, copy the "
                "vocabulary alone to a new folder"
            )
    known = stated.or_else(chosen)
    lowercase = _is_lower_case(content) if known.lowercase is None else known.lowercase
    strip_accents = known.strip_accents
    if strip_accents is None:
        # No text could reach an entry with an accent, so such an entry shows that they are kept.
        is_bare = stated.lowercase is None
        strip_accents = lowercase and not (is_bare and _has_accents(content))
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
    """Return the tokenizer. Raises UserError if it differs from what its options.json records."""
    if ours is None:
        return tokenizer
    found: dict[str, Any] = {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "normalization": tokenizer.normalization,
        "special_ids": tokenizer.special_ids.model_dump(),
        "fingerprint": tokenizer.fingerprint,
    }
    for key, value in found.items():
        recorded = getattr(ours, key) if key in ours.model_fields_set else None
        if recorded not in (None, value):
            raise UserError(
                f"{printable(folder)}: options.json records {key} = {recorded}, but the vocabulary "
                f"with these options has {value}; one of the two files was changed; copy both "
                "again, or remove the key to use them as they are"
            )
    return tokenizer


def _is_lower_case(content: bytes) -> bool:
    """Return whether no entry of a vocab.txt has an upper-case letter, special tokens excepted."""
    text = _entries(content)
    return text == text.lower()


def _has_accents(content: bytes) -> bool:
    """Return whether stripping of accents changes an entry of a vocab.txt."""
    text = _entries(content)
    return without_accents(text) != text


def _entries(content: bytes) -> str:
    """Return the entries of a vocab.txt in lines, without special tokens and refused entries."""
    text = re.sub(rb"(?m)^(\[\w+\]|<\w+>)\r?$", b"", content).decode("utf-8", "replace")
    return "\n".join(line for line in text.split("\n") if len(line) <= MAX_ENTRY)
