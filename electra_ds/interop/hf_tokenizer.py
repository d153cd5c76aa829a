"""Conversion of our tokenizers to and from the files that AutoTokenizer reads, with equal ids."""

from pathlib import Path
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.files import write_bytes
from electra_ds.common.json_files import read_json, write_json
from electra_ds.data.tokenizer import VOCABULARY_FILES, Tokenizer, WordPiece, load_tokenizer

SPACE = "\u2581"  # SentencePiece's character for a space


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and the vocabulary file.

    AutoTokenizer then returns the same ids as [CLS] A [SEP] B [SEP] with token types. There are two
    differences. The library maps a special token that is written in a text to its id. If unigram
    has two segmentations of equal score (a long run of one character), the library may choose
    another one, because it adds scores in fp64 and SentencePiece in fp32.
    Raises UserError for a SentencePiece model that is neither unigram nor bpe.
    """
    tokenizer.save(folder)
    (folder / "options.json").unlink()  # tokenizer_config.json has the same facts
    special = {role: tokenizer.names[i] for role, i in tokenizer.special_ids.model_dump().items()}
    special_tokens = {f"{role}_token": name for role, name in special.items()}
    fast, config = _fast_tokenizer(tokenizer)
    _add_special_tokens(fast, tokenizer, special)
    write_bytes(folder / "tokenizer.json", fast.to_str(pretty=True).encode())
    config |= {
        "model_max_length": max_length,
        **special_tokens,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
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
    return fast, {
        "tokenizer_class": "BertTokenizer",
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


def read_tokenizer(path: Path) -> Tokenizer:
    """`load_tokenizer`; also reads the WordPiece of a folder that has only a tokenizer.json.

    Raises UserError for any other tokenizer.json.
    """
    if not (path / "tokenizer.json").is_file() or any(
        (path / name).is_file() for name in VOCABULARY_FILES
    ):
        return load_tokenizer(path)
    content = read_json(path / "tokenizer.json", "a tokenizer of Hugging Face")
    model, normalizer = content["model"], content["normalizer"] or {}
    if model["type"] != "WordPiece" or normalizer.get("type") != "BertNormalizer":
        raise UserError(
            f"{path}/tokenizer.json: found a {model['type']} model; expected BERT's WordPiece; "
            "otherwise put vocab.txt or a SentencePiece .model into the folder, or give it with "
            "--tokenizer"
        )
    if unsupported := _unsupported_settings(model, normalizer):
        raise UserError(
            f"{path}/tokenizer.json: found {', '.join(unsupported)}; expected those of BERT; "
            "give a vocab.txt with --tokenizer"
        )
    names = sorted(model["vocab"], key=model["vocab"].get)
    lowercase, strip_accents = normalizer["lowercase"], normalizer["strip_accents"]
    options = {
        "lowercase": lowercase,
        "strip_accents": lowercase if strip_accents is None else strip_accents,
    }
    vocabulary = "".join(f"{name}\n" for name in names).encode()
    return WordPiece(vocabulary, options, f"{path}/tokenizer.json")


def _unsupported_settings(model: dict[str, Any], normalizer: dict[str, Any]) -> list[str]:
    """Settings of a WordPiece tokenizer.json that differ from BERT's."""
    found = []
    for key in ("clean_text", "handle_chinese_chars"):
        if normalizer.get(key, True) is not True:
            found.append(f"{key} = {normalizer[key]}")
    if model.get("continuing_subword_prefix", "##") != "##":
        found.append("a prefix other than ##")
    if sorted(model["vocab"].values()) != list(range(len(model["vocab"]))):
        found.append("ids with gaps")
    return found


def _sentencepiece(tokenizer: Tokenizer) -> Any:
    """A SentencePiece model as tokenizers.Tokenizer: character map, spaces, then unigram or bpe."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)  # type: ignore[attr-defined]
    rules = proto.normalizer_spec
    fast: Any = FastTokenizer(_sentencepiece_model(tokenizer, proto))
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if "nfkc" in rules.name:
        # The library's Precompiled drops combining marks that are separate from their letter.
        steps = [normalizers.NFC(), *steps, normalizers.NFC()]
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" +"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if not any(SPACE in name[1:] for name in tokenizer.names):
        # No entry contains an inner space, so words can be tokenized separately and cached.
        fast.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    fast.decoder = decoders.Metaspace(SPACE, "always" if rules.add_dummy_prefix else "never")
    return fast


def _sentencepiece_model(tokenizer: Tokenizer, proto: Any) -> Any:
    """The unigram or bpe model of a SentencePiece file, of the tokenizers library."""
    from tokenizers import models

    trainer = proto.trainer_spec
    if trainer.model_type == trainer.UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(scores, trainer.unk_id, trainer.byte_fallback)
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
