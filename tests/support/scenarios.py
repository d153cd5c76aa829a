"""Runs on real ranks, many in one process group; the tests read what they leave in OUTS.

python tests/support/scenarios.py DATA OUTS PHASE ...

The ranks of each phase are forked from this process, so that torch and DeepSpeed are imported
once. A phase writes OUTS/PHASE.log and, when it succeeds, OUTS/PHASE.finished; a failure ends the
command. Under torchrun there is one PHASE, on the ranks of torchrun.
"""

import contextlib
import functools
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch._dynamo  # noqa: F401 (the first optimizer would import it in every rank)
from branch_scenarios import (
    branch_from_one_to_two,
    branches,
    branches_on_one_rank,
    growing_batches,
    growing_on_one_rank,
)
from deberta_scenarios import deberta, deberta_kinds, deberta_on_one_rank
from disk_scenarios import full_disk, quota_of_one_rank, read_only_disk, uninterrupted_on_disk
from finetune_scenarios import (
    fine_tuned,
    fine_tuned_deberta,
    fine_tuned_in_other_ways,
    fine_tuned_modern,
)
from kind_scenarios import kinds, own_encoders
from loss_scenarios import (
    bad_losses,
    half_precision_overflow,
    not_finite,
    spike_on_one_rank,
    wrong_split,
)
from modern_scenarios import modern, modern_kinds, modern_on_one_rank, modern_refused
from optimizer_scenarios import formulas, optimizers, optimizers_on_one_rank
from phase_scenarios import in_phases, in_phases_again, in_phases_on_one_rank
from resume_scenarios import (
    evaluated,
    from_one_to_two,
    frozen,
    interrupted,
    killed,
    mixed,
    on_one_rank,
    refused_resumes,
    resumed_after_kills,
    sharing,
    streamed,
    streamed_on_one_rank,
    uninterrupted,
)
from scenario_tools import begin, here
from step_scenarios import (
    lost_folder,
    needed_memory,
    never_waits,
    signals_and_files,
    single_rank,
    slow_reader,
    traffic,
)
from verdict_scenarios import verdicts

from electra_ds.common.processes import free_port
from electra_ds.training.collectives import destroy_process_groups

PHASES = {  # ranks, scenarios
    "two": (
        2,
        (
            uninterrupted,
            traffic,
            streamed,
            wrong_split,
            slow_reader,
            interrupted,
            evaluated,
            mixed,
            refused_resumes,
            not_finite,
            bad_losses,
            signals_and_files,
            sharing,
            frozen,
            modern,
            modern_refused,
            deberta,
            in_phases,
            branches,
            growing_batches,
        ),
    ),
    "one": (
        1,
        (
            on_one_rank,
            modern_on_one_rank,
            deberta_on_one_rank,
            spike_on_one_rank,
            lost_folder,
            needed_memory,
            single_rank,
            streamed_on_one_rank,
            half_precision_overflow,
            verdicts,
            in_phases_on_one_rank,
            branches_on_one_rank,
            growing_on_one_rank,
        ),
    ),
    "two-again": (
        2,
        (from_one_to_two, resumed_after_kills, in_phases_again, branch_from_one_to_two),
    ),
    "finetune-one": (
        1,
        (fine_tuned, fine_tuned_in_other_ways, fine_tuned_modern, fine_tuned_deberta),
    ),
    "finetune-two": (2, (fine_tuned,)),
    "optimizers": (2, (formulas, optimizers)),
    "optimizers-one": (1, (formulas, optimizers_on_one_rank)),
    "kinds": (2, (kinds, own_encoders, modern_kinds, deberta_kinds)),
    "disk": (2, (uninterrupted_on_disk, full_disk, quota_of_one_rank, read_only_disk)),
    "memory": (2, (needed_memory,)),
    # Runs of one architecture, for work on it.
    "modern": (2, (modern, modern_refused, modern_kinds)),
    "modern-one": (1, (modern_on_one_rank, needed_memory)),
    "deberta": (2, (deberta, deberta_kinds)),
    "deberta-one": (1, (deberta_on_one_rank, needed_memory)),
    "branches": (2, (branches, growing_batches)),
    "branches-one": (1, (branches_on_one_rank, growing_on_one_rank)),
    "branches-two": (2, (branch_from_one_to_two,)),
    # Ways in which generator and discriminator depend on each other, for work on these.
    "generators": (2, (uninterrupted, sharing, frozen)),
    "verdicts": (1, (verdicts,)),
    "never-waits": (1, (never_waits,)),
    # Runs in phases, for work on them.
    "phases-two": (2, (in_phases,)),
    "phases-one": (1, (in_phases_on_one_rank,)),
    "phases-again": (2, (in_phases_again,)),
}
GRACE_SECONDS = 2.0  # for the other ranks, when one has failed


def scenarios_of(phase: str) -> tuple[int, tuple[Callable[[], None], ...]]:
    """The number of ranks and the scenarios of a phase; `killed-KILL` ends by kill -9."""
    if phase.startswith("killed-"):
        return 2, (functools.partial(killed, phase.removeprefix("killed-")),)
    return PHASES[phase]


def freeze() -> None:
    """Leave all present objects out of later garbage collections; each engine ends with one."""
    gc.collect()
    gc.freeze()


def run_phase(phase: str, data: Path, outs: Path) -> None:
    """The scenarios of a phase on this rank; rank 0 prints their times."""
    begin(data, outs / "disk" if phase == "disk" else outs)
    for scenario in scenarios_of(phase)[1]:
        freeze()
        began, cpu_began = time.monotonic(), time.process_time()
        scenario()
        if here.rank == 0:
            wall, cpu = time.monotonic() - began, time.process_time() - cpu_began
            name = getattr(scenario, "__name__", phase)
            print(f"TIME {phase} {name}: {wall:.1f} s, {cpu:.1f} s CPU", flush=True)
    destroy_process_groups()


def log_file(phase: str, outs: Path) -> Path:
    """The file with the output of a phase."""
    return outs / f"{phase}.log"


def fork_rank(phase: str, data: Path, outs: Path, place: dict[str, object]) -> int:
    """Run a phase in a child process with the variables of a launcher; its process number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log_file(phase, outs).open("ab") as log:
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
        os.environ |= {name: str(value) for name, value in place.items()}
        run_phase(phase, data, outs)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_codes(children: list[int]) -> list[int]:
    """Wait for processes; once one has failed, the others are killed after a grace period."""
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            for child in set(children) - codes.keys():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


def start_phase(phase: str, data: Path, outs: Path) -> list[int]:
    """Run a phase on its number of ranks; their exit codes."""
    world_size, _ = scenarios_of(phase)
    world = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    places = [world | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(world_size)]
    return exit_codes([fork_rank(phase, data, outs, place) for place in places])


def main(data: Path, outs: Path, phases: list[str]) -> None:
    """Run the phases one after the other, or under a launcher the only one."""
    if "RANK" in os.environ:  # a launcher has started the ranks
        run_phase(phases[0], data, outs)
        return
    freeze()
    for phase in phases:
        codes = start_phase(phase, data, outs)
        was_killed = -signal.SIGKILL in codes and all(codes)
        if not (was_killed if phase.startswith("killed-") else not any(codes)):
            log = log_file(phase, outs).read_text(errors="replace")
            sys.exit(f"phase {phase}: exit codes {codes}\n{log[-12000:]}")
        (outs / f"{phase}.finished").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
