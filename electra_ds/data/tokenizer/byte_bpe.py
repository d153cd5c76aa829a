"""Byte-level BPE tokenizer, as of GPT-NeoX, OLMo and ModernBERT, with a cache of words.

A text is put into Unicode NFC, divided by the rule of GPT-2 (a word with the space before it, a
number, other characters, white space) and encoded in UTF-8; merges then join the bytes of each
part. Every text has ids, and no text has [UNK].

The cache is exact because a part begins at each space with a character of another kind after it:
the ids of a text are the concatenated ids of its words, each with the space before it.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from electra_ds.common.special_ids import UNKNOWN
from electra_ds.data.tokenizer.base import Tokenizer
from electra_ds.data.tokenizer.byte_alphabet import (
    WHITE_SPACE,
    bytes_of,
    edge_classes,
    readable,
    readable_token,
)
from electra_ds.data.tokenizer.byte_bpe_file import ByteVocabulary, read_byte_vocabulary
from electra_ds.data.tokenizer.normalization import (
    Form,
    native_steps,
    whole_characters,
    without_surrogates,
)
from electra_ds.data.tokenizer.wordpiece import MAX_CACHED_WORDS, MAX_MEAN_WORD_LENGTH


class ByteBpe(Tokenizer):
    """A byte-level BPE in a tokenizer.json of Hugging Face tokenizers."""

    kind = "byte_bpe"
    file_name = "tokenizer.json"
    unreachable_reason = "are made by no merge"

    def __init__(self, content: bytes, source: str) -> None:
        """Load a vocabulary.

        content: bytes of the tokenizer.json. source: name of the file in messages. The attribute
        `content` has the file in one form, so equal tokenizers have equal fingerprints.
        Raises UserError for a file that is not a byte-level BPE with the components that are
        supported, that is damaged, or in which a special token is missing.
        """
        vocabulary = read_byte_vocabulary(content, source)
        form = vocabulary.normalization
        super().__init__(vocabulary.content, vocabulary.names, {}, source, form)
        self.vocabulary = vocabulary
        added = {token.content for token in vocabulary.added}
        self._bytes = [
            name.encode() if name in added else bytes_of(name) for name in vocabulary.names
        ]
        # `fast` also normalizes; `_fast` expects a normalized text.
        self.fast = _fast_tokenizer(vocabulary, native_steps(form))
        self._fast = _fast_tokenizer(vocabulary, [])
        self._cache = _WordCache(self._whole, " ")
        self._first_cache = _WordCache(self._whole, "")
        # Between the lines of a document. The normalization `nfc` makes line ends spaces.
        self._line_end = " " if form == "nfc" else "\n"
        self._newline = self._whole("\n")

    @property
    def special_names(self) -> dict[str, str]:
        """Role -> spelling of the special token."""
        return {role: self.names[i] for role, i in self.special_ids.model_dump().items()}

    def encode_normalized(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._joined([self._encode(text) for text in texts])

    def encode_lines(self, documents: Sequence[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        # The line end is a part of its own: the characters on both sides are no white space.
        parts = [
            self._encode_line(line, number > 0)
            for document in documents
            for number, line in enumerate(document)
        ]
        return self._joined(parts)

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Return the ids of each word. All words but the first one have a space before them."""
        return self.encode_batch(
            [f" {word}" if number and word else word for number, word in enumerate(words)]
        )

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and spans. Tokens that are parts of one character have its span."""
        text = without_surrogates(text)
        encoding = self.fast.encode(text, add_special_tokens=False)
        spans = whole_characters(text, encoding.offsets, space="")
        # The last token of a character has the combining marks after it.
        for i in range(len(spans) - 2, -1, -1):
            (_, end), (next_start, next_end) = encoding.offsets[i], encoding.offsets[i + 1]
            if next_start < end and next_end == end:
                spans[i] = (spans[i][0], spans[i + 1][1])
        return encoding.ids, spans

    def begins_word(self) -> np.ndarray:
        begins = self._edge_classes[0] == WHITE_SPACE
        begins[list(self.special_ids.model_dump().values())] = True
        return begins

    def edge_classes(self) -> np.ndarray:
        return self._edge_classes

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token: U+2581 for a space, \\xe2 for a part of a character."""
        return [readable_token(self._bytes[i]) for i in ids]

    def unknown_parts(self, text: str) -> list[str]:
        return [UNKNOWN] * text.count(UNKNOWN)

    def unreachable_names(self) -> list[str]:
        """Return the entries of several bytes that no merge makes."""
        return self.vocabulary.unmerged

    def _decode_plain(self, ids: list[int]) -> str:
        return readable(b"".join(self._bytes[i] for i in ids))

    @cached_property
    def _edge_classes(self) -> np.ndarray:
        return np.array([edge_classes(content) for content in self._bytes], np.uint8).T

    def _joined(self, parts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        for cache in (self._cache, self._first_cache):
            if len(cache) > MAX_CACHED_WORDS:
                cache.clear()
        lengths = np.fromiter((len(part) // 4 for part in parts), np.int64, len(parts))
        return np.frombuffer(b"".join(parts), np.uint32), lengths

    def _encode_line(self, line: str, is_later: bool) -> bytes:
        """Return the ids of a line as uint32 bytes; UNKNOWN, with the spaces before it, is [UNK].

        is_later: whether the line follows another one; then its ids begin with the line end.
        """
        if is_later and self._line_end == "\n":
            return self._newline + self._encode_line(line, False)
        if is_later:
            line = f" {line}"
        if UNKNOWN not in line:
            return self._encode(line)
        unknown = array("I", [self.special_ids.unk]).tobytes()
        parts = re.sub(f" *{UNKNOWN}(?: +(?= ))?", UNKNOWN, line).split(UNKNOWN)
        return unknown.join(self._encode(part) if part else b"" for part in parts)

    def _encode(self, text: str) -> bytes:
        """Return the ids of a normalized text as uint32 bytes."""
        words = text.split(" ")
        has_spaces = len(words) * MAX_MEAN_WORD_LENGTH >= len(text)
        # The space is the only white space that is printable. Other added tokens have no space.
        if not has_spaces or "  " in text or not text.isprintable():
            return self._whole(text)
        first = self._first_cache[words[0]]
        return first + b"".join(map(self._cache.__getitem__, words[1:]))

    def _whole(self, text: str) -> bytes:
        return array("I", self._fast.encode(text, add_special_tokens=False).ids).tobytes()


def byte_bpe_of(fast: Any, form: Form, source: str) -> ByteBpe:
    """Return the ByteBpe of a trained tokenizers.Tokenizer, with a normalization.

    source: name of the vocabulary in messages.
    """
    from tokenizers import normalizers

    fast.normalizer = normalizers.Sequence(native_steps(form))
    return ByteBpe(fast.to_str().encode(), source)


class _WordCache(dict[str, bytes]):
    """Word -> its ids, with `before` in front of it, as uint32 bytes; computed when missing."""

    def __init__(self, encode: Callable[[str], bytes], before: str) -> None:
        self.encode = encode
        self.before = before

    def __missing__(self, word: str) -> bytes:
        ids = self[word] = self.encode(self.before + word)
        return ids


def _fast_tokenizer(vocabulary: ByteVocabulary, steps: list[Any]) -> Any:
    """Return the Hugging Face tokenizer of a vocabulary, which does not know special tokens.

    steps: normalizers.
    """
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    ids = {name: i for i, name in enumerate(vocabulary.names)}
    fast = tokenizers.Tokenizer(models.BPE(ids, vocabulary.merges))
    if steps:
        fast.normalizer = normalizers.Sequence(steps)
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    fast.add_tokens(
        [
            tokenizers.AddedToken(token.content, normalized=token.normalized, special=False)
            for token in vocabulary.texts
        ]
    )
    return fast
