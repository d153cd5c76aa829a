"""Chains of faults: each attempt has a fault, the next resumes, no row is lost or repeated.

`bash tests/run.sh -m chaos`. CHAOS_SEED=n: other faults; CHAOS_FAULTS=n: faults of each of the
three chains; CHAOS_TABLE=FILE: the table as markdown. A fault is a function of (seed, chain,
number); only the place "any time" depends on the clock.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from run_results import curve, is_bit_equal
from running import CPU, ROOT, read_json
from small_run import SMALL_MODEL

from electra_ds.common.errors import UserError
from electra_ds.common.processes import free_port
from electra_ds.training import checkpoint

SEED, FAULTS = int(os.environ.get("CHAOS_SEED", "1")), int(os.environ.get("CHAOS_FAULTS", "36"))
# Ranks and name of each chain; "awaited": saving is not asynchronous.
CHAINS = [(1, "one"), (2, "two"), (2, "two, awaited")]
HANG, NEVER = 60, 180  # limits in seconds: from a fault to the last exit; from a start to the fault
ROWS, GLOBAL, EVERY = 300, 8, 10  # rows of the data, of a step; steps between checkpoints
STEPS = 20 * FAULTS + 60
SETS = [
    *SMALL_MODEL,
    f"train.global_batch_size={GLOBAL}",
    "train.micro_batch_size=4",
    f"train.total_steps={STEPS}",
    "train.eval_every=20",
    "train.eval_rows=24",
    f"checkpoint.every={EVERY}",
    "logging.every=5",
    "logging.tensorboard=false",
    "train.max_restarts=0",
    "train.timeout_minutes=1",
    "train.silence_seconds=5",
]
ANY = ("kill -9", "exit 3", "exception", "SIGTERM")
# place: (weight, highest count on rank 0, highest count on another rank, actions). Counts span two
# saves, evaluations and epochs.
PLACES = {
    "imports": (1, 300, 300, ("kill -9", "exit 3", "SIGTERM")),
    "start": (1, 20, 1, ANY),
    "resume": (2, 12, 4, ANY),
    "data reading": (2, 4, 4, ANY),
    "step": (4, 80, 80, ANY),
    "evaluation": (2, 6, 3, ANY),
    "save": (4, 44, 8, (*ANY, "disk full")),
    "any time": (3, 1, 1, ("kill -9", "SIGTERM")),
}


@dataclass
class Outcome:
    """A fault and its result; seconds: until the last process had ended."""

    fault: dict
    ranks: int
    awaited: bool
    resumed: bool = False
    seconds: float = 0.0
    lost: int = 0
    corrupt: int = 0
    hung: bool = False


def draw(name: str, ranks: int, number: int) -> dict:
    """The fault of a number; rank -1: all ranks.

    After a rank was stopped, or died before the watchdog starts, torchrun has to end the others.
    """
    dice = random.Random(f"{SEED} {name} {number}")
    if ranks > 1 and number % 12 == 5:
        return {
            "rank": dice.randrange(ranks),
            "place": "step",
            "count": dice.randint(1, 80),
            "action": "SIGSTOP",
            "torchrun": True,
        }
    place = dice.choices(list(PLACES), [weight for weight, *_ in PLACES.values()])[0]
    _, most, most_elsewhere, actions = PLACES[place]
    action, rank = dice.choice(actions), dice.randrange(ranks)
    count = dice.randint(1, most_elsewhere if rank else most)
    if ranks > 1 and action in ("kill -9", "SIGTERM") and dice.random() < 0.2:
        rank = -1
    fault = {"rank": rank, "place": place, "count": count, "action": action}
    fault["torchrun"] = ranks > 1 and (place in ("imports", "any time") or dice.random() < 0.5)
    if place == "any time":
        first_step = dice.random() < 0.5
        fault |= {
            "since": "first step" if first_step else "start",
            "delay": dice.uniform(0, 0.7 if first_step else 5),
        }
    return fault


@dataclass
class Chain:
    """One run from its first step to its last, with all its faults."""

    folder: Path
    data: Path
    ranks: int
    name: str = "uninterrupted"
    outcomes: list[Outcome] = field(default_factory=list)
    pending: list[Outcome] = field(default_factory=list)  # not followed by a step yet
    attempts: int = 0
    position: int = 0  # of the first row after the latest checkpoint

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.out, self.trace = self.folder / "out", self.folder / "trace"
        self.awaited = "awaited" in self.name
        self.trace.mkdir()

    def run(self, faults: int) -> "Chain":
        """All faults one after the other, then an attempt without a fault to the last step."""
        for number in range(faults):
            self.inject(number)
            if (self.out / "done").exists():  # finished before the fault
                return self
        codes, output = self.attempt({"rank": None, "place": "none"})[:2]
        assert set(codes) == {0} and read_json(self.out / "done")["step"] == STEPS, output[-6000:]
        self.look()
        return self

    def inject(self, number: int) -> None:
        """One attempt with the fault of a number, and the checks after it."""
        fault = draw(self.name, self.ranks, number)
        outcome = Outcome(fault, self.ranks, self.awaited)
        codes, output, outcome.seconds, outcome.hung = self.attempt(fault)
        met = [line for line in self.lines("faults") if line["attempt"] == self.attempts]
        if (self.out / "done").exists() and not met:
            return
        where = f"chain {self.name!r}, seed {SEED}, fault {number}: {fault}, exit codes {codes}"
        where += f"\n{output[-6000:]}"
        assert met, f"ended without the fault: {where}"
        # At step LATEST it is another fault than the one drawn.
        fault |= {"place": met[-1]["place"], "action": met[-1]["action"]}
        stopped = any(self.out.glob("stopped.*"))
        assert stopped or any(codes), f"a failure with code 0: {where}"
        self.pending.append(outcome)
        self.outcomes.append(outcome)
        before = self.look()
        outcome.corrupt = self.check_latest()
        outcome.lost = before - self.position // GLOBAL
        assert not (stopped and outcome.lost), f"a stop lost {outcome.lost} steps: {where}"
        result = f"{outcome.seconds:.1f} s, {outcome.lost} steps lost, exit codes {codes}"
        print(f"{self.name} {number}: {fault} -> {result}")

    def attempt(self, fault: dict) -> tuple[list[int], str, float, bool]:
        """Start the ranks and wait for the end of all processes.

        Returns exit codes, output, seconds from fault to end, whether they had to be killed.
        """
        self.attempts += 1
        chaos = json.dumps(fault | {"trace": str(self.trace), "attempt": self.attempts})
        log, began, hung = self.folder / f"attempt-{self.attempts}.log", time.time(), False
        with log.open("w") as file:
            started = self.start(chaos, fault.get("torchrun"), file)
            while processes := living(chaos):
                for process in started:
                    process.poll()
                if fault["place"] == "any time" and self.is_time(fault, began):
                    self.signal_ranks(fault, processes)
                if (
                    time.time() - self.fault_time(began + NEVER) > HANG
                    and fault["rank"] is not None
                ):
                    hung = True
                    for process in processes:
                        os.kill(process, signal.SIGKILL)
                time.sleep(0.05)
        seconds = time.time() - self.fault_time(time.time())
        return [process.wait() for process in started], log.read_text(), seconds, hung

    def start(self, chaos: str, torchrun: bool, log) -> list[subprocess.Popen]:
        asynchronous = f"checkpoint.asynchronous={str(not self.awaited).lower()}"
        sets = [word for value in (*SETS, asynchronous) for word in ("--set", value)]
        command = [
            str(ROOT / "tests/support/chaos.py"),
            "pretrain",
            "tiny",
            "--data",
            self.data,
            "--out",
            self.out,
            "--engine",
            "zero1-fp32",
            *sets,
        ]
        environ = os.environ | CPU | {"CHAOS": chaos}
        if torchrun:
            launcher = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={self.ranks}",
            ]
            return [
                subprocess.Popen(
                    [sys.executable, *launcher, *command], env=environ, stdout=log, stderr=log
                )
            ]
        place = {
            "WORLD_SIZE": self.ranks,
            "LOCAL_WORLD_SIZE": self.ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        places = [place | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(self.ranks)]
        environs = [environ | {key: str(value) for key, value in place.items()} for place in places]
        return [
            subprocess.Popen([sys.executable, *command], env=e, stdout=log, stderr=log)
            for e in environs
        ]

    def is_time(self, fault: dict, began: float) -> bool:
        if self.fault_time(0):
            return False
        if fault["since"] == "first step":
            traced = [line for line in self.lines("rank-0") if line["attempt"] == self.attempts]
            began = traced[0]["time"] if traced else time.time()
        return time.time() > began + fault["delay"]

    def signal_ranks(self, fault: dict, processes: list[int]) -> None:
        """Send the signal of the fault, once the ranks that it is for have started."""
        ranks = {rank: process for process in processes if (rank := rank_of(process)) is not None}
        wanted = range(self.ranks) if fault["rank"] == -1 else [fault["rank"]]
        if all(rank in ranks for rank in wanted):
            line = {
                "attempt": self.attempts,
                "time": time.time(),
                "place": "any time",
                "action": fault["action"],
            }
            with (self.trace / "faults").open("a") as file:
                file.write(json.dumps(line) + "\n")
            for rank in wanted:
                os.kill(
                    ranks[rank], signal.SIGKILL if fault["action"] == "kill -9" else signal.SIGTERM
                )

    def fault_time(self, otherwise: float) -> float:
        times = [line["time"] for line in self.lines("faults") if line["attempt"] == self.attempts]
        return times[-1] if times else otherwise

    def lines(self, name: str) -> list[dict]:
        path = self.trace / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def look(self) -> int:
        """Check where this attempt resumed; returns the number of steps that any rank applied."""
        step = self.position // GLOBAL
        for rank in range(self.ranks):
            offset = rank * GLOBAL // self.ranks
            positions = [
                line["position"]
                for line in self.lines(f"rank-{rank}")
                if line["attempt"] == self.attempts
            ]
            if positions:
                assert positions[0] - offset == self.position, (
                    f"{self.name}: did not resume at its checkpoint"
                )
                step = max(step, (positions[-1] - offset) // GLOBAL + 1)
                for outcome in self.pending:
                    outcome.resumed = True
                self.pending = []
        return step

    def check_latest(self) -> int:
        """1 if `latest` names a checkpoint that cannot be loaded, else 0; sets self.position."""
        try:
            found = checkpoint.latest(self.out / "ckpt")
            if found is not None:
                meta = checkpoint.read_meta(found)
                checkpoint.check_content(found, meta)
                assert all(value.isfinite().all() for _, value in checkpoint.tensors(found, meta))
                self.position = meta.state.data["position"]
        except UserError as error:
            print(error)
            return 1
        return 0

    def rows_seen(self) -> list[int]:
        """The row at each position, of the steps that no later attempt repeated."""
        seen = {}
        for rank in range(self.ranks):
            own, attempt = {}, 0
            for line in self.lines(f"rank-{rank}"):
                if line["attempt"] != attempt:
                    attempt = line["attempt"]
                    own = {
                        position: row
                        for position, row in own.items()
                        if position < line["position"]
                    }
                part = dict(enumerate(line["rows"], line["position"]))
                assert not part.keys() & own.keys()
                own |= part
            assert not own.keys() & seen.keys()
            seen |= own
        assert sorted(seen) == list(range(len(seen)))
        return [seen[position] for position in range(len(seen))]


def living(chaos: str) -> list[int]:
    """Process numbers of the launchers and ranks of one attempt, found by their environment."""
    return [process for process, environ in environs() if f"CHAOS={chaos}\0".encode() in environ]


def environs() -> Iterator[tuple[int, bytes]]:
    """(process number, environment) of all processes."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            yield int(folder.name), (folder / "environ").read_bytes()


def rank_of(process: int) -> int | None:
    """RANK of a process that runs chaos.py; None for a launcher or a process that has ended."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        environ = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    if not any(word.endswith(b"chaos.py") for word in words[1:3]):
        return None
    return next((int(word[5:]) for word in environ if word.startswith(b"RANK=")), None)


def table(outcomes: list[Outcome]) -> str:
    """Markdown: the faults by action, then the same faults by place."""
    lines = [
        "| fault | ranks | faults | resumed | seconds until ended, max | steps lost, max "
        "| corrupt loads | hangs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups = {}
    for outcome in outcomes:
        for name in (outcome.fault["action"], f"at {outcome.fault['place']}"):
            groups.setdefault((name.startswith("at "), name, outcome.ranks), []).append(outcome)
    groups = {key[1:]: groups[key] for key in sorted(groups)}
    groups["all, synchronous saving", 2] = [outcome for outcome in outcomes if outcome.awaited]
    groups["all, asynchronous saving", "1, 2"] = [
        outcome for outcome in outcomes if not outcome.awaited
    ]
    for (name, ranks), some in groups.items():
        numbers = (
            len(some),
            sum(o.resumed for o in some),
            f"{max(o.seconds for o in some):.0f}",
            max(o.lost for o in some),
            sum(o.corrupt for o in some),
            sum(o.hung for o in some),
        )
        lines.append(f"| {name} | {ranks} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines) + "\n"


@pytest.mark.chaos
def test_a_run_survives_a_hundred_faults(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with ThreadPoolExecutor(len(CHAINS)) as pool:
        undisturbed = [
            pool.submit(Chain(tmp_path / f"whole-{ranks}", data, ranks).run, 0) for ranks in (1, 2)
        ]
        disturbed = [
            pool.submit(Chain(tmp_path / name, data, ranks, name).run, FAULTS)
            for ranks, name in CHAINS
        ]
        whole = {chain.result().ranks: chain.result() for chain in undisturbed}
        chains = [chain.result() for chain in disturbed]
    outcomes = [outcome for chain in chains for outcome in chain.outcomes]
    text = table(outcomes)
    with capsys.disabled():
        print(f"\nseed {SEED}, {len(outcomes)} faults\n{text}")
    if "CHAOS_TABLE" in os.environ:
        Path(os.environ["CHAOS_TABLE"]).write_text(text)
    for chain in chains:
        rows, reference = chain.rows_seen(), whole[chain.ranks]
        assert rows == reference.rows_seen() and len(rows) == GLOBAL * STEPS
        for start in range(0, len(rows), ROWS):
            epoch = rows[start : start + ROWS]
            assert len(set(epoch)) == len(epoch), "a row was seen twice in an epoch"
        assert is_bit_equal(chain.out, reference.out)
        assert curve(chain.out) == curve(reference.out)
    assert all(o.resumed and not o.corrupt and not o.hung for o in outcomes), text
    # Beside an interval, the steps that were made while the checkpoint at its end was written; the
    # next save waits for it.
    assert all(o.lost <= EVERY if o.awaited else o.lost < 2 * EVERY for o in outcomes), text
    assert len(outcomes) >= 0.93 * FAULTS * len(CHAINS)
