"""`electra-ds ARGUMENTS` with a fault on one rank: `faults.py KIND RANK NOTE ARGUMENTS`. Not a test file itself.

The fault comes in this rank's twelfth step, or (`early`) while the engine is made; NOTE then holds the time.
`faults.py meet` is two ranks that only meet, under a watchdog: rank 1 leaves long before rank 0.
"""

import os
import signal
import sys
import time
from pathlib import Path

STEP = 12
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
    from electra_ds.engine import Engine

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
    import torch.distributed as dist

    from electra_ds.engine import from_first
    from electra_ds.ranks import find_ranks
    from electra_ds.watchdog import Watchdog

    ranks = find_ranks()
    dist.init_process_group("gloo")
    with Watchdog(ranks, 4.0, 10.0, from_first):
        print("met", flush=True)
        sys.stdin.readline()
        dist.barrier()
        time.sleep(6 * (1 - ranks.rank))
    print("left", flush=True)


if __name__ == "__main__":
    meet() if sys.argv[1] == "meet" else main(*sys.argv[1:])
