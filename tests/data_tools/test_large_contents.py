"""Small files with huge contents: memory is bounded, and the limit is an error with a way out."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import random
import re
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import zstandard
from running import CPU

from data_tools.formats import tar as tar_format
from data_tools.formats.documents import documents
from data_tools.formats.source import Tally
from data_tools.inputs.plan import make_plan
from electra_ds.common import decompression
from electra_ds.common.errors import UserError
from electra_ds.common.parquet_sizes import check_chunk, page_header

PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def read(path: Path) -> list[str]:
    """The documents of a file."""
    return [
        text
        for source in make_plan([str(path)]).sources
        for text in documents(
            source,
            0,
            source.size,
            text_field="text",
            tally=Tally(),
            on_progress=lambda amount: None,
        )
    ]


def zstd_zeros(size: int) -> bytes:
    """A frame of blocks of one repeated byte: 128 KiB in 4 bytes."""
    block = ((1 << 17) << 3 | 1 << 1).to_bytes(3, "little") + b"a"
    last = (1 << 17 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"a"
    head = b"\x28\xb5\x2f\xfd\x00" + bytes([(17 - 10) << 3])
    return head + block * (size >> 17) + last


def bombs() -> dict[str, bytes]:
    """Files of 4 GB of content, or of 1 GB where packing takes long."""
    packer = lzma.LZMACompressor(preset=0)
    chunk = b"a" * (1 << 24)
    xz = b"".join([packer.compress(chunk) for _ in range(64)] + [packer.flush()])
    return {
        "a.txt.bz2": bz2.compress(b"a" * (1 << 30)),
        "a.txt.zst": zstd_zeros(1 << 32),
        "a.txt.xz": xz,
        "a.txt.gz": gzip.compress(b"a" * (1 << 29), 9),
    }


PEAK = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_large_contents import read, UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read(Path(sys.argv[1]))
except UserError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("name", ["a.txt.bz2", "a.txt.zst", "a.txt.xz", "a.txt.gz"])
def test_a_small_file_with_a_huge_content_takes_little_memory_and_time(tmp_path, name):
    (tmp_path / name).write_bytes(bombs()[name])
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / name, Path(__file__).parent],
        env=os.environ
        | CPU
        | {"PYTHONPATH": f"{CPU['PYTHONPATH']}:{CPU['PYTHONPATH']}/tests/support"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *message, peak = done.stdout.splitlines()
    assert int(peak) < 250 and time.monotonic() - start < 60, done.stdout
    if name != "a.txt.gz":  # gzip packs at most 1,032 bytes into one
        assert "expected at most 1,000 times as many" in message[0]
        assert decompression.EXPANSION_VARIABLE in message[0]


def test_the_factor_may_be_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(decompression, "FREE", 1000)
    (tmp_path / "a.txt.bz2").write_bytes(bz2.compress(b"a" * 500_000))
    with pytest.raises(UserError, match="compressed bytes have a content of more than"):
        read(tmp_path / "a.txt.bz2")
    monkeypatch.setenv(decompression.EXPANSION_VARIABLE, "100000")
    assert len(read(tmp_path / "a.txt.bz2")[0]) == 500_000
    for value in ("0", "x", "-1", "1e9", "", "9" * 30):
        monkeypatch.setenv(decompression.EXPANSION_VARIABLE, value)
        with pytest.raises(
            UserError, match=f"{decompression.EXPANSION_VARIABLE} = .*expected an integer"
        ):
            read(tmp_path / "a.txt.bz2")


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
def test_the_content_does_not_depend_on_the_parts(tmp_path, monkeypatch, suffix, at_once):
    monkeypatch.setattr(decompression, "AT_ONCE", at_once)
    monkeypatch.setattr(decompression, "INPUT", 50)
    monkeypatch.setattr(decompression, "ZSTD_INPUT", 13)
    words = random.Random(0).choices(["old", "river", "stone", "zzzz" * 50], k=800)
    content = " ".join(words).encode()
    pack = PACKERS[suffix]
    packed = pack(content[:1500]) + pack(b"") + bytes(8) + pack(content[1500:])
    raw = io.BufferedReader(io.BytesIO(packed))
    assert decompression.content_of(raw, f"a{suffix}").read() == content
    for cut in (5, len(packed) // 3, len(packed) - 2):
        raw = io.BufferedReader(io.BytesIO(packed[:cut]))
        with pytest.raises(UserError, match=rf"^a{suffix}: broken after byte \d+"):
            decompression.content_of(raw, f"a{suffix}").read()


# -------------------------------------------------------------------------------------------- tars


def header(name: str = "a.txt", **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def sparse_pax(version: str) -> bytes:
    keys = {
        "0.0": {"GNU.sparse.size": str(1 << 40), "GNU.sparse.numblocks": "0"},
        "0.1": {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40)},
        "1.0": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"},
    }[version]
    return header(pax_headers=keys, size=512).tobuf(tarfile.PAX_FORMAT) + b"9" * 512


def sparse_gnu() -> bytes:
    block = bytearray(header(type=tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"\x80" + (1 << 40).to_bytes(11, "big")  # the size with its holes
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(kind: bytes, content: bytes) -> bytes:
    """An extended header with its blocks."""
    padded = content + bytes(-len(content) % 512)
    return header("x", type=kind, size=len(content)).tobuf(tarfile.USTAR_FORMAT) + padded


TARS = {
    **{
        f"extended headers of type {kind!r}": (extended(kind, content) * 2000, "headers in a row")
        for kind, content in {
            tarfile.GNUTYPE_LONGNAME: b"name\0",
            tarfile.GNUTYPE_LONGLINK: b"name\0",
            tarfile.XHDTYPE: b"9 a=bcde\n",
            tarfile.XGLTYPE: b"9 a=bcde\n",
        }.items()
    },
    "attributes of all members": (
        b"".join(
            extended(tarfile.XGLTYPE, b"30000 k%d=" % i + b"x" * 29990 + b"\n")
            + header().tobuf(tarfile.USTAR_FORMAT)
            for i in range(3)
        ),
        "at most 65,536 are read",
    ),
    "a long number": (
        extended(tarfile.XHDTYPE, b"1000000 a=" + b"1" * 999_989 + b"\n"),
        "damaged attributes",
    ),
    "attributes that overlap": (
        extended(tarfile.XHDTYPE, b"2 " * 500_000 + b"="),
        "damaged attributes",
    ),
    "GNU sparse": (sparse_gnu(), "a sparse member"),
    "sparse 0.0": (sparse_pax("0.0"), "a sparse member"),
    "sparse 0.1": (sparse_pax("0.1"), "a sparse member"),
    "sparse 1.0": (sparse_pax("1.0"), "a sparse member"),
    "a long name": (
        header("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=1 << 32).tobuf(),
        "at most 1,048,576 are read",
    ),
    "long attributes": (header(type=tarfile.XHDTYPE, size=1 << 32).tobuf(), "are read"),
    "a negative size": (
        header(size=-512).tobuf(tarfile.GNU_FORMAT),
        "broken",
    ),
    "a size that the file does not have": (header(size=1 << 33).tobuf(), "broken"),
}


@pytest.mark.parametrize("kind", TARS)
def test_headers_of_tars_do_not_ask_for_memory_or_time(tmp_path, kind):
    content, message = TARS[kind]
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(content + b"text\n".ljust(10240, b"\0")))
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"^x\.tar\.gz.*{message}") as caught:
        read(tmp_path / "x.tar.gz")
    assert time.monotonic() - start < 5 and "\n" not in str(caught.value)


def test_long_names_and_attributes_are_read(tmp_path):
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(
            tmp_path / "x.tar", mode="w", format=form, pax_headers={"comment": "for all"}
        ) as tar:
            for number in range(20):
                info = header(f"{'é' * 200}/{number}.txt", size=6, pax_headers={"own": "ö=1\n"})
                tar.addfile(info, io.BytesIO(b"text%2d" % number))
        assert read(tmp_path / "x.tar") == [f"text{number:2}" for number in range(20)]


def test_a_tar_of_bz2_with_a_huge_member_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(decompression, "FREE", 1 << 22)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:bz2") as tar:
        tar.addfile(header(size=1 << 27), io.BytesIO(b"a" * (1 << 27)))
    (tmp_path / "x.tar.bz2").write_bytes(content.getvalue())
    with pytest.raises(UserError, match=r"^x\.tar\.bz2: .* content of more than"):
        read(tmp_path / "x.tar.bz2")


def test_tars_inside_tars_have_a_limit(tmp_path):
    content = b"text\n"
    for level in range(tar_format.DEEPEST + 3):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            name = f"{level}.tar" if level else "a.txt"
            tar.addfile(header(name, size=len(content)), io.BytesIO(content))
        content = packed.getvalue()
        (tmp_path / "x.tar").write_bytes(content)
        if level <= tar_format.DEEPEST - 1:
            assert read(tmp_path / "x.tar") == ["text\n"]
    with pytest.raises(UserError, match="tars inside tars, more than"):
        read(tmp_path / "x.tar")


def test_control_characters_of_member_names_are_escaped(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(header("a\x1b[2J\udcff.bin", size=3), io.BytesIO(b"\0\1\2"))
    with pytest.raises(UserError, match="not text") as caught:
        read(tmp_path / "x.tar")
    assert "x.tar/a\\x1b[2J\\xff.bin" in str(caught.value)


# ------------------------------------------------------------------------------------------ tables


def test_a_column_that_grows_too_much_is_refused(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    from pyarrow import parquet

    monkeypatch.setattr(decompression, "FREE", 1 << 20)
    table = pyarrow.table({"text": ["a" * (1 << 24)]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(UserError, match=r"^a\.parquet: .* content of more than"):
        read(tmp_path / "a.parquet")


def arrow_bytes(kind, table, **options):
    """An arrow file or stream; options: of the writer."""
    import pyarrow

    content = io.BytesIO()
    write = getattr(pyarrow.ipc, f"new_{kind}")
    with write(content, table.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=100)
    return content.getvalue()


# Run with little address space: reads a file and prints the error, or the number of texts.
READ_ARROW = """
import resource, sys
import pyarrow
from data_tools.formats.documents import documents
from data_tools.formats.source import Tally
from data_tools.inputs.plan import make_plan
from electra_ds.common.errors import UserError
(source,) = make_plan([sys.argv[1]]).sources
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
texts = documents(
    source, 0, source.size, text_field="text", tally=Tally(), on_progress=lambda amount: None
)
try:
    print(sum(1 for _ in texts))
except UserError as error:
    print(error)
"""


def read_arrow(path):
    done = subprocess.run(
        [sys.executable, "-c", READ_ARROW, path],
        env=os.environ | CPU,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_compressed_buffer_that_declares_a_huge_size_is_refused(tmp_path, kind, codec):
    """pyarrow allocates the size that stands before the compressed bytes."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    texts = ["b" * 1024] * 250
    table = pyarrow.table({"id": range(250), "text": texts, "x": [1.5] * 250})
    whole = arrow_bytes(kind, table, compression=codec)
    path = tmp_path / "a.arrow"
    path.write_bytes(whole)
    assert read(path) == texts
    magic = {"zstd": b"\x28\xb5\x2f\xfd", "lz4": b"\x04\x22\x4d\x18"}[codec]
    size = struct.pack("<q", 100 * 1024) + magic
    assert whole.count(size) == 2  # of three batches, the last one of 50 rows
    for place in (whole.index(size), whole.rindex(size)):
        for declared in (1 << 40, 1 << 62):
            path.write_bytes(whole[:place] + struct.pack("<q", declared) + whole[place + 8 :])
            assert re.match(
                r"a\.arrow: .* content of more than .* bytes; expected", read_arrow(path)
            )
        path.write_bytes(whole[:place] + struct.pack("<q", -2) + whole[place + 8 :])
        with pytest.raises(UserError, match=r"^a\.arrow: broken \(a buffer of -2 bytes"):
            read(path)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_rows_without_buffers_and_repeated_values_are_bounded(tmp_path, monkeypatch, kind):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    path = tmp_path / "a.arrow"
    monkeypatch.setattr(decompression, "FREE", 1 << 22)
    nothing = arrow_bytes(kind, pyarrow.table({"text": pyarrow.nulls(100)}))
    path.write_bytes(nothing.replace(struct.pack("<q", 100), struct.pack("<q", 1 << 40)))
    with pytest.raises(UserError, match=r"^a\.arrow: .* content of more than"):
        read(path)
    words = pyarrow.array(["c" * (1 << 20)])
    _, view, *data = words.cast(pyarrow.string_view()).buffers()
    repeated = pyarrow.py_buffer(view.to_pybytes()[:16] * 10_000)
    views = pyarrow.Array.from_buffers(pyarrow.string_view(), 10_000, [None, repeated, *data])
    for column in (
        pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000, pyarrow.int8()), words),
        views,
    ):
        path.write_bytes(arrow_bytes(kind, pyarrow.table({"text": column}), compression="zstd"))
        monkeypatch.setattr(decompression, "FREE", 1 << 22)
        with pytest.raises(UserError, match=r"^a\.arrow: .* content of more than"):
            read(path)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_any_damage_of_an_arrow_file_is_one_message(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    texts = pyarrow.array(["one", None, "three"] * 50).dictionary_encode()
    table = pyarrow.table({"text": texts, "id": range(150)})
    whole = arrow_bytes(kind, table, compression="zstd")
    path = tmp_path / "a.arrow"
    random.seed(0)
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(random.choice([1, 1, 4])):
            place = random.randrange(8, len(content) - 8)
            width = random.choice([1, 4, 8])
            content[place : place + width] = random.choice(
                [b"\xff" * width, bytes(width), random.randbytes(width)]
            )
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            read(path)


def test_a_record_that_claims_a_huge_size_is_refused(tmp_path):
    crc32c = pytest.importorskip("google_crc32c", reason="needs the extra [tfrecord]")
    from data_tools.convert import convert

    size = struct.pack("<Q", 1 << 60)
    crc = crc32c.value(size)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    (tmp_path / "a.tfrecord").write_bytes(size + struct.pack("<I", masked) + b"x" * 100)
    with pytest.raises(UserError, match=r"a\.tfrecord: record 0: .*bytes"):
        convert([str(tmp_path / "a.tfrecord")], tmp_path / "no-tokenizer", tmp_path / "out")


def test_a_long_entry_of_a_parquet_dictionary_is_not_repeated_in_memory(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr("data_tools.formats.table.BATCH_BYTES", 1 << 20)
    entry = "a" * (300 << 10)
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 64, "int32"), [entry])
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", store_schema=False)
    sizes = []
    iter_batches = parquet.ParquetFile.iter_batches

    def measured(*arguments, **options):
        for batch in iter_batches(*arguments, **options):
            sizes.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", measured)
    assert read(tmp_path / "a.parquet") == [entry] * 64
    assert 0 < max(sizes) < 1 << 20


@pytest.mark.parametrize("is_nested", [False, True])
def test_the_members_of_an_archive_have_one_limit_together(tmp_path, monkeypatch, is_nested):
    """A compressed archive of compressed members grows by the product of both factors."""
    monkeypatch.setattr(decompression, "FREE", 1 << 20)
    member = gzip.compress(b"\n" * (1 << 18))

    def packed(members: dict[str, bytes]) -> bytes:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for name, data in members.items():
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
        return content.getvalue()

    for count in (3, 20):
        if is_nested:
            inner = {f"{i}.tar": packed({"a.jsonl.gz": member}) for i in range(count)}
        else:
            inner = {f"{i}.jsonl.gz": member for i in range(count)}
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(packed(inner)))
        if count == 3:
            assert read(tmp_path / "a.tar.gz") == []
        else:
            with pytest.raises(UserError, match=r"a\.tar\.gz: .* compressed bytes have a content"):
                read(tmp_path / "a.tar.gz")


@pytest.mark.parametrize("suffix", PACKERS)
def test_the_limit_holds_for_files_of_a_dataset(tmp_path, monkeypatch, suffix):
    pytest.importorskip("datasets")
    from data_tools.inputs import hub

    hub._open_split.cache_clear()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    pack = PACKERS[suffix]
    (tmp_path / "small" / f"a.jsonl{suffix}").write_bytes(pack(b'{"text": "a text"}\n' * 3))
    text = b'{"text": "' + b"a" * (20 << 20) + b'"}\n'
    (tmp_path / "large" / f"a.jsonl{suffix}").write_bytes(pack(text))
    monkeypatch.setattr(decompression, "FREE", 1 << 20)
    monkeypatch.setenv(decompression.EXPANSION_VARIABLE, "20")
    assert read_dataset(tmp_path / "small") == ["a text"] * 3
    with pytest.raises(UserError, match=rf"a\.jsonl\{suffix}: .* compressed bytes have a content"):
        read_dataset(tmp_path / "large")


def read_dataset(folder: Path) -> list[str]:
    return read(f"dataset:{folder}")


# ------------------------------------------------------------------------------- pages of Parquet


def varint(number: int) -> bytes:
    """An integer of Thrift's compact protocol."""
    number = number << 1
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def page_of(size: int) -> bytes:
    """A page of Parquet with one value of about `size` equal characters, compressed by zstd."""
    content = zstandard.compress(struct.pack("<I", size - 4) + b"a" * (size - 4))

    def integers(*numbers: int) -> bytes:
        return b"".join(b"\x15" + varint(number) for number in numbers)

    values = integers(1, 0, 3, 3) + b"\0"  # one value, PLAIN, levels as RLE
    return integers(0, size, len(content)) + b"\x2c" + values + b"\0" + content


@pytest.mark.parametrize("size", [1 << 20, 1 << 16])
def test_pages_that_hold_more_than_their_chunk_declares_are_refused(tmp_path, monkeypatch, size):
    """pyarrow allocates what the header of a page declares, for all pages of a batch."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    from pyarrow import parquet

    pages = page_of(size) * 20
    letters = random.Random(0)
    texts = ["".join(letters.choices("0123456789abcdef", k=2000)) for _ in range(20)]
    schema = pyarrow.schema([pyarrow.field("text", pyarrow.string(), nullable=False)])
    path = tmp_path / "a.parquet"
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    parquet.write_table(pyarrow.table({"text": texts}, schema=schema), path, **options)
    chunk = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    assert len(pages) < chunk.total_compressed_size
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset : chunk.data_page_offset + len(pages)] = pages
    path.write_bytes(content)
    monkeypatch.setattr(decompression, "FREE", 1 << 21)
    if size == 1 << 16:
        assert read(path) == ["a" * (size - 4)] * 20
        return
    monkeypatch.setattr(
        parquet.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("was read")
    )
    with pytest.raises(UserError, match=r"^a\.parquet: .* content of more than"):
        read(path)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("is_dictionary", [False, True])
def test_the_pages_of_a_chunk_have_the_size_of_its_metadata(tmp_path, version, is_dictionary):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    from pyarrow import parquet

    texts = [None, *(f"text {i % 700} of the file" for i in range(20_000))]
    parquet.write_table(
        pyarrow.table({"id": range(20_001), "text": texts}),
        tmp_path / "a.parquet",
        data_page_version=version,
        use_dictionary=is_dictionary,
        data_page_size=10_000,
        row_group_size=9_000,
        write_page_checksum=True,
    )
    metadata = parquet.ParquetFile(tmp_path / "a.parquet").metadata
    content = (tmp_path / "a.parquet").read_bytes()
    assert metadata.num_row_groups == 3
    for number in range(3):
        chunk = metadata.row_group(number).column(1)
        whole = io.BufferedReader(io.BytesIO(content))
        assert check_chunk("a", whole, chunk) == chunk.total_uncompressed_size
        start = chunk.data_page_offset
        sizes = []
        while sum(values for *_, values, _ in sizes) < chunk.num_values:
            sizes.append(page_header(content[start:]))
            start += sizes[-1].compressed + sizes[-1].length
        assert len(sizes) > 1 or is_dictionary
        for cut in range(chunk.data_page_offset, chunk.data_page_offset + sizes[0].length):
            with pytest.raises(ValueError, match=r"the header of a page|not in the file"):
                check_chunk("a", io.BufferedReader(io.BytesIO(content[:cut])), chunk)


def test_any_damage_of_a_page_header_is_an_error_or_harmless():
    header = page_of(1000)[:40]
    random.seed(0)
    for _ in range(3000):
        content = bytearray(header)
        for _ in range(random.choice([1, 1, 4])):
            content[random.randrange(len(content))] = random.choice([0, 255, random.randrange(256)])
        with contextlib.suppress(ValueError):
            assert min(page_header(bytes(content))) >= 0
