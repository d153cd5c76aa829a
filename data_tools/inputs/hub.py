"""Hugging Face datasets as inputs, from the hub or a folder, streamed by the `datasets` library.

A dataset is named `dataset:NAME?config=C&split=S&revision=R`; the default split is train. No code
of a dataset is run: the versions of the library that the extra [hf] requires cannot run it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any
from urllib.parse import parse_qsl, urlencode

from data_tools.inputs.streams import fingerprint, open_input
from electra_ds.common.dataset_cards import check_folder_cards, check_hub_cards
from electra_ds.common.dataset_features import check_not_decoded
from electra_ds.common.decompression import content_of
from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable
from electra_ds.common.redaction import redacted

DATASET = "dataset:"
COMPRESSIONS = {"gzip": ".gz", "bz2": ".bz2", "xz": ".xz", "zstd": ".zst"}  # names of fsspec
_OPTIONS = {"config", "split", "revision"}


def find_shards(given: str) -> list[tuple[str, str, int, str, str]]:
    """Return the fields of a `Source` for each shard of the split that `dataset:...` names.

    The name holds no path of this machine. The path holds the revision that the hub has now, so
    all shards are read from one revision. The digest is that of the names, sizes and first bytes of
    the split's files; the size is the mean over the shards. Raises UserError for an invalid name or
    option; errors of the library are raised as they are.
    """
    name, options = _parse(given)
    label = name
    folder = os.path.realpath(os.path.expanduser(name))
    if os.path.isdir(folder):
        name = folder
        label = os.path.basename(folder)
    files, rows = _open_split(name, **options)
    fingerprints = []
    for file in files:
        with open_input(file) as raw:
            inner_name = re.sub("^hf://.*?@[^/]*", "", file.removeprefix(name))
            fingerprints.append((inner_name, *fingerprint(raw)))
    digest = hashlib.sha256(repr(fingerprints).encode()).hexdigest()[:16]
    size = -(-sum(size for _, size, _ in fingerprints) // rows.num_shards)
    revision = re.match("hf://.*?@([0-9a-f]{40})/", files[0])
    path = _spell(name, options | ({"revision": revision[1]} if revision else {}))
    label = _spell(label, options)
    return [
        (f"{label} shard {shard}", path, size, f"dataset:{shard}", digest)
        for shard in range(rows.num_shards)
    ]


def read_shard(path: str, shard: int, text_field: str) -> Iterator[Any]:
    """Yield the text field of each row of a shard.

    Raises UserError when the dataset or the field is missing or cannot be read, and before a row is
    read for a field of images or files; errors of the network are raised as they are.
    """
    name, options = _parse(path)
    _, rows = _open_split(name, **options)
    try:
        if rows.column_names:  # else the columns are known only row by row
            rows = rows.select_columns([text_field])
        check_not_decoded(rows.features or {}, [text_field], f"{DATASET}{printable(name)}")
        for row in rows.shard(rows.num_shards, shard):
            yield row.get(text_field)
    except UserError:
        raise
    except ValueError as error:  # Arrow's errors are ValueErrors, too
        raise UserError(
            f"{DATASET}{name} shard {shard}: {' '.join(str(error).split())}; expected rows with a "
            f"text in --text-field {text_field!r}"
        ) from None


def _parse(given: str) -> tuple[str, dict[str, str]]:
    """Split dataset:NAME?OPTIONS into the name and the options."""
    name, _, query = given.removeprefix(DATASET).partition("?")
    options = {"split": "train", **dict(parse_qsl(query, keep_blank_values=True))}
    if not name or options.keys() - _OPTIONS:
        raise UserError(
            f"{given}: expected dataset:NAME, followed by ?config=C&split=S&revision=R or some of "
            "these"
        )
    return name, options


def _spell(name: str, options: dict[str, str]) -> str:
    """The inverse of _parse."""
    return f"{DATASET}{name}?{urlencode(sorted(options.items()), safe='/')}"


@lru_cache(maxsize=1)  # so that a worker opens a dataset once instead of once per shard
def _open_split(
    name: str, split: str, config: str | None = None, revision: str | None = None
) -> tuple[list[str], Any]:
    """Return (files, rows as a streaming dataset) of a split."""
    os.environ.setdefault("USE_TORCH", "0")  # else the library imports torch
    import datasets

    _limit_expansion()
    is_folder = os.path.isdir(name)
    # Before `datasets` reads any file or URL that the card names.
    if is_folder:
        check_folder_cards(name)
    else:
        revision = check_hub_cards(name, revision)
    builder = datasets.load_dataset_builder(name, config, revision=revision)
    files = builder.config.data_files or {}
    root = f"{os.path.normpath(name)}/" if is_folder else f"hf://datasets/{name}@"
    for file in files.get(split, ()):
        if not file.startswith(root) or ".." in file.split("/"):
            raise _leaves_folder(name, file)
    rows = builder.as_streaming_dataset(split)
    return files[split], rows


def _limit_expansion() -> None:
    """Let fsspec, by which `datasets` opens compressed files, read them with the limit of inputs."""
    from fsspec.compression import register_compression

    for name, suffix in COMPRESSIONS.items():
        register_compression(name, partial(_decompressed, suffix), (), force=True)


def _decompressed(suffix: str, file: Any, mode: str = "rb", **_options: Any) -> Any:
    """Return the content of a file that fsspec opened. suffix: of its compression"""
    if not mode.startswith("r"):
        raise ValueError(f"mode {mode!r}; compressed files are only read")
    name = redacted(str(getattr(file, "path", None) or getattr(file, "name", "a file")))
    return content_of(file, name if name.endswith(suffix) else f"{name}{suffix}")


def _leaves_folder(name: str, file: str) -> UserError:
    return UserError(
        f"{DATASET}{printable(name)}: a split has {printable(redacted(file))[:200]}, which is not in "
        "the dataset; expected paths inside of its folder"
    )
