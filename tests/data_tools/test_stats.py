"""stats agrees with a recount of the documents; table and HTML page agree with it."""

import json
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from data_tools.pipeline import unknowns
from data_tools.prepare import prepare
from data_tools.stats import stats, tables
from data_tools.stats_html import html_page
from electra_ds.cli import data as verbs
from electra_ds.common.errors import UserError
from electra_ds.data.shard_format import read_manifest
from electra_ds.data.tokenizer import load_tokenizer

WORDS = [f"w{i}" for i in range(40)]
ENTRIES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "<b>", "never"]
STRANGE = ["Zebra", "<i>", "\u5f97", "quagga"]  # "<i>" is three words, "<", "i" and ">"


def text_of(number: int) -> str:
    """A document of 5 to 99 words in lines of ten, some of them unknown."""
    random = np.random.default_rng(number)
    words = random.choice(
        WORDS + STRANGE, int(random.integers(5, 100)), p=[0.02] * 40 + [0.1, 0.05, 0.03, 0.02]
    )
    return "\n".join(" ".join(words[i : i + 10]) for i in range(0, len(words), 10))


@pytest.fixture(scope="module")
def texts():
    return [text_of(number) for number in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    """A folder with 200 texts, 20 of them twice, prepared with many units and shards as data."""
    folder = tmp_path_factory.mktemp("stats")
    (folder / "vocab.txt").write_text("\n".join(ENTRIES) + "\n")
    (folder / "in.txt").write_text("\n\n".join(texts + texts[:20]))
    run(folder, "data")
    return folder


def run(folder, out, **options):
    settings = dict(
        sequence_length=16, valid_fraction=0.2, unit_bytes=9000, shard_bytes=4000, block_rows=32
    )
    return prepare(
        [str(folder / "in.txt")], folder / "vocab.txt", folder / out, **settings, **options
    )


def strange_words(texts):
    """Counts of the unknown words of texts, as BERT splits them, without a tokenizer."""
    return Counter(
        word for text in texts for word in re.findall(r"Zebra|quagga|\u5f97|(?<=<)i|[<>]", text)
    )


def test_lengths_and_counts_are_those_of_the_documents(folder, texts):
    facts = stats(folder / "data")
    lengths = {text: len(re.findall(r"\w+|[<>]", text)) for text in texts}
    splits = facts["splits"].values()
    assert len(facts["splits"]) == 2 and sum(split["documents"] for split in splits) == len(lengths)
    assert sum(split["tokens"] for split in splits) == sum(lengths.values())
    expected = Counter(2 ** (length.bit_length() - 1) for length in lengths.values())
    found, sums = Counter(), 0
    for split in splits:
        spread = split["tokens_per_document"]
        found.update(
            {low: count for low, high, count, _ in spread["histogram"] if high == 2 * low - 1}
        )
        assert sum(count for _, _, count, _ in spread["histogram"]) == split["documents"]
        assert sum(total for *_, total in spread["histogram"]) == split["tokens"]
        assert spread["mean"] == split["tokens"] / split["documents"]
        assert sum(total for *_, total in split["pieces_per_row"]["histogram"]) == split["pieces"]
        sums += round(split["unknown"] * split["tokens"])
    assert +found == expected
    assert sums == strange_words(texts).total() > 500
    assert facts["removed"]["duplicates"] == 20


def test_percentiles_and_coverage_are_exact(folder, texts):
    facts = stats(folder / "data")
    train, words = facts["splits"]["train"], facts["vocabulary"]
    unigrams = np.load(folder / "data" / "unigrams.npy")
    by_rank = np.sort(unigrams)[::-1]
    assert (
        words["entries"] == len(ENTRIES) - 5
        and words["seen"] == 40
        and words["never_seen"] == ["<b>", "never"]
    )
    assert (
        all(count == by_rank[rank - 1] for rank, count, _ in words["curve"])
        and words["curve"][-1][0] == 40
    )
    assert all(
        share == pytest.approx(by_rank[:rank].sum() / train["tokens"])
        for rank, _, share in words["curve"]
    )
    assert words["curve"][-1][2] == pytest.approx(1 - train["unknown"])
    prepare(
        [str(folder / "in.txt")],
        folder / "vocab.txt",
        folder / "all",
        valid_fraction=0,
        sequence_length=64,
    )
    spread = stats(folder / "all")["splits"]["train"]["tokens_per_document"]
    lengths = [len(re.findall(r"\w+|[<>]", text)) for text in texts]
    for key, percent in (("percentile_5", 5), ("median", 50), ("percentile_95", 95)):
        assert spread[key] == np.percentile(lengths, percent, method="inverted_cdf")
    assert (spread["least"], spread["most"]) == (min(lengths), max(lengths))


def test_unknown_words_are_recorded_as_written_for_any_workers(folder, texts):
    expected = strange_words(texts + texts[:20])  # of the whole input: duplicates are found later
    recorded = read_manifest(folder / "data").unknowns
    assert recorded.tokens > 2 * recorded.found
    assert recorded.model_dump(exclude={"tokens", "characters"}) == {
        "found": expected.total(),
        "looked_at": expected.total(),
        "words": expected,
        "unknown_characters": sum(len(word) * count for word, count in expected.items()),
        "long_characters": 0,
    }
    assert [*recorded.words.values()] == sorted(expected.values(), reverse=True)
    run(folder, "two", workers=2)
    assert (folder / "two" / "manifest.json").read_bytes() == (
        folder / "data" / "manifest.json"
    ).read_bytes()


def test_the_examined_tokens_and_the_words_in_memory_are_limited(
    folder, tmp_path, texts, monkeypatch
):
    expected = strange_words(texts + texts[:20])
    monkeypatch.setattr(unknowns, "FIRST_TOKENS", 50)
    little = run(folder, tmp_path / "little").unknowns
    assert little.found == expected.total() and 0 < little.looked_at < expected.total() / 2
    assert little.looked_at == sum(little.words.values())
    monkeypatch.setattr(unknowns, "MAX_WORDS", 4)
    monkeypatch.setattr(unknowns, "FIRST_TOKENS", 1 << 14)
    held = run(folder, tmp_path / "held").unknowns
    assert len(held.words) <= 4 and held.words["Zebra"] == max(held.words.values())


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_unknown_parts_are_those_that_become_unk(tmp_path, kind):
    from data_tools.train_tokenizer import train_tokenizer

    (tmp_path / "in.txt").write_text(
        "the cat sat on the mat and looked at the dog "
        "which jumped over a quick fox from Zurich by bus\n" * 50
    )
    tokenizer = train_tokenizer(
        [str(tmp_path / "in.txt")], tmp_path / kind, kind=kind, vocab_size=64
    )
    text = "the cat \u5f97\u5f97 sat 7, on"
    parts = tokenizer.unknown_parts(text)
    ids, _ = load_tokenizer(tmp_path / kind).encode_flat([text])
    assert len(parts) == np.count_nonzero(ids == tokenizer.special_ids.unk)
    assert sorted("".join(parts)) == sorted("\u5f97\u5f977,")


class Texts(HTMLParser):
    """The texts of a page's table cells, and the names of all tags and attributes."""

    def __init__(self, content):
        super().__init__()
        self.cells, self.names, self.inside = [], set(), False
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.names |= {tag, *(name for name, _ in attributes)}
        if tag in ("td", "th"):
            self.cells.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside &= tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data


def test_the_page_has_the_values_of_the_json_and_no_scripts_or_links(folder, tmp_path, capsys):
    verbs.stats(folder / "data", html=tmp_path / "page.html", as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts == stats(folder / "data")
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    parsed = Texts(content)
    cells = [cell for _, head, rows in tables(facts) for row in (head, *rows) for cell in row]
    assert [cell for cell in parsed.cells if cell] == [cell for cell in cells if cell.strip("#")]
    for split in facts["splits"].values():
        counted = [split[key] for key in ("documents", "tokens", "rows")]
        counted += [
            count
            for entry in facts["splits"]["train"]["tokens_per_document"]["histogram"]
            for count in entry[2:]
        ]
        assert {f"{count:,}" for count in counted} <= set(parsed.cells)
    assert content.count("<polyline") == 2 and "http" not in content
    assert not parsed.names & {"script", "link", "img", "src", "href", "iframe"}
    verbs.stats(folder / "data")
    printed = capsys.readouterr().out
    for cell in parsed.cells:
        assert all(word in printed for word in cell.split())


def test_a_folder_without_unknowns_and_a_text_of_unknown_words_have_a_report(folder, tmp_path):
    (tmp_path / "in.txt").write_text(f"Zebra {'x' * 300}\n")
    prepare(
        [str(tmp_path / "in.txt")],
        folder / "vocab.txt",
        tmp_path / "data",
        valid_fraction=0,
        sequence_length=16,
    )
    facts = stats(tmp_path / "data")
    assert facts["splits"]["train"]["unknown"] == 1 and facts["vocabulary"]["seen"] == 0
    assert facts["unknowns"]["words"] == {"Zebra": 1, "x" * 100: 1}
    rows = [row for table in tables(facts) for row in table.rows]
    for shown in (html_page(facts, "data"), str(rows)):
        assert f"Zebra 1, {'x' * 20}... 1" in shown and "x" * 21 not in shown
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    del manifest["unknowns"]
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    facts = stats(tmp_path / "data")
    assert facts["unknowns"] is None and "Zebra" not in html_page(facts, "data")


@pytest.mark.parametrize("name", ["manifest.json", "shards/train-000000.tar", "new/page.html"])
def test_the_page_is_not_written_into_the_data(folder, name):
    before = sorted((path, path.stat().st_mtime_ns) for path in (folder / "data").rglob("*"))
    with pytest.raises(UserError, match=r"--html .*lies in the folder that the command reads"):
        verbs.stats(folder / "data", html=folder / "data" / name)
    assert before == sorted(
        (path, path.stat().st_mtime_ns) for path in (folder / "data").rglob("*")
    )


def test_a_page_replaces_a_file_without_permissions_and_no_folder(folder, tmp_path):
    (tmp_path / "page.html").write_text("old")
    (tmp_path / "page.html").chmod(0)
    verbs.stats(folder / "data", html=tmp_path / "page.html")
    assert "<svg" in (tmp_path / "page.html").read_text(encoding="utf-8")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match=r"--html .*folder\.html: is a folder; expected a file$"):
        verbs.stats(folder / "data", html=tmp_path / "folder.html")
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(UserError, match=r"--html .*loop.*: cannot be written"):
        verbs.stats(folder / "data", html=loop / "page.html")
