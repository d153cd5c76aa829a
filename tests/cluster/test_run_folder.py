"""The run folder: shared by all ranks, cleared at a start; its marks, config and errors."""

import os

import pytest
from running import read_json

from electra_ds.cluster import failures, run_folder, stop_signals
from electra_ds.common.errors import UserError
from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.loading import differences, load_run


def single_rank(value):
    """all_gather_object of one rank."""
    return [value]


def test_opening_a_run_folder_removes_only_leftovers_of_an_earlier_attempt(tmp_path):
    stale = ["stopped.0", "stopped.3", "STOP", "SAVE", ".config.json.0123456789ab.tmp"]
    kept = ["done", "metrics.jsonl", "config.json", "restarts.json", "lock", "heartbeat.json"]
    kept += [".notes.tmp", "stopped.txt"]  # of others
    for name in (*stale, *kept):
        (tmp_path / name).write_text("x")
    (tmp_path / "ckpt").mkdir()
    run_folder.open_folder(tmp_path, 0, single_rank)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "ckpt", ".nonce"}


def test_a_folder_that_another_host_does_not_see_is_refused_with_the_host(tmp_path):
    def all_gather_object(value):
        return [value, ("node7", False)] if isinstance(value[1], bool) else [value, ("", None)]

    with pytest.raises(UserError, match=r"is not shared: node7 does not see"):
        run_folder.open_folder(tmp_path / "new" / "out", 0, all_gather_object)


def test_a_rank_that_reads_another_nonce_reports_it(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.time, "sleep", lambda _: None)
    (tmp_path / ".nonce").write_text("of an earlier attempt")
    sent = []

    def all_gather_object(value):
        sent.append(value)
        return [("nonce of rank 0", None), value] if value[1] is None else [("node0", True), value]

    with pytest.raises(UserError, match="is not shared"):
        run_folder.open_folder(tmp_path, 1, all_gather_object)
    assert sent[1][1] is False


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run_folder.open_folder(tmp_path / "file" / "out", 0, single_rank)


def test_a_finished_run_leaves_done_and_a_stopped_one_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    run_folder.finish(tmp_path, False, {"step": 5})
    assert read_json(tmp_path / "stopped.2") == {"step": 5}
    assert not run_folder.is_done(tmp_path)
    run_folder.finish(tmp_path, True, {"step": 9})
    assert run_folder.is_done(tmp_path)


def test_a_stop_exits_with_85_and_under_torchrun_with_0(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert stop_signals.stop_exit_code() == 85
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert stop_signals.stop_exit_code() == 0


def test_the_written_config_holds_versions_and_loads_again(tmp_path):
    config = load_run("tiny").with_data(600, SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4), 32)
    run_folder.write_config(tmp_path, config, "abc")
    again = load_run(str(tmp_path / "config.json"))
    assert differences(config, again) == ([], [])
    assert again.provenance["dataset_id"] == "abc"
    assert {"torch", "deepspeed"} <= set(again.provenance["packages"])


def test_an_error_is_recorded_and_a_missing_folder_raises_no_second_one(tmp_path):
    failures.record_error(tmp_path, 3, UserError("why"))
    found = read_json(tmp_path / "error-rank-3.json")
    assert (found["rank"], found["error"]) == (3, "UserError: why")
    failures.record_error(tmp_path / "nowhere", 3, UserError("why"))


@pytest.mark.parametrize("name", ["log", "tensorboard", "tokenizer"])
def test_a_folder_of_a_run_that_is_a_link_out_of_it_is_refused(tmp_path, name):
    (tmp_path / "other").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=f"{name}: a symbolic link leads to .*other"):
        run_folder.open_folder(tmp_path / "run", 0, single_rank)
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "ckpt").symlink_to(tmp_path / "other")  # checkpoints on another disk
    (tmp_path / "alias").symlink_to(tmp_path / "run")
    run_folder.open_folder(tmp_path / "alias", 0, single_rank)


def test_files_of_a_run_replace_links_and_fifos(tmp_path):
    (tmp_path / "victim").write_text("precious")
    for name in (".nonce", "config.json", "stopped.0", "error-rank-3.json"):
        for make in (lambda path: path.symlink_to(tmp_path / "victim"), os.mkfifo):
            out = tmp_path / "run" / name / make.__name__.strip("<>")
            out.mkdir(parents=True)
            make(out / name)
            run_folder.open_folder(out, 0, single_rank)
            config = load_run("tiny").with_data(
                600, SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4), 32
            )
            run_folder.write_config(out, config, "abc")
            run_folder.finish(out, False, {})
            failures.record_error(out, 3, UserError("why"))
            assert (out / name).is_file() and not (out / name).is_symlink()
    assert (tmp_path / "victim").read_text() == "precious"
