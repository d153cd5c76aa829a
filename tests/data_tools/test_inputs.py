"""WikiText, tars, tables, datasets and URLs as inputs: each document once, errors name the file."""

import gzip
import io
import json
import lzma
import re
import shutil
import sys
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import webdataset
from running import has_mpi, mpirun

from data_tools.formats.documents import documents
from data_tools.formats.source import Tally
from data_tools.inputs.plan import make_plan
from data_tools.inspect_rows import source_reader
from data_tools.prepare import prepare
from data_tools.train_tokenizer import train_tokenizer
from electra_ds.common.errors import UserError
from electra_ds.common.special_ids import UNKNOWN
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.tokenizer import load_tokenizer

TEXTS = [f"word{i} " * (i % 7 + 1) + f"\n\n end{i}" for i in range(200)]


def read(plan, tally=None, field="text") -> list[str]:
    """The documents of all units, each with single spaces."""
    return [
        " ".join(text.split())
        for unit in plan.units
        for file, start, end in unit
        for text in documents(
            plan.sources[file],
            start,
            end,
            text_field=field,
            tally=tally or Tally(),
            on_progress=lambda amount: None,
        )
    ]


def words(texts) -> list[str]:
    """Texts with single spaces."""
    return [" ".join(text.split()) for text in texts]


def tar_of(members: dict[str, bytes], **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def as_wikitext(texts) -> bytes:
    return "".join(
        f" \n = Title {i} = \n \n {text} \n = = Part = = \n \n <unk> {i} \n = 7 = \n"
        for i, text in enumerate(texts)
    ).encode()


def write_parquet(path, texts, **options):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), path, **options)


def test_any_byte_ranges_of_wikitext_give_each_article_once(tmp_path):
    (tmp_path / "wiki.tokens").write_bytes(as_wikitext(TEXTS[:20]))
    articles = words(
        f"= Title {i} = {text} = = Part = = {UNKNOWN} {i} = 7 ="
        for i, text in enumerate(TEXTS[:20])
    )
    for step in (1, 2, 3, 7, 50, 300, 10000):
        plan = make_plan([str(tmp_path)], unit_bytes=step)
        assert plan.sources[0].format == "wikitext"
        assert read(plan) == articles


def test_unk_in_wikitext_becomes_the_unknown_token(tmp_path):
    (tmp_path / "wiki.tokens").write_bytes(as_wikitext(TEXTS))
    for kind, size in (("wordpiece", 300), ("unigram", 90)):
        made = train_tokenizer(
            [str(tmp_path / "wiki.tokens")], tmp_path / kind, kind=kind, vocab_size=size
        )
        assert UNKNOWN not in "".join(made.names)
        tokenizer = load_tokenizer(tmp_path / kind)
        ids = tokenizer.encode_batch([f"word1 {UNKNOWN} end2"])[0]
        assert tokenizer.decode(ids).split() == ["word1", "[UNK]", "end2"]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.xz", "a.tgz", "a.xz"])
def test_a_tar_gives_the_documents_of_its_members(tmp_path, name):
    texts = {f"{i:04}.txt": text.encode() for i, text in enumerate(TEXTS[:50])}
    content = tar_of(
        {
            "owt/urlsf_subset00-1_data.xz": lzma.compress(
                tar_of(texts)
            ),  # a tar without the extension of one
            "._owt": b"\0\1",
            "./.hidden/x": b"\0",
            "empty.txt": b"",
            "rows.jsonl.gz": gzip.compress(
                "\n".join(json.dumps({"text": t}) for t in TEXTS[50:100]).encode()
            ),
            "wiki": as_wikitext(["x"]),
            "long.txt": "\n\n".join(TEXTS[100:]).encode(),
        }
    )
    packed = (
        gzip.compress(content)
        if name.endswith("gz")
        else lzma.compress(content)
        if "xz" in name
        else content
    )
    (tmp_path / name).write_bytes(packed)
    plan = make_plan([str(tmp_path / name)], unit_bytes=100)
    assert len(plan.units) == 1
    rest = ["= Title 0 = x = = Part = = " + UNKNOWN + " 0 = 7 =", " ".join(words(TEXTS[100:]))]
    assert read(plan) == words(TEXTS[:100]) + rest
    lines = [part for text in TEXTS[:50] for part in text.split("\n\n")]
    as_text = make_plan([str(tmp_path / name)], format="text")
    assert read(as_text)[:100] == words(lines)  # the format is also that of the members


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress)])
def test_the_error_for_a_broken_tar_names_the_last_member_read(tmp_path, suffix, pack):
    whole = tar_of(
        {f"{i}.txt": text.encode() for i, text in enumerate(TEXTS[:30])},
        format=tarfile.USTAR_FORMAT,
    )
    path = tmp_path / f"a.tar{suffix}"
    half = 1024 * 10  # bytes: a member has a block of header and one of data
    flipped = bytearray(whole)
    flipped[half + 5] ^= 1
    zeroed = whole[:half] + bytes(1024) + whole[half + 1024 :]
    for content in (
        whole[:half],
        whole[: half + 100],
        whole[: half + 512],
        whole[: half + 600],
        flipped,
        zeroed,
    ):
        path.write_bytes(pack(bytes(content)))
        with pytest.raises(UserError, match=rf"a.tar{suffix}: broken, last read a.tar{suffix}/"):
            read(make_plan([str(path)]))
    if suffix:
        path.write_bytes(pack(whole)[:-4])  # cut in the checksum after the last member
        with pytest.raises(UserError, match="broken after byte"):
            read(make_plan([str(path)]))


def test_the_error_for_a_member_that_is_not_text_names_it(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"pic/b.jpg": b"\xff\xd8\0"}))
    with pytest.raises(UserError, match=r"^a.tar/pic/b.jpg: not text"):
        read(make_plan([str(tmp_path)]))
    (tmp_path / "a.tar").write_bytes(tar_of({"b.parquet": b"PAR1"}))
    with pytest.raises(UserError, match=r"^a.tar/b.parquet: parquet compressed or in a tar"):
        read(make_plan([str(tmp_path)]))
    (tmp_path / "a.tar").write_bytes(tar_of({"b.txt": b"one\n\xfftwo"}))
    tally = Tally()
    assert read(make_plan([str(tmp_path)]), tally) == ["one"]
    assert tally.locations == ["a.tar/b.txt: byte 4: not UTF-8"]


def test_any_byte_ranges_of_a_parquet_file_give_each_row_once(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS, row_group_size=7)
    for step in (50, 700, 100000):
        plan = make_plan([str(tmp_path)], unit_bytes=step)
        assert read(plan) == words(TEXTS)
    sizes = [
        len(read(type(plan)(plan.sources, (((0, a, b),),))))
        for a, b in pairwise([4, 700, 1500, 1 << 30])
    ]
    assert sum(sizes) == len(TEXTS) and all(size % 7 == 0 for size in sizes[:2]) and all(sizes)


def test_errors_of_parquet_files_name_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    write_parquet(path, ["one", None, "two"])
    tally = Tally()
    assert read(make_plan([str(path)]), tally) == ["one", "two"]
    assert tally.bad == {"no text in field 'text' (null)": 1} and tally.lines == 3
    whole = path.read_bytes()
    with pytest.raises(
        UserError, match=r"a.parquet: no column 'body' of text; expected .* one of text$"
    ):
        list(
            documents(
                make_plan([str(path)]).sources[0],
                0,
                1 << 30,
                text_field="body",
                tally=tally,
                on_progress=print,
            )
        )
    for content in (whole[:-20], whole[:4] + b"\xff" * 200 + whole[204:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a.parquet: broken .*; expected a whole parquet file"):
            read(make_plan([str(path)]))
    path.write_bytes(whole)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a.parquet: reading parquet needs pyarrow: pip install"):
        read(make_plan([str(path)]))


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files_are_read_whole_and_errors_name_the_file(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    path, ends = tmp_path / "a.arrow", []
    values = [
        pyarrow.array(["one", None, "two"]),
        pyarrow.array([b"\xff", b"x"]).view(pyarrow.string()),
        pyarrow.array(["three"] * 300),
    ]
    schema = pyarrow.schema([("text", pyarrow.string()), ("id", pyarrow.int64())])
    with open(path, "wb") as file, getattr(pyarrow.ipc, f"new_{kind}")(file, schema) as writer:
        for column in values:
            writer.write_batch(
                pyarrow.record_batch([column, pyarrow.array(range(len(column)))], schema=schema)
            )
            ends.append(file.tell())
    whole, tally = path.read_bytes(), Tally()
    plan = make_plan([str(path)], unit_bytes=100)
    assert (plan.sources[0].format, len(plan.units)) == ("arrow", 1)
    assert read(plan, tally) == ["one", "two", "x", *["three"] * 300]
    assert tally.bad == {"no text in field 'text' (null)": 1, "not UTF-8": 1} and tally.lines == 305
    for field in ("body", "id"):
        with pytest.raises(
            UserError, match=rf"^a.arrow: .* column '{field}' .* text; expected .* one of text$"
        ):
            list(
                documents(
                    plan.sources[0], 0, 1 << 30, text_field=field, tally=tally, on_progress=print
                )
            )
    offsets = whole.index(b"\0\0\0\0\3\0\0\0\3\0\0\0\6\0\0\0") + 4
    broken = [
        whole[: ends[1]],
        whole[: ends[1] + 50],
        whole[:-8],
        whole[:offsets] + b"\x7f" * 8 + whole[offsets + 8 :],
    ]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^a.arrow: broken .*; expected a whole arrow file"):
            read(make_plan([str(path)]))
    path.unlink()
    for name, content in (
        ("b.arrow.gz", gzip.compress(whole)),
        ("b.tar", tar_of({"a.arrow": whole})),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"^b.*: arrow compressed or in a tar cannot be read"):
            read(make_plan([str(tmp_path / name)]))


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Writer of a dataset's folder: one configuration of two shards, another of a test split."""
    pytest.importorskip("datasets", reason="needs the extra [hf]")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))

    def write(folder, texts):
        folder.mkdir(parents=True)
        for part in range(2):
            write_parquet(folder / f"part-{part}.parquet", texts[part::2], row_group_size=9)
        write_parquet(folder / "test.parquet", ["held out"])
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: all\n  data_files: part-*.parquet\n"
            "- config_name: few\n  data_files:\n  - split: test\n    path: test.parquet\n---\n"
        )
        return folder

    return write


def test_a_dataset_is_read_by_shard_and_its_plan_does_not_depend_on_its_folder(
    tmp_path, dataset, monkeypatch
):
    plans = []
    for place in ("here", "there"):
        folder = dataset(tmp_path / place / "set", TEXTS[:30])
        plans.append(
            make_plan([f"dataset:{folder}?config=all", f"dataset:{folder}/?split=train&config=all"])
        )
    assert plans[0].identity() == plans[1].identity()
    names = [f"dataset:set?config=all&split=train shard {shard}" for shard in range(2)]
    assert [source.name for source in plans[0].sources] == names and len(plans[0].units) == 2
    on_progress = []
    for source in plans[0].sources:
        list(
            documents(
                source,
                0,
                source.size,
                text_field="text",
                tally=Tally(),
                on_progress=on_progress.append,
            )
        )
    assert sum(on_progress) == sum(source.size for source in plans[0].sources)
    assert read(plans[0]) == words(TEXTS[:30:2] + TEXTS[1:30:2])
    assert read(make_plan([f"dataset:{folder}?config=few&split=test"])) == ["held out"]
    write_parquet(folder / "part-1.parquet", TEXTS[2:30:2])
    assert make_plan([f"dataset:{folder}?config=all"]).identity() != plans[0].identity()


@pytest.mark.parametrize(
    "pattern", ["../outside.parquet", "/etc/passwd", "http://127.0.0.1:9/a.parquet", "a/../../b"]
)
def test_a_card_that_names_files_outside_of_the_dataset_is_refused(tmp_path, dataset, pattern):
    folder = dataset(tmp_path / "set", TEXTS[:30])
    write_parquet(tmp_path / "outside.parquet", ["secret"])
    for files in (
        f"data_files: {pattern}",
        f"data_files:\n  - split: train\n    path: [{pattern}]",
    ):
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: all\n  {files}\n---\n")
        with pytest.raises(UserError, match=r"README\.md: data_files .* leads out of the dataset"):
            make_plan([f"dataset:{folder}?config=all"])
    (folder / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(UserError, match="YAML cannot be read"):
        make_plan([f"dataset:{folder}?config=all"])


@pytest.mark.parametrize(
    "kind",
    [
        "dtype: image",
        "dtype: audio",
        "dtype: video",
        "list: image",
        "list:\n      list: image",
        "struct:\n    - name: path\n      dtype: image",
    ],
)
def test_a_column_that_a_card_declares_as_images_is_refused_before_a_row_is_read(
    tmp_path, monkeypatch, kind
):
    """`datasets` requests the URLs in the rows of such a column."""
    datasets = pytest.importorskip("datasets", reason="needs the extra [hf]")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(
        json.dumps({"text": {"path": "http://192.0.2.1/x.png", "bytes": None}, "other": "x"}) + "\n"
    )
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\ndataset_info:\n"
        f"  features:\n  - name: text\n    {kind}\n  - name: other\n    dtype: string\n---\n"
    )
    for media in (datasets.Image, datasets.Audio, datasets.Video):
        monkeypatch.setattr(media, "decode_example", lambda *_, **__: pytest.fail("was decoded"))
    plan = make_plan([f"dataset:{tmp_path}/set"])
    with pytest.raises(UserError, match="column 'text' has images, sounds or documents"):
        read(plan)


def test_a_column_of_images_beside_the_text_is_not_decoded(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra [hf]")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    row = {"picture": {"path": "http://192.0.2.1/x.png", "bytes": None}, "text": "a text"}
    (tmp_path / "set" / "train.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\ndataset_info:\n"
        "  features:\n  - name: picture\n    dtype: image\n  - name: text\n    dtype: string\n---\n"
    )
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded"))
    assert read(make_plan([f"dataset:{tmp_path}/set"])) == ["a text"]


CARDS = {
    "README.md": "---\nconfigs:\n- config_name: all\n  data_files: {}\n---\n",
    ".huggingface.yaml": "configs:\n- config_name: all\n  data_files: {}\n",
}


@pytest.mark.parametrize("card", CARDS)
def test_a_card_on_the_hub_is_checked_before_datasets_reads_it(tmp_path, monkeypatch, card):
    """A hub with one card; `datasets` may only be called for the commit that was checked."""
    datasets = pytest.importorskip("datasets", reason="needs the extra [hf]")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    loaded = []

    def download(self, name, file, *, repo_type, revision):
        assert (name, repo_type, revision) == ("owner/set", "dataset", "c" * 40)
        if file != card:
            raise EntryNotFoundError("no such file")
        return str(tmp_path / file)

    def load(name, *_, revision=None, **__):
        loaded.append((name, revision))
        raise ConnectionError("the hub does not answer")

    info = SimpleNamespace(sha="c" * 40)
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, revision=None: info)
    monkeypatch.setattr(HfApi, "hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    for place in ("http://127.0.0.1:9/a.parquet", "/etc/passwd", "../other/a.parquet"):
        (tmp_path / card).write_text(CARDS[card].format(place))
        with pytest.raises(UserError, match=rf"owner/set: {re.escape(card)}: .*leads out of the"):
            make_plan(["dataset:owner/set"])
    assert not loaded
    (tmp_path / card).write_text(CARDS[card].format("a.parquet"))
    with pytest.raises(UserError, match="the hub does not answer"):
        make_plan(["dataset:owner/set"])
    assert loaded == [("owner/set", "c" * 40)]


def test_the_error_for_an_unreadable_dataset_names_it_and_its_code_does_not_run(
    tmp_path, dataset, monkeypatch
):
    folder = dataset(tmp_path / "set", TEXTS[:30])
    for given, message in (
        ("", "expected dataset:NAME"),
        (f"{folder}?confg=all", "expected dataset:NAME"),
        (f"{folder}?config=none", "cannot be read .*'none' not found. Available: ..all', 'few'"),
        (f"{folder}?config=few", "cannot be read .*Bad split: train. Available splits: ..test'"),
    ):
        with pytest.raises(UserError, match=rf"^dataset:{re.escape(given)}: {message}"):
            make_plan([f"dataset:{given}"])
    for name, found in (("parquet", "body.*text"), ("jsonl", "Missing a name")):
        files = tmp_path / name
        files.mkdir()
        (files / "a.jsonl").write_text('{"body": "good"}\n{broken\n')
        plan = make_plan(
            [f"dataset:{folder}?config=all" if name == "parquet" else f"dataset:{files}"]
        )
        with pytest.raises(
            UserError, match=f"^dataset:.* shard 0: .*{found}.*; expected rows with a text in"
        ):
            list(
                documents(
                    plan.sources[0], 0, 99, text_field="body", tally=Tally(), on_progress=print
                )
            )
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(
        UserError, match=r"^dataset:.*code: cannot be read .*scripts are no longer supported"
    ):
        make_plan([f"dataset:{tmp_path / 'code'}"])
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"; pip install 'electra_ds\[hf\]'$"):
        make_plan(["dataset:other"])


def test_a_dataset_saved_to_disk_is_read_as_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra [hf]")
    made = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})})
    made.save_to_disk(tmp_path / "saved", num_shards={"train": 3})
    assert read(make_plan([str(tmp_path / "saved")])) == words(TEXTS)


class Ranges(SimpleHTTPRequestHandler):
    """Serves the files of a folder; answers requests of byte ranges, as object stores do."""

    def send_head(self):
        requested = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if not requested or not path.is_file():
            return super().send_head()
        content = path.read_bytes()
        start, _, end = requested.removeprefix("bytes=").partition("-")
        part = content[int(start) : int(end or len(content)) + 1]
        self.send_response(206)
        self.send_header(
            "Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
        )
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return io.BytesIO(part)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """(folder, URL) of a web server."""
    pytest.importorskip("aiohttp", reason="needs the extra [remote]")
    (tmp_path / "web").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path / "web")))
    Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "web", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class EndlessFolders(SimpleHTTPRequestHandler):
    """Two folders in every folder."""

    def do_GET(self):
        content = b'<a href="a/">a/</a> <a href="b/">b/</a>'
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("pattern", ["", "**", "**/*.txt", "*", "*/b/**/x.txt"])
@pytest.mark.parametrize("limits", [{}, {"MAX_REMOTE_FOLDERS": 9}], ids=["levels", "folders"])
def test_a_server_with_folders_without_end_is_refused(monkeypatch, limits, pattern):
    pytest.importorskip("aiohttp", reason="needs the extra [remote]")
    for name, value in limits.items():
        monkeypatch.setattr(f"data_tools.inputs.matching.{name}", value)
    server = ThreadingHTTPServer(("127.0.0.1", 0), EndlessFolders)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(UserError, match="32 levels of them; give the folders with the texts"):
            make_plan([f"http://127.0.0.1:{server.server_port}/x/{pattern}"])
    finally:
        server.shutdown()
        server.server_close()


JOB = """
import json, sys
from data_tools.prepare import prepare
from data_tools.workers import mpi_ranks
from mpi4py import MPI
with mpi_ranks(MPI.COMM_WORLD) as others:
    if others is not None:
        prepare(**json.loads(sys.argv[1]), ranks=others)
"""


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file of a folder, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("processes", [(3,), pytest.param((1, 2, 4, 7), marks=pytest.mark.slow)])
def test_all_kinds_of_inputs_in_one_call_give_the_same_bytes_for_any_number_of_processes(
    tmp_path, served, processes
):
    datasets = pytest.importorskip("datasets", reason="needs the extra [hf]")
    web, url = served
    local = tmp_path / "local"
    (web / "part").mkdir()
    local.mkdir()
    (local / "README.md").write_text("a card of the folder")
    (local / "a.tar.xz").write_bytes(
        lzma.compress(tar_of({f"{i}.txt": t.encode() for i, t in enumerate(TEXTS[:40])}))
    )
    (local / "b.tokens").write_bytes(as_wikitext(TEXTS[40:80]))
    write_parquet(local / "c.parquet", TEXTS[80:110], row_group_size=9)
    saved = tmp_path / "cache" / "set"
    datasets.Dataset.from_dict({"text": TEXTS[110:120]}).save_to_disk(saved, num_shards=2)
    (web / "part" / "d.txt").write_text("\n\n".join(words(TEXTS[120:160])))
    write_parquet(web / "part" / "e.parquet", TEXTS[160:180], row_group_size=9)
    (web / "f.jsonl.gz").write_bytes(
        gzip.compress("\n".join(json.dumps({"text": t}) for t in TEXTS[180:]).encode())
    )
    inputs = [
        str(local),
        str(local / "*.tokens"),
        f"file://{local}/a.tar.xz",
        f"{url}/part/",
        f"{url}/part/*.txt",
        f"{url}/f.jsonl.gz?signature=secret",
        f"dataset:{saved}",
    ]
    tokenizer = train_tokenizer([str(local / "b.tokens")], tmp_path / "tok", vocab_size=200)
    options = dict(
        unit_bytes=600, shard_bytes=1200, block_rows=16, sequence_length=32, valid_fraction=0
    )
    settings = dict(inputs=inputs, tokenizer=str(tmp_path / "tok"), **options)
    made = prepare(**settings, out=tmp_path / "out1")
    whole = contents(tmp_path / "out1")
    assert len(made.source.units) > 20 and len(made.splits["train"].shards) > 5
    assert made.source.files == (
        "a.tar.xz",
        "b.tokens",
        "c.parquet",
        f"{url}/f.jsonl.gz",
        f"{url}/part/d.txt",
        f"{url}/part/e.parquet",
        "dataset:set?split=train shard 0",
        "dataset:set?split=train shard 1",
    )
    assert made.splits["train"].documents == len(TEXTS) and not made.bad_lines
    for workers in processes:
        prepare(**settings, workers=workers, out=tmp_path / "data")
        assert contents(tmp_path / "data") == whole
        shutil.rmtree(tmp_path / "data")
    (tmp_path / "job.py").write_text(JOB)
    for ranks in processes if has_mpi() else ():
        done = mpirun(
            ranks, tmp_path / "job.py", json.dumps(settings | {"out": str(tmp_path / "data")})
        )
        assert done.returncode == 0 and contents(tmp_path / "data") == whole, done.stderr
        shutil.rmtree(tmp_path / "data")

    reader = ShardReader(tmp_path / "out1", "train")
    read_unit = source_reader(tmp_path / "out1", inputs)
    units = [list(read_unit(unit)) for unit in range(len(made.source.units))]
    for block in range(len(reader.blocks)):
        rows = reader.block(block)
        for row, start, length, unit, number, token in reader.fragments(block).tolist():
            fragment = rows[row, start : start + length].tolist()
            document = tokenizer.encode_batch([units[unit][number].text])[0]
            assert document[token : token + length] == fragment


def test_the_error_for_an_unreadable_url_names_it(served):
    web, url = served
    for given, message in (
        (f"{url}/none.txt", r"cannot be read \(ClientResponseError: 404"),
        ("s4://x/y", "this kind of URL is not opened"),
        (f"{url}/*.txt", "no such file"),
        ("http://127.0.0.1:9/x", r"cannot be read \(ClientConnectorError: Cannot connect"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(given)}: {message}"):
            make_plan([given])
    (web / "a.txt").write_text("text")
    plan = make_plan([f"{url}/a.txt"])
    (web / "a.txt").unlink()
    with pytest.raises(OSError, match=f"{url}/a.txt"):
        read(plan)


def test_the_text_field_selects_the_member_of_webdataset_samples(tmp_path, monkeypatch):
    for shard in range(3):
        with open(tmp_path / f"x-{shard:03}.tar", "wb") as file, webdataset.TarWriter(file) as tar:
            for i, text in enumerate(TEXTS[shard * 10 : shard * 10 + 10]):
                key = f"part.{shard}/{i:04}"  # a folder may have a dot
                tar.write(
                    {
                        "__key__": key,
                        "jpg": b"\xff\xd8\0",
                        "seg.txt": text,
                        "json": {"c": {}, "caption": text},
                    }
                )
    tar = str(tmp_path / "x-{000..002}.tar")
    pretty = tmp_path / "y.tar"
    with open(pretty, "wb") as file, webdataset.TarWriter(file) as writer:
        writer.write(
            {
                "__key__": "a",
                "json": json.dumps({"caption": "one\ntwo"}, indent=2).encode(),
                "cls": 3,
            }
        )
    plan = make_plan([tar], format="webdataset")
    assert [source.name for source in plan.sources] == [f"x-00{i}.tar" for i in range(3)]
    assert read(plan, field="seg.txt") == read(plan, field="json.caption") == words(TEXTS[:30])
    assert read(make_plan([str(pretty)], format="webdataset"), field="json.caption") == ["one two"]
    with monkeypatch.context() as patched:
        patched.setattr("data_tools.formats.jsonl.LONGEST_LINE", 16)
        patched.setattr("data_tools.formats.tar.LONGEST_LINE", 16)
        tally = Tally()
        assert (
            read(make_plan([str(pretty)], format="webdataset"), tally=tally, field="json.caption")
            == []
        )
        assert tally.lines == tally.bad.total() == 1
    with pytest.raises(
        UserError, match=r"^x-000.tar: nothing for --text-field txt, .*is .*/0009.seg.txt"
    ):
        read(plan, field="txt")
    with pytest.raises(UserError, match=f"^{tmp_path}/x-003.tar: no such file"):
        make_plan([str(tmp_path / "x-{000..003}.tar")])
    (tmp_path / "a{1.txt").write_text("one")
    assert read(make_plan([str(tmp_path / "a{1.txt")])) == ["one"]
    with pytest.raises(UserError, match=r"1\.txt: not a tar"):
        make_plan([str(tmp_path / "a{1.txt")], format="webdataset")
