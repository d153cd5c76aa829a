"""Whole-word and span masking: exactly k positions, equal to a plain implementation by row."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import ROOT, run_cli
from shard_data import SPECIAL, best_fit_rows, with_vocabulary

from data_tools.train_tokenizer import train_tokenizer
from electra_ds.data.batch import make_batch
from electra_ds.data.masking import (
    SPAN_LENGTHS,
    MaskingRecipe,
    class_changes,
    select_masked_positions,
)
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.data.tokenizer.byte_alphabet import edge_classes
from electra_ds.training.metrics_file import read_metrics

VOCAB = 12
BEGINS = np.arange(VOCAB) < 9  # 0 to 4 are special, 9 to 11 continue a word
RECIPE = MaskingRecipe("best_fit", SPECIAL, 0.15, 0.85, 7, begins_word=BEGINS)
EXCLUDED = {SPECIAL.pad, SPECIAL.cls, SPECIAL.sep, SPECIAL.mask}
IDS = st.sampled_from([0, 2, 3, 4, 1, *range(5, VOCAB), *range(5, VOCAB), *range(5, VOCAB)])


def words_of(row, begins):
    """The words, lists of columns, of each segment between excluded tokens."""
    segments, previous = [], None
    for column, token in enumerate(row):
        if token not in EXCLUDED:
            if previous is None:
                segments.append([])
            if previous is None or begins[token]:
                segments[-1].append([])
            segments[-1][-1].append(column)
        previous = None if token in EXCLUDED else token
    return segments


def selection_order(row, random_bits, begins, masking):
    """The columns of one row in the order of their selection, word by word or span by span."""
    candidates = []
    for segment in words_of(row, begins):
        for i, word in enumerate(segment):
            bits = random_bits[word[0]]
            length = SPAN_LENGTHS[bits % 4096] if masking == "span" else 1
            columns = [column for other in segment[i : i + length] for column in other]
            candidates.append((bits, columns))
    order = []
    for _, columns in sorted(candidates, key=lambda candidate: candidate[0]):
        order += [column for column in columns if column not in order]
    return order


@st.composite
def rows_with_random_bits(draw):
    """Ids and random bits, [B, S] each, of a few rows."""
    n, length = draw(st.integers(1, 4)), draw(st.integers(8, 40))
    ids = draw(st.lists(st.lists(IDS, min_size=length, max_size=length), min_size=n, max_size=n))
    seed = draw(st.integers(0, 2**32 - 1))
    return np.array(ids, np.uint16), bits_for((n, length), seed)


def bits_for(shape, seed):
    return np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32)


def check(ids, random_bits, recipe):
    """The first k columns in the order of selection are masked, k being that of token masking."""
    positions, used = select_masked_positions(ids, recipe, random_bits)
    by_token, used_by_token = select_masked_positions(
        ids, recipe._replace(masking="token"), random_bits
    )
    assert positions.shape == by_token.shape
    assert np.array_equal(used, used_by_token)
    for row, bits, row_positions, is_used in zip(
        ids.tolist(), random_bits.tolist(), positions, used, strict=True
    ):
        k = is_used.sum()
        expected = selection_order(row, bits, BEGINS, recipe.masking)[:k]
        assert len(set(expected)) == k
        assert row_positions[is_used].tolist() == sorted(expected)
        if recipe.masking == "whole_word":
            words = [set(word) for segment in words_of(row, BEGINS) for word in segment]
            cut_words = [word for word in words if 0 < len(word & set(expected)) < len(word)]
            assert len(cut_words) <= 1  # the last word


@pytest.mark.parametrize("masking", ["whole_word", "span"])
@given(pair=rows_with_random_bits(), mask_prob=st.sampled_from([0.05, 0.15, 0.4, 0.9]))
@settings(max_examples=150, deadline=None)
def test_the_first_k_positions_of_the_selected_words_are_masked(masking, pair, mask_prob):
    check(*pair, RECIPE._replace(masking=masking, mask_prob=mask_prob))


@pytest.mark.parametrize("masking", ["whole_word", "span"])
def test_the_first_k_positions_are_masked_in_long_documents(masking):
    """Long documents have room for spans of ten words."""
    ids = best_fit_rows(400, 128, vocab_size=VOCAB)
    check(ids, bits_for(ids.shape, seed=2), RECIPE._replace(masking=masking))


@pytest.mark.parametrize("masking", ["token", "whole_word", "span"])
def test_the_masking_of_a_row_does_not_depend_on_the_other_rows(masking):
    recipe, ids = RECIPE._replace(masking=masking), best_fit_rows(40, 64, vocab_size=VOCAB)
    whole = make_batch(ids, np.arange(40), 3, recipe)
    part = make_batch(ids[7:9], np.array([7, 8]), 3, recipe)
    assert whole.masked_positions[7:9].equal(part.masked_positions)
    assert whole.uniforms[7:9].equal(part.uniforms)
    next_epoch = make_batch(ids, np.arange(40), 4, recipe)
    assert not whole.masked_positions.equal(next_epoch.masked_positions)


@pytest.mark.parametrize(
    ("masking", "mask_prob", "expected"),
    [
        ("whole_word", 0.15, [2 / 9, 1 / 9]),  # k = 3: a whole word and half of another
        ("span", 0.05, [1 / 9, 0]),  # k = 1: the first token of the first span
    ],
)
def test_each_word_is_selected_equally_often(masking, mask_prob, expected):
    """Rows with 9 words of 2 tokens."""
    ids = np.tile(np.r_[2, np.tile([5, 9], 9), 3], (20_000, 1)).astype(np.uint16)
    recipe = RECIPE._replace(masking=masking, mask_prob=mask_prob)
    positions, used = select_masked_positions(ids, recipe, bits_for(ids.shape, seed=1))
    share = np.bincount(positions[used], minlength=20)[1:19].reshape(9, 2) / 20_000
    assert abs(share - expected).max() < 0.013  # standard deviation at most .003


def test_span_lengths_are_distributed_as_in_spanbert():
    shares = np.bincount(SPAN_LENGTHS, minlength=11) / 4096
    geometric = 0.2 * 0.8 ** np.arange(10)
    assert abs(shares[1:] - geometric / geometric.sum()).max() < 1 / 4096 and shares[0] == 0
    assert abs(SPAN_LENGTHS.mean() - 3.8) < 0.01


def test_token_masking_does_not_change_between_versions():
    """Golden values; with other values the same config would be another experiment."""
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
def test_words_by_spelling_are_the_words_of_the_text(tmp_path, kind):
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
    assert len(ids) > len(starts) == len(words)  # some words have several tokens
    spellings = ["".join(tokenizer.tokens(part)) for part in np.split(ids, starts[1:])]
    assert [word.replace("##", "").replace("\u2581", "") for word in spellings] == words


def test_words_begin_where_the_class_of_the_characters_changes():
    tokens = ["old", " river", "(", ").", "12", "\u00e9", " ", "\n"]
    tokens = [*map(str.encode, tokens), b"\xe6", b"\xb0\xb4", b"\xf0\x9f", b"\x98\x80"]
    classes = np.array([edge_classes(token) for token in tokens]).T
    for row, begins in (
        ([0, 0, 5, 1], [0, 0, 0, 1]),
        ([0, 2, 3, 0, 4, 4, 0], [0, 1, 0, 1, 1, 0, 1]),
        ([6, 0, 7, 0, 6, 4], [0, 0, 1, 1, 1, 0]),  # one space belongs to the word after it
        ([8, 9, 0, 9, 4], [0, 0, 0, 0, 1]),  # a letter of two tokens
        ([0, 10, 11, 3, 0], [0, 1, 0, 0, 1]),  # an emoji of two tokens
        ([9, 0, 2], [0, 1, 1]),  # nothing is known of a character that began before the row
    ):
        ids = np.array([row, [3] * len(row)])
        assert class_changes(ids, classes).tolist() == [begins, [0] * len(row)], row


def test_a_run_uses_its_kind_of_masking_and_cannot_resume_with_another(tmp_path, data):
    names = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(f"{'##' * (i % 3 > 0)}w{i}" for i in range(5, 600)),
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(names))
    folder = with_vocabulary(data, tmp_path / "vocab.txt", tmp_path / "data")
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
    assert abs(loss - by_token) > 1e-3 * by_token  # the same rows and weights, other positions
    refused = run_cli(*run, check=False)
    assert refused.returncode == 2 and "objective.masking: span -> token" in refused.stderr
