"""How fast is the bare training step beside Hugging Face's classes and the electra-pytorch wrapper?

    python bench/step.py                      every case, 5 paired rounds each
    python bench/step.py --list               the names of the cases
    python bench/step.py small-bf16 --rounds 9 --threads 2

Forward, backward, clipping and AdamW on random full rows. All contenders sit in one process and take turns, so that a
busy machine slows them alike; what counts is the ratio of CPU time, the median over the rounds. Before any timing
the contenders get our weights, rows, masks and samples, and must give our losses.

Who the contenders are: bench/peers.py.
"""

import argparse
import statistics
from dataclasses import dataclass

import torch
from peers import contenders_of, keep_memory, multiplies_bf16, random_batch, run_config, seconds, step

from electra_ds.cost import step_flops
from electra_ds.ops.linear import product


@dataclass(frozen=True)
class Case:
    """One row of the table: sizes, precision, and (floor, target) of our advantage over each contender."""

    size: str
    length: int
    rows: int
    bf16: bool
    dropout: float
    goals: dict[str, tuple[float, float]]


CASES = {
    "small-bf16": Case("small", 128, 16, True, 0.0, {"HF": (1.8, 2.2), "wrapper": (2.8, 3.3), "tuned HF": (1.5, 1.8)}),
    "small-fp32": Case("small", 128, 16, False, 0.0, {"HF": (1.5, 1.75), "wrapper": (1.9, 2.2)}),
    "small-bf16-64": Case("small", 128, 64, True, 0.0, {"HF": (1.8, 2.2), "wrapper": (2.8, 3.3)}),
    "small-bf16-dropout": Case("small", 128, 16, True, 0.1, {"HF": (1.7, 2.0)}),
    "small-bf16-512": Case("small", 512, 4, True, 0.0, {"HF": (1.5, 1.8)}),
    "small-fp32-512": Case("small", 512, 4, False, 0.0, {"HF": (1.2, 1.4)}),
    "base-bf16": Case("base", 128, 4, True, 0.0, {"HF": (1.3, 1.45)}),
    "base-fp32": Case("base", 128, 4, False, 0.0, {"HF": (1.15, 1.28)}),
}
CEILING = {"small-bf16-64": (0.55, 0.65), "small-fp32-64": (0.60, 0.70)}
CASES["small-fp32-64"] = Case("small", 128, 64, False, 0.0, {})


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


def report(name: str, case: Case, taken: dict[str, list], ceiling: float) -> None:
    """The case's rows of the markdown table, one per contender."""
    ours = taken["ours"]
    cpu = statistics.median(c for c, _ in ours)
    shape = f"{name} (S{case.length} B{case.rows})"
    for other, (floor, target) in case.goals.items():
        if other not in taken:
            print(f"| {shape} | {other} | not installed | | | {floor} / {target} | |")
            continue
        ratios = sorted(theirs[0] / mine[0] for theirs, mine in zip(taken[other], ours, strict=True))
        walls = statistics.median(theirs[1] / mine[1] for theirs, mine in zip(taken[other], ours, strict=True))
        middle = statistics.median(ratios)
        verdict = "target" if middle >= target else "floor" if middle >= floor else "BELOW"
        spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
        print(
            f"| {shape} | {other} | {middle:.2f} | {spread} | {walls:.2f} | {floor} / {target} | {verdict} |",
            flush=True,
        )
    share = step_flops(config_of(case)) / cpu / ceiling
    goal = CEILING.get(name)
    verdict = "" if not goal else "target" if share >= goal[1] else "floor" if share >= goal[0] else "BELOW"
    aims = f"{goal[0]:.0%} / {goal[1]:.0%}" if goal else ""
    print(f"| {shape} | GEMM ceiling | {share:.0%} | {cpu * 1000:.0f} ms CPU | | {aims} | {verdict} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of cases (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds per case")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument(
        "--keep-memory", action="store_true", help="glibc keeps freed memory: no page faults for anybody"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    options = parser.parse_args()
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"no case {sorted(unknown)[0]!r}; there are {', '.join(CASES)}")
    if options.list:
        return print("\n".join(CASES))
    if options.keep_memory:
        keep_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print("| case | against | CPU-time ratio, median | spread | wall ratio | floor / target | reached |")
    print("|---|---|---|---|---|---|---|")
    for name in options.cases or CASES:
        if CASES[name].bf16 and not multiplies_bf16():
            print(f"| {name} | | this processor has no bf16 products: the fp32 rows decide | | | | |")
            continue
        report(name, CASES[name], *measure(CASES[name], options.rounds))


if __name__ == "__main__":
    main()
