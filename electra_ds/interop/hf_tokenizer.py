"""Our tokenizer <-> the files that AutoTokenizer reads, with equal ids."""

from pathlib import Path
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.files import read_json, write_bytes, write_json
from electra_ds.data.tokenizer import VOCABULARY_FILES, Tokenizer, WordPiece, load_tokenizer

SPACE = "\u2581"  # how SentencePiece writes a space


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json and the vocabulary's own file.

    AutoTokenizer then gives our ids as [CLS] A [SEP] B [SEP] with token types. What differs is the library's: a
    special token written in a text becomes its id there, and where unigram finds two cuts of one score (a long run of
    one sign) rounding chooses, here in fp64 and in SentencePiece in fp32.
    """
    tokenizer.save(folder)
    (folder / "options.json").unlink()  # tokenizer_config.json says the same
    special = {role: tokenizer.names[i] for role, i in tokenizer.special_ids.model_dump().items()}
    named = {f"{role}_token": name for role, name in special.items()}
    from tokenizers import AddedToken, decoders
    from tokenizers import Tokenizer as Fast
    from tokenizers.processors import TemplateProcessing

    if isinstance(tokenizer, WordPiece):
        options, fast = tokenizer.options, Fast.from_str(tokenizer.fast.to_str())
        fast.decoder = decoders.WordPiece(prefix="##")
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": options["lowercase"],
            "strip_accents": options["strip_accents"],
            "tokenize_chinese_chars": True,
        }
    else:
        fast, config = _sentencepiece(tokenizer), {"tokenizer_class": "PreTrainedTokenizerFast"}
    fast.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in special.values()]
    )
    first, last = special["cls"], special["sep"]
    fast.post_processor = TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(name, tokenizer.ids[name]) for name in (first, last)],
    )
    write_bytes(folder / "tokenizer.json", fast.to_str(pretty=True).encode())
    config |= {
        "model_max_length": max_length,
        **named,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", named)


def read_tokenizer(path: Path) -> Tokenizer:
    """`load_tokenizer`, and from a folder with nothing but a tokenizer.json its WordPiece."""
    if not (path / "tokenizer.json").is_file() or any(
        (path / name).is_file() for name in VOCABULARY_FILES
    ):
        return load_tokenizer(path)
    found = read_json(path / "tokenizer.json", "a tokenizer of Hugging Face")
    model, normalizer = found["model"], found["normalizer"] or {}
    if model["type"] != "WordPiece" or normalizer.get("type") != "BertNormalizer":
        raise UserError(
            f"{path}/tokenizer.json: a {model['type']} model; expected BERT's WordPiece, or the vocabulary "
            "as vocab.txt or SentencePiece .model: put it into the folder or give it with --tokenizer"
        )
    plain = {"clean_text": True, "handle_chinese_chars": True}
    others = [
        f"{key} = {normalizer[key]}"
        for key, only in plain.items()
        if normalizer.get(key, only) is not only
    ]
    others += ["a prefix other than ##"] * (model.get("continuing_subword_prefix", "##") != "##")
    others += ["ids with gaps"] * (
        sorted(model["vocab"].values()) != list(range(len(model["vocab"])))
    )
    if others:
        raise UserError(
            f"{path}/tokenizer.json: {', '.join(others)}; only BERT's own settings are supported"
        )
    names = sorted(model["vocab"], key=model["vocab"].get)
    accents = normalizer["strip_accents"]
    options = {
        "lowercase": normalizer["lowercase"],
        "strip_accents": normalizer["lowercase"] if accents is None else accents,
    }
    return WordPiece(
        "".join(f"{name}\n" for name in names).encode(), options, f"{path}/tokenizer.json"
    )


def _sentencepiece(tokenizer: Tokenizer) -> Any:
    """The steps of a SentencePiece model in the library's terms: its character map, spaces, then unigram or bpe."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)
    rules, trainer = proto.normalizer_spec, proto.trainer_spec
    unigram = trainer.model_type == trainer.UNIGRAM
    if not unigram and trainer.model_type != trainer.BPE:
        raise UserError("only SentencePiece models of the kinds unigram and bpe can be exported")
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    if unigram:
        model = models.Unigram(scores, proto.trainer_spec.unk_id, trainer.byte_fallback)
    else:
        normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
        model = models.BPE(
            tokenizer.ids,
            _merges(normal),
            unk_token=tokenizer.names[tokenizer.special_ids.unk],
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    fast = Fast(model)
    steps = (
        [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    )
    if (
        "nfkc" in rules.name
    ):  # the library's Precompiled loses marks that stand apart from their letter
        steps = [normalizers.NFC(), *steps, normalizers.NFC()]
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" +"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if not any(
        SPACE in name[1:] for name in tokenizer.names
    ):  # no piece goes over a space: words can be cached
        fast.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    fast.decoder = decoders.Metaspace(SPACE, "always" if rules.add_dummy_prefix else "never")
    return fast


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs in the order in which bpe joins them: SentencePiece joins to the piece of the highest score first."""
    cuts = (
        (-score, piece[:i], piece[i:])
        for piece, score in scores.items()
        for i in range(1, len(piece))
    )
    return [(left, right) for _, left, right in sorted(cuts) if left in scores and right in scores]
