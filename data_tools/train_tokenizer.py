"""Training of vocabularies.

WordPiece and byte_bpe are trained by Hugging Face tokenizers, unigram and bpe by SentencePiece.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

from data_tools.formats.documents import documents
from data_tools.formats.source import (
    Tally,
    check_bad_lines,
    check_share,
    described,
)
from data_tools.inputs.plan import make_plan
from data_tools.pipeline.characters import (
    LongWords,
    Merged,
    Uncovered,
    ignored_marks,
    in_order,
    joiners_note,
    strips_safely,
    turkish_note,
)
from data_tools.pipeline.clean import clean_lines
from data_tools.vocabulary_folder import check_vocabulary_folder
from data_tools.workers import Progress, ignore_progress, running_total
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.printable import printable, shortened
from electra_ds.common.redaction import redacted
from electra_ds.common.special_ids import UNKNOWN
from electra_ds.data.shard_format import MAX_VOCABULARY
from electra_ds.data.tokenizer import SPECIAL_NAMES, ByteBpe, SentencePiece, Tokenizer, WordPiece
from electra_ds.data.tokenizer.byte_bpe import byte_bpe_of
from electra_ds.data.tokenizer.byte_bpe_file import MAX_ENTRY
from electra_ds.data.tokenizer.normalization import Form

KINDS = ("wordpiece", "unigram", "bpe", "byte_bpe")
CLASSES: dict[str, type[Tokenizer]] = {"wordpiece": WordPiece, "byte_bpe": ByteBpe}
SPECIALS = [names[0] for names in SPECIAL_NAMES.values()]  # ids 0 to 4
# Share of the text that single characters cover before entries go to longer tokens. Digits are
# among these characters even if they are rarer, because every number with a lost digit is lost.
COVERAGE = 0.9999
CHARACTERS = 0.75  # largest share of the entries that these characters take
SPACE = "\u2581"  # SentencePiece's symbol for a space, which begins every text
MIN_COUNT = 2  # least occurrences of a pair that WordPiece and byte_bpe join
REPEATS = 1000  # most repetitions of a word in one text that is passed to the trainer
MAX_SENTENCES = 5_000_000  # lines that SentencePiece samples
SENTENCE_BYTES = 16384  # SentencePiece ignores longer lines, so they are cut at white space
UNKNOWN_WITH_SPACES = re.compile(f" *{UNKNOWN} *")
# Unigram: scores are multiples of 1 / SCORE_STEPS, so that their sums are exact in fp32, and the
# library tokenizers, which adds in fp64, cuts words at the same places.
SCORE_STEPS = 64


def ignore_facts(line: str) -> None:
    """Do nothing: the default of `say`."""


def train_tokenizer(
    inputs: Sequence[str],
    out: str | Path,
    *,
    kind: str = "wordpiece",
    vocab_size: int = 30522,
    lowercase: bool | None = None,
    strip_accents: bool | None = None,
    format: str = "auto",
    text_field: str = "text",
    max_bad_fraction: float = 0.001,
    progress: Progress = ignore_progress,
    say: Callable[[str], None] = ignore_facts,
) -> Tokenizer:
    """Train a vocabulary on the inputs, write it to the folder `out` and return the tokenizer.

    inputs:        as for `prepare`
    kind:          wordpiece, unigram or bpe (SentencePiece), or byte_bpe
    lowercase:     None: true, for byte_bpe false. byte_bpe keeps the case
    strip_accents: None: for lower-cased text in Latin or Greek letters, if few words become equal
                   to others without accents. SentencePiece models and byte_bpe keep accents
    max_bad_fraction: share of unreadable lines above which UserError is raised
    say:           receives lines: the accents, words that are too long for WordPiece, characters of
                   the text that are deleted, and the share of the text that is not covered
    With little text the vocabulary is smaller than vocab_size; tokenizer.vocab_size is its size.
    Raises UserError for unknown settings, for inputs without text, for too many unreadable lines,
    for a folder that cannot be written, and for a size that SentencePiece cannot make; RunFailure
    when writing fails.
    """
    _check_settings(Path(out), kind, vocab_size, lowercase, strip_accents)
    lowercase = kind != "byte_bpe" if lowercase is None else lowercase
    form: Form = "nfc"
    if kind in ("unigram", "bpe"):
        form = "nfkc_visible_lower" if lowercase else "nfkc_visible"
    check_share(max_bad_fraction)
    tally = Tally()
    lines = _lines(inputs, format, text_field, form, tally, max_bad_fraction, progress)
    tokenizer: Tokenizer
    characters: Counter[str] = Counter()
    if kind == "wordpiece":
        words = _count_words(lines)
        for word, count in words.items():
            for character in word:
                characters[character] += count
        if strip_accents is None:
            strip_accents = lowercase and _strips_accents(words, characters, say)
        content = _train_wordpiece(words, vocab_size, lowercase, strip_accents)
        options = {"lowercase": lowercase, "strip_accents": strip_accents}
        tokenizer = WordPiece(content, options, "the new vocabulary")
        facts = [LongWords.of(tokenizer, words).describe(), joiners_note(words)]
    elif kind == "byte_bpe":
        tokenizer = _train_byte_bpe(_counted(lines, characters), vocab_size)
        facts = []
    else:
        content = _train_sentencepiece(_counted(lines, characters), kind, vocab_size, characters)
        tokenizer = SentencePiece(content, {}, "the new model", form)
        facts = []
    progress("train", 1, 1)
    if lowercase:
        facts.append(turkish_note(characters))
    facts += [_unreadable(tally), Uncovered.of(tokenizer, characters).describe()]
    for fact in filter(None, facts):
        say(fact)
    try:
        tokenizer.save(out)
    except OSError as error:
        raise RunFailure(f"{out}: the vocabulary cannot be written: {error.strerror}") from None
    return tokenizer


def _unreadable(tally: Tally) -> str:
    """Return a sentence about the lines that were left out; "" if there are none."""
    if not tally.bad:
        return ""
    return (
        f"{tally.bad.total():,} of {tally.lines:,} lines cannot be read and are left out "
        f"({described(tally.bad)}); the first: {tally.locations[0]}"
    )


def _check_settings(
    out: Path, kind: str, vocab_size: int, lowercase: bool | None, strip_accents: bool | None
) -> None:
    """Raise UserError for settings that cannot be used, before the inputs are read."""
    check_vocabulary_folder(out, CLASSES.get(kind, SentencePiece))
    if kind not in KINDS:
        raise UserError(f"kind = {kind!r}; expected one of {', '.join(KINDS)}")
    if not 64 <= vocab_size <= MAX_VOCABULARY:  # the libraries abort the process for larger ones
        raise UserError(f"vocab_size = {vocab_size}; expected 64 to {MAX_VOCABULARY:,}")
    if lowercase and kind == "byte_bpe":
        raise UserError(
            "lowercase = True with kind = 'byte_bpe'; byte_bpe keeps the case; leave --lowercase "
            "out, or use another --kind"
        )
    if strip_accents and kind != "wordpiece":
        keeper = "byte_bpe keeps" if kind == "byte_bpe" else "SentencePiece models keep"
        raise UserError(
            f"strip_accents = True with kind = {kind!r}; {keeper} accents; leave --strip-accents "
            "out, or use --kind wordpiece"
        )
    least = len(SPECIALS) + 256
    if kind == "byte_bpe" and vocab_size < least:
        raise UserError(
            f"vocab_size = {vocab_size}; expected {least} or more, because byte_bpe has an entry "
            "for each special token and each byte"
        )


def _lines(
    inputs: Sequence[str],
    format: str,
    text_field: str,
    form: Form,
    tally: Tally,
    max_bad_fraction: float,
    progress: Progress,
) -> Iterator[str]:
    """Yield the normalized lines of all inputs.

    tally: counts the lines. Raises UserError at the end if there are no lines, or too many bad
    ones.
    """
    plan = make_plan(inputs, format=format, text_field=text_field)
    total = sum(source.size for source in plan.sources)
    has_text = False
    on_progress = running_total(lambda done: progress("read", done, total))
    for source in plan.sources:
        for text in documents(
            source, 0, source.size, text_field=text_field, tally=tally, on_progress=on_progress
        ):
            lines, _ = clean_lines(UNKNOWN_WITH_SPACES.sub(" ", text), form)
            has_text = has_text or bool(lines)
            yield from lines
    check_bad_lines(tally, max_bad_fraction)
    if not has_text:
        problem = f" (lines that cannot be read: {described(tally.bad)})" if tally.bad else ""
        raise UserError(
            f"{printable(redacted(', '.join(inputs)))}: found no text{problem}; expected documents "
            f"in UTF-8 to train a vocabulary on (JSONL: in the field {shortened(text_field)})"
        )
    progress("train", 0, 1)


def _strips_accents(
    words: Counter[str], characters: Counter[str], say: Callable[[str], None]
) -> bool:
    """Return whether accents of lower-cased text are stripped by default; say the reason."""
    merged = Merged.of(words)
    strips = strips_safely(characters, merged)
    say(ignored_marks(characters, merged, strips))
    return strips


def _count_words(lines: Iterator[str]) -> Counter[str]:
    words: Counter[str] = Counter()
    for line in lines:
        words.update(line.split())
    return words


def _counted(lines: Iterator[str], characters: Counter[str]) -> Iterator[str]:
    """Yield the lines; count their characters."""
    for line in lines:
        characters.update(line)
        yield line


def _train_wordpiece(
    words: Counter[str], vocab_size: int, lowercase: bool, strip_accents: bool
) -> bytes:
    """Return the content of a vocab.txt, which is the same for the same words and counts.

    The trainer numbers words and characters in the order of a hash table, which differs from run to
    run, and decides ties by these numbers. Therefore the words are passed in a fixed order, and the
    characters, plain and as continuations (##c), are passed as special tokens, which get the first
    numbers in their order. Rare characters take the entries that stay free.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    fast = Fast(models.WordPiece(unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts, inside = _count_characters(words, fast)
    limit = int(CHARACTERS * (vocab_size - len(SPECIALS)))
    alphabet = _fill(counts, inside, limit, needed=COVERAGE * counts.total())
    texts = (
        " ".join([word] * min(REPEATS, count - start))
        for word, count in sorted(words.items())
        for start in range(0, count, REPEATS)
    )
    characters = [entry for entry in alphabet if len(entry) == 1]  # no continuations
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_COUNT,
        show_progress=False,
        limit_alphabet=len(characters),
        initial_alphabet=characters,
        special_tokens=[*SPECIALS, *alphabet],
    )
    fast.train_from_iterator(texts, trainer)
    vocabulary = fast.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    rare = Counter({c: count for c, count in counts.items() if c not in vocabulary})
    tokens += _fill(rare, inside, vocab_size - len(tokens), needed=rare.total())
    return "".join(f"{token}\n" for token in tokens).encode()


def _count_characters(words: Counter[str], fast: Any) -> tuple[Counter[str], set[str]]:
    """Return (counts of the characters, those of them that occur inside words)."""
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for word, count in words.items():
        for part, _ in fast.pre_tokenizer.pre_tokenize_str(fast.normalizer.normalize_str(word)):
            inside.update(part[1:])
            for character in part:
                counts[character] += count
    return counts, inside


def _fill(counts: Counter[str], inside: set[str], limit: int, needed: float) -> list[str]:
    """Return at most `limit` entries: the most frequent characters, then their continuations.

    inside: characters that also need a continuation (##c)
    needed: occurrences that the characters cover together; rarer ones are left out
    """
    kept: list[str] = []
    for character in _needed(counts, needed):
        limit -= 2 if character in inside else 1
        if limit < 0:
            break
        kept.append(character)
    return [*sorted(kept), *(f"##{c}" for c in sorted(inside.intersection(kept)))]


def _needed(counts: Counter[str], needed: float) -> list[str]:
    """Return the most frequent characters with `needed` occurrences together, then other digits."""
    characters = in_order(counts)
    before = accumulate((counts[c] for c in characters), initial=0)
    frequent = [c for c, covered in zip(characters, before, strict=False) if covered < needed]
    return frequent + [c for c in characters[len(frequent) :] if c.isdecimal()]


def _train_byte_bpe(lines: Iterator[str], vocab_size: int) -> ByteBpe:
    """Return the tokenizer, which is the same for the same lines.

    The trainer numbers the bytes in a fixed order and decides ties by these numbers.
    """
    from tokenizers import AddedToken, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Fast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_COUNT,
        show_progress=False,
        # [MASK] takes the place of a word and of the space before it.
        special_tokens=[
            AddedToken(name, lstrip=name == SPECIAL_NAMES["mask"][0], normalized=False)
            for name in SPECIALS
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_ENTRY,
    )
    fast.train_from_iterator(lines, trainer)
    return byte_bpe_of(fast, "nfc", "the new vocabulary")


def _train_sentencepiece(
    lines: Iterator[str], kind: str, vocab_size: int, characters: Counter[str]
) -> bytes:
    """Return the content of an spm.model without rules of its own: the lines are normalized.

    characters: the counts of all characters when `lines` has ended
    """
    import sentencepiece

    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part for line in lines for part in _cut(line)),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            pad_piece="[PAD]",
            unk_piece="[UNK]",
            control_symbols=SPECIALS[2:],
            character_coverage=0.9995,
            required_chars=SPACE,  # too rare for character_coverage in long lines without spaces
            input_sentence_size=MAX_SENTENCES,
            hard_vocab_limit=False,
            shuffle_input_sentence=True,
            max_sentence_length=SENTENCE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        reason = (
            f"the frequent characters of the text and the special tokens need {least[1]} entries; give "
            f"--vocab-size {least[1]} or more"
            if least
            else f"{error}; try another --vocab-size"
        )
        raise UserError(f"SentencePiece could not make {vocab_size} entries: {reason}") from None
    return _completed(model.getvalue(), kind, vocab_size, characters)


def _completed(content: bytes, kind: str, vocab_size: int, characters: Counter[str]) -> bytes:
    """Return a model with more single characters, and rounded scores.

    Frequent characters and digits that the model lacks take the entries of its last longer tokens.
    Rare characters take the entries that stay free.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
    covered = {piece.piece for piece in model.pieces}
    counts = Counter({c: count for c, count in characters.items() if not c.isspace()})
    limit = int(CHARACTERS * (vocab_size - len(SPECIALS))) - sum(len(name) == 1 for name in covered)
    needed = [c for c in _needed(counts, COVERAGE * counts.total()) if c not in covered]
    needed = needed[: max(0, limit)]
    _remove_longer(model, len(model.pieces) + len(needed) - vocab_size)
    rare = [c for c in in_order(counts) if c not in covered.union(needed)]
    lowest = min(piece.score for piece in model.pieces)
    for character in [*needed, *rare][: max(0, vocab_size - len(model.pieces))]:
        lowest -= 1 if kind == "bpe" else 0  # bpe orders its merges by the scores
        model.pieces.add(piece=character, score=lowest)
    if kind == "unigram":
        for piece in model.pieces:
            piece.score = round(piece.score * SCORE_STEPS) / SCORE_STEPS
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString()


def _remove_longer(model: Any, count: int) -> None:
    """Remove the longer tokens with the lowest scores. In bpe, no other merge needs the last ones.

    model: ModelProto. count: number of entries to remove; <= 0 removes none.
    """
    longer = [i for i, piece in enumerate(model.pieces) if _is_longer(piece)]
    longer.sort(key=lambda i: (model.pieces[i].score, -i))
    for i in sorted(longer[: max(0, count)], reverse=True):
        del model.pieces[i]


def _is_longer(piece: Any) -> bool:
    """Whether an entry of a model is a token of several characters, and not a special one."""
    return piece.type == piece.NORMAL and len(piece.piece) > 1


def _cut(line: str) -> Iterator[str]:
    """Yield a line in parts of at most SENTENCE_BYTES bytes."""
    if len(line) * 4 <= SENTENCE_BYTES or len(line.encode()) <= SENTENCE_BYTES:
        yield line
        return
    most = SENTENCE_BYTES // 4  # characters
    start = 0
    while start < len(line):
        end = start + most
        if end < len(line):
            space = line.rfind(" ", start + 1, end)
            end = space if space > 0 else end
        if part := line[start:end].strip():
            yield part
        start = end
