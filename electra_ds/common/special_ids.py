"""Ids of the special tokens."""

from electra_ds.common.section import Section, science


class SpecialIds(Section):
    """Ids of the special tokens, as the tokenizer of the data defines them."""

    pad: int = science(..., "id of [PAD]")
    unk: int = science(..., "id of [UNK]")
    cls: int = science(..., "id of [CLS]")
    sep: int = science(..., "id of [SEP]")
    mask: int = science(..., "id of [MASK]")
