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
# Variation selectors and the grapheme joiner, which have no width although they are no Cf.
_NO_WIDTH = {*map(chr, range(0xFE00, 0xFE10)), "\u034f"}


def appearance(text: str) -> str:
    """Return a text in a form that is equal for texts that look equal.

    Unicode forms, invisible characters, kinds of white space, and letters of Latin, Cyrillic and
    Greek with the same shape do not differ in it. Case does.
    """
    visible = "".join(
        c for c in text if c not in _NO_WIDTH and unicodedata.category(c) not in ("Cf", "Cc")
    )
    composed = unicodedata.normalize("NFC", visible)
    return " ".join(composed.translate(_SAME_SHAPE).split())


def _number(label: str) -> str:
    """Return the shortest spelling of a decimal number, such as 1 for 01 and 1.0; else the label."""
    if not re.fullmatch(r"[+-]?[0-9]{1,15}(\.[0-9]{1,15})?", label):
        return label
    return str(Decimal(label).normalize() + 0)  # + 0: no negative zero


def check_labels(labels: Sequence[str], task: str) -> None:
    """Raise UserError if two labels of a training split look equal, or are the same number.

    Also for a tag that looks like one of BIO or BIOES and is none. task: its name.
    """
    seen: dict[str, str] = {}
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
        other = seen.setdefault(appearance(label), label)
        if other != label:
            raise UserError(
                f"task {task}: the labels {shortened(other)} ({other!a}) and {shortened(label)} "
                f"({label!a}) of the training split look equal, but differ in their characters; "
                "write them with the same characters; if they are two classes, list all classes "
                "as `labels` of the task"
            )
    has_entities = any(
        "-" in label and not not_entity_tags([appearance(label)]) for label in labels
    )
    for label in not_entity_tags(list(labels)) if has_entities else ():
        if not not_entity_tags([appearance(label)]):
            raise UserError(
                f"task {task}: the tag {shortened(label)} ({label!a}) looks like one of BIO or "
                "BIOES, but begins with another character; write B, I, E, S, L and U as letters "
                "of Latin; if it is correct, list all tags as `labels` of the task"
            )
