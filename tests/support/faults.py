"""`electra-ds ARGUMENTS` with a fault on one rank: faults.py KIND RANK NOTE ARGUMENTS.

The fault happens in the twelfth step of this rank, or (`early`) while the engine is made. Its time
is written to the file NOTE.

Other scenarios:
faults.py meet     three ranks under a watchdog; rank 1 leaves long before rank 0, rank 2 long after
faults.py groups   two ranks; rank 0 waits in every process group
faults.py unheard  a rank with a closed standard error
faults.py refuse   two ranks that end with an error of their own
"""

import contextlib
import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

STEP = 12
MEET_SILENCE = 2.0  # silence_seconds of `meet`
FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda: sys.exit(3),
    "vanish": lambda: os._exit(3),
    "raise": lambda: {}["a key that is missing"],
    "hang": lambda: time.sleep(600),
    "early": lambda: os.kill(os.getpid(), signal.SIGUSR1),
}


def main(kind: str, rank: str, note: str, *arguments: str) -> None:
    from electra_ds.cli import main as electra_ds
    from electra_ds.training.engine import Engine

    name = "__init__" if kind == "early" else "step"
    original, count = getattr(Engine, name), []

    def faulty(self, *args, **options):
        count.append(1)
        if os.environ["RANK"] == rank and (kind == "early" or len(count) == STEP):
            Path(note).write_text(str(time.time()))
            FAULTS[kind]()
        return original(self, *args, **options)

    setattr(Engine, name, faulty)
    sys.argv = ["electra-ds", *arguments]
    electra_ds()


def meet() -> None:
    """Wait for a line on standard input, then leave at different times."""
    import torch.distributed as dist

    from electra_ds.cluster.launchers import find_ranks
    from electra_ds.cluster.watchdog import Watchdog
    from electra_ds.training.collectives import on_rank0

    ranks = find_ranks()
    dist.init_process_group("gloo")
    with Watchdog(ranks, MEET_SILENCE, 10.0, on_rank0):
        print("met", flush=True)
        sys.stdin.readline()
        dist.barrier()
        time.sleep(2 * MEET_SILENCE * (1, 0, 2)[ranks.rank])
    print("left", flush=True)


def unheard() -> None:
    """A rank hangs after its watchdog has found the first failure."""
    import threading

    from electra_ds.cluster.launchers import Ranks
    from electra_ds.cluster.watchdog import Failure, Watchdog

    watchdog = Watchdog(Ranks(0, 2, 0, 1, "none"), 4.0, 10.0, lambda find: find())
    watchdog._first = Failure(1, "node2", "silent")
    threading.Timer(0.1, watchdog._end_process).start()
    time.sleep(5)
    os._exit(0)


def refuse() -> None:
    """A user's mistake ends both ranks; the disk takes a second to record it."""
    import torch.distributed as dist

    from electra_ds.cluster.launchers import find_ranks
    from electra_ds.cluster.watchdog import Watchdog
    from electra_ds.common.errors import UserError
    from electra_ds.training.collectives import on_rank0

    ranks = find_ranks()
    dist.init_process_group("gloo")
    with (
        contextlib.suppress(UserError),
        Watchdog(ranks, 1.0, 10.0, on_rank0, lambda *_: time.sleep(1)),
    ):
        raise UserError("why")


def groups(note: str) -> None:
    """Rank 0 waits for rank 1 in every process group and writes the seconds into a file."""
    import torch
    import torch.distributed as dist
    from run_folders import config

    from electra_ds.cluster.launchers import find_ranks
    from electra_ds.config.engine_files import load_engine
    from electra_ds.model.build import build_objective
    from electra_ds.training.engine import Engine, start

    ranks, run = find_ranks(), config()
    device = start(ranks, timeout_minutes=2)
    run = run.model_copy(update={"train": run.train.model_copy(update={"timeout_minutes": 0.03})})
    Engine(build_objective(run, 0), run, load_engine("zero1-fp32"), ranks, device)
    deadline, waited = time.monotonic() + 60, []
    for group in list(dist.distributed_c10d._world.pg_map) if ranks.rank == 0 else ():
        began = time.monotonic()
        with contextlib.suppress(RuntimeError):
            dist.all_reduce(torch.ones(1), group=group)
        waited.append(time.monotonic() - began)
    if ranks.rank == 0:
        Path(note).write_text(json.dumps(waited))
    while not Path(note).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os._exit(0)


if __name__ == "__main__":
    scenarios = {"meet": meet, "unheard": unheard, "refuse": refuse, "groups": groups}
    scenarios.get(sys.argv[1], functools.partial(main, sys.argv[1]))(*sys.argv[2:])
