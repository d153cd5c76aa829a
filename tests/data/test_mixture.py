"""Mixtures: exact shares, order of each source, one stream for any ranks, metrics by source."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_data import SPECIAL, best_fit_rows, write_data

from electra_ds.common.errors import UserError
from electra_ds.config.loading import load_run
from electra_ds.data.dataset import open_data
from electra_ds.data.loader import Loader, consumed_rows_from_state
from electra_ds.data.masking import MaskingRecipe
from electra_ds.data.mixture import WINDOW, MixtureConfig, MixtureOrder, rows_per_window
from electra_ds.data.shuffle import ShuffledOrder
from electra_ds.model.objective import ElectraObjective
from electra_ds.reporting.check import check
from electra_ds.training.held_out import evaluate_sources

HEALTH = Path(__file__).resolve().parents[2] / "launch" / "health.sh"
RECIPE = MaskingRecipe("best_fit", SPECIAL, 0.15, 0.85, 7)
RUN = {"recipe": RECIPE, "global_batch_size": 12, "micro_batch_size": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Data folders: de, ja, en (without held-out rows), and odd with rows of another length."""
    base = tmp_path_factory.mktemp("folders")
    for seed, (name, rows, valid, length) in enumerate(
        [("de", 90, 20, 32), ("ja", 41, 33, 32), ("en", 60, 0, 32), ("odd", 20, 0, 16)]
    ):
        held_out = best_fit_rows(valid, length, 50 + seed) if valid else None
        (base / name).mkdir()
        write_data(base / name, [best_fit_rows(rows, length, seed)], valid=held_out)
    return base


def mixture(folders, content, name="mixture.json"):
    """Write a mixture into the folder of its sources."""
    path = folders / name
    path.write_text(json.dumps(content))
    return path


def weighted(**weights):
    return [{"data": name, "weight": weight} for name, weight in weights.items()]


# -------------------------------------------------------------------------------------------- order

SIZES = st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 100)), min_size=1, max_size=6)


def order_of(sizes, seed=3, window=50):
    """The order of a mixture of sources with these (rows, weight), in blocks of 4 rows."""
    rows = np.array([rows for rows, _ in sizes])
    weights = np.array([weight for _, weight in sizes])
    orders = {
        f"s{i}": ShuffledOrder(np.diff(np.r_[np.arange(0, n, 4), n]), seed, 2)
        for i, n in enumerate(rows)
    }
    return MixtureOrder(
        orders, rows_per_window(weights / weights.sum(), window), np.cumsum(rows) - rows, seed
    )


@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), window=st.integers(40, 500))
@settings(deadline=None)
def test_the_rows_of_a_window_are_within_one_of_the_weights(weights, window):
    exact = np.array(weights) / sum(weights)
    counts = rows_per_window(exact, window)
    assert counts.sum() == window and counts.min() >= 1
    if (exact * window >= 1).all():
        assert abs(counts - exact * window).max() < 1


@given(sizes=SIZES, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_shares_are_exact_in_every_window_and_close_at_every_position(sizes, seed):
    order = order_of(sizes, seed)
    sources = np.searchsorted(order.starts, order.rows(np.arange(150))[0], side="right") - 1
    is_source = sources[:, None] == np.arange(len(sizes))
    counts = np.cumsum(is_source, axis=0)  # [150, S] up to each position
    assert np.array_equal(counts[[49, 99, 149]], np.outer([1, 2, 3], order.counts))
    share = order.counts / 50
    difference = abs(counts - np.arange(1, 151)[:, None] * share)
    assert (difference <= 1 + share * (len(sizes) - 2) + 1e-9).all()


@given(sizes=SIZES)
@settings(max_examples=40, deadline=None)
def test_the_rows_of_each_source_keep_the_order_of_the_source(sizes):
    order = order_of(sizes)
    rows, epochs = order.rows(np.arange(600))
    for (total, _), start, source in zip(sizes, order.starts, order.orders.values(), strict=True):
        here = (rows >= start) & (rows < start + total)
        expected_rows, expected_epochs = source.rows(np.arange(here.sum()))
        assert np.array_equal(rows[here] - start, expected_rows)
        assert np.array_equal(epochs[here], expected_epochs)
        for epoch in range(here.sum() // total):
            of_epoch = rows[here][epochs[here] == epoch]
            assert np.array_equal(np.sort(of_epoch), start + np.arange(total))


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_world_size_and_any_restart_read_one_stream(data):
    sizes = data.draw(SIZES)
    stream = np.stack(order_of(sizes).rows(np.arange(240)))
    position, order = 0, order_of(sizes)
    while position < 240:
        world = data.draw(st.sampled_from([1, 2, 3, 4]))
        each = 12 // world
        if data.draw(st.booleans()):  # a restart, without cached windows
            order = order_of(sizes)
        ranks = [
            np.stack(order.rows(position + rank * each + np.arange(each))) for rank in range(world)
        ]
        assert np.array_equal(np.concatenate(ranks, axis=1), stream[:, position : position + 12])
        position += 12


def test_the_order_depends_on_seed_and_window():
    sizes = [(60, 1.0), (60, 1.0)]
    first, second = (order_of(sizes).rows(np.arange(500))[0] < 60).reshape(2, 250)
    other = order_of(sizes, seed=4).rows(np.arange(250))[0] < 60
    assert 0.2 < (first == second).mean() < 0.8 and 0.2 < (first == other).mean() < 0.8


def test_version_1_does_not_change():
    """Golden values; a change breaks every resume and needs a new VERSION."""
    rows, epochs = order_of([(9, 1.0), (5, 2.0), (3, 0.5)]).rows(np.arange(95, 107))
    assert rows.tolist() == [13, 11, 8, 14, 12, 0, 10, 9, 12, 11, 1, 16]
    assert epochs.tolist() == [11, 11, 3, 4, 11, 3, 11, 11, 12, 12, 3, 4]


def test_a_position_late_in_a_run_is_computed_directly():
    order = MixtureOrder(
        {"a": ShuffledOrder(np.full(781_250, 256), 0), "b": ShuffledOrder(np.full(100, 256), 0)},
        rows_per_window(np.array([0.9, 0.1])),
        np.array([0, 200_000_000]),
        0,
    )
    rows, epochs = order.rows(5_000_000_000 + np.arange(256))
    assert len(set(rows.tolist())) == 256 and set(epochs[rows < 200_000_000]) == {22}
    assert set(epochs[rows >= 200_000_000]) == {500_000_000 // 25_600}


def test_sources_of_the_same_rows_are_masked_differently(folders):
    twice = mixture(
        folders, [{"data": "de", "weight": 1}, {"data": "de", "weight": 1, "name": "again"}]
    )
    rows, order = open_data(twice).training(7, 12)
    source = open_data(folders / "de").training(7, 12)[0]
    numbers = np.array([179, 3, 93, 89, 90])
    assert rows.rows == 180
    assert np.array_equal(rows.read(numbers), source.read(numbers % 90))
    loader = Loader(rows, order, **RUN | {"global_batch_size": 180, "micro_batch_size": 180})
    step = next(loader)
    loader.close()
    masked = dict(zip(step.rows.tolist(), step.micro_batches[0].masked_positions, strict=True))
    both = [row for row in range(90) if row in masked and row + 90 in masked]
    assert len(both) > 50
    assert not any(torch.equal(masked[row], masked[row + 90]) for row in both)


def stream(data, steps, **options):
    """[row numbers, then the fields of the batches] of the first steps of all ranks together."""
    ranks = []
    for rank in range(options.get("world_size", 1)):
        loader = Loader(*data.training(7, 12), rank=rank, **RUN | options)
        ranks.append([next(loader) for _ in range(steps)])
        loader.close()
    parts = [part for step in zip(*ranks, strict=True) for part in step]
    micro_batches = [micro[:8] for part in parts for micro in part.micro_batches]
    fields = [torch.cat(field) for field in zip(*micro_batches, strict=True)]
    return [np.concatenate([part.rows for part in parts]), *fields]


def test_a_mixture_of_one_source_equals_that_folder(folders):
    one = stream(open_data(mixture(folders, weighted(de=0.2))), 20)
    for found, expected in zip(one, stream(open_data(folders / "de"), 20), strict=True):
        assert np.array_equal(found, expected)


def test_a_row_number_out_of_range_is_an_error_with_the_range(folders):
    """numpy counts a negative index from the end, so another row would be read."""
    reader, _ = open_data(mixture(folders, weighted(de=3, ja=1))).training(7, 12)
    assert len(reader.read(np.array([0, reader.rows - 1]))) == 2
    assert len(reader.read(np.array([], np.int64))) == 0
    for row in (-1, reader.rows):
        with pytest.raises(IndexError, match=rf"expected 0\.\.{reader.rows - 1}"):
            reader.read(np.array([3, row]))


def test_ranks_and_restarts_read_the_same_batches(folders):
    data = open_data(mixture(folders, weighted(de=5, ja=1, en=2)))
    whole = stream(data, 20)
    for world, start in ((2, 0), (3, 7), (4, 11)):
        part = stream(data, 5, world_size=world, consumed_rows=start * 12)
        for found, expected in zip(part, whole, strict=True):
            assert np.array_equal(found, expected[start * 12 : (start + 5) * 12])


def test_a_checkpoint_of_other_sources_or_shares_is_refused(folders):
    parts = open_data(mixture(folders, weighted(de=3, ja=1))).training(7, 12)
    loader = Loader(*parts, **RUN)
    state = json.loads(json.dumps(loader.state(240)))
    loader.close()
    assert consumed_rows_from_state(state, *parts) == 240
    assert state["rows_per_window"] == {"de": 7500, "ja": 2500}
    for other in (weighted(de=2, ja=1), weighted(de=3, en=1), weighted(ja=1, de=3)):
        with pytest.raises(
            UserError, match=r"checkpoint belongs to other data: .*dataset_id: .*--init-from"
        ):
            consumed_rows_from_state(state, *open_data(mixture(folders, other)).training(7, 12))
    shares = "rows_per_window: checkpoint {'de': 7500, 'ja': 2500}, now {'de': 6667, 'ja': 3333}"
    with pytest.raises(UserError, match=shares):
        consumed_rows_from_state(
            state, *open_data(mixture(folders, weighted(de=2, ja=1))).training(7, 12)
        )


# ----------------------------------------------------------------------------------------- MIX.json


def test_a_temperature_reduces_the_share_of_large_sources():
    tokens = [900, 90, 10]

    def weights(temperature):
        return MixtureConfig(
            sources=[{"data": name} for name in "abc"], temperature=temperature
        ).weights(tokens)

    assert weights(1) == pytest.approx([0.9, 0.09, 0.01])
    assert weights(2) == pytest.approx(np.sqrt(tokens) / np.sqrt(tokens).sum())
    assert weights(1e9) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"data": "de", "wieght": 1}], r"sources\.0\.wieght: unknown key; did you mean 'weight'"),
        (
            {"temprature": 2, "sources": [{"data": "de"}]},
            "temprature: unknown key; did you mean 'temperature'",
        ),
        (
            [{"data": "de", "weight": 1}, {"data": "ja"}],
            "give every source a weight, or give no source a weight",
        ),
        ([{"data": "de"}], "give every source a weight"),
        ({"temperature": 2, "sources": weighted(de=1)}, "give every source a weight"),
        (
            {"temperature": 0.3, "sources": [{"data": "de"}]},
            r"temperature = 0\.3: expected 1 .* write 3\.33",
        ),
        (weighted(de=0), r"sources\.0\.weight = 0: input should be greater than 0"),
        ([], "sources = a list of 0: list should have at least 1 item"),
        (
            [*weighted(de=1), {"data": "../folders/de/", "weight": 1}],
            r"different names, found \['de'\]",
        ),
        ([{"data": "", "weight": 1, "name": "x"}], r"sources\.0\.data = .*at least 1 character"),
        ([{"data": ".", "weight": 1}], r"different names, found \[''\]"),
        ([{"data": "de", "weight": 1, "name": "a/b"}], r"sources\.0\.name = \"a/b\""),
        (weighted(nowhere=1), r"nowhere/manifest\.json: not found"),
        (
            weighted(de=1, odd=1),
            r"different kinds \(de: 32 tokens, best_fit, tokenizer \w{12}; odd: 16 tokens",
        ),
        (3, "found a JSON int; expected a mixture of data folders"),
        (weighted(**{"mixture.json": 1}), r"mixture\.json: it is a source of itself"),
        (
            [{"data": "mixture.json.bak", "weight": 1}],
            r"mixture\.json\.bak.*it is a file; expected a data folder",
        ),
    ],
)
def test_a_mistake_in_the_file_is_an_error_with_the_key(folders, content, message):
    (folders / "mixture.json.bak").touch()
    with pytest.raises(UserError, match=message):
        open_data(mixture(folders, content))


def test_the_health_check_of_a_node_reads_mixtures(folders):
    for data, is_readable in (
        (mixture(folders, []), True),
        (folders / "de", True),
        (folders, False),
        ("x.json", False),
    ):
        errors = subprocess.run(
            ["bash", HEALTH, data], env=os.environ | {"PYTHON": "true"}, capture_output=True
        ).stderr
        assert (b"cannot read" in errors) != is_readable, errors


def test_check_shows_the_share_and_the_epochs_of_each_source(folders):
    data = open_data(
        mixture(
            folders,
            {"temperature": 2, "sources": [{"data": "de"}, {"data": "ja", "name": "nihongo"}]},
        )
    )
    lines = {
        line.key: line
        for line in check(load_run("tiny", ["train.total_steps=10"]), 1, data).derived
    }
    tokens = [open_data(folders / name).manifest.splits["train"].tokens for name in ("de", "ja")]
    weight = np.sqrt(tokens[0]) / np.sqrt(tokens).sum()
    share = round(weight * WINDOW) / WINDOW
    assert lines["source de"].value == f"{320 * share / 90:.2f} epochs"
    assert lines["source nihongo"].value == f"{320 * (1 - share) / 41:.2f} epochs"
    assert f"(weight {weight:.6f}); has 90 rows, {tokens[0]:,} tokens" in lines["source de"].meaning
    assert lines["epochs"].value == f"{320 / 131:.3f}" and lines["vocab_size"].value == "600"


# ----------------------------------------------------------------------------------------- held out


def test_held_out_metrics_are_those_of_each_folder_and_their_mean_by_the_shares(folders):
    """In a mixture of mixtures; en has no held-out rows and no share in the mean."""
    mixture(folders, weighted(de=1, en=3), "west.json")
    content = [{"data": "west.json", "weight": 4}, {"data": "ja", "weight": 1}]
    held_out = open_data(mixture(folders, content)).held_out()
    assert {name: source.share for name, source in held_out.items()} == pytest.approx(
        {"west/de": 0.2, "ja": 0.2}
    )
    held_out["ja"] = held_out["ja"]._replace(share=0.6)
    settings = ["model.num_layers=1", "generator.num_layers=1"]
    config = load_run("tiny", settings).with_data(600, SPECIAL, 32)
    module = ElectraObjective(
        config.model, config.generator, config.objective, config.data.special_ids, seed=1
    ).eval()
    device, options = torch.device("cpu"), {"batch_rows": 8, "max_rows": 24}
    with torch.no_grad():
        found = evaluate_sources(module, held_out, RECIPE, device, **options)
        alone = {
            name: evaluate_sources(
                module, open_data(folders / folder).held_out(), RECIPE, device, **options
            )
            for name, folder in (("west/de", "de"), ("ja", "ja"))
        }
    for key in alone["ja"]:
        de, ja = alone["west/de"][key], alone["ja"][key]
        assert (found[f"west/de/{key}"], found[f"ja/{key}"]) == (de, ja)
        is_sum = key in ("tokens", "chosen")
        assert found[key] == pytest.approx(de + ja if is_sum else 0.25 * de + 0.75 * ja)
    assert len(found) == 3 * len(alone["ja"])
    assert alone["west/de"]["unigram_loss"] != alone["ja"]["unigram_loss"]
