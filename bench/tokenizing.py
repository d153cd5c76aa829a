"""How fast is `prepare`, text in, shards out, beside bare tokenizers that do nothing else?

    python bench/tokenizing.py --scratch S                 10 MB of builtin:docs, a vocabulary made of them
    python bench/tokenizing.py --input wiki.txt.xz --tokenizer vocab.txt --megabytes 20 --scratch S
    python bench/tokenizing.py wordpiece workers --input wiki.txt.xz --megabytes 0 --scratch S

google: BERT's FullTokenizer, pure Python. hf: tokenizers' encode_batch_fast. sentencepiece: encode of a list of lines.
wordpiece, unigram: our pipelines, which read JSONL of raw documents, clean, tokenize, deduplicate, shuffle, pack, hash
and write. workers: wordpiece with four processes, their start and all they do counted.

They take turns, each in a fresh process, one thread; what counts is the ratio of CPU time, the median over the rounds.
The bare ones get cleaned texts in memory, and only their call counts. Before any timing every document in the shards
must have the ids that the bare ones give.
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

from data_tools.formats.documents import documents
from data_tools.formats.source import Tally
from data_tools.inputs.plan import UNIT_BYTES, make_plan
from data_tools.inspect_rows import source_reader
from data_tools.pipeline.clean import clean_lines
from data_tools.prepare import prepare
from data_tools.train_tokenizer import train_tokenizer
from electra_ds.common.files import read_json, write_json
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer

BARE = {
    "google": "wordpiece",
    "hf": "wordpiece",
    "sentencepiece": "unigram",
}  # contender -> kind of its vocabulary
PIPELINES = {
    "wordpiece": ("wordpiece", 1),
    "unigram": ("unigram", 1),
    "workers": ("wordpiece", 4),
}  # kind, processes
EVERYONE = [*BARE, *PIPELINES]
GOALS = {  # (contender, against) -> how many times faster it is to be
    ("wordpiece", "google"): 5.0,
    ("wordpiece", "hf"): 1.5,
    ("unigram", "sentencepiece"): 0.75,
    ("workers", "wordpiece"): 1 / 1.10,
}

# ---------------------------------------- BERT's FullTokenizer, its passes over characters and its small functions


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
    """Cleaned, Chinese characters apart, lower case without accents, punctuation apart."""
    kept = [c for c in text if ord(c) not in (0, 0xFFFD) and not is_control(c)]
    cleaned = "".join(" " if is_space(c) else c for c in kept)
    words = []
    for word in "".join(f" {c} " if is_chinese(ord(c)) else c for c in cleaned).split():
        if lowercase:
            decomposed = unicodedata.normalize("NFD", word.lower())
            word = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
        parts, begins = [], True
        for c in word:
            apart = is_punctuation(c)
            if apart or begins:
                parts.append([])
            parts[-1].append(c)
            begins = apart
        words += ["".join(part) for part in parts]
    return " ".join(words).split()


def google_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Of each word the longest entry that it begins with, then of its rest."""
    tokens = []
    for word in google_words(text, tokenizer.options["lowercase"]):
        characters, own, start = list(word), [], 0
        while start < len(characters) <= 100:
            end = len(characters)
            while (
                piece := ("##" if start else "") + "".join(characters[start:end])
            ) not in tokenizer.ids and start < end:
                end -= 1
            if start == end:
                break
            own.append(piece)
            start = end
        tokens += own if start == len(characters) else tokenizer.tokens([tokenizer.special_ids.unk])
    return [tokenizer.ids[token] for token in tokens]


# -------------------------------------------------------------------------------------------------- contenders


def bare(name: str, tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    """The ids of each text."""
    for some in (texts[first : first + 1000] for first in range(0, len(texts), 1000)):
        if name == "google":
            yield from (google_ids(text, tokenizer) for text in some)
        elif name == "hf":
            yield from (
                e.ids for e in tokenizer.fast.encode_batch_fast(some, add_special_tokens=False)
            )
        else:
            lines = [text.split("\n") for text in some]
            found = iter(
                tokenizer._model.encode([line for own in lines for line in own], num_threads=1)
            )
            yield from (list(chain.from_iterable(islice(found, len(own)))) for own in lines)


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def measure(name: str, scratch: Path) -> dict[str, float]:
    """One turn in this process: CPU seconds, those of them in encode_flat (of this process), peak MB of a process."""
    inside = 0.0
    if name in BARE:
        tokenizer, texts = (
            load_tokenizer(scratch / BARE[name]),
            read_json(scratch / "texts.json", "texts")["texts"],
        )
        begun = cpu_seconds()
        deque(bare(name, tokenizer, texts), maxlen=0)
    else:
        kind, workers = PIPELINES[name]
        tokenizer, given, out = (
            load_tokenizer(scratch / kind),
            scratch / "input.jsonl",
            scratch / f"out-{name}",
        )
        encode_flat = type(tokenizer).encode_flat

        def timed(self: Tokenizer, texts: list[str]) -> tuple:
            nonlocal inside
            before = cpu_seconds()
            found = encode_flat(self, texts)
            inside += cpu_seconds() - before
            return found

        type(tokenizer).encode_flat = timed
        unit_bytes = min(UNIT_BYTES, given.stat().st_size // 8 + 1)  # some for each process
        shutil.rmtree(out, ignore_errors=True)
        begun = cpu_seconds()
        prepare([str(given)], tokenizer, out, unit_bytes=unit_bytes, workers=workers)
    seconds = cpu_seconds() - begun
    own = (
        Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    )  # ru_maxrss begins with the parent's
    peak = max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    return {"cpu": seconds, "tokenizing": inside, "peak": peak / 1024}


def turn(name: str, scratch: Path) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, name, "--scratch", str(scratch), "--here"]
    environ = os.environ | {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environ).stdout
    )


def fill(scratch: Path, options: argparse.Namespace) -> None:
    """Raw documents as JSONL, cleaned ones as JSON, both vocabularies; a scratch folder that has them keeps them."""
    if (scratch / "texts.json").exists():
        return
    scratch.mkdir(parents=True, exist_ok=True)
    raw, size = [], 0
    for source in make_plan(options.input).sources:
        for text in documents(
            source, 0, source.size, text_field="text", tally=Tally(), on_progress=lambda done: None
        ):
            if not options.megabytes or size < options.megabytes * 1e6:
                raw.append(text)
                size += len(text.encode())
    for file, count in (
        ("input", len(raw)),
        ("part", len(raw) // (1 + size // 10**7)),
    ):  # about 10 MB to train on
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in raw[:count])
        (scratch / f"{file}.jsonl").write_text("".join(lines), encoding="utf-8")
    part = [str(scratch / "part.jsonl")]
    own = (
        load_tokenizer(options.tokenizer)
        if options.tokenizer
        else train_tokenizer(part, scratch / "wordpiece")
    )
    own.save(scratch / "wordpiece")
    train_tokenizer(part, scratch / "unigram", kind="unigram")
    write_json(scratch / "texts.json", {"texts": ["\n".join(clean_lines(text)[0]) for text in raw]})


def packed(data: Path, scratch: Path) -> dict[int, list[int]]:
    """Document (its place in the input) -> its ids, from the rows of a data folder."""
    parts: dict[tuple[int, int], list] = {}
    for reader in (ShardReader(data, split) for split in ("train", "valid")):
        for block in range(len(reader.blocks)):
            rows = reader.block(block)
            for row, start, length, unit, document, token in reader.fragments(block).tolist():
                parts.setdefault((unit, document), []).append(
                    (token, rows[row, start : start + length].tolist())
                )
    read_unit = source_reader(data, [str(scratch / "input.jsonl")])
    units = range(len(reader.manifest.source.units))
    keys = [(unit, document) for unit in units for document, _ in enumerate(read_unit(unit))]
    return {
        n: [i for _, ids in sorted(parts[key]) for i in ids]
        for n, key in enumerate(keys)
        if key in parts
    }


def check_ids(names: list[str], scratch: Path) -> None:
    """Every document in the shards must have the ids of each bare tokenizer among `names`."""
    texts = read_json(scratch / "texts.json", "texts")["texts"]
    for other in (name for name in names if name in BARE):
        expected = list(bare(other, load_tokenizer(scratch / BARE[other]), texts))
        for name in (name for name in names if PIPELINES.get(name, ("",))[0] == BARE[other]):
            found = packed(scratch / f"out-{name}", scratch)
            # Python makes the last sigma of a word in capitals a final one; Rust, ours and that of `hf`, does not
            known = {n for n in found if other == "google" and "\u03a3" in texts[n]}
            if wrong := [
                texts[n][:80] for n, ids in found.items() if n not in known and ids != expected[n]
            ]:
                raise SystemExit(
                    f"{name}: not the ids of {other} on {len(wrong)} documents, the first: {wrong[0]}"
                )
            print(
                f"{name}: the ids of {other} on {len(found) - len(known)} of {len(texts)} documents; the rest are "
                f"copies, or (google) have a capital sigma"
            )


def report(taken: dict[str, list[dict]], megabytes: float) -> None:
    """Ratios, then what each contender needs, as markdown tables."""
    print(
        "| contender | against | times as fast, CPU, median | spread | goal |\n|---|---|---|---|---|"
    )
    for (name, other), goal in GOALS.items():
        if name in taken and other in taken:
            ratios = sorted(
                b["cpu"] / a["cpu"] for a, b in zip(taken[name], taken[other], strict=True)
            )
            verdict = "reached" if statistics.median(ratios) >= goal else "MISSED"
            spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
            print(
                f"| {name} | {other} | {statistics.median(ratios):.2f} | {spread} | {goal:.2f} {verdict} |"
            )
    print(
        "\n| contender | MB per CPU second | outside encode_flat | peak MB of a process |\n|---|---|---|---|"
    )
    for name, turns in taken.items():
        rate = statistics.median(megabytes / one["cpu"] for one in turns)
        rest = statistics.median(1 - one["tokenizing"] / one["cpu"] for one in turns)
        share = f"{rest:.0%}" if name in PIPELINES and PIPELINES[name][1] == 1 else ""
        print(f"| {name} | {rate:.2f} | {share} | {max(one['peak'] for one in turns):.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="CONTENDER", help=f"of {', '.join(EVERYONE)} (default: all)"
    )
    parser.add_argument(
        "--input", nargs="+", default=["builtin:docs"], help="text, as `prepare` takes it"
    )
    parser.add_argument("--tokenizer", help="WordPiece vocabulary (default: made of the text)")
    parser.add_argument("--megabytes", type=float, default=10, help="of the text (0: all of it)")
    parser.add_argument(
        "--scratch",
        type=Path,
        required=True,
        help="folder for texts, vocabularies and shards, kept",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the numbers of every turn")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names, scratch = options.names or EVERYONE, options.scratch
    if unknown := set(names) - set(EVERYONE):
        parser.error(f"no contender {sorted(unknown)[0]!r}; there are {', '.join(EVERYONE)}")
    if options.here:
        return print(json.dumps(measure(names[0], scratch)))
    fill(scratch, options)
    for name in PIPELINES.keys() & names:
        turn(name, scratch)
    check_ids(names, scratch)
    taken: dict[str, list[dict]] = {name: [] for name in names}
    for name in names * options.rounds:
        taken[name].append(turn(name, scratch))
    megabytes = (
        sum(len(text.encode()) for text in read_json(scratch / "texts.json", "texts")["texts"])
        / 1e6
    )
    print(f"{megabytes:.1f} MB, load {os.getloadavg()[0]:.1f}\n")
    report(taken, megabytes)
    if options.json:
        write_json(options.json, taken)


if __name__ == "__main__":
    main()
