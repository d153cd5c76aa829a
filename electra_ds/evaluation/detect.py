"""Detection of replaced tokens: text and a checkpoint to one probability for each token.

Dimensions: B rows, S tokens a row.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.printable import counted
from electra_ds.data.batch import Batch
from electra_ds.data.tokenizer import Tokenizer, WordPiece
from electra_ds.data.tokenizer.wordpiece import MAX_WORD_CHARACTERS
from electra_ds.interop.load_model import load_objective, rows_of_token_ids
from electra_ds.interop.vocabularies import tokenizer_of_model
from electra_ds.model.objective import Objective
from electra_ds.training.checkpoint import find_checkpoint

BATCH_ROWS = 64


class TokenScore(NamedTuple):
    """One token of a text with its probability of being replaced.

    token: its spelling in the vocabulary. start, end: character offsets in the text, end excluded.
    probability: from 0 to 1.
    """

    token: str
    start: int
    end: int
    probability: float


class Detector:
    """A discriminator that scores texts; loaded once for many texts.

    module: an objective in eval mode with a main encoder that detects replaced tokens.
    sequence_length: most tokens of a row, [CLS] and [SEP] included.
    """

    def __init__(self, module: Objective, tokenizer: Tokenizer, sequence_length: int):
        self.module = module
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length

    @classmethod
    def load(
        cls,
        path: str | Path,
        tokenizer: str | Path | None = None,
        trust_code: bool = False,
    ) -> "Detector":
        """The detector of a run folder (its latest checkpoint), of OUT/ckpt or of OUT/ckpt/STEP.

        tokenizer: the vocabulary, when it is not in OUT/tokenizer. trust_code: run the code that
        model.factory of the checkpoint names. The model is in fp32 on the CPU. Raises UserError if
        there is no checkpoint or no tokenizer, if their sizes differ, for a model.factory without
        trust_code, and for an objective that does not detect.
        """
        folder = find_checkpoint(Path(path))
        module, config = load_objective(folder, trust_code=trust_code)
        if not config.objective.detects:
            raise UserError(
                f"{folder}: objective.kind = {config.objective.kind} predicts tokens and does not "
                "detect replaced ones; detect needs electra or electra_15"
            )
        words = tokenizer_of_model(
            folder,
            None if tokenizer is None else Path(tokenizer),
            config.model.vocab_size,
            config.data.special_ids,
        )
        return cls(module, words, config.data.sequence_length)

    def __call__(self, text: str) -> list[TokenScore]:
        """Scores of every token of `text`, in order.

        A text longer than a row is split into consecutive rows, which are scored independently.
        Raises UserError for a text without tokens, for one that is not Unicode, and when a
        probability is not a number.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text has {text[error.start]!r} at character {error.start}, which is not "
                "Unicode; expected text in UTF-8"
            ) from None
        ids, spans = self.tokenizer.encode_with_offsets(text)
        if not ids:
            raise UserError("the text holds no tokens; expected at least one word")
        room = self.sequence_length - 2  # beside [CLS] and [SEP]
        rows = [ids[start : start + room] for start in range(0, len(ids), room)]
        probabilities: list[float] = []
        for start in range(0, len(rows), BATCH_ROWS):
            probabilities += self._score(rows[start : start + BATCH_ROWS])
        if any(math.isnan(probability) for probability in probabilities):
            raise UserError(
                "the model gives no number for a token; expected finite logits: its weights are too "
                "large or damaged; use another checkpoint"
            )
        tokens = self.tokenizer.tokens(ids)
        return [
            TokenScore(token, *span, probability)
            for token, span, probability in zip(tokens, spans, probabilities, strict=True)
        ]

    def note(self, scores: list[TokenScore]) -> str:
        """Return a note on words that are too long for WordPiece, or "".

        scores: what a call returned.
        """
        unknown = self.tokenizer.names[self.tokenizer.special_ids.unk]
        is_wordpiece = isinstance(self.tokenizer, WordPiece)
        long = sum(
            is_wordpiece
            and score.token == unknown
            and score.end - score.start > MAX_WORD_CHARACTERS
            for score in scores
        )
        if not long:
            return ""
        return (
            f"{counted(long, 'word')} of more than {MAX_WORD_CHARACTERS} characters: one {unknown} "
            "each, with one probability; WordPiece does not divide them; a text in a script without "
            "spaces needs a model with a SentencePiece vocabulary"
        )

    def _score(self, rows: list[list[int]]) -> list[float]:
        """Probabilities of all tokens of B rows of token ids, [CLS] and [SEP] left out."""
        input_ids = rows_of_token_ids(rows, self.tokenizer.special_ids)  # [B, S]
        batch = _unmasked_batch(input_ids, self.tokenizer.special_ids.pad)
        with torch.no_grad():
            logits = self.module(batch, task="discriminate")  # [B, S]
        probabilities = torch.sigmoid(logits).tolist()
        return [
            probability
            for scored, row in zip(probabilities, rows, strict=True)
            for probability in scored[1 : len(row) + 1]
        ]


def _unmasked_batch(input_ids: Tensor, pad_id: int) -> Batch:
    """A batch of one document a row [B, S] with one masked position of weight 0 in each row."""
    is_real = (input_ids != pad_id).long()
    unused = torch.zeros(len(input_ids), 1)
    return Batch(
        input_ids=input_ids,
        segment_ids=torch.zeros_like(input_ids),
        document_ids=is_real,
        position_ids=torch.arange(input_ids.shape[1]) * is_real,
        masked_positions=unused.long(),
        masked_weights=unused,
        keep_original=unused.bool(),
        uniforms=unused,
    )
