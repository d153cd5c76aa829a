"""Counts of the words that become [UNK].

Each unit counts its unknown words while it is tokenized, because token ids do not contain them.
`prepare` adds the counts of all units.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pydantic import Field

from electra_ds.common.json_files import Record, read_record
from electra_ds.common.special_ids import UNKNOWN
from electra_ds.data.shard_format import UnknownWords
from electra_ds.data.tokenizer import Tokenizer, WordPiece
from electra_ds.data.tokenizer.wordpiece import MAX_WORD_CHARACTERS

# Lines with [UNK] are examined until they have FIRST_TOKENS tokens plus 1 / SHARE of the tokens of
# the unit.
FIRST_TOKENS = 1 << 13
SHARE = 256
WORD_CHARS = 100  # longer words are truncated
MAX_WORDS = 1 << 18  # most distinct words in memory, for one unit and for the sum of all units
MOST_FREQUENT = 100  # words in the manifest
CHARACTERS = ("characters", "unknown_characters", "long_characters")  # counts of characters


class UnitUnknowns(Record):
    """The file of unknown words of a unit.

    found: number of [UNK] tokens. words: examined word -> occurrences. characters: of the text,
    without white space. unknown_characters: of the examined words; long_characters: of those words
    that are too long for WordPiece. The counts of characters are None in units of older versions.
    """

    found: int = Field(ge=0)
    words: dict[str, int]
    characters: int | None = Field(None, ge=0)
    unknown_characters: int | None = Field(None, ge=0)
    long_characters: int | None = Field(None, ge=0)


class Unknowns:
    """The unknown words of one unit, counted in lines that contain [UNK].

    Such lines are tokenized a second time, so only a share of the text is examined. If the
    vocabulary fits the text, nearly all lines with [UNK] are examined. The counts depend only on
    the unit and the tokenizer.
    """

    def __init__(self) -> None:
        self.total = 0  # [UNK] tokens
        self.tokens = 0  # tokens of all lines
        self.examined_tokens = 0  # tokens of the lines that were examined
        self.words: Counter[str] = Counter()
        self.characters = 0  # of all lines, without spaces
        self.unknown_characters = 0  # of the examined words
        self.long_characters = 0  # of those of them that are too long for WordPiece

    def add(
        self, tokenizer: Tokenizer, lines: list[str], ids: np.ndarray, lengths: np.ndarray
    ) -> None:
        """Count the unknown words of lines.

        lines: normalized. ids [N], lengths [lines]: the result of `encode_lines` for them.
        """
        positions = np.flatnonzero(ids == tokenizer.special_ids.unk)
        self.total += len(positions)
        self.tokens += len(ids)
        self.characters += sum(len(line) - line.count(" ") for line in lines)
        with_unknowns = np.unique(np.searchsorted(np.cumsum(lengths), positions, side="right"))
        for line in with_unknowns.tolist():
            if self.examined_tokens > FIRST_TOKENS + self.tokens // SHARE:
                return
            if len(self.words) > MAX_WORDS:
                return
            self.examined_tokens += int(lengths[line])
            parts = tokenizer.unknown_parts(lines[line])
            self.unknown_characters += sum(map(len, parts))
            if isinstance(tokenizer, WordPiece):
                long = (len(part) for part in parts if len(part) > MAX_WORD_CHARACTERS)
                self.long_characters += sum(long)
            self.words.update(part[:WORD_CHARS].replace(UNKNOWN, "<unk>") for part in parts)

    def record(self) -> dict:
        """Return the counts as JSON values, for the unit's file of unknown words."""
        return {
            "found": self.total,
            "words": dict(sorted(self.words.items())),
            "characters": self.characters,
            "unknown_characters": self.unknown_characters,
            "long_characters": self.long_characters,
        }


def sum_unknowns(files: Iterable[Path], tokens: int) -> UnknownWords:
    """Return the sum of the counts of all units, for the manifest.

    files: the files of unknown words of all units. tokens: number of tokens of all units.
    Raises UserError for a damaged file.
    """
    total = 0
    examined = 0
    words: Counter[str] = Counter()
    characters: dict[str, int | None] = dict.fromkeys(CHARACTERS, 0)
    for file in files:
        unit = read_record(file, UnitUnknowns, "the unknown words of a unit")
        total += unit.found
        examined += sum(unit.words.values())
        words.update(unit.words)
        for key, count in characters.items():
            more = getattr(unit, key)
            characters[key] = None if count is None or more is None else count + more
        if len(words) > MAX_WORDS:  # drop the rarest half
            words = Counter(dict(words.most_common(MAX_WORDS // 2)))
    most_frequent = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:MOST_FREQUENT]
    return UnknownWords(
        found=total, looked_at=examined, words=dict(most_frequent), tokens=tokens, **characters
    )
