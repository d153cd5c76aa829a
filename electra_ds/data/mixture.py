"""How are several sources read as one? Exact shares in every window, and still a pure function of the position.

Letters: n rows or positions, S sources, T tokens of a row.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from electra_ds.common.errors import UserError
from electra_ds.common.files import read_json
from electra_ds.common.section import Section
from electra_ds.config.loading import parse_config
from electra_ds.data import philox
from electra_ds.data.rows import RowOrder, Rows
from electra_ds.data.shard_format import Manifest, SplitInfo

VERSION = 1  # of the order
WINDOW = 10_000  # positions over which the shares are exact


class SourceConfig(Section):
    """One source: what --data takes, relative to the mixture's file; named after its folder or MIX.json."""

    data: str
    weight: float | None = Field(None, gt=0, allow_inf_nan=False)
    name: str | None = Field(None, pattern="^[^/]+$")


class MixtureConfig(Section):
    """MIX.json: a weight for each source, or one temperature for all.

    temperature: weights are tokens ** (1 / temperature): 1 takes them as they are, a large one takes from all alike
    (Arivazhagan et al. 2019, "Massively multilingual neural machine translation in the wild"; T5). The exponent alpha
    of XLM-R is its inverse: .3 there is 3.33 here.
    """

    sources: list[SourceConfig] = Field(min_length=1, max_length=WINDOW)
    temperature: float | None = Field(None, allow_inf_nan=False)

    @property
    def names(self) -> list[str]:
        """What the sources are called in metrics."""
        return [
            source.name or Path(source.data).name.removesuffix(".json") for source in self.sources
        ]

    @model_validator(mode="after")
    def _is_possible(self) -> "MixtureConfig":
        if unusable := sorted(
            {name for name in self.names if not name or self.names.count(name) > 1}
        ):
            raise ValueError(
                f'sources need names that differ, found {unusable} twice or empty: give them a "name"'
            )
        weighted = sum(source.weight is not None for source in self.sources)
        if weighted != (len(self.sources) if self.temperature is None else 0):
            raise ValueError(
                "give every source a weight, or none of them and a temperature for all"
            )
        if self.temperature is not None and self.temperature < 1:
            raise ValueError(
                f"temperature = {self.temperature}: expected 1 (tokens as they are) or more; the exponent of XLM-R "
                "is 1 / temperature, so for its .3 write 3.33"
            )
        return self

    def weights(self, tokens: Sequence[int]) -> np.ndarray:
        """What share of the whole each source is wanted to have, [S], from the tokens of their training rows, [S]."""
        given = [source.weight for source in self.sources]
        found = np.array(tokens) ** (1 / self.temperature) if self.temperature else np.array(given)
        return found / found.sum()


def read_mixture(path: Path) -> MixtureConfig:
    """Read MIX.json, an object or the bare list of its sources. UserError names the key and what was expected."""
    values = read_json(path, "a mixture of data folders", (dict, list))
    return parse_config(
        {"sources": values} if isinstance(values, list) else values, str(path), MixtureConfig
    )


def window_rows(weights: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Rows of each source in a window, [S] int64: within one of the weights (largest remainder), but at least one."""
    wanted = weights * window
    counts = np.maximum(wanted.astype(np.int64), 1)
    while step := np.sign(window - counts.sum()):
        counts[np.where(counts + step > 0, step * (wanted - counts), -np.inf).argmax()] += step
    return counts


class Portion(NamedTuple):
    """What one source is of a mixture."""

    rows: int  # of its training split
    tokens: int
    weight: float  # wanted, of 1
    share: float  # had, of 1, in every window

    def epochs(self, positions: int) -> float:
        """How often so many rows of the mixture go through this source."""
        return positions * self.share / self.rows


def join_manifests(path: Path, manifests: dict[str, Manifest], counts: Sequence[int]) -> Manifest:
    """What the sources have in common, with the training rows of all; its dataset_id also tells the counts.

    UserError lists by source what must be the same in all of them and is not.
    """
    kinds = {
        name: f"{m.sequence_length} tokens, {m.packing}, tokenizer {m.tokenizer.sha256[:12]}"
        for name, m in manifests.items()
    }
    if len(set(kinds.values())) > 1:
        listed = "; ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise UserError(
            f"{path}: the rows of its sources are of different kinds ({listed}); prepare them alike"
        )
    first, *_ = manifests.values()
    ids = repr([(m.dataset_id, count) for m, count in zip(manifests.values(), counts, strict=True)])
    numbers = [key for key, field in SplitInfo.model_fields.items() if field.annotation is int]
    sums = {
        key: sum(getattr(m.splits["train"], key) for m in manifests.values()) for key in numbers
    }
    train = SplitInfo(**sums, index_sha256="", shards=())
    dataset_id = hashlib.sha256(ids.encode()).hexdigest()[:32]
    return first.model_copy(update={"dataset_id": dataset_id, "splits": {"train": train}})


class MixtureRows:
    """The training rows of all sources, numbered one source after the other."""

    def __init__(self, manifest: Manifest, parts: Sequence[Rows]) -> None:
        self.manifest, self.parts = manifest, parts
        ends = np.cumsum([part.rows for part in parts])
        self.starts = ends - [part.rows for part in parts]  # [S]
        self.rows, self.sequence_length, self.dtype = (
            int(ends[-1]),
            parts[0].sequence_length,
            parts[0].dtype,
        )

    def read(self, rows: np.ndarray) -> np.ndarray:
        """[n] row numbers -> [n, T] of the stored type."""
        sources = np.searchsorted(self.starts, rows, side="right") - 1
        found = np.empty((len(rows), self.sequence_length), self.dtype)
        for source, (start, part) in enumerate(zip(self.starts, self.parts, strict=True)):
            here = sources == source
            found[here] = part.read(rows[here] - start)
        return found


class MixtureOrder:
    """The order of training over the sources' own orders: position -> (row, epoch of its source).

    Each window of W = sum(counts) positions, from 0 on, has exactly counts[s] rows of source s. They are spread evenly,
    each at a random place of its own stretch of the window, so that up to any position a source of share p is at most
    1 + p * (S - 2) rows from exact. The rows of a source come as in its own order, whatever stands between them.
    """

    def __init__(
        self, orders: dict[str, RowOrder], counts: np.ndarray, starts: np.ndarray, seed: int
    ) -> None:
        """orders: of S sources by name; counts: [S] rows in a window; starts: [S] the first row number of each."""
        self.orders, self.counts, self.starts, self.seed = orders, counts, starts, seed
        self.sources = np.repeat(np.arange(len(counts)), counts)  # [W]
        self.turns = np.concatenate(
            [np.arange(count) for count in counts]
        )  # [W] of each within its source
        self._window = lru_cache(2)(self._window)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must agree on to go on from a position."""
        counts = dict(zip(self.orders, self.counts.tolist(), strict=True))
        parts = {name: part.state() for name, part in self.orders.items()}
        return {
            "kind": "mixture",
            "version": VERSION,
            "seed": self.seed,
            "rows_per_window": counts,
            "sources": parts,
        }

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] positions, any, -> ([n] row numbers, [n] epochs), int64. Costs the windows touched, not the history."""
        windows, places = np.divmod(np.asarray(positions, np.int64), len(self.turns))
        sources, turns, rows, epochs = (np.empty_like(places) for _ in range(4))
        for window in np.unique(windows):
            here = windows == window
            sources[here], turns[here] = self._window(int(window))[:, places[here]]
        turns += windows * self.counts[sources]
        for source, (start, part) in enumerate(zip(self.starts, self.orders.values(), strict=True)):
            here = sources == source
            rows[here], epochs[here] = part.rows(turns[here])
            rows[here] += start
        return rows, epochs

    def _window(self, window: int) -> np.ndarray:
        """The source of each position and its turn within the window, [2, W]."""
        random = (
            philox.random_bits(self.seed, 0, np.array([window]), len(self.turns), philox.MIXTURE)[0]
            * 2.0**-32
        )
        places = np.argsort((self.turns + random) / self.counts[self.sources], kind="stable")
        return np.stack([self.sources[places], self.turns[places]])
