"""The files of a tokenizer in a folder, replaced together.

A folder has a vocabulary file and options.json. A new vocabulary is first written as
.next-KEY.NAME, where KEY is from the sha256 of its options.json. Writing options.json makes it the
vocabulary of the folder: a reader takes the file .next-KEY.NAME that belongs to options.json, if
there is one. Then the file is renamed to NAME. So an interrupted save leaves the former tokenizer
or the new one.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from electra_ds.common.errors import UserError
from electra_ds.common.files import fsync_folder, write_bytes
from electra_ds.common.json_files import read_small

OPTIONS = "options.json"
# Names of vocabularies. In a folder with several, the first one is read.
VOCABULARY_FILES = (
    "vocab.txt",
    "spm.model",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "tokenizer.json",  # of a byte-level BPE, or of a WordPiece of another program
)


def save_files(folder: Path, name: str, content: bytes, options: bytes) -> None:
    """Write a vocabulary file and options.json. Equal files are left as they are.

    name, content: of the vocabulary file. options: content of options.json
    Other vocabularies of the folder, which would be read instead, are removed. OSError when a file
    cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(folder):
        if not is_saved(folder, name, content, options):
            _replace_files(folder, name, content, options)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process saves to `folder`, if its file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # also releases the lock


def _replace_files(folder: Path, name: str, content: bytes, options: bytes) -> None:
    """Write the files of a tokenizer; see `save_files`."""
    next_file = folder / _next_name(options, name)
    write_bytes(next_file, content)
    write_bytes(folder / OPTIONS, options)
    for other in VOCABULARY_FILES[: VOCABULARY_FILES.index(name)]:
        (folder / other).unlink(missing_ok=True)
    os.replace(next_file, folder / name)
    fsync_folder(folder)
    for left in folder.glob(".next-*"):  # of earlier saves that were interrupted
        with contextlib.suppress(OSError):
            left.unlink()


def next_vocabulary(folder: Path) -> Path | None:
    """Return the vocabulary file of an interrupted save that options.json belongs to, if any."""
    names = [path.name for path in folder.glob(".next-*")]
    if not names:
        return None
    try:
        options = read_small(folder / OPTIONS, "a tokenizer's options")
    except UserError:  # without options.json the save had not replaced anything
        return None
    found = [name for name in VOCABULARY_FILES if _next_name(options, name) in names]
    return folder / _next_name(options, found[0]) if found else None


def _next_name(options: bytes, name: str) -> str:
    return f".next-{sha256(options).hexdigest()[:16]}.{name}"


def is_saved(folder: Path, name: str, content: bytes, options: bytes) -> bool:
    """Whether a folder has these files, and no other vocabulary that would be read instead."""
    before = VOCABULARY_FILES[: VOCABULARY_FILES.index(name)]
    try:
        return (
            (folder / OPTIONS).read_bytes() == options
            and (folder / name).read_bytes() == content
            and next_vocabulary(folder) is None
            and not any((folder / other).exists() for other in before)
        )
    except OSError:
        return False
