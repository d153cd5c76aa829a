"""Report and submission: functions of the folder that name missing parts and skip failed seeds."""

import json
import math
import os
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from electra_ds.common.errors import UserError
from electra_ds.finetuning.report import COLUMNS, PUBLISHED, write_report
from electra_ds.finetuning.seed import check_seed_folder, prune_models
from electra_ds.finetuning.submit import FILES, write_submission
from electra_ds.finetuning.suite_files import write_or_compare
from electra_ds.finetuning.tasks import Task


def write_seed(folder, task, seed, scores=None, status="done", selected="last"):
    """Write DIR/TASK/seed-N as finetune does; scores None: not finished. Returns the folder."""
    path = folder / task / f"seed-{seed}"
    path.mkdir(parents=True)
    if scores is not None:
        result = {
            "task": task,
            "seed": seed,
            "status": status,
            "scores": scores,
            "selected": selected,
        }
        rest = {
            "epochs": 3.0,
            "steps": 9,
            "train_loss": None,
            "origin": "run O, step 9",
            "seconds": 1.0,
        }
        (path / "result.json").write_text(json.dumps(result | rest))
    return path


@pytest.fixture
def suite(tmp_path):
    """RTE with one diverged seed of five, STS-B with one unfinished, MNLI, a user's task."""
    for seed, value in {0: 0.5, 1: 0.6, 3: 0.7, 10: 0.55}.items():
        write_seed(tmp_path, "rte", seed, {"valid": {"accuracy": value}})
    write_seed(tmp_path, "rte", 2, {}, "diverged")
    write_seed(tmp_path, "stsb", 0, {"valid": {"spearman": 0.8, "pearson": 0.9}})
    write_seed(tmp_path, "stsb", 1)
    both = {"valid_matched": {"accuracy": 0.75}, "valid_mismatched": {"accuracy": 0.76}}
    write_seed(tmp_path, "mnli", 0, both)
    write_seed(
        tmp_path,
        "own",
        0,
        {"test": {"f1": 0.1}, "valid": {"f1": 1.0}},
        selected="best epoch on dev",
    )
    return tmp_path


def test_the_report_lists_every_seed_and_averages_the_finished_ones(suite):
    report = write_report(suite)
    assert json.loads((suite / "report.json").read_text()) == json.loads(json.dumps(report))
    rte, found = report["tasks"]["rte"], report["tasks"]["rte"]["scores"]["valid"]["accuracy"]
    assert (
        rte["seeds"] == {0: "done", 1: "done", 2: "diverged", 3: "done", 10: "done"}
        and rte["best_seed"] == 3
    )
    values = [50.0, 60.0, 70.0, 55.0]
    expected = {"median": 57.5, "mean": 58.75, "std": statistics.stdev(values), "best": 70.0}
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert list(found["seeds"]) == [0, 1, 3, 10]
    assert report["tasks"]["stsb"]["scores"]["valid"]["pearson"]["std"] is None
    assert list(report["tasks"]) == ["stsb", "mnli", "rte", "own"]
    notes = "\n".join(report["notes"])
    assert "rte: diverged: seed 2; the scores are over the 4 finished of 5 seeds" in notes
    assert (
        "stsb: unfinished: seed 1;" in notes and "own: weights selected by their dev score" in notes
    )
    assert "not run: cola, sst2, mrpc, qqp, qnli, wnli" in notes and notes.count("\n") == 3
    page = (suite / "report.md").read_text()
    seeds = "0: 50.0, 1: 60.0, 3: 70.0, 10: 55.0, 2: diverged"
    row = f"| rte | valid | accuracy | 57.5 | 58.8 | 8.5 | 70.0 | {seeds} |"
    assert (
        row in page
        and all(note in page for note in report["notes"])
        and "weights: run O, step 9" in page
    )
    assert (
        len({line.count("|") for line in page.split("Comparison")[1].splitlines() if "|" in line})
        == 1
    )


def test_the_comparison_has_the_metrics_and_averages_of_the_paper(suite):
    rows = write_report(suite)["comparison"]
    ours = rows["this, median"]
    assert (
        ours["STS-B Spearman"] == 80.0
        and ours["STS-B Pearson"] == 90.0
        and ours["MNLI acc"] == 75.0
    )
    assert ours["CoLA Matthews"] is None and ours["average of 8"] is None
    averages = {
        name: round(row["average of 8"], 1) for name, row in rows.items() if name in PUBLISHED
    }
    assert list(averages.values()) == [89.5, 87.5, 81.1, 80.4]  # the published averages
    for task, metric in COLUMNS.values():
        if task not in ("rte", "stsb", "mnli"):
            write_seed(suite, task, 0, {"valid": {metric: 0.5}})
    full = write_report(suite)["comparison"]["this, median"]
    assert full["average of 8"] == pytest.approx((5 * 50 + 57.5 + 80 + 75) / 8)


def test_a_suite_without_a_finished_seed_has_a_report(tmp_path):
    write_seed(tmp_path, "rte", 0)
    write_seed(tmp_path, "cola", 0, {}, "diverged")
    report = write_report(tmp_path)
    assert report["tasks"]["rte"]["best_seed"] is None and len(report["notes"]) == 3
    with pytest.raises(UserError, match="no TASK/seed-N"):
        write_report(tmp_path / "rte")


def test_user_tasks_have_no_comparison_and_scores_that_are_not_finite_do_not_count(tmp_path):
    write_seed(tmp_path, "own", 0, {"valid": {"pearson": math.nan, "spearman": None}})
    write_seed(tmp_path, "own", 1, {"valid": {"pearson": -0.1, "spearman": 0.2}})
    write_seed(tmp_path, "own", 2, {})
    write_seed(tmp_path, "own", "0.bak", {"valid": {"pearson": 0.9}})
    report = write_report(tmp_path)
    assert report["comparison"] == {} and "ublished" not in (tmp_path / "report.md").read_text()
    assert report["notes"] == [
        "own: without a score: seed 0, 2; the scores are over the 1 finished of 3 seeds"
    ]
    assert report["tasks"]["own"]["best_seed"] == 1
    assert report["tasks"]["own"]["scores"]["valid"]["pearson"]["seeds"] == {1: -10.0}


# --------------------------------------------------------------------------------------- submission

ANSWERS = {"cola": "1", "stsb": "5.31", "mnli": "neutral", "rte": "not_entailment"}


def write_predictions(path, split, answers):
    lines = ["index\tprediction\tp", *(f"{i}\t{answer}\t0.5" for i, answer in enumerate(answers))]
    (path / f"predictions-{split}.tsv").write_text("\n".join(lines) + "\n")


def test_the_zip_has_the_files_rows_and_labels_of_the_glue_site(tmp_path):
    for task, split, rows in FILES.values():
        if task in ANSWERS:
            for seed in (0, 1):
                path = tmp_path / task / f"seed-{seed}"
                if not path.exists():
                    valid = "valid_matched" if task == "mnli" else "valid"
                    write_seed(tmp_path, task, seed, {valid: {"accuracy": 0.5 + seed / 10}})
                answers = [ANSWERS[task] if seed else "wrong"] * rows
                write_predictions(
                    path, split, answers if task != "stsb" else ["-0.2", "2.5", *answers[2:]]
                )
    notes = write_submission(tmp_path, tmp_path / "glue.zip")
    with zipfile.ZipFile(tmp_path / "glue.zip") as archive:
        assert (
            sorted(archive.namelist()) == sorted(f"{name}.tsv" for name in FILES)
            and len(FILES) == 11
        )
        tables = {name: archive.read(f"{name}.tsv").decode().split("\n") for name in FILES}
    for name, (task, _, rows) in FILES.items():
        header, *lines, last = tables[name]
        cells = [line.split("\t") for line in lines]
        assert header == "index\tprediction" and last == "" and {len(cell) for cell in cells} == {2}
        assert [cell[0] for cell in cells] == [str(number) for number in range(rows)]
        if task in ANSWERS and task != "stsb":
            assert {cell[1] for cell in cells} == {ANSWERS[task]}
    assert [line.split("\t")[1] for line in tables["STS-B"][1:4]] == ["0.000", "2.500", "5.000"]
    assert tables["QNLI"][1] == "0\tentailment" and tables["QQP"][1] == "0\t0"
    *real, warning = notes
    assert (
        "WARNING: no test predictions of SST-2, MRPC, QQP, QNLI, WNLI: filled with a constant"
        in warning
    )
    assert [note.split(".tsv: seed 1, ")[0] for note in real] == [
        "CoLA",
        "STS-B",
        "MNLI-m",
        "MNLI-mm",
        "RTE",
        "AX",
    ]
    assert "RTE.tsv: seed 1, accuracy 60.0 on valid" in real
    again = (tmp_path / "glue.zip").read_bytes()
    write_submission(tmp_path, tmp_path / "glue.zip")
    assert (tmp_path / "glue.zip").read_bytes() == again


def test_predictions_of_another_test_set_are_refused(tmp_path):
    path = write_seed(tmp_path, "wnli", 0, {"valid": {"accuracy": 0.5}})
    write_predictions(write_seed(tmp_path, "own", 0, {"valid": {"f1": 0.5}}), "test", ["1"])
    with pytest.raises(
        UserError, match=r"no GLUE task has a finished seed .* found wnli, own; nothing is written"
    ):
        write_submission(tmp_path, tmp_path / "y.zip")
    for answers, part in ((["1"] * 145, "145 rows"), (["2"] * 146, "'2' is not a label of wnli")):
        write_predictions(path, "test", answers)
        with pytest.raises(UserError, match=part):
            write_submission(tmp_path, tmp_path / "y.zip")
    assert not (tmp_path / "y.zip").exists()


def test_reports_and_submissions_do_not_import_torch():
    modules = "electra_ds.finetuning.report, electra_ds.finetuning.submit"
    parts = f"import sys, {modules}\nprint({{'torch', 'sklearn'}} & set(sys.modules))"
    command, root = [sys.executable, "-c", parts], Path(__file__).resolve().parents[2]
    assert (
        subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
        == "set()\n"
    )


def test_a_score_whose_sums_are_infinite_is_refused(tmp_path):
    for seed, score in enumerate((1e307, -1e307)):
        write_seed(tmp_path, "own", seed, {"valid": {"accuracy": score}})
    with pytest.raises(UserError, match=r"result\.json: scores\.valid\.accuracy = 1e\+307"):
        write_report(tmp_path)


# ------------------------------------------------------------------------------------ own folders


def test_models_are_not_removed_through_a_link(tmp_path):
    scores = {"valid": {"accuracy": 0.9}}
    write_seed(tmp_path / "dir", "t", 0, scores)
    other = write_seed(tmp_path / "other", "t", 1, {"valid": {"accuracy": 0.1}})
    (other / "model").mkdir()
    (tmp_path / "dir" / "t" / "seed-1").symlink_to(other)
    own = write_seed(tmp_path / "dir", "t", 2, {"valid": {"accuracy": 0.2}})
    (own / "model").symlink_to(other / "model")
    write_seed(tmp_path / "dir", "t", 3, {"valid": {"accuracy": 0.3}}).joinpath("model").mkdir()
    prune_models(tmp_path / "dir" / "t", "best")
    assert (other / "model").is_dir()
    assert not any(path.is_symlink() for path in own.iterdir())
    assert not (tmp_path / "dir" / "t" / "seed-3" / "model").exists()


@pytest.mark.parametrize("place", ["t", "t/seed-1", "t/seed-1/ckpt", "t/seed-1/model"])
def test_a_folder_of_a_suite_that_is_a_link_out_of_it_is_refused(tmp_path, monkeypatch, place):
    monkeypatch.setattr("electra_ds.finetuning.suite_files.on_rank0", lambda function: function())
    (tmp_path / "other").mkdir()
    link = tmp_path / "dir" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "other")
    task = Task(name="t", splits={"train": "x"})
    with pytest.raises(UserError, match=r"a symbolic link leads to .*other"):
        check_seed_folder(tmp_path / "dir", task, 1)
    check_seed_folder(tmp_path / "new", task, 1)
    if place == "t":
        with pytest.raises(UserError, match=r"a symbolic link leads to .*other"):
            write_or_compare(SimpleNamespace(out=tmp_path / "dir"), "t/task.json", {}, list)
    assert not os.listdir(tmp_path / "other")


def test_a_report_escapes_what_files_contain(tmp_path):
    folder = tmp_path / "mine" / "seed-0"
    folder.mkdir(parents=True)
    hostile = "<img src=x> ![x](http://host/p.png) `c` a|b \x1b[2J\n# x https://me:secret@host/run"
    result = {"status": "done", "origin": hostile, "scores": {"valid": {hostile: 0.5}}}
    (folder / "result.json").write_text(json.dumps(result))
    (tmp_path / "mine" / "task.json").write_text(json.dumps({"notes": [hostile]}))
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.count("img src=x") == 3
    assert not any(bad in text for bad in ("<img", "](", "`", "a|b |", "\x1b", "\n# x", "secret"))
