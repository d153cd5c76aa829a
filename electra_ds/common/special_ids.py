"""Ids of the special tokens, and the character that stands for [UNK] in documents."""

from electra_ds.common.section import Section, science

# The <unk> of WikiText: a noncharacter that no text contains. `Tokenizer.encode_lines` makes it
# [UNK].
UNKNOWN = "\ufdd0"


class SpecialIds(Section):
    """Ids of the special tokens, as the tokenizer of the data defines them."""

    pad: int = science(..., "id of [PAD]")
    unk: int = science(..., "id of [UNK]")
    cls: int = science(..., "id of [CLS]")
    sep: int = science(..., "id of [SEP]")
    mask: int = science(..., "id of [MASK]")
