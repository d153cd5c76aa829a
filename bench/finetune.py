"""How fast is a fine-tuning step on real GLUE tasks beside Hugging Face's usual loop?

    python bench/finetune.py --glue GLUE_DIR                  CoLA, MRPC, RTE, STS-B in fp32 and bf16, 5 paired rounds
    python bench/finetune.py --glue GLUE_DIR --tasks cola --rounds 9 --json F

ELECTRA-Small with random weights, dropout .1, steps of 32 examples: collate, forward, backward, clipping, AdamW. Ours
is the real path (glue.batches, Classifier), padded and packed, with torch's optimizer and through our engine (ZeRO
stage 0). Theirs is the stock class in a loop over a DataLoader with torch's AdamW, padded to 128 or per batch. In each
round all train on the same examples in turn in one process, so that a busy machine slows them alike; theirs are
shuffled, ours ordered as `finetune` orders an epoch. What counts is the ratio of CPU time, the median over the rounds;
"an epoch of each" adds the tasks up by their examples. Before any timing the same weights must give all equal logits.
"""

import functools
import os
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
import transformers
from peers import IDS, autocast, run_config, seconds, update
from report import bench, heading, parser_of, reached, row, spread
from torch import Tensor
from torch.utils.data import DataLoader

from electra_ds.cluster.launchers import find_ranks
from electra_ds.common.files import write_json
from electra_ds.config.engine_files import load_engine
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.finetuning.batches import Encoded, collate, encode, epoch_batches
from electra_ds.finetuning.config import load_finetune
from electra_ds.finetuning.examples import read_examples
from electra_ds.finetuning.model import TaskTotals, layerwise
from electra_ds.finetuning.predict import classifier
from electra_ds.finetuning.tasks import Task, load_task
from electra_ds.interop.hf import classifier_to_hf, hf_config
from electra_ds.model.weights import true_state
from electra_ds.training.collectives import leave
from electra_ds.training.engine import Engine, start
from electra_ds.training.precision import cpu_multiplies_bf16

FIXED, PER_BATCH = "HF, padded to 128", "HF, padded per batch"
GOALS = {FIXED: (3.0, 3.8, 4.3), PER_BATCH: (1.5, 1.8, 2.0)}  # floor, target, stretch
EXAMPLES, LENGTH = 32, 128  # of a step; the longest
PAIRS = [(ours, theirs) for ours in ("packed", "padded", "padded, engine") for theirs in GOALS]
MODEL = run_config("small", LENGTH, EXAMPLES, 0.1).model
SAMPLE = 2  # steps that FIXED takes, for the time of all: one is like the other


class Ours:
    """Classifier and torch's fused AdamW, without DeepSpeed."""

    def __init__(self, task: Task, packed: bool):
        self.module = classifier(MODEL, task).start(MODEL, None, 0)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, fused=True)
        self.collate = functools.partial(collate, pad_id=IDS.pad, kind=task.kind, packed=packed)

    def logits(self, examples: list[Encoded]) -> Tensor:
        return self.module.eval()(self.collate(examples), predict=True)

    def train(self, batches: list[list[Encoded]], bf16: bool) -> None:
        self.module.train()
        for examples in batches:
            with autocast(bf16):
                loss = self.module(self.collate(examples), len(examples)).total
            loss.backward()
            update(self)


@functools.cache
def device() -> torch.device:
    return start(find_ranks(), timeout_minutes=2)


class OurEngine(Ours):
    """The same through our engine, with a rate for each layer: the step of `finetune`."""

    def __init__(self, task: Task, packed: bool, bf16: bool):
        super().__init__(task, packed)
        config = load_finetune(
            "small", [f"train.global_batch_size={EXAMPLES}", f"train.micro_batch_size={EXAMPLES}"]
        )
        engine = load_engine("zero0" if bf16 else "zero0-fp32")
        self.engine = Engine(
            self.module, config, engine, find_ranks(), device(), layerwise(MODEL.num_layers, 0.8)
        )

    def train(self, batches: list[list[Encoded]], bf16: bool) -> None:
        for examples in batches:
            self.engine.forward_backward([self.collate(examples)], [0], TaskTotals(len(examples)))
            self.engine.step(1e-4)


class HuggingFace:
    """The stock class with our weights, in a plain loop over a DataLoader."""

    def __init__(self, task: Task, length: int | None):
        name, state = classifier_to_hf(
            true_state(classifier(MODEL, task).start(MODEL, None, 0)), task.kind
        )
        labels = 1 if task.kind == "regression" else len(task.labels)
        config = transformers.ElectraConfig(
            **hf_config(MODEL, None, "discriminator", IDS.pad), num_labels=labels
        )
        self.module = getattr(transformers, name)(config)
        self.module.load_state_dict(state, strict=False)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4)
        self.kind, self.length = task.kind, length

    def collate(self, examples: list[Encoded]) -> dict[str, Tensor]:
        length = self.length or max(len(example.ids) for example in examples)
        ids, segments, real = (
            torch.zeros(len(examples), length, dtype=torch.long) for _ in range(3)
        )
        for i, example in enumerate(examples):
            size = len(example.ids)
            ids[i, :size], segments[i, example.second_start : size], real[i, :size] = (
                torch.tensor(example.ids),
                1,
                1,
            )
        labels = torch.tensor([example.label for example in examples])
        return {
            "input_ids": ids,
            "token_type_ids": segments,
            "attention_mask": real,
            "labels": labels,
        }

    def logits(self, examples: list[Encoded]) -> Tensor:
        return self.module.eval()(**self.collate(examples)).logits

    def train(self, batches: list[list[Encoded]], bf16: bool) -> None:
        self.module.train()
        examples = [example for batch in batches for example in batch]
        for batch in DataLoader(examples, EXAMPLES, collate_fn=self.collate):
            with autocast(bf16):
                loss = self.module(**batch).loss
            loss.backward()
            update(self)


def contenders_of(task: Task, bf16: bool) -> dict[str, Ours | HuggingFace]:
    """Ours and theirs, all with the same weights."""
    return {
        "packed": Ours(task, True),
        "padded": Ours(task, False),
        "padded, engine": OurEngine(task, False, bf16),
        FIXED: HuggingFace(task, LENGTH),
        PER_BATCH: HuggingFace(task, None),
    }


@torch.no_grad()
def check_logits(contenders: dict, examples: list[Encoded]) -> None:
    """The same weights must give the same logits."""
    expected = contenders["packed"].logits(examples)
    for name, contender in contenders.items():
        if not torch.allclose(found := contender.logits(examples), expected, atol=1e-5):
            raise SystemExit(
                f"{name}: logits differ from ours by {float((found - expected).abs().max())}"
            )


def measure(
    task: Task, encoded: list[Encoded], bf16: bool, rounds: int, steps: int
) -> dict[str, list]:
    """Per contender the (CPU, wall) seconds of a step in each round."""
    contenders, taken = contenders_of(task, bf16), {}
    check_logits(contenders, encoded[:EXAMPLES])
    lengths = np.array([len(example.ids) for example in encoded])
    for number in range(rounds + 1):
        ordered = [
            batch for batch in epoch_batches(lengths, EXAMPLES, number, 0) if len(batch) == EXAMPLES
        ][:steps]
        shuffled = np.split(
            np.random.default_rng(number).permutation(np.concatenate(ordered)), len(ordered)
        )
        for name in np.roll(list(contenders), number):  # the first of a round finds colder caches
            orders = {FIXED: shuffled[:SAMPLE], PER_BATCH: shuffled}.get(name, ordered)
            batches = [[encoded[i] for i in batch] for batch in orders]
            found = seconds(lambda c=contenders[name], b=batches: c.train(b, bf16))
            taken.setdefault(name, []).append(np.divide(found, len(batches)))
    contenders["padded, engine"].engine.close()
    return {name: values[1:] for name, values in taken.items()}  # the first round warms up


def ratios(taken: Iterable[dict], weights: list[int], ours: str, theirs: str) -> np.ndarray:
    """[rounds, 2] (CPU, wall) time of theirs over ours, both summed over the tasks by weights."""
    sums = [
        np.tensordot(weights, np.array([task[name] for task in taken]), 1)
        for name in (theirs, ours)
    ]
    return sums[0] / sums[1]


def compared(task: str, precision: str, ours: str, theirs: str, found: np.ndarray) -> dict:
    """One comparison, printed as a row of the table."""
    (middle, low, high), wall, goals = (
        spread(found[:, 0].tolist()),
        float(np.median(found[:, 1])),
        GOALS[theirs],
    )
    row(
        task,
        precision,
        ours,
        theirs,
        f"{middle:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{wall:.2f}",
        " / ".join(map(str, goals)),
        reached(middle, goals),
    )
    return {
        "task": task,
        "precision": precision,
        "ours": ours,
        "against": theirs,
        "ratio": middle,
        "spread": (low, high),
        "wall_ratio": wall,
        "goals": goals,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--glue", type=Path, required=True, help="the folder with CoLA/, RTE/, ...")
    parser.add_argument(
        "--vocab", type=Path, help="a vocab.txt (default: bert-base-uncased-vocab.txt in ../vocab)"
    )
    parser.add_argument("--tasks", default="cola,mrpc,rte,stsb")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument(
        "--rounds", type=int, default=5, help="paired rounds per task and precision"
    )
    parser.add_argument("--steps", type=int, default=8, help="steps of 32 examples in a round")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    options = parser.parse_args()
    device()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    words = load_tokenizer(
        options.vocab or options.glue.resolve().parent / "vocab" / "bert-base-uncased-vocab.txt"
    )
    rows = []
    tasks = {name: load_task(name, options.glue) for name in options.tasks.split(",")}
    encoded = {
        name: encode(read_examples(task, "train"), task, words, LENGTH)
        for name, task in tasks.items()
    }
    tokens = {name: sum(len(example.ids) for example in found) for name, found in encoded.items()}
    heading(
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
    for precision in options.precisions.split(","):
        if precision == "bf16" and not cpu_multiplies_bf16():
            row("", "bf16", "this processor has no bf16 products", *[""] * 6)
            continue
        taken = {}
        for name, task in tasks.items():
            taken[name] = measure(
                task, encoded[name], precision == "bf16", options.rounds, options.steps
            )
            title = f"{name} ({tokens[name] / len(encoded[name]):.0f})"
            rows += [
                compared(title, precision, *pair, ratios([taken[name]], [1], *pair))
                for pair in PAIRS
            ]
        epoch = [len(found) for found in encoded.values()]
        title = f"an epoch of each ({sum(tokens.values()) / sum(epoch):.0f})"
        rows += [
            compared(title, precision, *pair, ratios(taken.values(), epoch, *pair))
            for pair in PAIRS
        ]
    if options.json:
        write_json(options.json, rows)
    leave()


if __name__ == "__main__":
    bench(main)
