"""How fast is the bare training step beside Hugging Face's classes and the electra-pytorch wrapper?

    python bench/step.py                      every case, 5 paired rounds each
    python bench/step.py --list               the names of the cases
    python bench/step.py small-bf16 --rounds 9 --threads 2
    python bench/step.py --data D             instead: what the boundaries of packed pieces cost on the rows of D

Forward, backward, clipping and AdamW on random full rows. All contenders sit in one process and take turns, another one
first in each round, so that a busy machine slows them alike; what counts is the ratio of CPU time, the median over the
rounds. Before any timing the contenders get our weights, rows, masks and samples, and must give our losses.

Who the contenders are: bench/peers.py.
"""

import statistics
from dataclasses import dataclass

import numpy as np
import torch
from cost import step_flops
from peers import Ours, contenders_of, random_batch, run_config, seconds, step
from report import bench, heading, parser_of, reached, row, spread

from electra_ds.common.files import write_json
from electra_ds.data.batch import make_batch
from electra_ds.data.masking import masking_recipe
from electra_ds.data.shard_format import read_manifest
from electra_ds.data.shard_reader import ShardReader
from electra_ds.model.kernels.linear import product
from electra_ds.training.engine import keep_freed_memory
from electra_ds.training.precision import cpu_multiplies_bf16

TOKENS = 2048  # a micro-batch of packed rows


@dataclass(frozen=True)
class Case:
    """One row of the table: sizes, precision, and (floor, target, stretch) of our advantage over each contender."""

    size: str
    length: int
    rows: int
    bf16: bool
    dropout: float
    goals: dict[str, tuple[float, ...]]


CASES = {
    "small-bf16": Case(
        "small",
        128,
        16,
        True,
        0.0,
        {"HF": (1.8, 2.2, 2.5), "wrapper": (2.8, 3.3, 3.7), "tuned HF": (1.5, 1.8, 2.0)},
    ),
    "small-fp32": Case(
        "small", 128, 16, False, 0.0, {"HF": (1.5, 1.75, 1.9), "wrapper": (1.9, 2.2, 2.5)}
    ),
    "small-bf16-64": Case(
        "small", 128, 64, True, 0.0, {"HF": (1.8, 2.2, 2.5), "wrapper": (2.8, 3.3, 3.7)}
    ),
    "small-fp32-64": Case("small", 128, 64, False, 0.0, {}),
    "small-bf16-dropout": Case("small", 128, 16, True, 0.1, {"HF": (1.7, 2.0, 2.2)}),
    "small-bf16-512": Case("small", 512, 4, True, 0.0, {"HF": (1.5, 1.8)}),
    "small-fp32-512": Case("small", 512, 4, False, 0.0, {"HF": (1.2, 1.4)}),
    "base-bf16": Case("base", 128, 4, True, 0.0, {"HF": (1.3, 1.45)}),
    "base-fp32": Case("base", 128, 4, False, 0.0, {"HF": (1.15, 1.28)}),
}
CEILING = {"small-bf16-64": (0.55, 0.65, 0.75), "small-fp32-64": (0.60, 0.70)}


def config_of(case: Case):
    return run_config(case.size, case.length, case.rows, case.dropout)


def measure(case: Case, rounds: int) -> tuple[dict[str, list], float]:
    """Per contender the (CPU, wall) seconds of each round, and the GEMM ceiling in FLOP per CPU second."""
    contenders = contenders_of(config_of(case), list(case.goals))
    taken, best = {name: [] for name in contenders}, 0.0
    for turn in range(rounds + 1):
        batch = random_batch(case.rows, case.length)
        for name in np.roll(list(contenders), turn):  # the first of a round finds colder caches
            taken[name].append(seconds(lambda c=contenders[name], b=batch: step(c, b, case.bf16)))
        best = max(best, gemm_rate(case))
    return {name: values[1:] for name, values in taken.items()}, best  # the first round warms up


def gemm_rate(case: Case, size: int = 1536) -> float:
    """FLOP per CPU second of one large matrix product in the case's precision."""
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16 if case.bf16 else torch.float32)
    return max(2 * size**3 / seconds(lambda: product(a, b))[0] for _ in range(3))


def report(name: str, case: Case, taken: dict[str, list], ceiling: float) -> list[dict]:
    """Print the case's rows of the markdown table, one per contender; the same as records."""
    found, shape = [], f"{name} (S{case.length} B{case.rows})"
    for other, goals in case.goals.items():
        if other not in taken:
            row(shape, other, "not installed", "", "", "", "")
            continue
        cpu, wall = np.divide(taken[other], taken["ours"]).T.tolist()  # [rounds] each
        (middle, low, high), walls, aims = (
            spread(cpu),
            statistics.median(wall),
            " / ".join(map(str, goals)),
        )
        row(
            shape,
            other,
            f"{middle:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{walls:.2f}",
            aims,
            reached(middle, goals),
        )
        found.append(
            {
                "against": other,
                "ratio": middle,
                "spread": (low, high),
                "wall_ratio": walls,
                "goals": goals,
            }
        )
    cpu, goals = statistics.median(c for c, _ in taken["ours"]), CEILING.get(name, ())
    share, aims = (
        step_flops(config_of(case)) / cpu / ceiling,
        " / ".join(f"{goal:.0%}" for goal in goals),
    )
    row(
        shape,
        "GEMM ceiling",
        f"{share:.0%}",
        f"{cpu * 1000:.0f} ms CPU",
        "",
        aims,
        reached(share, goals),
    )
    found.append(
        {"against": "GEMM ceiling", "ratio": share, "ceiling": ceiling, "seconds": taken["ours"]}
    )
    return [{"case": name} | record for record in found]


def boundaries(data: str, rounds: int) -> list[dict]:
    """Print and return what the boundaries cost: a step on packed rows against one on the same rows as one piece."""
    manifest, reader = read_manifest(data), ShardReader(data, "train")
    rows = TOKENS // reader.sequence_length
    config = run_config("small", reader.sequence_length, rows, 0.0)
    ours, recipe, draw = (
        Ours(config),
        masking_recipe(manifest, config.objective, 0),
        np.random.default_rng(0),
    )
    found = []
    for bf16 in (True, False) if cpu_multiplies_bf16() else (False,):
        ratios, pieces = [], []
        for turn in range(rounds + 1):
            numbers = draw.choice(reader.rows, rows, replace=False)
            packed = make_batch(reader.read(numbers), numbers, 0, recipe)
            both = packed, packed._replace(document_ids=torch.ones_like(packed.document_ids))
            taken = {
                i: seconds(lambda b=both[i], half=bf16: step(ours, b, half))[0]
                for i in np.roll((0, 1), turn)
            }
            ratios.append(taken[0] / taken[1])
            pieces += packed.document_ids.amax(1).tolist()
        middle, low, high = spread(ratios[1:])
        one, mean = statistics.mean(n == 1 for n in pieces), statistics.mean(pieces)
        shape = f"S{reader.sequence_length} B{rows} {'bf16' if bf16 else 'fp32'}"
        row(shape, f"{one:.0%}", f"{mean:.2f}", f"{middle:.3f}", f"{low:.3f}-{high:.3f}")
        record = {
            "length": reader.sequence_length,
            "rows": rows,
            "bf16": bf16,
            "rows_of_one_piece": one,
        }
        found.append(record | {"pieces": mean, "ratio": middle, "spread": (low, high)})
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of cases (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds per case")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="glibc keeps freed memory: no page faults for anybody",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument(
        "--data", metavar="D", help="packed rows of a data folder with BERT's vocabulary"
    )
    options = parser.parse_args()
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"no case {sorted(unknown)[0]!r}; there are {', '.join(CASES)}")
    if options.list:
        return print("\n".join(CASES))
    if options.keep_memory:
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.data:
        heading(
            "packed rows",
            "of one piece",
            "pieces a row",
            "CPU time, packed / as one piece",
            "spread",
        )
        records = boundaries(options.data, options.rounds)
    else:
        heading(
            "case",
            "against",
            "CPU-time ratio, median",
            "spread",
            "wall ratio",
            "floor / target / stretch",
            "reached",
        )
        records = []
        for name in options.cases or CASES:
            if CASES[name].bf16 and not cpu_multiplies_bf16():
                row(
                    name,
                    "",
                    "this processor has no bf16 products: the fp32 rows decide",
                    "",
                    "",
                    "",
                    "",
                )
                continue
            records += report(name, CASES[name], *measure(CASES[name], options.rounds))
    if options.json:
        write_json(options.json, records)


if __name__ == "__main__":
    bench(main)
