"""What is behind --data? The rows to train on with their order, the rows held out, and what they were made with."""

from pathlib import Path
from typing import Protocol

import numpy as np

from electra_ds.batches import RowOrder, Rows
from electra_ds.order import Order
from electra_ds.shards import Manifest, ShardReader, read_manifest, read_unigrams


class Data(Protocol):
    """What the verbs know of --data."""

    manifest: Manifest
    tokenizer: Path  # folder

    def training(self, seed: int, global_batch_size: int) -> tuple[Rows, RowOrder]:
        """The training rows and the order in which a run of this seed takes them."""

    def held_out(self) -> dict[str, Rows]:
        """The held-out rows of each source by its name, "" where there is one source; {}: none."""

    def unigrams(self) -> np.ndarray:
        """Token counts of the training rows, [V] int64."""


class Folder:
    """A folder that `prepare` wrote, on a file system that every rank sees."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokenizer, self.manifest = folder, folder / "tokenizer", read_manifest(folder)

    def training(self, seed: int, global_batch_size: int) -> tuple[ShardReader, Order]:
        reader = ShardReader(self.folder, "train")
        return reader, Order(reader.blocks["rows"], seed)

    def held_out(self) -> dict[str, ShardReader]:
        return {"": ShardReader(self.folder, "valid")} if "valid" in self.manifest.splits else {}

    def unigrams(self) -> np.ndarray:
        return read_unigrams(self.folder, self.manifest.tokenizer.vocab_size)


def open_data(data: str | Path) -> Data:
    """Open what --data names. UserError when it is no complete data folder."""
    return Folder(Path(data))
