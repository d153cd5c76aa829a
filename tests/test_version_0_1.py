"""Folders written by version 0.1 are read, and its run resumes."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from running import FILES, run_cli

from electra_ds.data.shard_reader import ShardReader
from electra_ds.training.metrics_file import TIMED, read_metrics

WRITTEN = FILES / "version-0.1"


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of version 0.1, resumed at step 6 and finished."""
    out = tmp_path_factory.mktemp("version-0.1") / "run"
    shutil.copytree(WRITTEN / "run", out)
    engine = ("--engine", "zero1-fp32")  # a file of version 0.1, now zero1 with a precision
    run_cli("pretrain", out / "config.json", "--data", WRITTEN / "data", "--out", out, *engine)
    return out


def test_the_data_folder_is_read() -> None:
    reader = ShardReader(WRITTEN / "data", "train")
    rows = reader.read(np.arange(reader.rows))
    assert rows.shape == (reader.rows, 32) and rows.max() < 90
    assert "as written" in run_cli("verify", WRITTEN / "data").stdout


def test_the_run_resumes_with_the_metrics_of_an_uninterrupted_run(resumed: Path) -> None:
    found = read_metrics(resumed / "metrics.jsonl")
    expected = read_metrics(WRITTEN / "expected-metrics.jsonl")
    assert [(r["step"], r["split"]) for r in found] == [(r["step"], r["split"]) for r in expected]
    for record, wanted in zip(found, expected, strict=True):
        for key in wanted.keys() - TIMED - {"split"}:
            close = math.isclose(record[key], wanted[key], rel_tol=1e-4, abs_tol=1e-6)
            assert close, (record["step"], key, record[key], wanted[key])


def test_the_run_is_evaluated_exported_and_reported(resumed: Path, tmp_path: Path) -> None:
    values = json.loads(run_cli("evaluate", resumed, "--data", WRITTEN / "data", "--json").stdout)
    assert values["tokens"] > 0 and math.isfinite(values["mlm_loss"])
    run_cli("export", resumed, "--out", tmp_path / "exported")
    assert (tmp_path / "exported" / "discriminator" / "model.safetensors").is_file()
    facts = json.loads(run_cli("status", resumed, "--json").stdout)
    assert (facts["state"], facts["step"]) == ("finished", 12)
