"""Rows of 8,192 tokens on a CPU: bash tests/run.sh -m slow tests/launch/test_long_rows.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_results import curve, is_bit_equal
from running import CPU, ROOT, WITH_SUPPORT, run_cli
from small_corpus import ENTRIES, WORDS

from electra_ds.training.metrics_file import read_metrics

pytestmark = pytest.mark.slow
LENGTH = 8192


def write_text(folder: Path) -> Path:
    """70 documents of 20 to 9,000 words, some longer than a row, and a vocabulary."""
    random = np.random.default_rng(0)
    sizes = [*random.integers(20, 2000, 60), *random.integers(8000, 9000, 10)]
    texts = [" ".join(random.choice(WORDS, size)) for size in sizes]
    (folder / "in.txt").write_text("\n\n".join(texts) + "\n")
    (folder / "tok").mkdir()
    (folder / "tok" / "vocab.txt").write_text("\n".join(ENTRIES) + "\n")
    return folder / "in.txt"


def test_rows_of_8192_tokens_are_prepared_trained_and_resumed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    command = ["prepare", "--input", write_text(tmp_path), "--tokenizer", tmp_path / "tok"]
    command += ["--out", data, "--sequence-length", LENGTH, "--valid-fraction", "0.1"]
    run_cli(*command)
    sets = ["train.total_steps=4", "train.global_batch_size=2", "train.micro_batch_size=1"]
    sets += [f"data.sequence_length={LENGTH}", "logging.every=1", "train.eval_rows=1"]
    sets += ["optimizer.warmup_steps=2", "train.eval_every=1000", "model.mlp_dropout=0.1"]
    options = [part for setting in sets for part in ("--set", setting)]

    def pretrain(out: Path, *more: object, code: int = 0) -> None:
        run = ("modern-tiny", "--data", data, "--out", out, "--engine", "zero1-fp32")
        done = run_cli("pretrain", *run, *options, *more, check=False)
        assert done.returncode == code, done.stderr[-4000:]

    pretrain(tmp_path / "whole")
    pretrain(tmp_path / "cut", "--stop-at-step", 2, code=85)
    pretrain(tmp_path / "cut")
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [r["step"] for r in records if r["split"] == "train"] == [1, 2, 3, 4]
    assert is_bit_equal(tmp_path / "cut", tmp_path / "whole")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_memory_grows_with_the_row_as_check_says() -> None:
    """A row of one document needs what `check` says; one of several documents needs less."""
    command = [sys.executable, str(ROOT / "tests/support/long_rows.py"), "4096", str(LENGTH)]
    environ = os.environ | CPU | WITH_SUPPORT
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for length in (4096, LENGTH):
        measured, predicted = found[f"{length} x 1"]["peak"]
        assert measured <= predicted * 1.02 and predicted < 1.3 * measured, found
        assert found[f"{length} x 4"]["peak"][0] < measured, found
