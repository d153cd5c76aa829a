"""Files of tasks as people have them: hidden labels, blank lines, odd names, foreign datasets."""

import json
import os
import re
from types import SimpleNamespace

import pytest

from electra_ds.common.errors import UserError
from electra_ds.finetuning.examples import Example, outside_range, read_examples, read_file
from electra_ds.finetuning.metrics import entities
from electra_ds.finetuning.predict import predictions_table
from electra_ds.finetuning.tasks import DIAGNOSTIC, Task, load_task, task_names

GOOD = "sentence\tlabel\nx\ta\ny\tb\n"
TAGS = {"kind": "token_classification", "text_a": "words", "label": "tags"}


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def with_test(train, test):
    """Files of a task with a test split, and its splits."""
    return {"a.jsonl": train, "t.jsonl": test}, {
        "splits": {"train": "a.jsonl", "valid": "a.jsonl", "test": "t.jsonl"}
    }


# ------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("hidden", [-1, -1.0, "-1", "", -100])
def test_a_hidden_label_of_a_test_split_is_missing(own_task, hidden):
    rows = jsonl(*({"sentence": "x", "label": label} for label in (0, 1)))
    files, splits = with_test(rows, jsonl({"sentence": "x", "label": hidden}))
    assert read_examples(own_task(files, **splits), "test")[0].label is None
    task = own_task(files, kind="regression", label_range=[0, 5], **splits)
    assert read_examples(task, "test")[0].label is None
    tags = jsonl({"words": ["x", "y"], "tags": ["A", "B"]})
    files, splits = with_test(tags, jsonl({"words": ["x", "y"], "tags": [hidden, hidden]}))
    assert read_examples(own_task(files, **TAGS, **splits), "test")[0].label is None


def test_minus_one_is_a_label_where_the_task_has_it(own_task):
    rows = jsonl(*({"sentence": "x", "label": label} for label in (-1, 0, 1)))
    files, splits = with_test(rows, rows)
    task = own_task(files, **splits)
    assert task.labels == ["-1", "0", "1"]
    assert [example.label for example in read_examples(task, "test")] == [0, 1, 2]
    task = own_task(files, kind="regression", **splits)
    assert [example.label for example in read_examples(task, "test")] == [-1, 0, 1]


def test_labels_outside_of_the_range_are_refused_in_train_and_noted_elsewhere(own_task):
    good = jsonl(*({"sentence": "x", "label": label} for label in (0, 2, 5)))
    odd = good + jsonl({"sentence": "x", "label": 7})
    task = own_task({"a.jsonl": odd, "b.jsonl": good}, kind="regression", label_range=[0, 5])
    with pytest.raises(UserError, match=r"1 of 4 labels are outside label_range \[0, 5\]"):
        read_examples(task, "train")
    task = own_task({"a.jsonl": good, "b.jsonl": odd}, kind="regression", label_range=[0, 5])
    assert outside_range(task, read_examples(task, "valid")) == [7.0]
    alone = jsonl({"sentence": "x", "label": 500})
    task = own_task({"a.jsonl": good, "b.jsonl": alone}, kind="regression", label_range=[0, 5])
    with pytest.raises(UserError, match="1 of 1 labels are outside"):
        read_examples(task, "valid")


def test_tags_of_bioes_are_scored_and_other_tags_are_refused_before_the_training(own_task):
    spans = {(0, 1, "x"), (1, 3, "y"), (3, 4, "y")}
    assert entities(["S-x", "B-y", "E-y", "S-y"]) == spans
    assert entities(["U-x", "B-y", "L-y", "U-y"]) == spans
    assert entities(["B-x", "E-x", "I-x"]) == {(0, 2, "x"), (2, 3, "x")}
    for tags, metric in (
        (["S-x", "O"], "entity_f1"),
        (["B-x", "PER"], "token_accuracy"),
        (["x-B", "O"], "token_accuracy"),
    ):
        rows = {"a.jsonl": jsonl({"words": ["a", "b"], "tags": tags})}
        assert own_task(rows, **TAGS).main_metric == metric
    with pytest.raises(UserError, match=r"entity_f1 needs tags of BIO or BIOES .* 'PER'"):
        own_task(
            {"a.jsonl": jsonl({"words": ["a", "b"], "tags": ["B-x", "PER"]})},
            metrics=["entity_f1"],
            **TAGS,
        )


def rows_with(*labels):
    return jsonl(*({"sentence": "x", "label": label} for label in labels))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("café", "cafe\u0301"),
        ("pos", "pos\u200f"),
        ("a b", "a\u00a0 b"),
        ("O", "\u041e"),
        ("o\u2060", "\u03bf"),
        ("x", "x\ufe0f"),
        ("\u0451", "\u00eb"),  # a letter of another script with a mark
        ("\uff21-\uff42", "A-b"),  # full width
        ("\uff76\uff9e", "\u30ac"),  # half width
        ("\u3078", "\u30d8"),  # hiragana, katakana
        ("\u0110a", "\u00d0a"),
        ("\u062e\u06cc\u0644\u06cc", "\u062e\u064a\u0644\u064a"),  # yeh of Persian, of Arabic
        ("\u0645\u0648\u0633\u06cc", "\u0645\u0648\u0633\u0649"),
        ("\u06a9\u06f1", "\u0643\u0661"),  # kaf and digit of Persian, of Arabic
        ("\u0e41\u0e22", "\u0e40\u0e40\u0e22"),  # one vowel sign or two
        ("\u0e19\u0e49\u0e33", "\u0e19\u0e4d\u0e49\u0e32"),  # parts in another order
        ("\u0b95\u0bcc", "\u0b95\u0bc6\u0bb3"),  # a vowel sign and a letter of the same shape
    ],
)
def test_labels_that_look_equal_are_refused_with_both_written_out(own_task, one, two):
    with pytest.raises(UserError, match="look equal") as caught:
        own_task({"a.jsonl": rows_with(one, two, "other")})
    assert ascii(one) in str(caught.value) and ascii(two) in str(caught.value)
    task = own_task({"a.jsonl": rows_with(one, two)}, labels=[one, two])  # listed on purpose
    assert task.labels == [one, two]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (1, 1.0),
        ("1", 1.0),
        (0, "00"),
        (-2, "-2.0"),
        (0, "-0"),
        ("\u06f1", "\u0661"),
        (1, "\uff11"),
        (2.5, "\u06f2\u066b\u06f5"),
    ],
)
def test_labels_that_are_one_number_in_two_spellings_are_refused(own_task, one, two):
    with pytest.raises(UserError, match="are the same number in another spelling"):
        own_task({"a.jsonl": rows_with(one, two, 7)})
    listed = sorted({str(one), str(two)})
    assert own_task({"a.jsonl": rows_with(one, two)}, labels=listed).labels == listed
    assert own_task({"a.jsonl": rows_with(1, 1.5, 10, "1e1", "v1")}).labels


def test_labels_that_differ_to_the_eye_are_accepted(own_task):
    labels = [
        "A",
        "a",
        "\u0411",
        "б",
        "e",
        "é",
        "1",
        "\u2460",
        "ти",
        "Ти",
        "\u0e01\u0e34",
        "\u0e01",
        "\u0639\u0644\u0649",  # two words of Arabic
        "\u0639\u0644\u064a",
        "\u0e41\u0e01",
        "\u0e40\u0e01",
        "x2",
        "x\u00b2",
    ]
    assert own_task({"a.jsonl": rows_with(*labels)}).labels == sorted(labels)


@pytest.mark.parametrize("tag", ["\u0412-x", "\u041e", "\u0406-x", "\u200eB-x", "\uff22\uff0dx"])
def test_a_tag_that_only_looks_like_one_of_bio_is_refused(own_task, tag):
    rows = jsonl({"words": ["a", "b"], "tags": [tag, "E-y"]})
    with pytest.raises(UserError, match="looks like one of BIO") as caught:
        own_task({"a.jsonl": rows}, **TAGS)
    assert ascii(tag) in str(caught.value)
    own = jsonl({"words": ["a", "b"], "tags": ["NOUN", "\u0413\u041b"]})
    assert own_task({"a.jsonl": own}, **TAGS).main_metric == "token_accuracy"


def test_a_tag_with_a_space_is_refused(own_task):
    rows = jsonl({"words": ["a", "b"], "tags": ["B PER", "O"]})
    for labels in (None, ["B PER", "O"]):
        with pytest.raises(UserError, match=r"tag 'B PER' has white space inside"):
            own_task({"a.jsonl": rows}, labels=labels, **TAGS)
    assert own_task({"a.jsonl": rows_with("B PER", "O")}).labels == ["B PER", "O"]  # no tags


# -------------------------------------------------------------------------------------------- names


def test_a_file_name_with_a_space_needs_a_key_name(own_task, tmp_path):
    own_task({"a.tsv": GOOD})
    spaced = tmp_path / "Мои отзывы.json"
    spaced.write_text((tmp_path / "own.json").read_text())
    with pytest.raises(UserError, match=r'rename the file, or add "name": "Мои-отзывы"'):
        load_task(str(spaced), None)
    assert own_task({"a.tsv": GOOD}, name="Мои-отзывы").name == "Мои-отзывы"
    assert own_task({"a.tsv": GOOD}, name="\u0e17\u0e35\u0e48").name  # letters with marks


def test_a_column_in_another_unicode_form_is_suggested(own_task):
    rows = jsonl({"cafe\u0301": "x", "cafes": "x", "label": "a"})
    with pytest.raises(UserError, match="another Unicode form") as caught:
        read_examples(own_task({"a.jsonl": rows}, text_a="café", labels=["a", "b"]), "train")
    assert ascii("cafe\u0301") in str(caught.value)


@pytest.mark.parametrize(
    "name", ["..", ".", ".x", "config.json", "Report.md", "a/b", "a\\b", "a\n", "", "x" * 300]
)
def test_a_name_that_is_no_folder_of_results_is_refused(own_task, name):
    with pytest.raises(UserError, match=r"own\.json: name"):
        own_task({"a.tsv": GOOD}, name=name)


@pytest.mark.parametrize("split", ["test_../../x", "valid_a/b", "test_", "train_x", "test_\n"])
def test_a_split_that_is_no_name_of_a_file_is_refused(own_task, split):
    with pytest.raises(UserError, match="expected train, valid, valid_x, test or test_x"):
        own_task({"a.tsv": GOOD}, splits={"train": "a.tsv", "valid": "a.tsv", split: "a.tsv"})


def test_an_own_task_with_the_name_of_a_glue_task_is_refused(own_task):
    with pytest.raises(UserError, match="'sst2' is the name of a GLUE task"):
        own_task({"a.tsv": GOOD}, name="sst2")
    assert not Task(name="sst2", splits={"train": "x"}, text_a="review").is_glue
    assert not Task(name="own", splits={"train": "x"}).is_glue


def test_a_path_with_commas_is_one_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    (tmp_path / "a,b" / "x,y.json").write_text("{}")
    assert task_names("rte,a,b/x,y.json, cola") == ["rte", "a,b/x,y.json", "cola"]
    assert task_names("a,b/z.json") == ["a", "b/z.json"]  # no such file
    with pytest.raises(UserError, match="names no task"):
        task_names(" ,")


def test_files_beside_the_description_and_in_data_are_ambiguous(own_task, tmp_path):
    own_task({"a.tsv": GOOD})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tsv").write_text(GOOD)
    with pytest.raises(UserError, match="both exist; leave out --data"):
        load_task(str(tmp_path / "own.json"), tmp_path / "data")


def test_keys_and_labels_with_tabs_stay_in_their_cells(own_task):
    rows = jsonl(
        {"sentence": "x", "label": "a\tb", "id": "1\n2"},
        {"sentence": "y", "label": "\x1b[31m", "id": "3\u2028"},
    )
    task = own_task({"a.jsonl": rows}, index="id")
    examples = read_examples(task, "train")
    table = predictions_table(task, examples, [0, 1], [[0.0, 1.0], [1.0, 0.0]])
    lines = table.decode().split("\n")
    assert len(lines) == 4 and all(len(line.split("\t")) == 4 for line in lines[:3])
    assert "\x1b" not in "".join(lines) and len("".join(lines).splitlines()) == 1


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n \n\n"])
def test_blank_last_lines_are_no_rows(own_task, tmp_path, end):
    task = own_task({"a.tsv": GOOD})
    for head, row in (("sentence", "x"), ("sentence\tlabel", "x\ta")):
        (tmp_path / "b.tsv").write_text(f"{head}\n{row}\n{row}{end}", newline="")
        assert len(read_file(task, tmp_path / "b.tsv")) == 2


def test_words_keep_their_no_break_spaces_and_line_separators(own_task):
    column = "New\u00a0York\tB-loc\n\u3000x\tO\na\u2028b\tO\n\nplain B-loc\n"
    task = own_task({"a.conll": column}, **TAGS)
    assert [example.text_a for example in read_examples(task, "train")] == [
        ["New\u00a0York", "x", "a\u2028b"],
        ["plain"],
    ]
    tsv = "sentence\tlabel\na\u2028b\u0085c\u00a0d\x0be\ta\nf\tb\n"
    assert (
        read_examples(own_task({"a.tsv": tsv}), "train")[0].text_a == "a\u2028b\u0085c\u00a0d\x0be"
    )


def test_a_very_long_field_is_read(own_task):
    text = "word " * 100_000
    rows = {"a.csv": f"sentence,label\n{text},a\nx,b\n"}
    assert len(read_examples(own_task(rows), "train")[0].text_a) == len(text.strip())


TWICE = "sentence\tlabel\tlabel\nx\ta\tb\ny\tb\ta\n"
MISTAKES = {  # name: files, values of the description, what the message holds
    "null": ({"a.jsonl": '{"sentence": null, "label": 1}\n'}, {"labels": ["1", "2"]}, "is null"),
    "a null label": ({"a.jsonl": jsonl({"sentence": "x", "label": None})}, {}, "'label' is null"),
    "surrogate": ({"a.jsonl": '{"sentence": "\\ud800", "label": 1}\n'}, {}, "a.jsonl:1: found"),
    "duplicate key": ({"a.jsonl": '{"sentence": "x", "sentence": "y"}\n'}, {}, "occurs twice"),
    "digits": ({"a.jsonl": '{"sentence": ' + "1" * 5000 + "}\n"}, {}, "5,000 digits"),
    "nested": ({"a.jsonl": '{"sentence": ' + "[" * 100_000 + "\n"}, {}, "a.jsonl:1: found"),
    "Infinity": ({"a.jsonl": '{"sentence": "x", "label": Infinity}\n'}, {}, "not a JSON number"),
    "two columns": ({"a.tsv": TWICE}, {}, "several columns are named 'label'"),
    "gzip": ({"a.tsv": b"\x1f\x8b\x08\x00" + bytes(9)}, {}, "compressed with gzip"),
    "parquet": ({"a.jsonl": b"PAR1" + bytes(9)}, {}, "it is Parquet"),
    "UTF-16": ({"a.tsv": GOOD.encode("utf-16")}, {}, "it is UTF-16"),
    "UTF-16 without a mark": (
        {"a.tsv": GOOD.encode("utf-16-le")},
        {},
        "it is UTF-16LE; try: iconv -f UTF-16LE",
    ),
    "an array": ({"a.json": '[{"sentence": "x", "label": 1}]\n'}, {}, "jq -c '.[]'"),
    "an array over lines": ({"a.json": '[\n{"sentence": "x", "label": 1}\n]\n'}, {}, "jq -c '.[]'"),
    "quoted header": (
        {"a.tsv": '"sentence"\t"label"\n"x"\t"a"\n'},
        {},
        "quotes are literal in TSV",
    ),
    "decimal comma": (
        {"a.tsv": "sentence\tlabel\nx\t3,50\n"},
        {"kind": "regression"},
        "is '3,50'; expected a number with a decimal point, not a comma",
    ),
    "windows-1251": ({"a.tsv": GOOD.encode() + "да\ta\n".encode("cp1251")}, {}, "windows-1251"),
    "semicolons": (
        {"a.csv": GOOD.replace("\t", ";")},
        {},
        "a.csv:1: found one column, 'sentence;label'; expected columns separated by ','; the line "
        "looks separated by ';'",
    ),
    "tabs in csv": ({"a.csv": GOOD}, {}, 'give the task "format": "tsv"'),
    "commas in tsv": ({"a.tsv": GOOD.replace("\t", ",")}, {}, 'give the task "format": "csv"'),
    "suffix": ({"a.txt": GOOD}, {}, ".json (one object per line)"),
    "pointer": (
        {"a.tsv": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"},
        {},
        "is a Git LFS pointer",
    ),
    "NUL": ({"a.tsv": GOOD}, {"splits": {"train": "a\0.tsv", "valid": "a.tsv"}}, "plain file name"),
    "boolean number": (
        {"a.jsonl": jsonl({"sentence": "x", "label": True})},
        {"kind": "regression"},
        "expected a number",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_file_is_named(own_task, name):
    files, values, part = MISTAKES[name]
    with pytest.raises(UserError, match=re.escape(part)) as caught:
        read_examples(own_task(files, **values), "train")
    assert len(str(caught.value)) < 500


def test_a_byte_order_mark_before_a_description_is_ignored(own_task, tmp_path):
    own_task({"a.tsv": GOOD})
    (described,) = tmp_path.glob("*.json")
    described.write_bytes(b"\xef\xbb\xbf" + described.read_bytes())
    assert load_task(str(described), None).labels == ["a", "b"]


def test_a_fifo_among_the_files_is_refused_without_waiting(own_task, tmp_path):
    task = own_task({"a.tsv": GOOD, "b.tsv": GOOD})
    (tmp_path / "a.tsv").unlink()
    os.mkfifo(tmp_path / "a.tsv")
    with pytest.raises(UserError, match=r"a\.tsv: not a regular file; expected a file of examples"):
        read_examples(task, "train")


def test_a_description_names_only_files_in_its_folder(own_task, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "s.tsv").write_text(GOOD)
    outside = ("../private/s.tsv", f"{tmp_path}/private/s.tsv", "a/../../s.tsv", "~/../s.tsv", "")
    for file in (*outside, DIAGNOSTIC):
        with pytest.raises(UserError, match=r"splits\.valid: .*plain file name"):
            own_task({"a.tsv": GOOD}, splits={"train": "a.tsv", "valid": file})
    for folder in ("..", "../x", str(tmp_path / "private"), "x/../.."):
        with pytest.raises(UserError, match=r"own\.json: folder: .*plain file name"):
            own_task({"s.tsv": GOOD}, folder=folder)
    for place in ("../private", str(tmp_path / "private"), "a/../../private", "file://x"):
        with pytest.raises(UserError, match=r"dataset: .*plain file name"):
            own_task({}, dataset=place, splits={"train": "train", "valid": "train"})
    own_task({"s.tsv": GOOD}, folder="private")
    described = tmp_path / "described"
    described.mkdir()
    splits = {"train": "s.tsv", "valid": "s.tsv"}
    (described / "own.json").write_text(json.dumps({"splits": splits}))
    task = load_task(str(described / "own.json"), tmp_path / "private")  # --data names any folder
    assert read_examples(task, "train")


# ----------------------------------------------------------------------------------------- datasets


@pytest.mark.parametrize(
    "files",
    [
        'data_files: "../secret.jsonl"',
        'data_files: "https://example.org/x.jsonl"',
        "data_files: [{split: train, path: [/etc/passwd]}]",
        "data_files: [{split: train, path: 'zip://x::http://example.org'}]",
        "data_dir: ..",
    ],
)
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_dataset_card_cannot_name_files_elsewhere(own_task, tmp_path, files, card):
    pytest.importorskip("datasets", reason="needs the extra [hf]")
    (tmp_path / "set").mkdir()
    (tmp_path / "secret.jsonl").write_text(jsonl({"sentence": "x", "label": "a"}))
    (tmp_path / "set" / "train.jsonl").write_text(jsonl({"sentence": "x", "label": "a"}))
    text = f"configs:\n- config_name: default\n  {files}\n"
    (tmp_path / "set" / card).write_text(f"---\n{text}---\n" if card == "README.md" else text)
    with pytest.raises(UserError, match="leads out of the dataset"):
        own_task({}, dataset="set", splits={"train": "train", "valid": "train"})


@pytest.mark.parametrize(
    "value", ["2001-13-45", '!!int ""', "!!timestamp x", "!!bool x", "!!python/name:os.system"]
)
def test_a_dataset_card_that_is_not_yaml_is_named(own_task, tmp_path, value):
    """PyYAML raises ValueError, IndexError, AttributeError or KeyError for such values."""
    pytest.importorskip("datasets", reason="needs the extra [hf]")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(jsonl({"sentence": "x", "label": "a"}))
    (tmp_path / "set" / "README.md").write_text(f"---\ndate: {value}\n---\n")
    with pytest.raises(UserError, match=r"README\.md: its YAML cannot be read"):
        own_task({}, dataset="set", splits={"train": "train", "valid": "train"})


def test_a_card_on_the_hub_is_checked_before_datasets_reads_it(own_task, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra [hf]")
    from huggingface_hub import HfApi

    card = tmp_path / "README.md"
    card.write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: http://127.0.0.1:9/x\n---\n"
    )
    info = SimpleNamespace(sha="c" * 40)
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, revision=None: info)
    monkeypatch.setattr(HfApi, "hf_hub_download", lambda self, *_, **__: str(card))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(UserError, match=r"owner/set: README\.md: .*leads out of the dataset"):
        own_task({}, dataset="owner/set", splits={"train": "train", "valid": "train"})


def test_a_dataset_is_read_without_its_other_columns(own_task, tmp_path):
    """A column of images could name a URL, which `datasets` would open."""
    pytest.importorskip("datasets", reason="needs the extra [hf]")
    (tmp_path / "set").mkdir()
    rows = [{"sentence": "x", "label": label, "extra": "y"} for label in "ab"]
    (tmp_path / "set" / "train.jsonl").write_text(jsonl(*rows))
    task = own_task({}, dataset="set", splits={"train": "train", "valid": "train"})
    assert read_examples(task, "train") == [Example("0", "x", None, 0), Example("1", "x", None, 1)]
    (tmp_path / "set" / "train.jsonl").write_text(jsonl(*rows)[:-9])
    with pytest.raises(UserError, match="dataset set, split train"):
        load_task(str(tmp_path / "own.json"), None)


def test_a_dataset_in_data_is_read(own_task, tmp_path):
    pytest.importorskip("datasets", reason="needs the extra [hf]")
    (tmp_path / "elsewhere" / "set").mkdir(parents=True)
    rows = [{"sentence": "x", "label": label} for label in "ab"]
    (tmp_path / "elsewhere" / "set" / "train.jsonl").write_text(jsonl(*rows))
    values = {"dataset": "set", "splits": {"train": "train", "valid": "train"}}
    (tmp_path / "own.json").write_text(json.dumps(values))
    task = load_task(str(tmp_path / "own.json"), tmp_path / "elsewhere")
    assert len(read_examples(task, "train")) == 2


def test_a_folder_of_the_current_directory_is_not_read_for_a_dataset(
    own_task, tmp_path, monkeypatch
):
    """`datasets` takes a folder of the current directory for a name on the hub."""
    datasets = pytest.importorskip("datasets", reason="needs the extra [hf]")
    (tmp_path / "here" / "owner" / "set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(UserError, match=r"dataset owner/set.*: the current directory has a folder"):
        own_task({}, dataset="owner/set", splits={"train": "train", "valid": "train"})


def test_a_dataset_without_the_columns_of_the_task_is_refused_before_a_row_is_read(
    own_task, tmp_path
):
    """Reading row 0 would open the URL of its image."""
    datasets = pytest.importorskip("datasets", reason="needs the extra [hf]")
    import pyarrow
    from pyarrow import parquet

    features = datasets.Features({"picture": datasets.Image(), "texte": datasets.Value("string")})
    row = {"picture": [{"path": "http://192.0.2.1/x.png", "bytes": None}], "texte": ["x"]}
    table = pyarrow.Table.from_pydict(row, features.arrow_schema)
    (tmp_path / "set").mkdir()
    parquet.write_table(table, tmp_path / "set" / "train.parquet")
    with pytest.raises(UserError, match=r"no column 'text'; did you mean 'texte'\?; found pic"):
        own_task({}, dataset="set", splits={"train": "train", "valid": "train"}, text_a="text")
