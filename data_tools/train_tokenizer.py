"""Training of vocabularies.

WordPiece is trained by Hugging Face tokenizers, unigram and bpe by SentencePiece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

from data_tools.formats.documents import documents
from data_tools.formats.source import UNKNOWN, Tally
from data_tools.inputs.plan import make_plan
from data_tools.pipeline.clean import clean_lines
from data_tools.vocabulary_folder import check_vocabulary_folder
from data_tools.workers import Progress, ignore_progress, running_total
from electra_ds.common.errors import UserError
from electra_ds.data.tokenizer import SPECIAL_NAMES, SentencePiece, Tokenizer, WordPiece

KINDS = ("wordpiece", "unigram", "bpe")
SPECIALS = [names[0] for names in SPECIAL_NAMES.values()]  # ids 0 to 4
# WordPiece: share of the text that the characters of the vocabulary cover. At most a quarter of the
# entries are characters.
COVERAGE = 0.9999
MIN_COUNT = 2  # least occurrences of a pair that WordPiece joins
REPEATS = 1000  # most repetitions of a word in one text that is passed to the trainer
MAX_SENTENCES = 5_000_000  # lines that SentencePiece samples
SENTENCE_BYTES = 16384  # SentencePiece ignores longer lines, so they are cut at white space


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
    progress: Progress = ignore_progress,
) -> Tokenizer:
    """Train a vocabulary on the inputs, write it to the folder `out` and return the tokenizer.

    inputs:        as for `prepare`
    kind:          wordpiece, or unigram or bpe (SentencePiece)
    strip_accents: None: the value of lowercase. SentencePiece models normalize by NFKC and keep
                   accents
    With little text the vocabulary is smaller than vocab_size; tokenizer.vocab_size is its size.
    Raises UserError for unknown settings, for inputs without text, and for a size that
    SentencePiece cannot make.
    """
    check_vocabulary_folder(Path(out), WordPiece if kind == "wordpiece" else SentencePiece)
    if kind not in KINDS:
        raise UserError(f"kind = {kind!r}; expected one of {', '.join(KINDS)}")
    if vocab_size < 64:
        raise UserError(f"vocab_size = {vocab_size}; expected at least 64")
    if strip_accents is None:
        strip_accents = lowercase and kind == "wordpiece"
    lines = _lines(inputs, format, text_field, progress)
    tokenizer: Tokenizer
    if kind == "wordpiece":
        content = _train_wordpiece(lines, vocab_size, lowercase, strip_accents)
        options = {"lowercase": lowercase, "strip_accents": strip_accents}
        tokenizer = WordPiece(content, options, "the new vocabulary")
    elif strip_accents:
        raise UserError(
            "strip_accents = True; expected None or False, since SentencePiece models keep accents"
        )
    else:
        content = _train_sentencepiece(lines, kind, vocab_size, lowercase)
        tokenizer = SentencePiece(content, {}, "the new model")
    progress("train", 1, 1)
    tokenizer.save(out)
    return tokenizer


def _lines(
    inputs: Sequence[str], format: str, text_field: str, progress: Progress
) -> Iterator[str]:
    """Yield the cleaned lines of all inputs; UserError when there is none."""
    plan = make_plan(inputs, format=format)
    total = sum(source.size for source in plan.sources)
    has_text = False
    on_progress = running_total(lambda done: progress("read", done, total))
    for source in plan.sources:
        for text in documents(
            source, 0, source.size, text_field=text_field, tally=Tally(), on_progress=on_progress
        ):
            lines, _ = clean_lines(text.replace(UNKNOWN, ""))
            has_text = has_text or bool(lines)
            yield from lines
    if not has_text:
        raise UserError(
            f"{', '.join(inputs)}: found no text; expected documents to train a vocabulary on "
            f"(JSONL: in the field {text_field!r})"
        )
    progress("train", 0, 1)


def _train_wordpiece(
    lines: Iterator[str], vocab_size: int, lowercase: bool, strip_accents: bool
) -> bytes:
    """Return the content of a vocab.txt, which is the same for the same words and counts.

    The trainer numbers words and characters in the order of a hash table, which differs from run to
    run, and decides ties by these numbers. Therefore the words are passed in a fixed order, and the
    characters, plain and as continuations (##c), are passed as special tokens, which get the first
    numbers in their order.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    words: Counter[str] = Counter()
    for line in lines:
        words.update(line.split())
    fast = Fast(models.WordPiece(unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    alphabet, continuations = _alphabet(words, fast, vocab_size // 4)
    texts = (
        " ".join([word] * min(REPEATS, count - start))
        for word, count in sorted(words.items())
        for start in range(0, count, REPEATS)
    )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_COUNT,
        show_progress=False,
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        special_tokens=[*SPECIALS, *alphabet, *(f"##{c}" for c in continuations)],
    )
    fast.train_from_iterator(texts, trainer)
    vocabulary = fast.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    return "".join(f"{token}\n" for token in tokens).encode()


def _alphabet(words: Counter[str], fast: Any, limit: int) -> tuple[list[str], list[str]]:
    """Return (characters of the vocabulary, those of them that occur inside words), both sorted.

    Rare characters are left out: at most `limit` are kept, and no more than COVERAGE needs.
    """
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for word, count in words.items():
        for part, _ in fast.pre_tokenizer.pre_tokenize_str(fast.normalizer.normalize_str(word)):
            inside.update(part[1:])
            for character in part:
                counts[character] += count
    common = sorted(counts, key=lambda c: (-counts[c], c))[:limit]
    # occurrences that the characters before each one cover
    covered_before = accumulate((counts[c] for c in common), initial=0)
    needed = COVERAGE * counts.total()
    kept = [c for c, covered in zip(common, covered_before, strict=False) if covered < needed]
    return sorted(kept), sorted(inside.intersection(kept))


def _train_sentencepiece(
    lines: Iterator[str], kind: str, vocab_size: int, lowercase: bool
) -> bytes:
    """Return the content of an spm.model."""
    import sentencepiece

    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part for line in lines for part in _cut(line)),
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
            f"SentencePiece could not make {vocab_size} entries ({error}); try a smaller vocab_size"
        ) from None
    return model.getvalue()


def _cut(line: str) -> Iterator[str]:
    """Yield a line in parts of at most SENTENCE_BYTES bytes."""
    while len(line) * 4 > SENTENCE_BYTES and len(line.encode()) > SENTENCE_BYTES:
        cut = line.rfind(" ", 1, SENTENCE_BYTES // 4)
        cut = cut if cut > 0 else SENTENCE_BYTES // 4
        yield line[:cut]
        line = line[cut:].strip()
    yield line
