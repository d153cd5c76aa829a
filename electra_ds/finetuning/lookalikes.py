"""Labels that look equal but consist of different characters, and spellings of one number.

Such labels come from keyboards of two scripts, from Unicode forms, from invisible characters, and
from programs that write 1 as 1.0.
Each of them would become a class of its own.
"""

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal

from electra_ds.common.errors import UserError
from electra_ds.common.printable import shortened
from electra_ds.finetuning.metrics import not_entity_tags

# Letters of Cyrillic and Greek -> the letter of Latin that looks the same.
_SAME_SHAPE = str.maketrans(
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0423\u0425\u0405\u0406\u0408"
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0455\u0456\u0458"
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03bf",
    "ABEKMHOPCTYXSIJaeopcyxsijABEZHIKMNOPTYXo",
)
# Letters and digits of related scripts with the same shape: D with a stroke, schwa, kaf, the digits of
# Arabic -> those of Persian, he of katakana -> that of hiragana, ideographs -> katakana.
_SAME_SHAPE |= str.maketrans(
    "\u00d0\u0189\u04d8\u04d9\u0643\u0660\u0661\u0662\u0663\u0667\u0668\u0669"
    "\u30d8\u4e8c\u516b\u529b\u53e3\u5915\u5de5",
    "\u0110\u0110\u018f\u0259\u06a9\u06f0\u06f1\u06f2\u06f3\u06f7\u06f8\u06f9"
    "\u3078\u30cb\u30cf\u30ab\u30ed\u30bf\u30a8",
)
# Sequences that are shown alike -> one of them, in this order. Texts are in NFD.
_SAME_SEQUENCE = (
    ("[\u064a\u0649](?=[\u0620-\u064a\u066e-\u06d3])", "\u06cc"),  # yeh before a letter
    ("\u0e33", "\u0e4d\u0e32"),  # am of Thai, and of Lao
    ("\u0eb3", "\u0ecd\u0eb2"),
    ("\u0e4d([\u0e48-\u0e4b])", "\\1\u0e4d"),  # circle and tone mark in either order
    ("\u0ecd([\u0ec8-\u0ecb])", "\\1\u0ecd"),
    ("\u0e40\u0e40", "\u0e41"),  # ae of Thai and of Lao as two e
    ("\u0ec0\u0ec0", "\u0ec1"),
    ("([\u0b92\u0bc6])\u0bd7", "\\1\u0bb3"),  # au of Tamil: its second part looks like a letter
)
# The last yeh of a word -> that of Persian, which has the shape of the one and the sound of both. In
# Arabic the two are different letters, so they are not compared with each other.
_LAST_YEHS = ({0x0649: "\u06cc"}, {0x064A: "\u06cc"})
# Variation selectors and the grapheme joiner, which have no width although they are no Cf.
_NO_WIDTH = {*map(chr, range(0xFE00, 0xFE10)), "\u034f"}


def appearance(text: str) -> str:
    """Return a text in a form that is equal for texts that look equal.

    Unicode forms, invisible characters, kinds of white space, widths of East Asian letters, letters
    of Latin, Cyrillic and Greek with the same shape, and the letters of `_SAME_SEQUENCE` do not
    differ in it. Case does.
    """
    visible = "".join(
        c for c in text if c not in _NO_WIDTH and unicodedata.category(c) not in ("Cf", "Cc")
    )
    plain = "".join(map(_of_usual_width, visible))
    shown = unicodedata.normalize("NFD", plain).translate(_SAME_SHAPE)
    for sequence, other in _SAME_SEQUENCE:
        shown = re.sub(sequence, other, shown)
    return " ".join(unicodedata.normalize("NFC", shown).split())


def _of_usual_width(character: str) -> str:
    """Return the usual form of a full-width letter or half-width kana; else the character."""
    kind, _, codes = unicodedata.decomposition(character).partition(" ")
    return chr(int(codes, 16)) if kind in ("<wide>", "<narrow>") else character


def _number(label: str) -> str:
    """Return the shortest spelling of a decimal number, such as 1 for 01 and 1.0; else the label.

    Digits may be those of any script.
    """
    plain = "".join(map(_of_usual_width, label)).replace("\u066b", ".")  # decimal point of Arabic
    if not re.fullmatch(r"[+-]?\d{1,15}(\.\d{1,15})?", plain):
        return label
    return str(Decimal(plain).normalize() + 0)  # + 0: no negative zero


def check_labels(labels: Sequence[str], task: str) -> None:
    """Raise UserError if two labels of a training split look equal, or are the same number.

    Also for a tag that looks like one of BIO or BIOES and is none. task: its name.
    """
    seen: dict[tuple[int, str], str] = {}
    numbers: dict[str, str] = {}
    for label in labels:
        other = numbers.setdefault(_number(label), label)
        if other != label:
            raise UserError(
                f"task {task}: the labels {shortened(other)} and {shortened(label)} of the training "
                "split are the same number in another spelling; write them alike (1 becomes 1.0 if "
                "a program reads the column as decimal numbers); if they are two classes, list all "
                "classes as `labels` of the task"
            )
        shown = appearance(label)
        keys = [(i, shown.translate(yeh)) for i, yeh in enumerate(_LAST_YEHS)]
        equal = [other for key in keys if (other := seen.setdefault(key, label)) != label]
        if equal:
            other = equal[0]
            raise UserError(
                f"task {task}: the labels {shortened(other)} ({other!a}) and {shortened(label)} "
                f"({label!a}) of the training split look equal, but differ in their characters; "
                "write them with the same characters; if they are two classes, list all classes "
                "as `labels` of the task"
            )
    has_entities = any(
        "-" in shown and not not_entity_tags([shown]) for shown in map(appearance, labels)
    )
    for label in not_entity_tags(list(labels)) if has_entities else ():
        if not not_entity_tags([appearance(label)]):
            raise UserError(
                f"task {task}: the tag {shortened(label)} ({label!a}) looks like one of BIO or "
                "BIOES, but begins with another character; write B, I, E, S, L, U and the "
                "hyphen in ASCII; if it is correct, list all tags as `labels` of the task"
            )
