"""The README.md of an exported folder: front matter, loading code, facts and held-out metrics."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from electra_ds.common.markdown import inline
from electra_ds.common.printable import printable
from electra_ds.interop.hf_format import HfFormat, Role

PIPELINE_TAGS: dict[Role, str] = {
    "detection": "feature-extraction",
    "prediction": "fill-mask",
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
    "multiple_choice": "multiple-choice",
}
# Last lines of the loading code: what a user does with `logits` of each role.
READ_DETECTION = """\
replaced = {logits}.sigmoid()  # one probability for each token
print(list(zip(tokenizer.convert_ids_to_tokens(inputs.input_ids[0]), replaced.tolist())))"""
READ_MASKED = """\
is_mask = inputs.input_ids[0] == tokenizer.mask_token_id
print(tokenizer.decode(logits[0][is_mask].argmax(-1)))"""
READ_CLASS = "print(model.config.id2label[logits[0].argmax().item()])"
READ_CLASS_AT_CLS = "print(model.config.id2label[logits[0, 0].argmax().item()])  # at [CLS]"
READ_VALUE = "print(logits[0, 0].item())  # in the unit of the labels"
READ_ANSWER = """\
context = [n for n, text in enumerate(inputs.sequence_ids(0)) if text == 1]
first = max(context, key=lambda n: start[0, n])
last = max(context[context.index(first) :], key=lambda n: end[0, n])
characters = inputs.token_to_chars(first).start, inputs.token_to_chars(last).end
print("The second text."[slice(*characters)])"""
READ_CHOICE = "print(logits[0].argmax().item())  # number of the best choice, from 0"
CHOICE_INPUTS = """\
choices = ["The first choice.", "The second choice."]
inputs = tokenizer(["A text."] * len(choices), choices, padding=True, return_tensors="pt")
inputs = {name: value.unsqueeze(0) for name, value in inputs.items()}  # [1, choices, tokens]"""
READ_TAGS = """\
tags = [model.config.id2label[i] for i in logits[0].argmax(-1).tolist()]
print(list(zip(tokenizer.convert_ids_to_tokens(inputs.input_ids[0]), tags)))"""


class Card(NamedTuple):
    """Facts of one exported folder that its config.json does not contain.

    purpose: one sentence. facts: title -> value, in the order of the table. role: of its class.
    takes_pairs: whether the input is a pair of texts. reads_cls: whether the logits of the first
    token are those of the whole text. has_spaces: whether tokens of words have the space before the
    word, as in byte_bpe.
    """

    purpose: str
    facts: Mapping[str, str]
    role: Role
    takes_pairs: bool = False
    reads_cls: bool = False
    has_spaces: bool = False


def render_card(
    name: str, form: HfFormat, config: Mapping[str, Any], parameters: int, card: Card
) -> str:
    """The Markdown text of README.md for a folder called `name` with this config.json."""
    architecture, name = config["architectures"][0], printable(name)
    rows = {
        "class": architecture,
        "sizes": form.sizes_text.format(**config),
        "parameters": f"{parameters:,}",
        **card.facts,
    }
    if requirement := form.requirement(config):
        rows["needs"] = requirement
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {PIPELINE_TAGS[card.role]}",
        "tags:",
        f"- {form.model_type}",
        "- electra_ds",
        "---",
        "",
        f"# {name}",
        "",
        inline(card.purpose),
        "",
        f"Load it from the folder that contains `{name}`:",
        "",
        "```python",
        *_loading_code(name, form, config, card),
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {inline(title)} | {inline(value)} |" for title, value in rows.items()),
        "",
    ]
    return "\n".join(lines)


def _loading_code(name: str, form: HfFormat, config: Mapping[str, Any], card: Card) -> list[str]:
    architecture = config["architectures"][0]
    texts = '"The first text.", "The second text."' if card.takes_pairs else '"A short text."'
    if card.role == "token_classification" and not card.reads_cls:
        # As in the training. AutoTokenizer would encode words of a list without their spaces.
        words = '"A short text ."'
        texts = words if card.has_spaces else f"{words}.split(), is_split_into_words=True"
    if card.role == "prediction":
        texts = 'f"A short {tokenizer.mask_token}."'
    call = "logits = model(**inputs).logits"
    if card.role == "detection":
        call = f"logits = {form.detection_call}"
    elif card.role == "question_answering":
        call = "start, end = model(**inputs).to_tuple()"
    inputs = f'inputs = tokenizer({texts}, return_tensors="pt")'
    return [
        "import torch",
        f"from transformers import AutoTokenizer, {architecture}",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name, ensure_ascii=False)})",
        f"model = {architecture}.from_pretrained({json.dumps(name, ensure_ascii=False)}).eval()",
        CHOICE_INPUTS if card.role == "multiple_choice" else inputs,
        "with torch.no_grad():",
        f"    {call}",
        _reading_code(form, config, card),
    ]


def _reading_code(form: HfFormat, config: Mapping[str, Any], card: Card) -> str:
    if card.role == "detection":
        return READ_DETECTION.format(logits=form.detection_logits)
    if card.role == "prediction":
        return READ_MASKED
    if card.role == "question_answering":
        return READ_ANSWER
    if card.role == "token_classification":
        return READ_CLASS_AT_CLS if card.reads_cls else READ_TAGS
    if card.role == "multiple_choice":
        return READ_CHOICE
    return READ_VALUE if config["problem_type"] == "regression" else READ_CLASS
