"""Runs with phases in check, plot and status: table, largest memory, rate and remaining time."""

import json
from pathlib import Path

import pytest

from electra_ds.cluster import run_folder
from electra_ds.common.errors import UserError
from electra_ds.common.folder_lock import Lock
from electra_ds.common.json_files import write_json
from electra_ds.config.loading import load_run
from electra_ds.data.dataset import open_data
from electra_ds.reporting.check import check
from electra_ds.reporting.check_phases import largest_memory
from electra_ds.reporting.memory import memory
from electra_ds.reporting.phase_progress import PhaseFacts, progress_at
from electra_ds.reporting.status import lines, status
from electra_ds.training.run_logger import RunLogger

PHASES = [
    {"name": "short", "steps": 100},
    {
        "name": "long",
        "steps": 50,
        "set": {
            "data.sequence_length": 128,
            "train.global_batch_size": 16,
            "train.micro_batch_size": 8,
            "objective.mask_prob": 0.3,
            "optimizer.peak_lr": 0.5,
            "optimizer.warmup_steps": 0,
        },
    },
]


def run(phases: list[dict], *sets: str):
    lengths = ["train.total_steps=null", f"phases={json.dumps(phases)}"]
    return load_run("tiny", [*lengths, "train.micro_batch_size=4", *sets])


def test_check_shows_every_phase() -> None:
    report = check(run(PHASES, "optimizer.warmup_steps=10", "optimizer.peak_lr=0.2"), 2)
    short, long = report.phases
    assert short == (
        "short",
        "100",
        "32 x 32 (4 x 4)",
        "5",
        "102,400",
        "0 to 0.002, at most 0.18",
        "short",
    )
    assert long == ("long", "50", "16 x 128 (1 x 8)", "39", "102,400", "0.5 to 0.01", "long")
    derived = {line.key: line.value for line in report.derived}
    assert (derived["total_steps"], derived["tokens"]) == ("150", "204,800")
    assert report.total_steps == 150 and "accumulation" not in derived
    assert {line.key: line.value for line in report.fields}["phases"] == "short, long"


def test_check_needs_data_only_for_phases_with_epochs(data: Path) -> None:
    phases = [PHASES[0], {"name": "b", "epochs": 2.0, "data": "short"}]
    report = check(run(phases), 1)
    assert report.total_steps is None and not report.spans
    assert [line.steps for line in report.phases] == ["100", "2 epochs"]
    report = check(run(phases), 1, {"short": open_data(data)})
    assert [line.steps for line in report.phases] == ["100", "19"]  # 2 x 300 / 32
    assert report.phases[1].data == "short, 2.027 epochs"
    assert check(run(phases), 1, open_data(data)).total_steps == 119


def test_check_names_the_phase_with_a_batch_that_cannot_be_split() -> None:
    with pytest.raises(UserError, match=r"phase long: train\.global_batch_size = 16 rows cannot"):
        check(run(PHASES), 8)


def test_a_warmup_that_never_ends_is_noted_with_its_phase() -> None:
    phases = [PHASES[0], PHASES[1] | {"set": {"optimizer.warmup_steps": 60}}]
    (note,) = check(run(phases, "optimizer.warmup_steps=10"), 1).warnings
    assert note.startswith("WARNING: phase long: optimizer.warmup_steps = 60 of 50 steps")


def test_the_memory_is_that_of_the_phase_with_the_largest_peak() -> None:
    report = check(run(PHASES), 1)
    index, needs = largest_memory(report.runs, 1)
    assert index == 1 and needs == memory(report.runs[1], 1)
    peaks = [max(need.peak for need in memory(part, 1).values()) for part in report.runs]
    assert peaks[1] > peaks[0]


# ----------------------------------------------------------------------------------------- status


def facts(*phases: tuple[str, int, int]) -> list[PhaseFacts]:
    return [PhaseFacts(name=n, steps=s, tokens_per_step=t) for n, s, t in phases]


def test_progress_counts_the_tokens_of_each_phase() -> None:
    phases = facts(("a", 3, 10), ("b", 2, 100))
    found = [progress_at(phases, step) for step in range(7)]
    assert [p.phase.name for p in found] == ["a", "a", "a", "b", "b", "b", "b"]
    assert [p.tokens for p in found] == [0, 10, 20, 30, 130, 230, 230]
    assert [p.tokens_left for p in found] == [230, 220, 210, 200, 100, 0, 0]


@pytest.mark.parametrize(
    ("step", "phase", "rate", "eta"),
    [(40, "a", 2.0, 60 / 2 + 50 / 0.5), (100, "b", 0.5, 50 / 0.5), (120, "b", 0.5, 30 / 0.5)],
)
def test_status_estimates_the_time_by_the_tokens_of_the_phases(
    tmp_path: Path, step: int, phase: str, rate: float, eta: float
) -> None:
    """A step of b has 4 times the tokens; half of the places are padding; 2 steps of a per second."""
    of_phases = [
        {"name": "a", "steps": 100, "tokens_per_step": 1000, "dataset_id": "x"},
        {"name": "b", "steps": 50, "tokens_per_step": 4000, "dataset_id": "y"},
    ]
    run_folder.write_config(tmp_path, run(PHASES), "x", total_steps=150, phases=of_phases)
    tokens = (min(step, 100) * 1000 + max(0, step - 100) * 4000) / 2
    values = {"tokens_per_second": 1000.0, "skipped_steps": 0.0, "tokens": tokens}
    values |= dict.fromkeys(("lr", "grad_norm", "epoch"), 0.0)
    with RunLogger(tmp_path, 0, 150, None, tensorboard=False) as metrics:
        metrics.begin_phase(phase, 1.0)
        metrics.train(step, values, 0.0)
    with Lock(tmp_path, lambda read: read()) as lock:
        lock.step = step
        lock.beat()
        found = status(tmp_path)
    assert (found["phase"], found["train"]["phase"]) == (phase, phase)
    assert found["steps_per_second"] == pytest.approx(rate)
    assert found["eta_seconds"] == pytest.approx(eta)
    assert lines(status(tmp_path))["next"].startswith("electra-ds pretrain RUN")
    (tmp_path / "ckpt" / "30").mkdir(parents=True)
    write_json(tmp_path / "ckpt" / "30" / "meta.json", {"step": 30})
    (tmp_path / "ckpt" / "latest").write_text("30\n")
    assert status(tmp_path)["next"] == "the same command resumes from step 30"
    assert lines(found)["step"] == f"{step} of 150, phase {phase}"
