"""Types of the columns of a dataset, as the library `datasets` describes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from electra_ds.common.errors import UserError
from electra_ds.common.printable import shortened


def check_not_decoded(features: Mapping[str, Any], names: Iterable[str], source: str) -> None:
    """Raise UserError for a column of images, sounds, videos or documents, also inside of lists.

    To read such a column, `datasets` opens the files and requests the URLs that stand in its rows.
    A card declares the type of any column.
    features: those of the table. names: of the columns that will be read. source: for messages
    """
    for name in names:
        if name in features and _is_decoded(features[name]):
            raise UserError(
                f"{source}: column {shortened(name)} has images, sounds or documents; expected "
                "text, numbers, or lists of them"
            )


def _is_decoded(feature: Any) -> bool:
    """Return whether `datasets` opens files or URLs to read a column of this type."""
    if isinstance(feature, dict):
        return any(map(_is_decoded, feature.values()))
    if isinstance(feature, (list, tuple)):
        return any(map(_is_decoded, feature))
    inner = getattr(feature, "feature", None)
    return hasattr(feature, "decode_example") or (inner is not None and _is_decoded(inner))
