"""Reading of byte-level BPE vocabularies from a tokenizer.json of Hugging Face tokenizers.

The file is checked and rewritten in one form, so that equal tokenizers have equal bytes. Only the
components that a ByteBpe computes are accepted; every other one is an error with its key.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import Record, json_bytes, parse_json, parse_record, read_record
from electra_ds.common.printable import printable, shortened
from electra_ds.data.tokenizer.base import find_special_ids
from electra_ds.data.tokenizer.byte_alphabet import BYTE_OF, SPELLINGS, UNUSED_BYTES
from electra_ds.data.tokenizer.normalization import Form, normalize, steps_as_json

WHAT = "a byte-level BPE tokenizer of Hugging Face"
BYTE_FORMS: tuple[Form, ...] = ("nfc_only", "nfc")  # normalizations of byte-level vocabularies
MAX_ENTRY = 1000  # characters of an entry
MAX_SHOWN = 100  # characters of a value in a message
# Fields of the model that would change the ids -> the values that are supported.
MODEL_FIELDS: dict[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "dropout": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}
TEMPLATES = {
    "single": ("{cls}", "$A", "{sep}"),
    "pair": ("{cls}", "$A", "{sep}", "$B", "{sep}"),
}
OTHERWISE = "give another --tokenizer, or copy the file again if it is damaged"
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


class AddedToken(Record):
    """An entry of `added_tokens`: a text that is one token, whatever the merges are."""

    id: int = Field(ge=0, lt=1 << 31)
    content: str = Field(min_length=1, max_length=MAX_ENTRY)
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class _Model(Record):
    """The BPE model. Its other fields are compared with MODEL_FIELDS."""

    model_config = ConfigDict(extra="ignore")

    vocab: dict[str, int]
    merges: tuple[str | tuple[str, str], ...]
    unk_token: str | None = None


class _File(Record):
    model_config = ConfigDict(extra="ignore")

    model: _Model
    added_tokens: tuple[AddedToken, ...]


class _StoredToken(Record):
    """A special token in tokenizer_config.json, as an object."""

    model_config = ConfigDict(extra="ignore")

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class _Config(Record):
    """The keys of tokenizer_config.json that could change ids."""

    model_config = ConfigDict(extra="ignore")

    add_prefix_space: bool | None = None
    added_tokens_decoder: dict[str, _StoredToken] = Field(default_factory=dict)
    pad_token: str | _StoredToken | None = None
    unk_token: str | _StoredToken | None = None
    cls_token: str | _StoredToken | None = None
    sep_token: str | _StoredToken | None = None
    mask_token: str | _StoredToken | None = None


class ByteVocabulary(NamedTuple):
    """A checked tokenizer.json.

    names: [V] entries, by id. merges: pairs of entries, in the order of their priority.
    added: texts that are tokens; those with `special` are never found in a text. normalization:
    nfc_only or nfc. content: the file in its one form. unmerged: entries of several bytes that no
    merge makes.
    """

    names: list[str]
    merges: list[tuple[str, str]]
    added: tuple[AddedToken, ...]
    normalization: Form
    content: bytes
    unmerged: list[str]

    @property
    def texts(self) -> list[AddedToken]:
        """The added tokens that are found in a text."""
        return [token for token in self.added if not token.special]


def is_byte_bpe(content: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json has a BPE model, which is then expected to be byte-level."""
    model = content.get("model")
    return isinstance(model, dict) and model.get("type") == "BPE"


def read_byte_vocabulary(content: bytes, source: str) -> ByteVocabulary:
    """Return the vocabulary in the bytes of a tokenizer.json.

    source: name of the file in messages. Raises UserError for a component that is not supported,
    for ids with gaps or used twice, for merges of absent entries, for bytes without an entry, and
    for a special token that is missing or that text could encode to.
    """
    stated = parse_json(content, source, WHAT)
    form = _normalization(stated.get("normalizer"), source)
    _check_components(stated, source)
    file: _File = parse_record(stated, source, _File, WHAT)
    names = _names(file, source)
    merges = _merges(file.model, source)
    ids = {name: i for i, name in enumerate(names)}
    special = {role: names[i] for role, i in find_special_ids(ids, source).model_dump().items()}
    _check_bytes(ids, source)
    _check_added(file, form, set(special.values()), {a + b for a, b in merges}, source)
    _check_template(stated.get("post_processor"), special, ids, source)
    unmerged = _unmerged(file, merges, source)
    whole = _in_one_form(file, form, merges, special, ids)
    return ByteVocabulary(names, merges, file.added_tokens, form, whole, unmerged)


def check_tokenizer_config(file: Path, vocabulary: ByteVocabulary, special: dict[str, str]) -> None:
    """Raise UserError if a tokenizer_config.json contradicts the tokenizer.json beside it.

    special: role -> spelling of the special token.
    """
    config = read_record(file, _Config, "the options of a Hugging Face tokenizer")
    source = printable(file)
    if config.add_prefix_space:
        raise _unsupported(source, "add_prefix_space", True, "false")
    for role, name in special.items():
        token = getattr(config, f"{role}_token")
        stated = token.content if isinstance(token, _StoredToken) else token
        if stated not in (None, name):
            raise _unsupported(source, f"{role}_token", stated, repr(name))
    added = {str(token.id): token for token in vocabulary.added}
    for number, stored in config.added_tokens_decoder.items():
        token = added.get(number)
        if token is None or token.model_dump(exclude={"id"}) != stored.model_dump():
            expected = shortened(token.content) if token else "no such token"
            raise UserError(
                f"{source}: added_tokens_decoder.{printable(number)}: found "
                f"{shortened(stored.content)}; expected {expected} with the fields in "
                "tokenizer.json; copy both files again"
            )


def _unsupported(source: str, key: str, found: Any, expected: str) -> UserError:
    """Return an error. found: a value of the file, or a phrase about the file."""
    shown = printable(found if isinstance(found, str) else json.dumps(found, ensure_ascii=False))
    shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
    return UserError(f"{source}: {printable(key)}: found {shown}; expected {expected}; {OTHERWISE}")


def _normalization(normalizer: Any, source: str) -> Form:
    """Return the normalization that the normalizer of a tokenizer.json makes."""
    is_sequence = isinstance(normalizer, dict) and normalizer.get("type") == "Sequence"
    steps = normalizer.get("normalizers") if is_sequence else [normalizer]
    for form in BYTE_FORMS:
        if steps == steps_as_json(form):
            return form
    raise _unsupported(source, "normalizer", normalizer, '{"type": "NFC"}')


def _check_components(stated: dict[str, Any], source: str) -> None:
    """Raise UserError for a model, a pre-tokenizer or a decoder that is not byte-level BPE."""
    model = stated["model"]
    for key, values in MODEL_FIELDS.items():
        value = model.get(key, values[0])
        if value not in values or isinstance(value, bool) != isinstance(values[0], bool):
            raise _unsupported(source, f"model.{key}", value, json.dumps(values[0]))
    for key in ("vocab", "merges"):
        if key not in model:
            raise _unsupported(source, f"model.{key}", None, "the entries and merges of the BPE")
    pre_tokenizer = stated.get("pre_tokenizer")
    expected = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if not isinstance(pre_tokenizer, dict) or pre_tokenizer.get("type") != "ByteLevel":
        raise _unsupported(source, "pre_tokenizer", pre_tokenizer, json.dumps(expected))
    for key in ("add_prefix_space", "use_regex"):  # files of older versions have no use_regex
        value = pre_tokenizer.get(key, key == "use_regex")
        if value is not expected[key]:
            raise _unsupported(source, f"pre_tokenizer.{key}", value, json.dumps(expected[key]))
    decoder = stated.get("decoder")
    if decoder is not None and (
        not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel"
    ):
        raise _unsupported(source, "decoder", decoder, '{"type": "ByteLevel"}')


def _names(file: _File, source: str) -> list[str]:
    """Return the entries by id. Raises UserError unless the ids are 0 to V - 1, each once."""
    entries = dict(file.model.vocab)
    for number, token in enumerate(file.added_tokens):
        # The library gives a token that is not in the vocabulary the next free id.
        expected = entries.setdefault(token.content, len(entries))
        if token.id != expected:
            raise _unsupported(source, f"added_tokens.{number}.id", token.id, str(expected))
    names: dict[int, str] = {}
    for name, i in entries.items():
        if len(name) > MAX_ENTRY or not name:
            raise _unsupported(
                source,
                "model.vocab",
                f"an entry of {len(name):,} characters",
                f"1 to {MAX_ENTRY:,}",
            )
        if other := names.get(i):
            raise _unsupported(
                source, "model.vocab", f"id {i} of {other[:20]!r} and {name[:20]!r}", "one each"
            )
        names[i] = name
    if gap := next((i for i in range(len(names)) if i not in names), None):
        raise _unsupported(
            source, "model.vocab", f"{len(names):,} entries and no id {gap}", "ids without gaps"
        )
    return [names[i] for i in range(len(names))]


def _merges(model: _Model, source: str) -> list[tuple[str, str]]:
    """Return the merges as pairs. Raises UserError if an entry of one is not in the vocabulary."""
    merges = []
    for number, stated in enumerate(model.merges):
        pair = tuple(stated.split(" ")) if isinstance(stated, str) else stated
        if len(pair) != 2 or not all(pair):
            raise _unsupported(source, f"model.merges.{number}", stated, "two entries")
        left, right = pair
        for name in (left, right, left + right):
            if name not in model.vocab:
                raise _unsupported(
                    source,
                    f"model.merges.{number}",
                    f"{left} {right}"[:60],
                    f"an entry {shortened(name, 40)} in model.vocab",
                )
        merges.append((left, right))
    return merges


def _check_bytes(ids: dict[str, int], source: str) -> None:
    """Raise UserError if a byte that UTF-8 text can have is no entry: it would be lost."""
    for byte, spelling in enumerate(SPELLINGS):
        if spelling not in ids and byte not in UNUSED_BYTES:
            raise _unsupported(
                source, "model.vocab", f"no entry {spelling} (byte {byte:#04x})", "all bytes"
            )


def _check_added(file: _File, form: Form, special: set[str], made: set[str], source: str) -> None:
    """Check that text cannot encode to a special token, and that added tokens stay in a line.

    special: spellings of the special tokens. made: entries that merges make.
    """
    is_special = {token.content: token.special for token in file.added_tokens}
    for name in sorted(special):
        if not is_special.get(name):
            raise _unsupported(
                source, "added_tokens", f"no {name} with special = true", "all special tokens"
            )
        if name in made or name in SPELLINGS:
            raise _unsupported(source, "model.merges", f"a merge that makes {name}", "none")
    for number, token in enumerate(file.added_tokens):
        if token.special:
            continue
        key, text = f"added_tokens.{number}", token.content
        for field in ("single_word", "lstrip", "rstrip"):
            if getattr(token, field):
                raise _unsupported(source, f"{key}.{field}", True, "false if special is false")
        has_space = any(map(str.isspace, text)) and not text.isspace()
        if has_space or normalize(text, form) != text:
            expected = "white space alone or no white space, in Unicode NFC"
            raise _unsupported(source, f"{key}.content", text, expected)


def _check_template(
    processor: Any, special: dict[str, str], ids: dict[str, int], source: str
) -> None:
    """Raise UserError unless a post-processor makes [CLS] A [SEP] B [SEP], or adds no tokens."""
    kind = processor.get("type") if isinstance(processor, dict) else None
    if processor is None or kind == "ByteLevel":
        return
    if kind != "TemplateProcessing":
        raise _unsupported(source, "post_processor", processor, '"TemplateProcessing"')
    for key, parts in TEMPLATES.items():
        expected = [part.format_map(special) for part in parts]
        if (found := _template_parts(processor.get(key))) != expected:
            shown = " ".join(found) if found else processor.get(key)
            raise _unsupported(source, f"post_processor.{key}", shown, " ".join(expected))
    tokens = processor.get("special_tokens")
    for name in (special["cls"], special["sep"]):
        token = tokens.get(name) if isinstance(tokens, dict) else None
        found = token.get("ids") if isinstance(token, dict) else None
        if found != [ids[name]]:
            key = f"post_processor.special_tokens.{name}.ids"
            raise _unsupported(source, key, found, f"[{ids[name]}]")


def _template_parts(steps: Any) -> list[str] | None:
    """Return a template as [CLS] $A [SEP]; None if it is malformed."""
    parts = []
    for step in steps if isinstance(steps, list) else [None]:
        if not isinstance(step, dict) or len(step) != 1:
            return None
        ((kind, value),) = step.items()
        name = value.get("id") if isinstance(value, dict) else None
        if kind not in ("SpecialToken", "Sequence") or not isinstance(name, str):
            return None
        parts.append(f"${name}" if kind == "Sequence" else name)
    return parts


def _unmerged(file: _File, merges: list[tuple[str, str]], source: str) -> list[str]:
    """Return the entries of several bytes that no merge makes.

    Raises UserError if they are more than the others: then merges are missing.
    """
    made = {left + right for left, right in merges}
    kept = {token.content for token in file.added_tokens} | made
    rest = [n for n in file.model.vocab if n not in kept and not (len(n) == 1 and n in BYTE_OF)]
    if len(rest) > len(made):
        found = f"{len(merges):,} merges; {len(rest):,} entries such as {rest[0][:20]!r} have none"
        raise _unsupported(source, "model.merges", found, "a merge for each longer entry")
    return rest


def _in_one_form(
    file: _File,
    form: Form,
    merges: list[tuple[str, str]],
    special: dict[str, str],
    ids: dict[str, int],
) -> bytes:
    """Return the bytes of a tokenizer.json, which are equal for equal tokenizers."""
    steps = steps_as_json(form)
    vocabulary = dict(sorted(file.model.vocab.items(), key=lambda item: item[1]))
    return json_bytes(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [token.model_dump() for token in file.added_tokens],
            "normalizer": steps[0]
            if len(steps) == 1
            else {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": BYTE_LEVEL,
            "post_processor": template(special, ids),
            "decoder": BYTE_LEVEL,
            "model": {
                **{key: values[0] for key, values in MODEL_FIELDS.items()},
                "unk_token": None,
                "fuse_unk": False,
                "vocab": vocabulary,
                "merges": [f"{left} {right}" for left, right in merges],
            },
        }
    )


def template(special: dict[str, str], ids: dict[str, int]) -> dict[str, Any]:
    """Return the post-processor that makes [CLS] A [SEP] B [SEP], with type 1 from B on.

    special: role -> spelling of the special token.
    """
    made: dict[str, Any] = {"type": "TemplateProcessing"}
    for key, parts in TEMPLATES.items():
        steps = []
        for number, part in enumerate(parts):
            kind, name = "SpecialToken", part.format_map(special)
            if part[0] == "$":
                kind, name = "Sequence", part[1:]
            steps.append({kind: {"id": name, "type_id": int(number >= 3)}})
        made[key] = steps
    used = (special["cls"], special["sep"])
    made["special_tokens"] = {
        name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in used
    }
    return made
