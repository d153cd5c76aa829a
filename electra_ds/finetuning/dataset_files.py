"""Files of a dataset, checked with the limits of this package before `datasets` unpacks them.

The library `datasets` unpacks and reads files without a limit.
"""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from typing import Any, BinaryIO

from electra_ds.common.arrow_sizes import DeclaredSizes
from electra_ds.common.decompression import COMPRESSED, Expansion, content_of
from electra_ds.common.errors import UserError
from electra_ds.common.files import open_regular
from electra_ds.common.parquet_sizes import check_chunk
from electra_ds.common.printable import printable
from electra_ds.common.redaction import redacted
from electra_ds.common.tar_headers import TarHeader

# Modules of `datasets` that read texts and numbers from files with a limit that is checked here.
READERS = ("arrow", "conll", "csv", "json", "parquet", "text", "webdataset")
# First bytes of a compressed file -> the extension that names its compression.
MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
# First bytes of files that `datasets` unpacks, and that cannot be unpacked with a limit here.
UNKNOWN = {b"Rar!": "rar", b"7z\xbc\xaf\x27\x1c": "7z", b"\x04\x22\x4d\x18": "lz4"}
TAR_MAGIC = slice(257, 262)  # bytes of the first header of a tar
DEEPEST = 8  # archives and compressed files inside each other
AT_ONCE = 1 << 20  # bytes


def load_limited(name: str, config: str | None, revision: str | None) -> Any:
    """Return the builder of a dataset, prepared by `datasets` from files that were checked.

    Arguments as in `datasets.load_dataset`. Raises UserError for a file that would become too large,
    for a broken archive, and for a format that is not read with a limit; errors of the library are
    raised as they are.
    """
    import datasets

    if os.path.exists(os.path.join(name, "state.json")):
        raise UserError(
            f"dataset {printable(name)}: was written by save_to_disk; expected a folder of data "
            "files; write it with to_parquet or to_json"
        )
    builder = datasets.load_dataset_builder(name, config, revision=revision)
    modules = [kind.__module__.rpartition(".")[2] for kind in type(builder).__mro__]
    reader = next((module for module in modules if module in READERS), None)
    if reader is None:
        raise UserError(
            f"dataset {printable(name)}: its files are read by {modules[0]}; expected "
            "CSV, TSV, JSON, text, CoNLL, Parquet, Arrow or webdataset; convert it to Parquet or "
            "JSONL"
        )
    builder.download_and_prepare(dl_manager=_manager(builder, reader))
    return builder


def _manager(builder: Any, reader: str) -> Any:
    """Return a download manager that checks each file after its download, before it is unpacked."""
    import datasets

    class CheckedDownloads(datasets.DownloadManager):
        def download(self, url_or_urls: Any) -> Any:
            downloaded = super().download(url_or_urls)
            for url, path in self.downloaded_paths.items():
                check_file(str(path), str(url), reader)
            return downloaded

    return CheckedDownloads(
        dataset_name=builder.dataset_name,
        data_dir=builder.config.data_dir,
        download_config=datasets.DownloadConfig(
            token=builder.token, use_etag=False, storage_options=builder.storage_options
        ),
        base_path=builder.base_path,
        record_checksums=False,
    )


def check_file(path: str, name: str, reader: str) -> None:
    """Raise UserError when a data file would become too large in memory or on disk, or is broken.

    name: of the file or its URL, for messages. reader: of READERS, which will read the file
    """
    shown = printable(redacted(name))
    try:
        with open_regular(path) as raw:
            if reader == "parquet":
                _check_parquet(raw, shown)
            elif reader == "arrow":
                _check_arrow(raw, shown)
            else:
                archive = Expansion(shown, os.fstat(raw.fileno()).st_size)
                _check_zip(raw, shown, archive, 0)  # a zip may follow other content
                raw.seek(0)
                _check_content(raw, shown, archive, 0)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # zipfile, tarfile and pyarrow raise many types for a damaged file
        raise UserError(
            f"{shown}: broken ({printable(str(error) or type(error).__name__)}); expected a whole "
            "file of the dataset; copy it again"
        ) from None


def _check_content(raw: io.BufferedReader, name: str, archive: Expansion, depth: int) -> None:
    """Unpack a file or a member of an archive to nothing, with the limit of `archive`."""
    if depth > DEEPEST:
        raise UserError(f"{name}: archives inside archives, more than {DEEPEST} deep; unpack them")
    head = raw.peek(512)
    for magic, kind in UNKNOWN.items():
        if head.startswith(magic):
            raise UserError(
                f"{name}: is compressed as {kind}; expected .gz, .bz2, .xz, .zst or .zip; unpack it"
            )
    by_magic = next((suffix for magic, suffix in MAGIC.items() if head.startswith(magic)), "")
    by_name = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    if by_magic or by_name:
        is_tar = by_name.startswith(".t")
        inner = name.removesuffix(by_name) + (".tar" if is_tar else "")
        content = content_of(raw, inner + (by_magic or by_name), archive)
        _check_content(content, inner, archive, depth + 1)
    elif head[TAR_MAGIC] == b"ustar" or name.endswith(".tar"):
        _check_tar(raw, name, archive, depth)
    elif depth and head.startswith(b"PK"):
        # The directory of a zip is at its end, so it is read as a whole. The limit bounds its size.
        _check_zip(io.BytesIO(raw.read()), name, archive, depth)
    while depth and raw.read(AT_ONCE):
        pass


def _check_tar(raw: io.BufferedReader, name: str, archive: Expansion, depth: int) -> None:
    with tarfile.open(fileobj=raw, mode="r|", tarinfo=TarHeader) as tar:
        for header in iter(tar.next, None):
            tar.members.clear()  # type: ignore[attr-defined] # they would fill the memory
            member = tar.extractfile(header) if header.isfile() else None
            if isinstance(member, io.BufferedReader):
                _check_content(member, f"{name}/{printable(header.name)}", archive, depth + 1)


def _check_zip(raw: BinaryIO, name: str, archive: Expansion, depth: int) -> None:
    """Check the members of a zip. Does nothing for another file."""
    try:
        whole = zipfile.ZipFile(raw)
    except zipfile.BadZipFile:
        return
    with whole:
        members = [member for member in whole.infolist() if not member.is_dir()]
        for member in members:
            archive.add(member.file_size)  # zipfile reads no more than this
        for member in members:
            with whole.open(member) as content:
                inner = f"{name}/{printable(member.filename)}"
                raw_content: Any = content  # typed as IO[bytes], but a BufferedIOBase
                _check_content(io.BufferedReader(raw_content), inner, archive, depth + 1)


def _check_parquet(raw: io.BufferedReader, name: str) -> None:
    from pyarrow.parquet import read_metadata

    metadata = read_metadata(raw)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in range(group.num_columns):
            check_chunk(name, raw, group.column(column))


def _check_arrow(raw: io.BufferedReader, name: str) -> None:
    sizes = DeclaredSizes(name, raw)
    if raw.peek(6)[:6] == b"ARROW1":
        for position in sizes.batches():
            sizes.check_batch(position)
        return
    sizes.check_stream()
