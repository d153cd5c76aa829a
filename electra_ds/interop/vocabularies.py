"""Loading of the tokenizer of a model, and checks that it is the one of its training."""

from pathlib import Path

from electra_ds.common.errors import UserError
from electra_ds.common.special_ids import SpecialIds
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer
from electra_ds.training import checkpoint


def checked_tokenizer(path: Path, vocab_size: int | None) -> Tokenizer:
    """Load the tokenizer in `path`.

    vocab_size: number of entries that the model was trained with.
    Raises UserError when the tokenizer has another number of entries.
    """
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
    """Load the tokenizer of a checkpoint and compare it with the records of the checkpoint.

    folder: the checkpoint. given: path of the tokenizer, or None for the tokenizer folder of the
    checkpoint. vocab_size, special_ids, fingerprint: those of the tokenizer that the model was
    trained with; None for special_ids and fingerprint that are not known.
    Raises UserError when the tokenizer differs from these values, or from the tokenizer folder of
    the checkpoint.
    """
    own = checkpoint.tokenizer_of(folder)
    tokenizer = checked_tokenizer(given or own, vocab_size)
    if given is not None and own.is_dir():
        check_same_vocabulary(tokenizer, given, load_tokenizer(own), own)
    is_other = special_ids is not None and tokenizer.special_ids != special_ids
    if is_other or (fingerprint is not None and tokenizer.fingerprint != fingerprint):
        raise UserError(
            f"{given or own}: not the vocabulary of {folder}: its special ids or its fingerprint "
            "differ from those in meta.json; give the tokenizer of the training with --tokenizer"
        )
    return tokenizer


def check_same_vocabulary(
    found: Tokenizer, place: str | Path, own: Tokenizer, own_place: str | Path
) -> None:
    """Raise UserError unless two tokenizers have the same kind, entries and options.

    The normalization is one of the options. The scores in SentencePiece files are not compared.
    found, place: the tokenizer to check and its path. own, own_place: those of the model.
    """
    if (found.kind, found.names) != (own.kind, own.names):
        differ = sum(a != b for a, b in zip(found.names, own.names, strict=False))
        found_size = f"{found.kind} of {found.vocab_size:,} entries"
        own_size = f"{own.kind} of {own.vocab_size:,} entries"
        difference = (
            f"it is {found_size}, that of the model is {own_size}"
            if found_size != own_size
            else f"{differ:,} of {own.vocab_size:,} entries differ"
        )
        raise UserError(
            f"{place}: its vocabulary is not that of the model ({own_place}): {difference}; "
            "prepare the data with the model's tokenizer"
        )
    options = [{**each.options, "normalization": each.normalization} for each in (found, own)]
    if options[0] != options[1]:
        raise UserError(
            f"{place}: its tokenizer has the options {options[0]}, that of the model "
            f"({own_place}) has {options[1]}; prepare the data with the model's tokenizer"
        )
