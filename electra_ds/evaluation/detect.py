"""Which tokens of a text look replaced? Text and a checkpoint in, a probability per token out.

Letters: B rows, S sequence.
"""

import difflib
from pathlib import Path
from typing import NamedTuple

import torch

from electra_ds.common.errors import UserError
from electra_ds.data.batch import Batch
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.interop.load_model import checked_tokenizer, load_module
from electra_ds.model.objective import Objective
from electra_ds.training.checkpoint import find_checkpoint, tokenizer_of

BATCH_ROWS = 64


class TokenScore(NamedTuple):
    """One token of the text. start, end: its characters; probability: of being replaced, by the discriminator."""

    token: str
    start: int
    end: int
    probability: float


class Detector:
    """A discriminator with its tokenizer and length, loaded once for many texts."""

    def __init__(self, module: Objective, tokenizer: Tokenizer, sequence_length: int):
        self.module, self.tokenizer, self.sequence_length = module, tokenizer, sequence_length

    @classmethod
    def load(
        cls, path: Path, tokenizer: Path | None = None, trust_code: bool = False
    ) -> "Detector":
        """From a run folder, a checkpoint folder, or any below a run folder; its tokenizer lies in OUT/tokenizer.

        Raises UserError when there is no checkpoint or no tokenizer, or when they do not belong together.
        """
        found = find_checkpoint(path)
        module, config = load_module(found, trust_code=trust_code)
        if not config.objective.detects:
            raise UserError(
                f"{found}: objective.kind = {config.objective.kind} predicts tokens and cannot tell replaced ones; "
                "detect needs electra or electra_15"
            )
        words = checked_tokenizer(tokenizer or tokenizer_of(found), config.model.vocab_size)
        return cls(module, words, config.data.sequence_length)

    def __call__(self, text: str) -> list[TokenScore]:
        """Score every token of `text`; a text longer than a row is read in consecutive pieces."""
        ids, spans = self.tokenizer.encode_with_offsets(text)
        if not ids:
            raise UserError("the text holds no tokens; give a sentence")
        room = self.sequence_length - 2
        pieces = [ids[start : start + room] for start in range(0, len(ids), room)]
        probabilities = []
        for start in range(0, len(pieces), BATCH_ROWS):
            probabilities += self._score(pieces[start : start + BATCH_ROWS])
        tokens = self.tokenizer.tokens(ids)
        return [
            TokenScore(t, *span, p) for t, span, p in zip(tokens, spans, probabilities, strict=True)
        ]

    def _score(self, pieces: list[list[int]]) -> list[float]:
        special, length = self.tokenizer.special_ids, max(map(len, pieces)) + 2
        ids = torch.full((len(pieces), length), special.pad)  # [B, S]
        for row, piece in zip(ids, pieces, strict=True):
            row[: len(piece) + 2] = torch.tensor([special.cls, *piece, special.sep])
        real = (ids != special.pad).long()
        positions = torch.arange(length) * real
        none = torch.zeros(len(pieces), 1, dtype=torch.long)
        batch = Batch(
            ids,
            torch.zeros_like(ids),
            real,
            positions,
            none,
            none.float(),
            none.bool(),
            none.float(),
        )
        with torch.no_grad():
            found = torch.sigmoid(self.module(batch, task="discriminate"))  # [B, S]
        return [
            p
            for row, piece in zip(found.tolist(), pieces, strict=True)
            for p in row[1 : len(piece) + 1]
        ]


def table(
    found: list[TokenScore], threshold: float, original: list[TokenScore] | None = None
) -> list[str]:
    """Lines for people: a token each, suspicious ones marked; `original` puts the unchanged text's scores beside.

    Tokens are aligned by their spelling, as a difference of two texts is.
    """
    beside = _aligned(found, original) if original is not None else [None] * len(found)
    width = max(5, *(len(score.token) for score in found)) + 2
    columns = ["token"] if original is None else ["token", "original"]
    head = "  ".join(f"{column:{width}}replaced" for column in columns)
    lines = [head, "-" * len(head)]
    highest = max(score.probability for score in found)
    for score, other in zip(found, beside, strict=True):
        line = f"{score.token:{width}}{score.probability:8.4f}"
        if other is not None:
            line += f"  {other.token:{width}}{other.probability:8.4f}"
        if score.probability >= threshold:
            line += "  <-- replaced"
        elif score.probability == highest:
            line += "  <-- most suspicious"
        lines.append(line)
    return lines


def _aligned(found: list[TokenScore], original: list[TokenScore]) -> list[TokenScore | None]:
    matcher = difflib.SequenceMatcher(
        None, [s.token for s in original], [s.token for s in found], autojunk=False
    )
    beside: list[TokenScore | None] = [None] * len(found)
    for _, old, old_end, new, new_end in matcher.get_opcodes():
        for offset in range(min(old_end - old, new_end - new)):
            beside[new + offset] = original[old + offset]
    return beside
