"""Ids of the special tokens."""

from electra_ds.common.section import Section, science


class SpecialIds(Section):
    """Token ids with a meaning of their own; the tokenizer's, never a choice of the run."""

    pad: int = science(..., "id of [PAD]")
    unk: int = science(..., "id of [UNK]")
    cls: int = science(..., "id of [CLS]")
    sep: int = science(..., "id of [SEP]")
    mask: int = science(..., "id of [MASK]")
