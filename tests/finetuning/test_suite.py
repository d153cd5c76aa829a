"""The files of a suite: growth, comparison, notes, damaged files; seeds that trained nothing."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import run_folders
import torch

from electra_ds.cluster.launchers import Ranks
from electra_ds.common.errors import UserError
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.data.tokenizer.wordpiece import LONG_WORDS
from electra_ds.finetuning import suite_files
from electra_ds.finetuning.batches import Encoded, encode
from electra_ds.finetuning.config import TaskOverrides, load_finetune
from electra_ds.finetuning.examples import Example
from electra_ds.finetuning.finetune import _digest, _read
from electra_ds.finetuning.notes import length_note, split_notes
from electra_ds.finetuning.predict import Predictions, predict
from electra_ds.finetuning.report import read_results, write_report
from electra_ds.finetuning.seed import SeedRun, Suite
from electra_ds.finetuning.submit import write_submission
from electra_ds.finetuning.superglue_rows import Candidate
from electra_ds.finetuning.tasks import Task, load_task
from electra_ds.interop.load_model import load_pretrained
from electra_ds.model.weights import true_state
from electra_ds.training import checkpointer
from electra_ds.training.state import TrainingState

RANKS = Ranks(0, 1, 0, 1, "none")


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A function that opens a suite with settings; one process without a process group."""
    for module in (suite_files, "electra_ds.finetuning.finetune"):
        target = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{target}.on_rank0", lambda function: function())
    run_folders.pretrained(tmp_path / "run")
    pretrained = load_pretrained(tmp_path / "run")

    def open_with(names, *sets, model=pretrained):
        config = load_finetune("tiny", list(sets))
        opened = Suite(config, model, False, tmp_path / "F", RANKS, "cpu")
        return suite_files.open_suite(opened, names)

    return open_with


def train(suite, task):
    """Leave what a finished seed leaves."""
    folder = suite.out / task / "seed-0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"status": "done"}')


def test_a_suite_takes_later_tasks_with_settings_of_their_own(suite):
    train(suite(["x"], "tasks.x.epochs=2"), "x")
    grown = suite(["y"], "tasks.y.epochs=5")
    assert grown.config.tasks["x"] == TaskOverrides(epochs=2.0)  # of the earlier call
    assert grown.config.tasks["y"] == TaskOverrides(epochs=5.0)
    suite(["y"], "tasks.y.epochs=6")  # y has no trained seed yet
    train(grown, "y")
    for names, sets in ((["y"], ["tasks.y.epochs=7"]), (["x", "y"], ["tasks.y.epochs=6"])):
        with pytest.raises(UserError, match="earlier seeds were trained with other settings"):
            suite(names, *sets)
    with pytest.raises(UserError, match=r"optimizer\.peak_lr"):
        suite(["z"], "optimizer.peak_lr=0.5")


def test_a_suite_of_other_weights_or_another_vocabulary_is_refused(suite, tmp_path):
    train(suite(["x"]), "x")
    run_folders.vocabulary(tmp_path / "words")
    words = [*run_folders.VOCABULARY[:5], *run_folders.VOCABULARY[:4:-1]]
    (tmp_path / "words" / "vocab.txt").write_text("\n".join(words) + "\n")
    found = load_pretrained(tmp_path / "run")
    other = found._replace(tokenizer=load_tokenizer(tmp_path / "words"))
    with pytest.raises(UserError, match="tokenizer: another vocabulary"):
        suite(["x"], model=other)
    state = {name: value + 1 for name, value in found.state.items()}
    with pytest.raises(UserError, match="weights: "):
        suite(["x"], model=found._replace(state=state))


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"provenance": 3}', '{"provenance": {"weights": 7}}', "", "{"]
)
def test_a_folder_of_something_else_is_refused(suite, tmp_path, content):
    (tmp_path / "F").mkdir()
    (tmp_path / "F" / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        suite(["x"])


def own_task(folder, text="aa ab", **values):
    rows = [{"sentence": text, "label": i % 2} for i in range(8)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = {"splits": {"train": "a.jsonl", "valid": "a.jsonl"}} | values
    (folder / "own.json").write_text(json.dumps(described))
    return load_task(str(folder / "own.json"), None)


def test_unknown_tokens_and_untrained_positions_are_noted_once(suite, tmp_path, capsys):
    opened = suite(["own"], "train.max_length=40")
    _read(opened, own_task(tmp_path))
    assert capsys.readouterr().out == ""
    _read(opened, own_task(tmp_path, "\u6f22 " * 20 + "aa " * 80))
    out = capsys.readouterr().out
    assert "train: 52.6 % of the tokens are [UNK], most frequent: \u6f22;" in out  # 20 of 38
    assert "train.max_length = 40, but the model was pretrained on rows of 32 tokens" in out
    train(opened, "own")
    report = write_report(opened.out)
    assert sum("[UNK]" in note for note in report["notes"]) == 2  # of train and valid
    assert "rows of 32" in (opened.out / "report.md").read_text()


def test_the_fingerprint_of_examples_is_that_of_earlier_versions():
    rows = [["0", "aa", None, 1], ["1", "ab", "ac", None]]
    earlier = hashlib.sha256(json.dumps([rows, rows[:1]]).encode()).hexdigest()
    examples = [Example(*row) for row in rows]
    assert _digest([examples, examples[:1]]) == earlier
    found = [example._replace(candidate=Candidate("0", "x")) for example in examples]
    assert _digest([found, examples[:1]]) != earlier


def test_notes_count_shares():
    special = SimpleNamespace(special_ids=SimpleNamespace(cls=2, sep=3, unk=1))
    task = Task(name="t", kind="regression", splits={"train": "x"}, label_range=(0.0, 5.0))
    examples = [Example("0", "", None, label) for label in (1.0, 2.0, 9.0, -3.0)]
    encoded = [Encoded([2, 5, 6, 3], 4, 0), Encoded([2, 3], 2, 0), *[Encoded([2, 7, 3], 3, 0)] * 2]
    notes = split_notes(task, "valid", examples, encoded, special)
    assert [note.split(" %")[0] for note in notes] == ["valid: 25.0", "valid: 50.0"]
    assert "the first is 9" in notes[1]
    constant = [example._replace(label=1.0) for example in examples]
    assert "the same label" in split_notes(task, "valid", constant, encoded, special)[-1]
    assert length_note(128, {"train": 32}, 32) == length_note(128, {"train": 90}, None) == []
    assert "examples of train are longer" in length_note(128, {"train": 33, "valid": 9}, 32)[0]


@pytest.mark.parametrize("kind", ["classification", "pairs", "token_classification"])
def test_examples_that_are_cut_are_noted_with_the_share_of_the_tokens(tmp_path, kind):
    tokenizer = load_tokenizer(run_folders.vocabulary(tmp_path))
    has_words = kind == "token_classification"
    task = Task(
        name="t",
        kind="classification" if kind == "pairs" else kind,
        splits={"train": "x"},
        labels=["O", "X"],
    )

    def notes(long, short):
        texts = [["aa"] * n if has_words else "aa " * n for n in [30] * long + [10] * short]
        second = "aa " * 5 if kind == "pairs" else None
        examples = [
            Example("0", text, second, [i % 2] * len(text) if has_words else i % 2)
            for i, text in enumerate(texts)
        ]
        rows = encode(examples, task, tokenizer, 20)
        return split_notes(task, "train", examples, rows, tokenizer)

    (note,) = notes(1, 3)
    assert "train: 25.0 % of the examples have more than 20 tokens" in note
    # 30 words in 18 places; of a pair, 35 words in 17 places
    share = 100 * 18 / (35 + 3 * 15) if kind == "pairs" else 100 * 12 / 60
    assert f"; {share:.1f} % of all tokens are left out" in note
    assert ("get the tag O without a prediction" in note) == has_words
    assert notes(0, 4) == []
    assert len(notes(1, 149)) == has_words  # a small share


@pytest.mark.parametrize("kind", ["classification", "token_classification"])
def test_labels_of_which_most_occur_once_are_noted(kind):
    special = SimpleNamespace(special_ids=SimpleNamespace(cls=2, sep=3, unk=1))
    is_text = kind == "classification"
    names = [str(i) for i in range(40)]
    task = Task(name="t", kind=kind, splits={"train": "x"}, labels=names, text_a="a", label="b")

    def notes(labels, split="train"):
        labels = labels if is_text else [labels[:9], labels[9:]]
        examples = [Example("0", "x" if is_text else ["x"], None, label) for label in labels]
        encoded = [Encoded([2, 5, 3], 3, 0)] * len(examples)
        return split_notes(task, split, examples, encoded, special)

    (note,) = notes(list(range(40)))
    assert "train: 40 different " in note and "label = 'b' and text_a = 'a'" in note
    assert notes([*range(20), *range(20)]) == notes(list(range(40)), "valid") == []
    assert len(notes([*range(21), *range(19)])) == 1
    assert notes([0, 1, 2, 3]) == []  # a small trial


@pytest.mark.parametrize("second", [0.0, 0.5])
@pytest.mark.parametrize("sharing", ["shared", "gdes"])
def test_pairs_of_a_run_whose_rows_had_one_segment_are_noted(
    suite, tmp_path, capsys, sharing, second
):
    run = run_folders.config(sharing)
    state = true_state(run_folders.objective(run))
    tables = "embedding_deltas" if sharing == "gdes" else "embeddings"
    moment = torch.full_like(state[f"{tables}.token_type.weight"], 0.5)
    moment[1] = second
    weights = run_folders.SingleProcessWeights(state)
    weights.full_tensor = lambda name, kind: (
        moment if "token_type" in name and kind != "master" else state[name]
    )
    values = run.model_dump(mode="json")
    checkpointer.save(weights, tmp_path / "run" / "ckpt", "final", TrainingState(7), values, {})
    opened = suite(["own"], model=load_pretrained(tmp_path / "run"))
    assert opened.pretrained.trained_segments == (2 if second else 1)
    for task, is_noted in (
        (own_task(tmp_path), False),
        (own_task(tmp_path, text_b="sentence"), not second),
    ):
        (opened.out / "own" / "task.json").unlink(missing_ok=True)
        _read(opened, task)
        assert ("--packing google" in capsys.readouterr().out) == is_noted
    opened = opened._replace(random_init=True)
    (opened.out / "own" / "task.json").unlink()
    _read(opened, task)
    assert "--packing google" not in capsys.readouterr().out


@pytest.mark.parametrize("architecture", ["electra", "modernbert"])
def test_segments_of_a_checkpoint_without_moments_are_not_known(tmp_path, architecture):
    run_folders.pretrained(tmp_path / "run", architecture=architecture)
    assert load_pretrained(tmp_path / "run").trained_segments is None


@pytest.mark.parametrize("kind", ["classification", "token_classification"])
def test_the_note_on_unknown_tokens_names_printable_words(tmp_path, kind):
    tokenizer = load_tokenizer(run_folders.vocabulary(tmp_path))
    words = ["aa", "\u6f22", "\u6f22", "q9" * 40, "\u202eab", "\u6f22"]
    is_text = kind == "classification"
    task = Task(name="t", kind=kind, splits={"train": "x"}, labels=["O", "X"])
    text, label = (" ".join(words), 0) if is_text else (words, [0] * len(words))
    both = [Example("0", text, "zz9" if is_text else None, label)]
    encoded = encode(both, task, tokenizer, 128)
    (note,) = split_notes(task, "train", both, [*encoded, *encoded], tokenizer)
    named = note.partition("most frequent: ")[2].partition(";")[0].split(" ")
    assert named[0] == "\u6f22" and "q9" * 10 + "..." in named and note.isprintable()
    assert ("zz9" in named) == is_text and "aa" not in named and "\u202e" not in note
    unseen = [Example("0", "" if is_text else ["\x00"], None, label)]
    row = [Encoded([2, 1, 3], 3, 0)]
    assert "words without a character" in split_notes(task, "train", unseen, row, tokenizer)[0]


@pytest.mark.parametrize("length", [100, 101])
@pytest.mark.parametrize("kind", ["classification", "token_classification"])
def test_the_note_on_unknown_tokens_names_the_limit_of_wordpiece(tmp_path, kind, length):
    """One [UNK] of 101 characters is a small share of 150 tokens, and a large one of the text."""
    tokenizer = load_tokenizer(run_folders.vocabulary(tmp_path))
    words = [*["aa"] * 150, "a" * length]
    is_text = kind == "classification"
    task = Task(name="t", kind=kind, splits={"train": "x"}, labels=["O", "X"])
    text, label = (" ".join(words), 0) if is_text else (words, [0] * len(words))
    examples = [Example("0", text, None, label)]
    notes = split_notes(task, "train", examples, encode(examples, task, tokenizer, 512), tokenizer)
    if length == 100:
        assert not any("WordPiece" in note for note in notes)
    else:
        (note,) = notes
        assert LONG_WORDS in note and "words of more than 100 characters" in note
        assert "0.7 % of the tokens are [UNK], 25.2 % of the characters" in note
        assert "a" * 20 + "..." in note and "a" * 21 not in note


def test_a_seed_without_an_applied_step_or_with_nan_has_diverged(tmp_path):
    seed = SeedRun.__new__(SeedRun)
    assert seed._finish(TrainingState(step=0, skipped=9)) == {}
    row = np.array([0.1, np.nan])
    assert not Predictions([0], [np.zeros(2), row], {"accuracy": 1.0}).is_finite
    seed.config = SimpleNamespace(train=SimpleNamespace(select="last"))
    seed.task = SimpleNamespace(splits=["train", "valid"])
    seed._predict = lambda split: Predictions([0], [row], {"accuracy": 1.0})
    assert seed._finish(TrainingState(step=9)) == {}


# ------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        '{"status": "won"}',
        '{"status": "done", "scores": []}',
        '{"status": "done", "scores": {"valid": 3}}',
        '{"status": "done", "scores": {"valid": {"accuracy": "1"}}}',
        '{"status": "done", "origin": {}}',
        '{"status": "done", "status": "done"}',
        '{"status": ' + "[" * 1000,
    ],
)
def test_a_damaged_result_is_named(tmp_path, content):
    folder = tmp_path / "own" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(content)
    for reader in (read_results, write_report, lambda path: write_submission(path, path / "z.zip")):
        with pytest.raises(UserError, match=r"seed-0/result\.json"):
            reader(tmp_path)


def test_an_own_task_named_like_a_glue_task_is_not_compared(tmp_path):
    """Earlier versions took such names."""
    folder = tmp_path / "sst2" / "seed-0"
    folder.mkdir(parents=True)
    result = {"status": "done", "scores": {"valid": {"accuracy": 0.5}}}
    (folder / "result.json").write_text(json.dumps(result))
    own = Task(name="sst2", splits={"train": "x"}, text_a="review", metrics=["accuracy"])
    for task, is_compared in ((own, False), (None, True)):
        if task is not None:
            described = {"task": task.model_dump(mode="json"), "examples": "0"}
            (tmp_path / "sst2" / "task.json").write_text(json.dumps(described))
        else:
            (tmp_path / "sst2" / "task.json").unlink()
        assert bool(write_report(tmp_path)["comparison"]) == is_compared


def test_names_of_folders_stay_in_their_cells_of_the_report(tmp_path):
    folder = tmp_path / "a|b\n# x\x1b[2J" / "seed-0"
    folder.mkdir(parents=True)
    result = {"status": "done", "scores": {"valid": {"f1": 1.0}}, "origin": "\x1b[31m\n# run"}
    (folder / "result.json").write_text(json.dumps(result))
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "\x1b" not in text and "\n# run" not in text and "\n# x" not in text
    assert "a\\|b" in text


@pytest.mark.parametrize("cells", ["0", "0\tx\n1", "0\tnan", "0\t\x1b[31m"])
def test_damaged_predictions_are_named_by_submit(tmp_path, monkeypatch, cells):
    folder = tmp_path / "stsb" / "seed-0"
    folder.mkdir(parents=True)
    result = {"status": "done", "scores": {"valid": {"spearman": 0.5}}}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "predictions-test.tsv").write_text(f"index\tprediction\n{cells}\n")
    files = {"STS-B": ("stsb", "test", cells.count("\n") + 1)}
    monkeypatch.setattr("electra_ds.finetuning.submit.FILES", files)
    with pytest.raises(UserError, match=r"predictions-test\.tsv: .* is not a number"):
        write_submission(tmp_path, tmp_path / "z.zip")


def test_predict_checks_its_paths_before_the_model(tmp_path):
    run_folders.fine_tuned(tmp_path / "seed-0", "classification")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"sentence": "aa"}\n')
    (tmp_path / "folder").mkdir()
    for out, part in (
        (rows, "is also an input and would be overwritten"),
        (tmp_path / "folder", "is a folder; expected a file"),
        (rows / "x", "cannot be written"),
    ):
        with pytest.raises(UserError, match=part):
            predict(tmp_path / "nowhere", out, rows)
    with pytest.raises(UserError, match="leave it out with --input"):
        predict(tmp_path / "seed-0", tmp_path / "p", rows, data=tmp_path)
    assert rows.read_text() == '{"sentence": "aa"}\n'
