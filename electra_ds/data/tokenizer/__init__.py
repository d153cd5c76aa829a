"""Tokenizers: WordPiece, SentencePiece and byte-level BPE with one interface."""

from electra_ds.data.tokenizer.base import SPECIAL_NAMES, Tokenizer
from electra_ds.data.tokenizer.byte_bpe import ByteBpe
from electra_ds.data.tokenizer.loading import load_tokenizer
from electra_ds.data.tokenizer.saving import VOCABULARY_FILES
from electra_ds.data.tokenizer.sentencepiece import SentencePiece
from electra_ds.data.tokenizer.wordpiece import WordPiece

__all__ = [
    "SPECIAL_NAMES",
    "VOCABULARY_FILES",
    "ByteBpe",
    "SentencePiece",
    "Tokenizer",
    "WordPiece",
    "load_tokenizer",
]
