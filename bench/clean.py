"""Share of planted duplicates that `prepare` removes, and the cost of each step of cleaning.

    python bench/clean.py --input 'wiki/*' --tokenizer vocab.txt --out B

Prepares the input unchanged, and then with altered copies of its documents, 500 of each kind.

removed: share of the copies that `prepare` leaves out.
lost:    documents of the input that `prepare` leaves out only if the copies are present.
"""

import functools
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from report import make_parser, print_heading, print_row, run_main

from data_tools.formats.documents import documents
from data_tools.formats.source import Tally
from data_tools.inputs.plan import make_plan
from data_tools.pipeline.clean import SHINGLE, clean_lines, signatures, text_hash
from data_tools.prepare import prepare
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer

COPIES = 500  # of each kind
MIN_WORDS = 100  # of a document that is copied
CHANGED_SHARES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)  # of the words
BATCH = 1000  # documents
RANDOM = random.Random(0)


class Copy(NamedTuple):
    """An altered copy of a document."""

    kind: str
    original: str
    text: str


def read_texts(inputs: list[str]) -> list[str]:
    """All documents of the input."""
    plan = make_plan(inputs)
    texts: list[str] = []
    for unit in plan.units:
        for source, start, end in unit:
            texts += documents(
                plan.sources[source],
                start,
                end,
                text_field="text",
                tally=Tally(),
                on_progress=lambda done: None,
            )
    return texts


def prepared_documents(texts: list[str], tokenizer: Path, out: Path) -> set[int]:
    """Prepare texts; returns the indices of those that remain."""
    source = out.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    # With a single unit the number of a document is its index.
    manifest = prepare([str(source)], tokenizer, out, unit_bytes=1 << 40, near_duplicates=0.8)
    print(f"{len(texts):,} documents, removed: {manifest.removed}")
    remaining: set[int] = set()
    for split in manifest.splits:
        reader = ShardReader(out, split)
        for block in range(len(reader.blocks)):
            document_column = reader.fragments(block)[:, 4]
            remaining.update(document_column.tolist())
    return remaining


# -------------------------------------------------------------------------------- planted copies


def change_words(text: str, share: float, words: list[str]) -> str:
    """The text with a share of its words replaced by random ones."""
    parts = re.split(r"(\s+)", text)  # words at even indices
    count = round(share * (len(parts) + 1) / 2)
    for i in RANDOM.sample(range(0, len(parts), 2), count):
        parts[i] = RANDOM.choice(words)
    return "".join(parts)


def change_case(text: str) -> str:
    """The text in upper case, with other white space."""
    return text.upper().replace(" ", "  ").replace("\n", " \n\n")


def make_copies(texts: list[str], remaining: set[int]) -> list[Copy]:
    """COPIES copies of each kind, of long documents that remain."""
    candidates = [i for i in sorted(remaining) if len(texts[i].split()) >= MIN_WORDS]
    words = " ".join(texts[i] for i in candidates[:BATCH]).split()
    alterations: dict[str, Callable[[str], str]] = {"case and white space changed": change_case}
    for share in CHANGED_SHARES:
        kind = f"{share:.1%} of the words changed"
        alterations[kind] = functools.partial(change_words, share=share, words=words)
    return [
        Copy(kind, texts[i], alter(texts[i]))
        for kind, alter in alterations.items()
        for i in RANDOM.sample(candidates, COPIES)
    ]


def shingles(text: str) -> set[tuple[str, ...]]:
    """The runs of SHINGLE words, those at the end shorter."""
    words = text.lower().split()
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words))}


def jaccard(text: str, other: str) -> float:
    """Exact Jaccard similarity of the shingles of two texts."""
    a = shingles(text)
    b = shingles(other)
    return len(a & b) / len(a | b)


def report_copies(copies: list[Copy], is_removed: list[bool]) -> None:
    """Print the similarity and the removed share of each kind."""
    print_heading("planted", "similarity, median", "removed")
    removed = np.array(is_removed)
    kinds = np.array([copy.kind for copy in copies])
    for kind in dict.fromkeys(kinds.tolist()):
        similarities = [jaccard(copy.original, copy.text) for copy in copies if copy.kind == kind]
        print_row(kind, f"{np.median(similarities):.3f}", f"{removed[kinds == kind].mean():.1%}")


# ----------------------------------------------------------------------------- cost of the steps


def time_steps(texts: list[str], tokenizer: Tokenizer) -> dict[str, float]:
    """CPU seconds that each step of cleaning needs for all texts."""
    seconds: dict[str, float] = {}

    def timed(step: str, function: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = function()
        seconds[step] = time.process_time() - began
        return result

    lines = timed(
        "lines, NFC, control characters", lambda: [clean_lines(text)[0] for text in texts]
    )
    timed("repeated lines", lambda: [list(dict.fromkeys(document)) for document in lines])
    timed("hash for exact duplicates", lambda: [text_hash(document) for document in lines])
    starts = range(0, len(lines), BATCH)
    encoded = timed(
        "tokenizing",
        lambda: [
            tokenizer.encode_flat([" ".join(document) for document in lines[start : start + BATCH]])
            for start in starts
        ],
    )
    timed(
        "signatures",
        lambda: [signatures(np.split(ids, np.cumsum(sizes)[:-1])) for ids, sizes in encoded],
    )
    return seconds


def main() -> None:
    parser = make_parser(__doc__, has_json=False)
    parser.add_argument(
        "--input", action="append", required=True, help="text, as `prepare` takes it; repeatable"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="vocabulary")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    texts = read_texts(options.input)
    plain = prepared_documents(texts, options.tokenizer, options.out / "plain")
    copies = make_copies(texts, plain)
    planted = prepared_documents(
        [*texts, *(copy.text for copy in copies)], options.tokenizer, options.out / "planted"
    )
    print(f"lost: {len(plain - planted)} of {len(plain):,}\n")
    is_removed = [len(texts) + i not in planted for i in range(len(copies))]
    report_copies(copies, is_removed)
    seconds = time_steps(texts, load_tokenizer(options.tokenizer))
    megabytes = sum(map(len, texts)) / 1e6
    print()
    print_heading("step", "CPU-seconds per MB")
    for step, step_seconds in seconds.items():
        print_row(step, f"{step_seconds / megabytes:.4f}")


if __name__ == "__main__":
    run_main(main)
