"""Status of a run, read from the files of its run folder while another process writes them."""

import math
import os
import shlex
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import AwareDatetime, Field

from electra_ds.cluster.failures import ERROR_FILES, AttemptError, Failures
from electra_ds.cluster.launchers import NO_LAUNCHER
from electra_ds.common.errors import UserError
from electra_ds.common.folder_kinds import found_at
from electra_ds.common.folder_lock import STALE_SECONDS, owner_of
from electra_ds.common.json_files import AnyRecord, Record, read_record, read_small
from electra_ds.common.names import check_name
from electra_ds.common.printable import printable, printable_lines
from electra_ds.common.redaction import redacted
from electra_ds.config.phases import how_to_extend
from electra_ds.reporting.phase_progress import PhaseFacts, Progress, progress_at
from electra_ds.training.metrics_file import TRAIN, VALID, metric_lines, summary
from electra_ds.training.verdict import Verdict

NEXT = {
    "training": "touch {out}/STOP saves and stops it, touch {out}/SAVE saves",
    "silent": "check the machine of its owner; if it is down, "
    "the same command resumes from step {at}",
    "failed": "correct the cause; the same command resumes from step {at}",
    "refused": "correct the cause and remove {out}/restarts.json (train.max_restarts = {limit})",
    "stopped": "the same command resumes from step {at}",
    "weights only": "there are no moments to resume with; start a run from these weights: "
    "electra-ds pretrain {out}/config.json --data D --out O --init-from {out}",
    "finished": "electra-ds evaluate {out} --data D; for more steps {longer} and give --extend",
    "not started": "electra-ds pretrain RUN --data D --out {out}",
}


class _Part(Record):
    """Keys that status reads from a file of the run folder; other keys are ignored."""

    model_config = Record.model_config | {"extra": "ignore"}


class _Train(_Part):
    total_steps: int | None = Field(default=None, ge=1, le=2**53)
    max_restarts: int | None = Field(default=None, ge=0, le=2**53)


class _Provenance(_Part):
    total_steps: int | None = Field(default=None, ge=1, le=2**53)
    nodes: list[str] | None = None
    launcher: str | None = None
    restarts: int | None = Field(default=None, ge=0, le=2**53)
    phases: list[PhaseFacts] = Field(default_factory=list)
    host: str | None = None


class _Config(_Part):
    """OUT/config.json."""

    train: _Train = _Train()
    provenance: _Provenance | None = None


class _Heartbeat(_Part):
    """OUT/heartbeat.json."""

    step: int = Field(default=0, ge=0, le=2**53)
    time: AwareDatetime


class _Meta(_Part):
    """meta.json of a checkpoint."""

    step: int = Field(ge=0, le=2**53)
    files: dict[str, Any] | None = None

    @property
    def has_moments(self) -> bool:
        """Whether a run can resume from it; True if its files are not known."""
        return self.files is None or any(name.startswith("optim") for name in self.files)


def status(out: Path) -> dict[str, Any]:
    """The facts of a run folder as JSON values; times in seconds.

    state: training; silent (the folder is locked, and its last heartbeat is missing or older than
        STALE_SECONDS by the clock of this machine); finished; failed (the last attempt recorded a
        failure, or the process that holds the lock has ended on this machine); stopped (there is a
        checkpoint to resume from); weights only (its checkpoint has no moments: an import, an
        average, or a checkpoint without them); not started.
    failures: all failures, including those that restarts.json does not count yet.
    missing: files that do not exist or cannot be read; their facts are null or empty.
    Raises UserError when `out` is no folder, or one of another kind.
    """
    found = found_at(out)
    if found.kind not in ("run", "other"):
        raise UserError(
            f"{printable(out)}: no run folder here{found.clause}; expected --out of a run"
        )
    missing: list[str] = []
    config = _read(out / "config.json", _Config, missing) or _Config()
    heartbeat = _read(out / "heartbeat.json", _Heartbeat, missing, expected=False)
    checkpoint = _checkpoint(out / "ckpt", missing)
    train, provenance = config.train, config.provenance or _Provenance()
    last = _last_records(out / "metrics.jsonl", missing)
    owner, is_gone = owner_of(out)
    silence = _age(heartbeat.time.timestamp()) if heartbeat else None
    errors = _errors(out, missing, owner if is_gone else "", provenance.host or "")
    failed = [error for error in errors if error.failure]
    at, limit = checkpoint.get("step", 0), train.max_restarts
    failures = _failures(out, missing).with_attempt(at, failed)
    total_steps = provenance.total_steps or train.total_steps
    step = max(
        heartbeat.step if heartbeat else 0, at, *(record["step"] for record in last.values())
    )
    pace = _pace(provenance.phases, last.get("train"), step, total_steps)
    state = _state(out, owner and not is_gone, silence, bool(failed), checkpoint)
    is_refused = bool(failed) and bool(limit) and failures.in_a_row > (limit or 0)
    return {
        "out": str(out),
        "state": state,
        "step": step,
        "total_steps": total_steps,
        "phase": pace.phase,
        "steps_per_second": pace.rate,
        "eta_seconds": _eta(pace.steps_left, pace.rate) if state == "training" else None,
        "train": last.get("train", {}),
        "valid": last.get("valid", {}),
        "verdict": str(Verdict.of_record(last.get("train", {})) or ""),
        "checkpoint": checkpoint,
        "owner": owner,
        "heartbeat_age": silence,
        "nodes": provenance.nodes,
        "launcher": provenance.launcher,
        "restarts": provenance.restarts,
        "failures": failures.failures,
        "failures_in_a_row": failures.in_a_row,
        "last_error": next((e.facts() for e in [*errors, *failures.errors[::-1]]), None),
        "missing": missing,
        "next": NEXT["refused" if is_refused else state].format(
            out=shlex.quote(str(out)), at=at, limit=limit, longer=how_to_extend(provenance.phases)
        ),
    }


def _state(
    out: Path, is_owned: Any, silence: float | None, failed: bool, checkpoint: dict[str, Any]
) -> str:
    if is_owned:
        return "silent" if silence is None or silence > STALE_SECONDS else "training"
    if (out / "done").exists():
        return "finished"
    if failed:
        return "failed"
    if not checkpoint:
        return "not started"
    return "stopped" if checkpoint["has_moments"] else "weights only"


def _failures(out: Path, missing: list[str]) -> Failures:
    """What restarts.json counts so far."""
    return _read(out / "restarts.json", Failures, missing, expected=False) or Failures()


def _errors(out: Path, missing: list[str], gone_owner: str, host: str) -> list[AttemptError]:
    """The errors of the last attempt, by time.

    gone_owner: name of the owner of the lock if its process has ended, else "". If the process left
    no error file, its end is returned as the error.
    """
    files = sorted(out.glob(ERROR_FILES))
    errors = [error for file in files if (error := _read(file, AttemptError, missing))]
    if gone_owner and not errors:
        return [AttemptError(rank=0, host=host, error=f"ended without a message: {gone_owner}")]
    return sorted(errors, key=lambda error: error.time)


def lines(facts: dict[str, Any]) -> dict[str, str]:
    """The facts as lines of text by title; lines without facts are left out."""
    saved, error = facts["checkpoint"], facts["last_error"]
    rate, nodes = facts["steps_per_second"], facts["nodes"]
    texts = {
        "state": facts["state"],
        "step": f"{facts['step']:,}"
        + (f" of {facts['total_steps']:,}" if facts["total_steps"] else "")
        + (f", phase {facts['phase']}" if facts["phase"] else ""),
        "rate": f"{rate:.2f} steps/s, {facts['train']['tokens_per_second']:,.0f} tokens/s"
        if rate
        else "",
        "ETA": _span(facts["eta_seconds"]),
        "training": _metrics(facts["train"], TRAIN),
        "held out": _metrics(facts["valid"], VALID),
        "verdict": facts["verdict"],
        "checkpoint": f"{saved['name']}, step {saved['step']:,}, {_span(saved['age'])} ago"
        if saved
        else "",
        "owner": facts["owner"]
        and f"{facts['owner']}, heartbeat {_span(facts['heartbeat_age'])} ago",
        "ranks": _ranks(nodes, facts["launcher"]) if nodes else "",
        "restarts": f"{facts['restarts'] or 0}; failures {facts['failures']}, "
        f"{facts['failures_in_a_row']} in a row",
        "last error": f"rank {error['rank']}, {error['host']}: {error['error']}" if error else "",
        "missing": "; ".join(facts["missing"]),
        "next": facts["next"],
    }
    return {title: redacted(printable_lines(text)) for title, text in texts.items() if text}


def _ranks(nodes: list[str], launcher: str | None) -> str:
    how = ", no launcher" if launcher in (None, NO_LAUNCHER) else f" under {launcher}"
    return f"{len(nodes)}{how}, on {', '.join(dict.fromkeys(nodes))}"


def _read(
    path: Path, kind: type[AnyRecord], missing: list[str], expected: bool = True
) -> AnyRecord | None:
    """A file of the run folder; None, with a line in `missing`, if it cannot be read."""
    if not os.path.lexists(path):
        missing += [f"{path.name}: not there"] if expected else []
        return None
    try:
        return read_record(path, kind, "a file of a run")
    except UserError as error:  # truncated by a kill or a full disk, or of another program
        missing.append(str(error))
    return None


def _last_records(path: Path, missing: list[str]) -> dict[str, dict[str, Any]]:
    """The last record of each split in metrics.jsonl, before the first damaged line."""
    last: dict[str, dict[str, Any]] = {}
    try:
        for _, record in metric_lines(path):
            last[record["split"]] = record
    except FileNotFoundError:
        missing.append(f"{path.name}: not there")
    except UserError as error:
        missing.append(str(error))
    return last


def _checkpoint(folder: Path, missing: list[str]) -> dict[str, Any]:
    """Name, step, age and `has_moments` of the checkpoint that `latest` names."""
    pointer = folder / "latest"
    if not os.path.lexists(pointer):
        missing.append("ckpt/latest: not there")
        return {}
    try:
        name = read_small(pointer, "the name of a checkpoint", 256).decode(errors="replace").strip()
        name = check_name(name, str(pointer), "the name of a checkpoint")
    except UserError as error:
        missing.append(str(error))
        return {}
    file = folder / name / "meta.json"
    meta = _read(file, _Meta, missing)
    if meta is None:
        return {}
    age = _age(file.stat().st_mtime)
    return {"name": name, "step": meta.step, "age": age, "has_moments": meta.has_moments}


def _rate(record: dict[str, Any] | None) -> float | None:
    """Steps per second, skipped ones included, of the last logging interval."""
    if not record:
        return None
    keys = ("tokens_per_second", "skipped_steps", "tokens")
    speed, skipped, tokens = (record.get(key) for key in keys)
    if speed is None or skipped is None or not tokens:
        return None
    # Values of a damaged file can be up to 10^300: the product of integers may not fit a float.
    rate = float(speed) * float(record["step"] + skipped) / float(tokens)
    return rate if math.isfinite(rate) else None


class _Pace(NamedTuple):
    """Name of the phase, steps per second, and steps that are left; in steps of this phase."""

    phase: str | None
    rate: float | None
    steps_left: float | None


def _pace(
    phases: list[PhaseFacts], record: dict[str, Any] | None, step: int, total_steps: int | None
) -> _Pace:
    """The pace after `step` steps. phases: empty for a run without. record: the last of training."""
    if not phases:
        return _Pace(None, _rate(record), total_steps - step if total_steps else None)
    at = progress_at(phases, step)
    left = at.tokens_left / at.phase.tokens_per_step
    return _Pace(at.phase.name, _rate_in_phases(record, phases, at), left)


def _rate_in_phases(
    record: dict[str, Any] | None, phases: list[PhaseFacts], at: Progress
) -> float | None:
    """Steps of the present phase per second, by the tokens/s of the last logging interval."""
    if not record:
        return None
    keys = ("tokens_per_second", "skipped_steps", "tokens")
    speed, skipped, tokens = (record.get(key) for key in keys)
    if speed is None or skipped is None or not tokens:
        return None
    # `tokens` are those without padding, of skipped steps as well.
    attempts = (record["step"] + float(skipped)) / max(1, record["step"])
    padded = progress_at(phases, record["step"]).tokens * attempts
    rate = float(speed) * padded / float(tokens) / at.phase.tokens_per_step
    return rate if math.isfinite(rate) else None


def _eta(steps_left: float | None, rate: float | None) -> float | None:
    """Seconds until the last step; None if one value is not known or the rate not positive."""
    seconds = steps_left / rate if steps_left is not None and rate and rate > 0 else math.inf
    return seconds if math.isfinite(seconds) else None


def _age(moment: float) -> float:
    return max(0.0, round(time.time() - moment, 1))  # the clock of another machine may be ahead


def _span(seconds: float | None) -> str:
    # At most 10^9 days fit into a timedelta.
    return "" if seconds is None else str(timedelta(seconds=round(min(seconds, 1e13))))


def _metrics(record: dict, line: str) -> str:
    # null stands for a value that was not finite.
    known = {key: math.nan if value is None else value for key, value in record.items()}
    return f"{summary(known, line)}  (step {record['step']:,})" if record else ""
