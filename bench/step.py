"""Time of the bare training step against Hugging Face's classes and the electra-pytorch wrapper.

    python bench/step.py                      every case, 5 paired rounds each
    python bench/step.py --list               the names of the cases
    python bench/step.py small-bf16 --rounds 9 --threads 2
    python bench/step.py --data D             instead the cost of packed rows, on the rows of D

A step is forward, backward, clipping and AdamW on random full rows, of one document or of several.
All contenders run in one process and take turns; each round starts with another one. Other work on
the machine slows them alike, so the result is the ratio of CPU times, as the median over the
rounds. Before any timing the
contenders must give the loss of ours on the same weights, rows, masks and samples. They are
described in bench/peers.py.
"""

import argparse
import statistics
from dataclasses import dataclass

import numpy as np
import torch
from cost import step_flops
from peers import Ours, make_contenders, measure_seconds, random_batch, run_config, train_step
from report import best_goal, make_parser, median_and_range, print_heading, print_row, run_main

from electra_ds.common.json_files import write_json
from electra_ds.config.schema import RunConfig
from electra_ds.data.batch import Batch, make_batch
from electra_ds.data.masking import masking_recipe
from electra_ds.data.shard_format import read_manifest
from electra_ds.data.shard_reader import ShardReader
from electra_ds.model.kernels.linear import product
from electra_ds.training.engine import keep_freed_memory
from electra_ds.training.precision import cpu_multiplies_bf16

PACKED_TOKENS = 2048  # of a micro-batch with --data

Times = dict[str, list[tuple[float, float]]]  # contender -> (CPU, wall) seconds of each round


@dataclass(frozen=True)
class Case:
    """One comparison. goals: contender -> (floor, target, stretch) of the CPU-time ratio."""

    size: str
    length: int
    rows: int
    bf16: bool
    dropout: float
    goals: dict[str, tuple[float, ...]]
    documents: int = 1  # of each row

    def config(self) -> RunConfig:
        return run_config(self.size, self.length, self.rows, self.dropout)


HF_SMALL_BF16 = (1.8, 2.2, 2.5)
WRAPPER_SMALL_BF16 = (2.8, 3.3, 3.7)
TUNED_SMALL_BF16 = (1.5, 1.8, 2.0)
MODERN = {"HF": (1.5, 1.8), "tuned HF": (1.5, 1.8)}
MODERN_PACKED = {"HF": (1.5, 2.0), "tuned HF": (1.5, 2.0)}
DEBERTA = {"HF": (1.5, 1.8), "tuned HF": (1.5, 1.8)}
CASES = {
    "small-bf16": Case(
        "small",
        128,
        16,
        True,
        0.0,
        {"HF": HF_SMALL_BF16, "wrapper": WRAPPER_SMALL_BF16, "tuned HF": TUNED_SMALL_BF16},
    ),
    "small-fp32": Case(
        "small", 128, 16, False, 0.0, {"HF": (1.5, 1.75, 1.9), "wrapper": (1.9, 2.2, 2.5)}
    ),
    "small-bf16-64": Case(
        "small", 128, 64, True, 0.0, {"HF": HF_SMALL_BF16, "wrapper": WRAPPER_SMALL_BF16}
    ),
    "small-fp32-64": Case("small", 128, 64, False, 0.0, {}),
    "small-bf16-dropout": Case("small", 128, 16, True, 0.1, {"HF": (1.7, 2.0, 2.2)}),
    "small-bf16-512": Case("small", 512, 4, True, 0.0, {"HF": (1.5, 1.8)}),
    "small-fp32-512": Case("small", 512, 4, False, 0.0, {"HF": (1.2, 1.4)}),
    "base-bf16": Case("base", 128, 4, True, 0.0, {"HF": (1.3, 1.45)}),
    "base-fp32": Case("base", 128, 4, False, 0.0, {"HF": (1.15, 1.28)}),
    "modern-bf16": Case("modern-small", 128, 16, True, 0.0, MODERN),
    "modern-fp32": Case("modern-small", 128, 16, False, 0.0, MODERN),
    "modern-bf16-1024": Case("modern-small", 1024, 2, True, 0.0, MODERN_PACKED, documents=3),
    "modern-fp32-1024": Case("modern-small", 1024, 2, False, 0.0, MODERN_PACKED, documents=3),
    "deberta-bf16": Case("deberta-v3-small", 128, 16, True, 0.0, DEBERTA),
    "deberta-fp32": Case("deberta-v3-small", 128, 16, False, 0.0, DEBERTA),
}
# Goals for the share of the FLOP rate of one large matrix product.
CEILING_GOALS = {"small-bf16-64": (0.55, 0.65, 0.75), "small-fp32-64": (0.60, 0.70)}


# ---------------------------------------------------------------------------------- full rows


def measure(case: Case, rounds: int) -> tuple[Times, float]:
    """The times of each contender, and the FLOP per CPU second of a large matrix product."""
    contenders = make_contenders(case.config(), list(case.goals), case.documents)
    times: Times = {name: [] for name in contenders}
    ceiling = 0.0
    for turn in range(rounds + 1):
        batch = random_batch(case.rows, case.length, case.documents)
        for name in np.roll(list(contenders), turn):  # the first of a round has colder caches
            contender = contenders[name]
            times[name].append(measure_seconds(train_step, contender, batch, case.bf16))
        ceiling = max(ceiling, product_rate(case))
    # The first round warms up.
    return {name: seconds[1:] for name, seconds in times.items()}, ceiling


def product_rate(case: Case, size: int = 1536) -> float:
    """FLOP per CPU second of one large matrix product in the precision of the case."""
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    a, b = torch.randn(2, size, size, dtype=dtype)
    return max(2 * size**3 / measure_seconds(product, a, b)[0] for _ in range(3))


def report(name: str, case: Case, times: Times, ceiling: float) -> list[dict]:
    """Print the table rows of a case; returns them as records."""
    packed = f" {case.documents} documents a row" if case.documents > 1 else ""
    shape = f"{name} (S{case.length} B{case.rows}{packed})"
    records = []
    for peer, goals in case.goals.items():
        if peer in times:
            records.append(report_peer(shape, peer, goals, times))
        else:
            print_row(shape, peer, "not installed", "", "", "", "")
    if case.documents == 1:  # step_flops counts rows of one document
        records.append(report_ceiling(shape, name, case, times, ceiling))
    return [{"case": name} | record for record in records]


def report_peer(shape: str, peer: str, goals: tuple[float, ...], times: Times) -> dict:
    """Print the ratio of a contender's times to ours."""
    cpu_ratios, wall_ratios = np.divide(times[peer], times["ours"]).T.tolist()  # [rounds] each
    median, low, high = median_and_range(cpu_ratios)
    wall_ratio = statistics.median(wall_ratios)
    print_row(
        shape,
        peer,
        f"{median:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{wall_ratio:.2f}",
        " / ".join(map(str, goals)),
        best_goal(median, goals),
    )
    return {
        "against": peer,
        "ratio": median,
        "spread": (low, high),
        "wall_ratio": wall_ratio,
        "goals": goals,
    }


def report_ceiling(shape: str, name: str, case: Case, times: Times, ceiling: float) -> dict:
    """Print the share of the FLOP rate of a large matrix product that our step reaches."""
    cpu_seconds = statistics.median(cpu for cpu, _ in times["ours"])
    share = step_flops(case.config()) / cpu_seconds / ceiling
    goals = CEILING_GOALS.get(name, ())
    print_row(
        shape,
        "GEMM ceiling",
        f"{share:.0%}",
        f"{cpu_seconds * 1000:.0f} ms CPU",
        "",
        " / ".join(f"{goal:.0%}" for goal in goals),
        best_goal(share, goals),
    )
    return {
        "against": "GEMM ceiling",
        "ratio": share,
        "ceiling": ceiling,
        "seconds": times["ours"],
    }


def measure_cases(names: list[str], rounds: int) -> list[dict]:
    """Measure and print the named cases."""
    print_heading(
        "case",
        "against",
        "CPU-time ratio, median",
        "spread",
        "wall ratio",
        "floor / target / stretch",
        "reached",
    )
    records = []
    for name in names:
        case = CASES[name]
        if case.bf16 and not cpu_multiplies_bf16():
            reason = "not run: this processor has no bf16 products"
            print_row(name, "", reason, "", "", "", "")
            continue
        records += report(name, case, *measure(case, rounds))
    return records


# -------------------------------------------------------------------------------- packed rows


def measure_packed(data: str, rounds: int) -> list[dict]:
    """Measure and print the time of a step on packed rows.

    It is divided by the time on the same rows taken as one document each.
    """
    print_heading(
        "packed rows",
        "of one document",
        "documents per row",
        "CPU time, packed / as one document",
        "spread",
    )
    precisions = (True, False) if cpu_multiplies_bf16() else (False,)
    return [measure_packed_precision(data, rounds, bf16) for bf16 in precisions]


def measure_packed_precision(data: str, rounds: int, bf16: bool) -> dict:
    """One row of the table of packed rows."""
    reader = ShardReader(data, "train")
    length = reader.sequence_length
    rows = PACKED_TOKENS // length
    config = run_config("small", length, rows, 0.0)
    recipe = masking_recipe(read_manifest(data), config.objective, 0)
    ours = Ours(config)
    generator = np.random.default_rng(0)
    ratios: list[float] = []
    documents: list[int] = []  # of each row
    for turn in range(rounds + 1):
        numbers = generator.choice(reader.rows, rows, replace=False)
        packed = make_batch(reader.read(numbers), numbers, 0, recipe)
        ratios.append(packed_ratio(ours, packed, bf16, turn))
        documents += packed.document_ids.amax(1).tolist()
    median, low, high = median_and_range(ratios[1:])  # the first round warms up
    one_document = statistics.mean(count == 1 for count in documents)
    mean_documents = statistics.mean(documents)
    print_row(
        f"S{length} B{rows} {'bf16' if bf16 else 'fp32'}",
        f"{one_document:.0%}",
        f"{mean_documents:.2f}",
        f"{median:.3f}",
        f"{low:.3f}-{high:.3f}",
    )
    return {
        "length": length,
        "rows": rows,
        "bf16": bf16,
        "rows_of_one_piece": one_document,
        "pieces": mean_documents,
        "ratio": median,
        "spread": (low, high),
    }


def packed_ratio(ours: Ours, packed: Batch, bf16: bool, turn: int) -> float:
    """CPU time of a step on packed rows over that on the same rows as one document each."""
    joined = packed._replace(document_ids=torch.ones_like(packed.document_ids))
    batches = {"packed": packed, "joined": joined}
    cpu_seconds = {}
    for name in np.roll(list(batches), turn):
        batch = batches[name]
        cpu_seconds[name], _ = measure_seconds(train_step, ours, batch, bf16)
    return cpu_seconds["packed"] / cpu_seconds["joined"]


# ---------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of cases (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds per case")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="glibc keeps freed memory, so that no contender pays for page faults",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument(
        "--data",
        metavar="D",
        help="a data folder with BERT's vocabulary: measure the cost of its packed rows",
    )
    options = parser.parse_args()
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"no case {sorted(unknown)[0]!r}; there are {', '.join(CASES)}")
    return options


def main() -> None:
    options = parse_arguments()
    if options.list:
        print("\n".join(CASES))
        return
    if options.keep_memory:
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.data:
        records = measure_packed(options.data, options.rounds)
    else:
        records = measure_cases(options.cases or list(CASES), options.rounds)
    if options.json:
        write_json(options.json, records)


if __name__ == "__main__":
    run_main(main)
