"""Byte-level BPE: stock ModernBERT folders with such a tokenizer, and exports that have one."""

import json
import unicodedata
from pathlib import Path

import pytest
import run_folders
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from running import read_json, run_cli
from stock_tokenizer import SPECIAL, TEXT, stock_tokenizer

from data_tools.prepare import prepare
from data_tools.train_tokenizer import train_tokenizer
from electra_ds.common.errors import UserError
from electra_ds.data.shard_format import read_manifest
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.interop.export import export
from electra_ds.interop.hf_tokenizer import write_tokenizer
from electra_ds.interop.import_weights import import_weights
from electra_ds.interop.load_model import load
from electra_ds.training import checkpoint
from electra_ds.training.checkpoint import find_checkpoint

transformers = pytest.importorskip("transformers")
UNUSED_ROWS = 11
SIZES = dict(hidden_size=64, num_heads=2, ffn_size=96)
SETS = ["data.sequence_length=32", "generator.num_layers=2"]
SETS += [f"generator.{key}={value}" for key, value in SIZES.items()]
RANGES = [
    (0x00, 0x24F),
    (0x300, 0x36F),
    (0x370, 0x6FF),
    (0x900, 0x97F),
    (0xE00, 0xEFF),
    (0x1100, 0x11FF),
    (0x1E00, 0x20FF),
    (0x3000, 0x30FF),
    (0x4E00, 0x4E1F),
    (0xAC00, 0xAC3F),
    (0xE000, 0xE00F),
    (0xFB00, 0xFFFD),
    (0x1D400, 0x1D45F),
    (0x1F3F0, 0x1F60F),
    (0xE0000, 0xE007F),
    (0x10FFF0, 0x10FFFF),
]
PARTS = st.one_of(
    st.sampled_from(list(TEXT)),
    st.sampled_from(RANGES).flatmap(lambda ends: st.integers(*ends)).map(chr),
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from(["  ", " " * 9, "\n\n", "\r\n", "\t ", "\u200b", "e\u0301", "👩\u200d👩"]),
    st.sampled_from(
        ["isn't", " river", "'s", "|||IP_ADDRESS|||", "[unused3]", "[unused3", "[MASK"]
    ),
)
TEXTS = st.builds(
    lambda parts, form: unicodedata.normalize(form, "".join(parts)) if form else "".join(parts),
    st.lists(PARTS),
    st.sampled_from([None, "NFC", "NFD", "NFKD"]),
)


def masked_lm(folder: Path) -> transformers.ModernBertForMaskedLM:
    """Write a ModernBertForMaskedLM with a byte-level tokenizer and rows that it does not use."""
    content = stock_tokenizer(folder)
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    torch.manual_seed(3)
    config = transformers.ModernBertConfig(
        vocab_size=len(load_tokenizer(folder).names) + UNUSED_ROWS,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
        local_attention=10,
        **{f"{name[1:-1].lower()}_token_id": ids[name] for name in SPECIAL},
    )
    model = run_folders.drawn(transformers.ModernBertForMaskedLM(config))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    masked_lm(folder)
    return folder


@pytest.fixture(scope="module")
def folders(stock, tmp_path_factory) -> dict[str, tuple]:
    """name -> (our tokenizer, AutoTokenizer of the stock folder or None, that of our export)."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text(TEXT * 3)
    files = [str(folder / "text.txt")]
    trained = train_tokenizer(files, folder / "t", kind="byte_bpe", vocab_size=400)
    found = {"stock": load_tokenizer(stock), "trained": trained}
    made = {}
    for name, tokenizer in found.items():
        write_tokenizer(tokenizer, folder / name, 64, with_token_types=False)
        (folder / name / "config.json").write_text('{"model_type": "modernbert"}')
        assert load_tokenizer(folder / name).fingerprint == tokenizer.fingerprint
        theirs = transformers.AutoTokenizer.from_pretrained(stock) if name == "stock" else None
        exported = transformers.AutoTokenizer.from_pretrained(folder / name)
        made[name] = (tokenizer, theirs, exported)
    return made


# ----------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize("name", ["stock", "trained"])
def test_ids_are_those_of_auto_tokenizer(folders, name):
    ours, theirs, exported = folders[name]

    @settings(max_examples=400, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        assume(not any(token.content in text for token in ours.vocabulary.added if token.special))
        ids = ours.encode_batch([text])[0]
        for auto in filter(None, (theirs, exported)):
            assert auto(text, add_special_tokens=False)["input_ids"] == ids
        assert ours.encode_with_offsets(text)[0] == ids

    check()


def test_the_exported_tokenizer_means_what_the_stock_one_means(folders):
    ours, theirs, exported = folders["stock"]
    text = "the [MASK] river  and [unused2] |||IP_ADDRESS||| <|endoftext|> [CLS]"
    for call in (dict(), dict(text_pair="an old island"), dict(add_special_tokens=False)):
        assert dict(exported(text, **call)) == dict(theirs(text, **call))
    pair = exported("old", "river")
    special = ours.special_ids
    (a, b) = ours.encode_batch(["old", "river"])
    assert pair["input_ids"] == [special.cls, *a, special.sep, *b, special.sep]
    assert list(pair) == ["input_ids", "attention_mask"]
    ids = theirs(text)["input_ids"]
    assert exported.decode(ids) == theirs.decode(ids)
    roles = ("pad", "unk", "cls", "sep", "mask")
    for role in roles:
        assert getattr(exported, f"{role}_token_id") == getattr(special, role)
        assert getattr(theirs, f"{role}_token_id") == getattr(special, role)
    assert special.mask in ids and special.cls in ids[1:]  # of the literal tokens in the text
    own = ours.encode_batch([text])[0]
    assert not {special.mask, special.cls}.intersection(own)
    assert ours.decode(own) == text


# -------------------------------------------------------------------------------------------- folders


@torch.no_grad()
def test_a_stock_folder_is_imported_and_exported_again(stock, tmp_path):
    model = transformers.AutoModelForMaskedLM.from_pretrained(stock).eval()
    report = import_weights(stock, tmp_path / "i", "modern-tiny", SETS)
    words = load_tokenizer(tmp_path / "i" / "tokenizer")
    assert words.fingerprint == load_tokenizer(stock).fingerprint
    config = read_json(tmp_path / "i" / "config.json")
    assert config["model"]["vocab_size"] == words.vocab_size
    assert config["data"]["special_ids"] == words.special_ids.model_dump()
    weights = checkpoint.weights(find_checkpoint(tmp_path / "i"))
    table = model.model.embeddings.tok_embeddings.weight
    assert torch.equal(weights["embeddings.word.weight"], table[: words.vocab_size])
    assert len(table) == words.vocab_size + UNUSED_ROWS and not report.unused

    export(tmp_path / "i", tmp_path / "hf")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "hf" / "discriminator")
    generator = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "hf" / "generator")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf" / "generator")
    batch = tokenizer(["the [MASK] river", "été 東京 😀"], padding=True, return_tensors="pt")
    theirs = transformers.AutoTokenizer.from_pretrained(stock)
    assert (
        batch["input_ids"].tolist()
        == theirs(["the [MASK] river", "été 東京 😀"], padding=True)["input_ids"]
    )
    hidden = again.eval().model(**batch).last_hidden_state
    expected = model.model(**batch).last_hidden_state
    real = batch["attention_mask"] > 0
    assert torch.allclose(hidden[real], expected[real], atol=1e-5)
    assert generator.config.vocab_size == words.vocab_size
    assert generator.config.pad_token_id == words.special_ids.pad
    import_weights(tmp_path / "hf", tmp_path / "j", "modern-tiny", SETS)
    assert load_tokenizer(tmp_path / "j" / "tokenizer").fingerprint == words.fingerprint


@torch.no_grad()
def test_a_stock_folder_is_loaded(stock):
    loaded = load(stock)
    ids = loaded.input_ids(["the old river 😀", "été"])
    mask = (ids != loaded.tokenizer.special_ids.pad).long()
    model = transformers.AutoModelForMaskedLM.from_pretrained(stock).eval()
    logits = model(ids, attention_mask=mask).logits[..., : loaded.tokenizer.vocab_size]
    ours = loaded.generator(ids, None, mask)
    assert torch.allclose(ours[mask > 0], logits[mask > 0], atol=1e-5)


def test_data_is_prepared_with_a_stock_folder(stock, tmp_path):
    lines = TEXT.strip().split("\n")
    (tmp_path / "text.txt").write_text("\n\n".join([TEXT, TEXT.upper(), TEXT.title()]))
    run_cli(
        *("prepare", "--input", tmp_path / "text.txt", "--tokenizer", stock, "--out"),
        *(tmp_path / "d", "--sequence-length", 512, "--valid-fraction", 0),
    )
    manifest = read_manifest(tmp_path / "d")
    tokenizer = load_tokenizer(stock)
    assert manifest.tokenizer.kind == "byte_bpe"
    assert manifest.tokenizer.sha256 == tokenizer.fingerprint
    assert load_tokenizer(tmp_path / "d" / "tokenizer").fingerprint == tokenizer.fingerprint
    assert manifest.unknowns.found == 0
    shown = run_cli("inspect", tmp_path / "d", *range(manifest.splits["train"].rows)).stdout
    assert lines[0] in shown and "Ġ" not in shown


def test_rows_have_the_ids_of_the_cleaned_documents(stock, tmp_path):
    documents = [
        "the old\n  river\n\n\tan été  island \r\n\x00 e\u0301 \u200b",
        "\n 😀👍 \n",
        "[MASK] a",
    ]
    lines = [json.dumps({"text": text}) for text in documents]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    prepare([str(tmp_path / "text.jsonl")], stock, tmp_path / "d", valid_fraction=0)
    tokenizer = load_tokenizer(stock)
    reader = ShardReader(tmp_path / "d", "train")
    rows, found = reader.block(0), []
    for row, start, length, *_ in reader.fragments(0).tolist():
        found.append(rows[row, start : start + length].tolist())
    cleaned = ["the old\nriver\nan été  island\n\x00 \u00e9 \u200b", "😀👍", "[MASK] a"]
    auto = transformers.AutoTokenizer.from_pretrained(stock)
    expected = tokenizer.encode_batch(cleaned)
    assert sorted(found) == sorted(expected)
    assert expected[:2] == auto(cleaned[:2], add_special_tokens=False)["input_ids"]


def test_the_card_of_tags_gives_words_with_their_spaces(tmp_path):
    run_folders.fine_tuned(tmp_path / "seed-0", "token_classification", "modernbert")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}x{i * i} {i}" * 9 for i in range(200)))
    (tmp_path / "seed-0" / "tokenizer" / "vocab.txt").unlink()
    out = tmp_path / "seed-0" / "tokenizer"
    train_tokenizer([str(tmp_path / "text.txt")], out, kind="byte_bpe", vocab_size=600)
    export(tmp_path / "seed-0", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'tokenizer("A short text .", return_tensors="pt")' in card
    assert "| tokenizer | byte_bpe, 600 entries, normalization nfc |" in card


def test_a_stock_folder_with_another_tokenizer_is_refused(stock, tmp_path):
    content = stock_tokenizer(tmp_path / "other")
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "other" / name).symlink_to(stock / name)
    for reader in (load, lambda path: import_weights(path, tmp_path / "i", "modern-tiny", SETS)):
        with pytest.raises(UserError, match=r"tokenizer\.json: pre_tokenizer\.add_prefix_space"):
            reader(tmp_path / "other")
    assert not (tmp_path / "i").exists()
