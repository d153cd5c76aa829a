"""The metrics of a run: continuous across resumes, and equal in all three outputs."""

import json
import math
import os
import sys
import threading
import tracemalloc

import pytest
from logged_run import log_run, train_values

from electra_ds.common import json_files
from electra_ds.common.errors import UserError
from electra_ds.training import metrics_file
from electra_ds.training.metrics_file import SCHEMA, TIMED, metric_lines, read_metrics
from electra_ds.training.run_logger import RunLogger


def steps_of(out, split="train"):
    return [
        record["step"] for record in read_metrics(out / "metrics.jsonl") if record["split"] == split
    ]


# ----------------------------------------------------------------------------------- metrics.jsonl


def test_the_first_line_names_the_schema_and_the_others_are_records(tmp_path):
    log_run(tmp_path, range(1, 6))
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
    log_run(tmp_path, range(1, 13))
    log_run(tmp_path, range(9, 15), start=8)
    assert steps_of(tmp_path) == list(range(1, 15)) and steps_of(tmp_path, "valid") == [5, 10]
    log_run(tmp_path, [], start=5)
    assert steps_of(tmp_path) == list(range(1, 6)) and steps_of(tmp_path, "valid") == [5]
    log_run(tmp_path, [1], start=0)
    assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize(
    "tail", ['{"step": 4, "split": "tr', '{"step": 4, "split": "train"}', "\x00\x00"]
)
def test_a_last_line_without_its_end_is_left_out(tmp_path, tail):
    log_run(tmp_path, range(1, 4))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    assert steps_of(tmp_path) == [1, 2, 3]
    log_run(tmp_path, [4], start=3)
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
    log_run(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 2,', '"step": ,'))
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 3 is not JSON"):
        read_metrics(path)


@pytest.mark.parametrize(
    "line",
    [
        *("{", "3", "[]", '{"step": -1, "split": "train"}', '{"step": 2}'),
        *('{"step": "2", "split": "train"}', '{"step": 2, "split": "x"}'),
        '{"step": 2, "split": "train", "loss": "x"}',
        '{"step": 2, "split": "train", "loss": NaN}',
        '{"step": 2, "split": "train", "loss": 1e400}',
        '{"step": 1, "step": 2, "split": "train"}',
    ],
)
def test_a_damaged_file_is_set_aside_at_a_resume_and_its_beginning_kept(tmp_path, capsys, line):
    log_run(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], line + "\n", *lines[3:]]))
    with pytest.raises(UserError, match="line 4"):
        read_metrics(path)
    log_run(tmp_path, [4], start=3)
    assert steps_of(tmp_path) == [1, 2, 4]
    assert (tmp_path / "metrics.jsonl.damaged").exists()
    assert "the 2 records before the damage are kept" in capsys.readouterr().out


def test_a_file_of_another_kind_is_set_aside_at_a_resume(tmp_path):
    for content in ("text", "text\n", b"\xff\n", None):
        path = tmp_path / "metrics.jsonl"
        path.unlink(missing_ok=True)
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        log_run(tmp_path, [4], start=3)
        assert steps_of(tmp_path) == [4]


def test_a_log_larger_than_any_limit_is_cut_back_line_by_line(tmp_path, monkeypatch):
    log_run(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    schema, *lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(schema + lines[0] * 20_000 + b"".join(lines))
    size = path.stat().st_size
    monkeypatch.setattr(json_files, "read_small", lambda *_: pytest.fail("read as a whole"))
    tracemalloc.start()
    for _ in metric_lines(path):
        pass
    RunLogger(tmp_path, 2, 100, 1.0, tensorboard=False).__exit__()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 3_000_000 and peak < size / 3
    assert steps_of(tmp_path) == [1] * 20_001 + [2]


def test_a_line_without_an_end_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_file, "MAX_LINE_BYTES", 1000)
    log_run(tmp_path, range(1, 3))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UserError, match="line 4 has more than 1,000 bytes"):
        read_metrics(tmp_path / "metrics.jsonl")
    log_run(tmp_path, [3], start=2)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_metrics_and_tensorboard_do_not_leave_the_run_folder(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("precious")
    for name in ("link", "fifo"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / "metrics.jsonl").symlink_to(tmp_path / "victim" / "file")
    os.mkfifo(tmp_path / "fifo" / "metrics.jsonl")
    for name in ("link", "fifo"):
        log_run(tmp_path / name, [1])
        assert steps_of(tmp_path / name) == [1]
    pytest.importorskip("tensorboard")
    (tmp_path / "link" / "tensorboard").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="symbolic link"):
        log_run(tmp_path / "link", [2], start=1, tensorboard=True)
    assert (tmp_path / "victim" / "file").read_text() == "precious"
    assert os.listdir(tmp_path / "victim") == ["file"]


def test_a_line_says_that_a_run_trains_before_its_first_log_line(tmp_path, capsys):
    with RunLogger(tmp_path, 0, 1000, 1.0, tensorboard=False) as metrics:
        metrics.running(10, 6.0, 500, 5940.0)
    assert capsys.readouterr().out == (
        "step 10  6.00 s per step  ETA 1:39:00; losses are logged every 500 steps (logging.every)\n"
    )


def test_printed_lines_have_no_control_characters_and_no_secrets(tmp_path, capsys):
    with RunLogger(tmp_path, 0, 1000, 1.0, tensorboard=False) as metrics:
        metrics.say("mixture: a\x1b[31m, https://user:hunter2@host/D")
    assert capsys.readouterr().out == "mixture: a\\x1b[31m, https://***@host/D\n"


def test_the_console_prints_the_values_of_the_record(tmp_path, capsys):
    log_run(tmp_path, [5])
    train, valid = capsys.readouterr().out.strip().splitlines()
    assert "step 5  mlm 9.950  disc 0.1000  lr 2.00e-04  norm 1.00  12,345 tokens/s" in train
    assert train.endswith("epoch 0.05/1  ETA 1:02:05")
    assert valid.startswith("step 5  held out: mlm 5.000 (unigram 5.100)")
    assert "fixed-corruption AUC 5.700" in valid


def test_a_closed_console_stops_nothing(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as console:
        monkeypatch.setattr(sys, "stdout", console)
        log_run(tmp_path, range(1, 6))
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def test_lines_that_a_full_disk_refuses_are_written_later(tmp_path, capsys):
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


# ------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_holds_the_same_numbers_without_overlap_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_run(tmp_path, range(1, 13), tensorboard=True)
    log_run(tmp_path, range(9, 15), start=8, tensorboard=True)
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


def test_a_full_disk_stops_only_tensorboard_without_a_traceback(tmp_path, capfd, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # prints tracebacks
    before = set(threading.enumerate())
    with RunLogger(tmp_path, 0, 100, 1.0, tensorboard=True) as metrics:
        (writer,) = (
            thread
            for thread in set(threading.enumerate()) - before
            if type(thread).__module__.startswith("tensorboard.")
        )
        (events,) = (tmp_path / "tensorboard").iterdir()
        (tmp_path / "full").symlink_to("/dev/full")
        # In one step: the thread of the writer would make a missing file again.
        (tmp_path / "full").replace(events)
        for step in (1, 2, 3):
            metrics.train(step, train_values(step), seconds_left=0.0)
            metrics.flush()
    assert steps_of(tmp_path) == [1, 2, 3]
    writer.join(60)  # it prints its traceback, if any, after it has raised the error in RunLogger
    printed = capfd.readouterr()
    message = "TensorBoard's file is not written until the next start"
    assert not writer.is_alive() and printed.out.count(message) == 1
    # Threads of other tests may print, too.
    assert "No space left" not in printed.err and "tensorboard" not in printed.err


def test_tensorboard_can_be_turned_off(tmp_path):
    log_run(tmp_path, [1], tensorboard=False)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
