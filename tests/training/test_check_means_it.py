"""What `check` accepts, `pretrain` runs; what `pretrain` refuses, `check` refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import shard_data
from hypothesis import given, settings
from hypothesis import strategies as st
from running import CPU, ROOT, WITH_SUPPORT

from electra_ds.common.errors import UserError
from electra_ds.config.loading import load_run
from electra_ds.data.dataset import open_data
from electra_ds.data.shard_format import read_manifest, write_manifest
from electra_ds.reporting.check import check
from electra_ds.training.attempt import AttemptOptions, check_out
from electra_ds.training.run_plan import plan

NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, 3, 8, 16, 32, 33, 100, 2**16, 2**16 + 1, 10**9, 10**30, 0.5]
)
FIELDS = st.sampled_from(
    [
        *("model.hidden_size", "model.num_heads", "model.num_layers", "model.ffn_size"),
        *("model.max_positions", "model.type_vocab_size", "model.embedding_size"),
        *("model.vocab_size", "generator.hidden_size", "generator.num_heads"),
        *("data.sequence_length", "train.global_batch_size", "train.micro_batch_size"),
        *("train.total_steps", "train.epochs", "optimizer.warmup_steps", "optimizer.peak_lr"),
        *("objective.mask_prob", "objective.temperature", "checkpoint.every", "logging.every"),
    ]
)


def verdict(act) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(FIELDS, NUMBERS, max_size=3), st.integers(1, 3))
def test_check_and_pretrain_refuse_the_same_configs(data, changes, world_size):
    sets = [f"{key}={value}" for key, value in changes.items()]
    sizes = ("model.hidden_size", "model.num_layers", "model.ffn_size", "generator.hidden_size")
    if any(changes.get(key, 0) > 1000 for key in sizes):
        sets.append("model.num_layers=0")  # refused: counting such a model takes minutes
    source = open_data(data)

    def planned():
        plan(load_run("tiny", sets), source, world_size)

    def checked():
        check(load_run("tiny", sets), world_size, source)

    assert verdict(checked) == verdict(planned)


def test_an_engine_file_that_check_accepts_trains(data: Path, tmp_path: Path) -> None:
    """Real starts, one after the other in one process."""
    script = str(ROOT / "tests/support/accepted_runs.py")
    command = [sys.executable, script, str(data), str(tmp_path), "0", "40"]
    environ = os.environ | CPU | WITH_SUPPORT
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"values')]
    assert len(found) == 40
    for case in found:
        assert case["check"] == case["pretrain"], case
    accepted = [case for case in found if not case["check"]]
    assert 5 < len(accepted) < 36


def test_rows_with_two_segments_need_a_table_with_two(tmp_path: Path) -> None:
    rows = shard_data.best_fit_rows(50, 32, seed=9)
    folder = shard_data.write_data(tmp_path, [rows])
    write_manifest(folder, read_manifest(folder).model_copy(update={"packing": "google"}))
    source = open_data(folder)
    for world_size in (1, 2):
        with pytest.raises(UserError, match=r"model\.type_vocab_size = 1, .* 2 segments"):
            check(load_run("tiny", ["model.type_vocab_size=1"]), world_size, source)
    check(load_run("tiny"), 1, source)


def test_a_warmup_longer_than_the_run_is_said(data: Path) -> None:
    run = load_run("tiny", ["train.total_steps=50"])
    (line,) = check(run, 1, open_data(data)).warnings
    assert "warmup_steps = 100 of 50 steps" in line
    assert check(load_run("tiny"), 1, open_data(data)).warnings == []


@pytest.mark.parametrize(
    "options",
    [
        *({"stop_at_step": step} for step in (0, -5, 10**30)),
        *({"max_minutes": minutes} for minutes in (-1.0, float("nan"), float("inf"))),
    ],
)
def test_limits_out_of_range_are_refused(options):
    with pytest.raises(UserError, match=r"--(stop-at-step|max-minutes) .*expected"):
        AttemptOptions(**options)


def test_a_run_is_not_written_into_prepared_data_or_a_file(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds prepared data"):
        check_out(data)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_out(tmp_path / "file")
    check_out(tmp_path / "new")


def test_a_new_run_is_not_written_below_the_run_it_starts_from(tmp_path: Path) -> None:
    (tmp_path / "earlier" / "ckpt" / "5").mkdir(parents=True)
    started_from = tmp_path / "earlier"
    for path in (started_from, started_from / "ckpt", started_from / "ckpt" / "5"):
        (started_from / "ckpt" / "5" / "meta.json").touch()
        with pytest.raises(UserError, match="lies in the folder that the command reads"):
            check_out(started_from / "next", path)
    assert not (started_from / "next").exists()
    check_out(tmp_path / "new", started_from)
    check_out(tmp_path / "new", tmp_path)  # no run: the error that follows says so
    (started_from / "config.json").touch()  # a repeated command resumes the run in its --out
    check_out(started_from, started_from)
