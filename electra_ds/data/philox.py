"""Which row is the n-th? Pure arithmetic on (seed, epoch, position), and the random words that belong to a row.

Raw Philox words and a shuffle of our own, since libraries do not promise the streams of their generators. Anything
here that changes an answer raises ORDER_VERSION. Letters: n positions or words, B rows.
"""

from collections.abc import Sequence

import numpy as np

EVALUATION_SEED = 0x454C_4543_5452_41  # "ELECTRA": held-out rows are masked alike for every run and every checkpoint
# What a word is for: the low 8 bits of the counter's second word, so that no two uses share a number.
BLOCKS, WINDOW, CHOSEN, KEEP, UNIFORMS, CORRUPTION, EXAMPLES, MIXTURE = range(8)
PIECE = 4096  # counters at a time: their words stay in the processor's cache
LOW32 = np.uint64(0xFFFF_FFFF)


def philox(counter: Sequence[np.ndarray], key: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    counter: four uint64 arrays of 32-bit values that broadcast to one shape; key: 64 bits, low word first.
    Returns [..., 4] uint32.
    """
    c0, c1, c2, c3 = counter
    for turn in range(10):
        k0 = np.uint64((key + turn * 0x9E3779B9) & 0xFFFF_FFFF)
        k1 = np.uint64(((key >> 32) + turn * 0xBB67AE85) & 0xFFFF_FFFF)
        left, right = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (right >> 32) ^ c1 ^ k0,
            right & LOW32,
            (left >> 32) ^ c3 ^ k1,
            left & LOW32,
        )
    out = np.empty((*c0.shape, 4), np.uint32)
    for i, part in enumerate((c0, c1, c2, c3)):
        out[..., i] = part
    return out


def random_bits(
    seed: int, epochs: np.ndarray | int, rows: np.ndarray, n: int, purpose: int
) -> np.ndarray:
    """n random words for each row, a pure function of (seed, epoch, row, purpose).

    seed: 0 <= seed < 2**64; epochs: [B] or one, below 2**24; rows: [B] non-negative. Returns [B, n] uint32.
    """
    rows = np.asarray(rows).astype(np.uint64)
    stream = (np.broadcast_to(epochs, rows.shape).astype(np.uint64) << 8) | np.uint64(purpose)
    counter = np.stack([stream, rows & LOW32, rows >> 32])[..., None]  # [3, B, 1]
    quads = np.arange(-(-n // 4), dtype=np.uint64)
    found = np.empty((len(rows), len(quads), 4), np.uint32)
    high, wide = max(1, PIECE // len(quads)), min(PIECE, len(quads))
    for row in range(0, len(rows), high):
        for quad in range(0, len(quads), wide):
            here = slice(row, row + high), slice(quad, quad + wide)
            found[here] = philox((quads[here[1]], *counter[:, here[0]]), seed)
    return found.reshape(len(rows), -1)[:, :n]


def uniforms(bits: np.ndarray) -> np.ndarray:
    """uint32 words -> float32 in [0, 1): the upper 24 bits, so that the largest is 1 - 2**-24."""
    return (bits >> 8).astype(np.float32) * np.float32(2.0**-24)


def permutation(n: int, seed: int, epoch: int, stream: int, purpose: int) -> np.ndarray:
    """A random order of 0..n-1, [n] int64: numbers sorted by random keys that carry them in their low bits."""
    pairs = random_bits(seed, epoch, np.array([stream]), 2 * n, purpose)[0].view("<u8")
    low = np.uint64((1 << max(1, n - 1).bit_length()) - 1)
    keys = (pairs << 32 | pairs >> 32) & ~low  # the first word of a pair is the high one
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()  # all keys differ, so every sorting method gives this order
    return (keys & low).astype(np.int64)
