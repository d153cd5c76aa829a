"""Normalization of text before it is split into tokens.

The tokenizer applies it, so that every verb and the exported tokenizer give a text the same ids.

    nfc_only    Unicode NFC and nothing else, for byte-level vocabularies of other programs
    nfc         line ends become spaces, control characters are removed, then Unicode NFC
    nfkc        line ends, tabs, U+1680 and U+2581 become spaces, control characters are removed,
                then Unicode NFKC
    nfkc_lower  as nfkc, then lower case
    nfkc_visible, nfkc_visible_lower
                as nfkc and nfkc_lower, without soft hyphens, marks of the direction of writing, and
                word joiners; the zero-width joiner and non-joiner stay
    none        no change, for vocabularies of other programs

All forms replace surrogates by U+FFFD first. NFC, NFKC and lower case are computed as in the
library tokenizers, because exported tokenizers use it; its Unicode tables are older than Python's.
The running time is linear in the length of the text, also for long runs of combining marks, which
Python's own functions sort in quadratic time.
"""

from __future__ import annotations

import json
import re
import unicodedata
from functools import cache
from typing import Any, Literal, get_args

Form = Literal[
    "nfc", "nfkc", "nfkc_lower", "nfkc_visible", "nfkc_visible_lower", "none", "nfc_only"
]
FORMS: tuple[Form, ...] = get_args(Form)
# Characters at which str.splitlines() divides a text.
_LINE_ENDS = "\n\x0b\x0c\r\x1c-\x1e\x85\u2028\u2029"
# White space that NFKC does not map to U+0020, and U+2581, SentencePiece's symbol for a space.
_OTHER_SPACES = "\t\u1680\u2581"
# Control characters except \x09 to \x0d, zero-width space, byte order mark, U+FFFD.
_CONTROL = "\x00-\x08\x0e-\x1f\x7f-\x9f\u200b\ufeff\ufffd"
# Format characters that change how a text is shown, but not its words: soft hyphen, marks of the
# direction of writing, word joiner. U+200C and U+200D distinguish words, as in Persian and Hindi.
_INVISIBLE = "\xad\u061c\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069"
LINE_ENDS = re.compile(f"[{_LINE_ENDS}]")
SPACES = re.compile(f"[{_LINE_ENDS}{_OTHER_SPACES}]")
CONTROL = re.compile(f"[{_CONTROL}]")
INVISIBLE = re.compile(f"[{_INVISIBLE}]")
# Halves of UTF-16 pairs. Python also uses them for bytes of the command line that are not UTF-8.
SURROGATES = re.compile("[\ud800-\udfff]")
# Characters without the category of marks that NFKC composes with the character before: vowels and
# final consonants of Hangul, the voicing marks of half-width kana; in their canonical forms.
_JOINED = re.compile("[\u1161-\u1175\u11a8-\u11c2\u3099\u309a]")
# Texts with the same lower case in Python and in the library. In Python, the lower case of the
# Greek Sigma depends on the context, and that of scripts with recently assigned capitals on the
# version.
SAME_LOWER = re.compile(
    "[\x00-\u012f\u0131-\u03a2\u03a4-\u052f\u0590-\u109f\u1100-\u11ff\u1e00-\u1fff\u2000-\u20ff"
    "\u3000-\ua63f\uac00-\ud7a3\uff00-\uffef]*"
)


def normalize(text: str, form: Form) -> str:
    """Return a text in a form, without surrogates.

    The result equals that of `native_steps` for texts without surrogates.
    """
    # No character that is replaced or removed is printable, except U+FFFD and U+2581.
    if not text.isprintable():
        text = without_surrogates(text)
    elif text.isascii():
        return text.lower() if form.endswith("_lower") else text
    if form == "none":
        return text
    if form == "nfc_only":
        return nfc(text)
    if not text.isprintable() or "\u1680" in text or "\u2581" in text:
        text = (LINE_ENDS if form == "nfc" else SPACES).sub(" ", text)
        text, _ = without_control(text)
        if form.startswith("nfkc_visible"):
            text = INVISIBLE.sub("", text)
    elif "\ufffd" in text:
        text = text.replace("\ufffd", "")
    text = _composed(text, form)
    return _composed(_lower(text), form) if form.endswith("_lower") else text


def without_surrogates(text: str) -> str:
    """Return a text of the same length in which each surrogate is U+FFFD."""
    return SURROGATES.sub("\ufffd", text)


def without_control(text: str) -> tuple[str, int]:
    """Return a text without control characters, and their number."""
    if text.isprintable() and "\ufffd" not in text:  # no other one is printable
        return text, 0
    return CONTROL.subn("", text)


def nfc(text: str) -> str:
    """Return a text in Unicode NFC."""
    return _composed(text, "nfc")


def _composed(text: str, form: Form) -> str:
    """Return a text in Unicode NFC or NFKC, with the Unicode tables of the library tokenizers.

    A text that is normalized by Python's newer tables is also normalized by older ones, because
    Unicode does not change the normalization of assigned characters.
    """
    if text.isascii() or unicodedata.is_normalized("NFC" if form == "nfc" else "NFKC", text):
        return text
    return _native("NFC" if form == "nfc" else "NFKC").normalize_str(text)


def _lower(text: str) -> str:
    """Return a text in lower case as in the library tokenizers: without regard to context."""
    return text.lower() if SAME_LOWER.fullmatch(text) else _native("Lowercase").normalize_str(text)


def native_steps(form: Form) -> list[Any]:
    """Return the steps of a form as normalizers of the library tokenizers; [] for none."""
    from tokenizers import Regex, normalizers

    if form == "none":
        return []
    if form == "nfc_only":
        return [_native("NFC")]
    spaces = _LINE_ENDS if form == "nfc" else _LINE_ENDS + _OTHER_SPACES
    deleted = _CONTROL + (_INVISIBLE if form.startswith("nfkc_visible") else "")
    steps = [
        normalizers.Replace(Regex(f"[{_escaped(spaces)}]"), " "),
        normalizers.Replace(Regex(f"[{_escaped(deleted)}]"), ""),
        _native("NFC" if form == "nfc" else "NFKC"),
    ]
    if form.endswith("_lower"):  # lower case may give characters that NFKC composes
        steps += [_native("Lowercase"), _native("NFKC")]
    return steps


@cache
def steps_as_json(form: Form) -> list[dict[str, Any]]:
    """Return the steps of a form in the format of tokenizer.json."""
    from tokenizers import Tokenizer, models, normalizers

    tokenizer = Tokenizer(models.WordPiece())
    tokenizer.normalizer = normalizers.Sequence(native_steps(form))
    return json.loads(tokenizer.to_str())["normalizer"]["normalizers"]


def _escaped(characters: str) -> str:
    """Return the content of a character class of the library's regular expressions, in ASCII."""
    return "".join(c if c == "-" else f"\\x{{{ord(c):x}}}" for c in characters)


@cache
def _native(name: str) -> Any:
    from tokenizers import normalizers

    return getattr(normalizers, name)()


@cache
def aligner(form: Form) -> Any:
    """Return a tokenizer with one token for each character of the normalized text.

    The offsets of a token are those of its character in the original text.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    characters = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    characters.normalizer = normalizers.Sequence(native_steps(form))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("(?m:.)"), "isolated")
    return characters


def whole_characters(
    text: str, spans: list[tuple[int, int]], space: str = "\u2581"
) -> list[tuple[int, int]]:
    """Return the spans of tokens without leading white space and with trailing combining marks.

    Vowels and final consonants of Hangul and the voicing marks of half-width kana, which the
    normalization composes with the character before, count as marks, too.
    text: not normalized. spans: (start, end) of each token in it, in order. A mark that belongs to
    the next token stays there. space: a character that counts as white space, or "".
    """
    result = []
    starts = [start for start, _ in spans] + [len(text)]
    for (start, end), limit in zip(spans, starts[1:], strict=True):
        while start < end and (text[start].isspace() or text[start] == space):
            start += 1
        while start < end < limit and _is_joined(text[end]):
            end += 1
        result.append((start, end))
    return result


def _is_joined(character: str) -> bool:
    """Return whether a character may belong to the one before it."""
    if unicodedata.category(character)[0] == "M":
        return True
    return _JOINED.match(unicodedata.normalize("NFKC", character)) is not None
