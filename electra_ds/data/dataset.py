"""What is behind --data? The rows to train on with their order, the rows held out, and what they were made with."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from electra_ds.common.errors import UserError
from electra_ds.data.mixture import (
    MixtureOrder,
    MixtureRows,
    Portion,
    join_manifests,
    read_mixture,
    window_rows,
)
from electra_ds.data.rows import RowOrder, Rows
from electra_ds.data.shard_format import index_file, read_manifest, read_unigrams
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.shuffle import LaneOrder, Order


class HeldOut(NamedTuple):
    """The held-out rows of one source."""

    rows: Rows
    unigrams: np.ndarray  # token counts of its training rows, [V] int64
    share: float  # of the source in training, of 1


class Folder:
    """A folder that `prepare` wrote, on a disk of this machine or a file system that all share."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokenizer, self.manifest = (
            folder,
            folder / "tokenizer",
            read_manifest(folder),
        )
        self.portions: dict[str, Portion] = {}  # of a mixture's sources, by name

    def training(self, seed: int, global_batch_size: int) -> tuple[Rows, RowOrder]:
        """The training rows and the order in which a run of this seed takes them."""
        reader = self.reader("train")
        return reader, Order(reader.blocks["rows"], seed)

    def held_out(self) -> dict[str, HeldOut]:
        """The held-out rows of each source that has any, by its name, "" where there is one source."""
        if "valid" not in self.manifest.splits:
            return {}
        unigrams = read_unigrams(self.folder, self.manifest.tokenizer.vocab_size)
        return {"": HeldOut(self.reader("valid"), unigrams, 1.0)}

    def reader(self, split: str) -> ShardReader:
        """The rows of one split."""
        return ShardReader(self.folder, split)


class Mixture:
    """Several sources in fixed shares, listed by a MIX.json; a source may be a mixture itself."""

    def __init__(self, path: Path, above: tuple[Path, ...]) -> None:
        """above: the mixtures that it is a source of."""
        if path.resolve() in above:
            raise UserError(
                f"{path}: it is a source of itself; expected a folder, a URL, or another mixture"
            )
        config, above = read_mixture(path), (*above, path.resolve())
        found = [
            source.data if "://" in source.data else path.parent / source.data
            for source in config.sources
        ]
        self.parts = {
            name: open_data(data, above) for name, data in zip(config.names, found, strict=True)
        }
        manifests = {name: part.manifest for name, part in self.parts.items()}
        splits = [manifest.splits["train"] for manifest in manifests.values()]
        weights = config.weights([split.tokens for split in splits])
        self.counts = window_rows(weights)
        self.manifest = join_manifests(path, manifests, self.counts.tolist())
        self.tokenizer = self.parts[config.names[0]].tokenizer
        shares = (self.counts / self.counts.sum()).tolist()
        self.portions = {
            name: Portion(split.rows, split.tokens, weight, share)
            for name, split, weight, share in zip(
                self.parts, splits, weights.tolist(), shares, strict=True
            )
        }

    def training(self, seed: int, global_batch_size: int) -> tuple[Rows, RowOrder]:
        """The training rows of all sources and the order in which a run of this seed takes them."""
        found = {name: part.training(seed, global_batch_size) for name, part in self.parts.items()}
        rows = MixtureRows(self.manifest, [part for part, _ in found.values()])
        orders = {name: row_order for name, (_, row_order) in found.items()}
        return rows, MixtureOrder(orders, self.counts, rows.starts, seed)

    def held_out(self) -> dict[str, HeldOut]:
        """The held-out rows of each source that has any, by its name, `name/inner` in a mixture of mixtures."""
        return {
            f"{name}/{inner}".rstrip("/"): held._replace(
                share=held.share * self.portions[name].share
            )
            for name, part in self.parts.items()
            for inner, held in part.held_out().items()
        }


class Stream(Folder):
    """A folder behind a URL: rows are read where they lie, the small files copied for this process."""

    def __init__(self, url: str) -> None:
        from electra_ds.data.remote_reader import RemoteFolder, RemoteReader

        place, self._copies = (
            RemoteFolder(url),
            TemporaryDirectory(prefix="electra_ds-"),
        )  # goes with this object
        copies = Path(self._copies.name)
        self.reader = lambda split: RemoteReader(place, split, copies)
        place.copy({"manifest.json": None}, copies)
        try:
            super().__init__(copies)
        except UserError as error:
            raise UserError(str(error).replace(str(copies), place.url)) from None
        indexes = {
            index_file(name): split.index_sha256 for name, split in self.manifest.splits.items()
        }
        place.copy(
            dict.fromkeys(("unigrams.npy", *self.manifest.tokenizer.files)) | indexes, copies
        )

    def training(self, seed: int, global_batch_size: int) -> tuple[Rows, RowOrder]:
        reader = self.reader("train")
        return reader, LaneOrder(reader.chunk_rows, seed, global_batch_size)


Data = Folder | Mixture


def open_data(data: str | Path, above: tuple[Path, ...] = ()) -> Data:
    """Open what --data names. UserError when it is no complete data folder, or a mixture that cannot be."""
    name, path = str(data), Path(data)
    if name.startswith("pipe:"):
        raise UserError(
            f"--data {name}: commands are not run; expected a folder, or a URL such as https://host/D"
        )
    return (
        Stream(name)
        if "://" in name
        else Mixture(path, above)
        if path.suffix == ".json"
        else Folder(path)
    )
