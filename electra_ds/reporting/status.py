"""What is a run doing? Read from the files in OUT alone, while another process writes them."""

import json
import math
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.folder_lock import STALE_SECONDS, owner_of
from electra_ds.training.metrics_file import TRAIN, VALID, read_metrics, summary

NEXT = {
    "training": "touch {out}/STOP saves and stops it, touch {out}/SAVE saves",
    "silent": "look at its owner's machine; once that is dead the same command goes on from step {at}",
    "failed": "mend the cause; the same command goes on from step {at}",
    "refused": "mend the cause and remove {out}/restarts.json (train.max_restarts = {limit})",
    "stopped": "the same command goes on from step {at}",
    "finished": "electra-ds evaluate {out} --data D; for more steps raise train.total_steps and give --extend",
    "not started": "electra-ds pretrain RUN --data D --out {out}",
}


def status(out: Path) -> dict[str, Any]:
    """The facts of a run folder; times in seconds, null or empty what `missing` files would say.

    state: training; silent (locked, but no heartbeat for a minute on this clock); failed (or its process is gone from
    this machine); stopped (resumable); finished; not started. failures: those that the next start will count are in.
    UserError when there is no such folder.
    """
    if not out.is_dir():
        raise UserError(f"{out}: no run folder here")
    missing: list[str] = []
    config, beat = (
        _read(out / "config.json", missing),
        _read(out / "heartbeat.json", missing, expected=False),
    )
    past, saved = (
        _read(out / "restarts.json", missing, expected=False),
        _checkpoint(out / "ckpt", missing),
    )
    train, start = config.get("train", {}), config.get("provenance") or {}
    last = {record["split"]: record for record in _records(out / "metrics.jsonl", missing)}
    owner, is_gone = owner_of(out)
    silence = _age(datetime.fromisoformat(beat["time"]).timestamp()) if beat else None
    found = (_read(file, missing, expected=False) for file in sorted(out.glob("error-rank-*.json")))
    left = [error for error in found if error]
    if is_gone and not left:
        left = [
            {
                "rank": 0,
                "host": start.get("host"),
                "error": f"{owner} is gone without a word",
                "failure": True,
            }
        ]
    left.sort(key=lambda error: error.get("time", ""))
    failed = any(error.get("failure", True) for error in left)

    at, limit = saved.get("step", 0), train.get("max_restarts")
    in_a_row = (0 if at > past.get("step", -1) else past["in_a_row"]) + failed
    step = max(beat.get("step", 0), at, *(record["step"] for record in last.values()))
    total, rate = start.get("total_steps") or train.get("total_steps"), _rate(last.get("train"))
    if owner and not is_gone:
        state = "silent" if silence is None or silence > STALE_SECONDS else "training"
    elif (out / "done").exists():
        state = "finished"
    else:
        state = "failed" if failed else "stopped" if saved else "not started"
    hint = "refused" if failed and limit and in_a_row > limit else state
    return {
        "out": str(out),
        "state": state,
        "step": step,
        "total_steps": total,
        "steps_per_second": rate,
        "eta_seconds": (total - step) / rate if rate and total and state == "training" else None,
        "train": last.get("train", {}),
        "valid": last.get("valid", {}),
        "checkpoint": saved,
        "owner": owner,
        "heartbeat_age": silence,
        "nodes": start.get("nodes"),
        "launcher": start.get("launcher"),
        "restarts": start.get("restarts"),
        "failures": past.get("failures", 0) + failed,
        "failures_in_a_row": in_a_row,
        "last_error": (left[:1] or past.get("errors", [])[-1:] or [None])[0],
        "missing": missing,
        "next": NEXT[hint].format(out=out, at=at, limit=limit),
    }


def lines(facts: dict[str, Any]) -> dict[str, str]:
    """The same for people: a few lines by name, those without facts left out."""
    saved, error, rate, nodes = (
        facts["checkpoint"],
        facts["last_error"],
        facts["steps_per_second"],
        facts["nodes"],
    )
    found = {
        "state": facts["state"],
        "step": f"{facts['step']:,}"
        + (f" of {facts['total_steps']:,}" if facts["total_steps"] else ""),
        "rate": f"{rate:.2f} steps/s, {facts['train']['tokens_per_second']:,.0f} tokens/s"
        if rate
        else "",
        "ETA": _span(facts["eta_seconds"]),
        "training": _figures(facts["train"], TRAIN),
        "held out": _figures(facts["valid"], VALID),
        "checkpoint": f"{saved['name']}, step {saved['step']:,}, {_span(saved['age'])} ago"
        if saved
        else "",
        "owner": facts["owner"]
        and f"{facts['owner']}, heartbeat {_span(facts['heartbeat_age'])} ago",
        "ranks": f"{len(nodes)} under {facts['launcher']}, on {', '.join(dict.fromkeys(nodes))}"
        if nodes
        else "",
        "restarts": f"{facts['restarts'] or 0}; failures {facts['failures']}, {facts['failures_in_a_row']} in a row",
        "last error": f"rank {error['rank']}, {error['host']}: {error['error']}" if error else "",
        "missing": "; ".join(facts["missing"]),
        "next": facts["next"],
    }
    return {name: text for name, text in found.items() if text}


def _read(path: Path, missing: list[str], expected: bool = True) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        missing += [f"{path.name}: not there"] if expected else []
    except (OSError, ValueError) as error:  # cut short by a kill or a full disk
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
    """Name, step and age of the one that `latest` names."""
    if not (folder / "latest").exists():
        missing.append("ckpt/latest: not there")
        return {}
    name = (folder / "latest").read_text().strip()
    meta = _read(folder / name / "meta.json", missing)
    age = meta and _age((folder / name / "meta.json").stat().st_mtime)
    return meta and {"name": name, "step": meta["step"], "age": age}


def _rate(record: dict | None) -> float | None:
    """Steps per second, left-out ones included, of the last logging interval."""
    return (
        record
        and record["tokens_per_second"]
        * (record["step"] + record["skipped_steps"])
        / record["tokens"]
    )


def _age(moment: float) -> float:
    return max(0.0, round(time.time() - moment, 1))  # a clock elsewhere may be ahead


def _span(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


def _figures(record: dict, line: str) -> str:
    known = {
        key: math.nan if value is None else value for key, value in record.items()
    }  # null was not finite
    return f"{summary(known, line)}  (step {record['step']:,})" if record else ""
