"""Interface of tokenizers, their special tokens, and their files.

A tokenizer adds no special tokens. No text encodes to a special id except that of [UNK]: a literal
"[MASK]" in a text is tokenized as letters and punctuation.

Dimensions: V size of the vocabulary, N tokens of all texts.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import json_bytes
from electra_ds.common.printable import printable
from electra_ds.common.special_ids import SpecialIds
from electra_ds.data.tokenizer.normalization import Form, normalize
from electra_ds.data.tokenizer.saving import save_files

# Role -> accepted spellings in a vocabulary; the first one is used by `train-tokenizer`.
SPECIAL_NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}


class Tokenizer(ABC):
    """Base class of tokenizers.

    kind:        "wordpiece", "sentencepiece" or "byte_bpe"
    file_name:   name of the vocabulary file that `save` writes
    names:       spelling of each id
    special_ids: ids of the special tokens
    options:     settings that, with normalization and vocabulary file, determine the ids
    normalization: form of `normalize`, which is applied before a text is split into tokens
    fingerprint: sha256 of kind, options, normalization and vocabulary file
    guessed:     whether `lowercase` was derived from the entries, because no file or argument
                 gives it
    """

    kind: str
    file_name: str
    guessed = False
    unreachable_reason = "have accents or capitals, which the normalized text never has"

    def __init__(
        self,
        content: bytes,
        names: Sequence[str],
        options: dict[str, bool],
        source: str,
        normalization: Form = "nfc",
    ) -> None:
        """Set the attributes.

        content: bytes of the vocabulary file.
        names:   [V] spelling of each id.
        source:  name of the file in messages.
        Raises UserError when a special token is missing.
        """
        self.content = content
        self.names = list(names)
        self.options = options
        self.normalization = normalization
        self.ids = {name: i for i, name in enumerate(self.names)}
        self.vocab_size = len(self.names)
        self.special_ids = find_special_ids(self.ids, source)
        recorded = [self.kind, {**options, **self._other_normalization()}]
        digest = hashlib.sha256(json.dumps(recorded, sort_keys=True).encode())
        digest.update(content)
        self.fingerprint = digest.hexdigest()

    @abstractmethod
    def encode_normalized(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Like `encode_flat`, for texts that `normalize` returned, or lines of such texts."""

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of one text, and the (start, end) characters of each token in the text.

        A span has no white space before the token, and includes the combining marks after it, also
        those that the normalization composes with a letter or removes. The span of a token that
        consists of white space is empty.
        """

    @abstractmethod
    def begins_word(self) -> np.ndarray:
        """Return whether each token begins a word, [V] bool; the others continue a word.

        With `edge_classes`, the others may begin a word, too.
        """

    @abstractmethod
    def unknown_parts(self, text: str) -> list[str]:
        """Return the parts of a normalized text that become [UNK].

        WordPiece returns the characters of the text, SentencePiece the characters after the
        normalization rules of the model file.
        """

    @abstractmethod
    def _decode_plain(self, ids: list[int]) -> str:
        """Return the readable text of ids, none of which is special."""

    def edge_classes(self) -> np.ndarray | None:
        """Return the classes of the first and last characters of each token, [2, V] uint8, or None.

        A word also begins where the class changes; see `byte_alphabet`. None: only tokens of
        `begins_word` begin a word.
        """
        return None

    def normalize(self, text: str) -> str:
        """Return a text in the normalization of this tokenizer, without surrogates."""
        return normalize(text, self.normalization)

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated ids of texts, [N] uint32, and their lengths, [texts] int64.

        texts: not normalized yet.
        """
        return self.encode_normalized([self.normalize(text) for text in texts])

    def encode_lines(self, documents: Sequence[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated ids of documents, [N] uint32, and the lengths of lines, int64.

        documents: the lines of each, normalized, without white space at their ends. A tokenizer
        for which white space is a token puts the end of a line before the next line. UNKNOWN
        becomes [UNK].
        """
        return self.encode_normalized([line for lines in documents for line in lines])

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Return the ids of each word of a text of words with spaces between them."""
        return self.encode_batch(words)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens."""
        if not len(texts):
            return []
        ids, lengths = self.encode_flat(texts)
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return a readable spelling of each id: that of the vocabulary, unless it spells bytes."""
        return [self.names[i] for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the readable text of ids. Special tokens appear as spelled in the vocabulary."""
        special = set(self.special_ids.model_dump().values())
        parts: list[str] = []
        for is_special, group in groupby(map(int, ids), special.__contains__):
            run = list(group)
            parts += self.tokens(run) if is_special else [self._decode_plain(run)]
        return " ".join(parts)

    def describe_options(self) -> str:
        """Describe kind, size and options in one line."""
        parts = [self.kind, f"{self.vocab_size:,} entries"]
        if "lowercase" in self.options:
            parts.append("lower case" if self.options["lowercase"] else "case kept")
            stripped = self.options["strip_accents"]
            parts.append("accents stripped" if stripped else "accents kept")
        parts.append(f"normalization {self.normalization}")
        return ", ".join(parts)

    def describe(self) -> str:
        """Like `describe_options`; say which options were guessed, and name unreachable entries."""
        line = self.describe_options()
        if self.guessed:
            line += (
                "; guessed: no entry has a capital"
                if self.options["lowercase"]
                else "; guessed: an entry has a capital"
            )
            if self.options["lowercase"] and not self.options["strip_accents"]:
                line += ", and some entries have accents"
            line += "; --lowercase, --strip-accents and --normalization set them"
        if unreachable := self.unreachable_names():
            shown = ", ".join(map(printable, unreachable[:3])) + ", ..." * (len(unreachable) > 3)
            line += (
                f"; WARNING: {len(unreachable):,} entries {self.unreachable_reason}, so no text "
                f"encodes to them ({shown})"
            )
        return line

    def unreachable_names(self) -> list[str]:
        """Return the entries that no text encodes to, because the options change characters."""
        return []

    def save(self, folder: str | Path) -> None:
        """Write the vocabulary file and options.json; `load_tokenizer(folder)` reads them.

        An interrupted save leaves the former tokenizer of the folder, or the new one.
        """
        options = {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            **self.options,
            "normalization": self.normalization,
            "special_ids": self.special_ids.model_dump(),
            "fingerprint": self.fingerprint,
        }
        save_files(Path(folder), self.file_name, self.content, json_bytes(options))

    def _other_normalization(self) -> dict[str, str]:
        """Return the normalization as a part of the fingerprint: {} for NFC.

        `prepare` of version 0.1 put all text into NFC without recording it in options.json.
        Therefore a fingerprint without normalization means NFC.
        """
        return {} if self.normalization == "nfc" else {"normalization": self.normalization}


def find_special_ids(ids: dict[str, int], source: str) -> SpecialIds:
    """Return the ids of the special tokens of a vocabulary. Raises UserError when one is missing.

    ids: entry -> id. source: name of the file in messages.
    """
    found: dict[str, int] = {}
    missing = []
    for role, spellings in SPECIAL_NAMES.items():
        stated = [ids[name] for name in spellings if name in ids]
        if stated:
            found[role] = stated[0]
        else:
            missing.append(spellings[0])
    if missing:
        raise UserError(
            f"{source}: no {', '.join(missing)} among its {len(ids)} entries; expected "
            "[PAD] [UNK] [CLS] [SEP] [MASK]; `electra-ds train-tokenizer` makes such a vocabulary"
        )
    return SpecialIds(**found)
