"""Conversion of our tokenizers to the files that AutoTokenizer reads, with equal ids."""

from pathlib import Path
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.files import write_bytes
from electra_ds.common.json_files import write_json
from electra_ds.common.printable import printable
from electra_ds.data.tokenizer import ByteBpe, Tokenizer, WordPiece
from electra_ds.data.tokenizer.hugging_face import NORMALIZATION_KEY
from electra_ds.data.tokenizer.normalization import native_steps

TOKEN_TYPES = "token_type_ids"
INPUTS = ("input_ids", TOKEN_TYPES, "attention_mask")
SPACE = "\u2581"  # SentencePiece's character for a space
# Characters that SentencePiece's rules nmt_* and *_cf keep, other than NFKC and lower case.
FULL_WIDTH_TILDE = "\uff5e"
DOTTED_CAPITAL_I = "\u0130"
IOTA_BELOW = "\u0345"
IOTA = "\u03b9"
# Marks for which a composed small letter exists, but not the composed capital.
MARKS_OF_SMALL_LETTERS = "\u0300\u0301\u0308\u030a\u030c\u0313\u0331\u0342"


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, max_length: int, with_token_types: bool = True
) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and the vocabulary file.

    AutoTokenizer then returns the same ids as [CLS] A [SEP] B [SEP] with token types, except that
    the library maps a special token that is written in a text to its id. with_token_types: whether
    the model takes them; otherwise the tokenizer does not return them.

    SentencePiece models with rules or scores of their own (version 0.1, other programs) differ in
    two more points. If unigram has two segmentations of equal score, the library may choose
    another one, because it adds scores in fp64 and SentencePiece in fp32. The library composes a
    compatibility character, such as a ligature, with more of the marks after it.
    Raises UserError for a SentencePiece model that is neither unigram nor bpe.
    """
    tokenizer.save(folder)
    (folder / "options.json").unlink()  # tokenizer_config.json has the same facts
    special = {role: tokenizer.names[i] for role, i in tokenizer.special_ids.model_dump().items()}
    special_tokens = {f"{role}_token": name for role, name in special.items()}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if not isinstance(tokenizer, ByteBpe):  # its vocabulary file is a complete tokenizer.json
        fast, config = _fast_tokenizer(tokenizer)
        _add_special_tokens(fast, tokenizer, special)
        write_bytes(folder / "tokenizer.json", fast.to_str(pretty=True).encode())
    config |= {
        NORMALIZATION_KEY: tokenizer.normalization,
        "model_max_length": max_length,
        **special_tokens,
        "model_input_names": [name for name in INPUTS if with_token_types or name != TOKEN_TYPES],
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special_tokens)


def _fast_tokenizer(tokenizer: Tokenizer) -> tuple[Any, dict[str, Any]]:
    """(tokenizers.Tokenizer, first keys of tokenizer_config.json)."""
    if not isinstance(tokenizer, WordPiece):
        return _sentencepiece(tokenizer), {"tokenizer_class": "PreTrainedTokenizerFast"}
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders

    fast = FastTokenizer.from_str(tokenizer.fast.to_str())
    fast.decoder = decoders.WordPiece(prefix="##")
    # BertTokenizer makes a normalizer of its own, and its Python code in versions before 5 gives
    # other ids than tokenizer.json for text that is not in NFC.
    return fast, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "do_lower_case": tokenizer.options["lowercase"],
        "strip_accents": tokenizer.options["strip_accents"],
        "tokenize_chinese_chars": True,
    }


def _add_special_tokens(fast: Any, tokenizer: Tokenizer, special: dict[str, str]) -> None:
    """Make `fast` keep special tokens whole and add [CLS] and [SEP] to texts and pairs."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    names = special.values()
    fast.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    cls, sep = special["cls"], special["sep"]
    fast.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(name, tokenizer.ids[name]) for name in (cls, sep)],
    )


def _sentencepiece(tokenizer: Tokenizer) -> Any:
    """A SentencePiece model as tokenizers.Tokenizer: normalization, spaces, then unigram or bpe."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)  # type: ignore[attr-defined]
    rules = proto.normalizer_spec
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(
            "found a SentencePiece model with the space after a word "
            "(treat_whitespace_as_suffix), which tokenizer.json cannot express; expected it before"
        )
    try:
        fast: Any = FastTokenizer(_sentencepiece_model(tokenizer, proto))
        steps: list[Any] = native_steps(tokenizer.normalization) + _rules(rules)
    except UserError:
        raise
    except Exception as error:  # the library raises no other class
        raise UserError(
            f"the SentencePiece model of the tokenizer is damaged ({printable(str(error))}); copy "
            "the tokenizer again"
        ) from None
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Replace(Regex("^ | $"), "")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if not any(SPACE in name[1:] for name in tokenizer.names):
        # No entry contains an inner space, so words can be tokenized separately and cached.
        fast.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    fast.decoder = decoders.Metaspace(SPACE, "always" if rules.add_dummy_prefix else "never")
    return fast


def _rules(rules: Any) -> list[Any]:
    """The normalization rules of a SentencePiece model as steps.

    The library's Precompiled maps a short grapheme cluster as a whole, by its first entry in the
    table. It loses the marks after a capital or a half-width letter, and composes a small letter
    with a mark, which SentencePiece does not do if the letter was a capital. Therefore NFKC and
    lower case come before, which make what the rules make but for one character each, and the
    marks are left out of Precompiled.
    """
    from tokenizers import normalizers

    if not rules.precompiled_charsmap:
        return []
    last: list[Any] = [normalizers.Precompiled(rules.precompiled_charsmap)]
    steps: list[Any] = []
    if "nfkc" in rules.name:
        kept = FULL_WIDTH_TILDE if rules.name.startswith("nmt") else ""
        steps += _without(kept, [normalizers.NFKC()])
    if rules.name.endswith("_cf"):
        steps += _without(DOTTED_CAPITAL_I, [normalizers.Lowercase()])
        steps.append(normalizers.Replace(IOTA_BELOW, IOTA))
        last = _without(MARKS_OF_SMALL_LETTERS, last)
    return [*steps, *last]


def _without(characters: str, steps: list[Any]) -> list[Any]:
    """Steps that leave some characters as they are.

    Control characters stand for these meanwhile. Normalization has removed all others.
    """
    from tokenizers import normalizers

    pairs = [(character, chr(0x80 + i)) for i, character in enumerate(characters)]
    before = [normalizers.Replace(character, control) for character, control in pairs]
    after = [normalizers.Replace(control, character) for character, control in pairs]
    return [*before, *steps, *after]


def _sentencepiece_model(tokenizer: Tokenizer, proto: Any) -> Any:
    """The unigram or bpe model of a SentencePiece file, of the tokenizers library."""
    from tokenizers import models

    trainer = proto.trainer_spec
    if trainer.model_type == trainer.UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(scores, tokenizer.special_ids.unk, trainer.byte_fallback)
    if trainer.model_type != trainer.BPE:
        raise UserError("found another SentencePiece model; expected unigram or bpe")
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    return models.BPE(
        tokenizer.ids,
        _merges(normal),
        unk_token=tokenizer.names[tokenizer.special_ids.unk],
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of entries in the order in which bpe merges them.

    SentencePiece first merges the pair that gives the highest score.
    """
    cuts = (
        (-score, entry[:i], entry[i:])
        for entry, score in scores.items()
        for i in range(1, len(entry))
    )
    return [(left, right) for _, left, right in sorted(cuts) if left in scores and right in scores]
