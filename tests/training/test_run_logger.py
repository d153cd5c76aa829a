"""Metrics and the run folder: what a run says is continuous across resumes, and the same in all three outputs."""

import json
import math
import os
import sys

import pytest

from electra_ds.cluster import failures, run_folder, stop_signals
from electra_ds.common.errors import UserError
from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.loading import differences, load_run
from electra_ds.reporting.plot import PANELS, plot
from electra_ds.training.metrics_file import SCHEMA, TIMED, read_metrics
from electra_ds.training.run_logger import RunLogger


def train_values(step):
    """Every key that the console line reads, with numbers that tell the step."""
    return {
        "loss": 50.0 + step,
        "mlm_loss": 10.0 - step / 100,
        "disc_loss": 0.5 / step,
        "lr": 1e-3 / step,
        "grad_norm": 1.0,
        "tokens": 1000.0 * step,
        "epoch": step / 100,
        "tokens_per_second": 12345.0,
        "disc_auc": math.nan,
    }


def valid_values(step):
    keys = "mlm_loss unigram_loss mlm_accuracy replaced_fraction disc_loss base_rate_loss disc_auc fixed_auc"
    return {key: step + place / 10 for place, key in enumerate(keys.split())}


def run(out, steps, start=0, tensorboard=False):
    """Log every step of an attempt, and a held-out evaluation every fifth."""
    with RunLogger(out, start, 100, 1.0, tensorboard) as metrics:
        for step in steps:
            metrics.train(step, train_values(step), seconds_left=3725.0)
            if step % 5 == 0:
                metrics.valid(step, valid_values(step))
            metrics.advance(step)
        metrics.flush()


def steps_of(out, split="train"):
    return [
        record["step"] for record in read_metrics(out / "metrics.jsonl") if record["split"] == split
    ]


# ------------------------------------------------------------------------------------------------------ metrics.jsonl


def test_the_first_line_names_the_schema_and_the_others_are_records(tmp_path):
    run(tmp_path, range(1, 6))
    first, *lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == SCHEMA == {"schema": "electra_ds metrics", "version": 1}
    records = [json.loads(line) for line in lines]
    assert [(record["step"], record["split"]) for record in records] == [
        *((step, "train") for step in range(1, 6)),
        (5, "valid"),
    ]
    assert records == read_metrics(tmp_path / "metrics.jsonl")
    assert records[2] == {"step": 3, "split": "train"} | train_values(3) | {"disc_auc": None}
    assert "tokens_per_second" in TIMED


def test_a_resume_cuts_back_to_its_step(tmp_path):
    run(tmp_path, range(1, 13))
    run(tmp_path, range(9, 15), start=8)
    assert steps_of(tmp_path) == list(range(1, 15)) and steps_of(tmp_path, "valid") == [5, 10]
    run(tmp_path, [], start=5)
    assert steps_of(tmp_path) == list(range(1, 6)) and steps_of(tmp_path, "valid") == [5]
    run(tmp_path, [1], start=0)
    assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize(
    "tail", ['{"step": 4, "split": "tr', '{"step": 4, "split": "train"}', "\x00\x00"]
)
def test_a_last_line_that_a_crash_cut_is_left_out(tmp_path, tail):
    run(tmp_path, range(1, 4))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    assert steps_of(tmp_path) == [1, 2, 3]
    run(tmp_path, [4], start=3)
    assert steps_of(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "content", [json.dumps(SCHEMA | {"version": 2}) + "\n", '{"step": 1}\n', "3\n", ""]
)
def test_metrics_of_another_schema_are_refused(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl: expected the schema line"):
        read_metrics(path)


def test_a_broken_line_inside_is_named(tmp_path):
    run(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 2,', '"step": ,'))
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 3 is not JSON"):
        read_metrics(path)


def test_the_console_says_what_the_record_says(tmp_path, capsys):
    run(tmp_path, [5])
    train, valid = capsys.readouterr().out.strip().splitlines()
    assert "step 5  mlm 9.950  disc 0.1000  lr 2.00e-04  norm 1.00  12,345 tokens/s" in train
    assert train.endswith("epoch 0.05/1  ETA 1:02:05")
    assert (
        valid.startswith("step 5  held out: mlm 5.000 (unigram 5.100)")
        and "fixed-corruption AUC 5.700" in valid
    )


def test_a_console_that_nobody_reads_any_more_stops_nothing(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as console:
        monkeypatch.setattr(sys, "stdout", console)
        run(tmp_path, range(1, 6))
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def test_lines_that_a_full_disk_refuses_are_kept_and_written_later(tmp_path, capsys):
    with RunLogger(tmp_path, 0, 100, 1.0, tensorboard=False) as metrics:
        metrics.train(1, train_values(1), seconds_left=0.0)
        whole, metrics._file = metrics._file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        for step in (2, 3):
            metrics.train(step, train_values(step), seconds_left=0.0)
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            metrics.flush()
        metrics._file.close()
        metrics._file = whole
        metrics.train(4, train_values(4), seconds_left=0.0)
        metrics.flush()
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert "step 3: not logged yet" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_holds_the_same_numbers_without_overlap_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, range(1, 13), tensorboard=True)
    run(tmp_path, range(9, 15), start=8, tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), {accumulator.SCALARS: 0})
    events.Reload()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert len(records) == 16
    for split, key in (("train", "mlm_loss"), ("train", "lr"), ("valid", "fixed_auc")):
        logged = [(record["step"], record[key]) for record in records if record["split"] == split]
        found = [(event.step, event.value) for event in events.Scalars(f"{split}/{key}")]
        assert [step for step, _ in found] == [step for step, _ in logged]
        assert [value for _, value in found] == pytest.approx(
            [value for _, value in logged], rel=1e-6
        )
    assert math.isnan(events.Scalars("train/disc_auc")[0].value)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_tensorboard_alone_and_prints_no_traceback(tmp_path, capfd):
    pytest.importorskip("tensorboard")
    with RunLogger(tmp_path, 0, 100, 1.0, tensorboard=True) as metrics:
        (events,) = (tmp_path / "tensorboard").iterdir()
        (tmp_path / "full").symlink_to("/dev/full")
        (tmp_path / "full").replace(
            events
        )  # at once: the writer's thread makes a file that is missing anew
        for step in (1, 2, 3):
            metrics.train(step, train_values(step), seconds_left=0.0)
            metrics.flush()
    assert steps_of(tmp_path) == [1, 2, 3]
    told = capfd.readouterr()
    assert (
        told.out.count("TensorBoard's file is not written any more until the next start") == 1
        and told.err == ""
    )


def test_tensorboard_can_be_turned_off(tmp_path):
    run(tmp_path, [1], tensorboard=False)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# --------------------------------------------------------------------------------------------------------------- plot


def test_a_plot_needs_metrics_alone_and_shows_every_held_out_point(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run(tmp_path / name, range(2, 11, 2))  # step 5 is no step of the training log
        with RunLogger(tmp_path / name, 10, 100, 1.0, tensorboard=False) as metrics:
            metrics.valid(7, valid_values(7))
    drawn = []

    def draw(_axis, x, y, label, **_):
        drawn.append((label, list(x), list(y)))

    monkeypatch.setattr(pyplot.Axes, "plot", draw)
    monkeypatch.setattr(pyplot.Axes, "legend", lambda self, **_: None)
    plot([tmp_path / "one", tmp_path / "two"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    held_out = next((x, y) for label, x, y in drawn if label == "two fixed corruption")
    assert held_out == (pytest.approx([0.01, 0.007]), [10.7, 7.7])  # a thousand tokens a step
    assert len(PANELS) == 4 and len({label for label, _, _ in drawn}) > 8


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.jsonl here"):
        plot([tmp_path], tmp_path / "curves.png")


# --------------------------------------------------------------------------------------------------------- run folder


def alone(value):
    return [value]


def test_opening_a_run_folder_clears_what_an_earlier_attempt_left_and_nothing_else(tmp_path):
    stale = ["stopped.0", "stopped.3", "STOP", "SAVE", ".config.json.1f.tmp"]
    kept = ["done", "metrics.jsonl", "config.json", "restarts.json", "lock", "heartbeat.json"]
    for name in (*stale, *kept):
        (tmp_path / name).write_text("x")
    (tmp_path / "ckpt").mkdir()
    run_folder.open_folder(tmp_path, 0, alone)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "ckpt", ".nonce"}


def test_a_folder_that_another_host_does_not_see_is_refused_with_the_host(tmp_path):
    def all_gather_object(value):
        return [value, ("node7", False)] if isinstance(value[1], bool) else [value, ("", None)]

    with pytest.raises(UserError, match=r"is not shared: node7 does not see"):
        run_folder.open_folder(tmp_path / "new" / "out", 0, all_gather_object)


def test_a_rank_that_reads_another_nonce_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.time, "sleep", lambda _: None)
    (tmp_path / ".nonce").write_text("of an earlier attempt")
    said = []

    def all_gather_object(value):
        said.append(value)
        return [("nonce of rank 0", None), value] if value[1] is None else [("node0", True), value]

    with pytest.raises(UserError, match="is not shared"):
        run_folder.open_folder(tmp_path, 1, all_gather_object)
    assert said[1][1] is False


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run_folder.open_folder(tmp_path / "file" / "out", 0, alone)


def test_the_last_act_tells_done_from_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    run_folder.finish(tmp_path, False, {"step": 5})
    assert json.loads((tmp_path / "stopped.2").read_text()) == {
        "step": 5
    } and not run_folder.is_done(tmp_path)
    run_folder.finish(tmp_path, True, {"step": 9})
    assert run_folder.is_done(tmp_path)


def test_a_stop_asks_to_be_resumed_except_under_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert stop_signals.stop_exit_code() == 85
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert stop_signals.stop_exit_code() == 0


def test_the_written_config_names_its_versions_and_runs_again(tmp_path):
    config = load_run("tiny").with_data(600, SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4), 32)
    run_folder.write_config(tmp_path, config, "abc")
    again = load_run(str(tmp_path / "config.json"))
    assert differences(config, again) == ([], [])
    assert again.provenance["dataset_id"] == "abc" and {"torch", "deepspeed"} <= set(
        again.provenance["packages"]
    )


def test_an_error_is_left_for_the_other_ranks_and_a_full_disk_hides_none(tmp_path):
    failures.record_error(tmp_path, 3, UserError("why"))
    found = json.loads((tmp_path / "error-rank-3.json").read_text())
    assert (found["rank"], found["error"]) == (3, "UserError: why")
    failures.record_error(tmp_path / "nowhere", 3, UserError("why"))
