"""What does the whole training loop cost beside the bare step, and beside the peers in a loop of their own?

    python bench/trainer.py                                   every engine below, 7 rounds each
    python bench/trainer.py zero1 zero0 --threads 2 --peers --data D --json F

A round is one turn of pretrain's own loop (loader, votes, engine, metrics), then the bare step (bench/peers.py) on the
same rows in the engine's precision, then with --peers one turn of each peer's loop: a PyTorch DataLoader, the usual
masking by transformers, clipping, AdamW, schedule. All take turns in one process, so that a busy machine slows them
alike; what counts is the ratio of CPU time, the median over the rounds. Small, rows of 128, 32 a step, no dropout,
one rank; random rows, or those of --data. The first losses must agree.

CPU time of ours is that of the process without the loader's thread, which works ahead in anybody's turn: what a batch
costs it is measured apart and added. Every tenth step logs; its cost counts as often as `logging.every` of the preset.
"""

import argparse
import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from peers import IDS, VOCAB, HuggingFace, Ours, autocast, contenders_of, run_config, update
from report import bench, heading, parser_of, row, spread
from torch.utils.data import DataLoader
from transformers import BertTokenizerFast, DataCollatorForLanguageModeling

from electra_ds.cluster.launchers import find_ranks
from electra_ds.common.files import write_json
from electra_ds.common.folder_lock import Lock
from electra_ds.config.engine_files import load_engine
from electra_ds.config.loading import load_run
from electra_ds.data import shard_format
from electra_ds.data.batch import Batch
from electra_ds.data.dataset import DataFolder, open_data
from electra_ds.model.build import build_objective
from electra_ds.training.collectives import leave, on_rank0
from electra_ds.training.engine import Engine, start
from electra_ds.training.precision import precision_name
from electra_ds.training.pretrain import Limits
from electra_ds.training.state import TrainingState
from electra_ds.training.trainer import Run

ENGINES = ("zero0", "zero1", "zero2", "zero3", "zero0-fp32", "zero1-fp32", "zero1-bf16")
ROWS, LENGTH = 32, 128
WARM_UP, LOG_EVERY = 2, 10
PARTS = ("forward_backward", "step", "votes", "data", "logging")
GOALS = ((0.05, "stretch"), (0.10, "target"), (0.15, "floor"))


# ---------------------------------------------------------------------------------------------------------- contenders


class Clock:
    """(CPU, wall) seconds since the last look; CPU without the loader's thread, which has a clock of its own."""

    def __init__(self):
        self.seen = self.now()

    def now(self) -> np.ndarray:
        return np.array([time.process_time() - self.loader(), time.perf_counter()])

    @staticmethod
    def loader() -> float:
        threads = [thread.ident for thread in threading.enumerate() if thread.name == "loader"]
        return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in threads)

    def lap(self) -> np.ndarray:
        passed, self.seen = self.now() - self.seen, self.now()
        return passed


class Paced(Engine):
    """The engine of a run: at the top of the loop it lets the others take their turn, and it notes what the parts of
    the loop take."""

    def __init__(
        self, take_turns: Callable[[dict[str, np.ndarray], bool, Batch, float], None], *arguments
    ):
        super().__init__(*arguments)
        self.take_turns, self.clock, self.parts = take_turns, Clock(), {}

    def _note(self, part: str) -> None:
        self.parts[part] = self.parts.get(part, 0) + self.clock.lap()

    def wait_votes(self):
        self._note("logging")
        if "step" in self.parts:
            self.take_turns(self.parts, self.logs, self.batch, self.loss)
        self.parts = {}
        self.clock.lap()
        return super().wait_votes()

    def forward_backward(self, micro_batches, *arguments, **options):
        self._note("votes")
        losses = super().forward_backward(micro_batches, *arguments, **options)
        self._note("forward_backward")
        (self.batch,), self.logs, self.loss = micro_batches, options["with_counts"], losses[0].total
        return losses

    def send_votes(self, *arguments, **votes):
        self._note("data")
        super().send_votes(*arguments, **votes)

    def step(self, lr):
        self._note("votes")
        result = super().step(lr)
        self._note("step")
        return result


def bare_step(ours: Ours, batch: Batch, bf16: bool) -> tuple[dict[str, np.ndarray], float]:
    """The parts of one bare step, and its loss."""
    clock = Clock()
    with autocast(bf16):
        loss = ours.loss(batch)
    loss.backward()
    parts = {"forward_backward": clock.lap()}
    update(ours)
    return parts | {"step": clock.lap()}, float(loss.detach())


def peer_loop(
    name: str, peer, rows: np.ndarray, tokenizer: BertTokenizerFast, bf16: bool
) -> Iterator[float]:
    """A training loop as the peer's users write it; yields the loss of each step."""
    examples = [{"input_ids": row} for row in rows.astype(np.int64)]
    mask = (
        DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
        if name != "wrapper"
        else None
    )

    def collate(picked: list[dict]) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(np.stack([example["input_ids"] for example in picked]))
        return {"ids": ids, "real": (ids != IDS.pad).long(), **(mask(picked) if mask else {})}

    schedule = torch.optim.lr_scheduler.LambdaLR(
        peer.optimizer, lambda step: max(0.0, 1 - step / 1_000_000)
    )
    while True:
        for batch in DataLoader(examples, ROWS, shuffle=True, drop_last=True, collate_fn=collate):
            with autocast(bf16):
                if isinstance(peer, HuggingFace):
                    chosen, zeros = batch["labels"] != -100, torch.zeros_like(batch["ids"])
                    loss = peer.joined_loss(
                        batch["ids"], batch["input_ids"], chosen, batch["real"], zeros
                    )
                else:
                    loss = peer.module(batch["ids"], attention_mask=batch["real"]).loss
            loss.backward()
            update(peer)
            schedule.step()
            yield loss.item()


# ------------------------------------------------------------------------------------------------------------- the rows


def write_rows(folder: Path, count: int = 8192) -> Path:
    """A data folder of full random rows, with a vocabulary as large as BERT's."""
    (folder / "shards").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    words = {
        IDS.pad: "[PAD]",
        IDS.unk: "[UNK]",
        IDS.cls: "[CLS]",
        IDS.sep: "[SEP]",
        IDS.mask: "[MASK]",
    }
    vocab = "\n".join(words.get(i, f"w{i}") for i in range(VOCAB))
    (folder / "tokenizer" / "vocab.txt").write_text(vocab, encoding="utf-8")
    rows = np.random.default_rng(0).integers(1000, VOCAB, (count, LENGTH)).astype(np.uint16)
    rows[:, 0], rows[:, -1] = IDS.cls, IDS.sep
    path, pieces = folder / shard_format.shard_file("train", 0), np.zeros((0, 6), np.int32)
    info, blocks = shard_format.write_shard(path, "train", 0, rows, pieces, 256)
    index = shard_format.write_index(folder / shard_format.index_file("train"), blocks)
    split = shard_format.SplitInfo(
        documents=0, pieces=0, tokens=0, pad=0, rows=count, shards=(info,), index_sha256=index
    )
    tokenizer = shard_format.TokenizerInfo(
        kind="wordpiece", sha256="0" * 64, vocab_size=VOCAB, special_ids=IDS
    )
    source = shard_format.SourcePlan(sha256="0" * 64, files=(), units=())
    facts = {
        "sequence_length": LENGTH,
        "dtype": "uint16",
        "block_rows": 256,
        "packing": "best_fit",
        "seed": 0,
    }
    shard_format.write_manifest(
        folder,
        shard_format.Manifest(**facts, tokenizer=tokenizer, source=source, splits={"train": split}),
    )
    return folder


# ------------------------------------------------------------------------------------------------------ the measurement


def measure(
    name: str, data: DataFolder, out: Path, options: argparse.Namespace, device, ranks
) -> dict:
    """Run the loop with one engine; per round the parts of ours, of the bare step, and the peers' turns."""
    config = run_config("small", LENGTH, ROWS, 0.0)
    steps, preset = WARM_UP + options.rounds, load_run("small").logging
    logging = preset.model_copy(update={"every": LOG_EVERY})
    config = config.model_copy(update={"engine": load_engine(name), "logging": logging})
    peers = contenders_of(config, options.peers)
    ours, found = (
        peers.pop("ours"),
        {"engine": name, "ours": [], "bare": [], "logs": [], "peers": []},
    )

    def take_turns(parts: dict, logs: bool, batch: Batch, loss: torch.Tensor) -> None:
        bare, expected = bare_step(ours, batch, bf16)
        if not found["ours"] and abs(float(loss) / expected - 1) > (
            2e-2 if "bf16" in name else 1e-5
        ):
            raise SystemExit(
                f"{name}: the loop's first loss is {float(loss)}, that of the bare step {expected}"
            )
        clock = Clock()
        found["peers"].append({peer: (next(loop), clock.lap())[1] for peer, loop in loops.items()})
        for key, value in (("ours", parts), ("bare", bare), ("logs", logs)):
            found[key].append(value)

    engine = Paced(
        take_turns, build_objective(config, seed=0), config, config.engine, ranks, device
    )
    found["precision"] = precision_name(engine.deepspeed_config)
    bf16 = found["precision"] != "fp32"
    reader, order = data.training(config.train.seed, ROWS)
    tokenizer = BertTokenizerFast(str(data.tokenizer / "vocab.txt"))
    rows = reader.read(np.arange(min(8192, reader.rows)))
    loops = {
        peer: peer_loop(peer, contender, rows, tokenizer, bf16) for peer, contender in peers.items()
    }
    with Lock(out, on_rank0) as lock:
        limits, began = Limits(stop_at_step=steps), time.monotonic()
        run = Run(
            config, engine, data, reader, order, out, config.train.total_steps, limits, began, lock
        )
        with open(out / "console", "w") as console, contextlib.redirect_stdout(console):
            run.train(TrainingState())
    found["loader"] = loader_seconds(run)
    engine.close()
    return found | {"logging_every": preset.every}


def loader_seconds(run: Run, steps: int = 512) -> float:
    """CPU seconds for the batch of one step, when nobody else is at work."""
    batches, began = run._batches(TrainingState()), time.process_time()
    for _ in range(steps):
        next(batches)
    seconds = time.process_time() - began
    batches.close()
    return seconds / steps


def total(parts: dict[str, np.ndarray]) -> np.ndarray:
    return sum(parts.values())


def summary(found: dict) -> dict:
    """Medians over the rounds, in milliseconds of CPU time, and ratios (median, lowest, highest)."""
    ours, bare, logs, peers = (found[key][WARM_UP:] for key in ("ours", "bare", "logs", "peers"))
    quiet, noisy = (
        [i for i, logging in enumerate(logs) if logging == wanted] for wanted in (False, True)
    )
    turns, bares = ([total(parts) for parts in side] for side in (ours, bare))

    def middle(seconds: list[np.ndarray], of: list[int] = quiet) -> float:
        return 1000 * statistics.median(seconds[i][0] for i in of)

    def ratios(
        theirs: list[np.ndarray], mine: list[np.ndarray], clock: int
    ) -> tuple[float, float, float]:
        return spread([float((theirs[i] / mine[i])[clock]) for i in quiet])

    extra = {part: middle([parts[part] for parts in ours]) for part in PARTS}
    for part in bare[0]:
        extra[part] -= middle([parts[part] for parts in bare])
    extra["loader"] = 1000 * found["loader"]
    extra["log line"] = middle(turns, noisy) - middle(turns) if noisy else 0.0
    log = extra["log line"] / found["logging_every"]
    whole = [turn + np.array([found["loader"] + log / 1000, 0.0]) for turn in turns]
    beside = sum(extra[part] for part in ("votes", "data", "logging", "loader")) + log
    return {
        "engine": found["engine"],
        "precision": found["precision"],
        "bare_ms": middle(bares),
        "over_bare": ratios(whole, bares, 0),
        "over_bare_wall": ratios(turns, bares, 1),
        "extra_ms": extra,
        "data_votes_logging_share": beside / middle(bares),
        "peers": {
            peer: [ratios([turn[peer] for turn in peers], whole, clock) for clock in (0, 1)]
            for peer in peers[0]
        },
    }


def report(results: list[dict]) -> None:
    """The markdown tables."""
    heading(
        "engine",
        "precision",
        "bare step, CPU",
        "loop over bare, median",
        "spread",
        "wall",
        "reached",
    )
    for r in results:
        middle, low, high = (value - 1 for value in r["over_bare"])
        reached = next((name for goal, name in GOALS if middle <= goal), "BELOW")
        row(
            r["engine"],
            r["precision"],
            f"{r['bare_ms']:.0f} ms",
            f"{middle:+.1%}",
            f"{low:+.1%} to {high:+.1%}",
            f"{r['over_bare_wall'][0] - 1:+.1%}",
            reached,
        )
    print("\nCPU ms of a step beyond the bare step's, of a log line when there is one:\n")
    heading("engine", *results[0]["extra_ms"], "data, votes, logging")
    for r in results:
        extra = (f"{value:.1f}" for value in r["extra_ms"].values())
        row(r["engine"], *extra, f"{r['data_votes_logging_share']:.2%}")
    if any(r["peers"] for r in results):
        print()
        heading("engine", "peer in its own loop", "tokens/s of ours over it, CPU", "spread", "wall")
    for r in results:
        for peer, ((middle, low, high), (wall, *_)) in r["peers"].items():
            row(r["engine"], peer, f"{middle:.2f}", f"{low:.2f}-{high:.2f}", f"{wall:.2f}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "engines", nargs="*", metavar="ENGINE", help=f"engine files (default: {' '.join(ENGINES)})"
    )
    parser.add_argument("--rounds", type=int, default=7, help="paired rounds per engine")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument(
        "--data", type=Path, help=f"a data folder of rows of {LENGTH} tokens instead of random rows"
    )
    peers = ["HF", "tuned HF", "wrapper"]
    parser.add_argument(
        "--peers", action="store_const", const=peers, default=[], help="their loops as well"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ranks, results = find_ranks(), []
    device = start(ranks, timeout_minutes=10)
    with tempfile.TemporaryDirectory() as scratch:
        data = open_data(options.data or write_rows(Path(scratch) / "data"))
        for name in options.engines or ENGINES:
            out = Path(scratch) / Path(name).stem
            out.mkdir()
            results.append(summary(measure(name, data, out, options, device, ranks)))
    report(results)
    if options.json:
        write_json(options.json, results)
    leave()


if __name__ == "__main__":
    bench(main)
