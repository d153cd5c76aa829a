"""Interface of tokenizers, their special tokens, and their files.

A tokenizer adds no special tokens. A text encodes to no special token except [UNK]: a literal
"[MASK]" in a text is tokenized as letters and punctuation.

Letters: V vocabulary, N tokens of all texts.
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

    kind:        "wordpiece" or "sentencepiece"
    names:       spelling of each id
    special_ids: ids of the special tokens
    options:     settings that, with normalization and vocabulary file, determine the ids
    normalization: what is done to the characters of a text first
    fingerprint: sha256 of kind, options, normalization and vocabulary file
    guessed:     whether no file or argument gave the options
    """

    kind: str
    file_name: str
    guessed = False

    def __init__(
        self,
        content: bytes,
        names: Sequence[str],
        options: dict[str, bool],
        source: str,
        normalization: Form = "nfc",
    ) -> None:
        """content: bytes of the vocabulary file. source: its name in messages.

        Raises UserError when a special token is missing.
        """
        self.content = content
        self.names = list(names)
        self.options = options
        self.normalization = normalization
        self.ids = {name: i for i, name in enumerate(self.names)}
        self.vocab_size = len(self.names)
        self.special_ids = self._find_special_ids(source)
        recorded = [self.kind, {**options, **self._other_normalization()}]
        digest = hashlib.sha256(json.dumps(recorded, sort_keys=True).encode())
        digest.update(content)
        self.fingerprint = digest.hexdigest()

    @abstractmethod
    def encode_normalized(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """`encode_flat` for texts that `normalize` returned, or lines of them."""

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of one text and the (start, end) characters of each token."""

    @abstractmethod
    def begins_word(self) -> np.ndarray:
        """Return whether each token begins a word, [V] bool; the others continue a word."""

    @abstractmethod
    def unknown_parts(self, text: str) -> list[str]:
        """Return the parts of a normalized text that become [UNK].

        WordPiece returns them as written, SentencePiece after the model's own normalization.
        """

    @abstractmethod
    def _decode_plain(self, ids: list[int]) -> str:
        """Return readable text of ids without special tokens."""

    def normalize(self, text: str) -> str:
        """Return a text as it is tokenized, without surrogates."""
        return normalize(text, self.normalization)

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated ids of texts, [N] uint32, and their lengths, [texts] int64."""
        return self.encode_normalized([self.normalize(text) for text in texts])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens."""
        if not len(texts):
            return []
        ids, lengths = self.encode_flat(texts)
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the vocabulary's spelling of each id."""
        return [self.names[i] for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return readable text of ids. Special tokens keep their spelling."""
        special = set(self.special_ids.model_dump().values())
        parts: list[str] = []
        for is_special, group in groupby(map(int, ids), special.__contains__):
            run = list(group)
            parts += self.tokens(run) if is_special else [self._decode_plain(run)]
        return " ".join(parts)

    def describe(self) -> str:
        """Describe kind, size and options in one line; say which options were guessed."""
        parts = [self.kind, f"{self.vocab_size:,} entries"]
        if "lowercase" in self.options:
            parts.append("lower case" if self.options["lowercase"] else "case kept")
            stripped = self.options["strip_accents"]
            parts.append("accents stripped" if stripped else "accents kept")
        parts.append(f"normalization {self.normalization}")
        line = ", ".join(parts)
        if self.guessed:
            line += (
                "; guessed: no entry has a capital"
                if self.options["lowercase"]
                else ("; guessed: an entry has a capital")
            )
            line += "; --lowercase, --strip-accents and --normalization set them"
        if unreachable := self.unreachable_names():
            shown = ", ".join(map(printable, unreachable[:3])) + ", ..." * (len(unreachable) > 3)
            line += (
                f"; WARNING: {len(unreachable):,} entries have accents or capitals, which the "
                f"normalized text never has ({shown})"
            )
        return line

    def unreachable_names(self) -> list[str]:
        """Return the entries that no text gives, because the options change their characters."""
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
        """Return the normalization, for the fingerprint, if it changes ids.

        `prepare` of version 0.1 put all text into NFC, and its options.json does not say so.
        Therefore a fingerprint without normalization means NFC.
        """
        return {} if self.normalization == "nfc" else {"normalization": self.normalization}

    def _find_special_ids(self, source: str) -> SpecialIds:
        found: dict[str, int] = {}
        missing = []
        for role, spellings in SPECIAL_NAMES.items():
            ids = [self.ids[name] for name in spellings if name in self.ids]
            if ids:
                found[role] = ids[0]
            else:
                missing.append(spellings[0])
        if missing:
            raise UserError(
                f"{source}: no {', '.join(missing)} among its {self.vocab_size} entries; expected "
                "[PAD] [UNK] [CLS] [SEP] [MASK]; `electra-ds train-tokenizer` makes such a "
                "vocabulary"
            )
        return SpecialIds(**found)
