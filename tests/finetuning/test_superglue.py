"""SuperGLUE: texts and labels of its files, metrics, suite, report and zip; presets of CoNLL."""

import json
import re
import string
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from running import read_json
from small_superglue import ENTITIES, PASSAGE, ROWS, write_lines, write_superglue_files

from electra_ds.common.errors import UserError
from electra_ds.finetuning import superglue_submit
from electra_ds.finetuning.examples import Example, read_examples
from electra_ds.finetuning.metrics import score
from electra_ds.finetuning.predict import decode, predict, predictions_table
from electra_ds.finetuning.report import write_report
from electra_ds.finetuning.superglue_report import TITLES
from electra_ds.finetuning.superglue_rows import Candidate
from electra_ds.finetuning.superglue_submit import Official, has_superglue_alone, write_superglue
from electra_ds.finetuning.superglue_tasks import SUPERGLUE
from electra_ds.finetuning.tasks import Task, load_task, task_names


@pytest.fixture
def data(tmp_path) -> Path:
    return write_superglue_files(tmp_path / "data")


def examples(data: Path, name: str, split: str = "valid") -> list[Example]:
    return read_examples(load_task(f"superglue-{name}", data), split)


# ----------------------------------------------------------------------------------------- reading


def test_names_have_any_spelling_and_rte_is_that_of_glue():
    assert task_names("superglue") == list(SUPERGLUE) and len(SUPERGLUE) == 8
    assert task_names("BoolQ,super-glue-RTE,RTE,CoNLL-2000") == [
        "superglue-boolq",
        "superglue-rte",
        "rte",
        "conll2000",
    ]


def test_texts_and_labels_of_each_task(data):
    found = {name: examples(data, name)[1][:4] for name in ("boolq", "cb", "rte", "wic", "wsc")}
    assert found == {
        "boolq": ("1", "ab ac", "is it", 0),
        "cb": ("1", "ab ac", "ad", 1),  # entailment, the second in the order of the alphabet
        "rte": ("1", "ab ac", "ad", 0),
        "wic": ("1", "* ab *  ac", "ad  * ab *", 0),
        "wsc": ("1", "* ab * ac ad # he # ae", None, 0),
    }
    first, second = examples(data, "copa")[:2]
    assert first[:4] == ("0", "ab ac What was the cause of this?", ["ad", "ae af"], 0)
    assert second.text_a.endswith("What happened as a result?") and second.label == 1
    assert [example.label for example in examples(data, "wsc", "test")] == [None] * 4
    ax = examples(data, "rte", "test_axb")[2], examples(data, "rte", "test_axg")[2]
    assert [example[:4] for example in ax] == [("2", "ab", "ac", 0), ("2", "ab", "ac", 1)]


def test_each_answer_of_multirc_is_an_example(data):
    row = ROWS["MultiRC"](1)
    row["passage"]["text"] = "<b>Sent 1: </b>ad ae<br>af"
    write_lines(data / "MultiRC" / "val.jsonl", [row])
    found = examples(data, "multirc")
    assert len(found) == 6
    assert found[4] == Example("1/3/15", "Sent 1: ad ae af", "ac ? bb", 0, Candidate("1/3", "bb"))


def test_each_different_entity_of_record_is_a_candidate(data):
    spans = [place for places in ENTITIES.values() for place in places]
    row = {
        "passage": {"text": PASSAGE, "entities": [{"start": s[0], "end": s[1]} for s in spans]},
        "qas": [
            {
                "query": "@placeholder paid @placeholder",
                "idx": 7,
                "answers": [{"text": "Zo\u00eb"}],
            },
            {"query": "at @placeholder", "idx": 8, "answers": [{"text": "Bank of Oslo"}] * 2},
        ],
        "idx": 3,
    }
    write_lines(data / "ReCoRD" / "val.jsonl", [row])
    found = examples(data, "record")
    assert [x.candidate.text for x in found] == list(ENTITIES) * 2
    assert [x.label for x in found] == [1, 0, 0, 0, 0, 1]
    assert found[0].text_a == "Zo\u00eb met The Bank. Bank of Oslo. Zo\u00eb paid"
    assert found[0].text_b == "Zo\u00eb paid Zo\u00eb"
    assert found[5].candidate == Candidate("8", "Bank of Oslo", ("Bank of Oslo",) * 2)
    assert {x.label for x in examples(data, "record", "test")} == {None}


def test_wsc_marks_the_nearest_words_of_a_span(data):
    def marked(text: str, first: tuple, second: tuple) -> str:
        target = {"span1_text": first[0], "span1_index": first[1]}
        target |= {"span2_text": second[0], "span2_index": second[1]}
        row = {"idx": 0, "label": True, "text": text, "target": target}
        write_lines(data / "WSC" / "val.jsonl", [row])
        return examples(data, "wsc")[0].text_a

    text = "The dog's owner saw him, but  he ran. He hid."
    assert marked(text, ("the dog", 0), ("he", 6)) == (
        "* The dog's * owner saw him, but # he # ran. He hid."
    )
    # The index of the file is one too low; the other "He" is farther away.
    assert "but # he # ran" in marked(text, ("owner", 2), ("he", 5))
    assert "ran. # He # hid" in marked(text, ("owner", 2), ("he", 8))
    with pytest.raises(UserError, match=r"val\.jsonl:1: target\.span1_text: found 'a cat' at word"):
        marked(text, ("a cat", 0), ("he", 6))


def broken(name: str, **values) -> dict:
    return ROWS[name](0) | values


@pytest.mark.parametrize(
    "name, row, parts",
    [
        ("BoolQ", broken("BoolQ", label="yes"), ["label", "boolean", "a row of BoolQ"]),
        ("BoolQ", {"idx": 0, "passage": "ab", "label": True}, ["question", "missing"]),
        ("CB", broken("CB", label="entails"), ["label", "entails", "'contradiction'"]),
        ("COPA", broken("COPA", question="why"), ["question", "'cause'"]),
        ("COPA", broken("COPA", idx=-1), ["idx", "-1"]),
        ("COPA", broken("COPA", label=2), ["label", "2"]),
        ("WiC", broken("WiC", end2=6), ["start2, end2: found 3 and 6", "5 characters"]),
        ("RTE", broken("RTE", label=None), ["label: missing in row 0", "split valid"]),
        ("ReCoRD", broken("ReCoRD", qas=[{"query": "ba", "idx": 0}]), ["qas.0.query", "@placeh"]),
        (
            "ReCoRD",
            broken("ReCoRD", passage={"text": "ab", "entities": [{"start": 0, "end": 2}]}),
            ["passage.entities.0", "characters 0 to 2"],
        ),
        ("MultiRC", broken("MultiRC", passage={"text": "ab", "questions": []}), ["questions"]),
    ],
)
def test_a_row_of_another_shape_is_refused_with_line_and_key(data, name, row, parts):
    path = data / name / "val.jsonl"
    write_lines(path, [ROWS[name](5), row])
    with pytest.raises(UserError) as error:
        examples(data, name.lower())
    for part in [f"{path}:2: ", "download the file again", *parts]:
        assert part in str(error.value), error.value


def test_a_question_that_occurs_twice_and_a_missing_folder_are_refused(data):
    write_lines(data / "MultiRC" / "val.jsonl", [ROWS["MultiRC"](1)] * 2)
    with pytest.raises(UserError, match=r"val\.jsonl:2: idx: '1/2/10' occurs twice"):
        examples(data, "multirc")
    with pytest.raises(UserError, match=r"has no folder boolq .*found AX-b, AX-g, .*give --data"):
        load_task("boolq", (data / "BoolQ").rename(data / "Q").parent)
    assert load_task("boolq", data / "Q").folder == str((data / "Q").resolve())
    with pytest.raises(UserError, match="did you mean 'superglue-wic'"):
        load_task("superglue-wicc", data)


def test_shapes_and_names_of_superglue_are_not_for_own_tasks(own_task):
    with pytest.raises(UserError, match="format: wic is that of a task of SuperGLUE"):
        own_task({"a.jsonl": "{}"}, format="wic")
    with pytest.raises(UserError, match="is the name of a SuperGLUE task"):
        own_task({"a.jsonl": "{}"}, name="superglue-cb")


# ----------------------------------------------------------------------------------------- metrics


def test_cb_has_the_mean_of_accuracy_and_macro_f1(data):
    from sklearn import metrics

    task = load_task("cb", data)
    truth, predicted = [0, 0, 1, 2, 1], [0, 1, 1, 1, 1]
    rows = [Example(str(i), "a", "b", label) for i, label in enumerate(truth)]
    found = score(task, predicted, rows)
    macro = metrics.f1_score(truth, predicted, average="macro", zero_division=0)
    assert list(found) == ["average", "accuracy", "macro_f1"]
    assert found["macro_f1"] == pytest.approx(macro) and found["accuracy"] == 0.6
    assert found["average"] == pytest.approx((macro + 0.6) / 2)


def test_multirc_is_scored_by_answers_and_by_questions(data):
    from sklearn import metrics

    task = load_task("multirc", data)
    groups = ["0/0"] * 3 + ["0/1"] * 2 + ["1/0"] * 2
    truth, predicted = [1, 0, 1, 0, 0, 1, 1], [1, 0, 1, 0, 1, 0, 1]
    rows = [
        Example(f"{group}/{i}", "a", "b", label, Candidate(group, "x"))
        for i, (group, label) in enumerate(zip(groups, truth, strict=True))
    ]
    found = score(task, predicted, rows)
    assert found["f1a"] == pytest.approx(metrics.f1_score(truth, predicted))
    assert found["em"] == pytest.approx(1 / 3)  # only the first question is all right
    assert found["average"] == pytest.approx((found["f1a"] + found["em"]) / 2)


def restated(prediction: str, answers: list[str]) -> tuple[float, float]:
    """(F1, exact match) as the published evaluation of ReCoRD describes them, step by step."""

    def words(text: str) -> list[str]:
        kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", kept).split()

    def f1(answer: str) -> float:
        same = sum((Counter(words(prediction)) & Counter(words(answer))).values())
        if same == 0:
            return 0.0
        precision, recall = same / len(words(prediction)), same / len(words(answer))
        return 2 * precision * recall / (precision + recall)

    exact = [words(prediction) == words(answer) for answer in answers]
    return max(map(f1, answers)), float(any(exact))


ANSWERED = [  # the best candidate, a worse one, right answers
    ("The Bank", "x", ["bank!", "Oslo"]),
    ("Bank of Oslo", "x", ["Oslo Bank", "the Oslo"]),
    ("U.S.", "x", ["US"]),
    ("a Oslo Oslo", "x", ["Oslo"]),
    ("x", "The Bank", ["The Bank"]),
    ("an Oslo", "x", ["Oslo's", "oslo"]),
    ("Theodora", "x", ["odora", "The odora"]),
]


def test_record_picks_one_candidate_and_has_the_published_metrics(data):
    task = load_task("record", data)
    rows, logits = [], []
    for number, (best, other, answers) in enumerate(ANSWERED):
        for text, margin in ((other, -0.5), (best, -0.1)):  # all are more likely wrong than right
            candidate = Candidate(str(number), text, tuple(answers))
            rows.append(Example(f"{number}/{text}", "a", "b", int(text in answers), candidate))
            logits.append(np.array([0.0, margin], np.float32))
    picked = decode(task, rows, [], logits)
    assert picked == [0, 1] * len(ANSWERED)
    wanted = np.mean([restated(best, answers) for best, _, answers in ANSWERED], axis=0)
    found = score(task, picked, rows)
    assert [found["f1"], found["em"]] == pytest.approx(wanted.tolist())
    assert 0 < found["em"] < found["f1"] < 1
    table = predictions_table(task, rows, picked, logits).decode().split("\n")
    assert table[:2] == ["index\tprediction", "0\tThe Bank"] and len(table) == 1 + len(ANSWERED) + 1


# ------------------------------------------------------------------------- suite, report, submission


def test_a_suite_trains_scores_and_predicts_every_task(suites, tmp_path):
    folder = suites / "one" / "superglue"
    report = read_json(folder / "report.json")
    assert list(report["tasks"]) == list(SUPERGLUE)
    average = report["superglue"]
    values = [average[title] for title in TITLES.values()]
    assert len(values) == 8 and average["average of 8"] == pytest.approx(np.mean(values))
    cb = report["tasks"]["superglue-cb"]["scores"]["valid"]
    both = [cb[name]["median"] for name in ("accuracy", "macro_f1")]
    assert average["CB acc, macro-F1"] == pytest.approx(np.mean(both))
    assert "SuperGLUE, medians on the dev sets" in (folder / "report.md").read_text()
    for name in ("multirc", "record", "copa"):
        seed = folder / f"superglue-{name}" / "seed-0"
        out = tmp_path / f"{name}.tsv"
        written = predict(seed, out, split="valid", data=suites / "superglue")
        scores = read_json(seed / "result.json")["scores"]["valid"]
        assert written.scores == pytest.approx(scores)
        assert out.read_text() == (seed / "predictions-valid.tsv").read_text()


def write_seed(folder: Path, task: str, value: float) -> Path:
    path = folder / f"superglue-{task}" / "seed-0"
    path.mkdir(parents=True, exist_ok=True)
    scores = {"valid": {"accuracy": value}}
    (path / "result.json").write_text(json.dumps({"status": "done", "scores": scores}))
    return path


def test_the_average_needs_all_eight_tasks(tmp_path):
    for number, name in enumerate(SUPERGLUE):
        write_seed(tmp_path, name.removeprefix("superglue-"), number / 10)
        average = write_report(tmp_path)["superglue"]["average of 8"]
        assert average == (pytest.approx(35.0) if number == 7 else None)


def test_the_zip_has_the_files_and_objects_of_the_site(suites, tmp_path, monkeypatch):
    sizes = {"MultiRC": 4 * 6, "AX-b": 3, "AX-g": 3}
    files = {
        name: official._replace(rows=sizes.get(name, 4))
        for name, official in superglue_submit.FILES.items()
    }
    monkeypatch.setattr(superglue_submit, "FILES", files)
    folder = suites / "one" / "superglue"
    notes = write_superglue(folder, tmp_path / "s.zip")
    assert len(notes) == 10 and notes[0].startswith("BoolQ.jsonl: seed 0, accuracy ")
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        assert archive.namelist() == [f"{name}.jsonl" for name in files] and len(files) == 10
        lines = {
            name: list(map(json.loads, archive.read(f"{name}.jsonl").decode().splitlines()))
            for name in files
        }
    for name, found in lines.items():
        assert [line["idx"] for line in found] == list(range(len(found))), name
    labels = {name: {x.get("label") for x in found} for name, found in lines.items()}
    assert labels["BoolQ"] | labels["WiC"] <= {"true", "false"}
    assert labels["WSC"] <= {"True", "False"} and labels["ReCoRD"] <= {"aa", "ab", "ac"}
    assert labels["COPA"] <= {0, 1} and all(isinstance(x, int) for x in labels["COPA"])
    assert labels["RTE"] | labels["AX-b"] | labels["AX-g"] <= {"entailment", "not_entailment"}
    assert labels["CB"] <= {"neutral", "entailment", "contradiction"}
    questions = lines["MultiRC"][2]["passage"]["questions"]
    assert [question["idx"] for question in questions] == [4, 5]
    assert [x["idx"] for x in questions[1]["answers"]] == [24, 25, 26]
    assert {x["label"] for question in questions for x in question["answers"]} <= {0, 1}


def test_the_zip_is_without_missing_tasks_and_other_test_sets_are_refused(tmp_path, monkeypatch):
    files = {"CB": Official("cb", "test", 2), "WSC": Official("wsc", "test", 1)}
    monkeypatch.setattr(superglue_submit, "FILES", files)
    seed = write_seed(tmp_path, "cb", 0.5)
    assert has_superglue_alone(tmp_path)  # `submit` then writes this zip
    out = tmp_path / "s.zip"
    with pytest.raises(UserError, match="no SuperGLUE task has a finished seed with predictions"):
        write_superglue(tmp_path, out)
    for lines, part in (
        (["0\tneutral"], "1 rows with 1 different indexes; expected 2"),
        (["0\tneutral", "0\tneutral"], "2 rows with 1 different indexes"),
        (["0\tneutral", "1\tmaybe"], "the prediction 'maybe' is not a label of CB"),
        (["0\tneutral", "x\tneutral"], "the index 'x'"),
    ):
        (seed / "predictions-test.tsv").write_text("\n".join(["index\tprediction", *lines, ""]))
        with pytest.raises(UserError) as error:
            write_superglue(tmp_path, out)
        assert part in str(error.value) and not out.exists()
    (seed / "predictions-test.tsv").write_text("index\tprediction\n1\tneutral\n0\tentailment\n")
    assert "WARNING: no test predictions of WSC" in write_superglue(tmp_path, out)[-1]
    with zipfile.ZipFile(out) as archive:
        text = archive.read("CB.jsonl").decode()
    (tmp_path / "rte" / "seed-0").mkdir(parents=True)
    assert not has_superglue_alone(tmp_path)
    assert text == '{"idx": 1, "label": "neutral"}\n{"idx": 0, "label": "entailment"}\n'


# ------------------------------------------------------------------------------------------- CoNLL

CHUNKS = "He PRP B-NP\nran VBD B-VP\nup RB I-VP\na DT B-NP\nbig JJ I-NP\nhill NN I-NP\n. . O\n\n"


def conll(folder: Path, *files: str, text: str = CHUNKS) -> Path:
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text(text)
    return folder.parent


def tags(task: Task, split: str) -> list[str]:
    return [task.labels[number] for number in read_examples(task, split)[0].label]


def test_chunks_are_learned_in_bioes_and_scored_as_spans(tmp_path):
    task = load_task("CoNLL-2000", conll(tmp_path / "chunk", "train.txt", "test.txt"))
    assert task.splits == {"train": "train.txt", "valid": "test.txt"}  # there is no dev set
    assert tags(task, "train") == ["S-NP", "B-VP", "E-VP", "B-NP", "I-NP", "E-NP", "O"]
    assert task.main_metric == "entity_f1" and len(task.labels) == 45
    (example,) = read_examples(task, "valid")
    wrong = [
        task.labels.index(tag) for tag in ["S-NP", "S-VP", "S-PRT", "B-NP", "I-NP", "E-NP", "O"]
    ]
    assert score(task, [wrong], [example])["entity_f1"] == pytest.approx(2 * 2 / (3 + 4))


def test_named_entities_of_both_file_names_and_schemes(tmp_path):
    text = "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\nBonn NNP I-NP B-ORG\nhas VBZ I-VP O\n"
    data = conll(tmp_path / "a" / "conll2003", "eng.train", "eng.testa", "eng.testb", text=text)
    task = load_task("conll2003", data)
    assert list(task.splits) == ["train", "valid", "test"]
    assert tags(task, "test") == ["S-ORG", "S-ORG", "O"]  # IOB1: B begins a second entity
    data = conll(tmp_path / "b" / "ner", "train.txt", "valid.txt", text="EU ORG\n")
    with pytest.raises(UserError, match=r"valid\.txt:1: found the tag 'ORG'; expected tags such"):
        read_examples(load_task("conll2003", data), "valid")
    with pytest.raises(UserError, match=r"no file of the split valid; expected dev\.txt or"):
        load_task("conll2000", conll(tmp_path / "c" / "conll2000", "train.txt"))
