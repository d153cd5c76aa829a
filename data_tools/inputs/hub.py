"""What does a Hugging Face dataset hold? One of the hub or in a folder, streamed by the `datasets` library.

It is named `dataset:NAME?config=C&split=S&revision=R`; the split is train unless given. No code of a dataset is run:
the versions of the library that the extra [hf] asks for cannot.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, urlencode

from data_tools.inputs.streams import fingerprint, open_input
from electra_ds.common.errors import UserError

DATASET = "dataset:"


def find_shards(given: str) -> list[tuple[str, str, int, str, str]]:
    """The fields of a `corpus.Source` for each shard of a split.

    The name has no path of this machine, the path has the hub's revision of now, so that all shards are of one. The
    digest is that of the names, sizes and first bytes of the split's files; the size is their mean.
    """
    name, options = _parse(given)
    label = name
    if os.path.isdir(folder := os.path.realpath(os.path.expanduser(name))):
        name, label = folder, os.path.basename(folder)
    files, rows = _open(name, **options)
    found = []
    for file in files:
        with open_input(file) as raw:
            found.append(
                (re.sub("^hf://.*?@[^/]*", "", file.removeprefix(name)), *fingerprint(raw))
            )
    digest = hashlib.sha256(repr(found).encode()).hexdigest()[:16]
    size = -(-sum(size for _, size, _ in found) // rows.num_shards)
    now = re.match("hf://.*?@([0-9a-f]{40})/", files[0])
    path = _spell(name, options | ({"revision": now[1]} if now else {}))
    return [
        (f"{_spell(label, options)} shard {n}", path, size, f"dataset:{n}", digest)
        for n in range(rows.num_shards)
    ]


def read_shard(path: str, shard: int, text_field: str) -> Iterator[Any]:
    """The text field of each row. UserError: not there, or not readable; else errors of the network."""
    name, options = _parse(path)
    _, rows = _open(name, **options)
    try:
        rows = (
            rows.select_columns([text_field]) if rows.column_names else rows
        )  # else found row by row
        yield from (row.get(text_field) for row in rows.shard(rows.num_shards, shard))
    except ValueError as error:  # of Arrow, too
        raise UserError(
            f"{DATASET}{name} shard {shard}: {' '.join(str(error).split())}; expected rows with a text in "
            f"--text-field {text_field!r}"
        ) from None


def _parse(given: str) -> tuple[str, dict[str, str]]:
    name, _, query = given.removeprefix(DATASET).partition("?")
    options = {"split": "train", **dict(parse_qsl(query, keep_blank_values=True))}
    if not name or options.keys() - {"config", "split", "revision"}:
        raise UserError(
            f"{given}: expected dataset:NAME, and behind it ?config=C&split=S&revision=R or some of these"
        )
    return name, options


def _spell(name: str, options: dict[str, str]) -> str:
    return f"{DATASET}{name}?{urlencode(sorted(options.items()), safe='/')}"


@lru_cache(maxsize=1)  # a worker looks a dataset up once, not once a shard
def _open(
    name: str, split: str, config: str | None = None, revision: str | None = None
) -> tuple[list[str], Any]:
    """(files, rows) of a split."""
    os.environ.setdefault("USE_TORCH", "0")  # which the library would import
    import datasets

    builder = datasets.load_dataset_builder(name, config, revision=revision)
    rows = builder.as_streaming_dataset(split)
    return builder.config.data_files[split], rows
