"""A tokenizer folder shaped as those of released ModernBERT models, with a small vocabulary."""

import json
from functools import cache
from pathlib import Path

# Words, scripts with characters of 2 to 4 bytes, an emoji, code and a contraction.
TEXT = """the old river and the island isn't the river's, it's an old (very old) island
Die Größe naïve café été 東京 日本語 한국어 नमस्ते Привет мир сало́ שלום عربى 😀 👍 x = [1, 23, 456]
def river(old):
    return old + 12
""" + " ".join(f"word{i % 7} running{i % 5} walked" for i in range(40))
SPECIAL = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
UNUSED = 6


@cache
def _tokenizer_json() -> str:
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    fast = Tokenizer(models.BPE())
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel(add_prefix_space=False)
    first = AddedToken("|||IP_ADDRESS|||", normalized=True, special=False)
    padding = AddedToken("<|padding|>", normalized=False, special=True)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        min_frequency=2,
        show_progress=False,
        special_tokens=[first, padding],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    fast.train_from_iterator([TEXT] * 3, trainer)
    own = [" " * n for n in range(8, 1, -1)] + ["|||EMAIL_ADDRESS|||"]
    fast.add_tokens([AddedToken(text, normalized=True, special=False) for text in own])
    fast.add_special_tokens(
        [
            AddedToken(text, normalized=False, special=True, lstrip=text == "[MASK]")
            for text in ("<|endoftext|>", *SPECIAL)
        ]
    )
    fast.add_tokens(
        [AddedToken(f"[unused{i}]", normalized=True, special=False) for i in range(UNUSED)]
    )
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:0 [SEP]:0",
        special_tokens=[(name, fast.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    content = json.loads(fast.to_str())
    content["added_tokens"][0] |= {"normalized": True, "special": False}  # the trainer's own flags
    del content["model"]["ignore_merges"]  # the released files are older than this key
    return json.dumps(content)


def stock_tokenizer(folder: Path, max_length: int = 64) -> dict:
    """Write tokenizer.json and tokenizer_config.json; the content of tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(_tokenizer_json())
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    stored = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in content["added_tokens"]
    }
    roles = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    config = {
        "added_tokens_decoder": stored,
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return content
