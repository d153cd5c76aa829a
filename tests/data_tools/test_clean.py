"""Cleaning and duplicates: the removed documents are those of a plain implementation."""

import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.pipeline import dedup
from data_tools.pipeline.clean import SHINGLE, clean_lines, signatures, text_hash
from data_tools.prepare import prepare
from electra_ds.common.errors import UserError
from electra_ds.data.shard_format import read_manifest
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.tokenizer.normalization import CONTROL

pytest.importorskip("rensa", reason="near-duplicates need rensa: pip install 'electra_ds[clean]'")
WORDS = [f"w{i}" for i in range(1000)]
RANDOM = np.random.default_rng(0)
OPTIONS = dict(
    sequence_length=32, valid_fraction=0.2, unit_bytes=6000, shard_bytes=4000, min_chars=30
)
ALL = dict(drop_repeated_lines=True, keep="own_filter:keep", near_duplicates=0.8)


def lines_of(count: int) -> list[str]:
    """A document of `count` lines of 10 random words."""
    return [" ".join(RANDOM.choice(WORDS, 10)) for _ in range(count)]


def changed(lines: list[str], words: int) -> list[str]:
    """The document with its last `words` words replaced, so one stretch of its shingles differs."""
    flat = " ".join(lines).split(" ")
    return [" ".join([*flat[:-words], *RANDOM.choice(WORDS, words)])]


def shingles(lines: list[str]) -> set[tuple[str, ...]]:
    """The set of shingles of a document."""
    words = " ".join(lines).lower().split() + [""] * (SHINGLE - 1)
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def jaccard(a: list[str], b: list[str]) -> float:
    """The exact similarity of two documents."""
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(folder with two input files, a vocabulary and own_filter.py; the texts in their order)

    The texts hold everything that cleaning removes.
    """
    folder = tmp_path_factory.mktemp("clean")
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n"
    )
    (folder / "own_filter.py").write_text(
        'def keep(text):\n    assert "bomb" not in text, "no bombs"\n'
        '    return not text.startswith("w7")\n'
    )
    texts = [lines_of(int(RANDOM.integers(12, 20))) for _ in range(60)]
    texts += [lines_of(int(RANDOM.integers(2, 9))) for _ in range(90)]
    texts += [[line.upper() for line in lines] for lines in texts[:20]]
    # The two copies of one text are similar to each other, too.
    texts += [changed(lines, 1) for lines in texts[10:40] for _ in range(2)]
    texts += [changed(lines, len(lines) * 4) for lines in texts[40:60]]  # not similar enough
    texts += [lines[:2] + lines for lines in map(lines_of, [5] * 20)]
    texts += [["w1 w2"]] * 10
    texts += [
        [lines[0].replace(" ", " \x07\u200b", 2), *lines[1:]] for lines in map(lines_of, [3] * 10)
    ]
    texts = [texts[i] for i in RANDOM.permutation(len(texts))]
    (folder / "in").mkdir()
    (folder / "in" / "a.txt").write_text("\n\n".join("\n".join(lines) for lines in texts[:120]))
    (folder / "in" / "b.txt").write_text("\n\n".join("\n".join(lines) for lines in texts[120:]))
    return folder, texts


def recounted(texts: list[list[str]]) -> tuple[Counter, list[list[str]]]:
    """(expected counts of `removed`, documents that stay), by a plain implementation."""
    removed, seen, stay = Counter(), set(), []
    for lines in texts:
        plain = [line.replace("\x07", "").replace("\u200b", "") for line in lines]
        removed["control_characters"] += sum(map(len, lines)) - sum(map(len, plain))
        once = [line for i, line in enumerate(plain) if line not in plain[:i]]
        removed["repeated_lines"] += len(plain) - len(once)
        if len("".join(once)) < OPTIONS["min_chars"]:
            removed["too_short"] += 1
        elif once[0].startswith("w7"):
            removed["filtered"] += 1
        elif (text := " ".join(once).lower()) in seen:
            removed["duplicates"] += 1
        else:
            seen.add(text)
            similar = [jaccard(once, other) for other in stay]
            assert not any(
                0.7 < share < 0.9 for share in similar
            )  # no estimate is on the wrong side
            if max(similar, default=0) >= ALL["near_duplicates"]:
                removed["near_duplicates"] += 1
            else:
                stay.append(once)
    return removed, stay


def kept(data) -> dict[str, list[tuple[int, ...]]]:
    """The ids of the documents of each split, joined from rows, in (unit, document) order."""
    documents = {}
    for split in read_manifest(data).splits:
        reader, parts = ShardReader(data, split), {}
        for block in range(len(reader.blocks)):
            rows = reader.block(block)
            for row, start, length, unit, document, token in reader.fragments(block).tolist():
                ids = rows[row, start : start + length].tolist()
                parts.setdefault((unit, document), {})[token] = ids
        documents[split] = [
            tuple(i for _, ids in sorted(fragments.items()) for i in ids)
            for _, fragments in sorted(parts.items())
        ]
    return documents


def test_cleaning_removes_what_a_plain_implementation_does_for_any_workers(
    corpus, tmp_path, monkeypatch
):
    folder, texts = corpus
    monkeypatch.chdir(folder)
    removed, stay = recounted(texts)
    assert all(count >= 10 for count in removed.values()) and len(removed) == 6
    contents = []
    for workers in (1, 2, 3):
        out = tmp_path / str(workers)
        manifest = prepare(
            [str(folder / "in")],
            folder / "vocab.txt",
            out,
            workers=workers,
            format="text",
            **OPTIONS,
            **ALL,
        )
        contents.append({p.name: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()})
    assert contents[0] == contents[1] == contents[2] and len(manifest.source.units) > 5
    assert manifest.removed == removed
    found = kept(tmp_path / "1")
    ids = [
        tuple(5 + int(word[1:]) for line in lines for word in line.lower().split())
        for lines in stay
    ]
    assert sorted(found["train"] + found["valid"]) == sorted(ids) and found["valid"]


def test_units_without_near_duplicates_differ_only_by_the_missing_signatures(corpus, tmp_path):
    folder, _ = corpus
    files = []
    for number, options in enumerate(({}, {"near_duplicates": 0.8})):
        units = tmp_path / f"units-{number}"
        prepare(
            [str(folder / "in")],
            folder / "vocab.txt",
            tmp_path / str(number),
            units=units,
            **OPTIONS,
            **options,
        )
        files.append(
            {path.name: path.read_bytes() for path in units.iterdir() if path.suffix != ".json"}
        )
    without, with_them = files
    assert without.items() < with_them.items()
    assert {name.rpartition(".")[2] for name in with_them.keys() - without.keys()} == {"signatures"}


def test_a_document_is_removed_only_for_one_that_stays(corpus, tmp_path, monkeypatch):
    folder, _ = corpus
    first = " ".join(lines_of(20)).split(" ")
    second = [*first[:180], *RANDOM.choice(WORDS, 20)]  # similar to the first, 0.82
    third = [
        *RANDOM.choice(WORDS, 20),
        *second[20:],
    ]  # similar to the second, 0.82, and not to the first, 0.67
    (tmp_path / "in.txt").write_text(
        "\n\n".join(" ".join(words) for words in (first, second, third))
    )
    options = dict(sequence_length=32, valid_fraction=0, near_duplicates=0.75)
    for at_once in (dedup.AT_ONCE, 2):  # changes memory, not the result
        monkeypatch.setattr(dedup, "AT_ONCE", at_once)
        manifest = prepare(
            [str(tmp_path / "in.txt")], folder / "vocab.txt", tmp_path / str(at_once), **options
        )
        assert manifest.removed["near_duplicates"] == 1
        ids = [tuple(5 + int(word[1:]) for word in words) for words in (first, third)]
        assert kept(tmp_path / str(at_once))["train"] == ids


def test_signatures_do_not_depend_on_the_batch_and_estimate_the_similarity():
    sizes = RANDOM.integers(1, 400, 200)
    documents = [RANDOM.integers(5, 30_000, size, np.uint32) for size in sizes]
    alone = np.concatenate([signatures([document]) for document in documents])
    assert np.array_equal(signatures(documents), alone)
    for share in (0.5, 0.8, 0.95):
        both = RANDOM.integers(5, 30_000, (2, 100, 400), np.uint32)
        both[1, :, : int(share * 400)] = both[0, :, : int(share * 400)]
        pairs = both.transpose(1, 0, 2)
        true = [jaccard(*([" ".join(map(str, ids))] for ids in pair)) for pair in pairs]
        estimated = [(np.equal(*signatures(pair))).mean() for pair in pairs]
        assert abs(np.mean(estimated) - np.mean(true)) < 0.015 and np.std(estimated) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(near_duplicates=0.3), "near_duplicates = 0.3; expected a similarity of 0.5 to 1"),
        (
            dict(keep="own_filter:none"),
            "keep = 'own_filter:none': .*expected package.module:function",
        ),
        (dict(keep="no_such_filter:keep"), "keep = 'no_such_filter:keep': No module named"),
        (
            dict(keep="own_filter:keep"),
            r"in.txt: keep = 'own_filter:keep' raised AssertionError: no bombs; document 1 of "
            "unit 0 begins with 'a bomb'",
        ),
    ],
)
def test_unusable_settings_are_refused(corpus, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(corpus[0])
    (tmp_path / "in.txt").write_text("w1 w2\n\na bomb\n")
    with pytest.raises(UserError, match=message):
        prepare([str(tmp_path / "in.txt")], corpus[0] / "vocab.txt", tmp_path / "out", **options)


def test_the_error_for_a_missing_rensa_says_what_to_install(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(
        UserError, match=r"near_duplicates needs rensa: pip install 'electra_ds\[clean\]'"
    ):
        prepare(
            [str(corpus[0] / "in")], corpus[0] / "vocab.txt", tmp_path / "out", near_duplicates=0.8
        )
    assert not (tmp_path / "out").exists()


def test_kept_units_are_refused_for_other_cleaning(corpus, tmp_path):
    prepare(
        [str(corpus[0] / "in")],
        corpus[0] / "vocab.txt",
        tmp_path / "a",
        units=tmp_path / "units",
        **OPTIONS,
    )
    for options in (dict(drop_repeated_lines=True), dict(near_duplicates=0.8)):
        with pytest.raises(
            UserError, match=r"(drop_repeated_lines: found false|signatures: found null), expected "
        ):
            prepare(
                [str(corpus[0] / "in")],
                corpus[0] / "vocab.txt",
                tmp_path / "b",
                units=tmp_path / "units",
                **OPTIONS,
                **options,
            )
        (tmp_path / "b" / "prepare.json").unlink()


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        st.sampled_from(
            "aE\u0301\u00e9\u03a3\u1100\u1161 \t\n\x85\u2028\x00\x1f\x7f\u200b\ufeff\ufffd"
        )
    )
)
def test_cleaning_by_line_equals_cleaning_of_the_whole_text(text):
    whole, removed = CONTROL.subn("", "\n".join(text.splitlines()))
    stripped = [line.strip() for line in unicodedata.normalize("NFC", whole).split("\n")]
    lines = [line for line in stripped if line]
    assert clean_lines(text) == (lines, removed)
    assert text_hash(lines) == text_hash([" ".join(lines).lower()])
