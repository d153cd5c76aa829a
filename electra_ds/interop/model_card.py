"""The README.md of an exported folder: front matter, loading code, facts and held-out metrics."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from electra_ds.common.printable import printable
from electra_ds.common.urls import redacted

PIPELINE_TAGS = {
    "ElectraForPreTraining": "feature-extraction",
    "ElectraForMaskedLM": "fill-mask",
    "ElectraForSequenceClassification": "text-classification",
    "ElectraForTokenClassification": "token-classification",
}
SIZES = (
    "{num_hidden_layers} layers, hidden {hidden_size}, {num_attention_heads} heads, "
    "feed-forward {intermediate_size}, embedding {embedding_size}, vocabulary {vocab_size:,}"
)
# Last lines of the loading code: what a user does with `logits` of each class.
READ_DETECTION = """\
replaced = logits[0].sigmoid()  # one probability for each token
print(list(zip(tokenizer.convert_ids_to_tokens(inputs.input_ids[0]), replaced.tolist())))"""
READ_MASKED = """\
is_mask = inputs.input_ids[0] == tokenizer.mask_token_id
print(tokenizer.decode(logits[0][is_mask].argmax(-1)))"""
READ_CLASS = "print(model.config.id2label[logits[0].argmax().item()])"
READ_CLASS_AT_CLS = "print(model.config.id2label[logits[0, 0].argmax().item()])  # at [CLS]"
READ_VALUE = "print(logits[0, 0].item())  # in the unit of the labels"
READ_TAGS = """\
tags = [model.config.id2label[i] for i in logits[0].argmax(-1).tolist()]
print(list(zip(tokenizer.convert_ids_to_tokens(inputs.input_ids[0]), tags)))"""


class Card(NamedTuple):
    """Facts of one exported folder that its config.json does not contain.

    purpose: one sentence. facts: title -> value, in the order of the table.
    takes_pairs: whether the input is a pair of texts. reads_cls: whether the logits of the first
    token are those of the whole text.
    """

    purpose: str
    facts: Mapping[str, str]
    takes_pairs: bool = False
    reads_cls: bool = False


def render_card(name: str, config: Mapping[str, Any], parameters: int, card: Card) -> str:
    """The Markdown text of README.md for a folder called `name` with this config.json."""
    architecture, name = config["architectures"][0], printable(name)
    rows = {
        "class": architecture,
        "sizes": SIZES.format(**config),
        "parameters": f"{parameters:,}",
        **card.facts,
    }
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {PIPELINE_TAGS[architecture]}",
        "tags:",
        "- electra",
        "- electra_ds",
        "---",
        "",
        f"# {name}",
        "",
        _cell(card.purpose),
        "",
        f"Load it from the folder that contains `{name}`:",
        "",
        "```python",
        *_loading_code(name, config, card),
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {_cell(title)} | {_cell(value)} |" for title, value in rows.items()),
        "",
    ]
    return "\n".join(lines)


def _loading_code(name: str, config: Mapping[str, Any], card: Card) -> list[str]:
    architecture = config["architectures"][0]
    texts = '"The first text.", "The second text."' if card.takes_pairs else '"A short text."'
    if architecture == "ElectraForTokenClassification" and not card.reads_cls:
        texts = '"A short text .".split(), is_split_into_words=True'  # as in the training
    if architecture == "ElectraForMaskedLM":
        texts = 'f"A short {tokenizer.mask_token}."'
    return [
        "import torch",
        f"from transformers import AutoTokenizer, {architecture}",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name, ensure_ascii=False)})",
        f"model = {architecture}.from_pretrained({json.dumps(name, ensure_ascii=False)}).eval()",
        f'inputs = tokenizer({texts}, return_tensors="pt")',
        "with torch.no_grad():",
        "    logits = model(**inputs).logits",
        _reading_code(config, card),
    ]


def _reading_code(config: Mapping[str, Any], card: Card) -> str:
    architecture = config["architectures"][0]
    if architecture == "ElectraForPreTraining":
        return READ_DETECTION
    if architecture == "ElectraForMaskedLM":
        return READ_MASKED
    if architecture == "ElectraForTokenClassification":
        return READ_CLASS_AT_CLS if card.reads_cls else READ_TAGS
    return READ_VALUE if config["problem_type"] == "regression" else READ_CLASS


def _cell(value: str) -> str:
    """A value escaped for one cell of a Markdown table; names and labels come from files."""
    text = printable(redacted(value))
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "&#96;")
