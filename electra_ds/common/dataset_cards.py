"""Cards of Hugging Face datasets, checked before the library `datasets` reads them.

The library reads any path and requests any URL that stands in `data_files` of a card, already to
list the files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import read_small
from electra_ds.common.printable import printable, shortened
from electra_ds.common.redaction import redacted
from electra_ds.common.urls import is_url

CARDS = ("README.md", ".huggingface.yaml")
MOST_BYTES = 1 << 24  # of a card
# As in huggingface_hub, so that both read the same part of a card.
FRONT_MATTER = re.compile(r"^\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")


def check_folder_cards(folder: str | Path) -> None:
    """Raise UserError when a card of a dataset's folder names places outside of it, or is no YAML."""
    for name in CARDS:
        path = Path(folder, name)
        if path.exists():
            _check_card(path, printable(path))


def check_hub_cards(name: str, revision: str | None = None) -> str | None:
    """Check the cards of a dataset on the hub; return the revision that was checked.

    name: OWNER/NAME or NAME. revision: a branch, a tag or a commit, None for the default branch
    The result is a commit, so that the same files are read afterwards. It is `revision` in the
    library's offline mode, in which no card is read. Raises UserError for a card that names places
    outside of the dataset; errors of the hub are raised as they are.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return revision
    api = HfApi()
    commit = api.dataset_info(name, revision=revision).sha
    for card in CARDS:
        try:
            path = api.hf_hub_download(name, card, repo_type="dataset", revision=commit)
        except LocalEntryNotFoundError:  # the hub does not answer
            raise
        except EntryNotFoundError:
            continue
        _check_card(Path(path), f"dataset {printable(name)}: {card}")
    return commit


def _check_card(path: Path, name: str) -> None:
    for place in _places(_metadata(path, name)):
        outside = is_url(place) or os.path.isabs(place) or place.startswith("~") or "\\" in place
        if outside or ".." in place.split("/"):
            raise UserError(
                f"{name}: data_files or data_dir = {shortened(redacted(place), 200)} leads out of "
                "the dataset; expected files inside its folder"
            )


def _metadata(path: Path, name: str) -> Any:
    """The YAML of a dataset card, or of a YAML file; None when it has none."""
    import yaml

    content = read_small(path, "the card of a dataset", MOST_BYTES)
    try:
        text = content.decode("utf-8-sig")
        if path.suffix == ".md":
            found = FRONT_MATTER.search(text)
            text = found[1] if found else ""
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML raises any kind for a wrong tag, such as `!!int ""`
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name}: its YAML cannot be read ({reason}); correct or remove it"
        ) from None


def _places(card: Any) -> list[str]:
    """Every path below `configs` of a dataset card."""
    configs = card.get("configs") if isinstance(card, dict) else None
    stack = [
        config[key]
        for config in (configs if isinstance(configs, list) else [])
        if isinstance(config, dict)
        for key in ("data_files", "data_dir", "path")
        if key in config
    ]
    places = []
    seen: set[int] = set()  # a YAML alias can repeat a value exponentially often
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            places.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                stack += [part for key, part in value.items() if key != "split"]
            elif isinstance(value, list):
                stack += value
    return places
