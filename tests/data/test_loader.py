"""Batches: exactly k places, the row_layout of each packing, one stream for any cut, errors that reach the caller."""

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shard_data import SPECIAL, best_fit_rows, write_data

from electra_ds.common.errors import UserError
from electra_ds.data import loader
from electra_ds.data.batch import fixed_corruption, make_batch, row_layout
from electra_ds.data.loader import Loader, consumed_rows_from_state, evaluation_batches
from electra_ds.data.masking import MaskingRecipe, max_masked_positions, select_masked_positions
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.shuffle import ShuffledOrder

VOCAB = 600
RECIPE = MaskingRecipe("best_fit", SPECIAL, 0.15, 0.85, 7)
RUN = {"recipe": RECIPE, "global_batch_size": 12, "micro_batch_size": 2}


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return ShardReader(
        write_data(
            tmp_path_factory.mktemp("data"), [best_fit_rows(90, 32), best_fit_rows(41, 32, 1)]
        ),
        "train",
    )


def order_of(reader, seed=7):
    return ShuffledOrder(reader.blocks["rows"], seed)


def batches_of(reader, **options):
    return Loader(reader, order_of(reader), **options)


def take(loader, steps):
    found = [next(loader) for _ in range(steps)]
    loader.close()
    return found


def joined(steps, field):
    """One field of all micro-batches of all steps, [rows, ...]."""
    return torch.cat([getattr(micro, field) for step in steps for micro in step.micro_batches])


def test_room_for_chosen_places_is_that_of_the_authors():
    assert [max_masked_positions(p, s) for p, s in [(0.15, 128), (0.15, 512), (0.25, 512)]] == [
        19,
        79,
        130,
    ]
    assert max_masked_positions(0.01, 16) == 1


def test_best_fit_layout_restarts_at_each_cls():
    ids = np.array([[2, 9, 9, 3, 2, 9, 3, 0]])
    segments, pieces, positions = row_layout(ids, "best_fit", SPECIAL)
    assert segments.tolist() == [[0] * 8]
    assert pieces.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]


def test_concat_layout_is_one_piece():
    segments, pieces, positions = row_layout(
        np.array([[2, 9, 3, 9, 3, 9, 0, 0]]), "concat", SPECIAL
    )
    assert segments.tolist() == [[0] * 8]
    assert pieces.tolist() == [[1] * 6 + [0] * 2]
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 0]]


def test_google_layout_has_a_second_segment_after_the_first_sep():
    segments, pieces, positions = row_layout(
        np.array([[2, 9, 9, 3, 9, 9, 3, 0], [2, 9, 9, 9, 9, 9, 3, 0]]), "google", SPECIAL
    )
    assert segments.tolist() == [[0, 0, 0, 0, 1, 1, 1, 0], [0] * 8]
    assert pieces.tolist() == [[1] * 7 + [0]] * 2
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0]] * 2


@pytest.mark.parametrize("mask_prob", [0.05, 0.15, 0.25, 0.9])
def test_exactly_k_distinct_candidates_are_chosen(mask_prob):
    ids = best_fit_rows(200, 64).astype(np.int64)
    ids[:10, 5:] = SPECIAL.pad  # short rows
    ids[10] = SPECIAL.pad
    ids[10, :2] = SPECIAL.cls, SPECIAL.sep  # no candidates
    words = np.random.default_rng(0).integers(0, 2**32, ids.shape, np.uint32)
    chosen, used = select_masked_positions(ids, RECIPE._replace(mask_prob=mask_prob), words)
    for row, places, weights in zip(ids, chosen, used, strict=True):
        candidates = np.flatnonzero(
            ~np.isin(row, [SPECIAL.pad, SPECIAL.cls, SPECIAL.sep, SPECIAL.mask])
        )
        real = (row != SPECIAL.pad).sum()
        k = min(
            len(candidates),
            max(1, min(max_masked_positions(mask_prob, 64), round(mask_prob * real))),
        )
        assert weights.sum() == k == len(set(places[weights])) and set(places[weights]) <= set(
            candidates
        )
        assert weights[:k].all() and (places[k:] == 0).all() and (np.diff(places[:k]) > 0).all()


def test_each_candidate_is_chosen_equally_often():
    ids = np.tile(np.r_[2, np.full(18, 9), 3], (20_000, 1))
    words = np.random.default_rng(1).integers(0, 2**32, ids.shape, np.uint32)
    chosen, used = select_masked_positions(ids, RECIPE, words)  # 3 of 18
    share = np.bincount(chosen[used], minlength=20) / 20_000
    assert share[0] == share[19] == 0
    assert abs(share[1:19] - 3 / 18).max() < 0.012  # standard deviation .0026


def test_keep_and_uniforms_have_their_shares():
    ids = best_fit_rows(4000, 32)
    batch = make_batch(ids, np.arange(4000), 0, RECIPE)
    assert abs(batch.keep_original.float().mean() - 0.15) < 0.01
    assert abs(batch.uniforms.mean() - 0.5) < 0.01 and batch.uniforms.dtype == torch.float32
    assert batch.uniforms.min() >= 0 and batch.uniforms.max() < 1
    assert (
        abs(batch.uniforms[batch.keep_original].mean() - 0.5) < 0.02
    )  # the draw does not depend on the coin
    assert (
        make_batch(ids[:50], np.arange(50), 0, RECIPE._replace(mask_token_prob=1.0))
        .keep_original.any()
        .item()
        is False
    )


def test_a_row_is_masked_the_same_in_any_company():
    ids = best_fit_rows(20, 32)
    whole = make_batch(ids, np.arange(20), 3, RECIPE)
    part = make_batch(ids[7:9], np.array([7, 8]), np.array([3, 3]), RECIPE)
    for of_whole, of_part in zip(whole[:8], part[:8], strict=True):
        assert torch.equal(of_whole[7:9], of_part)
    other = make_batch(ids, np.arange(20), 4, RECIPE)
    assert not torch.equal(whole.masked_positions, other.masked_positions) and not torch.equal(
        whole.uniforms, other.uniforms
    )


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def runs(draw):
    """Rows of each shard, of a block; blocks of a window; global batch; (world, micro, steps) of each start."""
    shards = draw(st.lists(st.integers(1, 25), min_size=1, max_size=3))
    batch = draw(st.sampled_from([1, 2, 4, 6, 12]))
    starts, left = [], -(-3 * sum(shards) // batch)
    while left:
        world = draw(st.sampled_from(divisors(batch)))
        steps = draw(st.integers(min(left, 3), left))
        starts.append((world, draw(st.sampled_from(divisors(batch // world))), steps))
        left -= steps
    return shards, draw(st.sampled_from([1, 4, 16])), draw(st.integers(1, 5)), batch, starts


@given(run=runs(), read_tokens=st.sampled_from([1, 500, 1 << 18]))
@example(
    run=([20], 16, 2, 12, [(4, 1, 2), (12, 1, 3)]), read_tokens=1 << 18
)  # fewer shards than ranks
@example(run=([13], 4, 2, 12, [(2, 3, 1), (3, 2, 3)]), read_tokens=1)  # one row more than a batch
@example(run=([1], 16, 1, 4, [(2, 2, 1)]), read_tokens=500)  # a single row
@settings(max_examples=25, deadline=None)
def test_each_row_comes_once_per_epoch_in_one_stream_whatever_the_ranks_and_restarts(
    run, read_tokens
):
    shards, block_rows, window, batch, starts = run
    total = sum(shards)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(loader, "READ_TOKENS", read_tokens),
    ):
        rows = [best_fit_rows(n, 32, seed) for seed, n in enumerate(shards)]
        reader = ShardReader(write_data(Path(folder), rows, block_rows), "train")
        order = ShuffledOrder(reader.blocks["rows"], 7, window)
        options = {"recipe": RECIPE, "global_batch_size": batch}
        whole = take(
            Loader(reader, order, **options, micro_batch_size=batch),
            sum(steps for *_, steps in starts),
        )
        seen, position = np.concatenate([step.rows for step in whole]), 0
        assert (np.sort(seen[: 3 * total].reshape(3, total)) == np.arange(total)).all()
        assert np.array_equal(np.concatenate(rows)[seen], joined(whole, "input_ids").numpy())
        for world, micro, steps in starts:
            ranks = []
            for rank in range(world):
                place = {
                    "rank": rank,
                    "world_size": world,
                    "micro_batch_size": micro,
                    "consumed_rows": position * batch,
                }
                ranks.append(
                    take(
                        Loader(
                            reader,
                            ShuffledOrder(reader.blocks["rows"], 7, window),
                            **options,
                            **place,
                        ),
                        steps,
                    )
                )
            for expected, *found in zip(whole[position : position + steps], *ranks, strict=True):
                assert {f.first_row for f in found} == {expected.first_row} == {position * batch}
                assert sum(f.masked_count for f in found) == expected.masked_count
                assert sum(f.token_count for f in found) == expected.token_count
                firsts = [expected.first_row + first for first in range(0, batch, micro)]
                assert [first for f in found for first in f.first_rows] == firsts
                for field in expected.micro_batches[0]._fields[:8]:
                    assert torch.equal(joined(found, field), joined([expected], field)), field
                position += 1


def test_counts_are_those_of_the_tensors(reader):
    for step in take(batches_of(reader, **RUN), 3):
        assert step.masked_count == joined([step], "masked_weights").sum()
        assert step.token_count == (joined([step], "document_ids") > 0).sum()
        assert np.array_equal(reader.read(step.rows), joined([step], "input_ids").numpy())


def test_an_error_in_the_thread_reaches_the_caller(reader, monkeypatch):
    def damaged(rows):
        raise UserError("shard 3, block 4")

    monkeypatch.setattr(reader, "read", damaged)
    loader = batches_of(reader, **RUN)
    for _ in range(2):
        with pytest.raises(UserError, match="shard 3, block 4"):
            next(loader)
    loader.close()


def test_closing_ends_the_thread_while_it_waits(reader):
    loader = batches_of(reader, **RUN)
    next(loader)
    loader.close()
    assert not loader._thread.is_alive()


def test_state_is_small_plain_and_refused_for_other_data(reader):
    loader = batches_of(reader, **RUN)
    state = loader.state(240)
    loader.close()
    assert set(state) == {"kind", "version", "dataset_id", "position", "seed", "window"}
    assert consumed_rows_from_state(state, reader, order_of(reader)) == 240
    with pytest.raises(UserError, match="seed: checkpoint 7, now 8"):
        consumed_rows_from_state(state, reader, order_of(reader, 8))
    with pytest.raises(UserError, match="dataset_id: checkpoint 'other'"):
        consumed_rows_from_state(state | {"dataset_id": "other"}, reader, order_of(reader))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("max_rows", [None, 50, 1])
def test_evaluation_sees_each_row_once_and_alike(reader, world, max_rows):
    total = 131 if max_rows is None else max_rows
    recipe = RECIPE._replace(
        seed=8, masking="whole_word"
    )  # a run's own; held-out rows are masked alike for all
    ranks = [
        list(
            evaluation_batches(
                reader, recipe, batch_rows=8, rank=r, world_size=world, max_rows=max_rows
            )
        )
        for r in range(world)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    pairs = [pair for rank in ranks for pair in rank]
    rows = np.concatenate([rows for _, rows in pairs])
    assert sorted(rows[rows >= 0]) == list(range(total))
    alone = make_batch(
        reader.read(np.arange(total)), np.arange(total), 0, RECIPE._replace(seed=0x454C4543545241)
    )
    for batch, numbers in pairs:
        real = torch.from_numpy(numbers >= 0)
        assert torch.equal(
            batch.masked_positions[real], alone.masked_positions[numbers[numbers >= 0]]
        )
        assert (batch.input_ids[~real] == SPECIAL.pad).all()
        assert not batch.document_ids[~real].any() and not batch.masked_weights[~real].any()


def test_fixed_corruption_draws_unigrams_at_the_chosen_places(reader):
    unigrams = np.zeros(VOCAB, np.int64)
    unigrams[[0, 2, 3, 4]] = 1000  # never drawn
    unigrams[[10, 20]] = 300, 100
    drawn = []
    for batch, rows in evaluation_batches(reader, RECIPE, batch_rows=16):
        corrupted, replaced = fixed_corruption(batch, rows, unigrams, SPECIAL)
        used = batch.masked_weights > 0
        drawn.append(corrupted.gather(1, batch.masked_positions)[used])
        elsewhere = torch.ones_like(corrupted, dtype=torch.bool)
        elsewhere[torch.nonzero(used)[:, 0], batch.masked_positions[used]] = False
        assert torch.equal(corrupted[elsewhere], batch.input_ids[elsewhere])
        assert torch.equal(replaced, corrupted != batch.input_ids)
        half = fixed_corruption(batch.map(lambda t: t[4:9]), rows[4:9], unigrams, SPECIAL)[0]
        assert torch.equal(half, corrupted[4:9])
    values, counts = torch.cat(drawn).unique(return_counts=True)
    assert values.tolist() == [10, 20]
    assert abs(counts[0] / counts.sum() - 0.75) < 0.08
