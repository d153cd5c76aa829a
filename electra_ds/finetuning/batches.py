"""Token ids, batches by length and micro-batches, as pure functions of (examples, seed, epoch).

Dimensions: N examples of a micro-batch in B rows of S tokens.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from electra_ds.data import philox
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.finetuning.examples import Example
from electra_ds.finetuning.squad_files import Answers
from electra_ds.finetuning.tasks import Task, TaskKind
from electra_ds.finetuning.windows import Window, encode_questions
from electra_ds.model.kernels.attention_mask import with_cu_seqlens

# Number of batches with examples that are sorted by length together. 32 gives 1 to 3 % padding on
# GLUE.
BUCKET_BATCHES = 32


class Encoded(NamedTuple):
    """One example as token ids.

    ids: [CLS] a [SEP], or [CLS] a [SEP] b [SEP] for a pair. second_start: index in ids at which
    segment 1 begins; len(ids) without a second text. label: a class number; in regression the label
    scaled so that label_range becomes [0, 1]; in token classification one class number for each
    token (-1: not scored); in question_answering the first and the last token of the answer in ids.
    left_out: tokens of the texts beyond max_length, which are not in ids. window: the part of the
    context in question_answering, where an example has several rows.
    choices: in multiple choice each choice as a pair; ids are theirs one after the other, and
    second_start is len(ids).
    """

    ids: list[int]
    second_start: int
    label: float | list[int]
    left_out: int = 0
    window: Window | None = None
    choices: "tuple[Encoded, ...]" = ()

    @property
    def longest(self) -> int:
        """The number of tokens of the longest sequence."""
        return max((len(choice.ids) for choice in self.choices), default=len(self.ids))


class TaskBatch(NamedTuple):
    """One micro-batch of N examples: padded to B = N rows, or packed into B = 1 row.

    In multiple choice, every choice is a sequence of its own: M sequences in B = M rows or B = 1.
    """

    input_ids: Tensor  # [B, S] int64
    segment_ids: Tensor  # [B, S] int64, 1 in the second text of a pair
    document_ids: Tensor  # [B, S] int64, 0 for padding; each example is a document
    position_ids: Tensor  # [B, S] int64, restart at each example
    cls_positions: Tensor  # [N or M] int64, index of each [CLS] in the flattened rows
    # [N], [B * S] in token classification, [N, 2] in question_answering; float32 in regression, else
    # int64
    labels: Tensor
    weights: Tensor  # float32, shaped as labels: 1 where a label counts, else 0
    cu_seqlens: Tensor | None = None  # int32, set by `with_cu_seqlens`
    # Multiple choice: [N, most choices] int64, number from 0 to M - 1 of each choice; -1: none.
    choice_rows: Tensor | None = None


def encode(
    examples: list[Example], task: Task, tokenizer: Tokenizer, max_length: int
) -> list[Encoded]:
    """Return examples as token ids, each cut to max_length tokens, [CLS] and [SEP] included.

    In a pair, the longer text is cut first, as in the authors' code. In question_answering, an
    example has one row for each window. A missing label becomes class 0, in regression the value 0.
    """
    if task.kind == "token_classification":
        return [_encode_words(example, tokenizer, max_length) for example in examples]
    if task.kind == "question_answering":
        rows = encode_questions(examples, task.questions, tokenizer, max_length)
        return [Encoded(*row) for row in rows]
    if task.kind == "multiple_choice":
        return _encode_choices(examples, task, tokenizer, max_length)
    special = tokenizer.special_ids
    firsts = _token_ids([str(example.text_a) for example in examples], tokenizer)
    seconds = _token_ids([str(example.text_b or "") for example in examples], tokenizer)
    encoded = []
    for example, a, b in zip(examples, firsts, seconds, strict=True):
        label = _target(example.label, task)
        if example.text_b is None:
            ids = [special.cls, *a[: max_length - 2], special.sep]
            encoded.append(Encoded(ids, len(ids), label, len(a) + 2 - len(ids)))
            continue
        room = max_length - 3
        total = len(a) + len(b) + 3
        b = b[: max(room - len(a), room // 2)]
        a = a[: room - len(b)]
        ids = [special.cls, *a, special.sep, *b, special.sep]
        encoded.append(Encoded(ids, len(a) + 2, label, total - len(ids)))
    return encoded


def _token_ids(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of texts; equal texts are encoded once, as many passages repeat."""
    distinct = list(dict.fromkeys(texts))
    ids = dict(zip(distinct, tokenizer.encode_batch(distinct), strict=True))
    return [ids[text] for text in texts]


def _encode_choices(
    examples: list[Example], task: Task, tokenizer: Tokenizer, max_length: int
) -> list[Encoded]:
    """Encode examples of several choices. Each choice is a pair of at most max_length tokens."""
    pairs = [
        example._replace(text_b=choice, label=None)
        for example in examples
        for choice in example.text_b or ()
    ]
    as_pairs = task.model_copy(update={"kind": "classification", "choices": None})
    rows = iter(encode(pairs, as_pairs, tokenizer, max_length))
    encoded = []
    for example in examples:
        choices = tuple(itertools.islice(rows, len(example.text_b or ())))
        ids = [token for choice in choices for token in choice.ids]
        left_out = sum(choice.left_out for choice in choices)
        label = _target(example.label, task)
        encoded.append(Encoded(ids, len(ids), label, left_out, choices=choices))
    return encoded


def _encode_words(example: Example, tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Encode an example of words. The first token of a word gets its label, the others get -1."""
    special = tokenizer.special_ids
    words = tokenizer.encode_words(list(example.text_a))
    labels = example.label if isinstance(example.label, list) else [0] * len(words)
    ids: list[int] = []
    targets: list[int] = []
    for word, label in zip(words, labels, strict=True):
        tokens = word or [special.unk]
        ids += tokens
        targets += [label] + [-1] * (len(tokens) - 1)
    room = max_length - 2
    left_out = max(0, len(ids) - room)
    ids = [special.cls, *ids[:room], special.sep]
    return Encoded(ids, len(ids), [-1, *targets[:room], -1], left_out)


def _target(label: int | float | list[int] | Answers | None, task: Task) -> float:
    """Return a label as the loss uses it: a class number, or a value scaled by label_range."""
    if label is None:
        return 0
    assert not isinstance(label, (list, Answers))
    if task.label_range is None:
        return label
    low, high = task.label_range
    return (label - low) / (high - low)


def swapped(examples: list[Example]) -> list[Example]:
    """Return the pairs with text_a and text_b exchanged (MRPC and STS-B train on both orders)."""
    swaps = []
    for example in examples:
        assert isinstance(example.text_a, str) and isinstance(example.text_b, str)
        swaps.append(example._replace(text_a=example.text_b, text_b=example.text_a))
    return swaps


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return shuffled batches of example numbers; the examples of a batch have similar lengths.

    lengths: [examples] tokens of each example. Returns arrays [<= batch_size] int64. Every example
    is in one batch; the last batch of a bucket may be smaller. The order depends only on lengths,
    seed and epoch: the examples are shuffled and cut into buckets of BUCKET_BATCHES batches, each
    bucket is sorted by length and cut into batches, and the batches are shuffled.
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
    micro_batch_size: int,
    count: int,
    examples: list[Encoded],
    pad_id: int,
    kind: TaskKind,
    packed: bool = False,
) -> list[TaskBatch]:
    """Return exactly `count` micro-batches of up to micro_batch_size examples each.

    batch: [n] numbers of this rank's examples of a global batch. Other arguments as in `collate`. A
    micro-batch without examples has one row of weight 0, so that every rank runs the same number of
    forward and backward passes.
    """
    return [
        collate(
            [examples[i] for i in batch[start : start + micro_batch_size]], pad_id, kind, packed
        )
        for start in range(0, count * micro_batch_size, micro_batch_size)
    ]


def collate(
    examples: list[Encoded], pad_id: int, kind: TaskKind, packed: bool = False
) -> TaskBatch:
    """Return one micro-batch of N examples of a kind of task, on the CPU.

    packed: concatenate the examples into B = 1 row, instead of padding B = N rows to the longest
    example. Without examples, the micro-batch is one row of two padding tokens with weight 0.
    """
    if kind == "multiple_choice":
        return _collate_choices(examples, pad_id, packed)
    sizes = np.array([len(example.ids) for example in examples] or [2])
    rows, length = (1, sizes.sum()) if packed else (len(sizes), sizes.max())
    # Index of each example's first token in the flattened rows.
    starts = np.cumsum(sizes) - sizes if packed else np.arange(rows) * length
    total = rows * length
    ids = np.full(total, pad_id)
    segments = np.zeros(total, np.int64)
    documents = np.zeros(total, np.int64)
    positions = np.zeros(total, np.int64)
    per_token = kind == "token_classification"
    label_dtype = np.float32 if kind == "regression" else np.int64
    of_examples = (len(sizes), 2) if kind == "question_answering" else (len(sizes),)
    labels = np.zeros(total if per_token else of_examples, label_dtype)
    weights = np.zeros(labels.shape, np.float32)
    for i, (example, start, size) in enumerate(zip(examples, starts, sizes, strict=False)):
        tokens = slice(start, start + size)
        ids[tokens] = example.ids
        segments[start + example.second_start : start + size] = 1
        documents[tokens] = i + 1 if packed else 1
        positions[tokens] = np.arange(size)
        if isinstance(example.label, list):
            place = tokens if per_token else i
            several = np.array(example.label)
            labels[place] = np.maximum(several, 0)
            weights[place] = several >= 0
        else:
            labels[i] = example.label
            weights[i] = 1
    shape = (rows, length)
    batch = TaskBatch(
        input_ids=torch.from_numpy(ids.reshape(shape)),
        segment_ids=torch.from_numpy(segments.reshape(shape)),
        document_ids=torch.from_numpy(documents.reshape(shape)),
        position_ids=torch.from_numpy(positions.reshape(shape)),
        cls_positions=torch.from_numpy(starts),
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(weights),
    )
    return with_cu_seqlens(batch)


def _collate_choices(examples: list[Encoded], pad_id: int, packed: bool) -> TaskBatch:
    """Return one micro-batch of N examples of several choices. Arguments as in `collate`."""
    sequences = [choice for example in examples for choice in example.choices]
    batch = collate(sequences, pad_id, "classification", packed)
    counts = np.array([len(example.choices) for example in examples] or [1])
    places = np.arange(counts.max())
    rows = np.where(places < counts[:, None], (np.cumsum(counts) - counts)[:, None] + places, -1)
    labels = np.array([example.label for example in examples] or [0], np.int64)
    weights = np.full(len(counts), float(bool(examples)), np.float32)
    return batch._replace(
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(weights),
        choice_rows=torch.from_numpy(rows),
    )


def prediction_batches(
    examples: list[Encoded], batch_size: int, rank: int, world_size: int
) -> Iterator[np.ndarray]:
    """Yield this rank's batches of example numbers, [<= batch_size] int64, longest examples first.

    Every rank gets the same number of batches; the last batch of a rank may be empty.
    """
    longest_first = np.argsort([-len(example.ids) for example in examples], kind="stable")
    share = world_size * batch_size
    for start in range(0, len(examples), share):
        yield longest_first[start : start + share][rank * batch_size : (rank + 1) * batch_size]
