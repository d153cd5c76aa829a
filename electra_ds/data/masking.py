"""Selection of the masked positions of packed rows.

Dimensions: B rows, S sequence, K masked positions, V vocabulary, W words of all rows.
"""

from typing import NamedTuple

import numpy as np

from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.schema import ObjectiveConfig
from electra_ds.data.shard_format import Manifest
from electra_ds.data.tokenizer.byte_alphabet import ONE_SPACE, UNKNOWN_CLASS

COLUMN_BITS = np.uint64(24)  # low bits of a sorting key; the 32 random bits are above them
MAX_SPAN_WORDS = 10  # SpanBERT, section 3.1
# Number of words of a span for each value of 12 random bits: geometric with p = 0.2, at most 10
# words, mean 3.8 (the inverse of the distribution function 1 - 0.8 ** length).
SPAN_LENGTHS = (
    1 + np.log1p(np.arange(4096) / -4096 * (1 - 0.8**MAX_SPAN_WORDS)) / np.log(0.8)
).astype(np.uint8)


class MaskingRecipe(NamedTuple):
    """Parameters of masking. With token ids, row numbers and epochs they determine a batch."""

    packing: str  # best_fit, concat or google
    special_ids: SpecialIds
    mask_prob: float
    mask_token_prob: float  # probability that a masked position becomes [MASK]
    seed: int
    masking: str = "token"  # or whole_word, span
    begins_word: np.ndarray | None = None  # [V] bool, of the tokenizer; not used by token masking
    edge_classes: np.ndarray | None = None  # [2, V] uint8 of the tokenizer, or None


def masking_recipe(
    manifest: Manifest,
    objective: ObjectiveConfig,
    seed: int,
    begins_word: np.ndarray | None = None,
    edge_classes: np.ndarray | None = None,
) -> MaskingRecipe:
    """Return the masking recipe of a run on these rows."""
    return MaskingRecipe(
        manifest.packing,
        manifest.tokenizer.special_ids,
        objective.mask_prob,
        objective.mask_token_prob,
        seed,
        objective.masking,
        begins_word,
        edge_classes,
    )


def max_masked_positions(mask_prob: float, sequence_length: int) -> int:
    """Return K, the largest number of masked positions of a row.

    K is 19 for S = 128 and mask_prob = 0.15, 79 for (512, 0.15) and 130 for (512, 0.25).
    """
    return max(1, min(sequence_length, int((mask_prob + 0.005) * sequence_length)))


def select_masked_positions(
    ids: np.ndarray, recipe: MaskingRecipe, random_bits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Select exactly k distinct positions of each row.

    k = min(candidates, max(1, min(K, round(mask_prob * real tokens)))). Candidates are the real
    tokens except [CLS], [SEP] and [MASK]. The k candidates with the smallest random bits are
    selected. With masking whole_word or span, all tokens of a word or span have the same random
    bits. Words or spans are then selected in random order, and the last one is cut after the k-th
    position.

    ids:         [B, S] token ids
    random_bits: [B, S] uint32
    Returns masked positions [B, K] int64, ascending, 0 where unused, and used [B, K] bool.
    """
    length = ids.shape[1]
    special = recipe.special_ids
    slots = max_masked_positions(recipe.mask_prob, length)
    excluded = np.isin(ids, (special.pad, special.cls, special.sep, special.mask))
    priorities = random_bits
    if recipe.masking != "token":
        assert recipe.begins_word is not None
        begins_word = recipe.begins_word[ids]
        if recipe.edge_classes is not None:
            begins_word |= class_changes(ids, recipe.edge_classes)
        priorities = word_priorities(random_bits, begins_word, excluded, recipe.masking == "span")
    wanted = np.rint(recipe.mask_prob * (ids != special.pad).sum(1))  # rounds halves to even
    k = np.minimum((~excluded).sum(1), np.clip(wanted, 1, slots))
    keys = (priorities.astype(np.uint64) << COLUMN_BITS) | np.arange(length, dtype=np.uint64)
    keys |= excluded.astype(np.uint64) << np.uint64(63)
    smallest = np.sort(np.partition(keys, slots - 1, axis=1)[:, :slots], axis=1)
    used = np.arange(slots) < k[:, None]
    columns = (smallest & np.uint64((1 << int(COLUMN_BITS)) - 1)).astype(np.int64)
    return np.sort(np.where(used, columns, length), axis=1) * used, used


def class_changes(ids: np.ndarray, edge_classes: np.ndarray) -> np.ndarray:
    """Return where the class of the characters changes before a token, [B, S] bool.

    A token that begins inside a character, and one after a single space, is no change. A token that
    ends inside a character has the class of the last token with a known class.

    ids: [B, S]. edge_classes: [2, V] uint8, of the first and the last character; see
    `byte_alphabet`.
    """
    first, last = edge_classes[0][ids], edge_classes[1][ids]
    columns = np.where(last != UNKNOWN_CLASS, np.arange(ids.shape[1]), 0)
    last = np.take_along_axis(last, np.maximum.accumulate(columns, axis=1), axis=1)
    changes = np.zeros(ids.shape, bool)
    before = last[:, :-1]
    changes[:, 1:] = (first[:, 1:] != before) & (before != ONE_SPACE)
    return changes & (first != UNKNOWN_CLASS)


def word_priorities(
    random_bits: np.ndarray, begins_word: np.ndarray, excluded: np.ndarray, spans: bool
) -> np.ndarray:
    """Return the priority of each token's word, [B, S] uint32; smaller values are selected first.

    The priority of a word is the random bits of its first token. With `spans`, each word also
    starts a span of 1 to 10 words, which ends before an excluded token. A word then has the
    smallest priority of all spans that cover it. This draws spans uniformly by their first word,
    without replacement.

    random_bits: [B, S] uint32
    begins_word: [B, S] bool, by the spelling of the token
    excluded:    [B, S] bool, tokens that are no candidates; no word continues across them
    """
    boundaries = excluded.copy()
    boundaries[:, 1:] |= excluded[:, :-1]
    boundaries[:, 0] = True
    starts = (begins_word | boundaries).ravel()
    word_bits = random_bits.ravel()[starts]  # [W]
    priorities = word_bits.copy()
    if spans:
        # The low 12 bits give the length; the order is that of the upper bits except for ties.
        lengths = SPAN_LENGTHS[word_bits & 4095]
        segments = np.cumsum(boundaries, dtype=np.int32)[starts]  # words between excluded tokens
        for distance in range(1, MAX_SPAN_WORDS):
            out_of_reach = (lengths[:-distance] <= distance) | (
                segments[:-distance] != segments[distance:]
            )
            # Out of reach all bits are set, so that the value is never the minimum.
            candidates = word_bits[:-distance] | -out_of_reach.astype(np.uint32)
            np.minimum(priorities[distance:], candidates, out=priorities[distance:])
    return priorities[np.cumsum(starts) - 1].reshape(random_bits.shape)
