"""How fast is the bare training step beside Hugging Face's classes and the electra-pytorch wrapper?

    python bench/step.py                      every case, 5 paired rounds each
    python bench/step.py --list               the names of the cases
    python bench/step.py small-bf16 --rounds 9 --threads 2

Forward, backward, clipping and AdamW on random full rows. All contenders sit in one process and take turns, so that a
busy machine slows them alike; what counts is the ratio of CPU time, the median over the rounds. Before any timing
the contenders get our weights, rows, masks and samples, and must give our losses.

"HF": ElectraForMaskedLM and ElectraForPreTraining with one embedding module, logits for every position, Gumbel noise.
"tuned HF": the same with eager attention, compiled layers and fused AdamW. "wrapper": the electra-pytorch package
around those classes (`pip install --no-deps electra-pytorch`: its own requirements ask for transformers 3).

Letters: B rows, S sequence, K chosen places.
"""

import argparse
import ctypes
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from electra_ds.config import GeneratorConfig, ModelConfig, ObjectiveConfig, SpecialIds
from electra_ds.interop.hf import hf_config, to_hf
from electra_ds.model import true_state
from electra_ds.objective import ElectraObjective, mask_input
from electra_ds.ops.linear import product
from electra_ds.values import Batch

try:
    from electra_pytorch import electra_pytorch as wrapper
except ImportError:
    wrapper = None

IDS = SpecialIds(pad=0, unk=100, cls=101, sep=102, mask=103)
VOCAB = 30522
SIZES = {  # num_layers, hidden_size, num_heads, ffn_size, embedding_size; generator hidden_size, num_heads, ffn_size
    "small": ((12, 256, 4, 1024, 128), (64, 1, 256)),
    "base": ((12, 768, 12, 3072, 768), (256, 4, 1024)),
}


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


# ------------------------------------------------------------------------------------------------------- contenders


class Ours:
    def __init__(self, case: Case):
        (layers, hidden, heads, ffn, width), (g_hidden, g_heads, g_ffn) = SIZES[case.size]
        drop = {"hidden_dropout": case.dropout, "attention_dropout": case.dropout, "num_layers": layers}
        self.model = ModelConfig(
            hidden_size=hidden, num_heads=heads, ffn_size=ffn, embedding_size=width, vocab_size=VOCAB, **drop
        )
        self.generator = GeneratorConfig(hidden_size=g_hidden, num_heads=g_heads, ffn_size=g_ffn, **drop)
        self.module = ElectraObjective(self.model, self.generator, ObjectiveConfig(), IDS, seed=0)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, eps=1e-6, fused=True)

    def loss(self, batch: Batch) -> Tensor:
        return self.module(batch, batch.chosen.numel(), batch.input_ids.numel()).total


class HuggingFace:
    """The stock classes joined: one embedding module, the whole vocabulary at every position, Gumbel sampling."""

    def __init__(self, ours: Ours, tuned: bool = False):
        parts = {}
        for part, kind in (
            ("generator", transformers.ElectraForMaskedLM),
            ("discriminator", transformers.ElectraForPreTraining),
        ):
            config = transformers.ElectraConfig(**hf_config(ours.model, ours.generator, part, IDS.pad))
            config._attn_implementation = "eager" if tuned else "sdpa"
            parts[part] = kind(config)
            parts[part].load_state_dict(to_hf(true_state(ours.module), part), strict=False)
        parts["discriminator"].electra.embeddings = parts["generator"].electra.embeddings
        for layer in (layer for part in parts.values() for layer in part.electra.encoder.layer if tuned):
            layer.compile()
        self.module = torch.nn.ModuleDict(parts)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, eps=1e-6, fused=tuned or None)

    def loss(self, batch: Batch, samples: Tensor | None = None) -> Tensor:
        ids, real = batch.input_ids, batch.piece_ids
        mask = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, batch.chosen, True)
        masked = mask_input(batch, IDS.mask)
        logits = self.module["generator"](masked, attention_mask=real, token_type_ids=batch.segment_ids).logits
        at_chosen = logits[mask]  # [B*K, V]
        with torch.no_grad():
            noise = -torch.empty_like(at_chosen, dtype=torch.float32).exponential_().log()
            drawn = (at_chosen.float() + noise).argmax(-1) if samples is None else samples.flatten()
            corrupted = ids.clone()
            corrupted[mask] = drawn
        guess = self.module["discriminator"](corrupted, attention_mask=real, token_type_ids=batch.segment_ids).logits
        mlm_loss = F.cross_entropy(at_chosen.float(), ids[mask])
        label = (corrupted != ids).float()
        return mlm_loss + 50 * F.binary_cross_entropy_with_logits(guess.float()[real > 0], label[real > 0])


class Logits(torch.nn.Module):
    """What the wrapper's documentation puts around a stock class: its logits alone."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *arguments, **keywords) -> Tensor:
        return self.module(*arguments, **keywords).logits


class Wrapper:
    """electra-pytorch around the same classes; it chooses the places by itself."""

    def __init__(self, ours: Ours):
        parts = HuggingFace(ours).module
        self.module = wrapper.Electra(
            Logits(parts["generator"]),
            Logits(parts["discriminator"]),
            num_tokens=VOCAB,
            mask_token_id=IDS.mask,
            pad_token_id=IDS.pad,
            mask_ignore_token_ids=[IDS.cls, IDS.sep],
        )
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, eps=1e-6)

    def loss(self, batch: Batch, samples: Tensor | None = None) -> Tensor:
        if samples is None:
            return self.module(batch.input_ids, attention_mask=batch.piece_ids).loss
        chosen = torch.zeros_like(batch.input_ids, dtype=torch.bool).scatter_(1, batch.chosen, True)
        becomes_mask = torch.zeros_like(chosen).scatter_(1, batch.chosen, ~batch.keep)
        given = {
            "get_mask_subset_with_prob": lambda *_: chosen,
            "prob_mask_like": lambda *_: becomes_mask,
            "gumbel_sample": lambda *_, **__: samples.flatten(),
        }
        own = {name: getattr(wrapper, name) for name in given}
        try:
            vars(wrapper).update(given)
            return self.loss(batch)
        finally:
            vars(wrapper).update(own)


# ------------------------------------------------------------------------------------------------------- measuring


def random_batch(case: Case) -> Batch:
    """Full rows of random ids; the chosen places in rising order, as the other contenders walk through them."""
    rows, length = case.rows, case.length
    chosen = int((0.15 + 0.005) * length)
    ids = torch.randint(1000, VOCAB, (rows, length))
    ids[:, 0], ids[:, -1] = IDS.cls, IDS.sep
    zeros = torch.zeros(rows, length, dtype=torch.long)
    places = (torch.rand(rows, length - 2).argsort(1)[:, :chosen] + 1).sort(1).values
    coins = torch.rand(rows, chosen) >= 0.85
    full = torch.arange(length).expand(rows, -1)
    return Batch(ids, zeros, zeros + 1, full, places, torch.ones(rows, chosen), coins, torch.rand(rows, chosen))


def precision(case: Case):
    return torch.autocast("cpu", torch.bfloat16) if case.bf16 else nullcontext()


def step(contender, batch: Batch, case: Case) -> None:
    with precision(case):
        loss = contender.loss(batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(contender.module.parameters(), 1.0)
    contender.optimizer.step()
    contender.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def check_losses(contenders: dict, case: Case) -> None:
    """Same weights, rows, masks and samples must give the same loss, in fp32 and without dropout."""
    batch = random_batch(case)
    batch = Batch(*(value[:2] for value in batch))
    for contender in contenders.values():
        contender.module.eval()
    samples = contenders["ours"].module.generate(mask_input(batch, IDS.mask), batch).sampled
    ours = float(contenders["ours"].loss(batch))
    for name, contender in contenders.items():
        theirs = ours if name == "ours" else float(contender.loss(batch, samples))
        if abs(theirs / ours - 1) > 1e-5:
            raise SystemExit(f"{name}: loss {theirs} on the same rows, masks and weights, ours is {ours}")
        contender.module.train()


def seconds(work) -> tuple[float, float]:
    """(CPU, wall) seconds of work()."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(case: Case, rounds: int) -> tuple[dict[str, list], float]:
    """Per contender the (CPU, wall) seconds of each round, and the GEMM ceiling in FLOP per CPU second."""
    contenders = {"ours": (ours := Ours(case))}
    makers = {"HF": HuggingFace, "tuned HF": lambda ours: HuggingFace(ours, tuned=True), "wrapper": Wrapper}
    for name in case.goals:
        if name != "wrapper" or wrapper is not None:
            contenders[name] = makers[name](ours)
    check_losses(contenders, case)
    torch.compiler.reset()  # the check's small batch must not make the compiled shapes dynamic
    taken, best = {name: [] for name in contenders}, 0.0
    for _ in range(rounds + 1):
        batch = random_batch(case)
        for name, contender in contenders.items():
            taken[name].append(seconds(lambda c=contender, b=batch: step(c, b, case)))
        best = max(best, gemm_rate(case))
    return {name: values[1:] for name, values in taken.items()}, best  # the first round warms up


def gemm_rate(case: Case, size: int = 1536) -> float:
    """FLOP per CPU second of one large matrix product in the case's precision."""
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16 if case.bf16 else torch.float32)
    return max(2 * size**3 / seconds(lambda: product(a, b))[0] for _ in range(3))


def step_flop(case: Case) -> float:
    """Matrix products of one step, backward counted as twice forward; the vocabulary at the chosen places only."""
    (layers, hidden, _, ffn, width), (g_hidden, _, g_ffn) = SIZES[case.size]
    tokens, chosen = case.rows * case.length, case.rows * int(0.155 * case.length)

    def encoder(h: int, f: int) -> float:
        return layers * (2 * (4 * h * h + 2 * h * f) + 4 * case.length * h) + (2 * width * h if width != h else 0)

    head = 2 * (g_hidden * width + width * VOCAB)
    return 3 * (tokens * (encoder(hidden, ffn) + encoder(g_hidden, g_ffn) + 2 * hidden * hidden) + chosen * head)


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
    share = step_flop(case) / cpu / ceiling
    goal = CEILING.get(name)
    verdict = "" if not goal else "target" if share >= goal[1] else "floor" if share >= goal[0] else "BELOW"
    aims = f"{goal[0]:.0%} / {goal[1]:.0%}" if goal else ""
    print(f"| {shape} | GEMM ceiling | {share:.0%} | {cpu * 1000:.0f} ms CPU | | {aims} | {verdict} |", flush=True)


def keep_memory() -> None:
    """Stop glibc from handing large blocks back to the system, which costs the contenders with large logits most."""
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        ctypes.CDLL("libc.so.6").mallopt(option, ctypes.c_int(2**31 - 1))


def multiplies_bf16() -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.exists() and any(word in flags.read_text() for word in ("avx512_bf16", "amx_bf16"))


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
