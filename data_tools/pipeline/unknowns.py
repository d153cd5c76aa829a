"""Which words become [UNK]? Counted while units are tokenized, since ids no longer hold them; summed by `prepare`."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_tools.formats.corpus import UNKNOWN
from electra_ds.common.files import read_json
from electra_ds.data.shard_format import UnknownWords
from electra_ds.data.tokenizer import Tokenizer

FIRST_TOKENS, SHARE = (
    1 << 13,
    256,
)  # lines are looked at while they have at most so many, and 1 / SHARE of the unit's
WORD_CHARS = 100  # kept of a word
WORDS_AT_ONCE = 1 << 18  # in memory, of one unit and of their sum
MOST_FREQUENT = 100


class Unknowns:
    """The unknown words of one unit, counted in its lines that hold any; what is counted follows from the unit alone.

    Such lines are tokenized a second time, so only a share of the text is looked at: with a vocabulary that fits the
    text that is nearly all of them.
    """

    def __init__(self) -> None:
        self.found = self.tokens = self.looked_at = 0  # [UNK]s, tokens, tokens of lines looked at
        self.words: Counter[str] = Counter()

    def look(
        self, tokenizer: Tokenizer, lines: list[str], ids: np.ndarray, lengths: np.ndarray
    ) -> None:
        """Count what became [UNK] in `lines`, given what `encode_flat` made of them."""
        places = np.flatnonzero(ids == tokenizer.special_ids.unk)
        self.found += len(places)
        self.tokens += len(ids)
        for line in np.unique(np.searchsorted(np.cumsum(lengths), places, side="right")).tolist():
            if (
                self.looked_at > FIRST_TOKENS + self.tokens // SHARE
                or len(self.words) > WORDS_AT_ONCE
            ):
                return
            self.looked_at += int(lengths[line])
            parts = tokenizer.unknown_parts(lines[line])
            self.words.update(part[:WORD_CHARS].replace(UNKNOWN, "<unk>") for part in parts)

    def record(self) -> dict:
        """What the unit leaves on disk, as JSON values."""
        return {"found": self.found, "words": dict(sorted(self.words.items()))}


def sum_unknowns(files: Iterable[Path]) -> UnknownWords:
    """The unknown words of all units together, from their records; what the manifest says of them."""
    found, looked_at, words = 0, 0, Counter()
    for file in files:
        unit = read_json(file, "the unknown words of a unit")
        found += unit["found"]
        looked_at += sum(unit["words"].values())
        words.update(unit["words"])
        if len(words) > WORDS_AT_ONCE:  # the rarest half is forgotten
            words = Counter(dict(words.most_common(WORDS_AT_ONCE // 2)))
    most = sorted(words.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_FREQUENT]
    return UnknownWords(found=found, looked_at=looked_at, words=dict(most))
