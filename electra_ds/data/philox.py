"""Random bits, uniform numbers and permutations as pure functions of (seed, epoch, row), by Philox.

Generator and permutation are implemented here because libraries may change the streams of their
generators. A change that alters a result must raise `shuffle.ORDER_VERSION`.

Dimensions: n numbers, B rows.
"""

from collections.abc import Sequence

import numpy as np

# "ELECTRA" in ASCII. Held-out rows are masked with this seed, so that every run and every
# checkpoint is evaluated on the same masked positions.
EVALUATION_SEED = 0x454C_4543_5452_41
# Purposes of random numbers: the low 8 bits of the counter's second word, so that no two uses
# share a number.
(
    BLOCKS,
    WINDOW,
    MASKED_POSITIONS,
    KEEP_ORIGINAL,
    UNIFORMS,
    CORRUPTION,
    EXAMPLES,
    MIXTURE,
) = range(8)
COUNTERS_PER_CALL = 4096  # computed in one call; the arrays stay in the processor's cache
LOW_32_BITS = np.uint64(0xFFFF_FFFF)


def philox(counter: Sequence[np.ndarray], key: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    counter: four uint64 arrays of 32-bit values that broadcast to one shape
    key:     64 bits; the low 32 bits are the first key word
    Returns [..., 4] uint32.
    """
    c0, c1, c2, c3 = counter
    for i in range(10):
        k0 = np.uint64((key + i * 0x9E3779B9) & 0xFFFF_FFFF)
        k1 = np.uint64(((key >> 32) + i * 0xBB67AE85) & 0xFFFF_FFFF)
        product0 = np.uint64(0xD2511F53) * c0
        product2 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product2 >> 32) ^ c1 ^ k0,
            product2 & LOW_32_BITS,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & LOW_32_BITS,
        )
    out = np.empty((*c0.shape, 4), np.uint32)
    for i, word in enumerate((c0, c1, c2, c3)):
        out[..., i] = word
    return out


def random_bits(
    seed: int, epochs: np.ndarray | int, rows: np.ndarray, n: int, purpose: int
) -> np.ndarray:
    """Return n random 32-bit values for each row, a pure function of (seed, epoch, row, purpose).

    seed:   0 <= seed < 2**64
    epochs: [B] or one number, below 2**24
    rows:   [B] row numbers, not negative
    n:      above 0
    Returns [B, n] uint32.
    """
    rows = np.asarray(rows).astype(np.uint64)
    stream = (np.broadcast_to(epochs, rows.shape).astype(np.uint64) << 8) | np.uint64(purpose)
    counter = np.stack([stream, rows & LOW_32_BITS, rows >> 32])[..., None]  # [3, B, 1]
    quads = np.arange(-(-n // 4), dtype=np.uint64)  # each counter gives four values
    bits = np.empty((len(rows), len(quads), 4), np.uint32)
    rows_per_call = max(1, COUNTERS_PER_CALL // len(quads))
    quads_per_call = min(COUNTERS_PER_CALL, len(quads))
    for row in range(0, len(rows), rows_per_call):
        row_slice = slice(row, row + rows_per_call)
        for quad in range(0, len(quads), quads_per_call):
            quad_slice = slice(quad, quad + quads_per_call)
            bits[row_slice, quad_slice] = philox((quads[quad_slice], *counter[:, row_slice]), seed)
    return bits.reshape(len(rows), -1)[:, :n]


def uniforms(bits: np.ndarray) -> np.ndarray:
    """Map uint32 values to float32 in [0, 1) by their upper 24 bits; the largest is 1 - 2**-24."""
    return (bits >> 8).astype(np.float32) * np.float32(2.0**-24)


def permutation(n: int, seed: int, epoch: int, stream: int, purpose: int) -> np.ndarray:
    """Return a random permutation of 0..n-1, [n] int64, a pure function of the arguments.

    Each number is stored in the low bits of a random 64-bit key, and the keys are sorted.

    stream: takes the place of the row number in `random_bits`
    """
    pairs = random_bits(seed, epoch, np.array([stream]), 2 * n, purpose)[0].view("<u8")
    low = np.uint64((1 << max(1, n - 1).bit_length()) - 1)
    keys = (pairs << 32 | pairs >> 32) & ~low  # the first value of a pair is the high half
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()  # all keys differ, so every sorting algorithm gives the same permutation
    return (keys & low).astype(np.int64)
