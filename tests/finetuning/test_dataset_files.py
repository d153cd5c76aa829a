"""Files of a task's dataset are checked before `datasets` unpacks them."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pytest

from electra_ds.common import decompression
from electra_ds.common.errors import UserError
from electra_ds.finetuning.dataset_files import check_file
from electra_ds.finetuning.examples import read_examples

datasets = pytest.importorskip("datasets", reason="needs the extra [hf]")
zstandard = pytest.importorskip("zstandard")

ROWS = [{"sentence": f"text {label}", "label": label} for label in "ab"]
PLAIN = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
LARGE = json.dumps({"sentence": "a" * (20 << 20), "label": "a"}).encode() + b"\n" + PLAIN
LIMIT = "compressed bytes have a content of more than"


def zipped(content, name="a.jsonl", method=zipfile.ZIP_DEFLATED):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        archive.writestr(name, content)
    return packed.getvalue()


def tarred(members, mode="w"):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return packed.getvalue()


PACKERS = {
    "a.jsonl.gz": gzip.compress,
    "a.jsonl.bz2": bz2.compress,
    "a.jsonl.xz": lzma.compress,
    "a.jsonl.zst": zstandard.compress,
    "a.jsonl.zip": zipped,
}
NESTED = {
    "gzip without its extension": ("a.jsonl", gzip.compress(LARGE)),
    "lzma of the older format": ("a.jsonl.xz", lzma.compress(LARGE, lzma.FORMAT_ALONE)),
    "gzip in a zip": ("a.zip", zipped(gzip.compress(LARGE), "a.csv.gz", zipfile.ZIP_STORED)),
    "a zip in a zip": ("a.zip", zipped(zipped(LARGE), "a.csv.zip", zipfile.ZIP_STORED)),
    "a zip after other content": ("a.jsonl", PLAIN + zipped(LARGE)),
    "gzip in a tar": ("a.tar", tarred({"1.json.gz": gzip.compress(LARGE)})),
    "a tar in gzip": ("a.tar.gz", tarred({"1.json": LARGE}, "w:gz")),
    "gzip with the name of a tar": ("a.tar", tarred({"1.json": LARGE}, "w:gz")),
    "a tar in gzip in a tar": ("a.tar", tarred({"a.tar.gz": tarred({"1.json": LARGE}, "w:gz")})),
}


@pytest.fixture
def dataset_task(own_task, tmp_path, monkeypatch):
    """A function that writes one file of a dataset and returns the task that reads it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(decompression, "FREE", 1 << 20)
    monkeypatch.setenv(decompression.EXPANSION_VARIABLE, "20")

    def write(name, content):
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / name).write_bytes(content)
        return own_task({}, dataset="set", splits={"train": "train", "valid": "train"})

    return write


@pytest.mark.parametrize("name", PACKERS)
def test_a_compressed_file_is_read(dataset_task, name):
    task = dataset_task(name, PACKERS[name](PLAIN))
    assert [example.text_a for example in read_examples(task, "train")] == ["text a", "text b"]


@pytest.mark.parametrize("name", PACKERS)
def test_a_file_that_grows_too_much_is_refused_before_it_is_unpacked(
    dataset_task, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(
        datasets.DownloadManager, "extract", lambda *_, **__: pytest.fail("was unpacked")
    )
    with pytest.raises(UserError, match=rf"{name}: .* {LIMIT}"):
        dataset_task(name, PACKERS[name](LARGE))
    monkeypatch.undo()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.stat().st_size > 1 << 20]


@pytest.mark.parametrize("kind", NESTED)
def test_files_inside_of_files_count_together(dataset_task, tmp_path, kind):
    name, content = NESTED[kind]
    with pytest.raises(UserError, match=LIMIT):
        dataset_task(name, content)


def test_the_factor_may_be_raised(dataset_task, monkeypatch):
    monkeypatch.setenv(decompression.EXPANSION_VARIABLE, "100000")
    task = dataset_task("a.jsonl.gz", gzip.compress(LARGE))
    assert len(read_examples(task, "train")) == 3


def test_a_table_that_declares_too_much_is_refused(dataset_task, tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"sentence": ["a" * (20 << 20), "b"], "label": ["a", "b"]})
    packed = io.BytesIO()
    parquet.write_table(table, packed, compression="zstd", use_dictionary=False)
    with pytest.raises(UserError, match=rf"a\.parquet: .* {LIMIT}"):
        dataset_task("a.parquet", packed.getvalue())
    for kind in (pyarrow.ipc.new_stream, pyarrow.ipc.new_file):
        options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
        with kind(tmp_path / "a.arrow", table.schema, options=options) as writer:
            writer.write_table(table)
        with pytest.raises(UserError, match=rf"a\.arrow: .* {LIMIT}"):
            check_file(str(tmp_path / "a.arrow"), "a.arrow", "arrow")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(PLAIN)[:-20], r"a\.jsonl\.gz: broken after byte"),
        ("a.zip", zipped(PLAIN)[:60] + b"x" * 9 + zipped(PLAIN)[69:], r"a\.zip: broken"),
        ("a.parquet", b"PAR1" + bytes(40), r"a\.parquet: broken"),
        ("a.jsonl.lz4", b"\x04\x22\x4d\x18" + bytes(40), "compressed as lz4; expected .gz"),
        ("a.jsonl.7z", b"7z\xbc\xaf\x27\x1c" + bytes(40), "compressed as 7z; expected .gz"),
        ("a.xml", b"<a/>", r"set: its files are read by xml; expected CSV"),
    ],
)
def test_a_file_that_cannot_be_checked_is_refused(dataset_task, name, content, message):
    with pytest.raises(UserError, match=message):
        dataset_task(name, content)


def test_a_saved_dataset_is_named(dataset_task):
    with pytest.raises(UserError, match="was written by save_to_disk"):
        dataset_task("state.json", b"{}")
