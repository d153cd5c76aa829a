"""Mixtures of several sources in exact shares. The row is a pure function of the position.

Dimensions: n rows or positions, S sources, T tokens of a row, W positions of a window.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import read_json
from electra_ds.common.printable import printable, shortened
from electra_ds.common.section import Section
from electra_ds.common.urls import url_name
from electra_ds.config.loading import parse_config
from electra_ds.data import philox
from electra_ds.data.rows import RowOrder, RowReader, sort_rows
from electra_ds.data.shard_format import Manifest, SplitInfo

VERSION = 1  # of the order
WINDOW = 10_000  # positions over which the shares are exact
DEEPEST = 8  # mixtures inside mixtures
MOST_SOURCES = WINDOW  # of a mixture, those of its inner mixtures included


class SourceConfig(Section):
    """One source of a mixture.

    data:   any value of --data; a path is relative to the folder of MIX.json
    weight: share of the source relative to the other weights, above 0; None with a temperature
    name:   name in metrics; by default the name of the folder or of the MIX.json
    """

    data: str = Field(min_length=1)
    weight: float | None = Field(None, gt=0, allow_inf_nan=False)
    name: str | None = Field(None, pattern="^[^/]+$", max_length=100)


class MixtureConfig(Section):
    """MIX.json: a weight for each source, or one temperature for all of them.

    With a temperature the weights are tokens ** (1 / temperature). A temperature of 1 keeps the
    proportions of the sources, a large one gives all sources nearly equal weights (Arivazhagan et
    al. 2019, "Massively multilingual neural machine translation in the wild"; T5). The exponent
    alpha of XLM-R is the inverse: its 0.3 is a temperature of 3.33.
    """

    sources: list[SourceConfig] = Field(min_length=1, max_length=WINDOW)
    temperature: float | None = Field(None, allow_inf_nan=False)

    @property
    def names(self) -> list[str]:
        """Names of the sources in metrics."""
        return [
            source.name or url_name(source.data).removesuffix(".json") for source in self.sources
        ]

    @model_validator(mode="after")
    def _check(self) -> "MixtureConfig":
        if unprintable := [name for name in self.names if printable(name) != name]:
            raise ValueError(
                f"{shortened(unprintable[0])} is the name of a source; expected a name without "
                'control characters; give it a "name"'
            )
        unusable = {name for name in self.names if not name or self.names.count(name) > 1}
        if unusable:
            raise ValueError(
                f"sources need different names, found {sorted(unusable)} twice or empty; "
                'give each of them a "name"'
            )
        weighted = sum(source.weight is not None for source in self.sources)
        expected = len(self.sources) if self.temperature is None else 0
        if weighted != expected:
            raise ValueError(
                f"{weighted} of {len(self.sources)} sources have a weight, temperature is "
                f"{self.temperature}: give every source a weight, or give no source a weight and "
                "set a temperature"
            )
        if self.temperature is not None and self.temperature < 1:
            raise ValueError(
                f"temperature = {self.temperature}: expected 1 (proportions as they are) or more; "
                "the exponent of XLM-R is 1 / temperature, so for its .3 write 3.33"
            )
        return self

    def weights(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the intended share of each source, [S] float64 with sum 1.

        tokens: [S] tokens of the sources' training rows
        """
        if self.temperature:
            weights = np.array(tokens) ** (1 / self.temperature)
        else:
            weights = np.array([source.weight for source in self.sources], np.float64)
        weights = weights / weights.max()  # the sum of large weights could overflow
        return weights / weights.sum()


class Nesting:
    """The mixtures around a source, to detect cycles and mixtures that grow without bound."""

    def __init__(self, outer: tuple[Path, ...] = ()) -> None:
        self.outer = outer
        self.opened = 0  # sources of the outermost mixture, those of inner mixtures included

    def enter(self, path: Path) -> None:
        """Begin the sources of the mixture `path`.

        Raises UserError when it is a source of itself, or nested too deeply.
        """
        if path.resolve() in self.outer:
            raise UserError(
                f"{printable(path)}: it is a source of itself; expected a folder, a URL, or "
                "another mixture"
            )
        if len(self.outer) == DEEPEST:
            raise UserError(
                f"{printable(path)}: mixtures are nested more than {DEEPEST} deep; expected "
                "folders and URLs"
            )
        self.outer = (*self.outer, path.resolve())

    def leave(self) -> None:
        """End the sources of the innermost mixture."""
        self.outer = self.outer[:-1]

    def add_source(self) -> None:
        """Count a source; UserError when there are too many."""
        self.opened += 1
        if self.opened > MOST_SOURCES:
            raise UserError(
                f"{printable(self.outer[0])}: more than {MOST_SOURCES:,} sources, those of inner "
                "mixtures included; expected fewer"
            )


def read_mixture(path: Path) -> MixtureConfig:
    """Read MIX.json, an object or the bare list of its sources.

    Raises UserError with the key and the expected value.
    """
    values = read_json(path, "a mixture of data folders", (dict, list))
    if isinstance(values, list):
        values = {"sources": values}
    return parse_config(values, str(path), MixtureConfig)


def rows_per_window(weights: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Return the number of rows of each source in a window, [S] int64 with sum `window`.

    The largest remainder method gives counts within one row of weights * window. A source below one
    row is raised to one row; the rows for it are taken from other sources.
    weights: [S] float64 with sum 1
    """
    exact = weights * window
    counts = np.maximum(exact.astype(np.int64), 1)
    while step := np.sign(window - counts.sum()):
        remainders = np.where(counts + step > 0, step * (exact - counts), -np.inf)
        counts[remainders.argmax()] += step
    return counts


class SourceShare(NamedTuple):
    """Size of one source of a mixture and its share of the mixture."""

    rows: int  # of its training split
    tokens: int  # of its training split
    weight: float  # intended share, from 0 to 1
    share: float  # actual share in every window, from 0 to 1

    def epochs(self, positions: int) -> float:
        """Return the epochs over this source after `positions` rows of the mixture."""
        return positions * self.share / self.rows


def join_manifests(path: Path, manifests: dict[str, Manifest], counts: Sequence[int]) -> Manifest:
    """Return a manifest of the training rows of all sources.

    Its dataset_id is a hash of the sources' dataset_ids and of `counts`.

    path:   the MIX.json, for messages
    counts: [S] rows of each source in a window
    Raises UserError when sequence length, packing or tokenizer of the sources differ.
    """
    kinds = {
        name: f"{m.sequence_length} tokens, {m.packing}, tokenizer {m.tokenizer.sha256[:12]}"
        for name, m in manifests.items()
    }
    if len(set(kinds.values())) > 1:
        listed = "; ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise UserError(
            f"{path}: the rows of its sources are of different kinds ({listed}); "
            "prepare all sources with the same options"
        )
    first, *_ = manifests.values()
    ids = repr([(m.dataset_id, count) for m, count in zip(manifests.values(), counts, strict=True)])
    numbers = [key for key in SplitInfo.model_fields if key not in ("index_sha256", "shards")]
    sums = {
        key: sum(getattr(m.splits["train"], key) for m in manifests.values()) for key in numbers
    }
    train = SplitInfo.model_construct(**sums, index_sha256="", shards=())
    dataset_id = hashlib.sha256(ids.encode()).hexdigest()[:32]
    return first.model_copy(update={"dataset_id": dataset_id, "splits": {"train": train}})


class MixtureReader:
    """The training rows of all sources, numbered source by source."""

    def __init__(self, manifest: Manifest, readers: Sequence[RowReader]) -> None:
        self.manifest = manifest
        self.readers = readers
        ends = np.cumsum([reader.rows for reader in readers])
        self.starts = ends - [reader.rows for reader in readers]  # [S] first row of each source
        self.rows = int(ends[-1])
        self.sequence_length = readers[0].sequence_length
        self.dtype = readers[0].dtype

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the token ids of [n] row numbers, [n, T] of the stored type.

        Raises IndexError for a row number out of range.
        """
        sort_rows(rows, self.rows)  # checks the range
        sources = np.searchsorted(self.starts, rows, side="right") - 1
        gathered = np.empty((len(rows), self.sequence_length), self.dtype)
        for source, (start, reader) in enumerate(zip(self.starts, self.readers, strict=True)):
            here = sources == source
            gathered[here] = reader.read(rows[here] - start)
        return gathered


class MixtureOrder:
    """The order of a mixture's rows over the orders of its sources: position -> (row, epoch).

    Each window of W = sum(counts) positions has exactly counts[s] rows of source s. They are spread
    evenly, each at a random position of its own part of the window, so that up to any position a
    source with share p is at most 1 + p * (S - 2) rows from its exact share. The rows of each
    source keep the order of that source. The epoch is that of the row's source.
    """

    def __init__(
        self, orders: dict[str, RowOrder], counts: np.ndarray, starts: np.ndarray, seed: int
    ) -> None:
        """Combine the orders of S sources.

        orders: order of each source by name
        counts: [S] rows of each source in a window
        starts: [S] first row number of each source
        """
        self.orders = orders
        self.counts = counts
        self.starts = starts
        self.seed = seed
        self.sources = np.repeat(np.arange(len(counts)), counts)  # [W]
        # [W] index of each row among the rows of its source in the window
        self.source_indices = np.concatenate([np.arange(count) for count in counts])
        self._cached_window = lru_cache(2)(self._window)

    def state(self) -> dict[str, Any]:
        """Return the parameters that a checkpoint and the run that resumes from it must share."""
        counts = dict(zip(self.orders, self.counts.tolist(), strict=True))
        sources = {name: order.state() for name, order in self.orders.items()}
        return {
            "kind": "mixture",
            "version": VERSION,
            "seed": self.seed,
            "rows_per_window": counts,
            "sources": sources,
        }

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map [n] positions to ([n] row numbers, [n] epochs), int64.

        The cost depends on the windows touched, not on the size of the positions.
        """
        windows, offsets = np.divmod(np.asarray(positions, np.int64), len(self.sources))
        sources = np.empty_like(offsets)
        source_positions = np.empty_like(offsets)  # in the order of the row's source
        for window in np.unique(windows):
            here = windows == window
            sources[here], source_positions[here] = self._cached_window(int(window))[
                :, offsets[here]
            ]
        source_positions += windows * self.counts[sources]
        rows = np.empty_like(offsets)
        epochs = np.empty_like(offsets)
        for source, (start, order) in enumerate(
            zip(self.starts, self.orders.values(), strict=True)
        ):
            here = sources == source
            rows[here], epochs[here] = order.rows(source_positions[here])
            rows[here] += start
        return rows, epochs

    def _window(self, window: int) -> np.ndarray:
        """Return the source of each position of a window and its index in that source, [2, W]."""
        bits = philox.random_bits(
            self.seed, 0, np.array([window]), len(self.sources), philox.MIXTURE
        )[0]
        jitter = bits * 2.0**-32  # in [0, 1)
        relative = (self.source_indices + jitter) / self.counts[self.sources]
        order = np.argsort(relative, kind="stable")
        return np.stack([self.sources[order], self.source_indices[order]])
