"""Texts in scripts and languages for which defaults made for English are wrong."""

import json

import pytest
from running import run_cli

from data_tools.pipeline.characters import LongWords
from data_tools.train_tokenizer import train_tokenizer
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
