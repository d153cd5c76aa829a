"""Scripts of the characters of a text, and the characters that a vocabulary does not cover."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import NamedTuple

from electra_ds.common.printable import counted, printable, word_shown
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.data.tokenizer.normalization import nfc
from electra_ds.data.tokenizer.wordpiece import (
    MAX_WORD_CHARACTERS,
    NO_SPACES,
    WordPiece,
    without_accents,
)

# Scripts in which marks are accents. In Cyrillic they make letters of their own, such as \u0439.
ACCENTED = ("LATIN", "GREEK")
# Accents are stripped if at most this share of the letters is of other scripts.
OTHERS = 0.1
# Accents are stripped if at most this share of the words becomes equal to a more frequent word.
# Measured shares: English 0.06 to 0.12 %, Turkish 0.35 %, German 0.4 to 0.7 %, Greek 0.9 %,
# French 1.9 %, Vietnamese 25 %.
MERGED = 0.0025
WARN = 0.01  # share of unknown characters above which a command warns
SHOWN = 10  # characters in a message
TURKISH = 0.001  # share of the letters \u0131 and \u0130 above which text counts as Turkish
JOINED = 0.001  # share of the words with a joiner above which deleting the joiners is warned of
# Normalization makes a word at most this much longer: it divides a Hangul syllable into 3 letters.
LONGER = 3

# A zero-width non-joiner or joiner between two letters; elsewhere, as in emoji, it makes no word.
_JOINER = re.compile("(?<=(.))[\u200c\u200d]+(?=(.))")
_WORD = re.compile(r"(?:[^\W\d_]|[\u0300-\u036f])+")  # letters, also with combining marks


def in_order(counts: Counter[str]) -> list[str]:
    """Return the characters, most frequent first; equal counts by code point."""
    return sorted(counts, key=lambda c: (-counts[c], c))


def scripts(counts: Counter[str]) -> Counter[str]:
    """Return the number of letters of each script, by the first word of their Unicode names."""
    found: Counter[str] = Counter()
    for character, count in counts.items():
        if unicodedata.category(character)[0] == "L":
            found[unicodedata.name(character, "OTHER").partition(" ")[0]] += count
    return found


class Merged(NamedTuple):
    """Words that become equal to a more frequent word when accents are stripped.

    total: number of words; merged: number of those that become equal to a more frequent one;
    distinct: number of different ones among these; examples: up to 3 pairs (more frequent word,
    other word), the most frequent first
    """

    total: int
    merged: int
    distinct: int
    examples: list[tuple[str, str]]

    @classmethod
    def of(cls, words: Counter[str]) -> Merged:
        """Return the merged words of a text. words: strings between white space -> occurrences."""
        counts: Counter[str] = Counter()
        for word, count in words.items():
            for part in _WORD.findall(word.lower()):
                counts[part] += count
        forms: dict[str, set[str]] = {}
        for word in counts:
            if not word.isascii() and (form := nfc(without_accents(word))) != word:
                forms.setdefault(form, {form} & counts.keys()).add(word)
        merged: Counter[tuple[str, str]] = Counter()
        for group in forms.values():
            most, *others = sorted(group, key=lambda word: (-counts[word], word))
            merged.update({(most, other): counts[other] for other in others})
        pairs = sorted(merged, key=lambda pair: (-merged[pair], pair))[:3]
        return cls(counts.total(), merged.total(), len(merged), pairs)

    @property
    def share(self) -> float:
        """Share of the words that become equal to a more frequent one, from 0 to 1."""
        return self.merged / max(1, self.total)

    def describe(self) -> str:
        """Describe the number of merged words, with examples."""
        pairs = ", ".join(f"{printable(a)} and {printable(b)}" for a, b in self.examples)
        such = f", such as {pairs}" if pairs else ""
        return (
            f"stripping makes {self.share:.2%} of the words "
            f"({counted(self.distinct, 'different one')}) "
            f"equal to a more frequent word{such}"
        )


def strips_safely(counts: Counter[str], merged: Merged) -> bool:
    """Return whether accents are stripped by default: few words become equal.

    counts: character -> number of occurrences. In scripts that are not in ACCENTED, stripping
    removes the dakuten from kana and vowel signs from Devanagari, makes two letters of Cyrillic
    equal, and divides the syllables of Hangul into letters.
    """
    found = scripts(counts)
    return _others(found) <= OTHERS * found.total() and merged.share <= MERGED


def ignored_marks(counts: Counter[str], merged: Merged, stripped: bool) -> str:
    """Describe whether accents are stripped, and why. stripped: result of `strips_safely`."""
    found = scripts(counts)
    share = _others(found) / max(1, found.total())
    if stripped:
        return (
            f"accents are stripped: {1 - share:.1%} of the letters are Latin or Greek, and "
            f"{merged.describe()}; --no-strip-accents keeps them"
        )
    if share <= OTHERS:
        return f"accents are kept: {merged.describe()}; --strip-accents strips them"
    most = max((name for name in found if name not in ACCENTED), key=lambda name: found[name])
    return (
        f"accents are kept: {share:.1%} of the letters are of other scripts than Latin and Greek "
        f"(most of them {most}), where marks distinguish letters; --strip-accents strips them"
    )


def turkish_note(counts: Counter[str]) -> str:
    """Return a warning if lower-cased text is Turkish or Azeri, else "".

    counts: character -> number of occurrences. The warning depends on the share of dotless i and
    of dotted capital I among the letters.
    """
    letters = sum(n for c, n in counts.items() if unicodedata.category(c)[0] == "L")
    if counts["\u0131"] + counts["\u0130"] <= TURKISH * letters:
        return ""
    return (
        "WARNING: the text has the letters \u0131 and \u0130, as Turkish and Azeri do; lower case "
        "makes I an i instead of an \u0131, so different words become equal; --no-lowercase keeps "
        "the case"
    )


def joiners_note(words: Counter[str]) -> str:
    """Return a warning if WordPiece deletes joiners that distinguish words, else "".

    words: strings between white space -> occurrences.
    """
    joined = Counter({word: count for word, count in words.items() if _has_joiner(word)})
    share = joined.total() / max(1, words.total())
    if share <= JOINED:
        return ""
    return (
        f"WARNING: {share:.2%} of the words have a zero-width non-joiner or joiner between letters, "
        f"such as {word_shown(in_order(joined)[0])}; WordPiece deletes it, as BERT does, so "
        "different words of Persian, Urdu, Hindi and other languages become equal; --kind unigram, "
        "bpe and byte_bpe keep it"
    )


def _has_joiner(word: str) -> bool:
    """Return whether a word has a joiner with a letter or a mark on both sides."""
    return any(
        all(unicodedata.category(side)[0] in "LM" for side in found.groups())
        for found in _JOINER.finditer(word)
    )


def _others(found: Counter[str]) -> int:
    return sum(count for name, count in found.items() if name not in ACCENTED)


class Uncovered(NamedTuple):
    """Characters of a text that become [UNK].

    total: number of characters without white space; unknown: character -> occurrences, of those
    that become [UNK]; whole_words: whether each word with such a character becomes [UNK], as in
    WordPiece
    """

    total: int
    unknown: Counter[str]
    whole_words: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer, counts: Counter[str]) -> Uncovered:
        """Return the uncovered characters of a text. counts: character -> occurrences."""
        characters = [c for c in counts if not c.isspace()]
        # The space that SentencePiece puts before a text may be [UNK] as well, so ids do not tell.
        unknown = {c: counts[c] for c in characters if c in "".join(tokenizer.unknown_parts(c))}
        total = sum(counts[c] for c in characters)
        return cls(total, Counter(unknown), tokenizer.kind == "wordpiece")

    @property
    def share(self) -> float:
        """Share of the characters that become [UNK], from 0 to 1."""
        return self.unknown.total() / max(1, self.total)

    def describe(self) -> str:
        """Describe the share and the most frequent characters, as a warning above WARN."""
        if not self.unknown:
            return "every character of the text is in the vocabulary"
        most = " ".join(map(printable, in_order(self.unknown)[:SHOWN]))
        become = "words with them become" if self.whole_words else "become"
        line = (
            f"{self.share:.2%} of the text's characters are not in the vocabulary, and {become} "
            f"[UNK]: {counted(len(self.unknown), 'different one')}, most frequent {most}"
        )
        if self.share > WARN:
            # SentencePiece uses more entries for longer tokens, not for rare characters.
            hint = "; a larger --vocab-size covers more" if self.whole_words else ""
            return f"WARNING: {line}{hint}"
        return line


class LongWords(NamedTuple):
    """Words of more than MAX_WORD_CHARACTERS characters, each of which WordPiece makes one [UNK].

    total: number of characters without white space; inside: number of those in long words;
    words: number of long words; first: beginning of one of them
    """

    total: int
    inside: int
    words: int
    first: str

    @classmethod
    def of(cls, tokenizer: WordPiece, words: Counter[str]) -> LongWords:
        """Return the long words of a text. words: strings between white space -> occurrences."""
        total = inside = found = 0
        first = ""
        for word, count in words.items():
            total += len(word) * count
            if len(word) * LONGER > MAX_WORD_CHARACTERS:
                for part in tokenizer.words(word):
                    if len(part) > MAX_WORD_CHARACTERS:
                        inside += len(part) * count
                        found += count
                        first = first or part
        return cls(max(total, inside), inside, found, first)

    def describe(self) -> str:
        """Describe the long words, as a warning above WARN; empty if there are none."""
        if not self.words:
            return ""
        share = self.inside / max(1, self.total)
        line = (
            f"{share:.2%} of the text's characters are in {counted(self.words, 'word')} of more "
            f"than {MAX_WORD_CHARACTERS} characters, which become one [UNK] each, such as "
            f"{word_shown(self.first)}"
        )
        return f"WARNING: {line}; {NO_SPACES}" if share > WARN else line
