"""How fast is the bare training step beside Hugging Face's classes and the electra-pytorch wrapper?

    python bench/step.py                      every case, 5 paired rounds each
    python bench/step.py --list               the names of the cases
    python bench/step.py small-bf16 --rounds 9 --threads 2
    python bench/step.py --data D             instead: what the boundaries of packed pieces cost on the rows of D

Forward, backward, clipping and AdamW on random full rows. All contenders sit in one process and take turns, so that a
busy machine slows them alike; what counts is the ratio of CPU time, the median over the rounds. Before any timing
the contenders get our weights, rows, masks and samples, and must give our losses.

Who the contenders are: bench/peers.py.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peers import Ours, contenders_of, keep_memory, multiplies_bf16, random_batch, run_config, seconds, step

from electra_ds.batches import make_batch, recipe_for
from electra_ds.cost import step_flops
from electra_ds.ops.linear import product
from electra_ds.shards import ShardReader, read_manifest

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
        "small", 128, 16, True, 0.0, {"HF": (1.8, 2.2, 2.5), "wrapper": (2.8, 3.3, 3.7), "tuned HF": (1.5, 1.8, 2.0)}
    ),
    "small-fp32": Case("small", 128, 16, False, 0.0, {"HF": (1.5, 1.75, 1.9), "wrapper": (1.9, 2.2, 2.5)}),
    "small-bf16-64": Case("small", 128, 64, True, 0.0, {"HF": (1.8, 2.2, 2.5), "wrapper": (2.8, 3.3, 3.7)}),
    "small-fp32-64": Case("small", 128, 64, False, 0.0, {}),
    "small-bf16-dropout": Case("small", 128, 16, True, 0.1, {"HF": (1.7, 2.0, 2.2)}),
    "small-bf16-512": Case("small", 512, 4, True, 0.0, {"HF": (1.5, 1.8)}),
    "small-fp32-512": Case("small", 512, 4, False, 0.0, {"HF": (1.2, 1.4)}),
    "base-bf16": Case("base", 128, 4, True, 0.0, {"HF": (1.3, 1.45)}),
    "base-fp32": Case("base", 128, 4, False, 0.0, {"HF": (1.15, 1.28)}),
}
CEILING = {"small-bf16-64": (0.55, 0.65, 0.75), "small-fp32-64": (0.60, 0.70)}
MARKS = ("floor", "target", "stretch")


def config_of(case: Case):
    return run_config(case.size, case.length, case.rows, case.dropout)


def measure(case: Case, rounds: int) -> tuple[dict[str, list], float]:
    """Per contender the (CPU, wall) seconds of each round, and the GEMM ceiling in FLOP per CPU second."""
    contenders = contenders_of(config_of(case), list(case.goals))
    taken, best = {name: [] for name in contenders}, 0.0
    for _ in range(rounds + 1):
        batch = random_batch(case.rows, case.length)
        for name, contender in contenders.items():
            taken[name].append(seconds(lambda c=contender, b=batch: step(c, b, case.bf16)))
        best = max(best, gemm_rate(case))
    return {name: values[1:] for name, values in taken.items()}, best  # the first round warms up


def gemm_rate(case: Case, size: int = 1536) -> float:
    """FLOP per CPU second of one large matrix product in the case's precision."""
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16 if case.bf16 else torch.float32)
    return max(2 * size**3 / seconds(lambda: product(a, b))[0] for _ in range(3))


def reached(value: float, goals: tuple[float, ...]) -> str:
    """The best mark that value reaches."""
    marks = [mark for mark, goal in zip(MARKS, goals, strict=False) if value >= goal]
    return marks[-1] if marks else "BELOW" if goals else ""


def report(name: str, case: Case, taken: dict[str, list], ceiling: float) -> list[dict]:
    """Print the case's rows of the markdown table, one per contender; the same as records."""
    found, shape = [], f"{name} (S{case.length} B{case.rows})"
    for other, goals in case.goals.items():
        if other not in taken:
            print(f"| {shape} | {other} | not installed | | | | |")
            continue
        pairs = list(zip(taken[other], taken["ours"], strict=True))
        ratios = sorted(theirs[0] / mine[0] for theirs, mine in pairs)
        walls = statistics.median(theirs[1] / mine[1] for theirs, mine in pairs)
        middle, spread = statistics.median(ratios), (ratios[0], ratios[-1])
        mark, aims = reached(middle, goals), " / ".join(map(str, goals))
        print(f"| {shape} | {other} | {middle:.2f} | {spread[0]:.2f}-{spread[1]:.2f} | {walls:.2f} | {aims} | {mark} |")
        found.append({"against": other, "ratio": middle, "spread": spread, "wall_ratio": walls, "goals": goals})
    cpu, goals = statistics.median(c for c, _ in taken["ours"]), CEILING.get(name, ())
    share = step_flops(config_of(case)) / cpu / ceiling
    aims = " / ".join(f"{goal:.0%}" for goal in goals)
    row = f"| {shape} | GEMM ceiling | {share:.0%} | {cpu * 1000:.0f} ms CPU | | {aims} | {reached(share, goals)} |"
    print(row, flush=True)
    found.append({"against": "GEMM ceiling", "ratio": share, "ceiling": ceiling, "seconds": taken["ours"]})
    return [{"case": name} | record for record in found]


def boundaries(data: str, rounds: int) -> list[dict]:
    """Print and return what the boundaries cost: a step on packed rows against one on the same rows as one piece."""
    manifest, reader = read_manifest(data), ShardReader(data, "train")
    rows = TOKENS // reader.sequence_length
    config = run_config("small", reader.sequence_length, rows, 0.0)
    ours, recipe, draw = Ours(config), recipe_for(manifest, config.objective, 0), np.random.default_rng(0)
    found = []
    for bf16 in (True, False) if multiplies_bf16() else (False,):
        ratios, pieces = [], []
        for _ in range(rounds + 1):
            numbers = draw.choice(reader.rows, rows, replace=False)
            packed = make_batch(reader.read(numbers), numbers, 0, recipe)
            whole = packed._replace(piece_ids=torch.ones_like(packed.piece_ids))
            times = [seconds(lambda b=batch, half=bf16: step(ours, b, half))[0] for batch in (packed, whole)]
            ratios.append(times[0] / times[1])
            pieces += packed.piece_ids.amax(1).tolist()
        ratios, one = sorted(ratios[1:]), statistics.mean(n == 1 for n in pieces)
        record = {"length": reader.sequence_length, "rows": rows, "bf16": bf16, "rows_of_one_piece": one}
        record |= {
            "pieces": statistics.mean(pieces),
            "ratio": statistics.median(ratios),
            "spread": (ratios[0], ratios[-1]),
        }
        shape, spread = f"S{record['length']} B{rows} {'bf16' if bf16 else 'fp32'}", f"{ratios[0]:.3f}-{ratios[-1]:.3f}"
        print(f"| {shape} | {one:.0%} | {record['pieces']:.2f} | {record['ratio']:.3f} | {spread} |", flush=True)
        found.append(record)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of cases (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds per case")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument(
        "--keep-memory", action="store_true", help="glibc keeps freed memory: no page faults for anybody"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--data", metavar="D", help="packed rows of a data folder with BERT's vocabulary")
    parser.add_argument("--json", metavar="FILE", help="write the records there as well")
    options = parser.parse_args()
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"no case {sorted(unknown)[0]!r}; there are {', '.join(CASES)}")
    if options.list:
        return print("\n".join(CASES))
    if options.keep_memory:
        keep_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.data:
        print("| packed rows | of one piece | pieces a row | CPU time, packed / as one piece | spread |")
        print("|---|---|---|---|---|")
        records = boundaries(options.data, options.rounds)
    else:
        print("| case | against | CPU-time ratio, median | spread | wall ratio | floor / target / stretch | reached |")
        print("|---|---|---|---|---|---|---|")
        records = []
        for name in options.cases or CASES:
            if CASES[name].bf16 and not multiplies_bf16():
                print(f"| {name} | | this processor has no bf16 products: the fp32 rows decide | | | | |")
                continue
            records += report(name, CASES[name], *measure(CASES[name], options.rounds))
    if options.json:
        Path(options.json).write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
