"""Selection of the masked positions of packed rows.

Letters: B rows, S sequence, K masked positions, V vocabulary.
"""

from typing import NamedTuple

import numpy as np

from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.schema import ObjectiveConfig
from electra_ds.data.shard_format import Manifest

COLUMN_BITS = np.uint64(24)  # of a sorting key; 32 random bits lie above them
SPAN_WORDS = 10  # at most (SpanBERT, section 3.1)
# Words of a span by 12 random bits, the inverse of 1 - .8 ** length: geometric with p = .2, 3.8 on average.
SPAN_LENGTHS = (1 + np.log1p(np.arange(4096) / -4096 * (1 - 0.8**SPAN_WORDS)) / np.log(0.8)).astype(
    np.uint8
)


class Recipe(NamedTuple):
    """What turns a row into a batch row beside its ids: the data's facts, the objective's masking, the seed."""

    packing: str  # best_fit, concat or google
    special_ids: SpecialIds
    mask_prob: float
    mask_token_prob: float  # of a masked position to become [MASK]
    seed: int  # the key
    masking: str = "token"  # or whole_word, span
    begins_word: np.ndarray | None = None  # [V] bool, the tokenizer's; not needed to draw tokens


def max_masked(mask_prob: float, sequence_length: int) -> int:
    """K, the masked positions that a row has room for: 19 (S = 128, .15), 79 (512, .15), 130 (512, .25)."""
    return max(1, min(sequence_length, int((mask_prob + 0.005) * sequence_length)))


def select_masked_positions(
    ids: np.ndarray, recipe: Recipe, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Exactly k distinct places per row, k = min(candidates, max(1, min(K, round(mask_prob * real tokens)))).

    ids: [B, S]; numbers: [B, S] uint32, random. Candidates are the real tokens but [CLS], [SEP], [MASK]; the k with
    the smallest numbers are chosen. With masking whole_word or span, a token takes the number of its word or span:
    these are drawn in random order, and the last one is cut where the k-th place is reached.
    Returns chosen [B, K] int64, ascending, 0 where unused, and used [B, K] bool.
    """
    n, special = ids.shape[1], recipe.special_ids
    slots = max_masked(recipe.mask_prob, n)
    barred = np.isin(ids, (special.pad, special.cls, special.sep, special.mask))
    if recipe.masking != "token":
        numbers = word_priorities(
            numbers, recipe.begins_word[ids], barred, recipe.masking == "span"
        )
    wanted = np.rint(recipe.mask_prob * (ids != special.pad).sum(1))  # halves to even
    k = np.minimum((~barred).sum(1), np.clip(wanted, 1, slots))
    keys = (numbers.astype(np.uint64) << COLUMN_BITS) | np.arange(n, dtype=np.uint64)
    keys |= barred.astype(np.uint64) << np.uint64(63)
    smallest = np.sort(np.partition(keys, slots - 1, axis=1)[:, :slots], axis=1)
    used = np.arange(slots) < k[:, None]
    columns = (smallest & np.uint64((1 << int(COLUMN_BITS)) - 1)).astype(np.int64)
    return np.sort(np.where(used, columns, n), axis=1) * used, used


def word_priorities(
    numbers: np.ndarray, begins: np.ndarray, barred: np.ndarray, spans: bool
) -> np.ndarray:
    """The random number of each token's word, which is that of the word's first token; [B, S] uint32.

    numbers: [B, S] uint32; begins: [B, S] bool, by spelling; barred: [B, S] bool, no candidates: no word goes past.
    spans: each word also starts a span of 1 to 10 words, cut before what is barred, and a word takes the smallest
    number of the spans that cover it: that of the first one drawn, starts being drawn uniformly, each once.
    """
    edges = barred.copy()
    edges[:, 1:] |= barred[:, :-1]
    edges[:, 0] = True
    starts = (begins | edges).ravel()
    own = numbers.ravel()[starts]  # [words of all rows]
    drawn = own.copy()
    if spans:
        lengths = SPAN_LENGTHS[own & 4095]  # the order is that of the upper bits, but for ties
        pieces = np.cumsum(edges, dtype=np.int32)[starts]
        for d in range(1, SPAN_WORDS):
            beyond = (lengths[:-d] <= d) | (pieces[:-d] != pieces[d:])
            np.minimum(
                drawn[d:], own[:-d] | -beyond.astype(np.uint32), out=drawn[d:]
            )  # all ones: never the smallest
    return drawn[np.cumsum(starts) - 1].reshape(numbers.shape)


def recipe_for(
    manifest: Manifest, objective: ObjectiveConfig, seed: int, begins_word: np.ndarray | None = None
) -> Recipe:
    """The recipe of a run on these rows."""
    return Recipe(
        manifest.packing,
        manifest.tokenizer.special_ids,
        objective.mask_prob,
        objective.mask_token_prob,
        seed,
        objective.masking,
        begins_word,
    )
