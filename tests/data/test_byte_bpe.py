"""Byte-level BPE: ids, offsets, readable tokens, word starts, and refusals of damaged files."""

import json
import unicodedata
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stock_tokenizer import TEXT, stock_tokenizer

from data_tools.pipeline.clean import clean_lines
from data_tools.train_tokenizer import train_tokenizer
from electra_ds.common.errors import UserError
from electra_ds.common.special_ids import UNKNOWN
from electra_ds.data.masking import MaskingRecipe, class_changes, select_masked_positions
from electra_ds.data.tokenizer import ByteBpe, byte_bpe, load_tokenizer
from electra_ds.data.tokenizer.byte_alphabet import (
    LETTER,
    NUMBER,
    OTHER,
    SPELLINGS,
    WHITE_SPACE,
    class_of_bytes,
)

ADDED = ["|||IP_ADDRESS|||", "[unused3]", "    ", "[MASK]", "<|endoftext|>", "[CLS]"]
CHARACTERS = st.one_of(
    st.sampled_from(
        list(TEXT) + list(" \t\n\r\x00\x0b\x1c\x85\xa0\u200b\u200d\u2028\ufeff\u0301\u05d0'[]|")
    ),
    st.characters(exclude_categories=["Cs"]),
)
TEXTS = st.builds(
    lambda parts, form: unicodedata.normalize(form, "".join(parts)) if form else "".join(parts),
    st.lists(st.one_of(CHARACTERS, st.sampled_from([*ADDED, " river", "  ", "isn't", "😀👍"]))),
    st.sampled_from([None, "NFC", "NFD"]),
)


def joined(lists: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    stock_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT * 3)
    return train_tokenizer(
        [str(folder / "text.txt")], folder / "t", kind="byte_bpe", vocab_size=400
    )


@pytest.fixture(scope="module", params=["stock", "trained"])
def tokenizer(request, folder, trained) -> ByteBpe:
    return load_tokenizer(folder) if request.param == "stock" else trained


# ---------------------------------------------------------------------------------------------- ids


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXTS, max_size=3))
def test_the_word_cache_returns_the_ids_of_whole_texts(tokenizer, texts):
    expected = [tokenizer.fast.encode(text, add_special_tokens=False).ids for text in texts]
    assert tokenizer.encode_batch(texts) == expected
    special = {token.id for token in tokenizer.vocabulary.added if token.special}
    assert tokenizer.special_ids.unk in special and not special.intersection(joined(expected))
    assert all(ids or not text for ids, text in zip(expected, texts, strict=True)) or (
        tokenizer.normalization == "nfc"  # deletes control characters
    )


def test_a_space_may_be_a_token_of_its_own(tmp_path):
    content = stock_tokenizer(tmp_path)
    content["added_tokens"][-1]["content"] = " "
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    (ids,) = tokenizer.encode_batch(["the old river"])
    assert ids == tokenizer.fast.encode("the old river").ids
    assert ids.count(content["added_tokens"][-1]["id"]) == 2


def test_a_full_cache_is_cleared_and_returns_the_same_ids(trained, monkeypatch):
    expected = trained.encode_batch(TEXT.split("\n"))
    monkeypatch.setattr(byte_bpe, "MAX_CACHED_WORDS", 3)
    assert trained.encode_batch(TEXT.split("\n")) == expected
    trained.encode_batch([])
    trained.encode_batch(["a"])
    assert len(trained._cache) <= 3


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_lines_have_the_ids_of_their_document(tokenizer, text):
    lines, _ = clean_lines(text, tokenizer.normalization)
    lines = [line for line in lines if UNKNOWN not in line]
    ids, lengths = tokenizer.encode_lines([["old"], lines, ["a", "b"]])
    end = " " if tokenizer.normalization == "nfc" else "\n"
    documents = ["old", end.join(lines), f"a{end}b"]
    assert ids.tolist() == joined(tokenizer.encode_batch(documents))
    assert len(lengths) == len(lines) + 3 and lengths.sum() == len(ids)
    if tokenizer.normalization == "nfc_only":  # no other character is lost
        kept = unicodedata.normalize("NFC", text).replace("\r", "\n").split("\n")
        assert lines == [line.strip() for line in kept if line.strip() and UNKNOWN not in line]


def test_an_unknown_word_of_wikitext_is_the_unknown_token(tokenizer):
    ids, _ = tokenizer.encode_lines([[f"the  {UNKNOWN}  river", f"{UNKNOWN} old  {UNKNOWN}"]])
    unk = tokenizer.special_ids.unk
    the, river, old = (tokenizer.encode_batch([t])[0] for t in ("the", " river", " old"))
    between = [] if tokenizer.normalization == "nfc" else tokenizer.encode_batch(["\n"])[0]
    assert ids.tolist() == [*the, unk, *river, *between, unk, *old, unk]
    assert tokenizer.unknown_parts(f"a {UNKNOWN}") == [UNKNOWN]


def test_words_of_a_tagged_text_have_the_space_before_them(tokenizer):
    words = ["old", "river", "(", "été", ""]
    ids = tokenizer.encode_words(words)
    assert joined(ids) == tokenizer.encode_batch(["old river ( été"])[0] and ids[-1] == []


def test_every_byte_has_a_token(trained):
    assert set(SPELLINGS) <= set(trained.names)
    assert trained.names[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert trained.vocab_size == 400 and trained.normalization == "nfc"
    text = "".join(chr(i) for i in range(0xA0, 0x30000, 97) if not 0xD800 <= i <= 0xDFFF)
    assert trained.decode(trained.encode_batch([text])[0]) == trained.normalize(text)


# ------------------------------------------------------------------------------------------- offsets


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_offsets_are_characters_of_the_text(tokenizer, text):
    ids, spans = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode_batch([text])[0]
    covered = Counter(i for start, end in spans for i in range(start, end))
    for i, character in enumerate(text):
        is_lost = tokenizer.normalization == "nfc" and not tokenizer.normalize(character)
        assert i in covered or character.isspace() or is_lost or unicodedata.combining(character)
    for (start, end), token in zip(spans, tokenizer.tokens(ids), strict=True):
        assert 0 <= start <= end <= len(text) and token
        assert text[start:end].strip() == text[start:end] or text[start:end].isspace()


def test_the_parts_of_a_character_have_its_span(trained):
    composed = "e\u0327\u0306"  # one character in NFC, of three bytes
    text = f"old \U0001f9ea river {composed}"
    _, spans = trained.encode_with_offsets(text)
    parts = [text[start:end] for start, end in spans]
    assert parts.count("\U0001f9ea") > 1 and parts.count(composed) > 1
    assert list(dict.fromkeys(filter(None, parts))) == ["old", "\U0001f9ea", "river", composed]


# ------------------------------------------------------------------------------------------- display


def test_tokens_are_readable(trained):
    tokens = trained.tokens(trained.encode_batch(["the café old \U0001f9ea\n"])[0])
    assert tokens[0] == "the" and tokens[-1] == "▁"  # the normalization makes line ends spaces
    assert "".join(tokens) == "the▁café▁old▁\\xf0\\x9f\\xa7\\xaa▁"
    assert trained.tokens([trained.special_ids.mask]) == ["[MASK]"]
    assert not any("\ufffd" in token or "Ġ" in token for token in trained.tokens(range(400)))
    ids = trained.encode_batch(["old café \U0001f9ea"])[0]
    special = trained.special_ids
    assert trained.decode([special.cls, *ids, special.sep]) == "[CLS] old café \U0001f9ea [SEP]"
    assert trained.decode(ids[:-1]).startswith("old café \\xf0")


# --------------------------------------------------------------------------------------- word starts


def starts_of(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """(ids, numbers of the tokens that begin a word) of a text."""
    ids = np.array(tokenizer.encode_batch([text]))
    begins = tokenizer.begins_word()[ids] | class_changes(ids, tokenizer.edge_classes())
    begins[:, 0] = True  # the row begins with a special token
    return ids[0].tolist(), np.flatnonzero(begins[0]).tolist()


@pytest.mark.parametrize(
    "text",
    [
        "the old river, and(island) running walked word3 3 123 x1y22 a.b.c --old-- 12.5",
        "東京 日本語 한국어.Привет мир! \U0001f9ea😀 island שלום ωж ж7",
        "old\n\nriver\n island\t(old) [unused3] [river]",
    ],
)
def test_words_are_the_parts_of_the_pre_tokenizer(tokenizer, text):
    ids, starts = starts_of(tokenizer, text)
    _, spans = tokenizer.encode_with_offsets(text)
    parts = tokenizer.fast.pre_tokenizer.pre_tokenize_str(tokenizer.normalize(text))
    begins = {start for _, (start, _) in parts}
    raw = tokenizer.fast.encode(text).offsets
    expected = [i for i, (start, _) in enumerate(raw) if start in begins and start >= raw[i - 1][1]]
    if "[unused3]" not in text:
        assert starts == [0, *expected]
    assert len(spans) == len(ids) > len(starts) > 5


def test_whole_words_are_masked(tokenizer):
    ids, starts = starts_of(tokenizer, "the old river, and(island) walked word3 été \U0001f9ea!")
    special = tokenizer.special_ids
    row = np.array([[special.cls, *ids, special.sep]])
    recipe = MaskingRecipe(
        *("best_fit", special, 0.4, 1.0, 7, "whole_word"),
        *(tokenizer.begins_word(), tokenizer.edge_classes()),
    )
    words = [set(part) for part in np.split(np.arange(1, len(ids) + 1), starts[1:])]
    assert max(map(len, words)) > 1
    changes = set()  # (number of a word that is masked, next word that is not), and the reverse
    for seed in range(300):
        bits = np.random.default_rng(seed).integers(0, 2**32, row.shape, np.uint32)
        positions, used = select_masked_positions(row, recipe, bits)
        masked = set(positions[0][used[0]].tolist())
        assert sum(bool(word & masked) and not word <= masked for word in words) <= 1
        full = [word <= masked for word in words]
        changes |= {(i, full[i]) for i in range(len(words) - 1) if full[i] != full[i + 1]}
    assert len(changes) == 2 * (len(words) - 1)  # neighbours are masked independently


def test_marks_and_parts_of_characters_stay_in_their_word(trained):
    text = "नमस्ते old"  # its marks are no letters for the pre-tokenizer
    _, starts = starts_of(trained, text)
    assert len(starts) == 2
    _, starts = starts_of(trained, "\U0001f9ea old")
    assert len(starts) == 2


def test_the_class_of_a_character_by_its_first_bytes():
    for text, kind in {
        "a": LETTER,
        "é": LETTER,
        "水": LETTER,
        "7": NUMBER,
        " ": WHITE_SPACE,
    }.items():
        assert class_of_bytes(text.encode()) == kind
    assert class_of_bytes("\u0301".encode()) == LETTER and class_of_bytes(b"\x00") == OTHER
    assert class_of_bytes("水".encode()[:2]) == class_of_bytes(b"\xe5") == LETTER
    assert class_of_bytes("😀".encode()[:3]) == class_of_bytes(b"\xf0") == OTHER
    assert class_of_bytes(b"\xa9") == class_of_bytes(b"") == class_of_bytes(b"\xff") == 0


# --------------------------------------------------------------------------------------------- files


def test_saved_tokenizers_are_read_again(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.fingerprint, again.content) == (tokenizer.fingerprint, tokenizer.content)
    assert json.loads((tmp_path / "options.json").read_text())["kind"] == "byte_bpe"
    for options in ({"lowercase": False}, {"normalization": "none"}):
        with pytest.raises(UserError, match="expected no such option"):
            load_tokenizer(tmp_path, **options)
    assert load_tokenizer(tmp_path, normalization=tokenizer.normalization)


def test_the_bytes_of_the_file_do_not_matter(folder, tmp_path):
    content = stock_tokenizer(tmp_path)
    vocabulary = dict(reversed(content["model"]["vocab"].items()))
    content["model"] |= {
        "vocab": vocabulary,
        "merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "unk_token": "[UNK]",
    }
    content |= {"truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0}}
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=1))
    again, first = load_tokenizer(tmp_path / "tokenizer.json"), load_tokenizer(folder)
    assert again.fingerprint == first.fingerprint
    assert len(again.encode_batch(["the old river " * 9])[0]) > 20  # not truncated


def test_an_options_json_of_another_tokenizer_is_refused(trained, tmp_path):
    trained.save(tmp_path)
    options = json.loads((tmp_path / "options.json").read_text())
    for key, value in (("fingerprint", "0" * 64), ("kind", "wordpiece"), ("normalization", "nfkc")):
        (tmp_path / "options.json").write_text(json.dumps(options | {key: value}))
        with pytest.raises(UserError, match=f"options.json records {key}"):
            load_tokenizer(tmp_path)


def model(**values):
    return lambda content: content["model"].update(values)


def without(part, key):
    return lambda content: content[part].pop(key)


def added(number, **values):
    return lambda content: content["added_tokens"][number].update(values)


def processor(content):
    content["post_processor"]["single"].pop()


def with_metaspace(content):
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581"}


def use_twice(content):
    content["model"]["vocab"]["the"] = content["model"]["vocab"]["old"]


REFUSED = {
    "another normalizer": (
        lambda c: c.update(normalizer={"type": "NFKC"}),
        r"normalizer: found \{\"type\": \"NFKC\"\}; expected \{\"type\": \"NFC\"\}",
    ),
    "no normalizer": (lambda c: c.update(normalizer=None), "normalizer: found null"),
    "another pre-tokenizer": (with_metaspace, "pre_tokenizer: found .*Metaspace.*ByteLevel"),
    "a space before the text": (
        lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
        "pre_tokenizer.add_prefix_space: found true; expected false",
    ),
    "no division": (
        lambda c: c["pre_tokenizer"].update(use_regex=False),
        "pre_tokenizer.use_regex: found false; expected true",
    ),
    "another decoder": (lambda c: c.update(decoder={"type": "WordPiece"}), "decoder: found"),
    "dropout": (model(dropout=0.1), "model.dropout: found 0.1; expected null"),
    "byte fallback": (model(byte_fallback=True), "model.byte_fallback: found true; expected false"),
    "ignored merges": (model(ignore_merges=True), "model.ignore_merges: found true"),
    "a suffix": (model(end_of_word_suffix="</w>"), "model.end_of_word_suffix: found </w>"),
    "no merges": (without("model", "merges"), "model.merges: found null; expected"),
    "an empty list of merges": (model(merges=[]), "model.merges: found 0 merges; .* have none"),
    "merges of one entry": (model(merges=[["a"]]), "model.merges.0"),
    "merges of an absent entry": (
        lambda c: c["model"]["merges"].append(["the", "zzz"]),
        r"model\.merges\.\d+: found the zzz; expected an entry 'zzz' in model\.vocab",
    ),
    "merges of an absent result": (
        lambda c: c["model"]["merges"].append(["z", "9"]),
        r"model\.merges\.\d+: found z 9; expected an entry 'z9'",
    ),
    "no vocabulary": (without("model", "vocab"), "model.vocab: found null"),
    "an id of two entries": (use_twice, r"model\.vocab: found id \d+ of .* and .*; expected one"),
    "an id too many": (
        lambda c: c["model"]["vocab"].update({"zzz": 10**6}),
        r"found an id|added_tokens|no id",
    ),
    "an entry of many characters": (
        lambda c: c["model"]["vocab"].update({"z" * 1001: 10**6}),
        "model.vocab: found an entry of 1,001 characters; expected 1 to 1,000|added_tokens",
    ),
    "no entry of a byte": (
        lambda c: c["model"]["vocab"].update({"zz": c["model"]["vocab"].pop("\xe3")}),
        r"model\.vocab: found no entry \xe3 \(byte 0xe3\)",
    ),
    "no [SEP]": (added(-9, content="[SEP2]"), r"no \[SEP\] among its \d+ entries"),
    "a special token of text": (added(-7, special=False), r"no \[MASK\] with special = true"),
    "another id": (added(-1, id=3), r"added_tokens\.\d+\.id: found 3; expected \d+"),
    "stripped text": (added(-1, lstrip=True), r"added_tokens\.\d+\.lstrip: found true"),
    "a token of two words": (added(-1, content="two words"), "added_tokens.*: found two words"),
    "a token that is not in NFC": (added(-1, content="e\u0301"), "in Unicode NFC"),
    "a flag that is missing": (lambda c: c["added_tokens"][0].pop("rstrip"), "rstrip: missing"),
    "another template": (
        processor,
        r"post_processor\.single: found \[CLS\] \$A; expected \[CLS\] \$A \[SEP\]",
    ),
    "another post-processor": (
        lambda c: c.update(post_processor={"type": "RobertaProcessing"}),
        "post_processor: found .*RobertaProcessing.*; expected .*TemplateProcessing",
    ),
    "another id of [CLS]": (
        lambda c: c["post_processor"]["special_tokens"]["[CLS]"].update(ids=[3]),
        r"post_processor.special_tokens.\[CLS\].ids: found \[3\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_in_one_sentence(name, tmp_path):
    content = stock_tokenizer(tmp_path)
    change, message = REFUSED[name]
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    text = str(caught.value)
    assert str(tmp_path / "tokenizer.json") in text and "\n" not in text and len(text) < 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"add_prefix_space": True}, "add_prefix_space: found true; expected false"),
        ({"pad_token": "<|padding|>"}, r"pad_token: found <\|padding\|>; expected '\[PAD\]'"),
        ({"mask_token": {"content": "[unused0]"}}, r"mask_token: found \[unused0\]"),
        ({"added_tokens_decoder": {"1": {"content": "x"}}}, "added_tokens_decoder.1: found 'x'"),
        ({"added_tokens_decoder": {"999": {"content": "x"}}}, "expected no such token"),
        ({"added_tokens_decoder": 3}, "added_tokens_decoder = 3"),
    ],
)
def test_a_tokenizer_config_that_contradicts_is_refused(change, message, tmp_path):
    stock_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    for content, message in (
        ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "git lfs pull"),
        ("{", "not valid JSON"),
        ("[]", "found a JSON list"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested more than 64 deep"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path)
    with open(path, "wb") as file:
        file.truncate(1 << 29)
    with pytest.raises(UserError, match="bytes; expected"):
        load_tokenizer(tmp_path)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_content_is_read_or_refused(tmp_path_factory, data):
    """No file of a tokenizer ends in a traceback."""
    folder = tmp_path_factory.mktemp("any")
    stock_tokenizer(folder)
    name = data.draw(st.sampled_from(["tokenizer_config.json", *["tokenizer.json"] * 3]))
    content = json.loads((folder / name).read_text())
    part = content
    for _ in range(data.draw(st.integers(0, 3))):
        keys = sorted(part) if isinstance(part, dict) else range(len(part))
        inner = [part[key] for key in keys if isinstance(part[key], (dict, list)) and part[key]]
        part = data.draw(st.sampled_from(inner)) if inner else part
    keys = sorted(part) if isinstance(part, dict) else range(len(part))
    part[data.draw(st.sampled_from(keys))] = data.draw(VALUES)
    (folder / name).write_text(json.dumps(content))
    try:
        load_tokenizer(folder).encode_with_offsets("the e\u0301 river")
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)


def test_missing_merges_are_said(tmp_path):
    content = stock_tokenizer(tmp_path)
    left, right = content["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.unreachable_names() == [left + right]
    assert "WARNING: 1 entries are made by no merge" in tokenizer.describe()
