"""Mixtures: exact shares in every window, each source's own order, one stream for any cut, figures by source."""

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
    """Beside each other: de, 90 rows and 20 held out; ja, 41 and 33; en, 60 and none; odd, of another length."""
    base = tmp_path_factory.mktemp("folders")
    for seed, (name, rows, valid, length) in enumerate(
        [("de", 90, 20, 32), ("ja", 41, 33, 32), ("en", 60, 0, 32), ("odd", 20, 0, 16)]
    ):
        held_out = best_fit_rows(valid, length, 50 + seed) if valid else None
        (base / name).mkdir()
        write_data(base / name, [best_fit_rows(rows, length, seed)], valid=held_out)
    return base


def mixture(folders, content, name="mixture.json"):
    """A mixture's file beside its folders."""
    path = folders / name
    path.write_text(json.dumps(content))
    return path


def weighted(**weights):
    return [{"data": name, "weight": weight} for name, weight in weights.items()]


# -------------------------------------------------------------------------------------------------------------- order

SIZES = st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 100)), min_size=1, max_size=6)


def order_of(sizes, seed=3, window=50):
    """A mixture's order over sources of so many rows, in blocks of 4, with so much weight each."""
    rows, weights = np.array([rows for rows, _ in sizes]), np.array([weight for _, weight in sizes])
    own = {
        f"s{i}": ShuffledOrder(np.diff(np.r_[np.arange(0, n, 4), n]), seed, 2)
        for i, n in enumerate(rows)
    }
    return MixtureOrder(
        own, rows_per_window(weights / weights.sum(), window), np.cumsum(rows) - rows, seed
    )


@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), window=st.integers(40, 500))
@settings(deadline=None)
def test_a_window_has_whole_rows_of_every_source_as_near_to_its_weight_as_can_be(weights, window):
    wanted = np.array(weights) / sum(weights)
    counts = rows_per_window(wanted, window)
    assert counts.sum() == window and counts.min() >= 1
    if (wanted * window >= 1).all():
        assert abs(counts - wanted * window).max() < 1


@given(sizes=SIZES, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_shares_are_exact_over_every_window_and_near_at_every_position(sizes, seed):
    order = order_of(sizes, seed)
    sources = np.searchsorted(order.starts, order.rows(np.arange(150))[0], side="right") - 1
    had = np.cumsum(
        sources[:, None] == np.arange(len(sizes)), axis=0
    )  # [150, S] up to each position
    assert np.array_equal(had[[49, 99, 149]], np.outer([1, 2, 3], order.counts))
    share = order.counts / 50
    assert (
        abs(had - np.arange(1, 151)[:, None] * share) <= 1 + share * (len(sizes) - 2) + 1e-9
    ).all()


@given(sizes=SIZES)
@settings(max_examples=40, deadline=None)
def test_the_rows_of_each_source_come_in_its_own_order_each_once_per_its_epoch(sizes):
    order = order_of(sizes)
    rows, epochs = order.rows(np.arange(600))
    for (total, _), start, own in zip(sizes, order.starts, order.orders.values(), strict=True):
        here = (rows >= start) & (rows < start + total)
        expected = own.rows(np.arange(here.sum()))
        assert np.array_equal(rows[here] - start, expected[0]) and np.array_equal(
            epochs[here], expected[1]
        )
        for epoch in range(here.sum() // total):
            assert np.array_equal(
                np.sort(rows[here][epochs[here] == epoch]), start + np.arange(total)
            )


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_world_size_and_any_restart_see_one_stream(data):
    sizes = data.draw(SIZES)
    stream = np.stack(order_of(sizes).rows(np.arange(240)))
    position, order = 0, order_of(sizes)
    while position < 240:
        world = data.draw(st.sampled_from([1, 2, 3, 4]))
        each = 12 // world
        order = (
            order_of(sizes) if data.draw(st.booleans()) else order
        )  # a restart, or on with what is kept
        found = [
            np.stack(order.rows(position + rank * each + np.arange(each))) for rank in range(world)
        ]
        assert np.array_equal(np.concatenate(found, axis=1), stream[:, position : position + 12])
        position += 12


def test_seeds_and_windows_are_mixed_differently():
    sizes = [(60, 1.0), (60, 1.0)]
    first, second = (order_of(sizes).rows(np.arange(500))[0] < 60).reshape(2, 250)
    other = order_of(sizes, seed=4).rows(np.arange(250))[0] < 60
    assert 0.2 < (first == second).mean() < 0.8 and 0.2 < (first == other).mean() < 0.8


def test_version_1_keeps_its_order():
    """Golden values: a change here breaks every resume, so it needs a new VERSION."""
    rows, epochs = order_of([(9, 1.0), (5, 2.0), (3, 0.5)]).rows(np.arange(95, 107))
    assert rows.tolist() == [13, 11, 8, 14, 12, 0, 10, 9, 12, 11, 1, 16]
    assert epochs.tolist() == [11, 11, 3, 4, 11, 3, 11, 11, 12, 12, 3, 4]


def test_a_batch_far_in_a_run_needs_no_history():
    order = MixtureOrder(
        {"a": ShuffledOrder(np.full(781_250, 256), 0), "b": ShuffledOrder(np.full(100, 256), 0)},
        rows_per_window(np.array([0.9, 0.1])),
        np.array([0, 200_000_000]),
        0,
    )
    rows, epochs = order.rows(5_000_000_000 + np.arange(256))
    assert len(set(rows.tolist())) == 256 and set(epochs[rows < 200_000_000]) == {22}
    assert set(epochs[rows >= 200_000_000]) == {500_000_000 // 25_600}


def test_rows_are_those_of_the_sources_and_masked_apart(folders):
    """The same folder twice under two names: the same ids, other masked positions."""
    twice = mixture(
        folders, [{"data": "de", "weight": 1}, {"data": "de", "weight": 1, "name": "again"}]
    )
    rows, order = open_data(twice).training(7, 12)
    own = open_data(folders / "de").training(7, 12)[0]
    numbers = np.array([179, 3, 93, 89, 90])
    assert rows.rows == 180 and np.array_equal(rows.read(numbers), own.read(numbers % 90))
    loader = Loader(rows, order, **RUN | {"global_batch_size": 180, "micro_batch_size": 180})
    step = next(loader)
    loader.close()
    chosen = dict(zip(step.rows.tolist(), step.micro_batches[0].masked_positions, strict=True))
    both = [row for row in range(90) if row in chosen and row + 90 in chosen]
    assert len(both) > 50 and sum(torch.equal(chosen[row], chosen[row + 90]) for row in both) == 0


def stream(data, steps, **options):
    """(row numbers, ids, masked positions) of some ranks' first steps together."""
    ranks = []
    for rank in range(options.get("world_size", 1)):
        loader = Loader(*data.training(7, 12), rank=rank, **RUN | options)
        ranks.append([next(loader) for _ in range(steps)])
        loader.close()
    parts = [part for step in zip(*ranks, strict=True) for part in step]
    micro_batches = [micro[:8] for part in parts for micro in part.micro_batches]
    return [np.concatenate([part.rows for part in parts])] + [
        torch.cat(field) for field in zip(*micro_batches, strict=True)
    ]


def test_a_mixture_of_one_source_is_that_folder(folders):
    one = stream(open_data(mixture(folders, weighted(de=0.2))), 20)
    for found, expected in zip(one, stream(open_data(folders / "de"), 20), strict=True):
        assert np.array_equal(found, expected)


def test_ranks_and_restarts_get_the_same_batches(folders):
    data = open_data(mixture(folders, weighted(de=5, ja=1, en=2)))
    whole = stream(data, 20)
    for world, start in ((2, 0), (3, 7), (4, 11)):
        cut = stream(data, 5, world_size=world, consumed_rows=start * 12)
        for found, expected in zip(cut, whole, strict=True):
            assert np.array_equal(found, expected[start * 12 : (start + 5) * 12])


def test_a_checkpoint_goes_on_with_the_same_shares_and_sources_alone(folders):
    parts = open_data(mixture(folders, weighted(de=3, ja=1))).training(7, 12)
    loader = Loader(*parts, **RUN)
    state = json.loads(json.dumps(loader.state(240)))
    loader.close()
    assert consumed_rows_from_state(state, *parts) == 240 and state["rows_per_window"] == {
        "de": 7500,
        "ja": 2500,
    }
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


# ------------------------------------------------------------------------------------------------------------ MIX.json


def test_a_temperature_takes_from_large_sources_less_than_they_have():
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
        ([], r"sources = \[\]: list should have at least 1 item"),
        (
            [*weighted(de=1), {"data": "../folders/de/", "weight": 1}],
            r"different names, found \['de'\]",
        ),
        ([{"data": ".", "weight": 1}], r"different names, found \[''\]"),
        ([{"data": "de", "weight": 1, "name": "a/b"}], r"sources\.0\.name = \"a/b\""),
        (weighted(nowhere=1), r"nowhere/manifest\.json: not found"),
        (
            weighted(de=1, odd=1),
            r"different kinds \(de: 32 tokens, best_fit, tokenizer 0{12}; odd: 16 tokens",
        ),
        (3, "found a JSON int; expected a mixture of data folders"),
        (weighted(**{"mixture.json": 1}), r"mixture\.json: it is a source of itself"),
        (
            [{"data": "mixture.json.bak", "weight": 1}],
            r"mixture\.json\.bak/manifest\.json: not found",
        ),
    ],
)
def test_a_mistake_in_the_file_is_named(folders, content, message):
    (folders / "mixture.json.bak").touch()
    with pytest.raises(UserError, match=message):
        open_data(mixture(folders, content))


def test_the_health_check_of_a_node_knows_mixtures(folders):
    for place, is_seen in (
        (mixture(folders, []), True),
        (folders / "de", True),
        (folders, False),
        ("x.json", False),
    ):
        said = subprocess.run(
            ["bash", HEALTH, place], env=os.environ | {"PYTHON": "true"}, capture_output=True
        ).stderr
        assert (b"cannot read" in said) != is_seen, said


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


# ------------------------------------------------------------------------------------------------------------ held out


def test_held_out_figures_are_those_of_each_folder_and_their_mean_by_the_shares(folders):
    """A group of sources is a mixture in a mixture; en has no held-out rows, so it counts for nothing."""
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
        assert found[key] == pytest.approx(
            de + ja if key in ("tokens", "chosen") else 0.25 * de + 0.75 * ja
        )
    assert (
        len(found) == 3 * len(alone["ja"])
        and alone["west/de"]["unigram_loss"] != alone["ja"]["unigram_loss"]
    )
