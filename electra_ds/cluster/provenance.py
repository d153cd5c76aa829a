"""Provenance of a config: versions, commit, host, data."""

import platform
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "deepspeed",
    "numpy",
    "tokenizers",
    "sentencepiece",
    "webdataset",
    "safetensors",
)


def provenance(dataset_id: str) -> dict[str, Any]:
    """Return dataset_id, host, versions and commit of this process, as JSON values."""
    versions = {name: package_version(name) for name in PACKAGES}
    return {
        "dataset_id": dataset_id,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: number for name, number in versions.items() if number},
        "commit": _commit(),
    }


def package_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, with "-dirty" for changes; None outside a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    described = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return described.stdout.strip() or None
