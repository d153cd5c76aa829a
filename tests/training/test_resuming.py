"""What a start says when a run is finished, or cannot resume with its config."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import run_folders

from electra_ds.config.loading import differences, load_run
from electra_ds.training.pretrain import finished_line
from electra_ds.training.resuming import other_ways


@pytest.mark.parametrize(
    ("setting", "branches"),
    [
        ("train.seed=3", True),
        ("model.hidden_dropout=0.3", True),
        ("optimizer.kind=lamb", False),
        ("model.num_layers=3", False),
    ],
)
def test_a_branch_is_advised_only_where_it_is_possible(setting: str, branches: bool) -> None:
    old, new = load_run("tiny"), load_run("tiny", [setting])
    science = differences(old, new)[0]
    assert len(science) == 1
    text = other_ways(old, new, science)
    assert ("--branch-from" in text) == branches and "--init-from" in text
    text = other_ways(old, load_run("modern-tiny"), science)
    assert "own architecture" in text and "-from" not in text


def test_a_longer_config_of_a_finished_run_needs_extend_only(tmp_path: Path) -> None:
    run_folders.pretrained(tmp_path)
    config = run_folders.config()
    attempt = SimpleNamespace(out=tmp_path, config=config, total_steps=7)
    line = finished_line(attempt)
    assert "is finished; to continue, raise train.total_steps and pass --extend" in line
    attempt.total_steps += 2
    line = finished_line(attempt)
    assert f"to continue to step {attempt.total_steps}, pass --extend" in line
    assert "raise" not in line
