"""The tokenizer of a data folder: compared with the manifest, loaded and copied."""

import contextlib
import os
from pathlib import Path

from electra_ds.common.errors import UserError
from electra_ds.common.files import sha256_file
from electra_ds.common.json_files import read_small
from electra_ds.common.own_folder import own_folder
from electra_ds.common.printable import printable
from electra_ds.data.shard_format import TokenizerInfo
from electra_ds.data.tokenizer import VOCABULARY_FILES, Tokenizer, load_tokenizer
from electra_ds.data.tokenizer.saving import OPTIONS, is_saved, save_files

_checked: set[tuple[str, ...]] = set()  # files that agree with a fingerprint, to check them once


def load_data_tokenizer(data_dir: str | Path, info: TokenizerInfo) -> Tokenizer:
    """Load DATA/tokenizer. info: that of the manifest.

    Raises UserError when it is missing, damaged, or not the tokenizer with which the rows were
    made.
    """
    folder = Path(data_dir) / "tokenizer"
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != info.sha256:
        raise UserError(
            f"{printable(folder)}: its fingerprint is {tokenizer.fingerprint}; expected "
            f"{info.sha256}, that of the tokenizer with which the rows were made; copy the data "
            "again"
        )
    found = (tokenizer.kind, tokenizer.vocab_size, tokenizer.special_ids)
    if found != (info.kind, info.vocab_size, info.special_ids):
        raise UserError(
            f"{printable(folder)}: {tokenizer.kind} with {tokenizer.vocab_size} entries and "
            f"{tokenizer.special_ids}; manifest.json says {info.kind}, {info.vocab_size} and "
            f"{info.special_ids}; copy the data again"
        )
    return tokenizer


def check_data_tokenizer(data_dir: str | Path, info: TokenizerInfo) -> None:
    """Like `load_data_tokenizer`, but equal files are loaded only once in a process."""
    folder = Path(data_dir) / "tokenizer"
    key = [info.model_dump_json()]
    for name in (*VOCABULARY_FILES, "options.json"):
        path = folder / name
        with contextlib.suppress(OSError):  # reported by loading
            if path.is_file():
                key += [name, sha256_file(path)]
    if tuple(key) not in _checked:
        load_data_tokenizer(data_dir, info)
        _checked.add(tuple(key))


def copy_tokenizer(info: TokenizerInfo, tokenizer: Path, folder: Path) -> None:
    """Copy the tokenizer's files of a data folder, and no other files, into `folder`.

    info: that of the manifest. tokenizer: the folder DATA/tokenizer, which may be read-only. The
    copies have the mode of new files; equal copies are left as they are. An interrupted copy leaves
    the former files or the new ones. Raises UserError when a file cannot be read or `folder` is a
    link out of its parent, OSError when it cannot be written.
    """
    names = {Path(name).name: name for name in info.files}
    contents = {
        name: read_small(tokenizer.parent / path, "a file of the tokenizer")
        for name, path in names.items()
    }
    options = contents.pop(OPTIONS)
    ((name, content),) = contents.items()
    if is_saved(folder, name, content, options):
        return
    own_folder(folder.parent, folder.name)
    with contextlib.suppress(OSError):  # earlier versions copied the mode of the folder, too
        os.chmod(folder, folder.stat().st_mode | 0o700)
    save_files(folder, name, content, options)
