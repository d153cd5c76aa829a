"""The run folder OUT: creation, check that all ranks share it, config.json, done and stopped.N."""

import contextlib
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from electra_ds.cluster.provenance import provenance
from electra_ds.common.errors import UserError
from electra_ds.common.files import TEMPORARY, write_bytes
from electra_ds.common.json_files import read_json, write_json
from electra_ds.common.own_folder import own_path
from electra_ds.common.processes import restart_count
from electra_ds.config.schema import RunConfig

# Files of an earlier attempt.
STALE = re.compile(rf"stopped\.[0-9]+|STOP|SAVE|\.nonce|{TEMPORARY.pattern}")
FOLDERS = ("log", "tensorboard", "tokenizer")  # that a run writes; ckpt may be a link


def open_folder(out: Path, rank: int, all_gather_object: Callable[[Any], list[Any]]) -> list[str]:
    """Create OUT, remove stale files, and check that every rank sees the same folder. Collective.

    Returns the host names of all ranks. Raises UserError on every rank when rank 0 cannot write to
    OUT or a folder of OUT is a link out of it, and when hosts do not see the file that rank 0
    wrote; it names them.
    """
    nonce = secrets.token_hex(8) if rank == 0 else ""
    problem = _prepare(out, nonce) if rank == 0 else None
    nonce, problem = all_gather_object((nonce, problem))[0]
    if problem:
        raise UserError(problem)
    is_seen = _appears(out / ".nonce", nonce)
    per_rank = all_gather_object((socket.gethostname(), is_seen))
    blind = sorted({host for host, sees in per_rank if not sees})
    if blind:
        raise UserError(
            f"--out {out} is not shared: {', '.join(blind)} does not see the files of rank 0; "
            "give a folder on a shared file system"
        )
    return [host for host, _ in per_rank]


def _prepare(out: Path, nonce: str) -> str | None:
    """Create the folder. Returns an error message, or None."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in FOLDERS:
            own_path(out, name)
        for stale in filter(STALE.fullmatch, os.listdir(out)):
            if not (out / stale).is_dir() or (out / stale).is_symlink():
                (out / stale).unlink(missing_ok=True)
        write_bytes(out / ".nonce", nonce.encode())
    except UserError as error:
        return str(error)
    except OSError as error:
        return (
            f"--out {out}: cannot be written ({error}); choose a folder with free space and write "
            "permission"
        )
    return None


def _appears(path: Path, expected: str) -> bool:
    """Whether a file with this content appears. Network file systems may show it late."""
    for _ in range(20):
        with contextlib.suppress(OSError):
            if path.read_bytes() == expected.encode():
                return True
        time.sleep(0.1)
    return False


def is_done(out: Path) -> bool:
    """Return whether the run in OUT is finished."""
    return (out / "done").exists()


def finish(out: Path, done: bool, facts: dict[str, Any]) -> None:
    """Write `done`, or `stopped.N` (N: restarts of the SLURM job) for a stopped run, on rank 0.

    It is the last file that an attempt writes.
    """
    write_json(out / ("done" if done else f"stopped.{restart_count()}"), facts)


def write_config(out: Path, config: RunConfig, dataset_id: str, **facts: Any) -> None:
    """Write OUT/config.json: the resolved config with its provenance, usable as a RUN.json.

    facts: more entries of the provenance. The number of earlier starts is added as `restarts`.
    """
    restarts = {"restarts": _restarts(out / "config.json")}
    written_by = provenance(dataset_id) | facts | restarts
    write_json(out / "config.json", config.model_dump(mode="json") | {"provenance": written_by})


def branch_facts(out: Path) -> dict[str, Any] | None:
    """Return the entry `branch` of the provenance in OUT/config.json; None if there is none."""
    facts = _recorded(out / "config.json", "branch")
    return facts if isinstance(facts, dict) else None


def _recorded(config: Path, key: str) -> Any:
    """An entry of the provenance; None if config.json is missing or has no such entry."""
    try:
        return read_json(config, "the config of a run")["provenance"][key]
    except (UserError, LookupError, TypeError):
        return None


def _restarts(config: Path) -> int:
    """Return the number of earlier starts; 0 if config.json is missing or has no provenance."""
    restarts = _recorded(config, "restarts")
    return restarts + 1 if type(restarts) is int and 0 <= restarts < 2**53 else 0
