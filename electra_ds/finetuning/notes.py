"""Notes on texts and labels that train without an error but give meaningless results."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from electra_ds.common.printable import word_shown
from electra_ds.data.tokenizer import Tokenizer, WordPiece
from electra_ds.data.tokenizer.wordpiece import LONG_WORDS, MAX_WORD_CHARACTERS
from electra_ds.finetuning.batches import Encoded
from electra_ds.finetuning.examples import Example, outside_range
from electra_ds.finetuning.question_notes import question_notes
from electra_ds.finetuning.tasks import Task

SHARE = 0.01  # of unknown tokens, or of examples that are empty or cut; above it a note is given
MAX_EXAMINED = 1000  # examples with [UNK] that are tokenized again to find the words
SHOWN = 5  # words in a note
FEW_LABELS = 5  # up to this number, labels that occur once are no reason for a note


def split_notes(
    task: Task,
    split: str,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    tokenizer: Tokenizer,
) -> list[str]:
    """Return notes on one split: unknown tokens, texts without tokens, texts that are cut, equal
    labels, labels that occur once (train), labels out of range; of questions see `question_notes`.

    encoded: `encode` of the examples; in train, those in the other order of a pair may follow.
    tokenizer: that of `encode`.
    """
    special_ids = tokenizer.special_ids
    counts = Counter(token for example in encoded for token in example.ids)
    tokens = counts.total() - counts[special_ids.cls] - counts[special_ids.sep]
    unknown = counts[special_ids.unk] / max(1, tokens)
    notes = []
    if unknown:
        of_rows = [examples[row.window.example] for row in encoded if row.window] or examples
        words = _unknown_words(of_rows, encoded, tokenizer)
        notes += _unknown_note(
            f"{split}: {100 * unknown:.1f} %", unknown, words, examples, tokenizer
        )
    if task.kind == "question_answering":
        return [*notes, *question_notes(task, split, examples, encoded)]
    empty = sum(len(example.ids) <= 2 for example in encoded) / max(1, len(encoded))
    if empty > SHARE:
        notes.append(f"{split}: {100 * empty:.1f} % of the examples have no token in their text")
    notes += _cut_note(task, split, encoded, tokens)
    if is_constant(examples):
        what = "tags" if task.kind == "token_classification" else "label"
        notes.append(f"{split}: every example has the same {what}")
    notes += _labels_note(task, split, examples)
    if odd := outside_range(task, list(examples)):
        low, high = task.label_range or (0.0, 1.0)
        share = 100 * len(odd) / len(examples)
        notes.append(
            f"{split}: {share:.1f} % of the labels are outside label_range [{low:g}, {high:g}], "
            f"the first is {odd[0]:g}"
        )
    return notes


def _cut_note(task: Task, split: str, encoded: Sequence[Encoded], tokens: int) -> list[str]:
    """Return a note if many examples are longer than max_length, else [].

    In token classification one is enough, because its last words get a tag without a prediction.
    tokens: number of those that are not left out, without [CLS] and [SEP].
    """
    cut = [example for example in encoded if example.left_out]
    share = len(cut) / max(1, len(encoded))
    has_words = task.kind == "token_classification"
    if not cut or (share <= SHARE and not has_words):
        return []
    left_out = sum(example.left_out for example in cut)
    length = cut[0].longest
    words = ""
    if has_words:
        tag = "O" if "O" in (task.labels or []) else word_shown((task.labels or ["O"])[0])
        words = f"; words beyond {length} tokens get the tag {tag} without a prediction"
    return [
        f"{split}: {100 * share:.1f} % of the examples have more than {length} tokens "
        f"(train.max_length) and are cut; {100 * left_out / (tokens + left_out):.1f} % of all "
        f"tokens are left out{words}"
    ]


def _unknown_note(
    start: str,
    unknown: float,
    words: Counter[str],
    examples: Sequence[Example],
    tokenizer: Tokenizer,
) -> list[str]:
    """Return the note on unknown tokens; [] if their share is small.

    start: of the note. unknown: share of the tokens. words: what became [UNK] -> occurrences. Words
    above the limit of WordPiece are few tokens of many characters.
    """
    characters = sum(
        len(text) - text.count(" ") for example in examples for text in _texts(example)
    )
    lengths = {word: len(word) * count for word, count in words.items()}
    is_wordpiece = isinstance(tokenizer, WordPiece)
    long = sum(lengths[word] for word in words if is_wordpiece and len(word) > MAX_WORD_CHARACTERS)
    share = min(1.0, sum(lengths.values()) / max(1, characters))
    is_long = 2 * long > sum(lengths.values())
    if unknown <= SHARE and not (is_long and share > SHARE):
        return []
    first = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]
    named = " ".join(word_shown(word) for word, _ in first) or "words without a character"
    of_characters = f", {100 * share:.1f} % of the characters" if is_long else ""
    advice = LONG_WORDS if is_long else "the vocabulary of the model does not fit these texts"
    return [f"{start} of the tokens are [UNK]{of_characters}, most frequent: {named}; {advice}"]


def _unknown_words(
    examples: Sequence[Example], encoded: Sequence[Encoded], tokenizer: Tokenizer
) -> Counter[str]:
    """The words that become [UNK] in the first examples with some, with their occurrences."""
    unk = tokenizer.special_ids.unk
    found = (example for example, row in zip(examples, encoded, strict=False) if unk in row.ids)
    words: Counter[str] = Counter()
    for example in itertools.islice(found, MAX_EXAMINED):
        for text in _texts(example):
            words.update(tokenizer.unknown_parts(tokenizer.normalize(text)))
    return words


def _texts(example: Example) -> list[str]:
    """The texts of an example, or its words."""
    texts = [example.text_a] if isinstance(example.text_a, str) else example.text_a
    seconds = example.text_b if isinstance(example.text_b, list) else [example.text_b or ""]
    return [*texts, *seconds]


def is_constant(examples: Sequence[Example]) -> bool:
    """Return whether at least two examples have labels, and all labels are equal."""
    labels = [example.label for example in examples if example.label is not None]
    return len(labels) > 1 and all(label == labels[0] for label in labels)


def _labels_note(task: Task, split: str, examples: Sequence[Example]) -> list[str]:
    """Return a note if most labels of the training split occur once, as texts do, else []."""
    if split != "train" or task.kind in ("regression", "multiple_choice"):
        return []
    found = [
        number
        for example in examples
        for number in (example.label if isinstance(example.label, list) else [example.label])
    ]
    labels = len(set(found))
    if labels <= max(FEW_LABELS, len(found) / 2):
        return []
    what, where = (
        ("tags", "words") if task.kind == "token_classification" else ("labels", "examples")
    )
    return [
        f"{split}: {labels:,} different {what} in {len(found):,} {where}, so most of them occur "
        f"once; check that label = {task.label!r} and text_a = {task.text_a!r} are not swapped"
    ]


def segments_note(task: Task, trained: int | None) -> list[str]:
    """Return a note if the task has pairs, but pretraining trained one token type, else [].

    trained: token types that the pretraining run trained, or None if it is not known.
    """
    if not task.has_pairs or trained != 1:
        return []
    return [
        "the task has pairs of texts, but the rows of the pretraining run had one segment: the "
        "second texts start from a token type that the run did not train; for pairs, pretrain on "
        "data of prepare --packing google"
    ]


def length_note(max_length: int, longest: Mapping[str, int], trained: int | None) -> list[str]:
    """Return a note if examples are longer than the rows of pretraining, else [].

    longest: split -> tokens of its longest example, at most max_length. trained: tokens of a row in
    pretraining, or None if it is not known.
    """
    if trained is None or max(longest.values(), default=0) <= trained:
        return []
    splits = " and ".join(split for split, tokens in longest.items() if tokens > trained)
    return [
        f"train.max_length = {max_length}, but the model was pretrained on rows of {trained} "
        f"tokens: examples of {splits} are longer, and positions from {trained} on were not seen in "
        f"pretraining; --set train.max_length={trained} cuts them"
    ]
