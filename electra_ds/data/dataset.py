"""The data behind --data: training rows with their order, held-out rows, manifest and tokenizer."""

from abc import ABC, abstractmethod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable
from electra_ds.common.urls import is_url
from electra_ds.data.data_tokenizer import check_data_tokenizer
from electra_ds.data.mixture import (
    MixtureOrder,
    MixtureReader,
    Nesting,
    SourceShare,
    join_manifests,
    read_mixture,
    rows_per_window,
)
from electra_ds.data.rows import RowOrder, RowReader
from electra_ds.data.shard_format import (
    Manifest,
    index_bytes,
    index_file,
    read_manifest,
    read_unigrams,
    unigrams_bytes,
)
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.shuffle import ShuffledOrder, StreamOrder

if TYPE_CHECKING:
    from electra_ds.data.remote_reader import RemoteReader


class HeldOut(NamedTuple):
    """The held-out rows of one source."""

    rows: RowReader
    unigrams: np.ndarray  # [V] int64 token counts of the source's training rows
    share: float  # share of the source in the training rows, from 0 to 1


class Data(Protocol):
    """Interface of the data for training, evaluation and `check`."""

    manifest: Manifest
    tokenizer: Path  # folder of the tokenizer's files
    shares: dict[str, SourceShare]  # source name -> its share of a mixture; {} for one source

    def training(self, seed: int, global_batch_size: int) -> tuple[RowReader, RowOrder]:
        """Return the training rows and their order in a run with this seed."""

    def held_out(self) -> dict[str, HeldOut]:
        """Return the held-out rows of each source that has any, by name; "" for a single source."""


class _SingleSource(ABC):
    """Data of one source; the manifest and the small files are in a local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = folder / "tokenizer"
        self.manifest = read_manifest(folder)
        self.shares: dict[str, SourceShare] = {}

    @abstractmethod
    def training(self, seed: int, global_batch_size: int) -> tuple[RowReader, RowOrder]:
        """Return the training rows and their order in a run with this seed."""

    @abstractmethod
    def reader(self, split: str) -> RowReader:
        """Return the reader of one split."""

    def held_out(self) -> dict[str, HeldOut]:
        """Return the held-out rows under the name "", or nothing when there are none."""
        if "valid" not in self.manifest.splits:
            return {}
        unigrams = read_unigrams(
            self.folder, self.manifest.tokenizer.vocab_size, self.manifest.unigrams_sha256
        )
        return {"": HeldOut(self.reader("valid"), unigrams, 1.0)}


class DataFolder(_SingleSource):
    """A folder that `prepare` wrote, on a local disk or on a file system shared by all nodes.

    Raises UserError when its tokenizer is not the one of the manifest.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        check_data_tokenizer(folder, self.manifest.tokenizer)

    def training(self, seed: int, global_batch_size: int) -> tuple[RowReader, RowOrder]:
        reader = self.reader("train")
        return reader, ShuffledOrder(reader.blocks["rows"], seed)

    def reader(self, split: str) -> ShardReader:
        return ShardReader(self.folder, split)


class StreamedFolder(_SingleSource):
    """A data folder behind a URL. Rows are streamed.

    Manifest, indexes, unigrams and tokenizer are copied into a temporary folder. Raises UserError
    for missing or damaged files, RunFailure when the server does not answer.
    """

    def __init__(self, url: str) -> None:
        from electra_ds.data.remote_reader import RemoteFolder, SmallFile

        self._remote = RemoteFolder(url)
        self._copies = TemporaryDirectory(prefix="electra_ds-")  # removed with this object
        copies = Path(self._copies.name)
        self._remote.copy({"manifest.json": SmallFile()}, copies)
        try:
            super().__init__(copies)
            manifest = self.manifest
            files = dict.fromkeys(manifest.tokenizer.files, SmallFile())
            files["unigrams.npy"] = SmallFile(
                manifest.unigrams_sha256, unigrams_bytes(manifest.tokenizer.vocab_size)
            )
            for name, split in manifest.splits.items():
                size = index_bytes(sum(manifest.blocks(name)))
                files[index_file(name)] = SmallFile(split.index_sha256, size)
            self._remote.copy(files, copies)
            check_data_tokenizer(copies, manifest.tokenizer)
        except UserError as error:
            raise UserError(str(error).replace(str(copies), self._remote.name)) from None

    def training(self, seed: int, global_batch_size: int) -> tuple[RowReader, RowOrder]:
        reader = self.reader("train")
        return reader, StreamOrder(reader.chunk_rows, seed, global_batch_size)

    def reader(self, split: str) -> "RemoteReader":
        from electra_ds.data.remote_reader import RemoteReader

        return RemoteReader(self._remote, split, self.folder)


class Mixture:
    """Several sources in fixed shares, listed in a MIX.json; a source may be a mixture itself."""

    def __init__(self, path: Path, nesting: Nesting) -> None:
        """nesting: the mixtures that have this one as a source."""
        config = read_mixture(path)
        nesting.enter(path)
        self.sources: dict[str, Data] = {}
        for name, source in zip(config.names, config.sources, strict=True):
            nesting.add_source()
            data = source.data if is_url(source.data) else path.parent / source.data
            self.sources[name] = open_data(data, nesting)
        nesting.leave()
        manifests = {name: source.manifest for name, source in self.sources.items()}
        splits = [manifest.splits["train"] for manifest in manifests.values()]
        weights = config.weights([split.tokens for split in splits])
        self.counts = rows_per_window(weights)
        self.manifest = join_manifests(path, manifests, self.counts.tolist())
        self.tokenizer = self.sources[config.names[0]].tokenizer
        shares = (self.counts / self.counts.sum()).tolist()
        self.shares = {
            name: SourceShare(split.rows, split.tokens, weight, share)
            for name, split, weight, share in zip(
                self.sources, splits, weights.tolist(), shares, strict=True
            )
        }

    def training(self, seed: int, global_batch_size: int) -> tuple[RowReader, RowOrder]:
        """Return the training rows of all sources and their order in a run with this seed."""
        readers = []
        orders = {}
        for name, source in self.sources.items():
            reader, orders[name] = source.training(seed, global_batch_size)
            readers.append(reader)
        rows = MixtureReader(self.manifest, readers)
        return rows, MixtureOrder(orders, self.counts, rows.starts, seed)

    def held_out(self) -> dict[str, HeldOut]:
        """Return the held-out rows of each source that has any.

        The key is the source's name, `name/inner` for a source of an inner mixture.
        """
        held_out = {}
        for name, source in self.sources.items():
            for inner, rows in source.held_out().items():
                share = rows.share * self.shares[name].share
                held_out[f"{name}/{inner}".rstrip("/")] = rows._replace(share=share)
        return held_out


def open_data(data: str | Path, nesting: Nesting | None = None) -> Data:
    """Open the value of --data: a data folder, its URL, or a MIX.json.

    nesting: the mixtures that contain this data as a source, None if there are none
    Raises UserError for an incomplete data folder or an invalid mixture, and RunFailure when the
    server of a URL does not answer.
    """
    name = str(data)
    path = Path(data)
    if name.startswith("pipe:"):
        raise UserError(
            f"--data {printable(name)}: commands are not run; expected a folder, or a URL such as "
            "https://host/D"
        )
    if is_url(name):
        return StreamedFolder(name)
    if path.name == "manifest.json":
        raise UserError(
            f"--data {printable(name)}: the manifest of a data folder; expected the folder itself: "
            f"{printable(path.parent)}"
        )
    if path.suffix == ".json":
        return Mixture(path, nesting or Nesting())
    return DataFolder(path)
