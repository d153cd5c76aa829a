"""Training of vocabularies: characters, accents by script, messages and refusals."""

import json
import random
import time
from collections import Counter

import pytest
from running import run_cli
from tokenizers import Tokenizer as Fast

from data_tools.pipeline.characters import Uncovered
from data_tools.train_tokenizer import SENTENCE_BYTES, _cut, train_tokenizer
from electra_ds.common.errors import UserError
from electra_ds.data.shard_format import read_manifest
from electra_ds.data.tokenizer import SentencePiece, load_tokenizer
from electra_ds.interop.hf_tokenizer import write_tokenizer

IDEOGRAPHS = [chr(0x4E00 + i) for i in range(1500)]
RANDOM = random.Random(0)
CHINESE = "\n\n".join("".join(RANDOM.choices(IDEOGRAPHS, k=60)) for _ in range(400))
LATIN = "d\u00e9j\u00e0 vu \u00fcber na\u00efve caf\u00e9\n" * 40
JAPANESE = "\u304c\u304e\u3050 \u30c7\u30fc\u30bf \u30d1\u30d3\u30d7\n" * 40
HINDI = "\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e\n" * 40
KOREAN = "\ud55c\uad6d\uc5b4 \uac00\ub098\n" * 40


def trained(folder, text: str, **options) -> tuple:
    """(tokenizer, lines that were said)."""
    (folder / "text.txt").write_text(text)
    said: list[str] = []
    options = {"vocab_size": 200} | options
    return train_tokenizer(
        [str(folder / "text.txt")], folder / "t", say=said.append, **options
    ), said


# ---------------------------------------------------------------------------------------- characters


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_characters_take_the_entries_that_stay_free(tmp_path, kind):
    tokenizer, said = trained(tmp_path, CHINESE, kind=kind, vocab_size=2000)
    ids = tokenizer.encode_batch([CHINESE])[0]
    share = ids.count(tokenizer.special_ids.unk) / len(ids)
    assert share < (0.001 if kind == "bpe" else 1e-9)  # bpe joins characters until none is free
    assert (share == 0) == (said[-1] == "every character of the text is in the vocabulary")


def test_frequent_characters_come_before_joined_words(tmp_path):
    words = ["".join(RANDOM.choices("abcdefgh", k=6)) for _ in range(300)]
    tokenizer, said = trained(
        tmp_path, CHINESE + "\n\n" + " ".join(words * 5), vocab_size=1300, lowercase=False
    )
    ids = tokenizer.encode_batch([CHINESE])[0]
    share = ids.count(tokenizer.special_ids.unk) / len(ids)
    assert len(tokenizer.names) == 1300 and share < 0.45  # 0.8 with a quarter of the entries
    assert said[-1].startswith("WARNING: ") and "words with them become [UNK]" in said[-1]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_the_share_that_is_not_covered_is_that_of_the_characters(tmp_path, kind):
    tokenizer, _ = trained(tmp_path, LATIN, kind=kind)
    found = Uncovered.of(tokenizer, {"a": 60, "\u4e00": 30, "\u4e01": 10, " ": 50})
    assert found.share == 0.4 and [*found.unknown] == ["\u4e00", "\u4e01"]
    assert "40.00% of the text's characters" in found.describe()
    assert "most frequent \u4e00 \u4e01" in found.describe()
    assert ("words with them become" in found.describe()) == (kind == "wordpiece")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_text_begins_with_no_unknown_token_when_long_lines_have_no_spaces(tmp_path, kind):
    line = "".join(RANDOM.choices(IDEOGRAPHS[:40], k=3000))
    tokenizer, said = trained(tmp_path, f"{line}\n\n" * 20, kind=kind, vocab_size=300)
    ids = tokenizer.encode_batch([f"{line[:5]} {line[5:9]}"])[0]
    assert tokenizer.special_ids.unk not in ids and tokenizer.names[ids[0]].startswith("\u2581")
    assert said[-1] == "every character of the text is in the vocabulary"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_an_unknown_space_is_no_unknown_character(tmp_path, kind):
    """Models of earlier versions and of other programs may lack the space."""
    from sentencepiece import sentencepiece_model_pb2

    tokenizer, _ = trained(tmp_path, "ab ba " * 50, kind=kind, vocab_size=64)
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)
    kept = [piece for piece in model.pieces if "\u2581" not in piece.piece]
    del model.pieces[:]
    model.pieces.extend(kept)
    without = SentencePiece(model.SerializeToString(), {}, "test", "nfkc_visible_lower")
    assert without.encode_batch(["a"])[0][0] == without.special_ids.unk
    assert Uncovered.of(without, Counter(a=3, b=2, q=1)).unknown == {"q": 1}


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_rare_digits_and_letters_keep_an_entry_when_all_entries_are_used(tmp_path, kind):
    words = ["".join(RANDOM.choices("abcdefgh", k=5)) for _ in range(600)]
    texts = [" ".join(RANDOM.choices(words, k=100)) for _ in range(200)]
    texts[50] += " " + " ".join(["xyz"] * 20)  # 0.02 % of the characters each
    texts[100] += " 7"  # less than 0.001 %
    tokenizer, said = trained(tmp_path, "\n".join(texts), kind=kind, vocab_size=400)
    assert tokenizer.vocab_size == 400
    ids = tokenizer.encode_batch(["xyz 7 " + " ".join(words[:50])])[0]
    assert tokenizer.special_ids.unk not in ids
    assert said[-1] == "every character of the text is in the vocabulary"
    write_tokenizer(tokenizer, tmp_path / "hf", 64)
    fast = Fast.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    for text in texts[:60]:
        ids = fast.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode_batch([text])[0]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_rare_characters_keep_a_small_model_equal_to_its_export(tmp_path, kind):
    text = LATIN * 20 + "".join(chr(0x3400 + i) for i in range(90)) + "\n"
    tokenizer, _ = trained(tmp_path, text, kind=kind, vocab_size=300)
    assert any("\u3400" <= name <= "\u3500" for name in tokenizer.names)
    write_tokenizer(tokenizer, tmp_path / "hf", 64)
    fast = Fast.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    for line in {*text.splitlines(), "-" * 200, "aaaaaaaa" * 50}:
        assert fast.encode(line, add_special_tokens=False).ids == tokenizer.encode_batch([line])[0]


# ------------------------------------------------------------------------------------------- accents


@pytest.mark.parametrize(
    ("text", "stripped", "said"),
    [
        (LATIN, True, "100.0% of the letters are Latin or Greek"),
        (JAPANESE, False, "most of them KATAKANA"),
        (HINDI, False, "most of them DEVANAGARI"),
        (KOREAN, False, "most of them HANGUL"),
        (LATIN + HINDI, False, "of other scripts"),
    ],
)
def test_accents_are_stripped_where_words_stay_readable(tmp_path, text, stripped, said):
    tokenizer, lines = trained(tmp_path, text)
    assert tokenizer.options == {"lowercase": True, "strip_accents": stripped}
    assert said in lines[0]
    told, lines = trained(tmp_path, text, strip_accents=not stripped)
    assert told.options["strip_accents"] is not stripped and len(lines) == 1
    kept, _ = trained(tmp_path, text, lowercase=False)
    assert kept.options == {"lowercase": False, "strip_accents": False}


def test_syllables_and_vowel_signs_are_entries(tmp_path):
    for text, entry in ((KOREAN, "\ud55c"), (HINDI, "##\u093f"), (JAPANESE, "\u304c")):
        assert entry in trained(tmp_path, text)[0].names


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="word"), "kind = 'word'"),
        (dict(vocab_size=0), "vocab_size = 0"),
        (dict(vocab_size=2**40), "vocab_size = 1099511627776"),
        (dict(kind="bpe", strip_accents=True), "SentencePiece models keep accents"),
        (dict(kind="byte_bpe", strip_accents=True), "byte_bpe keeps accents"),
        (dict(kind="byte_bpe", lowercase=True), "byte_bpe keeps the case"),
        (dict(kind="byte_bpe", vocab_size=260), "vocab_size = 260; expected 261 or more"),
        (
            dict(kind="bpe", vocab_size=64),
            r"could not make 64 entries: .* give --vocab-size \d+ or more",
        ),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        trained(tmp_path, CHINESE, **options)


def test_a_folder_that_cannot_be_written_is_refused_before_reading(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "nul\0"):
        with pytest.raises(UserError, match=r"--out .*(expected a folder|null)"):
            train_tokenizer(["no-such-input"], out)


def test_an_empty_file_is_refused(tmp_path):
    for text in ("", "\n\n", "\u200b\x00\n"):
        with pytest.raises(UserError, match=r"no text|empty|not text"):
            trained(tmp_path, text)


def test_long_lines_are_cut_in_linear_time():
    line = "word " * 1_000_000
    start = time.process_time()
    parts = list(_cut(line.strip()))
    assert time.process_time() - start < 2
    assert " ".join(parts) == line.strip()
    assert all(len(part.encode()) <= SENTENCE_BYTES for part in parts)
    assert "".join(_cut("\U00020000" * 9000)) == "\U00020000" * 9000


# -------------------------------------------------------------------------------------- command line


def test_the_commands_print_choices_and_shares(tmp_path):
    (tmp_path / "text.txt").write_text(KOREAN + "\n")
    entries = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "\ud55c\uad6d",
        "##\uc5b4",
        "\uac00\ub098",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(entries) + "\n")
    prepare = (
        "prepare",
        "--input",
        tmp_path / "text.txt",
        "--valid-fraction",
        0,
        "--sequence-length",
        16,
    )

    vocabulary = ("--tokenizer", tmp_path / "vocab.txt", "--out")
    guessed = run_cli(*prepare, *vocabulary, tmp_path / "g").stdout
    assert "lower case, accents kept" in guessed
    assert "guessed: no entry has a capital, and some entries have accents" in guessed
    assert "\n[UNK]: 0.00% of the tokens\n" in guessed

    stripped = run_cli(*prepare, *vocabulary, tmp_path / "a", "--strip-accents").stdout
    assert "lower case, accents stripped" in stripped
    assert "WARNING: 3 entries have accents or capitals" in stripped
    assert "WARNING: [UNK]: 100.00% of the tokens, 100.00% of the characters, most" in stripped
    unknowns = read_manifest(tmp_path / "a").unknowns
    assert unknowns.found == unknowns.tokens

    told = run_cli(
        *prepare,
        "--tokenizer",
        tmp_path / "vocab.txt",
        "--out",
        tmp_path / "b",
        "--no-strip-accents",
        "--no-lowercase",
        "--normalization",
        "nfc",
    ).stdout
    assert "case kept, accents kept, normalization nfc\n" in told
    assert "\n[UNK]: 0.00% of the tokens\n" in told
    options = json.loads((tmp_path / "b" / "tokenizer" / "options.json").read_text())
    assert (options["lowercase"], options["normalization"]) == (False, "nfc")

    # The tokenizer of the data folder, also as transformers saves it, makes the same data.
    write_tokenizer(load_tokenizer(tmp_path / "b" / "tokenizer"), tmp_path / "hf", 64)
    (tmp_path / "hf" / "vocab.txt").unlink()
    run_cli(*prepare, "--tokenizer", tmp_path / "hf", "--out", tmp_path / "c")
    one, two = (read_manifest(tmp_path / name) for name in "bc")
    assert one.dataset_id == two.dataset_id

    refused = run_cli(
        *prepare,
        "--tokenizer",
        tmp_path / "hf",
        "--out",
        tmp_path / "d",
        "--lowercase",
        check=False,
    )
    assert refused.returncode == 2
    assert "lowercase = False, but True was requested" in refused.stderr
    assert not (tmp_path / "d").exists()

    trained = run_cli(
        "train-tokenizer",
        "--input",
        tmp_path / "text.txt",
        "--out",
        tmp_path / "t",
        "--vocab-size",
        64,
    ).stdout
    assert "accents are kept: 100.0% of the letters" in trained
    assert "every character of the text is in the vocabulary" in trained


@pytest.mark.parametrize("owner", ["manifest.json", "prepare.json", "metrics.jsonl", "config.json"])
def test_the_vocabulary_of_data_runs_and_models_is_kept(tmp_path, owner):
    tokenizer, _ = trained(tmp_path, LATIN)
    (tmp_path / "text.txt").write_text("other text\n" * 40)
    (tmp_path / "link").symlink_to(tmp_path / "t")
    for folder in (tmp_path, tmp_path / "t"):
        (folder / owner).touch()
        for out in ("t", "link"):
            with pytest.raises(UserError, match=rf"holds {owner}.*choose another folder"):
                train_tokenizer([str(tmp_path / "text.txt")], tmp_path / out, vocab_size=200)
        (folder / owner).unlink()
    assert load_tokenizer(tmp_path / "t").fingerprint == tokenizer.fingerprint


def test_a_byte_level_vocabulary_is_the_same_for_the_same_lines(tmp_path):
    text = (
        LATIN
        + HINDI
        + JAPANESE
        + CHINESE[:4000]
        + "".join(f"word{i} Word{i % 9}\n" for i in range(99))
    )
    first, said = trained(tmp_path, text, kind="byte_bpe", vocab_size=600)
    assert said == ["every character of the text is in the vocabulary"]
    run_cli(
        *("train-tokenizer", "--input", tmp_path / "text.txt", "--out", tmp_path / "u"),
        *("--kind", "byte_bpe", "--vocab-size", 600),
    )
    assert (tmp_path / "u" / "tokenizer.json").read_bytes() == first.content
    assert first.vocab_size == 600 and first.options == {}
    ids = first.encode_batch([text])[0]
    assert first.special_ids.unk not in ids and first.decode(ids) == first.normalize(text)
    assert len(ids) < 0.6 * len(text.encode())  # tokens of several bytes
    assert first.encode_batch(["Word1"]) != first.encode_batch(["word1"])
    least, _ = trained(tmp_path, "a", kind="byte_bpe", vocab_size=261)
    assert least.vocab_size == 261 and not least.vocabulary.merges
    with pytest.raises(UserError, match=r"holds tokenizer\.json, which would be read beside"):
        trained(tmp_path, LATIN, kind="wordpiece")


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "byte_bpe"])
def test_a_vocabulary_that_data_cannot_have_is_refused(tmp_path, kind):
    with pytest.raises(UserError, match="vocab_size = 999999999; expected 64 to 16,777,216"):
        trained(tmp_path, LATIN, kind=kind, vocab_size=999_999_999)
