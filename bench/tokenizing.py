"""Speed of `prepare`, from text to shards, compared with bare tokenizers.

    python bench/tokenizing.py --scratch S          10 MB of builtin:docs and a vocabulary of them
    python bench/tokenizing.py --input wiki.txt.xz --tokenizer vocab.txt --megabytes 20 --scratch S
    python bench/tokenizing.py wordpiece workers --input wiki.txt.xz --megabytes 0 --scratch S

Bare tokenizers, which get cleaned texts in memory and are timed without loading:

    google         BERT's FullTokenizer, in Python
    hf             encode_batch_fast of the package tokenizers
    sentencepiece  encode of a list of lines

Our pipelines, which read JSONL of raw documents, clean, tokenize, deduplicate, shuffle, pack, hash
and write:

    wordpiece      one process
    unigram        one process
    workers        wordpiece with four processes, their start included

The contenders take turns, each in a new process with one thread. The result is the ratio of CPU
times, as the median over the rounds. Before any timing every document in the shards must have the
ids of the bare tokenizers.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import unicodedata
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from report import make_parser, print_heading, print_row, run_main

from data_tools.formats.documents import documents
from data_tools.formats.source import Tally
from data_tools.inputs.plan import UNIT_BYTES, make_plan
from data_tools.inspect_rows import source_reader
from data_tools.pipeline.clean import clean_lines
from data_tools.prepare import prepare
from data_tools.train_tokenizer import train_tokenizer
from electra_ds.common.json_files import read_json, write_json
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer

# Bare tokenizer -> kind of its vocabulary.
BARE = {"google": "wordpiece", "hf": "wordpiece", "sentencepiece": "unigram"}
# Pipeline -> (kind of its vocabulary, processes).
PIPELINES = {"wordpiece": ("wordpiece", 1), "unigram": ("unigram", 1), "workers": ("wordpiece", 4)}
CONTENDERS = [*BARE, *PIPELINES]
GOALS = {  # (contender, against) -> ratio of CPU times to reach
    ("wordpiece", "google"): 5.0,
    ("wordpiece", "hf"): 1.5,
    ("unigram", "sentencepiece"): 0.75,
    ("workers", "wordpiece"): 1 / 1.10,
}
BATCH = 1000  # texts given to a bare tokenizer at once
VOCABULARY_BYTES = 10**7  # of text, about, on which vocabularies are trained

Turn = dict[str, float]  # results of `measure`

# ---------------------------------------------------- BERT's FullTokenizer, character by character


def is_space(c: str) -> bool:
    return c in (" ", "\t", "\n", "\r") or unicodedata.category(c) == "Zs"


def is_control(c: str) -> bool:
    return c not in ("\t", "\n", "\r") and unicodedata.category(c).startswith("C")


def is_punctuation(c: str) -> bool:
    return (not c.isalnum() and " " < c < "\x7f") or unicodedata.category(c).startswith("P")


def is_chinese(code: int) -> bool:
    common = 0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0xF900 <= code <= 0xFAFF
    return (
        common
        or 0x20000 <= code <= 0x2A6DF
        or 0x2A700 <= code <= 0x2CEAF
        or 0x2F800 <= code <= 0x2FA1F
    )


def google_words(text: str, lowercase: bool) -> list[str]:
    """The words of a text; each Chinese and punctuation character is a separate word.

    Control characters are dropped. lowercase: in lower case and without accents.
    """
    kept = [c for c in text if ord(c) not in (0, 0xFFFD) and not is_control(c)]
    cleaned = "".join(" " if is_space(c) else c for c in kept)
    words = []
    for word in "".join(f" {c} " if is_chinese(ord(c)) else c for c in cleaned).split():
        if lowercase:
            decomposed = unicodedata.normalize("NFD", word.lower())
            word = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
        words += split_punctuation(word)
    return " ".join(words).split()


def split_punctuation(word: str) -> list[str]:
    """The parts of a word; each punctuation character is a separate part."""
    parts: list[list[str]] = []
    starts_part = True
    for c in word:
        is_separate = is_punctuation(c)
        if is_separate or starts_part:
            parts.append([])
        parts[-1].append(c)
        starts_part = is_separate
    return ["".join(part) for part in parts]


def google_subwords(word: str, vocabulary: dict[str, int]) -> list[str]:
    """Split a word greedily into its longest entries; empty if it has no such split."""
    characters = list(word)
    if len(characters) > 100:
        return []
    subwords = []
    start = 0
    while start < len(characters):
        prefix = "##" if start else ""
        end = len(characters)
        while start < end:
            subword = prefix + "".join(characters[start:end])
            if subword in vocabulary:
                break
            end -= 1
        if start == end:
            return []
        subwords.append(subword)
        start = end
    return subwords


def google_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    unknown = tokenizer.tokens([tokenizer.special_ids.unk])
    tokens = []
    for word in google_words(text, tokenizer.options["lowercase"]):
        tokens += google_subwords(word, tokenizer.ids) or unknown
    return [tokenizer.ids[token] for token in tokens]


# -------------------------------------------------------------------------------- bare tokenizers


def bare_ids(name: str, tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    """The ids of each text by a bare tokenizer."""
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        if name == "google":
            yield from (google_ids(text, tokenizer) for text in batch)
        elif name == "hf":
            encodings = tokenizer.fast.encode_batch_fast(batch, add_special_tokens=False)
            yield from (encoding.ids for encoding in encodings)
        else:
            yield from sentencepiece_ids(tokenizer, batch)


def sentencepiece_ids(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    """The ids of each text; all lines are encoded at once."""
    lines_of_text = [text.split("\n") for text in texts]
    all_lines = [line for lines in lines_of_text for line in lines]
    ids_of_line = iter(tokenizer._model.encode(all_lines, num_threads=1))
    for lines in lines_of_text:
        yield list(chain.from_iterable(islice(ids_of_line, len(lines))))


def read_texts(scratch: Path) -> list[str]:
    """The cleaned texts that `fill_scratch` wrote."""
    return read_json(scratch / "texts.json", "texts")["texts"]


# ------------------------------------------------------------------------------------ one turn


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def measure(name: str, scratch: Path) -> Turn:
    """Run a contender in this process.

    Returns its CPU seconds (cpu), the part of them spent in encode_normalized in this process
    (tokenizing), and the largest peak memory of a process in MB (peak).
    """
    if name in BARE:
        seconds, tokenizing = measure_bare(name, scratch), 0.0
    else:
        seconds, tokenizing = measure_pipeline(name, scratch)
    # ru_maxrss of this process would start from the memory of its parent.
    status = Path("/proc/self/status").read_text()
    own_peak = int(status.partition("VmHWM:")[2].split()[0])
    children_peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"cpu": seconds, "tokenizing": tokenizing, "peak": max(own_peak, children_peak) / 1024}


def measure_bare(name: str, scratch: Path) -> float:
    """CPU seconds of a bare tokenizer on all texts."""
    tokenizer = load_tokenizer(scratch / BARE[name])
    texts = read_texts(scratch)
    began = cpu_seconds()
    deque(bare_ids(name, tokenizer, texts), maxlen=0)
    return cpu_seconds() - began


def measure_pipeline(name: str, scratch: Path) -> tuple[float, float]:
    """(CPU seconds of `prepare`, the part of them spent in encode_normalized in this process)."""
    kind, workers = PIPELINES[name]
    tokenizer = load_tokenizer(scratch / kind)
    source = scratch / "input.jsonl"
    out = pipeline_folder(name, scratch)
    tokenizing = 0.0
    encode_normalized = type(tokenizer).encode_normalized

    def timed_encode_normalized(self: Tokenizer, texts: list[str]) -> tuple:
        nonlocal tokenizing
        before = cpu_seconds()
        encoded = encode_normalized(self, texts)
        tokenizing += cpu_seconds() - before
        return encoded

    type(tokenizer).encode_normalized = timed_encode_normalized
    unit_bytes = min(UNIT_BYTES, source.stat().st_size // 8 + 1)  # several units per process
    shutil.rmtree(out, ignore_errors=True)
    began = cpu_seconds()
    prepare([str(source)], tokenizer, out, unit_bytes=unit_bytes, workers=workers)
    return cpu_seconds() - began, tokenizing


def pipeline_folder(name: str, scratch: Path) -> Path:
    """The data folder that a pipeline writes."""
    return scratch / f"out-{name}"


def run_turn(name: str, scratch: Path) -> Turn:
    """`measure` in a new process."""
    command = [sys.executable, __file__, name, "--scratch", str(scratch), "--here"]
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout)


# -------------------------------------------------------------------------------- scratch folder


def fill_scratch(scratch: Path, options: argparse.Namespace) -> None:
    """Write raw documents, cleaned texts and both vocabularies, if they are not there."""
    if (scratch / "texts.json").exists():
        return
    scratch.mkdir(parents=True, exist_ok=True)
    texts, size = read_documents(options.input, options.megabytes)
    part = texts[: len(texts) // (1 + size // VOCABULARY_BYTES)]
    write_jsonl(scratch / "input.jsonl", texts)
    write_jsonl(scratch / "part.jsonl", part)
    vocabulary_input = [str(scratch / "part.jsonl")]
    if options.tokenizer:
        wordpiece = load_tokenizer(options.tokenizer)
    else:
        wordpiece = train_tokenizer(vocabulary_input, scratch / "wordpiece")
    wordpiece.save(scratch / "wordpiece")
    train_tokenizer(vocabulary_input, scratch / "unigram", kind="unigram")
    cleaned = ["\n".join(clean_lines(text)[0]) for text in texts]
    write_json(scratch / "texts.json", {"texts": cleaned})


def read_documents(inputs: list[str], megabytes: float) -> tuple[list[str], int]:
    """(the first documents of the input up to a size, their bytes). megabytes: 0: all."""
    texts: list[str] = []
    size = 0
    for source in make_plan(inputs).sources:
        for text in documents(
            source, 0, source.size, text_field="text", tally=Tally(), on_progress=lambda done: None
        ):
            if not megabytes or size < megabytes * 1e6:
                texts.append(text)
                size += len(text.encode())
    return texts, size


def write_jsonl(path: Path, texts: list[str]) -> None:
    """Write one document per line."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")


# ------------------------------------------------------------------------------- check of the ids


def packed_ids(data: Path, scratch: Path) -> dict[int, list[int]]:
    """Index of a document in the input -> its ids, from the rows of a data folder."""
    fragments: dict[tuple[int, int], list[tuple[int, list[int]]]] = {}
    for split in ("train", "valid"):
        reader = ShardReader(data, split)
        for block in range(len(reader.blocks)):
            rows = reader.block(block)
            for row, start, length, unit, document, token in reader.fragments(block).tolist():
                ids = rows[row, start : start + length].tolist()
                fragments.setdefault((unit, document), []).append((token, ids))
    read_unit = source_reader(data, [str(scratch / "input.jsonl")])
    units = range(len(reader.manifest.source.units))
    keys = [(unit, document) for unit in units for document, _ in enumerate(read_unit(unit))]
    return {
        index: [i for _, ids in sorted(fragments[key]) for i in ids]
        for index, key in enumerate(keys)
        if key in fragments
    }


def check_ids(names: list[str], scratch: Path) -> None:
    """Compare pipelines with the bare tokenizers of their vocabulary. SystemExit if they differ."""
    texts = read_texts(scratch)
    for bare in names:
        if bare not in BARE:
            continue
        tokenizer = load_tokenizer(scratch / BARE[bare])
        expected = list(bare_ids(bare, tokenizer, texts))
        for name in names:
            if name in PIPELINES and PIPELINES[name][0] == BARE[bare]:
                check_pipeline_ids(name, bare, expected, texts, scratch)


def check_pipeline_ids(
    name: str, bare: str, expected: list[list[int]], texts: list[str], scratch: Path
) -> None:
    """Print the number of documents with the expected ids. SystemExit if any ids differ."""
    ids_of_document = packed_ids(pipeline_folder(name, scratch), scratch)
    # str.lower makes a final sigma of a capital sigma at the end of a word. The package tokenizers
    # and our tokenizer do not.
    compared = {
        index: ids
        for index, ids in ids_of_document.items()
        if bare != "google" or "\u03a3" not in texts[index]
    }
    wrong = [index for index, ids in compared.items() if ids != expected[index]]
    if wrong:
        raise SystemExit(
            f"{name}: ids differ from those of {bare} on {len(wrong)} documents; the first one: "
            f"{texts[wrong[0]][:80]}"
        )
    print(
        f"{name}: ids equal those of {bare} on {len(compared)} of {len(texts)} documents; the "
        "others are duplicates, or (google) contain a capital sigma"
    )


# -------------------------------------------------------------------------------------- tables


def report(turns: dict[str, list[Turn]], megabytes: float) -> None:
    """Print the ratios, then the rate and memory of each contender."""
    print_heading("contender", "against", "times as fast, CPU, median", "spread", "goal")
    for (name, peer), goal in GOALS.items():
        if name not in turns or peer not in turns:
            continue
        pairs = zip(turns[name], turns[peer], strict=True)
        ratios = [peer_turn["cpu"] / turn["cpu"] for turn, peer_turn in pairs]
        median = statistics.median(ratios)
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        verdict = "reached" if median >= goal else "MISSED"
        print_row(name, peer, f"{median:.2f}", spread, f"{goal:.2f} {verdict}")
    print()
    print_heading(
        "contender", "MB per CPU second", "outside encode_normalized", "peak MB of a process"
    )
    for name, own_turns in turns.items():
        rate = statistics.median(megabytes / turn["cpu"] for turn in own_turns)
        outside = ""
        if name in PIPELINES and PIPELINES[name][1] == 1:
            shares = [1 - turn["tokenizing"] / turn["cpu"] for turn in own_turns]
            outside = f"{statistics.median(shares):.0%}"
        peak = max(turn["peak"] for turn in own_turns)
        print_row(name, f"{rate:.2f}", outside, f"{peak:.0f}")


# ---------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="CONTENDER",
        help=f"names of contenders: {', '.join(CONTENDERS)} (default: all)",
    )
    parser.add_argument(
        "--input", nargs="+", default=["builtin:docs"], help="text, as `prepare` takes it"
    )
    parser.add_argument("--tokenizer", help="WordPiece vocabulary (default: trained on the text)")
    parser.add_argument("--megabytes", type=float, default=10, help="of the text (0: all of it)")
    parser.add_argument(
        "--scratch",
        type=Path,
        required=True,
        help="folder for texts, vocabularies and shards, which are kept and used again",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.names) - set(CONTENDERS):
        parser.error(f"no contender {sorted(unknown)[0]!r}; there are {', '.join(CONTENDERS)}")
    return options


def main() -> None:
    options = parse_arguments()
    names: list[str] = options.names or CONTENDERS
    scratch: Path = options.scratch
    if options.here:
        print(json.dumps(measure(names[0], scratch)))
        return
    fill_scratch(scratch, options)
    for name in PIPELINES:
        if name in names:
            run_turn(name, scratch)
    check_ids(names, scratch)
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            turns[name].append(run_turn(name, scratch))
    megabytes = sum(len(text.encode()) for text in read_texts(scratch)) / 1e6
    print(f"{megabytes:.1f} MB, load {os.getloadavg()[0]:.1f}\n")
    report(turns, megabytes)
    if options.json:
        write_json(options.json, turns)


if __name__ == "__main__":
    run_main(main)
