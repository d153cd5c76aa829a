"""Files of tokenizers as people have them: vocab.txt, options.json, Hugging Face's JSON files."""

import json
import os
import shutil
import threading
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.train_tokenizer import train_tokenizer
from electra_ds.common.errors import UserError
from electra_ds.data.data_tokenizer import copy_tokenizer
from electra_ds.data.shard_format import TokenizerInfo
from electra_ds.data.tokenizer import WordPiece, load_tokenizer, saving
from electra_ds.interop.hf_tokenizer import write_tokenizer

ENTRIES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "river", "##s", "Old"]
CONTENT = "".join(f"{entry}\n" for entry in ENTRIES)


def write(folder, content: str | bytes):
    data = content.encode() if isinstance(content, str) else content
    (folder / "vocab.txt").write_bytes(data)
    return folder / "vocab.txt"


# ------------------------------------------------------------------------------------------ vocab.txt


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + CONTENT,
        CONTENT + "\n\n",
        CONTENT + "\n" * 7,
        CONTENT.rstrip("\n"),
        CONTENT.replace("\n", "\r\n"),
        "\ufeff" + CONTENT.replace("\n", "\r\n") + "\r\n\r\n",
    ],
    ids=["BOM", "two blank lines", "padded", "no final newline", "CRLF", "all"],
)
def test_a_vocabulary_is_read_as_editors_save_it(tmp_path, content):
    tokenizer = load_tokenizer(write(tmp_path, content))
    assert tokenizer.names == ENTRIES
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.fingerprint, again.names) == (tokenizer.fingerprint, ENTRIES)


def test_a_blank_last_entry_that_is_on_record_stays(tmp_path):
    (tmp_path / "options.json").write_text('{"vocab_size": 10, "lowercase": false}')
    assert load_tokenizer(write(tmp_path, CONTENT + "\n")).names == [*ENTRIES, ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT + "the\n", r"'the' occurs twice \(lines 6 and 10\)"),
        (CONTENT.replace("the\n", "\n\n") + "x\n", r"two lines are blank \(lines 6 and 7\)"),
        (CONTENT + "\x1b[2Jx\n\x1b[2Jx\n", r"x1b\[2Jx' occurs twice"),
        (b"\xff\xfe", "not UTF-8"),
        ("", r"no \[PAD\]"),
    ],
)
def test_a_malformed_vocabulary_is_described(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(write(tmp_path, content))


def test_paths_and_models_that_cannot_be_read_are_refused(tmp_path):
    for path in ("x" * 5000, tmp_path / ("y" * 300), "nul\0", tmp_path / "vocab.txt" / "below"):
        with pytest.raises(UserError, match=r"not found|cannot be read"):
            load_tokenizer(path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"
    for name in ("vocab.txt", "spm.model"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(UserError, match="git lfs pull"):
            load_tokenizer(tmp_path / name)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_model_is_read_or_refused(tmp_path_factory, model, data):
    content = bytearray(model)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), len(content) // 2, 0]))]
    path = tmp_path_factory.mktemp("damaged") / "spm.model"
    path.write_bytes(bytes(content))
    try:
        load_tokenizer(path).encode_with_offsets("e\u0301 river")
    except UserError as error:
        assert str(path) in str(error)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("model")
    (folder / "t.txt").write_text("the old river and the \u00e9cole \u6c34\n" * 40)
    return train_tokenizer([str(folder / "t.txt")], folder, kind="bpe", vocab_size=64).content


# ------------------------------------------------------------------------------------------- options


def test_arguments_count_where_no_file_states_an_option(tmp_path):
    guessed = load_tokenizer(write(tmp_path, CONTENT))
    assert guessed.guessed and guessed.options == {"lowercase": False, "strip_accents": False}
    assert guessed.normalization == "none" and "guessed" in guessed.describe()
    told = load_tokenizer(tmp_path, lowercase=True, strip_accents=False, normalization="nfc")
    assert not told.guessed and told.options == {"lowercase": True, "strip_accents": False}
    told.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved", lowercase=True)
    assert (again.fingerprint, again.normalization) == (told.fingerprint, "nfc")
    for options in ({"lowercase": False}, {"strip_accents": True}, {"normalization": "none"}):
        with pytest.raises(UserError, match=r"options.json: .* was requested"):
            load_tokenizer(tmp_path / "saved", **options)


def test_normalization_is_a_part_of_the_fingerprint_where_it_changes_ids():
    def fingerprint(normalization, **options) -> str:
        options = {"lowercase": True, "strip_accents": False} | options
        return WordPiece(CONTENT.encode(), options, "test", normalization).fingerprint

    assert fingerprint("nfc") != fingerprint("none")
    # BERT decomposes text of which it strips the accents.
    assert fingerprint("nfc", strip_accents=True) == fingerprint("none", strip_accents=True)
    with pytest.raises(UserError, match="normalization = 'nfkc'"):
        fingerprint("nfkc")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lowercase", "yes", "lowercase = 'yes'"),
        ("lowercase", 1, "lowercase = 1"),
        ("vocab_size", -1, "vocab_size = -1"),
        ("vocab_size", 10**15, "vocab_size"),
        ("vocab_size", 12, "records vocab_size = 12, but the vocabulary with these options has 9"),
        ("special_ids", {"pad": 3}, "records special_ids"),
        ("special_ids", [], "special_ids"),
        ("fingerprint", "0" * 64, "records fingerprint"),
        ("normalization", "NFD", "normalization = 'NFD'"),
        ("kind", "sentencepiece", "records kind = sentencepiece"),
        ("lower_case", True, "lower_case: unknown key"),
    ],
)
def test_wrong_options_are_described(tmp_path, key, value, message):
    load_tokenizer(write(tmp_path, CONTENT)).save(tmp_path)
    options = json.loads((tmp_path / "options.json").read_text())
    (tmp_path / "options.json").write_text(json.dumps(options | {key: value}))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


# ----------------------------------------------------------------------------- an interrupted save


def states_of(monkeypatch, folder, save):
    """Copies of a folder before and after each change of a name during `save`, in order."""
    states = []

    def watched(change):
        def call(*arguments, **options):
            states.append(shutil.copytree(folder, folder.parent / f"state-{len(states)}"))
            change(*arguments, **options)
            states.append(shutil.copytree(folder, folder.parent / f"state-{len(states)}"))

        return call

    folder.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rename"):
            patch.setattr(os, name, watched(getattr(os, name)))
        patch.setattr(Path, "unlink", watched(Path.unlink))
        save(folder)
    return states


def loaded(folder):
    """Fingerprint of the tokenizer in a folder; None without one."""
    try:
        return load_tokenizer(folder).fingerprint
    except UserError as error:
        assert "no vocabulary in this folder" in str(error), error
        return None


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Tokenizers: two of WordPiece with other entries, one with other options, a SentencePiece."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "in.txt").write_text("the river is old .\n\nthe house of stone .\n\n" * 40)
    first = load_tokenizer(write(folder, CONTENT))
    longer = WordPiece((CONTENT + "house\n").encode(), first.options, "longer")
    other = WordPiece(CONTENT.encode(), {"lowercase": True, "strip_accents": True}, "other")
    (folder / "T").mkdir()
    model = train_tokenizer([str(folder / "in.txt")], folder / "T", kind="unigram", vocab_size=64)
    return {"first": first, "longer": longer, "options": other, "sentencepiece": model}


@pytest.mark.parametrize("new", ["longer", "options", "sentencepiece"])
@pytest.mark.parametrize("old", ["none", "vocab.txt alone", "first", "sentencepiece"])
def test_an_interrupted_save_leaves_the_old_tokenizer_or_the_new_one(
    tmp_path, monkeypatch, tokenizers, old, new
):
    folder = tmp_path / "T"
    folder.mkdir()
    if old == "vocab.txt alone":
        write(folder, CONTENT)
    elif old != "none":
        tokenizers[old].save(folder)
    before, after = loaded(folder), tokenizers[new].fingerprint
    states = [loaded(state) for state in states_of(monkeypatch, folder, tokenizers[new].save)]
    if before == after:
        assert not states  # equal files are left as they are
        return
    change = states.index(after)
    assert states == [before] * change + [after] * (len(states) - change)
    assert loaded(folder) == after and not list(folder.glob(".*"))


def test_a_save_after_an_interrupted_one_completes_it(tmp_path, monkeypatch, tokenizers):
    folder = tmp_path / "T"
    tokenizers["first"].save(folder)
    states_of(monkeypatch, folder, tokenizers["longer"].save)
    for number, state in enumerate(sorted(tmp_path.glob("state-*"))):
        name = "longer" if number % 2 else "first"
        tokenizers[name].save(state)
        assert loaded(state) == tokenizers[name].fingerprint
        assert load_tokenizer(state / "vocab.txt").fingerprint == loaded(state)


def test_the_copy_of_a_tokenizer_into_a_run_is_whole_or_not_there(
    tmp_path, monkeypatch, tokenizers
):
    tokenizer = tokenizers["longer"]
    tokenizer.save(tmp_path / "data" / "tokenizer")
    info = TokenizerInfo(
        kind=tokenizer.kind,
        sha256=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
    )
    (tmp_path / "run").mkdir()
    states = states_of(
        monkeypatch,
        tmp_path / "run",
        lambda folder: copy_tokenizer(info, tmp_path / "data" / "tokenizer", folder),
    )
    assert {loaded(state) for state in states} == {None, tokenizer.fingerprint}


# -------------------------------------------------------------------------------------- tokenizer.json


@pytest.fixture
def exported(tmp_path):
    """A folder with the tokenizer.json of BERT alone, as newer versions of transformers save it."""
    tokenizer = load_tokenizer(write(tmp_path, CONTENT))
    write_tokenizer(tokenizer, tmp_path / "hf", 64)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / "hf" / name).unlink()
    return tmp_path / "hf", tokenizer


def changed(folder, change) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_tokenizer_json_alone_is_read(exported):
    folder, tokenizer = exported
    for path in (folder, folder / "tokenizer.json"):
        again = load_tokenizer(path)
        assert (again.content, again.options) == (tokenizer.content, tokenizer.options)
        assert again.normalization == "none" and not again.guessed
    with pytest.raises(UserError, match="lowercase = False, but True was requested"):
        load_tokenizer(folder, lowercase=True)


def test_a_tokenizer_json_beside_the_vocabulary_states_the_casing(exported):
    folder, _ = exported
    changed(folder, lambda content: content["normalizer"].update(lowercase=True))
    write(folder, CONTENT)
    assert load_tokenizer(folder).options == {"lowercase": True, "strip_accents": False}


def test_special_tokens_that_are_only_added_are_entries(exported):
    folder, _ = exported

    def change(content):
        del content["model"]["vocab"]["Old"]
        content["added_tokens"].append({"id": 8, "content": "[E]", "special": True})

    changed(folder, change)
    assert load_tokenizer(folder).names[-1] == "[E]"


def test_accents_that_are_not_stated_follow_the_casing(exported):
    folder, _ = exported
    changed(folder, lambda content: content["normalizer"].update(lowercase=True))
    changed(folder, lambda content: content["normalizer"].pop("strip_accents"))
    assert load_tokenizer(folder).options == {"lowercase": True, "strip_accents": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model"), "a model of type None"),
        (lambda c: c["model"].pop("type"), "a model of type None"),
        (lambda c: c.pop("normalizer"), "a normalizer of type None"),
        (lambda c: c.update(normalizer=None), "a normalizer of type None"),
        (lambda c: c["normalizer"].pop("lowercase"), "normalizer: lowercase: missing"),
        (lambda c: c["normalizer"].update(lowercase="no"), "lowercase = 'no'"),
        (lambda c: c["normalizer"].update(clean_text=False), "clean_text = false"),
        (lambda c: c["model"].pop("vocab"), "model.vocab: missing"),
        (lambda c: c["model"].update(vocab=[["a", 0]]), "model.vocab"),
        (lambda c: c["model"]["vocab"].update(the=10**15), "ids with gaps"),
        (lambda c: c["model"]["vocab"].update({"a\nb": 9}), "an entry with a line end"),
        (lambda c: c["model"].update(type="Unigram"), "a model of type 'Unigram'"),
        (lambda c: c["model"].update(type="BPE"), "normalizer: found .* expected .*NFC"),
        (lambda c: c["model"].update(max_input_chars_per_word=5), "max_input_chars_per_word = 5"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer = Whitespace"),
        (lambda c: c.update(added_tokens={"a": 1}), "added_tokens"),
        (
            lambda c: c["added_tokens"].append({"id": 9, "content": "own"}),
            "added tokens such as 'own'",
        ),
    ],
)
def test_other_tokenizers_are_refused(exported, change, message):
    folder, _ = exported
    changed(folder, change)
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_content_is_read_or_refused(tmp_path_factory, data):
    """No file of a tokenizer ends in a traceback."""
    folder = tmp_path_factory.mktemp("any")
    write(folder, CONTENT)
    tokenizer = load_tokenizer(folder)
    tokenizer.save(folder)
    write_tokenizer(tokenizer, folder / "hf", 64)
    name = data.draw(st.sampled_from(["options.json", "tokenizer_config.json", "tokenizer.json"]))
    folder = folder if name == "options.json" else folder / "hf"
    if name == "tokenizer.json":
        (folder / "vocab.txt").unlink()
    content = json.loads((folder / name).read_text())
    part = content
    for _ in range(data.draw(st.integers(0, 2))):
        inner = [value for value in part.values() if isinstance(value, dict) and value]
        part = data.draw(st.sampled_from(inner)) if inner else part
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(VALUES)
    (folder / name).write_text(json.dumps(content))
    try:
        load_tokenizer(folder)
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("options", "unreachable"), [({"strip_accents": True}, ["für", "が"]), ({}, [])]
)
def test_entries_that_no_text_gives_are_named(tmp_path, options, unreachable):
    file = tmp_path / "vocab.txt"
    file.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfür\nが\nfur\n", encoding="utf-8")
    tokenizer = load_tokenizer(file, **options)
    assert tokenizer.unreachable_names() == unreachable
    assert ("WARNING: 2 entries" in tokenizer.describe()) == bool(unreachable)


def test_an_entry_whose_normalization_would_take_long_is_refused(tmp_path, monkeypatch):
    """Unicode's order of a run of combining marks takes quadratic time."""
    normalize = unicodedata.normalize
    lengths = [0]

    def measured(form, text):
        lengths.append(len(text))
        return normalize(form, text)

    monkeypatch.setattr(unicodedata, "normalize", measured)
    path = write(tmp_path, CONTENT + "a" + "\u0301\u0323" * 10_000 + "\n")
    with pytest.raises(UserError, match=r"line 10 has 20,001 characters; expected .* 1,000"):
        load_tokenizer(path)
    assert max(lengths) < 2000


def test_two_saves_at_the_same_time_leave_one_of_the_tokenizers(tmp_path, monkeypatch):
    """The second save begins between the two files of the first one."""
    first = load_tokenizer(write(tmp_path, CONTENT))
    (tmp_path / "other").mkdir()
    second = load_tokenizer(write(tmp_path / "other", CONTENT + "more\n"))
    thread = threading.Thread(target=second.save, args=(tmp_path / "both",))
    write_bytes = saving.write_bytes

    def interleaved(path, data):
        if path.name == saving.OPTIONS and not thread.ident:
            thread.start()
            thread.join(0.3)  # without the lock, it ends in this time
        write_bytes(path, data)

    monkeypatch.setattr(saving, "write_bytes", interleaved)
    first.save(tmp_path / "both")
    thread.join()
    assert load_tokenizer(tmp_path / "both").fingerprint == second.fingerprint
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == [
        "options.json",
        "vocab.txt",
    ]
