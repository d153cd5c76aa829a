"""Tokenizers: ids equal to the reference, no special ids from text, equal ids after saving."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.train_tokenizer import train_tokenizer
from electra_ds.common.errors import UserError
from electra_ds.data.tokenizer import WordPiece, load_tokenizer, wordpiece

VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdehlorstuw[]!,.-mk",
    *(f"##{c}" for c in "abcdehlorstuwmk"),
    "hello",
    "world",
    "##ld",
    "the",
    "##er",
    "\u65e5",
    "\u672c",
    "mask",
    "cafe",
]
TEXTS = [
    "Hello, WORLD!",
    "the [MASK] and [CLS] [SEP] [PAD]",
    "caf\u00e9 cafe\u0301 \u65e5\u672c",
    "",
    "  ",
    "a\x85b\x0bc\u2028d",
    "x" * 120 + " hello",
    "hel\u200blo wor\x00ld",
    "hello\tworld\r\nthe\u3000a\u00a0b",
]


CHARACTERS = (
    "aAbeh_5.\x7f\u00e9\u0301 \t\n\r\x0b\x0c\x1c\x85\u00a0\u2028\u3000\u65e5[M]!\u200b\u0130\ufffd"
)


@pytest.fixture
def vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return tmp_path / "vocab.txt"


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    text = " ".join(f"word{i} reads the quick brown fox number {i}" for i in range(200))
    (folder / "text.txt").write_text(text)
    return train_tokenizer(
        [str(folder / "text.txt")], folder / "tok", kind="unigram", vocab_size=80
    )


def reference(tokenizer: WordPiece, text: str) -> list[int]:
    """The ids of Hugging Face tokenizers on the whole text."""
    return tokenizer.fast.encode(text, add_special_tokens=False).ids


def test_the_word_cache_returns_the_ids_of_whole_texts(vocabulary):
    tokenizer = load_tokenizer(vocabulary)
    for _ in range(2):  # with an empty cache, then from the cache
        assert tokenizer.encode_batch(TEXTS) == [reference(tokenizer, text) for text in TEXTS]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from(CHARACTERS))))
def test_the_word_cache_returns_the_ids_of_any_text(texts):
    content = "\n".join(VOCABULARY).encode()
    tokenizer = WordPiece(content, {"lowercase": True, "strip_accents": True}, "test")
    assert tokenizer.encode_batch(texts) == [reference(tokenizer, text) for text in texts]


def test_a_full_cache_is_cleared_and_returns_the_same_ids(vocabulary, monkeypatch):
    monkeypatch.setattr(wordpiece, "MAX_CACHED_WORDS", 3)
    tokenizer = load_tokenizer(vocabulary)
    expected = [reference(tokenizer, text) for text in TEXTS]
    assert [tokenizer.encode_batch([text])[0] for text in TEXTS] == expected
    assert len(tokenizer._cache) <= 20


def test_text_never_encodes_to_a_special_id(vocabulary, sentencepiece):
    for tokenizer in (load_tokenizer(vocabulary), sentencepiece):
        special = set(tokenizer.special_ids.model_dump().values()) - {tokenizer.special_ids.unk}
        ids = tokenizer.encode_batch(["[MASK] [CLS][SEP] x[PAD]y [mask]"])[0]
        assert ids and not special.intersection(ids)
        assert not special.intersection(tokenizer.encode_with_offsets("[MASK] [CLS]")[0])


def with_options(vocabulary, **options):
    return WordPiece(
        vocabulary.read_bytes(), {"lowercase": True, "strip_accents": True} | options, "test"
    )


def test_saved_tokenizers_load_with_equal_ids_and_fingerprint(vocabulary, sentencepiece, tmp_path):
    for number, tokenizer in enumerate((with_options(vocabulary, lowercase=False), sentencepiece)):
        tokenizer.save(tmp_path / str(number))
        again = load_tokenizer(tmp_path / str(number))
        assert (again.fingerprint, again.special_ids) == (
            tokenizer.fingerprint,
            tokenizer.special_ids,
        )
        assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_options_change_the_ids_and_the_fingerprint(vocabulary):
    plain, cased = load_tokenizer(vocabulary), with_options(vocabulary, lowercase=False)
    accents = with_options(vocabulary, strip_accents=False)
    assert len({t.fingerprint for t in (plain, cased, accents)}) == 3
    assert plain.encode_batch(["HELLO"]) == plain.encode_batch(["hello"])
    assert plain.encode_batch(["HELLO"]) != cased.encode_batch(["HELLO"])
    assert plain.encode_batch(["caf\u00e9"]) == plain.encode_batch(["cafe"])
    assert plain.encode_batch(["caf\u00e9"]) != accents.encode_batch(["caf\u00e9"])


def test_a_vocabulary_with_upper_case_letters_is_cased(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, "Hello"]), encoding="utf-8")
    assert load_tokenizer(tmp_path).options == {"lowercase": False, "strip_accents": False}
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert load_tokenizer(tmp_path).options["lowercase"] is True


@pytest.mark.parametrize("entry", ["café", "##й", "ά", "が", "한국"])
def test_an_entry_with_an_accent_shows_that_accents_are_kept(tmp_path, entry):
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, entry]), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.options == {"lowercase": True, "strip_accents": False}
    assert not tokenizer.unreachable_names()
    text = entry.removeprefix("##")
    assert entry.startswith("##") or tokenizer.tokens(tokenizer.encode_batch([text])[0]) == [entry]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    stated = load_tokenizer(tmp_path)  # BERT strips accents where it lower-cases
    assert stated.options["strip_accents"] and stated.unreachable_names() == [entry]


def test_offsets_cover_the_words(vocabulary, sentencepiece):
    text = "Hello w\u00f6rld, the fox"
    for tokenizer in (load_tokenizer(vocabulary), sentencepiece):
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode_batch([text])[0]
        assert "".join(text[a:b] for a, b in offsets).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("kind", ["wordpiece", "stripped", "unigram", "bpe"])
def test_offsets_are_whole_words_without_spaces(tmp_path, form, kind):
    """Marks that are composed with their letter or stripped belong to its token."""
    words = ["café", "мой", "việt", "naïve", "λόγος", "नमस्ते"]
    (tmp_path / "t.txt").write_text("\n".join([" ".join(words)] * 50))
    options = {"kind": "wordpiece", "strip_accents": True} if kind == "stripped" else {"kind": kind}
    tokenizer = train_tokenizer([str(tmp_path)], tmp_path / ".v", vocab_size=120, **options)
    text = unicodedata.normalize(form, "  ".join(words) + " ")
    ids, spans = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode_batch([text])[0]
    parts = [text[start:end] for start, end in spans]
    assert "".join(parts) == text.replace(" ", "")
    starts = tokenizer.begins_word()[ids]
    assert starts.sum() >= len(words) and not any(part != part.strip() for part in parts)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe", "byte_bpe"])
def test_offsets_include_characters_that_are_composed_and_are_no_marks(tmp_path, kind):
    """Vowels and final consonants of Hangul; voicing marks of half-width kana."""
    words = ["\ud55c\uad6d\uc5b4", "\ub9d0", "\u30d1\u30ac"]
    (tmp_path / "t.txt").write_text("\n".join([" ".join(words)] * 50))
    tokenizer = train_tokenizer([str(tmp_path)], tmp_path / ".v", vocab_size=280, kind=kind)
    for text in (
        unicodedata.normalize("NFD", " ".join(words)),
        "\uff76\uff9e \uff8a\uff9f\uff76\uff9e",
    ):
        ids, spans = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode_batch([text])[0]
        covered = sorted({i for start, end in spans for i in range(start, end)})
        assert "".join(text[i] for i in covered) == text.replace(" ", "")
    if kind != "wordpiece":  # there, the word is one [UNK]
        _, spans = tokenizer.encode_with_offsets("\uff76\uff9e\uff76")
        assert spans[-1] == (2, 3)  # a letter of its own


INVISIBLE = "\xad\u061c\u200e\u200f\u202a\u202e\u2060\u2066\u2069"


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_invisible_characters_of_the_layout_do_not_change_the_ids(tmp_path, kind):
    (tmp_path / "t.txt").write_text("hyphenated words of \u200f\u0633\u0644\u0627\u0645\n" * 40)
    tokenizer = train_tokenizer([str(tmp_path)], tmp_path / ".v", kind=kind, vocab_size=90)
    plain = tokenizer.encode_batch(["hyphenated"])
    assert tokenizer.encode_batch([f"hyph{c}enated" for c in INVISIBLE]) == plain * len(INVISIBLE)
    assert not any(c in name for name in tokenizer.names for c in INVISIBLE)
    joined = tokenizer.normalize("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645")
    assert "\u200c" in joined  # BERT's cleaning deletes it afterwards


def test_a_folder_with_an_earlier_form_keeps_its_ids(tmp_path):
    (tmp_path / "t.txt").write_text("hyphenated words\n" * 40)
    new = train_tokenizer([str(tmp_path)], tmp_path / ".v", kind="unigram", vocab_size=90)
    assert new.normalization == "nfkc_visible_lower"
    options = (tmp_path / ".v" / "options.json").read_text()
    old = {"normalization": "nfkc_lower"}
    (tmp_path / ".v" / "options.json").write_text(
        json.dumps(json.loads(options) | old | {"fingerprint": None})
    )
    old = load_tokenizer(tmp_path / ".v")
    assert old.fingerprint != new.fingerprint
    assert old.encode_batch(["hyph\xadenated"]) != old.encode_batch(["hyphenated"])
    assert old.encode_batch(["hyphenated"]) == new.encode_batch(["hyphenated"])


def test_decode_returns_readable_text_with_special_tokens(vocabulary, sentencepiece):
    for tokenizer in (load_tokenizer(vocabulary), sentencepiece):
        ids = tokenizer.encode_batch(["hello world"])[0] if tokenizer.kind == "wordpiece" else None
        ids = ids or tokenizer.encode_batch(["quick brown fox"])[0]
        text = tokenizer.decode([tokenizer.special_ids.cls, *ids, tokenizer.special_ids.sep])
        assert text in ("[CLS] hello world [SEP]", "[CLS] quick brown fox [SEP]")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hello\nworld\n", r"no \[PAD\], \[UNK\], \[CLS\], \[SEP\], \[MASK\]"),
        ("\n".join([*VOCABULARY, "hello"]), "'hello' occurs twice"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_malformed_vocabulary_is_refused(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "vocab.txt")


def test_missing_files_and_other_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="not found"):
        load_tokenizer(tmp_path / "none.txt")
    with pytest.raises(UserError, match="no vocabulary in this folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "spm.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_model_in_which_text_can_encode_to_mask_is_refused(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox"] * 9),
        model_writer=model,
        vocab_size=30,
        hard_vocab_limit=False,
        user_defined_symbols=["[MASK]"],
        control_symbols=["[CLS]", "[SEP]"],
        pad_id=3,
        pad_piece="[PAD]",
        minloglevel=2,
    )
    (tmp_path / "spm.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match="no control symbol"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_training_twice_makes_the_same_vocabulary(tmp_path, kind):
    text = "\n\n".join(
        f"Document {i} says {'very ' * (i % 3)}little of {chr(97 + i % 26) * (i % 5)} things."
        for i in range(300)
    )
    (tmp_path / "text.txt").write_text(text)
    one, two = (
        train_tokenizer([str(tmp_path)], tmp_path / f".{n}", kind=kind, vocab_size=160)
        for n in "ab"
    )
    assert one.fingerprint == two.fingerprint
    assert one.vocab_size <= 160 and one.special_ids.model_dump() == dict(
        pad=0, unk=1, cls=2, sep=3, mask=4
    )
    assert one.special_ids.unk not in one.encode_batch(["Document 7 says little"])[0]


def test_case_and_accents_are_kept_without_lowercase(tmp_path):
    (tmp_path / "t.txt").write_text("\u00c9cole Paris " * 50)
    cased = train_tokenizer([str(tmp_path)], tmp_path / ".c", vocab_size=64, lowercase=False)
    plain = train_tokenizer([str(tmp_path)], tmp_path / ".p", vocab_size=64)
    assert "\u00c9cole" in cased.names and "ecole" in plain.names
