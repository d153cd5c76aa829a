"""Time of a fine-tuning step on GLUE tasks compared with Hugging Face's usual loop.

    python bench/finetune.py --glue GLUE_DIR          four tasks, fp32 and bf16, 5 paired rounds
    python bench/finetune.py --glue GLUE_DIR --tasks cola --rounds 9 --json F

The model is ELECTRA-Small with random weights and dropout .1. A step collates 32 examples and does
forward, backward, clipping and AdamW.

ours: the collate function and the Classifier of electra_ds, with padded and with packed rows, with
torch's optimizer and through the engine (ZeRO stage 0).
HF: the stock class in a loop over a DataLoader with torch's AdamW, padded to 128 tokens or to the
longest example of the batch.

In each round all contenders train on the same examples in turn, in one process, so that other work
on the machine slows them alike. The examples of HF are shuffled; those of ours have the order of an
epoch of `finetune`. The result is the ratio of CPU times, as the median over the rounds. "An epoch
of each" adds up the tasks by their number of examples. Before any timing all contenders must give
the same logits with the same weights.
"""

import argparse
import functools
import os
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
import transformers
from peers import SPECIAL_IDS, autocast, measure_seconds, run_config, update_weights
from report import best_goal, make_parser, median_and_range, print_heading, print_row, run_main
from torch import Tensor
from torch.utils.data import DataLoader

from electra_ds.cluster.launchers import find_ranks
from electra_ds.common.json_files import write_json
from electra_ds.config.engine_files import load_engine
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.finetuning.batches import Encoded, collate, encode, epoch_batches
from electra_ds.finetuning.config import load_finetune
from electra_ds.finetuning.examples import read_examples
from electra_ds.finetuning.model import Classifier, TaskTotals, layerwise
from electra_ds.finetuning.predict import classifier
from electra_ds.finetuning.tasks import Task, load_task
from electra_ds.interop.hf import format_of
from electra_ds.model.weights import true_state
from electra_ds.training.collectives import destroy_process_groups
from electra_ds.training.engine import Engine, start
from electra_ds.training.precision import cpu_multiplies_bf16

FIXED_HF = "HF, padded to 128"
PER_BATCH_HF = "HF, padded per batch"
PACKED = "packed"
PADDED = "padded"
PADDED_ENGINE = "padded, engine"
GOALS = {FIXED_HF: (3.0, 3.8, 4.3), PER_BATCH_HF: (1.5, 1.8, 2.0)}  # floor, target, stretch
PAIRS = [(ours, peer) for ours in (PACKED, PADDED, PADDED_ENGINE) for peer in GOALS]
STEP_EXAMPLES = 32
MAX_LENGTH = 128
MODEL = run_config("small", MAX_LENGTH, STEP_EXAMPLES, 0.1).model
FIXED_HF_STEPS = 2  # measured steps of FIXED_HF; all its steps have the same shape

Times = dict[str, list[np.ndarray]]  # contender -> [2] (CPU, wall) seconds per step, of each round


# ---------------------------------------------------------------------------------- contenders


class Ours:
    """The Classifier and torch's fused AdamW, without DeepSpeed."""

    def __init__(self, task: Task, packed: bool):
        self.module = new_classifier(task)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, fused=True)
        self.collate = functools.partial(
            collate, pad_id=SPECIAL_IDS.pad, kind=task.kind, packed=packed
        )

    def logits(self, examples: list[Encoded]) -> Tensor:
        return self.module.eval()(self.collate(examples), predict=True)

    def train(self, batches: list[list[Encoded]], bf16: bool) -> None:
        self.module.train()
        for examples in batches:
            with autocast(bf16):
                totals = TaskTotals(len(examples))
                loss = self.module(self.collate(examples), totals).total
            loss.backward()
            update_weights(self)


class OursWithEngine(Ours):
    """The Classifier in the engine, with a learning rate for each layer: the step of `finetune`."""

    def __init__(self, task: Task, packed: bool, bf16: bool):
        super().__init__(task, packed)
        settings = [
            f"train.global_batch_size={STEP_EXAMPLES}",
            f"train.micro_batch_size={STEP_EXAMPLES}",
        ]
        self.engine = Engine(
            self.module,
            load_finetune("small", settings),
            load_engine("zero0" if bf16 else "zero0-fp32"),
            find_ranks(),
            start_process(),
            layerwise(MODEL.num_layers, 0.8),
        )

    def train(self, batches: list[list[Encoded]], bf16: bool) -> None:
        for examples in batches:
            batch = self.collate(examples)
            self.engine.forward_backward([batch], [0], TaskTotals(len(examples)))
            self.engine.step(1e-4)


class HuggingFace:
    """The stock class with our weights, in a plain loop over a DataLoader.

    length: rows are padded to this; None: to the longest example of the batch.
    """

    def __init__(self, task: Task, length: int | None):
        form = format_of(MODEL)
        role, state = form.classifier(true_state(new_classifier(task)), task.kind)
        labels = 1 if task.kind == "regression" else len(task.labels)
        options = form.config(MODEL, None, SPECIAL_IDS, role)
        config = transformers.ElectraConfig(**options, num_labels=labels)
        self.module = getattr(transformers, form.classes[role])(config)
        self.module.load_state_dict(state, strict=False)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4)
        self.length = length

    def collate(self, examples: list[Encoded]) -> dict[str, Tensor]:
        length = self.length or max(len(example.ids) for example in examples)
        shape = len(examples), length
        ids = torch.zeros(shape, dtype=torch.long)
        segments = torch.zeros(shape, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for i, example in enumerate(examples):
            size = len(example.ids)
            ids[i, :size] = torch.tensor(example.ids)
            segments[i, example.second_start : size] = 1
            attention_mask[i, :size] = 1
        return {
            "input_ids": ids,
            "token_type_ids": segments,
            "attention_mask": attention_mask,
            "labels": torch.tensor([example.label for example in examples]),
        }

    def logits(self, examples: list[Encoded]) -> Tensor:
        return self.module.eval()(**self.collate(examples)).logits

    def train(self, batches: list[list[Encoded]], bf16: bool) -> None:
        self.module.train()
        examples = [example for batch in batches for example in batch]
        for batch in DataLoader(examples, STEP_EXAMPLES, collate_fn=self.collate):
            with autocast(bf16):
                loss = self.module(**batch).loss
            loss.backward()
            update_weights(self)


def new_classifier(task: Task) -> Classifier:
    """The module of a task with random weights, equal at every call."""
    return classifier(MODEL, task).start(MODEL, None, 0)


@functools.cache
def start_process() -> torch.device:
    return start(find_ranks(), timeout_minutes=2)


def make_contenders(task: Task, bf16: bool) -> dict[str, Ours | HuggingFace]:
    """All contenders of a task, with the same weights."""
    return {
        PACKED: Ours(task, packed=True),
        PADDED: Ours(task, packed=False),
        PADDED_ENGINE: OursWithEngine(task, packed=False, bf16=bf16),
        FIXED_HF: HuggingFace(task, MAX_LENGTH),
        PER_BATCH_HF: HuggingFace(task, None),
    }


@torch.no_grad()
def check_logits(contenders: dict[str, Ours | HuggingFace], examples: list[Encoded]) -> None:
    """Raise SystemExit if the contenders do not give the same logits."""
    expected = contenders[PACKED].logits(examples)
    for name, contender in contenders.items():
        logits = contender.logits(examples)
        if not torch.allclose(logits, expected, atol=1e-5):
            difference = float((logits - expected).abs().max())
            raise SystemExit(f"{name}: logits differ by {difference} from those of electra_ds")


# --------------------------------------------------------------------------------- measurement


def measure(task: Task, encoded: list[Encoded], bf16: bool, rounds: int, steps: int) -> Times:
    """The times of each contender on one task."""
    contenders = make_contenders(task, bf16)
    check_logits(contenders, encoded[:STEP_EXAMPLES])
    lengths = np.array([len(example.ids) for example in encoded])
    times: Times = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        ordered = full_batches(lengths, seed=turn, count=steps)
        shuffled = shuffle_examples(ordered, seed=turn)
        numbers_of = {FIXED_HF: shuffled[:FIXED_HF_STEPS], PER_BATCH_HF: shuffled}
        for name in np.roll(list(contenders), turn):  # the first of a round has colder caches
            batches = [[encoded[i] for i in numbers] for numbers in numbers_of.get(name, ordered)]
            seconds = measure_seconds(contenders[name].train, batches, bf16)
            times[name].append(np.divide(seconds, len(batches)))
    contenders[PADDED_ENGINE].engine.close()
    # The first round warms up.
    return {name: seconds[1:] for name, seconds in times.items()}


def full_batches(lengths: np.ndarray, seed: int, count: int) -> list[np.ndarray]:
    """The first `count` full batches of an epoch, as example numbers [STEP_EXAMPLES]."""
    batches = epoch_batches(lengths, STEP_EXAMPLES, seed, 0)
    return [batch for batch in batches if len(batch) == STEP_EXAMPLES][:count]


def shuffle_examples(batches: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """The examples of the batches in random order, in as many batches."""
    shuffled = np.random.default_rng(seed).permutation(np.concatenate(batches))
    return np.split(shuffled, len(batches))


def time_ratios(times: Iterable[Times], weights: list[int], ours: str, peer: str) -> np.ndarray:
    """[rounds, 2] (CPU, wall) time of the peer over ours, each summed over the tasks by weights."""
    tasks = list(times)
    peer_seconds = np.tensordot(weights, np.array([task[peer] for task in tasks]), 1)
    our_seconds = np.tensordot(weights, np.array([task[ours] for task in tasks]), 1)
    return peer_seconds / our_seconds


def report(title: str, precision: str, ours: str, peer: str, ratios: np.ndarray) -> dict:
    """Print one comparison as a row of the table; returns it as a record."""
    median, low, high = median_and_range(ratios[:, 0].tolist())
    wall_ratio = float(np.median(ratios[:, 1]))
    goals = GOALS[peer]
    print_row(
        title,
        precision,
        ours,
        peer,
        f"{median:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{wall_ratio:.2f}",
        " / ".join(map(str, goals)),
        best_goal(median, goals),
    )
    return {
        "task": title,
        "precision": precision,
        "ours": ours,
        "against": peer,
        "ratio": median,
        "spread": (low, high),
        "wall_ratio": wall_ratio,
        "goals": goals,
    }


def mean_tokens(encoded: Iterable[list[Encoded]]) -> float:
    """Tokens per example."""
    lengths = [len(example.ids) for examples in encoded for example in examples]
    return sum(lengths) / len(lengths)


def measure_precision(
    precision: str,
    tasks: dict[str, Task],
    encoded: dict[str, list[Encoded]],
    options: argparse.Namespace,
) -> list[dict]:
    """Measure and print every task in one precision, then all tasks together."""
    records = []
    times = {}
    for name, task in tasks.items():
        examples = encoded[name]
        times[name] = measure(task, examples, precision == "bf16", options.rounds, options.steps)
        title = f"{name} ({mean_tokens([examples]):.0f})"
        for pair in PAIRS:
            ratios = time_ratios([times[name]], [1], *pair)
            records.append(report(title, precision, *pair, ratios))
    title = f"an epoch of each ({mean_tokens(encoded.values()):.0f})"
    sizes = [len(examples) for examples in encoded.values()]
    for pair in PAIRS:
        ratios = time_ratios(times.values(), sizes, *pair)
        records.append(report(title, precision, *pair, ratios))
    return records


# ---------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--glue", type=Path, required=True, help="the folder that holds CoLA/, RTE/, ..."
    )
    parser.add_argument(
        "--vocab",
        type=Path,
        help="a vocab.txt (default: vocab/bert-base-uncased-vocab.txt beside the GLUE folder)",
    )
    parser.add_argument("--tasks", default="cola,mrpc,rte,stsb", help="names, with commas")
    parser.add_argument("--precisions", default="fp32,bf16", help="names, with commas")
    parser.add_argument(
        "--rounds", type=int, default=5, help="paired rounds per task and precision"
    )
    parser.add_argument("--steps", type=int, default=8, help="steps of 32 examples in a round")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    start_process()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    beside_glue = options.glue.resolve().parent / "vocab" / "bert-base-uncased-vocab.txt"
    tokenizer = load_tokenizer(options.vocab or beside_glue)
    tasks = {name: load_task(name, options.glue) for name in options.tasks.split(",")}
    encoded = {
        name: encode(read_examples(task, "train"), task, tokenizer, MAX_LENGTH)
        for name, task in tasks.items()
    }
    print_heading(
        "task (mean tokens)",
        "precision",
        "ours",
        "against",
        "CPU-time ratio, median",
        "spread",
        "wall ratio",
        "floor / target / stretch",
        "reached",
    )
    records = []
    for precision in options.precisions.split(","):
        if precision == "bf16" and not cpu_multiplies_bf16():
            reason = "not run: this processor has no bf16 products"
            print_row("", "bf16", reason, *[""] * 6)
            continue
        records += measure_precision(precision, tasks, encoded, options)
    if options.json:
        write_json(options.json, records)
    destroy_process_groups()


if __name__ == "__main__":
    run_main(main)
