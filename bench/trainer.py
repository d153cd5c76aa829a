"""Time of the whole training loop against the bare step, and against other code in its usual loop.

    python bench/trainer.py                                   every engine below, 7 rounds each
    python bench/trainer.py zero1 zero0 --threads 2 --peers --data D --json F

A round is one step of the loop of `pretrain` (loader, votes, engine, metrics), then the bare step
(bench/peers.py) on the same rows in the precision of the engine. With --peers one step of each
peer's loop follows: a PyTorch DataLoader, the masking of transformers, clipping, AdamW, schedule.
All run in one process in turns, so that other work on the machine slows them alike. The result is
the ratio of CPU times, as the median over the rounds. The model is Small without dropout; a step
has 32 rows of 128 tokens on one rank, random or from --data. The losses of the loop and of the bare
step must agree in the first round.

The CPU time of the loop excludes the thread of the loader, which prepares batches while others run.
The time of this thread per batch is measured separately and added. Every tenth step logs; the cost
of a log line is divided by `logging.every` of the preset.
"""

import argparse
import contextlib
import functools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from peers import (
    Contender,
    HuggingFace,
    Ours,
    autocast,
    make_contenders,
    run_config,
    update_weights,
)
from report import make_parser, median_and_range, print_heading, print_row, run_main
from shards import BLOCK_ROWS, SPECIAL_IDS, VOCAB_SIZE, write_description
from torch.utils.data import DataLoader
from transformers import BertTokenizerFast, DataCollatorForLanguageModeling

from electra_ds.cluster.launchers import Ranks, find_ranks
from electra_ds.common.json_files import write_json
from electra_ds.config.engine_files import load_engine
from electra_ds.config.loading import load_run
from electra_ds.config.schema import RunConfig
from electra_ds.data import shard_format
from electra_ds.data.batch import Batch
from electra_ds.data.dataset import Data, open_data
from electra_ds.data.loader import Loader
from electra_ds.data.masking import masking_recipe
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.training import pretrain
from electra_ds.training.attempt import AttemptOptions
from electra_ds.training.collectives import ControlGroup, Votes, destroy_process_groups
from electra_ds.training.engine import Engine, StepResult, start
from electra_ds.training.precision import precision_name, resolve_precision

ENGINES = ("zero0", "zero1", "zero2", "zero3", "zero0-fp32", "zero1-fp32", "zero1-bf16")
PEERS = ["HF", "tuned HF", "wrapper"]
ROWS = 32  # of a step
LENGTH = 128
WARM_UP_ROUNDS = 2
LOG_EVERY = 10
PARTS = ("forward_backward", "step", "votes", "data", "logging")  # of a step of the loop
GOALS = ((0.05, "stretch"), (0.10, "target"), (0.15, "floor"))  # share of the bare step
LOADER_THREAD = "loader"  # name of the thread of data.loader.Loader
CPU, WALL = 0, 1  # indices of a pair of seconds

Parts = dict[str, np.ndarray]  # part of a step -> [2] (CPU, wall) seconds


# --------------------------------------------------------------------------------------- times


class Clock:
    """(CPU, wall) seconds between two calls of `lap`, without the CPU time of the loader thread."""

    def __init__(self):
        self.last = self.now()

    @staticmethod
    def now() -> np.ndarray:
        loader_seconds = sum(
            time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
            for thread in loader_threads()
        )
        return np.array([time.process_time() - loader_seconds, time.perf_counter()])

    def lap(self) -> np.ndarray:
        """[2] seconds since the last lap; the time of this call itself is not counted."""
        passed = self.now() - self.last
        self.last = self.now()
        return passed


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == LOADER_THREAD]


@dataclass
class Rounds:
    """Times of all rounds of one engine."""

    ours: list[Parts] = field(default_factory=list)
    bare: list[Parts] = field(default_factory=list)
    is_logged: list[bool] = field(default_factory=list)
    peers: list[Parts] = field(default_factory=list)  # keyed by the peer's name

    def without_warm_up(self) -> "Rounds":
        first = WARM_UP_ROUNDS
        return Rounds(
            self.ours[first:], self.bare[first:], self.is_logged[first:], self.peers[first:]
        )


# --------------------------------------------------------------------------- loop of electra_ds


@dataclass
class LoopStep:
    """One finished step of the loop."""

    parts: Parts
    is_logged: bool
    batch: Batch
    loss: torch.Tensor


class PacedEngine(Engine):
    """An engine that notes the time of each part of the loop.

    after_step: called between two steps of the loop; its time is not counted.
    """

    def __init__(self, after_step: Callable[[LoopStep], None], *arguments: Any):
        super().__init__(*arguments)
        self.control = PacedControl(self)
        self.after_step = after_step
        self.clock = Clock()
        self.parts: Parts = {}

    def note(self, part: str) -> None:
        """Add the time since the last note to a part of the step."""
        self.parts[part] = self.parts.get(part, 0) + self.clock.lap()

    def end_step(self) -> None:
        """Called at the top of the loop."""
        self.note("logging")
        if "step" in self.parts:
            self.after_step(LoopStep(self.parts, self.is_logged, self.batch, self.loss))
        self.parts = {}
        self.clock.lap()

    def forward_backward(self, micro_batches, *arguments, **options) -> list[Any]:
        self.note("votes")
        losses = super().forward_backward(micro_batches, *arguments, **options)
        self.note("forward_backward")
        (self.batch,) = micro_batches
        self.is_logged = options["with_counts"]
        self.loss = losses[0].total
        return losses

    def step(self, lr: float) -> StepResult:
        self.note("votes")
        result = super().step(lr)
        self.note("step")
        return result


class PacedControl(ControlGroup):
    """The votes of a PacedEngine."""

    def __init__(self, engine: PacedEngine):
        super().__init__(engine.ranks)
        self.engine = engine

    def wait_votes(self) -> Votes:
        self.engine.end_step()
        return super().wait_votes()

    def send_votes(self, totals: tuple, **votes: bool) -> None:
        self.engine.note("data")
        super().send_votes(totals, **votes)


def run_loop(
    config: RunConfig,
    data: Path,
    out: Path,
    steps: int,
    after_step: Callable[[LoopStep], None],
    ranks: Ranks,
    device: torch.device,
) -> None:
    """Train so many steps with the loop of `pretrain`; its console lines go to OUT/console."""
    make_engine = functools.partial(PacedEngine, after_step)
    options = AttemptOptions(stop_at_step=steps)
    with (
        mock.patch.object(pretrain, "Engine", make_engine),
        open(out / "console", "w") as console,
        contextlib.redirect_stdout(console),
    ):
        pretrain.pretrain_on_ranks(config, data, out, ranks, device, options)


def loader_seconds(config: RunConfig, data: Data, steps: int = 512) -> float:
    """CPU seconds of the loader for one step, measured while nothing else runs."""
    reader, row_order = data.training(config.train.seed, ROWS)
    recipe = masking_recipe(data.manifest, config.objective, config.train.seed)
    loader = Loader(reader, row_order, recipe, global_batch_size=ROWS, micro_batch_size=ROWS)
    began = time.process_time()
    for _ in range(steps):
        next(loader)
    seconds = time.process_time() - began
    loader.close()
    return seconds / steps


# --------------------------------------------------------------------- bare step and peers


def bare_step(ours: Ours, batch: Batch, bf16: bool) -> tuple[Parts, float]:
    """(the times of the parts of one bare step, its loss)"""
    clock = Clock()
    with autocast(bf16):
        loss = ours.loss(batch)
    loss.backward()
    forward_backward = clock.lap()
    update_weights(ours)
    return {"forward_backward": forward_backward, "step": clock.lap()}, float(loss.detach())


def peer_loop(
    name: str, peer: Contender, rows: np.ndarray, tokenizer: BertTokenizerFast, bf16: bool
) -> Iterator[float]:
    """A training loop as users of the peer write it; yields the loss of each step.

    rows: [n, S] token ids. electra-pytorch masks tokens itself.
    """
    examples = [{"input_ids": row} for row in rows.astype(np.int64)]
    mask_tokens = None
    if name != "wrapper":
        mask_tokens = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)

    def collate(picked: list[dict]) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(np.stack([example["input_ids"] for example in picked]))
        masked = mask_tokens(picked) if mask_tokens else {}
        return {"ids": ids, "real": (ids != SPECIAL_IDS.pad).long(), **masked}

    schedule = torch.optim.lr_scheduler.LambdaLR(
        peer.optimizer, lambda step: max(0.0, 1 - step / 1_000_000)
    )
    while True:
        for batch in DataLoader(examples, ROWS, shuffle=True, drop_last=True, collate_fn=collate):
            with autocast(bf16):
                loss = peer_loss(peer, batch)
            loss.backward()
            update_weights(peer)
            schedule.step()
            yield loss.item()


def peer_loss(peer: Contender, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of a peer on a batch of its data loader."""
    if not isinstance(peer, HuggingFace):
        return peer.module(batch["ids"], attention_mask=batch["real"]).loss
    is_masked = batch["labels"] != -100
    inputs = {
        "attention_mask": batch["real"],
        "token_type_ids": torch.zeros_like(batch["ids"]),
    }
    return peer.joined_loss(batch["ids"], batch["input_ids"], is_masked, batch["real"], inputs)


# ------------------------------------------------------------------------------- random rows


def write_rows(folder: Path, count: int = 8192) -> Path:
    """Write a data folder of full random rows, with a vocabulary as large as BERT's."""
    (folder / "shards").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    special_tokens = {
        SPECIAL_IDS.pad: "[PAD]",
        SPECIAL_IDS.unk: "[UNK]",
        SPECIAL_IDS.cls: "[CLS]",
        SPECIAL_IDS.sep: "[SEP]",
        SPECIAL_IDS.mask: "[MASK]",
    }
    vocabulary = "\n".join(special_tokens.get(i, f"w{i}") for i in range(VOCAB_SIZE))
    (folder / "tokenizer" / "vocab.txt").write_text(f"{vocabulary}\n", encoding="utf-8")
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokenizer.save(folder / "tokenizer")
    ids = np.random.default_rng(0).integers(1000, VOCAB_SIZE, (count, LENGTH))
    rows = ids.astype(np.uint16)
    rows[:, 0] = SPECIAL_IDS.cls
    rows[:, -1] = SPECIAL_IDS.sep
    shard = folder / shard_format.shard_file("train", 0)
    no_fragments = np.zeros((0, 6), np.int32)
    info, blocks = shard_format.write_shard(shard, "train", 0, rows, no_fragments, BLOCK_ROWS)
    write_description(folder, LENGTH, [info], blocks, tokenizer.fingerprint)
    return folder


# --------------------------------------------------------------------------------- measurement


def measure(
    engine: str, data: Path, out: Path, options: argparse.Namespace, ranks: Ranks, device
) -> dict[str, Any]:
    """Run the loop with one engine; returns the summary of its rounds."""
    config = run_config("small", LENGTH, ROWS, 0.0)
    engine_config = load_engine(engine)
    logging = config.logging.model_copy(update={"every": LOG_EVERY})
    config = config.model_copy(update={"engine": engine_config, "logging": logging})
    precision = precision_name(resolve_precision(engine_config, device))
    bf16 = precision != "fp32"
    peers = make_contenders(config, options.peers)
    ours = peers.pop("ours")
    loops = peer_loops(peers, data, config, bf16)
    rounds = Rounds()

    def after_step(step: LoopStep) -> None:
        """The rest of the round: the bare step, and a step of each peer."""
        assert loader_threads(), f"no thread is named {LOADER_THREAD}"
        bare_parts, bare_loss = bare_step(ours, step.batch, bf16)
        if not rounds.ours:
            check_loss(engine, float(step.loss), bare_loss)
        clock = Clock()
        peer_times = {}
        for peer, loop in loops.items():
            next(loop)
            peer_times[peer] = clock.lap()
        rounds.ours.append(step.parts)
        rounds.bare.append(bare_parts)
        rounds.is_logged.append(step.is_logged)
        rounds.peers.append(peer_times)

    run_loop(config, data, out, WARM_UP_ROUNDS + options.rounds, after_step, ranks, device)
    seconds = loader_seconds(config, open_data(data))
    summary = summarize(rounds.without_warm_up(), seconds)
    return {"engine": engine, "precision": precision, **summary}


def peer_loops(
    peers: dict[str, Contender], data: Path, config: RunConfig, bf16: bool
) -> dict[str, Iterator[float]]:
    """The training loop of each peer, on the first rows of the data."""
    source = open_data(data)
    reader, _ = source.training(config.train.seed, ROWS)
    rows = reader.read(np.arange(min(8192, reader.rows)))
    tokenizer = BertTokenizerFast(str(source.tokenizer / "vocab.txt"))
    return {name: peer_loop(name, peer, rows, tokenizer, bf16) for name, peer in peers.items()}


def check_loss(engine: str, loss: float, bare_loss: float) -> None:
    """SystemExit if the losses of the loop and of the bare step differ."""
    tolerance = 2e-2 if "bf16" in engine else 1e-5
    if abs(loss / bare_loss - 1) > tolerance:
        raise SystemExit(
            f"{engine}: the first loss of the loop is {loss}; expected {bare_loss} (bare step)"
        )


def summarize(rounds: Rounds, loader_seconds: float) -> dict[str, Any]:
    """Medians in milliseconds of CPU time, and ratios (median, smallest, largest)."""
    quiet = [i for i, is_logged in enumerate(rounds.is_logged) if not is_logged]
    logged = [i for i, is_logged in enumerate(rounds.is_logged) if is_logged]
    loop_times = [sum(parts.values()) for parts in rounds.ours]
    bare_times = [sum(parts.values()) for parts in rounds.bare]

    def median_ms(times: list[np.ndarray], indices: list[int] = quiet) -> float:
        return 1000 * statistics.median(times[i][CPU] for i in indices)

    def ratios(
        numerators: list[np.ndarray], denominators: list[np.ndarray], clock: int
    ) -> tuple[float, float, float]:
        return median_and_range(
            [float(numerators[i][clock] / denominators[i][clock]) for i in quiet]
        )

    extra_ms = {part: median_ms([parts[part] for parts in rounds.ours]) for part in PARTS}
    for part in rounds.bare[0]:
        extra_ms[part] -= median_ms([parts[part] for parts in rounds.bare])
    extra_ms["loader"] = 1000 * loader_seconds
    extra_ms["log line"] = median_ms(loop_times, logged) - median_ms(loop_times) if logged else 0.0
    log_ms = extra_ms["log line"] / load_run("small").logging.every  # of each step
    added = np.array([loader_seconds + log_ms / 1000, 0.0])
    whole_times = [seconds + added for seconds in loop_times]
    outside_engine = sum(extra_ms[part] for part in ("votes", "data", "logging", "loader"))
    peer_ratios = {}
    for peer in rounds.peers[0]:
        peer_times = [times[peer] for times in rounds.peers]
        peer_ratios[peer] = [ratios(peer_times, whole_times, clock) for clock in (CPU, WALL)]
    return {
        "bare_ms": median_ms(bare_times),
        "over_bare": ratios(whole_times, bare_times, CPU),
        "over_bare_wall": ratios(loop_times, bare_times, WALL),
        "extra_ms": extra_ms,
        "data_votes_logging_share": (outside_engine + log_ms) / median_ms(bare_times),
        "peers": peer_ratios,
    }


# -------------------------------------------------------------------------------------- tables


def report(results: list[dict[str, Any]]) -> None:
    """Print the markdown tables."""
    print_heading(
        "engine",
        "precision",
        "bare step, CPU",
        "loop over bare, median",
        "spread",
        "wall",
        "reached",
    )
    for result in results:
        median, low, high = (ratio - 1 for ratio in result["over_bare"])
        wall_median, *_ = result["over_bare_wall"]
        print_row(
            result["engine"],
            result["precision"],
            f"{result['bare_ms']:.0f} ms",
            f"{median:+.1%}",
            f"{low:+.1%} to {high:+.1%}",
            f"{wall_median - 1:+.1%}",
            next((name for goal, name in GOALS if median <= goal), "BELOW"),
        )
    print("\nCPU milliseconds of a step beyond the bare step's, and of a log line:\n")
    print_heading("engine", *results[0]["extra_ms"], "data, votes, logging")
    for result in results:
        cells = [f"{milliseconds:.1f}" for milliseconds in result["extra_ms"].values()]
        print_row(result["engine"], *cells, f"{result['data_votes_logging_share']:.2%}")
    if any(result["peers"] for result in results):
        report_peers(results)


def report_peers(results: list[dict[str, Any]]) -> None:
    """Print the ratios to the loops of the peers."""
    print()
    print_heading(
        "engine", "peer in its own loop", "tokens/s of ours over it, CPU", "spread", "wall"
    )
    for result in results:
        for peer, (cpu_ratios, wall_ratios) in result["peers"].items():
            median, low, high = cpu_ratios
            cells = [f"{median:.2f}", f"{low:.2f}-{high:.2f}", f"{wall_ratios[0]:.2f}"]
            print_row(result["engine"], peer, *cells)


# ---------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "engines", nargs="*", metavar="ENGINE", help=f"engine files (default: {' '.join(ENGINES)})"
    )
    parser.add_argument("--rounds", type=int, default=7, help="paired rounds per engine")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument(
        "--data",
        type=Path,
        help=f"a data folder of rows of {LENGTH} tokens with BERT's vocabulary "
        "(default: random rows)",
    )
    parser.add_argument(
        "--peers",
        action="store_const",
        const=PEERS,
        default=[],
        help=f"also measure the loops of {', '.join(PEERS)}",
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    ranks = find_ranks()
    device = start(ranks, timeout_minutes=10)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        data = options.data or write_rows(Path(scratch) / "data")
        for engine in options.engines or ENGINES:
            out = Path(scratch) / Path(engine).stem
            out.mkdir()
            results.append(measure(engine, data, out, options, ranks, device))
    report(results)
    if options.json:
        write_json(options.json, results)
    destroy_process_groups()


if __name__ == "__main__":
    run_main(main)
