"""The loader: layout of rows, masked positions, one stream for any ranks and restarts, errors."""

import tempfile
from pathlib import Path
from typing import NamedTuple
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
    shards = [best_fit_rows(90, 32), best_fit_rows(41, 32, 1)]
    return ShardReader(write_data(tmp_path_factory.mktemp("data"), shards), "train")


def order_of(reader, seed=7):
    return ShuffledOrder(reader.blocks["rows"], seed)


def loader_of(reader, **options):
    return Loader(reader, order_of(reader), **options)


def take(loader, steps):
    """The next steps of a loader, which is then closed."""
    batches = [next(loader) for _ in range(steps)]
    loader.close()
    return batches


def joined(steps, field):
    """One field of all micro-batches of the steps, [rows, ...]."""
    return torch.cat([getattr(micro, field) for step in steps for micro in step.micro_batches])


def test_the_most_masked_positions_are_those_of_the_authors_code():
    sizes = [(0.15, 128), (0.15, 512), (0.25, 512)]
    assert [max_masked_positions(p, length) for p, length in sizes] == [19, 79, 130]
    assert max_masked_positions(0.01, 16) == 1


def test_documents_of_best_fit_rows_begin_at_each_cls():
    ids = np.array([[2, 9, 9, 3, 2, 9, 3, 0]])
    segments, documents, positions = row_layout(ids, "best_fit", SPECIAL)
    assert segments.tolist() == [[0] * 8]
    assert documents.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]


def test_a_concat_row_is_one_document():
    segments, documents, positions = row_layout(
        np.array([[2, 9, 3, 9, 3, 9, 0, 0]]), "concat", SPECIAL
    )
    assert segments.tolist() == [[0] * 8]
    assert documents.tolist() == [[1] * 6 + [0] * 2]
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 0]]


def test_a_google_row_has_a_second_segment_after_the_first_sep():
    segments, documents, positions = row_layout(
        np.array([[2, 9, 9, 3, 9, 9, 3, 0], [2, 9, 9, 9, 9, 9, 3, 0]]), "google", SPECIAL
    )
    assert segments.tolist() == [[0, 0, 0, 0, 1, 1, 1, 0], [0] * 8]
    assert documents.tolist() == [[1] * 7 + [0]] * 2
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0]] * 2


@pytest.mark.parametrize("mask_prob", [0.05, 0.15, 0.25, 0.9])
def test_exactly_k_distinct_candidates_are_selected(mask_prob):
    ids = best_fit_rows(200, 64).astype(np.int64)
    ids[:10, 5:] = SPECIAL.pad  # short rows
    ids[10] = SPECIAL.pad
    ids[10, :2] = SPECIAL.cls, SPECIAL.sep  # no candidates
    bits = np.random.default_rng(0).integers(0, 2**32, ids.shape, np.uint32)
    selected, used = select_masked_positions(ids, RECIPE._replace(mask_prob=mask_prob), bits)
    most = max_masked_positions(mask_prob, 64)
    for row, positions, is_used in zip(ids, selected, used, strict=True):
        special = [SPECIAL.pad, SPECIAL.cls, SPECIAL.sep, SPECIAL.mask]
        candidates = np.flatnonzero(~np.isin(row, special))
        real = (row != SPECIAL.pad).sum()
        k = min(len(candidates), max(1, min(most, round(mask_prob * real))))
        assert is_used[:k].all()
        assert not is_used[k:].any()
        assert np.isin(positions[:k], candidates).all()
        assert (np.diff(positions[:k]) > 0).all()
        assert (positions[k:] == 0).all()


def test_each_candidate_is_selected_equally_often():
    ids = np.tile(np.r_[2, np.full(18, 9), 3], (20_000, 1))
    bits = np.random.default_rng(1).integers(0, 2**32, ids.shape, np.uint32)
    positions, used = select_masked_positions(ids, RECIPE, bits)  # 3 of 18
    share = np.bincount(positions[used], minlength=20) / 20_000
    assert share[0] == share[19] == 0
    assert abs(share[1:19] - 3 / 18).max() < 0.012  # standard deviation .0026


def test_keep_original_and_uniforms_have_their_distributions():
    ids = best_fit_rows(4000, 32)
    batch = make_batch(ids, np.arange(4000), 0, RECIPE)
    assert abs(batch.keep_original.float().mean() - 0.15) < 0.01
    assert batch.uniforms.dtype == torch.float32
    assert abs(batch.uniforms.mean() - 0.5) < 0.01
    assert batch.uniforms.min() >= 0 and batch.uniforms.max() < 1
    # the two are independent
    assert abs(batch.uniforms[batch.keep_original].mean() - 0.5) < 0.02
    all_masked = RECIPE._replace(mask_token_prob=1.0)
    assert not make_batch(ids[:50], np.arange(50), 0, all_masked).keep_original.any()


def test_the_masking_of_a_row_does_not_depend_on_the_other_rows():
    ids = best_fit_rows(20, 32)
    whole = make_batch(ids, np.arange(20), 3, RECIPE)
    part = make_batch(ids[7:9], np.array([7, 8]), np.array([3, 3]), RECIPE)
    for of_whole, of_part in zip(whole[:8], part[:8], strict=True):
        assert torch.equal(of_whole[7:9], of_part)
    other = make_batch(ids, np.arange(20), 4, RECIPE)
    assert not torch.equal(whole.masked_positions, other.masked_positions)
    assert not torch.equal(whole.uniforms, other.uniforms)


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


class Start(NamedTuple):
    """A start of a run, and the steps until the next one."""

    world_size: int
    micro_batch_size: int
    steps: int


class Run(NamedTuple):
    """Sizes of a run that is restarted."""

    shard_rows: list[int]
    block_rows: int
    window: int
    global_batch_size: int
    starts: list[Start]


@st.composite
def runs(draw):
    shard_rows = draw(st.lists(st.integers(1, 25), min_size=1, max_size=3))
    batch = draw(st.sampled_from([1, 2, 4, 6, 12]))
    starts, remaining_steps = [], -(-3 * sum(shard_rows) // batch)
    while remaining_steps:
        world = draw(st.sampled_from(divisors(batch)))
        steps = draw(st.integers(min(remaining_steps, 3), remaining_steps))
        starts.append(Start(world, draw(st.sampled_from(divisors(batch // world))), steps))
        remaining_steps -= steps
    return Run(
        shard_rows, draw(st.sampled_from([1, 4, 16])), draw(st.integers(1, 5)), batch, starts
    )


FEWER_SHARDS_THAN_RANKS = Run([20], 16, 2, 12, [Start(4, 1, 2), Start(12, 1, 3)])
ONE_ROW_MORE_THAN_A_BATCH = Run([13], 4, 2, 12, [Start(2, 3, 1), Start(3, 2, 3)])
A_SINGLE_ROW = Run([1], 16, 1, 4, [Start(2, 2, 1)])


@given(run=runs(), read_tokens=st.sampled_from([1, 500, 1 << 18]))
@example(run=FEWER_SHARDS_THAN_RANKS, read_tokens=1 << 18)
@example(run=ONE_ROW_MORE_THAN_A_BATCH, read_tokens=1)
@example(run=A_SINGLE_ROW, read_tokens=500)
@settings(max_examples=25, deadline=None)
def test_any_ranks_and_restarts_read_one_stream_with_each_row_once_per_epoch(run, read_tokens):
    total, batch = sum(run.shard_rows), run.global_batch_size
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(loader, "READ_TOKENS", read_tokens),
    ):
        rows = [best_fit_rows(n, 32, seed) for seed, n in enumerate(run.shard_rows)]
        reader = ShardReader(write_data(Path(folder), rows, run.block_rows), "train")

        def steps_of(steps, **options):
            order = ShuffledOrder(reader.blocks["rows"], 7, run.window)
            return take(Loader(reader, order, RECIPE, global_batch_size=batch, **options), steps)

        stream = steps_of(sum(start.steps for start in run.starts), micro_batch_size=batch)
        numbers = np.concatenate([step.rows for step in stream])
        assert (np.sort(numbers[: 3 * total].reshape(3, total)) == np.arange(total)).all()
        assert np.array_equal(np.concatenate(rows)[numbers], joined(stream, "input_ids").numpy())
        step = 0
        for world, micro, steps in run.starts:
            options = {
                "world_size": world,
                "micro_batch_size": micro,
                "consumed_rows": step * batch,
            }
            ranks = [steps_of(steps, rank=rank, **options) for rank in range(world)]
            for expected, *of_ranks in zip(stream[step : step + steps], *ranks, strict=True):
                assert expected.first_row == step * batch
                check_ranks(of_ranks, expected, range(0, batch, micro))
                step += 1


def check_ranks(of_ranks, expected, micro_starts):
    """Compare one step of all ranks with that of a single rank."""
    assert {part.first_row for part in of_ranks} == {expected.first_row}
    assert sum(part.masked_count for part in of_ranks) == expected.masked_count
    assert sum(part.token_count for part in of_ranks) == expected.token_count
    first_rows = [first for part in of_ranks for first in part.first_rows]
    assert first_rows == [expected.first_row + start for start in micro_starts]
    for field in expected.micro_batches[0]._fields[:8]:
        assert torch.equal(joined(of_ranks, field), joined([expected], field)), field


def test_the_counts_of_a_step_are_those_of_its_tensors(reader):
    for step in take(loader_of(reader, **RUN), 3):
        assert step.masked_count == joined([step], "masked_weights").sum()
        assert step.token_count == (joined([step], "document_ids") > 0).sum()
        assert np.array_equal(reader.read(step.rows), joined([step], "input_ids").numpy())


def test_an_error_in_the_thread_is_raised_by_next(reader, monkeypatch):
    def damaged(rows):
        raise UserError("shard 3, block 4")

    monkeypatch.setattr(reader, "read", damaged)
    loader = loader_of(reader, **RUN)
    for _ in range(2):
        with pytest.raises(UserError, match="shard 3, block 4"):
            next(loader)
    loader.close()


def test_close_stops_a_thread_that_waits(reader):
    loader = loader_of(reader, **RUN)
    next(loader)
    loader.close()
    assert not loader._thread.is_alive()


def test_a_state_of_other_data_is_refused(reader):
    loader = loader_of(reader, **RUN)
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
def test_evaluation_yields_each_row_once_with_the_same_masking(reader, world, max_rows):
    total = 131 if max_rows is None else max_rows
    # of the run; held-out rows are masked by a constant recipe
    recipe = RECIPE._replace(seed=8, masking="whole_word")
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


def test_fixed_corruption_draws_unigrams_at_the_masked_positions(reader):
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
