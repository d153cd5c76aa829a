"""Evaluation and detection: metrics equal those computed by other means and those of training."""

import json
import math
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import run_folders
import torch
from rich.cells import cell_len
from running import run_cli
from shard_data import SPECIAL, with_vocabulary
from sklearn.metrics import precision_score, recall_score, roc_auc_score
from stock_tokenizer import stock_tokenizer

from electra_ds.common.errors import UserError
from electra_ds.config.loading import load_run
from electra_ds.data import dataset
from electra_ds.data.batch import fixed_corruption
from electra_ds.data.loader import evaluation_batches
from electra_ds.data.masking import masking_recipe
from electra_ds.data.shard_format import read_unigrams
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.evaluation import evaluate
from electra_ds.evaluation.detect import Detector, TokenScore
from electra_ds.evaluation.detect_table import align, table
from electra_ds.interop import load_model
from electra_ds.model.objective import ElectraObjective
from electra_ds.model.weights import true_rows
from electra_ds.training import checkpoint, checkpointer, held_out
from electra_ds.training.optimizer import MOMENTS
from electra_ds.training.state import TrainingState

SETTINGS = [
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.ffn_size=32",
    "model.embedding_size=16",
    "generator.hidden_size=32",
    "generator.num_layers=1",
    "generator.ffn_size=32",
    "objective.mask_token_prob=0.4",
]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cook cooked a big meal for his sister ##s .".split()  # noqa: SIM905


def make_module(config):
    return ElectraObjective(
        config.model, config.generator, config.objective, config.data.special_ids, seed=1
    ).eval()


def save(module, config, folder, name="10"):
    """Write a checkpoint of a module with moments of zero, as one rank saves it."""
    parameters = dict(module.named_parameters())
    weights = SimpleNamespace(
        ranks=SimpleNamespace(rank=0, world_size=1),
        parameters=parameters,
        frozen={},
        optimizer_kind="adam",
        moments=dict.fromkeys(parameters, MOMENTS),
        all_gather_object=lambda value: [value],
        full_tensor=lambda name, kind: (
            parameters[name].detach() if kind == "master" else torch.zeros_like(parameters[name])
        ),
        shape=lambda name: parameters[name].shape,
        scaler_state=dict,
    )
    return checkpointer.save(
        weights,
        folder,
        name,
        TrainingState(10),
        config.model_dump(mode="json"),
        true_rows(module),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A run folder with one checkpoint of a small random model, and the shared data folder."""
    config = load_run("tiny", SETTINGS).with_data(600, SPECIAL, 32)
    module, out = make_module(config), tmp_path_factory.mktemp("run")
    path = save(module, config, out / "ckpt")
    return SimpleNamespace(out=out, path=path, module=module, config=config, data=data)


def batches(run, rows=40, **options):
    reader, options = ShardReader(run.data, "train"), {"batch_rows": 16} | options
    return evaluation_batches(
        reader, masking_recipe(reader.manifest, run.config.objective, 0), max_rows=rows, **options
    )


def metrics(run, batches):
    with torch.no_grad():
        return held_out.evaluate(
            run.module, batches, read_unigrams(run.data, 600), SPECIAL, torch.device("cpu")
        )


# --------------------------------------------------------------------------------------- evaluation


def test_metrics_of_the_fixed_corruption_equal_those_of_sklearn(run):
    logits, labels, unigrams = [], [], read_unigrams(run.data, 600)
    for batch, rows in batches(run):
        corrupted, is_replaced = fixed_corruption(batch, rows, unigrams, SPECIAL)
        with torch.no_grad():
            found = run.module(batch._replace(input_ids=corrupted), task="discriminate")
        real = batch.document_ids > 0
        logits.append(found[real])
        labels.append(is_replaced[real])
    logits, labels = torch.cat(logits).numpy(), torch.cat(labels).numpy()
    assert 0.02 < labels.mean() < 0.3
    values = metrics(run, batches(run))
    assert values["fixed_auc"] == pytest.approx(roc_auc_score(labels, logits), abs=2e-3)
    assert values["fixed_precision"] == pytest.approx(precision_score(labels, logits > 0))
    assert (
        values["fixed_recall"] == pytest.approx(recall_score(labels, logits > 0))
        and 0 < values["fixed_recall"] < 1
    )


def test_losses_are_means_over_masked_positions_and_real_tokens(run):
    mlm = disc = masked = tokens = unigram = 0.0
    counts = read_unigrams(run.data, 600)
    for batch, _ in batches(run):
        with torch.no_grad():
            losses = run.module(batch)
        mlm, disc = mlm + float(losses.mlm_loss), disc + float(losses.disc_loss)
        masked += float(batch.masked_weights.sum())
        tokens += float((batch.document_ids > 0).sum())
        for row, positions, weights in zip(
            batch.input_ids, batch.masked_positions, batch.masked_weights, strict=True
        ):
            targets = row[positions[weights > 0]].numpy()
            unigram -= np.log((counts[targets] + 1) / (counts.sum() + 600)).sum()
    values = metrics(run, batches(run))
    assert (values["chosen"], values["tokens"]) == (masked, tokens)
    assert values["mlm_loss"] == pytest.approx(mlm / masked) and values[
        "disc_loss"
    ] == pytest.approx(disc / tokens)
    assert values["unigram_loss"] == pytest.approx(unigram / masked)
    share = values["replaced_fraction"]
    assert values["base_rate_loss"] == pytest.approx(
        -share * math.log(share) - (1 - share) * math.log(1 - share)
    )


def test_metrics_depend_neither_on_batch_rows_nor_on_the_ranks(run):
    whole = metrics(run, batches(run))
    ranked = [
        found for rank in range(3) for found in batches(run, batch_rows=5, rank=rank, world_size=3)
    ]
    for key, value in metrics(run, ranked).items():
        assert value == pytest.approx(
            whole[key], abs=1e-3 if "auc" in key else 1e-5, nan_ok=True
        ), key


def test_sums_are_taken_over_all_ranks(run):
    def doubled(value):
        return 2 * value

    with torch.no_grad():
        unigrams = read_unigrams(run.data, 600)
        two = held_out.evaluate(
            run.module, batches(run), unigrams, SPECIAL, torch.device("cpu"), doubled
        )
    one = metrics(run, batches(run))
    assert two["tokens"] == 2 * one["tokens"] and two["mlm_loss"] == one["mlm_loss"]


def test_evaluation_without_rows_is_refused(run):
    with pytest.raises(UserError, match="larger --valid-fraction"):
        metrics(run, [])


def test_the_verb_returns_the_metrics_of_evaluation_during_training(run, monkeypatch):
    rows = ShardReader(run.data, "train")
    held_out = {"": dataset.HeldOut(rows, read_unigrams(run.data, 600), 1.0)}
    monkeypatch.setattr(dataset.DataFolder, "held_out", lambda self: held_out)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = evaluate.evaluate_checkpoint(run.out, run.data, 40)
    assert found == pytest.approx(metrics(run, batches(run)), nan_ok=True)


def test_data_of_another_vocabulary_is_refused(run, tmp_path):
    """The entries are as many and the special tokens are the same."""
    words = [*WORDS[:5], *(f"w{i}" for i in range(595))]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n")
    load_tokenizer(vocabulary).save(run.out / "tokenizer")
    vocabulary.write_text("\n".join([*words[:5], *words[:4:-1]]) + "\n")
    with_vocabulary(run.data, vocabulary, tmp_path / "data")
    try:
        with pytest.raises(UserError, match="its vocabulary is not that of the model"):
            evaluate.evaluate_checkpoint(run.out, tmp_path / "data", 8)
        with pytest.raises(UserError, match="its vocabulary is not that of the model"):
            Detector.load(run.out, tmp_path / "data" / "tokenizer")
    finally:
        shutil.rmtree(run.out / "tokenizer")


def test_the_verb_prints_json_and_reports_its_progress(run):
    counts = []
    values = evaluate.evaluate_checkpoint(
        run.out, run.data, 40, progress=lambda done, total: counts.append((done, total))
    )
    assert counts == [(40, 40)] or (counts[-1][0] >= 40 and counts[-1][1] == 40)
    done = run_cli("evaluate", run.out, "--data", run.data, "--max-rows", 40, "--json")
    printed = json.loads(done.stdout, parse_constant=pytest.fail)
    assert printed.pop("verdict") in ("learning", "on the plateau", "collapsed")
    assert printed.keys() == values.keys()


# ------------------------------------------------------------------------------------------ loading


def test_load_objective_returns_the_module_that_was_saved(run):
    module, config = load_model.load_objective(run.path)
    assert not module.training and config == run.config
    saved = dict(run.module.named_parameters())
    for name, parameter in module.named_parameters():
        true = true_rows(module).get(name, len(parameter))
        assert torch.equal(parameter[:true], saved[name][:true]), name


def test_a_checkpoint_is_found_from_the_run_folder_the_ckpt_folder_or_itself(run, tmp_path):
    for path in (run.out, run.out / "ckpt", run.path):
        assert checkpoint.find_checkpoint(path) == run.path
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no checkpoint here.*; expected a run folder"):
            checkpoint.find_checkpoint(path)


# ---------------------------------------------------------------------------------------- detection


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A detector with a vocabulary of a few words, loaded from a run folder with its tokenizer."""
    out = tmp_path_factory.mktemp("detect")
    (out / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = load_tokenizer(out / "vocab.txt")
    tokenizer.save(out / "tokenizer")
    config = load_run("tiny", [*SETTINGS, "data.sequence_length=8"]).with_data(
        len(WORDS), tokenizer.special_ids, 8
    )
    save(make_module(config), config, out / "ckpt")
    return Detector.load(out)


def test_every_token_has_a_probability_and_its_span_in_the_text(detector):
    text = "The cook cooked, xyz sisters."
    found = detector(text)
    assert [score.token for score in found] == [
        "the",
        "cook",
        "cooked",
        "[UNK]",
        "[UNK]",
        "sister",
        "##s",
        ".",
    ]
    assert [text[score.start : score.end].lower() for score in found] == [
        "the",
        "cook",
        "cooked",
        ",",
        "xyz",
        "sister",
        "s",
        ".",
    ]
    assert all(0 < score.probability < 1 for score in found)


def test_tokens_of_bytes_are_shown_readably(tmp_path):
    stock_tokenizer(tmp_path)
    words = load_tokenizer(tmp_path)
    config = load_run("tiny", [*SETTINGS, "data.sequence_length=32"]).with_data(
        words.vocab_size, words.special_ids, 32
    )
    text = "the old \U0001f9ea caf\u00e9"
    found = Detector(make_module(config), words, 32)(text)
    parts = [(score.token, text[score.start : score.end]) for score in found]
    assert parts[:2] == [("the", "the"), ("\u2581old", "old")]
    assert parts[2] == ("\u2581\\xf0\\x9f", "\U0001f9ea") and parts[-1][1] == "caf\u00e9"
    shown = "\n".join(table(found, 0.5))
    assert "\ufffd" not in shown and "\u0120" not in shown and "\u2581old" in shown


def test_words_above_the_limit_of_wordpiece_are_noted(detector):
    assert detector.note(detector("x" * 100 + " a word")) == ""
    note = detector.note(detector("x" * 101 + " a word " + "y" * 200))
    assert note.startswith("2 words of more than 100 characters")


def test_a_long_text_is_scored_in_independent_rows(detector):
    first, second = "the cook cooked a big meal", "for his sister ."  # rows of 8 hold 6 tokens
    whole = [score.probability for score in detector(f"{first} {second}")]
    parts = [score.probability for text in (first, second) for score in detector(text)]
    assert whole == pytest.approx(parts, abs=1e-6)  # the second is padded beside the first
    other = [score.probability for score in detector(f"{first} for the big meal")]
    assert other[:6] == pytest.approx(whole[:6], abs=1e-6) and other[6:] != pytest.approx(
        whole[6:], abs=1e-6
    )


def test_a_probability_depends_on_the_other_tokens_of_the_text(detector):
    one, other = detector("the cook cooked a meal"), detector("the cook for a meal")
    assert one[0].probability != other[0].probability


def test_a_text_that_is_not_unicode_is_refused(detector):
    with pytest.raises(UserError, match="not Unicode"):
        detector("caf\udce9 the")


def test_a_probability_that_is_no_number_is_not_returned(detector, monkeypatch):
    monkeypatch.setattr(
        detector, "module", lambda batch, task: torch.full(batch.input_ids.shape, float("nan"))
    )
    with pytest.raises(UserError, match="expected finite logits"):
        detector("the cook")


def test_a_text_without_tokens_is_refused(detector):
    for text in ("", "  \n"):
        with pytest.raises(UserError, match="holds no tokens"):
            detector(text)


def test_a_tokenizer_of_another_size_is_refused(run, detector, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    with pytest.raises(UserError, match=f"{len(WORDS)} entries, but .* was trained with 600"):
        Detector.load(run.out, tmp_path / "vocab.txt")


def test_the_table_marks_suspicious_tokens_and_aligns_the_original():
    found = [
        TokenScore("the", 0, 3, 0.1),
        TokenScore("cook", 4, 8, 0.2),
        TokenScore("ate", 9, 12, 0.7),
    ]
    original = [
        TokenScore("the", 0, 3, 0.1),
        TokenScore("sous", 4, 8, 0.3),
        TokenScore("cook", 9, 13, 0.2),
        TokenScore("cooked", 14, 20, 0.25),
    ]
    _, _, *lines = table(found, 0.5)
    assert [line.endswith("<- replaced") for line in lines] == [False, False, True]
    _, _, *lines = table(found, 0.9)
    assert [line.endswith("<- most suspicious") for line in lines] == [False, False, True]
    heading, _, *lines = table(found, 0.5, original)
    assert heading.split() == ["token", "replaced", "original", "replaced"]
    assert [line.split()[-2:] for line in lines] == [
        ["the", "0.1000"],
        ["sous", "0.3000"],
        ["cook", "0.2000"],
        ["cooked", "0.2500"],
    ]
    assert lines[1].startswith(" " * 10)  # the text has no token there
    assert lines[3].startswith("ate      0.7000  <- replaced  ")  # beside its probability


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a b c d", "a d"),
        ("a b c d", "c d"),
        ("a b c d", "a b"),
        ("a b c d", "a x d"),
        ("a d", "a b c d"),
        ("a b", "x"),
        ("a", ""),
        ("", "a"),
    ],
)
def test_every_token_of_both_texts_is_in_the_alignment(old, new):
    before = [TokenScore(word, i, i + 1, 0.1) for i, word in enumerate(old.split())]
    after = [TokenScore(word, i, i + 1, 0.2) for i, word in enumerate(new.split())]
    pairs = align(after, before)
    assert [score for score, _ in pairs if score] == after
    assert [other for _, other in pairs if other] == before
    assert all(score or other for score, other in pairs)
    if after:
        _, _, *lines = table(after, 0.5, before)
        assert len(lines) == len(pairs)
        assert sum("0.1000" in line for line in lines) == len(before)


def test_deleted_words_of_the_original_are_printed(tmp_path):
    run_folders.pretrained(tmp_path)
    given = ["detect", tmp_path, "aa ab ac", "--original", "aa ab ac ad ae"]
    shown = run_cli(*given).stdout
    assert "ad" in shown and "ae" in shown
    values = json.loads(run_cli(*given, "--json").stdout)
    assert [value["token"] for value in values[3:]] == [None, None]
    assert [value["original"]["token"] for value in values[3:]] == ["ad", "ae"]


def test_the_columns_of_the_table_do_not_depend_on_the_width_of_characters():
    words = ["a", "\u6f22\u5b57", "e\u0301te\u0301", "\u0915\u094d\u0937", "\x1b[31m"]
    found = [TokenScore(word, 0, 1, 0.1) for word in words]
    lines = table(found, 0.5, found)
    columns = {cell_len(line[: line.index("0.1000")]) for line in lines[2:]}
    assert len(columns) == 1 and len({cell_len(line) for line in lines[2:]}) == 1
    assert not any("\x1b" in line for line in lines)


def test_long_texts_are_aligned_in_bounded_time():
    random = np.random.default_rng(0)
    words = [f"w{i}" for i in random.zipf(1.3, 12_000) % 500]
    old = [TokenScore(word, i, i, 0.1) for i, word in enumerate(words)]
    new = [score._replace(token="x") if i % 7 == 3 else score for i, score in enumerate(old)]
    del new[100:130]  # the alignment has to shift
    new[5000:5000] = old[:40]
    began = time.monotonic()
    pairs = align(new, old)
    assert time.monotonic() - began < 30
    same = [other is not None and other.start == score.start for score, other in pairs if score]
    assert len(same) == len(new) and [other for _, other in pairs if other] == old
    assert np.mean(same) > 0.97
