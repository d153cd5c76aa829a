"""The verb status: states of a run folder, failures, incomplete folders, output."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import run_folders
from running import ROOT, run_cli

from electra_ds.cluster import failures, run_folder
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.folder_lock import Lock
from electra_ds.common.json_files import write_json
from electra_ds.config.loading import load_run
from electra_ds.interop.average import average
from electra_ds.interop.import_weights import import_weights
from electra_ds.reporting.status import lines, status
from electra_ds.training.run_logger import RunLogger

METRICS = {
    "mlm_loss": 6.5,
    "disc_loss": float("nan"),
    "lr": 1e-3,
    "grad_norm": 2.0,
    "skipped_steps": 10.0,
    "epoch": 0.1,
    "tokens": 30_000.0,
    "tokens_per_second": 600.0,
}


# A process that takes the lock and is killed.
KILLED_OWNER = """
import os, sys
from pathlib import Path
from electra_ds.common.folder_lock import Lock
Lock(Path(sys.argv[1])).acquire()
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def out(tmp_path):
    """A run on two nodes: 3,000 steps of 300 tokens, logged at step 90, saved at step 80."""
    facts = {"total_steps": 3000, "nodes": ["node1", "node2"], "launcher": "srun", "world_size": 2}
    run_folder.write_config(tmp_path, load_run("tiny"), "abc", **facts)
    with RunLogger(tmp_path, 0, 3000, None, tensorboard=False) as metrics:
        metrics.train(90, METRICS, 0.0)
    (tmp_path / "ckpt" / "80").mkdir(parents=True)
    write_json(tmp_path / "ckpt" / "80" / "meta.json", {"step": 80})
    (tmp_path / "ckpt" / "latest").write_text("80\n")
    return tmp_path


def shown(out):
    return lines(status(out))


def test_a_running_run_shows_step_rate_and_eta(out):
    with Lock(out, lambda read: read()) as lock:
        lock.step = 100
        lock.beat()
        facts = status(out)
    assert (facts["state"], facts["step"], facts["total_steps"]) == ("training", 100, 3000)
    assert facts["missing"] == []
    # 90 applied and 10 skipped steps of 300 tokens, 600 tokens per second.
    assert facts["steps_per_second"] == 2.0 and facts["eta_seconds"] == 2900 / 2
    text = lines(facts)
    assert text["step"] == "100 of 3,000"
    assert text["ETA"] == "0:24:10"
    assert f"process {os.getpid()}" in text["owner"]
    assert text["training"] == "mlm 6.500  disc nan  (step 90)"
    assert text["checkpoint"].startswith("80, step 80, 0:00:0")
    assert text["ranks"] == "2 under srun, on node1, node2"
    assert f"touch {out}/STOP" in text["next"]
    assert status(out)["state"] == "stopped" and status(out)["owner"] == ""


def test_an_old_heartbeat_is_silent_and_a_dead_process_is_a_failure(out):
    with Lock(out, lambda read: read()):
        beat = json.loads((out / "heartbeat.json").read_text())
        write_json(out / "heartbeat.json", beat | {"time": "2020-01-01T00:00:00+00:00"})
        assert status(out)["state"] == "silent"
        assert "check the machine of its owner" in shown(out)["next"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", KILLED_OWNER, str(out)], env=environ)
    facts = status(out)
    assert (facts["state"], facts["failures"], facts["failures_in_a_row"]) == ("failed", 1, 1)
    assert "ended without a message" in lines(facts)["last error"]


def test_failures_show_rank_host_cause_and_limit(out):
    failures.record_error(out, 1, RunFailure("first"))
    first = out / "error-rank-1.json"
    earlier = {"time": "2020-01-01T00:00:00+00:00"}
    first.write_text(json.dumps(json.loads(first.read_text()) | earlier))
    failures.record_error(out, 0, RunFailure("second"))
    text = shown(out)
    assert text["state"] == "failed" and "resumes from step 80" in text["next"]
    assert text["last error"].startswith("rank 1, ")
    assert text["last error"].endswith(": RunFailure: first")
    assert text["restarts"] == "0; failures 1, 1 in a row"
    for _ in range(10):
        failures.count_failures(out, 80, 10, "")
        failures.record_error(out, 1, RunFailure("again"))
    assert shown(out)["restarts"] == "0; failures 11, 11 in a row"
    hint = f"correct the cause and remove {out}/restarts.json (train.max_restarts = 10)"
    assert shown(out)["next"] == hint
    with pytest.raises(UserError, match="failed 11 times in a row"):  # the next start is refused
        failures.count_failures(out, 80, 10, "")


def test_a_mistake_of_the_user_is_shown_and_not_counted(out):
    failures.record_error(out, 0, UserError("why"))
    facts = status(out)
    assert (facts["state"], facts["failures"]) == ("stopped", 0)
    assert facts["last_error"]["error"] == "UserError: why"


def test_a_finished_run_is_shown_as_finished(out):
    run_folder.finish(out, True, {"step": 3000})
    assert shown(out)["state"] == "finished" and "--extend" in shown(out)["next"]


def test_imported_and_averaged_weights_start_a_run_and_resume_none(tmp_path):
    for name in ("a", "b"):
        run_folders.pretrained(tmp_path / name)
    average([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    import_weights(tmp_path / "a", tmp_path / "i")
    for name in ("mean", "i"):
        found = shown(tmp_path / name)
        assert found["state"] == "weights only" and "resumes" not in found["next"]
        assert found["next"].endswith(f"--init-from {tmp_path / name}")


def test_a_run_that_was_saved_before_its_first_step_resumes(out):
    meta = {"step": 0, "files": {"model-00001-of-00001.safetensors": {}}}
    path = out / "ckpt" / "80" / "meta.json"
    write_json(path, meta)
    assert status(out)["state"] == "weights only"
    meta["files"]["optim-00001-of-00001.safetensors"] = {}
    write_json(path, meta)
    assert status(out)["state"] == "stopped"


def test_an_incomplete_folder_lists_the_missing_files(tmp_path, out):
    (tmp_path / "new").mkdir()
    facts = status(tmp_path / "new")
    assert facts["state"] == "not started"
    assert lines(facts)["next"].startswith("electra-ds pretrain RUN")
    assert facts["missing"] == [
        "config.json: not there",
        "ckpt/latest: not there",
        "metrics.jsonl: not there",
    ]
    whole = {path: path.read_text() for path in out.rglob("*") if path.is_file()}
    for path, text in whole.items():
        for content in (None, text[: len(text) // 2], ""):  # removed, cut short, empty
            path.unlink() if content is None else path.write_text(content)
            found = lines(status(out))
            assert found["state"] in ("stopped", "not started"), path
            # The last line of metrics.jsonl may be incomplete: it is ignored.
            assert "missing" in found or "training" not in found, path
            path.write_text(text)
    assert status(out)["missing"] == []


def test_the_verb_prints_tables_or_json_and_imports_no_torch(out, tmp_path):
    failures.record_error(out, 0, RunFailure("rows [133, 1] of [/data]"))
    done = run_cli("status", out, out, COLUMNS="200")
    assert done.stdout.count("80, step 80") == 2 and "rows [133, 1] of [/data]" in done.stdout
    found = [json.loads(line) for line in run_cli("status", out, "--json").stdout.splitlines()]
    assert [facts["state"] for facts in found] == ["failed"]
    named = tmp_path / "r\u00e9sum\u00e9\x9b\u202e"
    shutil.copytree(out, named)
    for encoding, name in (("utf-8", "r\u00e9sum\u00e9"), ("ascii", r"r\u00e9sum\u00e9")):
        done = run_cli("status", named, "--json", PYTHONIOENCODING=encoding)
        assert name + r"\u009b\u202e" in done.stdout
        assert json.loads(done.stdout)["out"] == str(named)
    nowhere = run_cli("status", tmp_path / "nowhere", check=False)
    assert nowhere.returncode == 2 and "no run folder here" in nowhere.stderr
    script = (
        "import sys, electra_ds.reporting.status as module\n"
        f"module.status(module.Path({str(out)!r}))\n"
        "assert 'torch' not in sys.modules"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], env=environ, check=True)


WRONG = ["", "{", "[]", "3", "null", '{"step": "x"}', '{"step": -1}', '{"step": 1e400}', "\x00\xff"]
WRONG += ['{"step": 1, "time": 3}', '{"time": "noon"}', '{"train": 3, "provenance": []}']
WRONG += [
    '{"provenance": {"nodes": 3}}',
    '{"errors": 3}',
    '{"rank": []}',
    '{"pid": "x"}',
    "[" * 9999,
]


@pytest.mark.parametrize("name", ["config.json", "heartbeat.json", "restarts.json", "lock"])
@pytest.mark.parametrize("content", WRONG)
def test_a_file_of_any_content_is_reported_and_stops_nothing(out, name, content):
    (out / name).write_text(content)
    facts = status(out)
    assert lines(facts)["state"] in ("stopped", "failed", "silent") and json.dumps(facts)


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "ckpt/latest", "ckpt/80/meta.json", "error-rank-0.json"],
)
@pytest.mark.parametrize("content", WRONG)
def test_a_damaged_record_is_listed_as_missing(out, name, content):
    (out / name).write_text(content)
    facts = status(out)
    assert facts["missing"] or "rank" not in content
    assert json.dumps(facts) and lines(facts)["next"]


@pytest.mark.parametrize(
    ("speed", "tokens"), [(10**299, 1), (1e299, 1e-299), (-5, 1), (1e-299, 1e299)]
)
def test_a_rate_that_is_no_number_is_left_out(out, speed, tokens):
    """Integers of 300 digits are JSON; their product does not fit a float."""
    record = {"step": 90, "split": "train", "tokens": tokens, "skipped_steps": 10**299}
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record | {"tokens_per_second": speed}) + "\n")
    with Lock(out, lambda read: read()):
        facts = status(out)
    json.dumps(facts, allow_nan=False)
    assert lines(facts)["step"] == "90 of 3,000"


def test_folders_and_pipes_in_place_of_files_are_listed(out):
    names = ["config.json", "metrics.jsonl", "heartbeat.json", "restarts.json", "lock"]
    for name in [*names, "ckpt/latest"]:
        (out / name).unlink(missing_ok=True)
        os.mkfifo(out / name) if name.startswith("c") else (out / name).mkdir()
    assert len(status(out)["missing"]) == 5


def test_text_of_files_is_shown_without_control_characters_and_secrets(out):
    error = {"rank": 0, "host": "\x1b[31mh", "time": "", "error": "https://u:hunter2@host/D"}
    (out / "error-rank-0.json").write_text(json.dumps(error))
    shown_text = "".join(lines(status(out)).values())
    assert "\x1b" not in shown_text and "hunter2" not in shown_text and "***@host" in shown_text


def test_latest_names_no_folder_elsewhere(out):
    for name in ("../..", "/", "a/b", "\x1b", "x" * 5000):
        (out / "ckpt" / "latest").write_text(name)
        assert not status(out)["checkpoint"] and status(out)["missing"]


def test_a_run_without_a_launcher_says_so(out):
    facts = status(out) | {"launcher": "none", "nodes": ["here"]}
    assert lines(facts)["ranks"] == "1, no launcher, on here"


def test_printed_commands_quote_the_run_folder(tmp_path):
    folder = tmp_path / "мой прогон; $HOME 'x'"
    folder.mkdir()
    command = status(folder)["next"]
    assert shlex.split(command)[-1] == str(folder)
    (folder / "done").touch()
    assert shlex.split(status(folder)["next"].partition(" --data")[0])[-1] == str(folder)
    with Lock(folder, lambda read: read()):
        assert f"touch {shlex.quote(str(folder))}/STOP" in status(folder)["next"]
