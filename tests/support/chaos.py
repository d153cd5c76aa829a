"""`electra-ds` with one fault and a trace of the rows: `CHAOS=JSON python chaos.py pretrain ...`.

CHAOS: {"trace": folder, "attempt": n} and, for a fault of a rank: rank (-1: all), place, count (the
number of the call or file operation at that place), action. If the place is not reached,
the fault is a kill -9 at step LATEST of the attempt.
"""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

LATEST = 80
CHAOS = json.loads(os.environ["CHAOS"])
RANK, TRACE = int(os.environ.get("RANK", "0")), Path(CHAOS["trace"])
OUT = os.path.abspath(sys.argv[sys.argv.index("--out") + 1])
HAS_FAULT = CHAOS.get("rank") in (RANK, -1) and CHAOS["place"] != "any time"
FILES = (
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.listdir",
    "os.scandir",
    "shutil.rmtree",
)
ACTIONS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGSTOP": signal.SIGSTOP}
steps, met = 0, []  # attempts of a step in this process; calls at the place of the fault


def write(name: str, record: dict) -> None:
    """Append one line in a single write, so that a kill leaves it complete or absent."""
    with open(TRACE / name, "ab", buffering=0) as file:
        file.write((json.dumps(record) + "\n").encode())


def at(place: str) -> None:
    """A place of the real code; the fault of this attempt happens at its n-th call."""
    if HAS_FAULT and place == CHAOS["place"]:
        met.append(1)
        if len(met) == CHAOS["count"]:
            act(CHAOS["action"], place)


def act(action: str, place: str) -> None:
    write(
        "faults",
        {
            "attempt": CHAOS["attempt"],
            "rank": RANK,
            "time": time.time(),
            "place": place,
            "action": action,
        },
    )
    if action == "exit 3":
        os._exit(3)
    if action == "exception":
        raise RuntimeError(f"chaos at {place}")
    if action == "disk full":
        raise OSError(errno.ENOSPC, "No space left on device (chaos)")
    os.kill(os.getpid(), ACTIONS[action])


def on_audit(event: str, arguments: tuple) -> None:
    """Audit hook: the imports and the file operations in OUT, of all threads."""
    if event == "import" and arguments[0].startswith(("electra_ds", "deepspeed")):
        at("imports")
    elif event in FILES and isinstance(arguments[0], (str, os.PathLike)):
        path = os.path.abspath(os.fspath(arguments[0]))
        if path.startswith(f"{OUT}/ckpt"):
            at("save" if steps else "resume")
        elif path.startswith(OUT) and not steps:
            at("start")


def install() -> None:
    """Patch the places that are calls, and trace the rows of the steps that were applied."""
    from electra_ds.data.loader import Loader
    from electra_ds.data.shard_reader import ShardReader
    from electra_ds.training.engine import Engine

    read, following = ShardReader.read, Loader.__next__
    forward_backward, step = Engine.forward_backward, Engine.step
    rows, current = {}, []

    def traced_read(self, numbers):
        at("data reading" if self.split == "train" else "evaluation")
        return read(self, numbers)

    def traced_next(self):
        batch = following(self)
        rows[batch.first_rows[0]] = batch.rows.tolist()
        return batch

    def traced_forward_backward(self, micro_batches, positions, *arguments, **options):
        global steps
        steps += 1
        current[:] = positions
        at("step")
        return forward_backward(self, micro_batches, positions, *arguments, **options)

    def traced_step(self, *arguments, **options):
        if HAS_FAULT and steps == LATEST:
            act("kill -9", "step")
        at("step")
        result = step(self, *arguments, **options)
        if result.applied:
            seen = {"position": current[0], "rows": rows.pop(current[0])}
            write(f"rank-{RANK}", {"attempt": CHAOS["attempt"], "time": time.time()} | seen)
        at("step")
        return result

    ShardReader.read, Loader.__next__ = traced_read, traced_next
    Engine.forward_backward, Engine.step = traced_forward_backward, traced_step


if __name__ == "__main__":
    sys.addaudithook(on_audit)
    install()
    from electra_ds.cli import main

    main()
