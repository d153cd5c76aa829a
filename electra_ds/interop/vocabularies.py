"""The tokenizer of a model, compared with what is on record about it."""

from pathlib import Path

from electra_ds.common.errors import UserError
from electra_ds.common.special_ids import SpecialIds
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer
from electra_ds.training import checkpoint


def checked_tokenizer(path: Path, vocab_size: int | None) -> Tokenizer:
    """The tokenizer in `path`. UserError when its size is not vocab_size, the size of the model."""
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{path}: {tokenizer.vocab_size} entries, but the model was trained with {vocab_size}; "
            "expected the vocabulary of the model, beside its weights or where the command takes "
            "it (--tokenizer)"
        )
    return tokenizer


def tokenizer_of_model(
    folder: Path,
    given: Path | None,
    vocab_size: int | None,
    special_ids: SpecialIds | None = None,
    fingerprint: str | None = None,
) -> Tokenizer:
    """The tokenizer of a checkpoint, compared with all that is on record about it.

    folder: the checkpoint. given: another place of the tokenizer, or None for the one beside it.
    special_ids, fingerprint: of the tokenizer that the model was trained with, if they are known.
    UserError when `given` is another vocabulary than the one beside the checkpoint.
    """
    own = checkpoint.tokenizer_of(folder)
    words = checked_tokenizer(given or own, vocab_size)
    if given is not None and own.is_dir():
        check_same_vocabulary(words, given, load_tokenizer(own), own)
    is_other = special_ids is not None and words.special_ids != special_ids
    if is_other or (fingerprint is not None and words.fingerprint != fingerprint):
        raise UserError(
            f"{given or own}: another vocabulary than that of {folder}: its special ids or its "
            "fingerprint differ from those in meta.json; give the tokenizer of the training with "
            "--tokenizer"
        )
    return words


def check_same_vocabulary(
    found: Tokenizer, place: str | Path, own: Tokenizer, own_place: str | Path
) -> None:
    """Raise UserError unless two tokenizers turn every text into the same ids."""
    if (found.kind, found.names) != (own.kind, own.names):
        differ = sum(a != b for a, b in zip(found.names, own.names, strict=False))
        raise UserError(
            f"{place}: its vocabulary is not that of the model ({own_place}): {differ:,} of "
            f"{own.vocab_size:,} entries differ; prepare the data with the model's tokenizer"
        )
    options = [{**words.options, "normalization": words.normalization} for words in (found, own)]
    if options[0] != options[1]:
        raise UserError(
            f"{place}: its tokenizer has the options {options[0]}, that of the model "
            f"({own_place}) has {options[1]}; prepare the data with the model's tokenizer"
        )
