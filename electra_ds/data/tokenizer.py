"""Text <-> ids: WordPiece vocab.txt files and SentencePiece models behind one face.

No special token is ever added here, and text cannot make one: a literal "[MASK]" in a corpus is five characters of
punctuation and letters. The word cache follows from BERT's pre-tokenisation: white space always splits, so the ids of
a text are the ids of its words one after the other, and each distinct word is tokenized once.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from electra_ds.common.errors import UserError
from electra_ds.common.files import read_json, write_bytes, write_json
from electra_ds.common.special_ids import SpecialIds

SPECIAL_NAMES = {  # role -> spellings looked for in a vocabulary, ours first
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
FILES = ("vocab.txt", "spm.model", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
CACHE_WORDS = 500_000  # about 100 MB; the cache starts again when it is full, which costs little
MEAN_WORD = (
    24  # longer "words" on average mean a script without spaces: those texts are tokenized whole
)
_PARTS = re.compile(
    "[^!-/:-@[-`{-~]+|."
)  # of a word: BERT makes each ASCII punctuation character a word of its own
# Characters that str.split() takes for white space and BERT's cleaning deletes or keeps: such texts go whole, too.
_UNLIKE_SPACES = re.compile("[\x0b\x0c\x1c-\x1f\x85\u2028\u2029]")


class Tokenizer(ABC):
    """The face of both kinds: `kind`, `vocab_size`, `special_ids`, `options`, `fingerprint`, and the methods below."""

    kind: str
    file_name: str

    def __init__(
        self, content: bytes, names: Sequence[str], options: dict[str, bool | None], source: str
    ) -> None:
        self.content, self.names, self.options = content, list(names), options
        self.ids = {name: i for i, name in enumerate(self.names)}
        self.vocab_size = len(self.names)
        found = {
            role: next((self.ids[n] for n in spellings if n in self.ids), None)
            for role, spellings in SPECIAL_NAMES.items()
        }
        if missing := [SPECIAL_NAMES[role][0] for role, i in found.items() if i is None]:
            raise UserError(
                f"{source}: no {', '.join(missing)} among its {self.vocab_size} entries; expected "
                f"[PAD] [UNK] [CLS] [SEP] [MASK]; `electra-ds train-tokenizer` makes such a vocabulary"
            )
        self.special_ids = SpecialIds(**found)
        digest = hashlib.sha256(json.dumps([self.kind, options], sort_keys=True).encode())
        digest.update(content)
        self.fingerprint = digest.hexdigest()

    @abstractmethod
    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize many texts: (ids [N] uint32 one after the other, lengths [len(texts)] int64)."""

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of one text with the (start, end) characters that each token covers."""

    @abstractmethod
    def begins_word(self) -> np.ndarray:
        """Whether a token begins a word by its spelling, [V] bool; the others go on with the word before them."""

    @abstractmethod
    def unknown_parts(self, text: str) -> list[str]:
        """The parts of a text that become [UNK]: as written (WordPiece), or as normalised (SentencePiece)."""

    @abstractmethod
    def _decode_plain(self, ids: list[int]) -> str:
        """Readable text of ids without special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, no special tokens added."""
        ids, lengths = self.encode_flat(texts)
        return (
            [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(texts) else []
        )

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's spelling of each id."""
        return [self.names[i] for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Readable text; special tokens keep their spelling."""
        special, parts = set(self.special_ids.model_dump().values()), []
        for is_special, group in groupby(map(int, ids), special.__contains__):
            run = list(group)
            parts += self.tokens(run) if is_special else [self._decode_plain(run)]
        return " ".join(parts)

    def save(self, folder: str | Path) -> None:
        """Write the vocabulary file and options.json, which `load_tokenizer(folder)` reads back with equal ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / self.file_name, self.content)
        write_json(
            folder / "options.json",
            {
                "kind": self.kind,
                "vocab_size": self.vocab_size,
                **self.options,
                "special_ids": self.special_ids.model_dump(),
                "fingerprint": self.fingerprint,
            },
        )


class _Words(dict[str, bytes]):
    """Word -> its ids as uint32 bytes, found out when it is first asked for, so that the ids of a text are one join."""

    def __init__(self, fast: Any, lowercase: bool) -> None:
        self.fast, self.model, self.lowercase = fast, fast.model, lowercase

    def __missing__(self, word: str) -> bytes:
        parts = [word] if word.isalnum() else _PARTS.findall(word)
        ids = b"".join(map(self.__getitem__, parts)) if parts != [word] else self.encode(word)
        self[word] = ids
        return ids

    def encode(self, text: str) -> bytes:
        """The ids of any text; those of ASCII letters and digits need no more than the model."""
        if text.isalnum() and text.isascii():
            found = [
                token.id for token in self.model.tokenize(text.lower() if self.lowercase else text)
            ]
        else:
            found = self.fast.encode(text, add_special_tokens=False).ids
        return array("I", found).tobytes()


class WordPiece(Tokenizer):
    """BERT's WordPiece: cleaning, optional lower-casing and accent stripping, greedy longest match in each word."""

    kind, file_name = "wordpiece", "vocab.txt"

    def __init__(self, content: bytes, options: dict[str, bool | None], source: str) -> None:
        try:
            names = [
                line.rstrip("\r") for line in content.decode("utf-8").removesuffix("\n").split("\n")
            ]
        except UnicodeDecodeError as error:
            raise UserError(
                f"{source}: not UTF-8 ({error}); expected one vocabulary entry per line"
            ) from None
        super().__init__(content, names, options, source)
        if len(self.ids) != len(names):
            twice = next(name for i, name in enumerate(names) if self.ids[name] != i)
            raise UserError(f"{source}: {twice!r} stands there twice; expected every entry once")
        from tokenizers import Tokenizer as Fast
        from tokenizers import models, normalizers, pre_tokenizers

        unknown = names[self.special_ids.unk]
        self.fast = Fast(
            models.WordPiece(self.ids, unk_token=unknown, max_input_chars_per_word=100)
        )
        self.fast.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=True,
            lowercase=options["lowercase"],
            strip_accents=options["strip_accents"],
        )
        self.fast.pre_tokenizer = (
            pre_tokenizers.BertPreTokenizer()
        )  # splits "[MASK]"; no added tokens exist
        self._cache = _Words(self.fast, options["lowercase"])

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if len(self._cache) > CACHE_WORDS:
            self._cache.clear()
        parts = [self._encode(text) for text in texts]
        lengths = np.fromiter((len(part) // 4 for part in parts), np.int64, len(parts))
        return np.frombuffer(b"".join(parts), np.uint32), lengths

    def _encode(self, text: str) -> bytes:
        words = text.split()
        if len(words) * MEAN_WORD < len(text) or (
            not text.isprintable() and _UNLIKE_SPACES.search(text)
        ):
            return self._cache.encode(text)
        return b"".join(map(self._cache.__getitem__, words))

    def unknown_parts(self, text: str) -> list[str]:
        unk = self.special_ids.unk
        some = np.uint32(unk).tobytes()  # only words that may hold it are tokenized again
        words = [word for word in text.split() if some in self._cache.get(word, some)]
        return [
            word[start:end]
            for word in words
            for i, (start, end) in zip(*self.encode_with_offsets(word), strict=True)
            if i == unk
        ]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self.fast.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def begins_word(self) -> np.ndarray:
        return np.array([not name.startswith("##") for name in self.names])

    def _decode_plain(self, ids: list[int]) -> str:
        return " ".join(self.names[i] for i in ids).replace(" ##", "")


class SentencePiece(Tokenizer):
    """A SentencePiece model, unigram or bpe; its own normalisation rules are inside the file."""

    kind, file_name = "sentencepiece", "spm.model"

    def __init__(self, content: bytes, options: dict[str, bool | None], source: str) -> None:
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
                    f"{source}: {self.names[i]} is no control symbol, so corpus text could make its id; "
                    f"expected control_symbols; train the model with `electra-ds train-tokenizer`"
                )

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = self._model.encode(list(texts), num_threads=1, return_type="numpy")
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return np.frombuffer(b"".join(parts), np.uint32), lengths

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._model.encode(text, return_type="offset_mapping")
        return list(found["ids"]), [tuple(span) for span in found["offsets"]]

    def begins_word(self) -> np.ndarray:
        return np.array([name.startswith("\u2581") for name in self.names])

    def unknown_parts(self, text: str) -> list[str]:
        return [piece for piece in self._model.encode(text, out_type=str) if piece not in self.ids]

    def _decode_plain(self, ids: list[int]) -> str:
        return self._model.decode(ids)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a vocab.txt, an spm .model file, or a folder with one of them (ours, or a Hugging Face one).

    Options come from options.json or tokenizer_config.json beside the file; else a vocab.txt counts as lower-cased
    when none of its entries holds an upper-case letter, and accents are stripped when it is lower-cased.
    Raises UserError for a missing or broken vocabulary and for special entries that are not there.
    """
    file = path = Path(path)
    if path.is_dir():
        file = next((path / name for name in FILES if (path / name).is_file()), None)
        if file is None:
            raise UserError(
                f"{path}: no vocabulary in this folder; expected one of {', '.join(FILES)}"
            )
    elif not path.is_file():
        raise UserError(
            f"{path}: not found; expected a vocab.txt, an spm .model file or a folder with one of them"
        )
    content = file.read_bytes()
    if file.suffix == ".model":
        return SentencePiece(content, {}, str(file))
    beside = {}
    if (file.parent / "options.json").is_file():
        beside = read_json(file.parent / "options.json", "the options of a tokenizer")
    elif (file.parent / "tokenizer_config.json").is_file():
        stored = read_json(
            file.parent / "tokenizer_config.json", "the options of a Hugging Face tokenizer"
        )
        if stored.get("tokenize_chinese_chars") is False or stored.get("word_tokenizer_type"):
            raise UserError(
                f"{file.parent}/tokenizer_config.json: tokenize_chinese_chars = false or another splitter; "
                "only BERT's own pre-tokenisation is supported"
            )
        beside = {
            "lowercase": stored.get("do_lower_case"),
            "strip_accents": stored.get("strip_accents"),
        }
    lowercase, strip_accents = beside.get("lowercase"), beside.get("strip_accents")
    if lowercase is None:
        text = re.sub(rb"(?m)^(\[\w+\]|<\w+>)\r?$", b"", content).decode("utf-8", "replace")
        lowercase = text == text.lower()
    strip_accents = lowercase if strip_accents is None else strip_accents
    return WordPiece(content, {"lowercase": lowercase, "strip_accents": strip_accents}, str(file))
