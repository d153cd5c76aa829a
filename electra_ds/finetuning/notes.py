"""Notes on texts and labels that train without an error but give meaningless results."""

from collections import Counter
from collections.abc import Mapping, Sequence

from electra_ds.common.special_ids import SpecialIds
from electra_ds.finetuning.batches import Encoded
from electra_ds.finetuning.examples import Example, outside_range
from electra_ds.finetuning.tasks import Task

SHARE = 0.01  # of unknown tokens, or of examples without tokens; above it a note is given


def split_notes(
    task: Task,
    split: str,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    special_ids: SpecialIds,
) -> list[str]:
    """Return notes on one split: unknown tokens, texts without tokens, equal labels, labels out of
    range.

    encoded: the encoded examples; in train, those in the other order of a pair may be included.
    """
    counts = Counter(token for example in encoded for token in example.ids)
    tokens = counts.total() - counts[special_ids.cls] - counts[special_ids.sep]
    unknown = counts[special_ids.unk] / max(1, tokens)
    notes = []
    if unknown > SHARE:
        notes.append(
            f"{split}: {100 * unknown:.1f} % of the tokens are [UNK]; the vocabulary of the model "
            "does not fit these texts"
        )
    empty = sum(len(example.ids) <= 2 for example in encoded) / max(1, len(encoded))
    if empty > SHARE:
        notes.append(f"{split}: {100 * empty:.1f} % of the examples have no token in their text")
    if is_constant(examples):
        what = "tags" if task.kind == "token_classification" else "label"
        notes.append(f"{split}: every example has the same {what}")
    if odd := outside_range(task, list(examples)):
        low, high = task.label_range or (0.0, 1.0)
        share = 100 * len(odd) / len(examples)
        notes.append(
            f"{split}: {share:.1f} % of the labels are outside label_range [{low:g}, {high:g}], "
            f"the first is {odd[0]:g}"
        )
    return notes


def is_constant(examples: Sequence[Example]) -> bool:
    """Return whether at least two examples have labels, and all labels are equal."""
    labels = [example.label for example in examples if example.label is not None]
    return len(labels) > 1 and all(label == labels[0] for label in labels)


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
        f"tokens: examples of {splits} are longer, and their later positions start from untrained "
        f"embeddings; --set train.max_length={trained} cuts them"
    ]
