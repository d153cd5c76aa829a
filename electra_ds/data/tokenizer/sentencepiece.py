"""SentencePiece tokenizer (unigram or BPE); the normalization rules are part of the model file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from electra_ds.common.errors import UserError
from electra_ds.data.tokenizer.base import Tokenizer


class SentencePiece(Tokenizer):
    """A SentencePiece model; its special tokens are control symbols."""

    kind = "sentencepiece"
    file_name = "spm.model"

    def __init__(self, content: bytes, options: dict[str, bool], source: str) -> None:
        """content: the .model file; options: none; source: its name in messages"""
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise UserError(
                f"{source}: not a SentencePiece model ({error}); expected an spm .model file"
            ) from None
        names = [self._model.id_to_piece(i) for i in range(self._model.vocab_size())]
        super().__init__(content, names, options, source)
        for role, i in self.special_ids.model_dump().items():
            if role != "unk" and not self._model.is_control(i):
                raise UserError(
                    f"{source}: {self.names[i]} is no control symbol, so text could encode to its "
                    "id; expected it among the model's control_symbols; train the model with "
                    "`electra-ds train-tokenizer`"
                )

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = self._model.encode(list(texts), num_threads=1, return_type="numpy")
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return np.frombuffer(b"".join(parts), np.uint32), lengths

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._model.encode(text, return_type="offset_mapping")
        return list(encoding["ids"]), [tuple(span) for span in encoding["offsets"]]

    def begins_word(self) -> np.ndarray:
        return np.array([name.startswith("\u2581") for name in self.names])

    def unknown_parts(self, text: str) -> list[str]:
        return [token for token in self._model.encode(text, out_type=str) if token not in self.ids]

    def _decode_plain(self, ids: list[int]) -> str:
        return self._model.decode(ids)
