"""Texts in scripts and languages for which defaults made for English are wrong."""

import json
from collections import Counter

import pytest
from running import run_cli

from data_tools.formats.documents import documents as documents_of
from data_tools.formats.source import Tally
from data_tools.inputs.plan import make_plan
from data_tools.pipeline.characters import LongWords, Merged
from data_tools.pipeline.settings import Settings
from data_tools.train_tokenizer import train_tokenizer
from electra_ds.common.errors import UserError
from electra_ds.data.shard_format import read_manifest

THAI = "ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอน"


def trained(folder, text: str, out: str = "t", **options) -> tuple:
    """(tokenizer, lines that were said)."""
    (folder / "text.txt").write_text(text)
    said: list[str] = []
    options = {"vocab_size": 200} | options
    inputs = [str(folder / "text.txt")]
    return train_tokenizer(inputs, folder / out, say=said.append, **options), said


def documents(line: str, number: int = 40) -> str:
    return "\n\n".join(f"{line} {i}" for i in range(number))


# -------------------------------------------------------------------- words above WordPiece's limit


@pytest.mark.parametrize(("repeats", "long"), [(2, False), (3, True)])
def test_words_above_the_limit_of_wordpiece_are_counted(tmp_path, repeats, long):
    """Three times 41 characters are more than 100; two times are not."""
    tokenizer, said = trained(tmp_path, documents(THAI * repeats))
    ids = tokenizer.encode_batch([THAI * repeats])[0]
    assert (ids == [tokenizer.special_ids.unk]) == long
    warnings = [line for line in said if "words of more than 100 characters" in line]
    assert len(warnings) == long
    if long:
        assert "WARNING: 98" in warnings[0] and "--kind unigram" in warnings[0]
        assert THAI * 2 not in warnings[0]  # the word is cut
    unigram, said = trained(tmp_path, documents(THAI * repeats), "u", kind="unigram")
    assert unigram.special_ids.unk not in unigram.encode_batch([THAI * repeats])[0]
    assert not any("--kind unigram" in line for line in said)


def test_punctuation_ends_a_word_and_letters_of_a_syllable_count(tmp_path):
    korean, _ = trained(tmp_path, documents("가각간"), strip_accents=True)
    assert LongWords.of(korean, {"간" * 40: 2}).inside == 2 * 120  # three letters each
    assert LongWords.of(korean, {"가-" * 60: 1}).words == 0


def test_prepare_names_the_limit_as_the_cause(tmp_path):
    """One [UNK] for each document of 123 characters: a small share of the tokens."""
    words = "สวัสดี ครับ " * 60
    trained(tmp_path, documents(words + THAI * 3))
    options = ("--valid-fraction", 0, "--sequence-length", 64, "--input", tmp_path / "text.txt")
    done = run_cli("prepare", *options, "--tokenizer", tmp_path / "t", "--out", tmp_path / "d")
    (line,) = (line for line in done.stdout.splitlines() if "[UNK]" in line)
    assert line.startswith("WARNING: [UNK]: 0.") and "of the characters" in line
    assert "--kind unigram" in line and "--strip-accents" not in line
    assert THAI not in line and THAI[:20] + "..." in line
    unknowns = read_manifest(tmp_path / "d").unknowns
    assert unknowns.unknown_characters == unknowns.long_characters == 40 * 123
    assert unknowns.share < 0.01 < 0.1 < unknowns.share_of_characters < 0.3


def test_a_manifest_without_counts_of_characters_is_read(tmp_path):
    trained(tmp_path, documents("some words"))
    options = ("--valid-fraction", 0, "--sequence-length", 64, "--input", tmp_path / "text.txt")
    run_cli("prepare", *options, "--tokenizer", tmp_path / "t", "--out", tmp_path / "d")
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    for key in ("characters", "unknown_characters", "long_characters"):
        del manifest["unknowns"][key]
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest))
    unknowns = read_manifest(tmp_path / "d").unknowns
    assert unknowns.share == 0 and unknowns.share_of_characters is None


# ------------------------------------------------------------------------------------ accents, case

VIETNAMESE = "con ma, má và mà; mã của mạ, mả của bà ba bá bạ cũng đã đá đa"
RUSSIAN = "мой дом и мои дома, всё и все войны и воины"
FRENCH = "il a parlé à la dame; elle parle là où il va ou non"
ENGLISH = "the naïve resident of a small café met a señor and spoke of art"


@pytest.mark.parametrize(
    ("text", "stripped", "reason"),
    [
        (VIETNAMESE, False, "stripping makes 55.56% of the words (10 different ones) equal"),
        (FRENCH, False, "such as a and à"),
        (RUSSIAN, False, "most of them CYRILLIC"),
        (ENGLISH, True, "stripping makes 0.00% of the words"),
        ("καλημέρα κόσμε, ωραία μέρα", True, "100.0% of the letters are Latin or Greek"),
    ],
)
def test_accents_are_kept_where_stripping_makes_words_equal(tmp_path, text, stripped, reason):
    tokenizer, said = trained(tmp_path, documents(text))
    assert tokenizer.options["strip_accents"] == stripped
    assert reason in said[0]
    assert ("--no-strip-accents" in said[0]) == stripped
    ids = [tokenizer.encode_batch([word])[0] for word in text.replace(",", "").split()]
    assert stripped or len({tuple(word) for word in ids}) == len({*text.replace(",", "").split()})


def test_a_few_equal_words_do_not_keep_the_accents():
    words = Counter({"other": 9970, "jose": 10, "josé": 20, "café": 100, "Josè": 0})
    merged = Merged.of(words)
    assert (merged.total, merged.merged, merged.distinct) == (10100, 10, 2)
    assert merged.examples[0] == ("josé", "jose")


def test_the_form_of_a_word_and_its_case_do_not_count_as_differences():
    assert Merged.of(Counter({"É": 3, "é,": 2, "(é)": 1})).merged == 0
    assert Merged.of(Counter({"1é": 3, "1": 2, "e": 1})).merged == 1  # digits are no letters


@pytest.mark.parametrize(("kind", "out"), [("wordpiece", "w"), ("unigram", "u")])
def test_lower_case_of_turkish_is_warned_of(tmp_path, kind, out):
    text = documents("Irmakta ılık su, İzmir ile Iğdır arası")
    _, said = trained(tmp_path, text, out, kind=kind)
    assert any("--no-lowercase" in line and "Turkish" in line for line in said)
    _, said = trained(tmp_path, text, out, kind=kind, lowercase=False)
    assert not any("Turkish" in line for line in said)
    few = documents("words " * 200) + "\n\nthe town of Iğdır"
    _, said = trained(tmp_path, few, out, kind=kind)
    assert not any("Turkish" in line for line in said)


@pytest.mark.parametrize("joiner", ["\u200c", "\u200d"])
def test_joiners_that_wordpiece_deletes_are_warned_of(tmp_path, joiner):
    joined = f"\u0645\u06cc{joiner}\u0631\u0648\u062f"
    text = documents(f"{joined} \u0627\u0648")
    tokenizer, said = trained(tmp_path, text, "w")
    assert any(
        "WARNING: 33.33% of the words" in line and "WordPiece deletes" in line for line in said
    )
    assert tokenizer.encode_batch([joined]) == tokenizer.encode_batch([joined.replace(joiner, "")])
    kept, said = trained(tmp_path, text, "u", kind="unigram")
    assert not any("joiner" in line for line in said)
    assert kept.encode_batch([joined]) != kept.encode_batch([joined.replace(joiner, "")])


def test_joiners_of_emoji_and_of_few_words_are_not_warned_of(tmp_path):
    text = "\U0001f469\u200d\U0001f467 " * 20 + "words \u200c " * 2000 + "\u0645\u200c\u0645"
    _, said = trained(tmp_path, text, "w")
    assert not any("joiner" in line for line in said)


# ---------------------------------------------------------------------------- encodings, blank lines


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_lines_in_another_encoding_are_counted_and_limited(tmp_path, kind):
    russian = "слова на русском языке\n\n" * 30
    (tmp_path / "a.txt").write_bytes(russian.encode("cp1251"))
    (tmp_path / "b.txt").write_text(russian * 3)
    options = {"kind": kind, "vocab_size": 100}
    for inputs in (["a.txt"], ["a.txt", "b.txt"]):
        with pytest.raises(UserError, match=r"30 of \d+ lines cannot be read .* windows-1251"):
            train_tokenizer([str(tmp_path / name) for name in inputs], tmp_path / "t", **options)
    said: list[str] = []
    inputs = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    options |= {"max_bad_fraction": 0.25, "say": said.append}
    train_tokenizer(inputs, tmp_path / "t", **options)
    assert any("30 of 120 lines cannot be read and are left out (not UTF-8: 30)" in x for x in said)
    with pytest.raises(UserError, match="max_bad_fraction = 2"):
        train_tokenizer(inputs, tmp_path / "u", max_bad_fraction=2)


@pytest.mark.parametrize(
    "blank",
    ["", " \t", "\u00a0", "\u3000\u3000", "\u200b", "\ufeff", "\u2009\r", "\u0085", " \u2028"],
)
def test_a_line_that_looks_blank_ends_a_document(tmp_path, blank):
    text = f"first\nline\n{blank}\nsecond\n{blank}\n{blank}\n\u3000third\n\u00a0.\n".encode()
    (tmp_path / "t.txt").write_bytes(text)
    (source,) = make_plan([str(tmp_path / "t.txt")]).sources

    def read(start, end):
        options = {"text_field": "text", "tally": Tally(), "on_progress": lambda count: None}
        return [text.split() for text in documents_of(source, start, end, **options)]

    assert read(0, len(text)) == [["first", "line"], ["second"], ["third", "."]]
    for cut in range(len(text) + 1):
        assert read(0, cut) + read(cut, len(text)) == read(0, len(text))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_field_in_another_unicode_form_is_suggested(tmp_path, kind):
    field, given = "te\u0301xte", "t\u00e9xte"
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_text(json.dumps({field: "x"}) + "\n")
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({field: ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="another Unicode form") as caught:
        train_tokenizer([str(tmp_path / f"a.{kind}")], tmp_path / "t", text_field=given)
    assert ascii(field) in str(caught.value)
    (tmp_path / f"a.{kind}").rename(tmp_path / f"a\u0301.{kind}")
    with pytest.raises(UserError, match="another Unicode form"):
        train_tokenizer([str(tmp_path / f"\u00e1.{kind}")], tmp_path / "t")


def test_only_packings_that_prepare_offers_are_listed():
    with pytest.raises(UserError, match=r"expected one of best_fit, concat, google$"):
        Settings(packing="none").check()
