"""One text, one sequence of ids: in `prepare`, in the tokenizer, and in the exported tokenizer."""

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import FILES
from sentencepiece import SentencePieceNormalizer, sentencepiece_model_pb2
from tokenizers import Tokenizer as FastTokenizer

from data_tools.pipeline.clean import clean_lines
from data_tools.train_tokenizer import train_tokenizer
from electra_ds.common.errors import UserError
from electra_ds.data.tokenizer import SentencePiece, Tokenizer, WordPiece, load_tokenizer
from electra_ds.data.tokenizer.normalization import FORMS as FORMS_OF_TEXT
from electra_ds.data.tokenizer.normalization import normalize
from electra_ds.interop.hf_tokenizer import write_tokenizer

transformers = pytest.importorskip("transformers")
# Letters and marks that the texts below are made of; all of them are in the vocabularies.
SAMPLE = " ".join(
    [
        "Gr\u00f6\u00dfe na\u00efve old river ijJ J\u030c",
        "\ud55c\uad6d\uc5b4 \u5de8\u5927 \uff76\uff9e \u30ac\uff5e",
        "\u0410\u0301\u0432\u0441\u0442\u0440\u0438\u044f \u039f\u0394\u039f\u03a3 \u039f\u03b4\u03cc\u03c2",
        "\u0928\u093f \u0e19\u0e33 \u0639\u064e\u0631\u0628\u064a",
    ]
)
RANGES = [
    (0x00, 0x17F),
    (0x300, 0x36F),
    (0x370, 0x52F),
    (0x590, 0x6FF),
    (0x900, 0x97F),
    (0xE00, 0xEFF),
    (0x1100, 0x11FF),
    (0x1E00, 0x20FF),
    (0x3040, 0x30FF),
    (0x4E00, 0x4E1F),
    (0xAC00, 0xAC3F),
    (0xD800, 0xD803),
    (0xE000, 0xE00F),
    (0xFF00, 0xFFFD),
    (0x1D400, 0x1D45F),
    (0x1F3F0, 0x1F60F),
    (0xE0000, 0xE007F),
    (0x10FFF0, 0x10FFFF),
]
CHARACTERS = st.one_of(
    st.sampled_from(
        SAMPLE
        + " \t\n\r\x0b\x0c\x1c\x85\u2028\u200b\u200d\u2581\ufeff\ufffd\xad\u2060\u200e\u202c\u0301\u0323"
    ),
    st.sampled_from(RANGES).flatmap(lambda ends: st.integers(*ends)).map(chr),
    st.characters(),
)
FORMS = st.sampled_from([None, "NFC", "NFD", "NFKD"])
TEXTS = st.builds(
    lambda text, form: unicodedata.normalize(form, text) if form else text,
    st.text(CHARACTERS),
    FORMS,
)
CASES = {
    "wordpiece": dict(kind="wordpiece"),
    "cased": dict(kind="wordpiece", lowercase=False),
    "accents": dict(kind="wordpiece", strip_accents=False),
    "bpe": dict(kind="bpe"),
    "bpe-cased": dict(kind="bpe", lowercase=False),
    "unigram": dict(kind="unigram"),
    "unigram-cased": dict(kind="unigram", lowercase=False),
}


def encodable(text: str) -> str:
    """The text without surrogates: no library takes them, and our tokenizers leave them out."""
    return "".join(c for c in text if not 0xD800 <= ord(c) <= 0xDFFF)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, tuple]:
    """name -> (our tokenizer, tokenizer.json in its library, AutoTokenizer)."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text(f"{SAMPLE}\n\n" * 40)
    made = {
        name: train_tokenizer([str(folder / "text.txt")], folder / name, vocab_size=160, **options)
        for name, options in CASES.items()
    }
    made["bert"] = WordPiece(made["cased"].content, made["cased"].options, "bert", "none")
    return {name: (ours, *exported(ours, folder / f"{name}-hf")) for name, ours in made.items()}


def exported(tokenizer: Tokenizer, folder) -> tuple:
    write_tokenizer(tokenizer, folder, 64)
    (folder / "config.json").write_text('{"model_type": "electra"}')
    again = load_tokenizer(folder)
    assert (again.fingerprint, again.normalization) == (
        tokenizer.fingerprint,
        tokenizer.normalization,
    )
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    return fast, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", [*CASES, "bert"])
def test_every_path_gives_the_ids_of_the_tokenizer(tokenizers, name):
    ours, fast, auto = tokenizers[name]

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        ids = ours.encode_batch([text])[0]
        plain = encodable(text)
        assert fast.encode(plain, add_special_tokens=False).ids == ids
        assert auto(plain, add_special_tokens=False)["input_ids"] == ids
        lines, _ = clean_lines(plain, ours.normalization)  # as prepare divides a document
        assert ours.encode_normalized(lines)[0].tolist() == ids
        offset_ids, spans = ours.encode_with_offsets(text)
        assert offset_ids == ids
        assert all(0 <= start <= end <= len(text) for start, end in spans)

    check()


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from(FORMS_OF_TEXT))
def test_a_normalized_text_stays_as_it_is(text, form):
    once = normalize(text, form)
    assert normalize(once, form) == once
    once.encode()  # no surrogates
    if form == "nfc":
        assert unicodedata.is_normalized("NFC", once) or any(map(is_new, once))


def is_new(character: str) -> bool:
    """Whether a character may be newer than Unicode 9, the tables of the library tokenizers."""
    return unicodedata.ucd_3_2_0.category(character) == "Cn"


def test_composed_and_decomposed_text_have_equal_ids(tokenizers):
    decomposed = unicodedata.normalize("NFD", SAMPLE.replace("old", "o\u200bld"))
    for name, (ours, *_) in tokenizers.items():
        composed_ids, decomposed_ids = ours.encode_batch([SAMPLE, decomposed])
        is_equal = composed_ids == decomposed_ids
        assert is_equal == (name != "bert"), name  # BERT's own code does not compose


# -------------------------------------------------------------------- models with rules of their own


def with_rules(tokenizer: Tokenizer, name: str) -> SentencePiece:
    """The model with SentencePiece's rules, as version 0.1 trained it."""
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)
    rules = SentencePieceNormalizer(rule_name=name).serialized_model_proto()
    model.normalizer_spec.CopyFrom(
        sentencepiece_model_pb2.ModelProto.FromString(rules).normalizer_spec
    )
    return SentencePiece(model.SerializeToString(), {}, name)


@pytest.mark.parametrize("rules", ["nmt_nfkc", "nmt_nfkc_cf", "nfkc", "nfkc_cf"])
def test_a_model_of_version_0_1_is_exported_with_its_ids(tokenizers, rules, tmp_path):
    ours = with_rules(tokenizers["bpe" if rules.endswith("cf") else "bpe-cased"][0], rules)
    fast, auto = exported(ours, tmp_path / "hf")
    for text in (
        SAMPLE,
        unicodedata.normalize("NFD", SAMPLE),
        "\u041e\u0301 \u1ecc\u0300\u1e62 M\u0304 J\u030c \u0116\u0301 H\u0331 \u03aa\u0301",
        "\uff5e \u0130 \uff76\uff9e\uff8a\uff9f \u1d2c\u0301 \ufb01 \u33d5",
    ):
        ids = ours.encode_batch([text])[0]
        assert fast.encode(text, add_special_tokens=False).ids == ids
        assert auto(text, add_special_tokens=False)["input_ids"] == ids


def edited(tokenizer: Tokenizer, edit) -> SentencePiece:
    """A tokenizer with another SentencePiece file."""
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)
    edit(model)
    return SentencePiece(model.SerializeToString(), {}, "edited")


@pytest.mark.parametrize("number", [-1, 0, 3, 10**6])
def test_the_unknown_token_of_an_export_is_that_of_the_pieces(tokenizers, number, tmp_path):
    """SentencePiece itself ignores the number in the settings of the training."""
    tokenizer = edited(
        tokenizers["unigram"][0], lambda model: setattr(model.trainer_spec, "unk_id", number)
    )
    fast, _ = exported(tokenizer, tmp_path)
    text = "a \U0001f600 b"
    ids = tokenizer.encode_batch([text])[0]
    assert tokenizer.special_ids.unk in ids
    assert fast.encode(text, add_special_tokens=False).ids == ids


def test_a_model_that_tokenizer_json_cannot_express_is_refused(tokenizers, tmp_path):
    def damaged_rules(model) -> None:  # SentencePiece itself reads them
        model.normalizer_spec.precompiled_charsmap += b"\xff\0"

    def spaces_after_words(model) -> None:
        model.trainer_spec.treat_whitespace_as_suffix = True

    with_charsmap = with_rules(tokenizers["unigram"][0], "nmt_nfkc")
    for edit, message in ((damaged_rules, "is damaged"), (spaces_after_words, "after a word")):
        tokenizer = edited(with_charsmap, edit)
        with pytest.raises(UserError, match=message):
            exported(tokenizer, tmp_path / message)


def test_the_tokenizer_of_a_data_folder_of_version_0_1_is_unchanged():
    folder = FILES / "version-0.1" / "data" / "tokenizer"
    tokenizer = load_tokenizer(folder)
    assert tokenizer.fingerprint == (
        "16353a5d9bcb31588da923bad10870e558caae1586088d87dd0b4ce749b10039"
    )
    assert tokenizer.normalization == "nfc"  # which `prepare` of that version did


# ------------------------------------------------------------------------------------- running time


@pytest.mark.parametrize("name", ["cased", "accents", "bpe", "unigram"])
def test_long_runs_of_marks_take_time_in_proportion(tokenizers, name):
    ours, fast, _ = tokenizers[name]

    def seconds(marks: int) -> float:
        text = "a" + "\u0300" * marks + "\u0316" * marks
        start = time.process_time()
        clean_lines(text, ours.normalization)
        ids = ours.encode_batch([text])[0]
        assert fast.encode(text, add_special_tokens=False).ids == ids
        return time.process_time() - start

    seconds(100)
    assert seconds(64_000) < 3  # 40 s if time grew with the square
