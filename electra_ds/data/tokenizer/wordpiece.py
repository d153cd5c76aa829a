"""WordPiece tokenizer with a cache of words.

The cache is exact because BERT's pre-tokenization always splits at white space: the ids of a text
are the concatenated ids of its words, so each distinct word is tokenized once.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable
from electra_ds.data.tokenizer.base import Tokenizer
from electra_ds.data.tokenizer.normalization import (
    Form,
    native_steps,
    whole_characters,
    without_surrogates,
)

MAX_WORD_CHARACTERS = 100  # of a normalized word; BERT makes a longer one a single [UNK]
NO_SPACES = (
    "WordPiece does not suit scripts without spaces between words, such as Thai; train a "
    "vocabulary with --kind unigram"
)
LONG_WORDS = f"words of more than {MAX_WORD_CHARACTERS} characters become one [UNK]: {NO_SPACES}"
MAX_ENTRY = 1000  # characters of an entry; normalization of a run of marks takes quadratic time
MAX_CACHED_WORDS = 500_000  # about 100 MB; a full cache is cleared
# A larger mean length of the "words" indicates a script without spaces; such a text is tokenized
# as a whole.
MAX_MEAN_WORD_LENGTH = 24
# Parts of a word: BERT makes each ASCII punctuation character a word.
_WORD_PARTS = re.compile("[^!-/:-@[-`{-~]+|.")
# str.split() splits at these characters, and BERT's cleaning deletes most of them. A text with one
# of them is tokenized as a whole.
_SPLIT_DIFFERENTLY = re.compile("[\x0b\x0c\x1c-\x1f\x85\u2028\u2029]")


class WordPiece(Tokenizer):
    """BERT's WordPiece.

    A normalized text is cleaned, optionally lower-cased, optionally stripped of accents, and split
    into words. Each word is split by greedy longest match.
    """

    kind = "wordpiece"
    file_name = "vocab.txt"

    def __init__(
        self,
        content: bytes,
        options: dict[str, bool],
        source: str,
        normalization: Form = "nfc",
        entries: int | None = None,
    ) -> None:
        """Load a vocabulary.

        content: bytes of the vocab.txt. options: lowercase and strip_accents. source: name of the
        file in messages. normalization: nfc or none.
        entries: recorded number of entries, or None. Blank last lines count as entries up to this
        number; without a number, none of them counts.
        Raises UserError for a file that is not UTF-8, for a repeated entry, for another
        normalization, and when a special token is missing.
        """
        if normalization not in ("nfc", "none"):
            raise UserError(f"{source}: normalization = {normalization!r}; expected nfc or none")
        content, names = _entries(content, source, entries)
        super().__init__(content, names, options, source, normalization)
        if len(self.ids) != len(names):
            raise UserError(f"{source}: {_repeated(names)}; expected every entry once")
        unknown = names[self.special_ids.unk]
        # `fast` also normalizes; `_fast` expects a normalized text.
        self.fast = _fast_tokenizer(self.ids, unknown, options, normalization)
        self._fast = _fast_tokenizer(self.ids, unknown, options, "none")
        self._cache = _WordCache(self._fast, options["lowercase"])

    def encode_normalized(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if len(self._cache) > MAX_CACHED_WORDS:
            self._cache.clear()
        parts = [self._encode(text) for text in texts]
        lengths = np.fromiter((len(part) // 4 for part in parts), np.int64, len(parts))
        return np.frombuffer(b"".join(parts), np.uint32), lengths

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self.fast.encode(without_surrogates(text), add_special_tokens=False)
        return encoding.ids, whole_characters(text, encoding.offsets)

    def words(self, text: str) -> list[str]:
        """Return the words of a normalized text, as BERT cleans and splits it."""
        cleaned = self._fast.normalizer.normalize_str(text)
        return [word for word, _ in self._fast.pre_tokenizer.pre_tokenize_str(cleaned)]

    def begins_word(self) -> np.ndarray:
        return np.array([not name.startswith("##") for name in self.names])

    def unreachable_names(self) -> list[str]:
        """Return the entries with capitals or accents that the options remove from every text."""
        special = set(self.special_ids.model_dump().values())
        return [
            name for i, name in enumerate(self.names) if i not in special and self._changes(name)
        ]

    def _changes(self, name: str) -> bool:
        text = name.lower() if self.options["lowercase"] else name
        if self.options["strip_accents"]:
            return without_accents(text) != name
        return unicodedata.normalize("NFC", text) != unicodedata.normalize("NFC", name)

    def unknown_parts(self, text: str) -> list[str]:
        unk = self.special_ids.unk
        unk_bytes = np.uint32(unk).tobytes()
        # A word is tokenized again only if its cached bytes contain [UNK] or it is not cached.
        words = [word for word in text.split() if unk_bytes in self._cache.get(word, unk_bytes)]
        return [
            word[start:end]
            for word in words
            for i, (start, end) in zip(*self.encode_with_offsets(word), strict=True)
            if i == unk
        ]

    def _encode(self, text: str) -> bytes:
        """Return the ids of a normalized text as uint32 bytes."""
        words = text.split()
        has_spaces = len(words) * MAX_MEAN_WORD_LENGTH >= len(text)
        if not has_spaces or (not text.isprintable() and _SPLIT_DIFFERENTLY.search(text)):
            return self._cache.encode(text)
        return b"".join(map(self._cache.__getitem__, words))

    def _decode_plain(self, ids: list[int]) -> str:
        return " ".join(self.names[i] for i in ids).replace(" ##", "")

    def _other_normalization(self) -> dict[str, str]:
        # To strip accents, BERT decomposes the text, so the ids are the same with and without NFC.
        is_decomposed = self.normalization == "none" and self.options["strip_accents"]
        return {} if is_decomposed else super()._other_normalization()


def without_accents(text: str) -> str:
    """Return a text decomposed (Unicode NFD), without combining marks, as BERT strips accents."""
    if text.isascii():
        return text
    decomposed = unicodedata.normalize("NFD", text)
    return "".join(c for c in decomposed if unicodedata.category(c) != "Mn")


def _entries(content: bytes, source: str, count: int | None) -> tuple[bytes, list[str]]:
    """Return (content without a byte order mark and blank last lines, entries) of a vocab.txt.

    count: recorded number of entries; blank last lines up to it are kept.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source}: not UTF-8 ({error}); expected one vocabulary entry per line"
        ) from None
    lines = text.removeprefix("\ufeff").removesuffix("\n").split("\n")
    names = [line.rstrip("\r") for line in lines]
    last = len(names)
    while last > (count or 0) and not names[last - 1]:
        last -= 1
    for line, entry in enumerate(names, 1):
        if len(entry) > MAX_ENTRY:
            raise UserError(
                f"{source}: line {line} has {len(entry):,} characters; expected entries of at most "
                f"{MAX_ENTRY:,}"
            )
    if last < len(names) or text.startswith("\ufeff"):
        content = "".join(f"{line}\n" for line in lines[:last]).encode()
    return content, names[:last]


def _repeated(names: list[str]) -> str:
    """Describe the first entry that occurs twice, with its line numbers."""
    lines: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if name in lines:
            what = f"{printable(name)!r} occurs twice" if name else "two lines are blank"
            return f"{what} (lines {lines[name]} and {line})"
        lines[name] = line
    raise AssertionError("no entry is repeated")


class _WordCache(dict[str, bytes]):
    """Word -> its ids as uint32 bytes; a missing word is tokenized and stored."""

    def __init__(self, fast: Any, lowercase: bool) -> None:
        self.fast = fast
        self.model = fast.model
        self.lowercase = lowercase

    def __missing__(self, word: str) -> bytes:
        parts = [word] if word.isalnum() else _WORD_PARTS.findall(word)
        is_one_part = parts == [word]
        ids = self.encode(word) if is_one_part else b"".join(map(self.__getitem__, parts))
        self[word] = ids
        return ids

    def encode(self, text: str) -> bytes:
        """Return the ids of any text as uint32 bytes."""
        if text.isalnum() and text.isascii():  # needs no cleaning and no splitting
            tokens = self.model.tokenize(text.lower() if self.lowercase else text)
            ids = [token.id for token in tokens]
        else:
            ids = self.fast.encode(text, add_special_tokens=False).ids
        return array("I", ids).tobytes()


def _fast_tokenizer(
    vocabulary: dict[str, int], unknown: str, options: dict[str, bool], normalization: Form
) -> Any:
    """Return the Hugging Face tokenizer of a vocabulary, without special tokens."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    fast = tokenizers.Tokenizer(
        models.WordPiece(
            vocabulary, unk_token=unknown, max_input_chars_per_word=MAX_WORD_CHARACTERS
        )
    )
    bert = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=True,
        lowercase=options["lowercase"],
        strip_accents=options["strip_accents"],
    )
    steps = native_steps(normalization)
    fast.normalizer = normalizers.Sequence([*steps, bert]) if steps else bert
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # also splits "[MASK]"
    return fast
