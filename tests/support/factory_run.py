"""A run file with encoders from a factory (own_pair.py)."""

import json
from pathlib import Path

from electra_ds.config.loading import config_folder, load_run
from electra_ds.config.schema import RunConfig

FACTORY = {
    "factory": "own_pair:build",
    "options": {"width": 8},
    "discr_dim": 8,
    "discr_layer": "conv",
}


def factory_run(folder: Path, *sets: str, **model) -> RunConfig:
    """Write FOLDER/run.json, `tiny` with model.factory, and load it with settings."""
    values = json.loads((config_folder("pretrain") / "tiny.json").read_text())
    values["model"] = FACTORY | model
    del values["generator"]
    (folder / "run.json").write_text(json.dumps(values))
    return load_run(str(folder / "run.json"), list(sets))
