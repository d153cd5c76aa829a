"""Loading of a tokenizer from a vocabulary file or a folder, with its options."""

from __future__ import annotations

import re
from pathlib import Path

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import read_json
from electra_ds.data.tokenizer.base import Tokenizer
from electra_ds.data.tokenizer.sentencepiece import SentencePiece
from electra_ds.data.tokenizer.wordpiece import WordPiece

VOCABULARY_FILES = (
    "vocab.txt",
    "spm.model",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a vocab.txt, an spm .model file, or a folder with one of them (ours or Hugging Face's).

    The options of a vocab.txt are read from options.json or tokenizer_config.json in its folder.
    Without them, text is lower-cased if no entry has an upper-case letter, and accents are stripped
    if text is lower-cased.

    Raises UserError when the vocabulary is missing, malformed, or lacks a special token.
    """
    file = _vocabulary_file(Path(path))
    content = file.read_bytes()
    if file.suffix == ".model":
        return SentencePiece(content, {}, str(file))
    stored = _stored_options(file.parent)
    lowercase = stored.get("lowercase")
    strip_accents = stored.get("strip_accents")
    if lowercase is None:
        lowercase = _is_lower_case(content)
    if strip_accents is None:
        strip_accents = lowercase
    return WordPiece(content, {"lowercase": lowercase, "strip_accents": strip_accents}, str(file))


def _vocabulary_file(path: Path) -> Path:
    if path.is_dir():
        for name in VOCABULARY_FILES:
            if (path / name).is_file():
                return path / name
        raise UserError(
            f"{path}: no vocabulary in this folder; expected one of {', '.join(VOCABULARY_FILES)}"
        )
    if not path.is_file():
        raise UserError(
            f"{path}: not found; expected a vocab.txt, an spm .model file or a folder with one of "
            "them"
        )
    return path


def _stored_options(folder: Path) -> dict[str, bool | None]:
    """Return the options stored in a vocabulary's folder; they may be missing or None."""
    if (folder / "options.json").is_file():
        return read_json(folder / "options.json", "the options of a tokenizer")
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    stored = read_json(file, "the options of a Hugging Face tokenizer")
    if stored.get("tokenize_chinese_chars") is False or stored.get("word_tokenizer_type"):
        raise UserError(
            f"{file}: found tokenize_chinese_chars = false or word_tokenizer_type; only BERT's "
            "pre-tokenization is supported"
        )
    return {
        "lowercase": stored.get("do_lower_case"),
        "strip_accents": stored.get("strip_accents"),
    }


def _is_lower_case(content: bytes) -> bool:
    """Whether no entry of a vocab.txt, besides special tokens, has an upper-case letter."""
    text = re.sub(rb"(?m)^(\[\w+\]|<\w+>)\r?$", b"", content).decode("utf-8", "replace")
    return text == text.lower()
