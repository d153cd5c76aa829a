"""Random numbers by Philox, and the order of rows: each row once per epoch, for any ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_ds.data.philox import permutation, philox, random_bits, uniforms
from electra_ds.data.shuffle import ShuffledOrder, StreamOrder


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_equals_the_known_answers(counter, key, expected):
    """The known answers are those of Random123 (kat_vectors, philox4x32, 10 rounds)."""
    bits = philox(np.array(counter, np.uint64)[:, None], key)  # [1, 4]
    assert " ".join(f"{value:08x}" for value in bits[0]) == expected


def test_random_bits_of_a_row_do_not_depend_on_the_other_rows():
    whole = random_bits(7, np.array([0, 1, 2, 3]), np.array([5, 6, 7, 2**40]), 10, 2)
    for i, (epoch, row) in enumerate([(0, 5), (1, 6), (2, 7), (3, 2**40)]):
        assert np.array_equal(whole[i], random_bits(7, epoch, np.array([row]), 10, 2)[0])
        assert np.array_equal(whole[i, :3], random_bits(7, epoch, np.array([row]), 3, 2)[0])


def test_random_bits_depend_on_seed_epoch_row_and_purpose():
    base = (3, 1, 9, 2)
    seen = {
        tuple(random_bits(seed, epoch, np.array([row]), 4, purpose)[0])
        for seed, epoch, row, purpose in [
            base,
            (4, 1, 9, 2),
            (3 + 2**32, 1, 9, 2),
            (3, 2, 9, 2),
            (3, 1, 10, 2),
            (3, 1, 9 + 2**32, 2),
            (3, 1, 9, 3),
        ]
    }
    assert len(seen) == 7


def test_uniforms_are_below_one_and_uniformly_distributed():
    assert uniforms(np.array([2**32 - 1], np.uint32))[0] < 1
    values = uniforms(random_bits(0, 0, np.arange(1000), 100, 4))
    histogram = np.histogram(values, bins=20, range=(0, 1))[0]
    assert values.dtype == np.float32
    assert abs(histogram / 5000 - 1).max() < 0.06  # 5000 per bin, standard deviation 1.4 %


@given(n=st.integers(1, 2000), stream=st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_a_permutation_has_each_number_once(n, stream):
    assert np.array_equal(np.sort(permutation(n, 11, 0, stream, 1)), np.arange(n))


def test_permutations_are_uniformly_distributed():
    """All 24 permutations of 4 numbers are about equally frequent in 4800 draws."""
    counts = np.unique(
        [permutation(4, 0, 0, stream, 1) for stream in range(4800)], axis=0, return_counts=True
    )[1]
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7  # chi-square, 23 degrees of freedom, p = .001


@given(
    block_rows=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    window=st.integers(1, 10),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=40, deadline=None)
def test_each_row_occurs_once_per_epoch(block_rows, window, seed):
    order = ShuffledOrder(np.array(block_rows), seed, window)
    total = sum(block_rows)
    rows, epochs = order.rows(np.arange(3 * total))
    assert np.array_equal(epochs, np.repeat([0, 1, 2], total))
    for epoch in rows.reshape(3, total):
        assert np.array_equal(np.sort(epoch), np.arange(total))


@given(
    chunk_rows=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    batch=st.integers(1, 60),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=40, deadline=None)
def test_each_streamed_row_occurs_once_per_epoch(chunk_rows, batch, seed):
    order = StreamOrder(np.array(chunk_rows), seed, batch)
    total = sum(chunk_rows)
    assert order.lanes <= min(batch, total) and batch % order.lanes == 0
    rows, epochs = order.rows(
        np.arange(batch * (3 * -(-total // order.lanes) // order.lane_rows + 1))
    )
    for epoch in range(3):
        assert np.array_equal(np.sort(rows[epochs == epoch]), np.arange(total))
    for lane in epochs.reshape(-1, order.lanes, order.lane_rows).swapaxes(0, 1):
        assert (np.diff(lane.ravel()) >= 0).all()


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_world_size_and_any_restart_read_one_stream_of_lanes(data):
    chunk_rows = np.array(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=30)))
    batch = 24
    stream, epochs = StreamOrder(chunk_rows, 3, batch).rows(np.arange(10 * batch))
    for position in range(0, 10 * batch, batch):
        world = data.draw(st.sampled_from([1, 2, 3, 4, 6, 24]))
        slices = np.split(np.arange(position, position + batch), world)
        ranks = [StreamOrder(chunk_rows, 3, batch).rows(positions) for positions in slices]
        here = slice(position, position + batch)
        assert np.array_equal(np.concatenate(ranks, axis=1), [stream[here], epochs[here]])


@pytest.mark.parametrize("world", [1, 2, 8, 64, 5, 256])
def test_a_rank_reads_the_chunks_of_its_lanes(world):
    """In a step and in an epoch, with 100 chunks of 1000 rows, batches of 320 and 160 lanes."""
    batch = 320
    order = StreamOrder(np.full(100, 1000), 0, batch)
    assert order.lanes == 160
    rank_positions = np.arange(batch // world)
    chunks = np.stack(
        [order.rows(step * batch + rank_positions)[0] // 1000 for step in range(312)]
    )  # [steps, G / world]
    lanes = -(-160 // world)
    assert len(np.unique(chunks)) <= lanes * 0.625 + 2
    assert max(len(np.unique(step)) for step in chunks) <= lanes + 1


def test_the_order_depends_on_epoch_and_seed():
    block_rows = np.full(20, 16)
    first, second = ShuffledOrder(block_rows, 1, 4).rows(np.arange(640))[0].reshape(2, 320)
    assert (first == second).mean() < 0.05
    assert (first == ShuffledOrder(block_rows, 2, 4).rows(np.arange(320))[0]).mean() < 0.05


GOLDEN_ROWS = [10, 8, 9, 9, 10, 15, 8, 16]
GOLDEN_LANES = [3, 10, 15, 9, 7, 8, 16, 4]
GOLDEN_BITS = [3079650199, 1989135678, 867544247]


def test_version_1_does_not_change():
    """Golden values; a change breaks every resume and needs a new ORDER_VERSION."""
    rows, _ = ShuffledOrder(np.array([4, 4, 3, 4, 2]), 42, 2).rows(np.arange(14, 22))
    assert rows.tolist() == GOLDEN_ROWS
    assert random_bits(42, 1, np.array([5]), 3, 2)[0].tolist() == GOLDEN_BITS
    rows, _ = StreamOrder(np.array([4, 4, 3, 4, 2]), 42, 4).rows(np.arange(14, 22))
    assert rows.tolist() == GOLDEN_LANES


def test_a_position_late_in_a_large_corpus_is_computed_directly():
    """200 M rows; only the permuted blocks of the epoch and the touched windows are computed."""
    order = ShuffledOrder(np.full(781_250, 256), 0)
    position = 5 * order.total_rows + 123_456_789
    rows, epochs = order.rows(np.arange(position, position + 256))
    assert (epochs == 5).all() and len(set(rows.tolist())) == 256
    assert len(order._windows) <= 2
    order = StreamOrder(np.full(48_829, 4096), 0, 256)
    rows, epochs = order.rows(np.arange(5 * order.total_rows, 5 * order.total_rows + 256))
    assert (epochs == 5).all()
    assert len(set((rows // 4096).tolist())) > 250  # chunks
    assert len(order._windows) <= 256
