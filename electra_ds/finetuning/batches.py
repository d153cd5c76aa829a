"""How do examples become batches? Token ids, both orders, length buckets: a pure function of (examples, seed, epoch).

Letters: N examples of a micro-batch in B rows of S tokens.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from electra_ds.data import philox
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.finetuning.examples import Example
from electra_ds.finetuning.tasks import Task
from electra_ds.model.kernels.attention import document_cu_seqlens

BUCKET_BATCHES = (
    32  # batches sorted by length together: padding 1 to 3 % on GLUE, the order still random
)


class Encoded(NamedTuple):
    """One example as the encoder reads it. label: class number, value in [0, 1], or per token (-1: not scored)."""

    ids: list[int]  # [CLS] a [SEP] or [CLS] a [SEP] b [SEP]
    second: int  # where segment 1 begins
    label: float | list[int]


class TaskBatch(NamedTuple):
    """One micro-batch of N examples: N rows padded to the longest, or a single row without padding."""

    input_ids: Tensor  # [B, S] int64
    segment_ids: Tensor  # [B, S] int64, 1 in the second text
    document_ids: Tensor  # [B, S] int64, 0 for padding: each example is a piece
    position_ids: Tensor  # [B, S] int64, restart at each example
    first: Tensor  # [N] int64, where each example's [CLS] is in the flattened rows
    labels: Tensor  # [N] or, for token classification, [B * S]: float32 in regression, else int64
    weights: Tensor  # like labels, float32: 1 where a label counts, else 0
    cu_seqlens: Tensor  # int32, `ops.attention.document_cu_seqlens` of document_ids


def encode(
    examples: list[Example], task: Task, tokenizer: Tokenizer, max_length: int
) -> list[Encoded]:
    """Token ids of examples, cut to max_length (of a pair, the longer text loses first, as in the authors' code)."""
    if task.kind == "token_classification":
        return [_encode_words(example, tokenizer, max_length) for example in examples]
    special = tokenizer.special_ids
    firsts = tokenizer.encode_batch([example.text_a for example in examples])
    pairs = [example.text_b for example in examples]
    seconds = tokenizer.encode_batch([text or "" for text in pairs])
    found = []
    for example, a, b in zip(examples, firsts, seconds, strict=True):
        is_pair = example.text_b is not None
        room = max_length - (3 if is_pair else 2)
        keep_b = min(len(b), max(room - len(a), room // 2)) if is_pair else 0
        a = a[: room - keep_b]
        ids = [special.cls, *a, special.sep, *([*b[:keep_b], special.sep] if is_pair else [])]
        found.append(Encoded(ids, len(a) + 2, _target(example.label, task)))
    return found


def _encode_words(example: Example, tokenizer: Tokenizer, max_length: int) -> Encoded:
    """The first token of each word carries the word's label."""
    special, room = tokenizer.special_ids, max_length - 2
    words = tokenizer.encode_batch(example.text_a)
    labels = example.label or [0] * len(words)
    pairs = [
        (i, label if place == 0 else -1)
        for word, label in zip(words, labels, strict=True)
        for place, i in enumerate(word or [special.unk])
    ][:room]
    ids = [special.cls, *(i for i, _ in pairs), special.sep]
    return Encoded(ids, len(ids), [-1, *(label for _, label in pairs), -1])


def _target(label: int | float | None, task: Task) -> float:
    if label is None or task.label_range is None:
        return label or 0
    low, high = task.label_range
    return (label - low) / (high - low)


def swapped(examples: list[Example]) -> list[Example]:
    """The same pairs in the other order (MRPC and STS-B train on both)."""
    return [example._replace(text_a=example.text_b, text_b=example.text_a) for example in examples]


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Shuffled batches of example numbers, each of alike lengths; every example once.

    A shuffle, cut into buckets of BUCKET_BATCHES batches, each sorted by length and cut into batches; the batches
    shuffled. Keyed by (seed, epoch), never by what ran before.
    """
    shuffled = philox.permutation(len(lengths), seed, epoch, 0, philox.EXAMPLES)
    size = BUCKET_BATCHES * batch_size
    buckets = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
    ordered = np.concatenate(
        [bucket[np.argsort(lengths[bucket], kind="stable")] for bucket in buckets]
    )
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return [batches[i] for i in philox.permutation(len(batches), seed, epoch, 1, philox.EXAMPLES)]


def micro_batches(
    batch: np.ndarray,
    micro: int,
    slots: int,
    examples: list[Encoded],
    pad_id: int,
    kind: str,
    packed: bool = False,
) -> list[TaskBatch]:
    """A global batch cut into `slots` micro-batches of up to `micro` examples; empty ones hold a row of weight 0."""
    return [
        collate([examples[i] for i in batch[start : start + micro]], pad_id, kind, packed)
        for start in range(0, slots * micro, micro)
    ]


def collate(examples: list[Encoded], pad_id: int, kind: str, packed: bool = False) -> TaskBatch:
    """Examples of a kind of task, each a row padded to the longest, or packed: one after the other in a single row.

    No examples: one of two padding tokens and weight 0.
    """
    sizes = np.array([len(example.ids) for example in examples] or [2])
    rows, length = (1, sizes.sum()) if packed else (len(sizes), sizes.max())
    first = np.cumsum(sizes) - sizes if packed else np.arange(rows) * length
    ids = np.full(rows * length, pad_id)
    segments, pieces, positions = np.zeros((3, rows * length), np.int64)
    per_token = kind == "token_classification"
    labels = np.zeros(
        rows * length if per_token else len(sizes), np.float32 if kind == "regression" else np.int64
    )
    weights = np.zeros(labels.shape, np.float32)
    for i, (example, start) in enumerate(zip(examples, first, strict=False)):
        here, size = slice(start, start + sizes[i]), sizes[i]
        ids[here], segments[start + example.second : start + size] = example.ids, 1
        pieces[here], positions[here] = i + 1 if packed else 1, np.arange(size)
        if per_token:
            found = np.array(example.label)
            labels[here], weights[here] = np.maximum(found, 0), found >= 0
        else:
            labels[i], weights[i] = example.label, 1
    grid = [array.reshape(rows, length) for array in (ids, segments, pieces, positions)]
    tensors = [torch.from_numpy(array) for array in (*grid, first, labels, weights)]
    return TaskBatch(*tensors, document_cu_seqlens(tensors[2]))


def prediction_batches(
    examples: list[Encoded], batch_size: int, rank: int, world_size: int
) -> Iterator[np.ndarray]:
    """This rank's batches of example numbers by falling length; every rank gets equally many (some empty)."""
    longest_first = np.argsort([-len(example.ids) for example in examples], kind="stable")
    share = world_size * batch_size
    for start in range(0, len(examples), share):
        yield longest_first[start : start + share][rank * batch_size : (rank + 1) * batch_size]
