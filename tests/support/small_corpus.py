"""A corpus of 300 short documents, and `prepare` on it in small units and shards."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_tools.prepare import prepare
from electra_ds.data.shard_format import Manifest

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
ENTRIES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"n{i}" for i in range(300))]


def text_of(number: int) -> str:
    """A document of 1 to about 120 words in lines of up to 14.

    No other document has its first word."""
    random = np.random.default_rng(number)
    words = [f"n{number}", *random.choice(WORDS, int(random.integers(0, 120)))]
    cuts = [0, *np.cumsum(random.integers(1, 15, len(words)))]
    return "\n".join(" ".join(words[a:b]) for a, b in itertools.pairwise(cuts) if words[a:b])


def write_corpus(folder: Path) -> Path:
    """Write 300 documents (FOLDER/in) and a vocabulary of whole words (FOLDER/tok).

    Half of the documents are a WikiExtractor file, half plain text; 30 occur twice."""
    (folder / "tok").mkdir()
    (folder / "tok" / "vocab.txt").write_text("\n".join(ENTRIES) + "\n")
    (folder / "in").mkdir()
    texts = [text_of(i) for i in range(300)]
    (folder / "in" / "a.wiki").write_text(
        "".join(f'<doc id="{i}">\n{t}\n</doc>\n' for i, t in enumerate(texts[:150]))
    )
    copies = [t.upper().replace("\n", "  \n ") for t in texts[:30]]
    (folder / "in" / "b.txt").write_text("\n\n".join([*texts[150:], *copies]))
    return folder


def prepare_corpus(corpus: Path, out: Path, **options) -> Manifest:
    """Prepare the corpus in small units and shards."""
    settings = dict(
        sequence_length=16, valid_fraction=0.1, unit_bytes=9000, shard_bytes=4000, block_rows=64
    )
    return prepare([str(corpus / "in")], corpus / "tok", out, **{**settings, **options})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def endless(_: object, on_progress: Callable[[int], None]) -> None:
    """A task of a worker that never ends."""
    while True:
        on_progress(1)
        time.sleep(0.01)
