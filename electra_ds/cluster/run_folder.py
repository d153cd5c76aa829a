"""What does OUT say about a run? The files that scripts and later attempts judge by (seams: Names on disk)."""

import contextlib
import faulthandler
import json
import logging
import os
import platform
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from electra_ds.cluster.launchers import Ranks
from electra_ds.common.errors import LockedOut, UserError
from electra_ds.common.files import read_json, write_bytes, write_json
from electra_ds.common.processes import restart_count
from electra_ds.config.schema import RunConfig

DONE, STOPPED, FAILED = 0, 85, 1  # exit codes beside 2, the user's mistake
ERRORS_KEPT = 10  # in restarts.json
PACKAGES = (
    "torch",
    "deepspeed",
    "numpy",
    "tokenizers",
    "sentencepiece",
    "webdataset",
    "safetensors",
)
LOG = logging.getLogger("electra_ds")  # of this rank: OUT/log/rank-N.log once `open_log` was called
LOG.setLevel(logging.INFO)
LOG.propagate = False
LOG.addHandler(logging.NullHandler())  # else early words go to stderr


def open_folder(out: Path, rank: int, all_gather_object: Callable[[Any], list[Any]]) -> list[str]:
    """Make OUT, clear what an earlier attempt left, and check that every rank sees the same folder. Collective.

    Returns the host of each rank. Raises UserError on every rank, naming the hosts that do not see what rank 0 wrote.
    """
    nonce, problem = secrets.token_hex(8) if rank == 0 else "", None
    if rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            for pattern in ("stopped.*", "STOP", "SAVE", ".nonce*", ".*.tmp"):
                for stale in out.glob(pattern):
                    stale.unlink(missing_ok=True)
            write_bytes(out / ".nonce", nonce.encode())
        except OSError as error:
            problem = (
                f"--out {out}: cannot be written ({error}); choose a folder with room and rights"
            )
    nonce, problem = all_gather_object((nonce, problem))[0]
    if problem:
        raise UserError(problem)
    seen = _read_soon(out / ".nonce", nonce)
    everyone = all_gather_object((socket.gethostname(), seen))
    blind = sorted({host for host, sees in everyone if not sees})
    if blind:
        raise UserError(
            f"--out {out} is not shared: {', '.join(blind)} does not see what rank 0 wrote; "
            "give a folder on a shared file system"
        )
    return [host for host, _ in everyone]


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


def on_stop_signal(note: Callable[[str], None]) -> None:
    """From now on SIGTERM, SIGUSR1 and Ctrl-C call note(name) and nothing else; a second Ctrl-C does not wait.

    A note to vote on at a later step: a save begun on one rank's signal alone would wait for the others.
    """

    def ask(number: int, _frame: object) -> None:
        note(signal.Signals(number).name)
        LOG.info("%s: asked to stop", signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, ask)


def open_log(out: Path, ranks: Ranks) -> None:
    """From now on what concerns this rank alone goes to OUT/log/rank-N.log: its start, stop signals, errors with their
    traceback, who was lost, and the stacks of all threads on SIGUSR2 and on a crash.
    """
    path = out / "log" / f"rank-{ranks.rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    handler.handleError = lambda _record: (
        None
    )  # a full disk is told by whoever saves, not by a traceback for each line
    for old in LOG.handlers[:]:
        LOG.removeHandler(old)
        old.close()
    LOG.addHandler(handler)
    faulthandler.enable(handler.stream)
    faulthandler.register(signal.SIGUSR2, handler.stream)
    place = (
        f"rank {ranks.rank} of {ranks.world_size} on {socket.gethostname()}, process {os.getpid()}"
    )
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES[:2])
    LOG.info("%s, restart %d, %s", place, restart_count(), versions)


def stop_exit_code() -> int:
    """85 asks to be resumed; torchrun restarts whatever is not 0, so under it a stop leaves with 0."""
    return DONE if "TORCHELASTIC_RUN_ID" in os.environ else STOPPED


def record_error(out: Path, rank: int, error: BaseException | str, host: str = "") -> None:
    """Leave the cause for the next attempt in OUT/error-rank-N.json; never raises. Nothing in an OUT of others.

    error: what the rank raised, or how it was lost. host: its own, where that is not this one.
    """
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    facts = _ended(rank, text, host) | {
        "failure": not isinstance(error, UserError | KeyboardInterrupt)
    }
    if not isinstance(error, LockedOut):
        with contextlib.suppress(OSError):
            (out / f"error-rank-{rank}.json").write_text(json.dumps(facts) + "\n")


def count_failures(out: Path, step: int, limit: int, silent: str) -> None:
    """Move what ended the last attempt into OUT/restarts.json. For rank 0, once OUT is its own.

    step: of the latest checkpoint; a later one than at the last failure starts the count anew.
    silent: of whom the lock was taken over, an attempt that died without a word; or empty. Stops are no failures, nor
    are mistakes of the user. UserError when more than `limit` failures in a row gained no checkpoint (0: no limit).
    """
    path, files = out / "restarts.json", sorted(out.glob("error-rank-*.json"))
    found = {"failures": 0, "in_a_row": 0, "step": -1, "errors": []}
    if path.exists():
        found = read_json(path, "the failures of this run")
    left = sorted((_read_error(file) for file in files), key=lambda error: error["time"])
    errors = [error for error in left if error.pop("failure", True)]
    if silent and not left:
        errors = [_ended(0, f"ended without a word: {silent}")]
    if step > found["step"]:
        found |= {"in_a_row": 0, "step": step}
    if errors:
        found |= {"failures": found["failures"] + 1, "in_a_row": found["in_a_row"] + 1}
        found["errors"] = (found["errors"] + errors)[-ERRORS_KEPT:]
        write_json(path, found)
    for file in files:
        file.unlink()
    if limit and found["in_a_row"] > limit:
        last = found["errors"][-1]
        raise UserError(
            f"{out} failed {found['in_a_row']} times in a row at step {found['step']} without gaining a checkpoint "
            f"(train.max_restarts = {limit}); the last time on rank {last['rank']}, {last['host']}: {last['error']}. "
            f"Mend the cause and remove {path}, or raise train.max_restarts"
        )


def _ended(rank: int, error: str, host: str = "") -> dict:
    now = datetime.now().astimezone().isoformat(timespec="milliseconds")
    return {"rank": rank, "host": host or socket.gethostname(), "time": now, "error": error}


def _read_error(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError:  # cut short by a kill or a full disk
        return _ended(int(file.stem.rpartition("-")[2]), f"{file.name} is cut short")


def write_config(out: Path, config: RunConfig, dataset_id: str, **facts: Any) -> None:
    """OUT/config.json: the resolved config with its provenance, runnable as a RUN.json.

    facts: more for the provenance, beside how often the run was started again.
    """
    found = provenance(dataset_id) | facts | {"restarts": _restarts(out / "config.json")}
    write_json(out / "config.json", config.model_dump(mode="json") | {"provenance": found})


def _restarts(before: Path) -> int:
    try:
        return json.loads(before.read_text())["provenance"]["restarts"] + 1
    except (OSError, ValueError, LookupError, TypeError):  # none yet, or written by hand
        return 0


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
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or None
