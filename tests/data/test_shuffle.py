"""ShuffledOrder: each row once per epoch, equal for any cut of the positions, at once from anywhere."""

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
def test_philox_gives_the_published_answers(counter, key, expected):
    """Known answers of Random123 (kat_vectors, philox4x32, 10 rounds)."""
    found = philox(np.array(counter, np.uint64)[:, None], key)  # [1, 4]
    assert " ".join(f"{word:08x}" for word in found[0]) == expected


def test_words_belong_to_the_row_alone():
    whole = random_bits(7, np.array([0, 1, 2, 3]), np.array([5, 6, 7, 2**40]), 10, 2)
    for i, (epoch, row) in enumerate([(0, 5), (1, 6), (2, 7), (3, 2**40)]):
        assert np.array_equal(whole[i], random_bits(7, epoch, np.array([row]), 10, 2)[0])
        assert np.array_equal(whole[i, :3], random_bits(7, epoch, np.array([row]), 3, 2)[0])


def test_words_differ_by_seed_epoch_row_and_purpose():
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


def test_uniforms_stay_below_one_and_spread():
    assert uniforms(np.array([2**32 - 1], np.uint32))[0] < 1
    values = uniforms(random_bits(0, 0, np.arange(1000), 100, 4))
    histogram = np.histogram(values, bins=20, range=(0, 1))[0]
    assert values.dtype == np.float32
    assert abs(histogram / 5000 - 1).max() < 0.06  # 5000 per bin, standard deviation 1.4 %


@given(n=st.integers(1, 2000), stream=st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_permutation_holds_each_number_once(n, stream):
    assert np.array_equal(np.sort(permutation(n, 11, 0, stream, 1)), np.arange(n))


def test_permutation_is_uniform():
    """All 24 orders of 4 things appear about equally often in 4800 draws."""
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
def test_each_row_comes_once_per_epoch(block_rows, window, seed):
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
def test_each_row_comes_once_per_epoch_in_lanes(chunk_rows, batch, seed):
    order, total = StreamOrder(np.array(chunk_rows), seed, batch), sum(chunk_rows)
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
def test_any_world_size_and_any_restart_see_one_stream_of_lanes(data):
    chunk_rows, batch = (
        np.array(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=30))),
        24,
    )
    stream, epochs = StreamOrder(chunk_rows, 3, batch).rows(np.arange(10 * batch))
    for position in range(0, 10 * batch, batch):
        world = data.draw(st.sampled_from([1, 2, 3, 4, 6, 24]))
        slices = np.split(np.arange(position, position + batch), world)
        found = [StreamOrder(chunk_rows, 3, batch).rows(own) for own in slices]
        here = slice(position, position + batch)
        assert np.array_equal(np.concatenate(found, axis=1), [stream[here], epochs[here]])


@pytest.mark.parametrize("world", [1, 2, 8, 64, 5, 256])
def test_a_rank_reads_the_chunks_of_its_lanes(world):
    """100 chunks of 1000 rows, batches of 320 in 160 lanes of 625 rows: what a rank reads at once, and in an epoch."""
    order, batch = StreamOrder(np.full(100, 1000), 0, 320), 320
    assert order.lanes == 160
    own = np.arange(batch // world)
    rows = np.stack(
        [order.rows(step * batch + own)[0] // 1000 for step in range(312)]
    )  # chunks [steps, G / world]
    lanes = -(-160 // world)
    assert len(np.unique(rows)) <= lanes * 0.625 + 2
    assert max(len(np.unique(step)) for step in rows) <= lanes + 1


def test_epochs_and_seeds_are_ordered_differently():
    block_rows = np.full(20, 16)
    first, second = ShuffledOrder(block_rows, 1, 4).rows(np.arange(640))[0].reshape(2, 320)
    assert (first == second).mean() < 0.05
    assert (first == ShuffledOrder(block_rows, 2, 4).rows(np.arange(320))[0]).mean() < 0.05


GOLDEN_ROWS = [10, 8, 9, 9, 10, 15, 8, 16]
GOLDEN_LANES = [3, 10, 15, 9, 7, 8, 16, 4]
GOLDEN_WORDS = [3079650199, 1989135678, 867544247]


def test_version_1_keeps_its_order():
    """Golden values: a change here breaks every resume, so it needs a new ORDER_VERSION."""
    rows, _ = ShuffledOrder(np.array([4, 4, 3, 4, 2]), 42, 2).rows(np.arange(14, 22))
    assert rows.tolist() == GOLDEN_ROWS
    assert random_bits(42, 1, np.array([5]), 3, 2)[0].tolist() == GOLDEN_WORDS
    rows, _ = StreamOrder(np.array([4, 4, 3, 4, 2]), 42, 4).rows(np.arange(14, 22))
    assert rows.tolist() == GOLDEN_LANES


def test_a_batch_far_in_a_large_corpus_needs_no_history():
    """200 M rows: only the epoch's order of blocks and one window are made."""
    order = ShuffledOrder(np.full(781_250, 256), 0)
    position = 5 * order.total_rows + 123_456_789
    rows, epochs = order.rows(np.arange(position, position + 256))
    assert (epochs == 5).all() and len(set(rows.tolist())) == 256
    assert len(order._windows) <= 2
    order = StreamOrder(np.full(48_829, 4096), 0, 256)
    rows, epochs = order.rows(np.arange(5 * order.total_rows, 5 * order.total_rows + 256))
    assert (epochs == 5).all() and len(
        set((rows // 4096).tolist())
    ) > 250  # rows from almost as many chunks
    assert len(order._windows) <= 256
