"""A task of a user, from files that a test gives."""

import json

import pytest

from electra_ds.finetuning.tasks import load_task


@pytest.fixture
def own_task(tmp_path):
    """A function that writes files (name -> content) and a description; returns its task."""

    def write(files, **values):
        for name, text in files.items():
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        splits = {"train": [*files, ""][0], "valid": ["", *files][-1]}
        (tmp_path / "own.json").write_text(json.dumps({"splits": splits} | values))
        return load_task(str(tmp_path / "own.json"), None)

    return write
