"""The folder of a new vocabulary, checked before the training."""

from __future__ import annotations

from pathlib import Path

from electra_ds.common.errors import UserError
from electra_ds.common.outputs import check_output_folder
from electra_ds.common.printable import printable
from electra_ds.data.tokenizer import VOCABULARY_FILES, Tokenizer

# Files of a tokenizer of another program, which would be read beside the new vocabulary.
FOREIGN_FILES = ("tokenizer_config.json",)
# Files of prepared data, of runs and of models. Their tokenizers must stay the same.
OWNERS = (
    "manifest.json",
    "prepare.json",
    "meta.json",
    "metrics.jsonl",
    "config.json",
    "model.safetensors",
)


def check_vocabulary_folder(out: Path, kind: type[Tokenizer]) -> None:
    """Raise UserError when a vocabulary of this kind cannot be written to the folder `out`.

    `out` must be writable, must not belong to prepared data, a run or a model, since their
    vocabulary would be lost, and must not have another vocabulary, which would be read instead of
    the new one.
    Another vocabulary of the same kind is replaced.
    """
    check_output_folder(out, "--out")
    for folder in (out, out.resolve().parent):
        for name in OWNERS:
            if (folder / name).exists():
                raise UserError(
                    f"--out {printable(out)}: {printable(folder)} holds {name}, so the vocabulary "
                    "belongs to prepared data, a run or a model; choose another folder"
                )
    for name in (*VOCABULARY_FILES, *FOREIGN_FILES):
        if name != kind.file_name and (out / name).is_file():
            raise UserError(
                f"--out {printable(out)}: holds {name}, which would be read beside the new "
                f"{kind.file_name}; give another folder, or remove it"
            )
