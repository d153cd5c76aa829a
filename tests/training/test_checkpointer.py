"""Asynchronous saving: no kill and no failing disk loses an earlier checkpoint."""

import itertools
import multiprocessing
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_weights import CONFIG, PADDED, PROGRESS, FakeWeights
from run_results import curve, is_bit_equal
from running import read_json

from electra_ds.common.errors import RunFailure
from electra_ds.config.schema import CheckpointConfig
from electra_ds.training import checkpoint, checkpointer
from electra_ds.training.checkpointer import PendingCheckpoint
from electra_ds.training.metrics_file import read_metrics
from electra_ds.training.state import TrainingState

# ------------------------------------------------------------------------------------- one process


def test_a_snapshot_holds_the_values_of_its_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, held, original = FakeWeights(), threading.Event(), checkpointer.save_file

    def late(*arguments):
        held.wait(60)
        return original(*arguments)

    monkeypatch.setattr(checkpointer, "save_file", late)
    saving = PendingCheckpoint(weights, tmp_path / "ckpt", "1000", PROGRESS, CONFIG, PADDED)
    for value in weights.values.values():
        value += 1.0
    weights.scaler = {"cur_scale": 2.0}
    assert not saving.is_written() and checkpoint.latest(tmp_path / "ckpt") is None
    held.set()
    assert saving.commit() == checkpoint.latest(tmp_path / "ckpt") and saving.is_written()
    found = FakeWeights(seed=1)
    assert checkpoint.load(found, tmp_path / "ckpt" / "1000", PADDED).state == PROGRESS
    assert found.equals(FakeWeights()) and found.scaler == {"cur_scale": 8.0}


def test_latest_is_written_after_the_metrics_are_flushed(tmp_path: Path) -> None:
    def flush() -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    saving = PendingCheckpoint(FakeWeights(), tmp_path / "ckpt", "1000", PROGRESS, CONFIG, PADDED)
    with pytest.raises(
        RunFailure,
        match=r"rank 0: .*No space left.*metrics\.jsonl.*earlier checkpoints are untouched",
    ):
        saving.commit(flush)
    assert list((tmp_path / "ckpt").iterdir()) == []


def numbered(step: int) -> FakeWeights:
    """Weights that hold their step, large enough for a kill to hit while they are written."""
    weights = FakeWeights(shapes={"word": (16, 4), "table": (1000, 200)})
    weights.values["table", "master"].fill_(step)
    return weights


def save_on(folder: Path, first: int, at_work) -> None:
    """Save the steps after `first` until killed."""
    checkpointer.remove_stale(folder)
    for step in range(first + 1, 10**6):
        PendingCheckpoint(
            numbered(step), folder, str(step), TrainingState(step), CONFIG, PADDED
        ).commit()
        at_work.set()
        checkpointer.prune(folder, CheckpointConfig(), step)


def killed_at(call: int, folder: Path) -> None:
    """Save step 2; kill -9 this process before the N-th call that changes files."""
    calls = itertools.count(1)

    def deadly(original):
        def function(*arguments, **options):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return function

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
    PendingCheckpoint(numbered(2), folder, "2", TrainingState(2), CONFIG, PADDED).commit()
    checkpointer.prune(folder, CheckpointConfig(), 2)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One OpenMP thread: a forked process would wait for threads that it does not have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
# True: a killed attempt has saved step 2 already, but `latest` names step 1.
@pytest.mark.parametrize("again", [False, True])
def test_a_kill_before_any_call_leaves_a_checkpoint_that_loads(tmp_path: Path, again: bool) -> None:
    fork, found = multiprocessing.get_context("fork"), []
    for call in itertools.count(1):
        folder = tmp_path / str(call)
        for step in (0, 2, 1) if again else (0, 1):
            checkpointer.save(
                numbered(step), folder, str(step), TrainingState(step), CONFIG, PADDED
            )
        writer = fork.Process(target=killed_at, args=(call, folder))
        writer.start()
        writer.join()
        weights = numbered(-1)
        found.append(checkpoint.load(weights, checkpoint.latest(folder), PADDED).state.step)
        assert weights.equals(numbered(found[-1]))
        checkpointer.remove_stale(folder)
        assert {path.name for path in folder.iterdir()} <= {"0", "1", "2", "latest"}
        if writer.exitcode == 0:
            break
    assert found == sorted(found) and set(found) == {1, 2} and len(found) > 10


@pytest.mark.usefixtures("one_thread")
def test_kills_at_any_moment_leave_a_checkpoint_that_loads(tmp_path: Path) -> None:
    """A kill hits a write, a rename or a prune; a failure prints the seed of the moments."""
    folder, step, seed = tmp_path / "ckpt", 0, random.randrange(10**6)
    print("seed", seed)
    moments, fork = random.Random(seed), multiprocessing.get_context("fork")
    left_over = 0
    for _ in range(15):
        at_work = fork.Event()
        writer = fork.Process(target=save_on, args=(folder, step, at_work))
        writer.start()
        assert at_work.wait(60)
        time.sleep(moments.uniform(0.0, 0.05))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        found = checkpoint.latest(folder)
        left_over += any(folder.glob(".*"))
        weights = numbered(-1)
        progress = checkpoint.load(weights, found, PADDED).state
        assert (
            progress.step > step
            and found.name == str(progress.step)
            and weights.equals(numbered(progress.step))
        )
        step = progress.step
    checkpointer.remove_stale(folder)
    assert left_over > 0
    assert {path.name for path in folder.iterdir()} <= {
        "latest",
        *(str(step + i) for i in (-2, -1, 0, 1)),
    }


# ------------------------------------------------------------------------ two ranks, failing disks


def test_training_continues_while_a_checkpoint_is_written(disk: Path) -> None:
    assert [read_json(disk / f"whole-{rank}.json")[0] for rank in (0, 1)] == [True, True]
    assert is_bit_equal(disk / "whole", disk / "waited") and curve(disk / "whole") == curve(
        disk / "waited"
    )
    assert {path.name for path in (disk / "whole" / "ckpt").iterdir()} == {
        "10",
        "15",
        "final",
        "latest",
    }


def test_a_stop_at_the_step_of_a_save_waits_for_it(disk: Path) -> None:
    assert (
        checkpoint.latest(disk / "stopped" / "ckpt").name == "5"
        and (disk / "stopped" / "stopped.0").exists()
    )


def test_the_pause_of_every_save_is_in_the_metrics(disk: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for run in ("whole", "waited"):
        events = EventAccumulator(str(disk / run / "tensorboard"))
        events.Reload()
        pauses = {event.step: event.value for event in events.Scalars("checkpoint/pause_seconds")}
        assert list(pauses) == [5, 10, 15, 20] and all(value > 0 for value in pauses.values())
        train = [
            record
            for record in read_metrics(disk / run / "metrics.jsonl")
            if record["split"] == "train"
        ]
        logged = sum(record["checkpoint_pause_seconds"] for record in train)
        assert logged == pytest.approx(
            sum(pauses.values()) - pauses[20], rel=1e-5
        )  # no line comes after the last


@pytest.mark.parametrize(
    ("run", "cause"),
    [
        ("full", r"rank [01]: .*full/.*No space left on device"),
        ("quota", r"rank 1: .*quota/ckpt/\.10\..*-00002-of-00002\.safetensors: .*File too large"),
        ("read-only", r"rank 0: .*Read-only file system: .*read-only/ckpt/\.10\."),
    ],
)
def test_a_failing_disk_stops_all_ranks_and_the_same_command_resumes(
    disk: Path, run: str, cause: str
) -> None:
    ours, theirs = (read_json(disk / f"{run}-{rank}.json") for rank in (0, 1))
    assert ours == theirs and ours[-1] == 0
    assert re.match(
        rf"RunFailure: saving .*/ckpt/10 failed: {cause}.*; earlier checkpoints are untouched",
        ours[0],
    )
    assert is_bit_equal(disk / run, disk / "whole") and curve(disk / run) == curve(disk / "whole")
    assert {path.name for path in (disk / run / "ckpt").iterdir()} == {
        "10",
        "15",
        "final",
        "latest",
    }


def test_a_start_on_a_full_disk_is_refused(disk: Path) -> None:
    message = read_json(disk / "full-0.json")[1]
    assert (
        message.startswith("UserError: ")
        and "not writable" in message
        and "No space left" in message
    )
