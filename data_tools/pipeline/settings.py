"""Settings that, together with input and tokenizer, determine the bytes of a data folder."""

from __future__ import annotations

from dataclasses import dataclass

from data_tools.inputs.plan import UNIT_BYTES
from data_tools.pipeline.clean import minhash
from data_tools.pipeline.pack import PACKINGS
from electra_ds.common.errors import UserError
from electra_ds.common.plugins import load_function

SHARD_BYTES = 64 << 20
UNIT_FORMAT = 2  # raised when the output of a unit changes


@dataclass(frozen=True)
class Settings:
    """Settings of `prepare`. Call `check` before use."""

    sequence_length: int = 128  # tokens of a row
    packing: str = "best_fit"  # one of PACKINGS
    valid_fraction: float = 0.005  # share of held-out documents, selected by the hash of the text
    seed: int = 0  # of the document shuffle and the packing
    block_rows: int = 256  # most rows of a block, which is one member of a shard
    shard_bytes: int = SHARD_BYTES  # about the largest size of a shard
    unit_bytes: int = UNIT_BYTES  # about the input bytes of a unit
    format: str = "auto"  # of the input, one of plan.FORMATS
    text_field: str = "text"  # field of JSONL, column of a table
    min_chars: int = 1  # documents with fewer characters are removed
    drop_repeated_lines: bool = False  # remove lines that occurred before in the same document
    # "package.module:function": a function (text) -> bool that is false for documents to remove.
    keep: str | None = None
    # Remove documents with the text of an earlier one, apart from case and white space.
    deduplicate: bool = True
    # Remove documents with at least this estimated similarity to an earlier one that stays.
    near_duplicates: float | None = None

    def check(self) -> None:
        """Raise UserError for an invalid value, or if `keep` or rensa cannot be imported."""
        if self.packing not in PACKINGS:
            offered = ", ".join(name for name in PACKINGS if name != "as_rows")  # of `convert`
            raise UserError(f"packing = {self.packing!r}; expected one of {offered}")
        if not 8 <= self.sequence_length < 1 << 16:
            raise UserError(
                f"sequence_length = {self.sequence_length}; expected 8 to 65,535 tokens"
            )
        if not 0 <= self.valid_fraction < 1:
            raise UserError(
                f"valid_fraction = {self.valid_fraction}; expected at least 0 and less than 1"
            )
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise UserError(f"seed = {self.seed}; expected an integer of 64 bits")
        if not 1 <= self.block_rows <= 1 << 20 or min(self.shard_bytes, self.unit_bytes) < 1:
            raise UserError(
                f"block_rows = {self.block_rows}, shard_bytes = {self.shard_bytes}, unit_bytes = "
                f"{self.unit_bytes}; expected 1 to 1,048,576 rows, and at least 1 byte"
            )
        if self.near_duplicates is not None and not 0.5 <= self.near_duplicates <= 1:
            raise UserError(
                f"near_duplicates = {self.near_duplicates}; expected a similarity of 0.5 to 1"
            )
        if self.keep:
            load_function("keep", self.keep)
        if self.near_duplicates:
            minhash()

    def unit_record(self, fingerprint: str, plan: dict) -> dict:
        """Return all values that determine the content of the units, as JSON values.

        fingerprint: that of the tokenizer; plan: `Plan.identity()`
        """
        return {
            "unit_format": UNIT_FORMAT,
            "tokenizer": fingerprint,
            "seed": self.seed,
            "text_field": self.text_field,
            "min_chars": self.min_chars,
            "drop_repeated_lines": self.drop_repeated_lines,
            "keep": self.keep,
            "signatures": minhash().ALGORITHM_VERSION if self.near_duplicates else None,
            **plan,
        }

    def packing_record(self) -> dict:
        """Return the other settings that determine the content of the shards, as JSON values."""
        return {
            "sequence_length": self.sequence_length,
            "packing": self.packing,
            "valid_fraction": self.valid_fraction,
            "block_rows": self.block_rows,
            "shard_bytes": self.shard_bytes,
            "deduplicate": self.deduplicate,
            "near_duplicates": self.near_duplicates,
        }
