"""`electra-ds` with one fault and a trace of rows: `CHAOS=JSON python chaos.py pretrain ...`. Not a test file itself.

CHAOS: {"trace": folder, "attempt": n} and, if a rank is to hurt itself, the fault: rank (-1: all), place, count (its
n-th call or file operation there), action. A fault that was not met is a kill -9 at step LATEST of the attempt.
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
WOUNDED = CHAOS.get("rank") in (RANK, -1) and CHAOS["place"] != "any time"
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
steps, met = 0, []  # attempts of a step in this process; calls of the fault's place


def write(name: str, record: dict) -> None:
    """One line, whole or not at all, whatever happens next."""
    with open(TRACE / name, "ab", buffering=0) as file:
        file.write((json.dumps(record) + "\n").encode())


def at(place: str) -> None:
    """A point of the real code: here the fault happens, if it is the one of this attempt."""
    if WOUNDED and place == CHAOS["place"]:
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
    """Every import and every file operation in OUT, of all threads, by what the interpreter says of itself."""
    if event == "import" and arguments[0].startswith(("electra_ds", "deepspeed")):
        at("imports")
    elif event in FILES and isinstance(arguments[0], (str, os.PathLike)):
        path = os.path.abspath(os.fspath(arguments[0]))
        if path.startswith(f"{OUT}/ckpt"):
            at("save" if steps else "resume")
        elif path.startswith(OUT) and not steps:
            at("start")


def install() -> None:
    """The places that are calls rather than files, and the trace of the steps that were applied."""
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
        if WOUNDED and steps == LATEST:
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
