"""Mistakes in --generator-from have one message; the ranks are in test_ranks_train."""

import pytest
import run_folders

from electra_ds.common.errors import UserError
from electra_ds.interop.frozen_generator import generator_reader
from electra_ds.training import generator_from
from electra_ds.training.generator_from import read_weights


@pytest.fixture
def read(tmp_path, monkeypatch):
    """`read_weights` in one process without a group."""
    monkeypatch.setattr(generator_from, "on_rank0", lambda function: function())
    run_folders.vocabulary(tmp_path / "tokenizer")

    def weights(path, config):
        return read_weights(
            generator_reader(path),
            config,
            tmp_path / "tokenizer",
            lambda value: [value],
            needs_weights=True,
        )

    return weights


def test_a_message_begins_with_the_option(read, tmp_path):
    run_folders.pretrained(tmp_path / "run")
    other = run_folders.frozen_config(num_layers=1)
    for path, config in ((tmp_path / "nowhere", other), (tmp_path / "run", other)):
        with pytest.raises(UserError) as caught:
            read(path, config)
        message = str(caught.value)
        assert message.startswith(f"--generator-from {path}: ")
        assert message.count("--generator-from") == 1 and "rank" not in message
    assert read(tmp_path / "run", run_folders.frozen_config())
