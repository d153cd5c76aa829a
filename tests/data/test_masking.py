"""Whole-word and span masking: exactly k places, drawn as a row-by-row reading of the rule draws them."""

import hashlib
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import ROOT, run_cli
from shard_data import SPECIAL, best_fit_rows

from data_tools.train_tokenizer import train_tokenizer
from electra_ds.data.batch import make_batch
from electra_ds.data.masking import SPAN_LENGTHS, MaskingRecipe, select_masked_positions
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.training.metrics_file import read_metrics

VOCAB = 12
BEGINS = np.arange(VOCAB) < 9  # 0 to 4 are special, 9 to 11 go on with a word
RECIPE = MaskingRecipe("best_fit", SPECIAL, 0.15, 0.85, 7, begins_word=BEGINS)
BARRED = {SPECIAL.pad, SPECIAL.cls, SPECIAL.sep, SPECIAL.mask}
IDS = st.sampled_from([0, 2, 3, 4, 1, *range(5, VOCAB), *range(5, VOCAB), *range(5, VOCAB)])


def words_of(row, begins):
    """Lists of columns: the words of each stretch between what is barred."""
    stretches, previous = [], None
    for column, token in enumerate(row):
        if token not in BARRED:
            if previous is None:
                stretches.append([])
            if previous is None or begins[token]:
                stretches[-1].append([])
            stretches[-1][-1].append(column)
        previous = None if token in BARRED else token
    return stretches


def drawn(row, numbers, begins, masking):
    """Columns in the order in which they are chosen, one row, one word or span after the other."""
    starts = [
        (
            numbers[word[0]],
            [c for w in stretch[at : at + SPAN_LENGTHS[numbers[word[0]] % 4096]] for c in w],
            word,
        )
        for stretch in words_of(row, begins)
        for at, word in enumerate(stretch)
    ]
    order = []
    for _, span, word in sorted(starts, key=lambda start: start[0]):
        order += [column for column in (span if masking == "span" else word) if column not in order]
    return order


@st.composite
def rows_with_numbers(draw):
    """[B, S] ids and random numbers; few enough rows that a failure can be read."""
    n, length = draw(st.integers(1, 4)), draw(st.integers(8, 40))
    ids = draw(st.lists(st.lists(IDS, min_size=length, max_size=length), min_size=n, max_size=n))
    seed = draw(st.integers(0, 2**32 - 1))
    return np.array(ids, np.uint16), np.random.default_rng(seed).integers(
        0, 2**32, (n, length), np.uint32
    )


def check(ids, numbers, recipe):
    """What is chosen are the first k columns drawn, k being that of token masking."""
    chosen, used = select_masked_positions(ids, recipe, numbers)
    by_token, counts = select_masked_positions(ids, recipe._replace(masking="token"), numbers)
    assert chosen.shape == by_token.shape and np.array_equal(used, counts)
    for row, own, places, weights in zip(ids.tolist(), numbers.tolist(), chosen, used, strict=True):
        expected = drawn(row, own, BEGINS, recipe.masking)[: weights.sum()]
        assert places[weights].tolist() == sorted(expected) and len(set(expected)) == weights.sum()
        if recipe.masking == "whole_word":
            words = [set(word) for stretch in words_of(row, BEGINS) for word in stretch]
            assert (
                sum(0 < len(word & set(expected)) < len(word) for word in words) <= 1
            )  # the last one drawn


@pytest.mark.parametrize("masking", ["whole_word", "span"])
@given(pair=rows_with_numbers(), mask_prob=st.sampled_from([0.05, 0.15, 0.4, 0.9]))
@settings(max_examples=150, deadline=None)
def test_the_first_k_places_of_the_drawn_words_are_chosen(masking, pair, mask_prob):
    check(*pair, RECIPE._replace(masking=masking, mask_prob=mask_prob))


@pytest.mark.parametrize("masking", ["whole_word", "span"])
def test_the_rule_holds_in_long_pieces(masking):
    """Room for spans of ten words, which short rows seldom have."""
    ids = best_fit_rows(400, 128, vocab_size=VOCAB)
    numbers = np.random.default_rng(2).integers(0, 2**32, ids.shape, np.uint32)
    check(ids, numbers, RECIPE._replace(masking=masking))


@pytest.mark.parametrize("masking", ["token", "whole_word", "span"])
def test_a_row_is_masked_the_same_in_any_company(masking):
    recipe, ids = RECIPE._replace(masking=masking), best_fit_rows(40, 64, vocab_size=VOCAB)
    whole, part = (
        make_batch(ids, np.arange(40), 3, recipe),
        make_batch(ids[7:9], np.array([7, 8]), 3, recipe),
    )
    assert whole.masked_positions[7:9].equal(part.masked_positions) and whole.uniforms[7:9].equal(
        part.uniforms
    )
    assert not whole.masked_positions.equal(
        make_batch(ids, np.arange(40), 4, recipe).masked_positions
    )


def test_each_word_is_drawn_equally_often():
    """9 words of 2 tokens, k = 3: one word whole and half of another; and k = 1: where a span starts."""
    ids = np.tile(np.r_[2, np.tile([5, 9], 9), 3], (20_000, 1)).astype(np.uint16)
    numbers = np.random.default_rng(1).integers(0, 2**32, ids.shape, np.uint32)
    chosen, used = select_masked_positions(ids, RECIPE._replace(masking="whole_word"), numbers)
    share = np.bincount(chosen[used], minlength=20)[1:19].reshape(9, 2) / 20_000
    assert abs(share - [2 / 9, 1 / 9]).max() < 0.013  # standard deviation .003
    chosen, used = select_masked_positions(
        ids, RECIPE._replace(masking="span", mask_prob=0.05), numbers
    )
    share = np.bincount(chosen[used], minlength=20)[1:19].reshape(9, 2) / 20_000
    assert abs(share - [1 / 9, 0]).max() < 0.01


def test_spans_are_as_long_as_those_of_spanbert():
    shares = np.bincount(SPAN_LENGTHS, minlength=11) / 4096
    geometric = 0.2 * 0.8 ** np.arange(10)
    assert abs(shares[1:] - geometric / geometric.sum()).max() < 1 / 4096 and shares[0] == 0
    assert abs(SPAN_LENGTHS.mean() - 3.8) < 0.01


def test_token_masking_is_what_it_was():
    """Golden values from before words could be drawn: a change here is another experiment under the same name."""
    batch = make_batch(
        best_fit_rows(1000, 128), np.arange(1000), 3, RECIPE._replace(begins_word=None)
    )
    digests = [hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16] for tensor in batch[4:8]]
    assert digests == [
        "cb6d0ff88af1a075",
        "3a241a22c0aafd67",
        "b38adfbd1e9e8b13",
        "a21556bccfb5f0cc",
    ]


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_words_begin_where_the_text_has_them(tmp_path, kind):
    firsts, lasts = (
        ("un", "re", "over", "down"),
        ("load", "turn", "write", "play", "cast", "hold", "view"),
    )
    words = [
        first + last + ending
        for first in firsts
        for last in lasts
        for ending in ("", "ing", "er", "s")
    ]
    (tmp_path / "text.txt").write_text(
        "\n".join(" ".join(words[i:] + words[:i]) for i in range(len(words)))
    )
    tokenizer = train_tokenizer(
        [str(tmp_path / "text.txt")], tmp_path / "tok", kind=kind, vocab_size=80
    )
    ids = tokenizer.encode_batch([" ".join(words)])[0]
    starts = np.flatnonzero(load_tokenizer(tmp_path / "tok").begins_word()[ids])
    assert len(ids) > len(starts) == len(words)  # some words have several pieces
    spellings = ["".join(tokenizer.tokens(part)) for part in np.split(ids, starts[1:])]
    assert [word.replace("##", "").replace("\u2581", "") for word in spellings] == words


def test_a_run_masks_as_it_says_and_resumes_as_nothing_else(tmp_path, data):
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "tokenizer").mkdir()
    names = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(f"{'##' * (i % 3 > 0)}w{i}" for i in range(5, 600)),
    ]
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(names))
    sets = (
        "train.total_steps=50",
        "optimizer.warmup_steps=10",
        "logging.every=1",
    )  # those of the golden losses
    run = [
        "pretrain",
        "tiny",
        "--data",
        folder,
        "--out",
        tmp_path / "run",
        "--engine",
        "zero0-fp32",
        "--stop-at-step",
    ]
    run += [2, *(part for setting in sets for part in ("--set", setting))]
    assert run_cli(*run, "--set", "objective.masking=span", check=False).returncode == 85
    loss = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["loss"]
    by_token = float((ROOT / "tests" / "files" / "golden_tiny.txt").read_text().splitlines()[1])
    assert abs(loss - by_token) > 1e-3 * by_token  # the same rows and weights, other places
    refused = run_cli(*run, check=False)
    assert refused.returncode == 2 and "objective.masking: span -> token" in refused.stderr
