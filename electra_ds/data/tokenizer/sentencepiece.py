"""SentencePiece tokenizer (unigram or BPE).

A model file of version 0.1 or of another program contains normalization rules. They are applied
after `normalize`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from electra_ds.common.errors import UserError
from electra_ds.data.tokenizer.base import Tokenizer
from electra_ds.data.tokenizer.normalization import (
    Form,
    aligner,
    whole_characters,
    without_surrogates,
)

# A field of the file's protobuf message: one more piece [MASK] with score 0 and type CONTROL.
# Fields of two messages in one file are those of one message.
MASK_PIECE = b"\x0a\x06[MASK]\x15\x00\x00\x00\x00\x18\x03"
MASK_FIELD = b"\x0a" + bytes([len(MASK_PIECE)]) + MASK_PIECE


def with_mask_piece(content: bytes) -> bytes:
    """Return the content of a .model file with [MASK] as its last piece, if it lacks one.

    The files of DeBERTa lack it: their programs give [MASK] the id after the last piece.
    """
    return content if MASK_PIECE[:8] in content else content + MASK_FIELD


class SentencePiece(Tokenizer):
    """A SentencePiece model; its special tokens are control symbols."""

    kind = "sentencepiece"
    file_name = "spm.model"

    def __init__(
        self,
        content: bytes,
        options: dict[str, bool],
        source: str,
        normalization: Form = "nfc",
    ) -> None:
        """Load a model.

        content: bytes of the .model file. options: {}, because a SentencePiece has none.
        source: name of the file in messages. normalization: any form but none and nfc_only.
        Raises UserError for a file that is not a SentencePiece model, for another normalization,
        and when a special token is missing or is not a control symbol.
        """
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            names = [self._model.id_to_piece(i) for i in range(self._model.vocab_size())]
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{source}: not a SentencePiece model ({error}); expected an spm .model file"
            ) from None
        super().__init__(content, names, options, source, normalization)
        if normalization in ("none", "nfc_only"):
            raise UserError(f"{source}: normalization = {normalization!r}; expected another one")
        for role, i in self.special_ids.model_dump().items():
            if role != "unk" and not self._model.is_control(i):
                raise UserError(
                    f"{source}: {self.names[i]} is no control symbol, so text could encode to its "
                    "id; expected it among the model's control_symbols; train the model with "
                    "`electra-ds train-tokenizer`"
                )

    def encode_normalized(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = self._model.encode(list(texts), num_threads=1, return_type="numpy")
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return np.frombuffer(b"".join(parts), np.uint32), lengths

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        text = without_surrogates(text)
        normalized = self.normalize(text)
        encoding = self._model.encode(normalized, return_type="offset_mapping")
        spans: list[tuple[int, int]] = [tuple(span) for span in encoding["offsets"]]
        if normalized != text:
            # (start, end) in `text` of each character of `normalized`
            characters = aligner(self.normalization).encode(text).offsets
            spans = [_original_span(span, characters) for span in spans]
        return list(encoding["ids"]), whole_characters(text, spans)

    def begins_word(self) -> np.ndarray:
        return np.array([name.startswith("\u2581") for name in self.names])

    def unknown_parts(self, text: str) -> list[str]:
        return [token for token in self._model.encode(text, out_type=str) if token not in self.ids]

    def _decode_plain(self, ids: list[int]) -> str:
        return self._model.decode(ids)


def _original_span(span: tuple[int, int], characters: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the span in the original text of a span in the normalized text."""
    start, end = span
    if start < end:
        return characters[start][0], characters[end - 1][1]
    before = characters[start - 1][1] if start else 0
    return before, before
