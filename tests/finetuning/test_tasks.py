"""Tasks: GLUE files, tasks of the user, metrics; errors name file and line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from electra_ds.common.errors import UserError
from electra_ds.finetuning.examples import Example, read_examples, read_file
from electra_ds.finetuning.metrics import entities, score
from electra_ds.finetuning.tasks import GLUE, Task, load_task, task_names

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "glue"
# Task -> folder, training file, test file (| for a tab), expected training example.
MNLI = "index|promptID|pairID|genre|sentence1_binary_parse|sentence1|sentence2"
SHAPES = {
    "cola": ("CoLA", ['gj04|0|*|A "quote'], ["index|sentence", "0|A test"], ('A "quote', None, 0)),
    "sst2": (
        "SST-2",
        ["sentence|label", "fine film |1"],
        ["index|sentence", "0|A test"],
        ("fine film", None, 1),
    ),
    "mrpc": (
        "MRPC",
        ["Quality|#1 ID|#2 ID|#1 String|#2 String", '1|7|8|"a|b"'],
        ["index|#1 ID|#2 ID|#1 String|#2 String", "0|7|8|A test|b"],
        ('"a', 'b"', 1),
    ),
    "stsb": (
        "STS-B",
        ["index|genre|sentence1|sentence2|score", "0|news|a|b|3.800"],
        ["index|genre|sentence1|sentence2", "0|news|A test|b"],
        ("a", "b", 3.8),
    ),
    "qqp": (
        "QQP",
        ["id|qid1|qid2|question1|question2|is_duplicate", "7|1|2|a?|b?|0"],
        ["id|question1|question2", "0|A test|b"],
        ("a?", "b?", 0),
    ),
    "mnli": (
        "MNLI",
        [f"{MNLI}|label1|gold_label", "0|1|2|news|(a)|a|b|entailment|neutral"],
        [MNLI, "0|1|2|news|(a)|A test|b"],
        ("a", "b", 2),
    ),
    "qnli": (
        "QNLI",
        ["index|question|sentence|label", "0|a|b|not_entailment"],
        ["index|question|sentence", "0|A test|b"],
        ("a", "b", 1),
    ),
    "rte": (
        "RTE",
        ["index|sentence1|sentence2|label", "0|a|b|entailment"],
        ["index|sentence1|sentence2", "0|A test|b"],
        ("a", "b", 0),
    ),
    "wnli": (
        "WNLI",
        ["index|sentence1|sentence2|label", "0|a|b|1"],
        ["index|sentence1|sentence2", "0|A test|b"],
        ("a", "b", 1),
    ),
}


def write_glue(root, name):
    """Write the files of one GLUE task; the training file has a BOM and ends lines with \\r\\n."""
    folder, train, test, _ = SHAPES[name]
    (root / folder).mkdir()
    for kind in ("_matched", "_mismatched") if name == "mnli" else ("",):
        for split, rows in (("dev", train), ("test", test)):
            (root / folder / f"{split}{kind}.tsv").write_text(
                "\n".join(rows).replace("|", "\t") + "\n"
            )
    text = "\ufeff" + "\r\n".join(train).replace("|", "\t") + "\r\n"
    (root / folder / "train.tsv").write_text(text, encoding="utf-8", newline="")


@pytest.mark.parametrize("name", SHAPES)
def test_each_glue_task_is_read_from_the_root_and_from_its_folder(tmp_path, name):
    write_glue(tmp_path, name)
    task = load_task(SHAPES[name][0].lower(), tmp_path)
    assert load_task(name.upper(), tmp_path / SHAPES[name][0]).splits == task.splits
    for split in ["train", *task.valid_splits]:
        assert read_examples(task, split) == [Example("0", *SHAPES[name][-1])]
    tests = [split for split in task.splits if split.startswith("test")]
    assert len(tests) == (2 if name == "mnli" else 1) == len(task.valid_splits)
    for split in tests:
        assert read_examples(task, split)[0][:2] == ("0", "A test")
        assert read_examples(task, split)[0].label is None
    assert (
        Task.model_validate(json.loads(task.model_dump_json())) == task
    )  # as in meta.json of a fine-tuned model


def test_the_diagnostic_set_is_a_test_split_of_mnli(tmp_path):
    write_glue(tmp_path, "mnli")
    (tmp_path / "diagnostic").mkdir()
    (tmp_path / "diagnostic" / "diagnostic.tsv").write_text(
        "index\tsentence1\tsentence2\n0\ta\tb\n"
    )
    assert read_examples(load_task("mnli", tmp_path), "test_ax") == [Example("0", "a", "b", None)]
    assert read_examples(load_task("AX", tmp_path), "test") == [Example("0", "a", "b", None)]


ROWS = {
    "cola": (8551, 1043, 1063),
    "rte": (2490, 277, 3000),
    "mrpc": (3668, 408, 1725),
    "stsb": (5749, 1500, 1379),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the four original tasks beside the checkout")
@pytest.mark.parametrize("name", ROWS)
def test_the_original_files_are_read_completely(name):
    task = load_task(name, SHARED)
    found = {split: read_examples(task, split) for split in task.splits}
    assert tuple(map(len, found.values())) == ROWS[name]
    labels = [example.label for split in ("train", "valid") for example in found[split]]
    assert (
        set(labels) == {0, 1}
        if task.labels
        else (min(labels), max(labels)) == task.label_range == (0.0, 5.0)
    )
    assert all(
        example.text_a and (example.text_b or name == "cola")
        for rows in found.values()
        for example in rows
    )


# --------------------------------------------------------------------------------------- user tasks


def test_null_values_of_a_task_come_from_the_training_file(own_task):
    rows = 'sentence,label\n"He said ""no"",\nthen left",b\nx,a\nx,b\n'
    task = own_task({"train.csv": rows})
    assert (task.name, task.labels, task.metrics) == ("own", ["a", "b"], ["accuracy"])
    assert read_examples(task, "valid")[0] == Example("0", 'He said "no",\nthen left', None, 1)
    numbers = own_task(
        {"n.tsv": "x\t9\t-2\ny\t8\t4.5\n"},
        kind="regression",
        header=False,
        text_a=0,
        label=-1,
        index=1,
    )
    assert (numbers.label_range, numbers.metrics) == ((-2.0, 4.5), ["pearson", "spearman"])
    assert read_examples(numbers, "train") == [
        Example("9", "x", None, -2.0),
        Example("8", "y", None, 4.5),
    ]
    pairs = own_task(
        {"p.jsonl": '{"l": true, "p": "x", "q": "y"}\n\n{"l": false, "p": 1, "q": "y"}\n'},
        text_a="p",
        text_b="q",
        label="l",
        metrics=["f1", "macro_f1"],
    )
    assert pairs.labels == ["false", "true"] and pairs.main_metric == "f1"
    assert read_examples(pairs, "train")[1] == Example("1", "1", "y", 0)
    (Path(task.folder) / "new.jsonl").write_text('{"p": "x", "q": "y"}')
    assert read_file(pairs, Path(task.folder) / "new.jsonl") == [Example("0", "x", "y", None)]


def test_words_and_tags_are_read_from_jsonl_and_from_conll(own_task):
    expected = Example("0", ["In", "Kyoto"], None, [1, 0])
    lines = '{"words": ["In", "Kyoto"], "tags": ["O", "B-loc"]}\n'
    column = "-DOCSTART- O\n\nIn IN O\nKyoto NNP B-loc\n\n\nok JJ O\n"
    for name, text in {"t.jsonl": lines, "t.conll": column}.items():
        task = own_task({name: text}, kind="token_classification", text_a="words", label="tags")
        assert task.labels == ["B-loc", "O"] and task.metrics == ["entity_f1", "token_accuracy"]
        assert read_examples(task, "train")[0] == expected
    assert read_examples(task, "train")[1].text_a == ["ok"]
    task = own_task(
        {"t.conll": "a X\nb Y\n"}, kind="token_classification", text_a="words", label="tags"
    )
    assert task.metrics == ["token_accuracy"]


CARD = """---
dataset_info:
  features:
  - {name: sentence, dtype: string}
  - name: label
    dtype: {class_label: {names: {"0": neg, "1": pos}}}
---
"""


def test_a_dataset_is_read_from_a_local_folder(own_task, tmp_path):
    pytest.importorskip("datasets", reason="needs the extra [hf]")
    for name, card, labels in (
        ("words", "", ["a", "b", "a", None]),
        ("numbers", CARD, [1, 0, 1, -1]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(card)
        for split, rows in (
            ("train", labels[:2]),
            ("validation", labels[2:3]),
            ("test", labels[3:]),
        ):
            lines = [
                json.dumps({"sentence": f"it is {label}", "label": label}) + "\n" for label in rows
            ]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(lines))
        task = own_task(
            {}, dataset=name, splits={"train": "train", "valid": "validation", "test": "test"}
        )
        assert task.labels == (["neg", "pos"] if card else ["a", "b"])
        found = {split: read_examples(task, split) for split in task.splits}
        assert [example.label for example in found["train"]] == ([1, 0] if card else [0, 1])
        assert found["valid"] == [Example("0", f"it is {labels[2]}", None, 1 if card else 0)]
        assert found["test"] == [Example("0", f"it is {labels[3]}", None, None)]
    with pytest.raises(UserError, match="split other"):
        own_task({}, dataset="words", splits={"train": "other", "valid": "test"})


def test_short_rows_of_qqp_are_skipped_with_a_warning(tmp_path):
    write_glue(tmp_path, "qqp")
    with open(tmp_path / "QQP" / "train.tsv", "a") as file:
        file.write("8\t1\t2\thalf a row\n")
    with pytest.warns(UserWarning, match="1 rows with too few columns"):
        assert len(read_examples(load_task("qqp", tmp_path), "train")) == 1


# ----------------------------------------------------------------------------------------- mistakes

GOOD = "sentence\tlabel\nx\ta\ny\tb\n"
TAGS = {"kind": "token_classification", "text_a": "words", "label": "tags"}
TWO = {"labels": ["O", "X"]}
MISTAKES = {  # name: files, values of the description, what the message holds
    "missing file": (
        {"a.tsv": GOOD},
        {"splits": {"train": "a.tsv", "valid": "b.tsv"}},
        ["b.tsv: No such file"],
    ),
    "missing column": (
        {"a.tsv": GOOD},
        {"text_a": "sentense"},
        ["a.tsv:2", "'sentense'; did you mean 'sentence'?"],
    ),
    "unknown label": (
        {"a.tsv": GOOD, "b.tsv": GOOD + "z\tc\n"},
        {},
        ["b.tsv:4", "unknown label 'c'", "'a', 'b'"],
    ),
    "no number": (
        {"a.tsv": "sentence\tlabel\nx\t1\ny\tnan\n"},
        {"kind": "regression"},
        ["a.tsv:3", "'nan'", "number"],
    ),
    "one number": (
        {"a.tsv": "sentence\tlabel\nx\t1\n"},
        {"kind": "regression"},
        ["every label", "1.0"],
    ),
    "columns": (
        {"a.tsv": GOOD + "z\tb\tb\n"},
        {},
        ["a.tsv:4: found 3 columns, expected 2 (sentence, label)"],
    ),
    "odd quote": ({"a.csv": 'sentence,label\nx,a\n"y" z,b\nx,b\n'}, {}, ["a.csv:3: odd quote"]),
    "open quote": ({"a.csv": 'sentence,label\nx,a\n"y,b\nx,b\nz,a\n'}, {}, ["a.csv:3: odd quote"]),
    "not UTF-8": (
        {"a.tsv": GOOD.encode() + b"caf\xe9\ta\n"},
        {},
        ["a.tsv:4", "0xe9", "UTF-8", "iconv"],
    ),
    "empty file": ({"a.tsv": GOOD, "b.tsv": ""}, {}, ["b.tsv: contains no example"]),
    "header only": (
        {"a.tsv": GOOD, "b.tsv": "sentence\tlabel\n"},
        {},
        ["b.tsv: contains no example"],
    ),
    "no label in train": (
        {"a.jsonl": '{"sentence": "x"}\n'},
        {},
        ["a.jsonl:1", "no column 'label'", "sentence"],
    ),
    "one label": ({"a.tsv": "sentence\tlabel\nx\ta\n"}, {}, ["the one label"]),
    "bad JSON": (
        {"a.jsonl": '{"sentence": "x", "label": "a"}\n{"sen\n'},
        {},
        ["a.jsonl:2: found", "JSON object"],
    ),
    "no object": ({"a.jsonl": "[1]\n"}, {}, ["a.jsonl:1: found"]),
    "format": ({"a.txt": GOOD}, {}, ["a.txt", "format: tsv, csv, jsonl, conll"]),
    "tags": (
        {"a.jsonl": '{"words": ["x"], "tags": ["O", "O"]}\n'},
        TAGS | TWO,
        ["1 words and 2 tags"],
    ),
    "words": ({"a.jsonl": '{"words": "x", "tags": ["O"]}\n'}, TAGS | TWO, ["a list of words"]),
    "conll": ({"a.conll": "\na O\nb\n"}, TAGS, ["a.conll:2", "different numbers of columns"]),
    "key": (
        {"a.tsv": GOOD},
        {"lables": ["a", "b"]},
        ["own.json: lables: unknown key; did you mean 'labels'?"],
    ),
    "split": (
        {"a.tsv": GOOD},
        {"splits": {"train": "a.tsv", "dev": "a.tsv"}},
        ["splits.dev: expected train, valid"],
    ),
    "no valid": (
        {"a.tsv": GOOD},
        {"splits": {"train": "a.tsv"}},
        ["own.json: splits: found train; expected at least"],
    ),
    "name": ({"a.tsv": GOOD}, {"name": "a/b"}, ["own.json: name", "a/b"]),
    "metric": (
        {"a.tsv": GOOD},
        {"metrics": ["pearson"]},
        ["'pearson' is not a metric of classification", "accuracy"],
    ),
    "f1 of three": ({"a.tsv": GOOD + "z\tc\n"}, {"metrics": ["f1"]}, ["f1 is for two labels"]),
    "no pair": ({"a.tsv": GOOD}, {"both_orders": True}, ["own.json: both_orders needs pairs"]),
    "no label": (
        {"a.tsv": GOOD},
        {"label": None},
        ["own.json: label: null, but there is a split train"],
    ),
    "range": (
        {"a.tsv": GOOD},
        {"kind": "regression", "label_range": [5, 5]},
        ["own.json: label_range: [5.0, 5.0]"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_reported_with_file_and_line(own_task, name):
    files, values, parts = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        task = own_task(files, **values)
        for split in task.splits:
            read_examples(task, split)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_unknown_tasks_and_folders_are_reported(tmp_path):
    write_glue(tmp_path, "cola")
    (tmp_path / "news").mkdir()
    cases = (
        ("rtee", tmp_path, "did you mean 'rte'?"),
        ("rte", tmp_path / "x", "x is not a folder; expected GLUE_DIR"),
        ("RTE", None, "task rte: give --data GLUE_DIR"),
        (
            "STS-B",
            tmp_path,
            "has no folder stsb (in any spelling: STS-B for stsb, diagnostic for ax); found CoLA",
        ),
        (
            "mnli",
            tmp_path / "news",
            "found no folder; give --data the folder that contains it, or the folder with",
        ),
    )
    for name, data, part in cases:
        with pytest.raises(UserError, match=re.escape(part)):
            load_task(name, data)


def test_task_names_are_unique_and_folders_are_absolute(own_task, tmp_path, monkeypatch):
    names = task_names("RTE, rte,STS-B,own/RTE.json,glue,own/RTE.json,rtee")
    assert names[:3] == ["rte", "stsb", "own/RTE.json"] and names[-1] == "rtee"
    assert sorted(names[:2] + names[3:-1]) == sorted(GLUE.keys() - {"ax"})
    own_task({"a.tsv": GOOD})
    write_glue(tmp_path, "rte")
    monkeypatch.chdir(tmp_path)
    tasks = [load_task("own.json", None), load_task("rte", Path())]
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert [len(read_examples(task, "train")) for task in tasks] == [2, 1]


# ------------------------------------------------------------------------------------------ metrics


def scores(truth, predictions, metrics, kind="classification", labels=("a", "b")):
    task = Task(name="t", kind=kind, splits={"train": "x"}, labels=list(labels), metrics=metrics)
    return score(
        task, predictions, [Example(str(i), "", None, label) for i, label in enumerate(truth)]
    )


def test_metrics_equal_those_computed_by_hand():
    truth, predicted = [1, 1, 1, 0, 0, 1], np.array([1, 1, 0, 0, 1, 0])  # tp 2, fp 1, fn 2, tn 1
    found = scores(truth, predicted, ["accuracy", "f1", "macro_f1", "matthews"])
    assert list(found) == ["accuracy", "f1", "macro_f1", "matthews"]
    f1, other = 2 * 2 / (2 * 2 + 1 + 2), 2 * 1 / (2 * 1 + 2 + 1)
    matthews = (2 * 1 - 1 * 2) / np.sqrt(3 * 4 * 2 * 3)
    assert found == pytest.approx(
        {"accuracy": 0.5, "f1": f1, "macro_f1": (f1 + other) / 2, "matthews": matthews}
    )
    x, y = [0.0, 1.0, 2.0, 5.0], [1.0, 3.0, 2.0, 2.5]
    centred = np.array(x) - 2, np.array(y) - 2.125
    pearson = (centred[0] * centred[1]).sum() / np.sqrt(
        (centred[0] ** 2).sum() * (centred[1] ** 2).sum()
    )
    found = scores(x, np.array(y), ["pearson", "spearman"], "regression")
    assert found == pytest.approx(
        {"pearson": pearson, "spearman": 1 - 6 * (0 + 4 + 1 + 1) / (4 * 15)}
    )


def test_predictions_without_skill_score_zero_and_nan_gives_nan():
    assert scores([0, 1, 1], [0, 0, 0], ["matthews", "f1"]) == {"matthews": 0.0, "f1": 0.0}
    names = ["pearson", "spearman"]
    assert scores([0.0, 1.0, 2.0], [0.3, 0.3, 0.3], names, "regression") == {
        "pearson": 0.0,
        "spearman": 0.0,
    }
    assert np.isnan(
        list(scores([0.0, 1.0, 2.0], [0.3, np.nan, 0.3], names, "regression").values())
    ).all()


def test_entities_count_only_when_whole():
    assert entities(["B-x", "I-x", "O", "I-y", "I-y", "B-y", "B-y", "I-x"]) == {
        (0, 2, "x"),
        (3, 5, "y"),
        (5, 6, "y"),
        (6, 7, "y"),
        (7, 8, "x"),
    }
    kind, labels = "token_classification", ["O", "B-x", "I-x"]
    found = scores(
        [[1, 2, 0], [1, 0]], [[1, 0, 0], [1, 1]], ["entity_f1", "token_accuracy"], kind, labels
    )
    # right: the second (0, 1, x)
    assert found == pytest.approx({"entity_f1": 2 * 1 / (2 + 3), "token_accuracy": 3 / 5})
    assert scores([[0]], [[0]], ["entity_f1"], kind, labels) == {"entity_f1": 0.0}
    with pytest.raises(UserError, match="needs BIO tags"):
        scores([[0]], [[0]], ["entity_f1"], kind, ["NN", "O"])


def test_glue_has_all_tasks():
    assert set(SHAPES) | {"ax"} == set(GLUE)


def test_the_main_metric_is_that_of_the_paper(tmp_path):
    found = {}
    for name in SHAPES:
        write_glue(tmp_path, name)
        found[name] = load_task(name, tmp_path).main_metric
    assert {name: metric for name, metric in found.items() if metric != "accuracy"} == {
        "cola": "matthews",
        "stsb": "spearman",
    }
