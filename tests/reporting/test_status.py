"""The verb status: every state of a run folder is told from its files, half made ones too, with what comes next."""

import json
import os
import subprocess
import sys

import pytest
from running import ROOT, run_cli

from electra_ds.cluster import failures, run_folder
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.files import write_json
from electra_ds.common.folder_lock import Lock
from electra_ds.config.loading import load_run
from electra_ds.reporting.status import lines, status
from electra_ds.training.run_logger import RunLogger

FIGURES = {
    "mlm_loss": 6.5,
    "disc_loss": float("nan"),
    "lr": 1e-3,
    "grad_norm": 2.0,
    "skipped_steps": 10.0,
    "epoch": 0.1,
    "tokens": 30_000.0,
    "tokens_per_second": 600.0,
}


@pytest.fixture
def out(tmp_path):
    """A run of 3,000 steps on two nodes: 300 tokens a step, logged at step 90, saved at step 80."""
    facts = {"total_steps": 3000, "nodes": ["node1", "node2"], "launcher": "srun", "world_size": 2}
    run_folder.write_config(tmp_path, load_run("tiny"), "abc", **facts)
    with RunLogger(tmp_path, 0, 3000, None, tensorboard=False) as metrics:
        metrics.train(90, FIGURES, 0.0)
    (tmp_path / "ckpt" / "80").mkdir(parents=True)
    write_json(tmp_path / "ckpt" / "80" / "meta.json", {"step": 80})
    (tmp_path / "ckpt" / "latest").write_text("80\n")
    return tmp_path


def shown(out):
    return lines(status(out))


def test_a_run_at_work_tells_step_rate_and_eta(out):
    with Lock(out, lambda read: read()) as lock:
        lock.step = 100
        lock.beat()
        facts = status(out)
    assert (facts["state"], facts["step"], facts["total_steps"], facts["missing"]) == (
        "training",
        100,
        3000,
        [],
    )
    assert (
        facts["steps_per_second"] == 2.0 and facts["eta_seconds"] == 2900 / 2
    )  # 10 of 100 attempts were skipped
    text = lines(facts)
    assert (
        text["step"] == "100 of 3,000"
        and text["ETA"] == "0:24:10"
        and f"process {os.getpid()}" in text["owner"]
    )
    assert text["training"] == "mlm 6.500  disc nan  (step 90)" and text["checkpoint"].startswith(
        "80, step 80, 0:00:0"
    )
    assert text["ranks"] == "2 under srun, on node1, node2" and f"touch {out}/STOP" in text["next"]
    assert status(out)["state"] == "stopped" and status(out)["owner"] == ""


def test_an_owner_without_a_heartbeat_is_silent_and_one_that_is_gone_has_failed(out):
    with Lock(out, lambda read: read()):
        beat = json.loads((out / "heartbeat.json").read_text())
        write_json(out / "heartbeat.json", beat | {"time": "2020-01-01T00:00:00+00:00"})
        assert (
            status(out)["state"] == "silent" and "look at its owner's machine" in shown(out)["next"]
        )
    kill = (
        "import os, sys\nfrom pathlib import Path\nfrom electra_ds.common.folder_lock import Lock\n"
    )
    kill += "Lock(Path(sys.argv[1]), lambda read: read()).__enter__()\nos.kill(os.getpid(), 9)"
    subprocess.run(
        [sys.executable, "-c", kill, str(out)], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    facts = status(out)
    assert (facts["state"], facts["failures"], facts["failures_in_a_row"]) == ("failed", 1, 1)
    assert "is gone without a message" in lines(facts)["last error"]


def test_failures_name_rank_host_and_cause_and_the_limit(out):
    failures.record_error(out, 1, RunFailure("first"))
    first = out / "error-rank-1.json"
    first.write_text(
        json.dumps(json.loads(first.read_text()) | {"time": "2020-01-01T00:00:00+00:00"})
    )
    failures.record_error(out, 0, RunFailure("that follows"))
    text = shown(out)
    assert text["state"] == "failed" and text["last error"].startswith("rank 1, ")
    assert (
        text["last error"].endswith(": RunFailure: first")
        and "resumes from step 80" in text["next"]
    )
    assert text["restarts"] == "0; failures 1, 1 in a row"
    for _ in range(10):
        failures.count_failures(out, 80, 10, "")
        failures.record_error(out, 1, RunFailure("again"))
    assert shown(out)["restarts"] == "0; failures 11, 11 in a row"
    assert (
        shown(out)["next"]
        == f"correct the cause and remove {out}/restarts.json (train.max_restarts = 10)"
    )
    with pytest.raises(UserError, match="failed 11 times in a row"):  # as the next start says
        failures.count_failures(out, 80, 10, "")


def test_a_mistake_of_the_user_is_told_and_is_no_failure(out):
    failures.record_error(out, 0, UserError("why"))
    facts = status(out)
    assert (facts["state"], facts["failures"], facts["last_error"]["error"]) == (
        "stopped",
        0,
        "UserError: why",
    )


def test_a_finished_run_says_so(out):
    run_folder.finish(out, True, {"step": 3000})
    assert shown(out)["state"] == "finished" and "--extend" in shown(out)["next"]


def test_a_half_made_folder_names_what_is_missing(tmp_path, out):
    (tmp_path / "new").mkdir()
    facts = status(tmp_path / "new")
    assert facts["state"] == "not started" and lines(facts)["next"].startswith(
        "electra-ds pretrain RUN"
    )
    assert facts["missing"] == [
        "config.json: not there",
        "ckpt/latest: not there",
        "metrics.jsonl: not there",
    ]
    whole = {path: path.read_text() for path in out.rglob("*") if path.is_file()}
    for path, text in whole.items():
        for left in (None, text[: len(text) // 2], ""):  # gone, cut short, empty
            path.unlink() if left is None else path.write_text(left)
            found = lines(status(out))
            assert found["state"] in ("stopped", "not started"), path
            assert "missing" in found or "training" not in found, (
                path
            )  # metrics.jsonl: a line is written this moment
            path.write_text(text)
    assert status(out)["missing"] == []


def test_the_verb_prints_tables_or_json_for_several_and_starts_without_torch(out, tmp_path):
    failures.record_error(out, 0, RunFailure("rows [133, 1] of [/data]"))
    done = run_cli("status", out, out, COLUMNS="200")
    assert done.stdout.count("80, step 80") == 2 and "rows [133, 1] of [/data]" in done.stdout
    found = [json.loads(line) for line in run_cli("status", out, "--json").stdout.splitlines()]
    assert [facts["state"] for facts in found] == ["failed"]
    nowhere = run_cli("status", tmp_path / "nowhere", check=False)
    assert nowhere.returncode == 2 and "no run folder here" in nowhere.stderr
    script = f"import sys, electra_ds.reporting.status as s\ns.status(s.Path({str(out)!r}))\nassert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )
