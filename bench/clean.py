"""What does cleaning find of what is planted, what does it take out beside, and what does each step cost?

    python bench/clean.py --input 'wiki/*' --tokenizer vocab.txt --out B

Prepares the input as it is, and with copies of 500 of its documents per kind behind it. gone: the share of those that
`prepare` left out. beside: documents of the input that are gone only where the copies are.
"""

import argparse
import json
import random
import re
import time
from pathlib import Path

import numpy as np

from data_tools.formats.documents import documents
from data_tools.formats.source import Tally
from data_tools.inputs.plan import make_plan
from data_tools.pipeline.clean import SHINGLE, clean_lines, signatures, text_hash
from data_tools.prepare import prepare
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.tokenizer import load_tokenizer

PLANTED = 500  # documents of each kind
SHARES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)  # of the words changed
BATCH = 1000  # documents
RNG = random.Random(0)


def remaining(texts: list[str], tokenizer: Path, out: Path) -> set[int]:
    """Numbers of the texts that `prepare` leaves: one unit, so that a document's number is the text's."""
    out.with_suffix(".jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    manifest = prepare(
        [str(out.with_suffix(".jsonl"))], tokenizer, out, unit_bytes=1 << 40, near_duplicates=0.8
    )
    print(f"{len(texts):,} documents, removed: {manifest.removed}")
    readers = [ShardReader(out, split) for split in manifest.splits]
    return {
        i
        for reader in readers
        for b in range(len(reader.blocks))
        for i in reader.fragments(b)[:, 4].tolist()
    }


def changed(text: str, share: float, words: list[str]) -> str:
    """The text with a share of its words replaced."""
    parts = re.split(r"(\s+)", text)  # words at even places
    for i in RNG.sample(range(0, len(parts), 2), round(share * (len(parts) + 1) / 2)):
        parts[i] = RNG.choice(words)
    return "".join(parts)


def similarity(*texts: str) -> float:
    """Exact Jaccard similarity of the sets of shingles of words."""
    a, b = (
        {tuple(words[i : i + SHINGLE]) for i in range(len(words))}
        for words in (t.lower().split() for t in texts)
    )
    return len(a & b) / len(a | b)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--input", action="append", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    plan, reading = (
        make_plan(options.input),
        dict(text_field="text", tally=Tally(), on_progress=lambda done: None),
    )
    texts = [
        text
        for unit in plan.units
        for i, *ends in unit
        for text in documents(plan.sources[i], *ends, **reading)
    ]
    before = remaining(texts, options.tokenizer, options.out / "plain")
    chosen = [i for i in sorted(before) if len(texts[i].split()) >= 100]
    words = " ".join(texts[i] for i in chosen[:BATCH]).split()
    kinds = {
        "case and white space changed": lambda text: (
            text.upper().replace(" ", "  ").replace("\n", " \n\n")
        )
    }
    kinds |= {
        f"{share:.1%} of the words changed": lambda text, s=share: changed(text, s, words)
        for share in SHARES
    }
    planted = [
        (kind, texts[i], make(texts[i]))
        for kind, make in kinds.items()
        for i in RNG.sample(chosen, PLANTED)
    ]
    left = remaining(
        [*texts, *(copy for _, _, copy in planted)], options.tokenizer, options.out / "planted"
    )
    print(
        f"beside: {len(before - left)} of {len(before):,}\n\n| planted | similarity, median | gone |\n|---|---|---|"
    )
    for kind in kinds:
        own = [
            (similarity(a, b), len(texts) + i not in left)
            for i, (k, a, b) in enumerate(planted)
            if k == kind
        ]
        alike, gone = np.array(own).T
        print(f"| {kind} | {np.median(alike):.3f} | {np.mean(gone):.1%} |")
    tokenizer, size, lines, ids = (
        load_tokenizer(options.tokenizer),
        sum(map(len, texts)) / 1e6,
        [],
        [],
    )
    joined = (list(map(" ".join, lines[i : i + BATCH])) for i in range(0, len(texts), BATCH))
    steps = {
        "lines, NFC, control characters": lambda: lines.extend(
            clean_lines(text)[0] for text in texts
        ),
        "repeated lines": lambda: [list(dict.fromkeys(own)) for own in lines],
        "hash for exact duplicates": lambda: [text_hash(own) for own in lines],
        "tokenizing": lambda: ids.extend(map(tokenizer.encode_flat, joined)),
        "signatures": lambda: [
            signatures(np.split(flat, np.cumsum(lengths)[:-1])) for flat, lengths in ids
        ],
    }
    print("\n| step | CPU-seconds per MB |\n|---|---|")
    for step, work in steps.items():
        start = time.process_time()
        work()
        print(f"| {step} | {(time.process_time() - start) / size:.4f} |")


if __name__ == "__main__":
    main()
