"""Reader of tar archives of files, and of webdataset samples with a text.

The members may have any format, including tar.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from data_tools.formats.detect import detect_format
from data_tools.formats.jsonl import LONGEST_LINE
from data_tools.formats.source import TO_THE_END, Reader, Source, Tally, as_text
from data_tools.inputs.streams import HEAD
from electra_ds.common.decompression import Expansion, content_of
from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable
from electra_ds.common.tar_headers import TarHeader

DEEPEST = 8  # tars inside tars


class Member(NamedTuple):
    """A member of a tar that holds text."""

    format: str
    content: io.BufferedReader
    text_field: str


def tar_reader(read_member: Reader) -> Reader:
    """Return a reader of tars that reads the members by `read_member`."""
    return partial(_read_tar, read_member)


def _read_tar(
    read_member: Reader,
    source: Source,
    content: io.BufferedReader,
    _start: int,
    _end: int,
    text_field: str,
    tally: Tally,
) -> Iterator[str]:
    """Yield the documents of every regular member that is not hidden.

    A member of plain text is one document, unless the user set a format. Raises UserError when the
    tar is broken, and when no sample of a webdataset has the text field.
    """
    wanted = source.format.partition(":")[2] or "auto"
    name = source.name
    if source.depth > DEEPEST:
        raise UserError(
            f"{name}: tars inside tars, more than {DEEPEST} deep; expected fewer; unpack them"
        )
    has_text = wanted != "webdataset"
    archive = source.archive or Expansion(name, source.size)
    try:
        with tarfile.open(fileobj=content, mode="r|", tarinfo=TarHeader) as tar:
            for header in iter(tar.next, None):
                tar.members.clear()  # type: ignore[attr-defined] # they would fill the memory
                is_hidden = "/." in f"/{header.name.removeprefix('./')}"
                if not header.isfile() or not header.size or is_hidden:
                    continue
                name = f"{source.name}/{as_text(header.name)}"
                extracted = tar.extractfile(header)
                assert isinstance(extracted, io.BufferedReader)
                member = _text_member(
                    name, content_of(extracted, name, archive), wanted, text_field
                )
                if member is None:
                    continue
                has_text = True
                inner = Source(name, "", header.size, member.format, "", source.depth + 1, archive)
                yield from read_member(
                    inner, member.content, 0, TO_THE_END, member.text_field, tally
                )
            _read_to_end(content)
    except (tarfile.TarError, UnicodeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{source.name}: broken, last read {name} ({printable(str(error))}); expected a whole tar; copy it "
            "again or leave it out"
        ) from None
    if not has_text:
        raise UserError(
            f"{source.name}: nothing for --text-field {text_field}, the last member is {name}; "
            "expected the extension of a text member (txt), or of a JSON member with a field "
            "(json.text)"
        )


def _read_to_end(content: io.BufferedReader) -> None:
    """Read the rest of an archive, since a compressed one has its checksum there."""
    while rest := content.read(HEAD):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("more data after its end")


def _text_member(
    name: str, content: io.BufferedReader, wanted: str, text_field: str
) -> Member | None:
    """Return how a member is read, or None for a member of a webdataset sample without the text.

    The text of a webdataset sample is KEY.txt for the text field txt, and the field f of KEY.json
    for json.f.
    """
    if wanted != "webdataset":
        format = detect_format(name, content.peek(HEAD), wanted)
        if format == "text" and wanted == "auto":
            format = "text_file"
        return Member(format, content, text_field)
    extension = name.rpartition("/")[2].partition(".")[2].lower()
    if extension == text_field:
        return Member("text_file", content, "")
    if text_field.startswith(f"{extension}."):
        # Without its line ends, an object on several lines is a line of JSONL.
        line = io.BytesIO(content.read(LONGEST_LINE).replace(b"\n", b" "))
        field = text_field.removeprefix(f"{extension}.")
        return Member("jsonl", io.BufferedReader(line), field)
    return None
