"""What does OUT say about a run? The files that scripts and later attempts judge by (seams: Names on disk)."""

import json
import os
import platform
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from electra_ds.config import RunConfig
from electra_ds.errors import UserError
from electra_ds.files import write_bytes, write_json

DONE, STOPPED, FAILED = 0, 85, 1  # exit codes beside 2, the user's mistake
PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "sentencepiece", "webdataset", "safetensors")


def open_folder(out: Path, rank: int, exchange: Callable[[Any], list[Any]]) -> None:
    """Make OUT, clear what an earlier attempt left, and check that every rank sees the same folder. Collective.

    Raises UserError on every rank, naming the hosts that do not see what rank 0 wrote.
    """
    nonce, problem = secrets.token_hex(8) if rank == 0 else "", None
    if rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            for pattern in ("stopped.*", "STOP", "SAVE", "error-rank-*.json", ".nonce*"):
                for stale in out.glob(pattern):
                    stale.unlink(missing_ok=True)
            write_bytes(out / ".nonce", nonce.encode())
        except OSError as error:
            problem = f"--out {out}: cannot be written ({error}); choose a folder with room and rights"
    nonce, problem = exchange((nonce, problem))[0]
    if problem:
        raise UserError(problem)
    seen = _read_soon(out / ".nonce", nonce)
    blind = sorted({host for host, sees in exchange((socket.gethostname(), seen)) if not sees})
    if blind:
        raise UserError(
            f"--out {out} is not shared: {', '.join(blind)} does not see what rank 0 wrote; "
            "give a folder on a shared file system"
        )


def _read_soon(path: Path, expected: str) -> bool:
    for _ in range(20):  # network file systems may show a new file late
        if path.exists() and path.read_text() == expected:
            return True
        time.sleep(0.1)
    return False


def is_done(out: Path) -> bool:
    """Whether a run finished here."""
    return (out / "done").exists()


def finish(out: Path, done: bool, facts: dict) -> None:
    """The last act of rank 0: `done`, or `stopped.N` for a saved run that wants to be resumed."""
    write_json(out / ("done" if done else f"stopped.{restart_count()}"), facts)


def restart_count() -> int:
    """How often the scheduler restarted this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def on_stop_signal(note: Callable[[str], None]) -> None:
    """From now on SIGTERM, SIGUSR1 and Ctrl-C call note(name) and nothing else; a second Ctrl-C does not wait.

    A note to vote on at a later step: a save begun on one rank's signal alone would wait for the others.
    """

    def ask(number: int, _frame: object) -> None:
        note(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, ask)


def stop_exit_code() -> int:
    """85 asks to be resumed; torchrun restarts whatever is not 0, so under it a stop leaves with 0."""
    return DONE if "TORCHELASTIC_RUN_ID" in os.environ else STOPPED


def record_error(out: Path, rank: int, error: BaseException) -> None:
    """Leave the cause for the other ranks and for the next attempt; never raises."""
    try:
        facts = {"rank": rank, "host": socket.gethostname(), "error": f"{type(error).__name__}: {error}"}
        (out / f"error-rank-{rank}.json").write_text(json.dumps(facts) + "\n")
    except OSError:
        pass


def write_config(out: Path, config: RunConfig, dataset_id: str) -> None:
    """OUT/config.json: the resolved config with its provenance, runnable as a RUN.json."""
    write_json(out / "config.json", config.model_dump(mode="json") | {"provenance": provenance(dataset_id)})


def provenance(dataset_id: str) -> dict[str, Any]:
    """What wrote a config: versions, commit, host, data."""
    return {
        "dataset_id": dataset_id,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=folder, capture_output=True, text=True
    )
    return described.stdout.strip() or None
