"""How is a vocabulary made from text? WordPiece by Hugging Face tokenizers, unigram and bpe by SentencePiece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

from data_tools.formats.corpus import UNKNOWN, Tally, documents
from data_tools.inputs.plan import make_plan
from data_tools.pipeline.clean import clean_lines
from data_tools.workers import Progress, summed
from electra_ds.common.errors import UserError
from electra_ds.data.tokenizer import SPECIAL_NAMES, SentencePiece, Tokenizer, WordPiece

KINDS = ("wordpiece", "unigram", "bpe")
SPECIALS = [names[0] for names in SPECIAL_NAMES.values()]  # ids 0 to 4
COVERAGE = 0.9999  # share of the text whose characters are in a WordPiece vocabulary; at most a quarter of its entries
MIN_COUNT = 2  # of a pair that WordPiece joins
MAX_SENTENCES = 5_000_000  # that SentencePiece draws from the lines
REPEATS = 1000  # of one word in one text handed to the trainer
SENTENCE_BYTES = 16384  # SentencePiece leaves longer lines out: they are cut at white space before


def train_tokenizer(
    inputs: Sequence[str],
    out: str | Path,
    *,
    kind: str = "wordpiece",
    vocab_size: int = 30522,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    format: str = "auto",
    text_field: str = "text",
    progress: Progress = lambda stage, done, total: None,
) -> Tokenizer:
    """Train a vocabulary on the inputs (those of `prepare`), write it into the folder `out`, return the tokenizer.

    kind:          wordpiece, or unigram or bpe (SentencePiece)
    strip_accents: None: as lowercase. SentencePiece models normalise by NFKC and keep accents
    On little text the vocabulary comes out smaller than vocab_size: the tokenizer's own vocab_size is exact.
    Raises UserError for unknown settings, for inputs without text, for a size that SentencePiece cannot make.
    """
    if kind not in KINDS:
        raise UserError(f"kind = {kind!r}; expected one of {', '.join(KINDS)}")
    if vocab_size < 64:
        raise UserError(f"vocab_size = {vocab_size}; expected at least 64")
    if strip_accents is None:
        strip_accents = lowercase and kind == "wordpiece"
    lines = _lines(inputs, format, text_field, progress)
    if kind == "wordpiece":
        content = _wordpiece(lines, vocab_size, lowercase, strip_accents)
        tokenizer = WordPiece(
            content, {"lowercase": lowercase, "strip_accents": strip_accents}, "the new vocabulary"
        )
    elif strip_accents:
        raise UserError(
            "strip_accents is for wordpiece; a SentencePiece model has no such rule, leave it out"
        )
    else:
        content = _sentencepiece(lines, kind, vocab_size, lowercase)
        tokenizer = SentencePiece(content, {}, "the new model")
    progress("train", 1, 1)
    tokenizer.save(out)
    return tokenizer


def _lines(
    inputs: Sequence[str], format: str, text_field: str, progress: Progress
) -> Iterator[str]:
    """Cleaned lines of the whole corpus."""
    plan = make_plan(inputs, format=format)
    total, found = sum(s.size for s in plan.sources), False
    on_progress = summed(lambda done: progress("read", done, total))
    for source in plan.sources:
        for text in documents(
            source, 0, source.size, text_field=text_field, tally=Tally(), on_progress=on_progress
        ):
            for line in clean_lines(text.replace(UNKNOWN, ""))[0]:
                found = True
                yield line
    if not found:
        raise UserError(
            f"{', '.join(inputs)}: no text in it; expected documents to train a vocabulary on "
            f"(JSONL: in the field {text_field!r})"
        )
    progress("train", 0, 1)


def _wordpiece(
    lines: Iterator[str], vocab_size: int, lowercase: bool, strip_accents: bool
) -> bytes:
    """The content of a vocab.txt, the same for the same words and counts.

    The trainer numbers what it meets in the order of a hash table that differs from run to run, and breaks ties by
    number. So it gets words in a fixed order, and all characters, alone and as continuation, have numbers before.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    words: Counter[str] = Counter()
    for line in lines:
        words.update(line.split())
    fast = Fast(models.WordPiece(unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    alphabet, inside = _alphabet(words, fast, vocab_size // 4)
    texts = (
        " ".join([word] * min(REPEATS, count - at))
        for word, count in sorted(words.items())
        for at in range(0, count, REPEATS)
    )
    fast.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=MIN_COUNT,
            show_progress=False,
            limit_alphabet=len(alphabet),
            initial_alphabet=alphabet,
            special_tokens=[*SPECIALS, *alphabet, *(f"##{c}" for c in inside)],
        ),
    )
    vocabulary = fast.get_vocab()
    return "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.get)).encode()


def _alphabet(words: Counter[str], fast: Any, limit: int) -> tuple[list[str], list[str]]:
    """(characters of the vocabulary, those of them that stand inside words), sorted; rare ones are left out."""
    characters: Counter[str] = Counter()
    inside: set[str] = set()
    for word, count in words.items():
        for part, _ in fast.pre_tokenizer.pre_tokenize_str(fast.normalizer.normalize_str(word)):
            inside.update(part[1:])
            for character in part:
                characters[character] += count
    common = sorted(characters, key=lambda c: (-characters[c], c))[:limit]
    before = accumulate(
        (characters[c] for c in common), initial=0
    )  # of the text, covered by the ones before
    kept = [
        c
        for c, covered in zip(common, before, strict=False)
        if covered < COVERAGE * characters.total()
    ]
    return sorted(kept), sorted(inside.intersection(kept))


def _sentencepiece(lines: Iterator[str], kind: str, vocab_size: int, lowercase: bool) -> bytes:
    import sentencepiece

    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part for line in lines for part in _parts(line)),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            normalization_rule_name="nmt_nfkc_cf" if lowercase else "nmt_nfkc",
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            pad_piece="[PAD]",
            unk_piece="[UNK]",
            control_symbols=SPECIALS[2:],
            character_coverage=0.9995,
            input_sentence_size=MAX_SENTENCES,
            hard_vocab_limit=False,
            shuffle_input_sentence=True,
            max_sentence_length=SENTENCE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"SentencePiece made no {vocab_size} entries ({error}); try a smaller vocab_size"
        ) from None
    return model.getvalue()


def _parts(line: str) -> Iterator[str]:
    """A line in parts of at most SENTENCE_BYTES bytes."""
    while len(line) * 4 > SENTENCE_BYTES and len(line.encode()) > SENTENCE_BYTES:
        cut = line.rfind(" ", 1, SENTENCE_BYTES // 4)
        cut = cut if cut > 0 else SENTENCE_BYTES // 4
        yield line[:cut]
        line = line[cut:].strip()
    yield line
