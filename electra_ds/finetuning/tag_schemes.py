"""Tags of spans in another scheme."""

from __future__ import annotations

from typing import Literal

from electra_ds.common.errors import UserError
from electra_ds.common.printable import shortened
from electra_ds.finetuning.metrics import entities, not_entity_tags

# file: the tags of the file. bioes: B, I and E for the first, inner and last word of a span, S for a
# span of one word, O outside.
TagScheme = Literal["file", "bioes"]


def in_scheme(scheme: TagScheme, tags: list[str], where: str) -> list[str]:
    """Return the tags of a sentence with the same spans in a scheme.

    tags: of BIO, in both variants, BIOES or BILOU. where: for messages. Raises UserError for others.
    """
    if scheme == "file":
        return tags
    if odd := not_entity_tags(tags):
        raise UserError(
            f"{where}: found the tag {shortened(odd[0])}; expected tags such as O, B-NP and I-NP in "
            "the last column; correct the file"
        )
    changed = ["O"] * len(tags)
    for start, end, kind in entities(tags):
        for word in range(start, end):
            prefix = "I" if word > start else "B"
            if word == end - 1:
                prefix = "E" if word > start else "S"
            changed[word] = f"{prefix}-{kind}"
    return changed
