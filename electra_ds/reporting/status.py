"""Status of a run, read from the files of its run folder while another process writes them."""

import json
import math
import time
from dataclasses import fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from electra_ds.cluster.failures import Failures
from electra_ds.common.errors import UserError
from electra_ds.common.folder_lock import STALE_SECONDS, owner_of
from electra_ds.training.metrics_file import TRAIN, VALID, read_metrics, summary

NEXT = {
    "training": "touch {out}/STOP saves and stops it, touch {out}/SAVE saves",
    "silent": "check the machine of its owner; if it is down, "
    "the same command resumes from step {at}",
    "failed": "correct the cause; the same command resumes from step {at}",
    "refused": "correct the cause and remove {out}/restarts.json (train.max_restarts = {limit})",
    "stopped": "the same command resumes from step {at}",
    "finished": "electra-ds evaluate {out} --data D; for more steps raise train.total_steps and "
    "give --extend",
    "not started": "electra-ds pretrain RUN --data D --out {out}",
}


def status(out: Path) -> dict[str, Any]:
    """The facts of a run folder as JSON values; times in seconds.

    state: training; silent (the folder is locked, and its last heartbeat is missing or older than
        STALE_SECONDS by the clock of this machine); finished; failed (the last attempt recorded a
        failure, or the process that holds the lock has ended on this machine); stopped (there is a
        checkpoint to resume from); not started.
    failures: all failures, including those that restarts.json does not count yet.
    missing: files that do not exist or cannot be read; their facts are null or empty.
    Raises UserError when `out` is no folder.
    """
    if not out.is_dir():
        raise UserError(f"{out}: no run folder here")
    missing: list[str] = []
    config = _read(out / "config.json", missing)
    heartbeat = _read(out / "heartbeat.json", missing, expected=False)
    checkpoint = _checkpoint(out / "ckpt", missing)
    train, provenance = config.get("train", {}), config.get("provenance") or {}
    last = {record["split"]: record for record in _records(out / "metrics.jsonl", missing)}
    owner, is_gone = owner_of(out)
    silence = None
    if heartbeat:
        silence = _age(datetime.fromisoformat(heartbeat["time"]).timestamp())
    errors = _errors(out, missing, owner if is_gone else "", provenance.get("host"))
    failed = [error for error in errors if error.get("failure", True)]
    at, limit = checkpoint.get("step", 0), train.get("max_restarts")
    failures = _failures(out, missing).with_attempt(at, failed)
    total_steps = provenance.get("total_steps") or train.get("total_steps")
    rate = _rate(last.get("train"))
    step = max(heartbeat.get("step", 0), at, *(record["step"] for record in last.values()))
    state = _state(out, owner and not is_gone, silence, bool(failed), bool(checkpoint))
    is_refused = bool(failed) and bool(limit) and failures.in_a_row > limit
    has_eta = rate and total_steps and state == "training"
    return {
        "out": str(out),
        "state": state,
        "step": step,
        "total_steps": total_steps,
        "steps_per_second": rate,
        "eta_seconds": (total_steps - step) / rate if has_eta else None,
        "train": last.get("train", {}),
        "valid": last.get("valid", {}),
        "checkpoint": checkpoint,
        "owner": owner,
        "heartbeat_age": silence,
        "nodes": provenance.get("nodes"),
        "launcher": provenance.get("launcher"),
        "restarts": provenance.get("restarts"),
        "failures": failures.failures,
        "failures_in_a_row": failures.in_a_row,
        "last_error": next(iter([*errors, *failures.errors[::-1]]), None),
        "missing": missing,
        "next": NEXT["refused" if is_refused else state].format(out=out, at=at, limit=limit),
    }


def _state(
    out: Path, is_owned: Any, silence: float | None, failed: bool, has_checkpoint: bool
) -> str:
    if is_owned:
        return "silent" if silence is None or silence > STALE_SECONDS else "training"
    if (out / "done").exists():
        return "finished"
    if failed:
        return "failed"
    return "stopped" if has_checkpoint else "not started"


def _failures(out: Path, missing: list[str]) -> Failures:
    """What restarts.json counts so far."""
    values = _read(out / "restarts.json", missing, expected=False)
    known = {key.name for key in fields(Failures)}
    return Failures(**{key: value for key, value in values.items() if key in known})


def _errors(
    out: Path, missing: list[str], gone_owner: str, host: str | None
) -> list[dict[str, Any]]:
    """The errors of the last attempt, by time.

    gone_owner: name of the owner of the lock if its process has ended, else "". If the process left
    no error file, its end is returned as the error.
    """
    files = sorted(out.glob("error-rank-*.json"))
    errors = [error for file in files if (error := _read(file, missing, expected=False))]
    if gone_owner and not errors:
        text = f"ended without a message: {gone_owner}"
        return [{"rank": 0, "host": host, "error": text, "failure": True}]
    return sorted(errors, key=lambda error: error.get("time", ""))


def lines(facts: dict[str, Any]) -> dict[str, str]:
    """The facts as lines of text by title; lines without facts are left out."""
    saved, error = facts["checkpoint"], facts["last_error"]
    rate, nodes = facts["steps_per_second"], facts["nodes"]
    texts = {
        "state": facts["state"],
        "step": f"{facts['step']:,}"
        + (f" of {facts['total_steps']:,}" if facts["total_steps"] else ""),
        "rate": f"{rate:.2f} steps/s, {facts['train']['tokens_per_second']:,.0f} tokens/s"
        if rate
        else "",
        "ETA": _span(facts["eta_seconds"]),
        "training": _metrics(facts["train"], TRAIN),
        "held out": _metrics(facts["valid"], VALID),
        "checkpoint": f"{saved['name']}, step {saved['step']:,}, {_span(saved['age'])} ago"
        if saved
        else "",
        "owner": facts["owner"]
        and f"{facts['owner']}, heartbeat {_span(facts['heartbeat_age'])} ago",
        "ranks": f"{len(nodes)} under {facts['launcher']}, on {', '.join(dict.fromkeys(nodes))}"
        if nodes
        else "",
        "restarts": f"{facts['restarts'] or 0}; failures {facts['failures']}, "
        f"{facts['failures_in_a_row']} in a row",
        "last error": f"rank {error['rank']}, {error['host']}: {error['error']}" if error else "",
        "missing": "; ".join(facts["missing"]),
        "next": facts["next"],
    }
    return {title: text for title, text in texts.items() if text}


def _read(path: Path, missing: list[str], expected: bool = True) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        missing += [f"{path.name}: not there"] if expected else []
    except (OSError, ValueError) as error:  # truncated by a kill or a full disk
        missing.append(f"{path.name}: {error}")
    return {}


def _records(path: Path, missing: list[str]) -> list[dict]:
    try:
        return read_metrics(path)
    except FileNotFoundError:
        missing.append(f"{path.name}: not there")
    except (OSError, UserError) as error:
        missing.append(str(error))
    return []


def _checkpoint(folder: Path, missing: list[str]) -> dict[str, Any]:
    """Name, step and age of the checkpoint that `latest` names."""
    if not (folder / "latest").exists():
        missing.append("ckpt/latest: not there")
        return {}
    name = (folder / "latest").read_text().strip()
    meta = _read(folder / name / "meta.json", missing)
    age = meta and _age((folder / name / "meta.json").stat().st_mtime)
    return meta and {"name": name, "step": meta["step"], "age": age}


def _rate(record: dict[str, Any] | None) -> float | None:
    """Steps per second, skipped ones included, of the last logging interval."""
    if not record:
        return None
    steps = record["step"] + record["skipped_steps"]
    return record["tokens_per_second"] * steps / record["tokens"]


def _age(moment: float) -> float:
    return max(0.0, round(time.time() - moment, 1))  # the clock of another machine may be ahead


def _span(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


def _metrics(record: dict, line: str) -> str:
    # null stands for a value that was not finite.
    known = {key: math.nan if value is None else value for key, value in record.items()}
    return f"{summary(known, line)}  (step {record['step']:,})" if record else ""
