"""Rows behind a URL: the same as from the disk, asked for once, checked, asked for again; nothing is read twice."""

import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from threading import Timer

import fsspec
import numpy as np
import pytest
from running import ROOT
from shard_data import SPECIAL, best_fit_rows, write_data, write_tokenizer
from web import Web, served

from electra_ds.common.errors import RunFailure, UserError
from electra_ds.data import loader, remote_reader
from electra_ds.data.dataset import open_data
from electra_ds.data.loader import Loader, evaluation_batches
from electra_ds.data.masking import MaskingRecipe
from electra_ds.data.shard_format import TAR_BLOCK

pytest.importorskip("aiohttp", reason="needs the extra [remote]")
RECIPE = MaskingRecipe("best_fit", SPECIAL, 0.15, 0.85, 7)
RUN = {"recipe": RECIPE, "global_batch_size": 12, "micro_batch_size": 2}
ROWS = 1600  # in 100 blocks of 16 rows; 5 shards, the last with one block


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with what streaming needs."""
    folder = tmp_path_factory.mktemp("data")
    write_data(
        folder,
        np.split(best_fit_rows(ROWS, 32), [400, 800, 1200, 1584]),
        valid=best_fit_rows(50, 32, seed=9),
    )
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture
def web(folder, monkeypatch):
    """The folder served; chunks of two blocks, of which few are kept, and short pauses."""
    monkeypatch.setattr(remote_reader, "CHUNK_BYTES", 2 * 16 * 32 * 2)
    monkeypatch.setattr(remote_reader, "CACHED_CHUNKS", 2)
    monkeypatch.setattr(remote_reader, "RETRY_PAUSES", (0.01, 0.02))
    monkeypatch.setattr(loader, "READ_TOKENS", 12 * 32)  # a step at a time
    with served(folder) as web:
        yield web


def chunks_asked(web: Web) -> list[tuple[str, int]]:
    return [asked for asked in web.asked if asked[0].startswith("/shards/train")]


def steps_of(source, steps, **options):
    """(rows [G / world], input_ids, chosen) of some steps."""
    reader, row_order = source.training(7, 12)
    loader = Loader(reader, row_order, **RUN | options)
    found = [next(loader) for _ in range(steps)]
    loader.close()
    return [
        (
            s.rows.tolist(),
            [m.input_ids.tolist() for m in s.micro_batches],
            [m.masked_positions.tolist() for m in s.micro_batches],
        )
        for s in found
    ]


def test_rows_are_those_of_the_disk(folder, web):
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/somewhere/", recursive=True)
    name = (
        f"memory://somewhere/{folder.name}"
        if memory.exists(f"/somewhere/{folder.name}")
        else "memory://somewhere"
    )
    disk = open_data(folder)
    rows = np.random.default_rng(0).integers(0, ROWS, 300)
    for url in (web.url, web.url + "/", f"file://{folder}", name):
        source = open_data(url)
        reader, _ = source.training(0, 12)
        assert source.manifest == disk.manifest
        assert np.array_equal(source.held_out()[""].unigrams, disk.held_out()[""].unigrams)
        assert sorted(path.name for path in source.tokenizer.iterdir()) == [
            "options.json",
            "vocab.txt",
        ]
        for asked in (rows, rows[:0]):
            assert np.array_equal(reader.read(asked), disk.training(0, 12)[0].read(asked))
        for (ours, _), (theirs, _) in zip(
            *(
                evaluation_batches(data.held_out()[""].rows, RECIPE, batch_rows=8)
                for data in (source, disk)
            ),
            strict=True,
        ):
            assert all(map(np.array_equal, ours, theirs))


def test_ranks_share_the_chunks_and_a_resume_asks_for_nothing_that_is_done(web):
    for world in (1, 3):
        shares = []
        for rank in range(world):
            reader, row_order = open_data(web.url).training(7, 12)
            assert (row_order.lanes, len(reader.chunk_rows)) == (12, 52)
            web.asked.clear()
            own = np.arange(rank * 12 // world, (rank + 1) * 12 // world)
            shares.append(
                [reader.read(row_order.rows(step * 12 + own)[0]) for step in range(133)]
            )  # an epoch
            asked = Counter(chunks_asked(web))
            assert (
                52 / world - 2 <= len(asked) <= 52 / world + 2
            )  # its lanes' own, and those that lanes meet in
            assert sum(asked.values()) <= 52 / world + 12 / world + 1
        if world == 1:
            whole = shares[0]
        assert np.array_equal(np.concatenate(shares, axis=1), whole)
    source = open_data(web.url)
    steps = steps_of(source, 104)
    web.asked.clear()
    assert steps_of(source, 2, consumed_rows=100 * 12) == steps[100:102]
    assert (
        len(chunks_asked(web)) <= 12 + 6
    )  # one for each lane, and the following one where it ends


def test_a_checkpoint_goes_on_with_chunks_of_the_same_size_alone(web, monkeypatch):
    reader, row_order = open_data(web.url).training(7, 12)
    state = row_order.state() | {"dataset_id": reader.manifest.dataset_id, "position": 240}
    assert loader.consumed_rows_from_state(state, reader, row_order) == 240
    monkeypatch.setattr(remote_reader, "CHUNK_BYTES", 4 * 16 * 32 * 2)
    with pytest.raises(UserError, match="chunks: checkpoint 52, now 28"):
        loader.consumed_rows_from_state(state, *open_data(web.url).training(7, 12))


def test_a_mixture_takes_urls(folder, web, tmp_path):
    sources = [
        {"data": data, "name": name, "weight": 1}
        for name, data in (("here", str(folder)), ("there", web.url))
    ]
    (tmp_path / "mix.json").write_text(json.dumps(sources))
    steps = steps_of(open_data(tmp_path / "mix.json"), 20)
    assert {row >= ROWS for rows, _, _ in steps for row in rows} == {True, False}
    halves = [
        steps_of(open_data(tmp_path / "mix.json"), 20, rank=rank, world_size=2) for rank in (0, 1)
    ]
    assert [a[1] + b[1] for a, b in zip(*halves, strict=True)] == [ids for _, ids, _ in steps]


def test_what_fails_once_is_asked_for_again(folder, web):
    source, port = open_data(web.url), web.server_port
    expected = steps_of(open_data(f"file://{folder}"), 3)
    for change in (
        lambda content: (
            content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]
        ),  # in a block's rows
        lambda content: b"x" + content[1:],  # in the first header
        lambda content: content[:-700],
        lambda content: 503,
        lambda content: 429,
    ):
        seen = set()
        web.change = lambda path, content, change=change, seen=seen: (
            content if path in seen or seen.add(path) else change(content)
        )
        assert steps_of(source, 3) == expected and seen
    web.shutdown()
    web.server_close()
    remote_reader.RETRY_PAUSES = (0.1, 0.2, 0.5, 1, 2)
    with ExitStack() as later:
        Timer(0.3, lambda: later.enter_context(served(folder, port))).start()
        assert steps_of(source, 3) == expected


def test_what_stays_wrong_is_named(folder, web, capsys):
    source = open_data(web.url)
    reader, _ = source.training(7, 12)
    name, count = f"{web.url}/shards/train-000002.tar", len(remote_reader.RETRY_PAUSES) + 1
    row = 800 + 5 * 16  # shard 2, block 5, the second of its chunk

    def flip(content, place):
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    for change, error, message in (
        (
            lambda content: flip(content, -700),
            UserError,
            f"{name}: block 5: its rows differ from their crc32; copy",
        ),
        (
            lambda content: flip(content, 0),
            UserError,
            f"{name}: block 4: its tar header is not that of train-000002-000004.ids.npy; copy",
        ),
        (
            lambda content: b"\0" * len(content),
            UserError,
            f"{name}: block 4: its tar header is not that of train-000002-000004.ids.npy; copy",
        ),
        (
            lambda content: content[:700],
            RunFailure,
            f"{name}: requested bytes .*, received 700 bytes, {count} times",
        ),
        (
            lambda content: 500,
            RunFailure,
            f"{name}: requested bytes .*, received ClientResponseError: 500",
        ),
        (lambda content: 403, UserError, f"{name}: ClientResponseError: 403"),
        (lambda content: 404, UserError, f"{name}: FileNotFoundError: "),
    ):
        web.change, _ = (lambda path, content, change=change: change(content)), web.asked.clear()
        with pytest.raises(error, match=f"^{message}"):
            reader.read(np.array([row]))
        least = 1 if "403" in message or "NotFound" in message else count
        assert capsys.readouterr().err.count(f"{name}: no complete answer yet") == (least > 1)
        assert (
            least <= len(web.asked) <= 2 * least
        )  # aiohttp asks once more itself where a kept connection was closed
    web.change, web.knows_ranges = (lambda path, content: content), False
    with pytest.raises(
        UserError,
        match=f"^{name}: requested .*, received .* bytes; expected a server that supports Range",
    ):
        reader.read(np.array([row]))
    web.shutdown()
    web.server_close()
    with pytest.raises(
        RunFailure, match=f"^{name}: requested bytes .*, received ClientConnectorError: .*resumes"
    ):
        reader.read(np.array([row]))


def test_what_is_no_data_folder_is_named(folder, web, tmp_path):
    for url, message in (
        (f"{web.url}/none", f"{web.url}/none/manifest.json: FileNotFoundError"),
        ("s4://bucket/D", "s4://bucket/D: Protocol not known"),
        ("pipe:curl http://host/D", "pipe:curl http://host/D: commands are not run"),
        ("memory://nowhere", "memory://nowhere/manifest.json: FileNotFoundError"),
    ):
        with pytest.raises(UserError, match=message):
            open_data(url)
    web.change = lambda path, content: b"<html>sign in" if path == "/manifest.json" else content
    with pytest.raises(UserError, match=f"{web.url}/manifest.json: not valid JSON"):
        open_data(web.url)
    web.change = lambda path, content: content[:-1] if path == "/index-train.bin" else content
    with pytest.raises(
        UserError, match=f"{web.url}/index-train.bin: its sha256 differs from the manifest's"
    ):
        open_data(web.url).training(0, 12)


def test_copies_that_cannot_be_written_are_told_with_where_they_go(web, tmp_path):
    (tmp_path / "tokenizer").touch()  # a file where a folder goes: an OSError, as of a full disk
    with pytest.raises(
        RunFailure, match=f"^{tmp_path}/tokenizer/vocab.txt: .*; make room, or set TMPDIR"
    ):
        remote_reader.RemoteFolder(web.url).copy({"tokenizer/vocab.txt": None}, tmp_path)


class Trap:
    """Unpickling an instance fails the test."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle inside a shard was executed",))


def test_a_link_and_a_pickle_in_a_chunk_are_refused_by_their_headers(web):
    link = tarfile.TarInfo("train-000000-000000.ids.npy")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    pickled = io.BytesIO()
    np.lib.format.write_array(pickled, np.array([Trap()], object), allow_pickle=True)
    reader, _ = open_data(web.url).training(7, 12)
    for offset, found, message in (
        (0, link.tobuf(tarfile.USTAR_FORMAT), "block 0: its tar header is not that of"),
        (TAR_BLOCK, pickled.getvalue(), "block 0: the npy header of"),
    ):
        web.change = lambda path, content, offset=offset, found=found: (
            content[:offset] + found + content[offset + len(found) :]
        )
        with pytest.raises(UserError, match=message):
            reader.read(np.array([0]))


def test_a_stream_does_not_import_webdataset():
    source = "import sys, electra_ds.data.remote_reader\nassert 'webdataset' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], check=True, cwd=ROOT)


def test_the_check_of_a_node_asks_the_url(web):
    command = ["bash", str(ROOT / "launch" / "health.sh")]
    found = subprocess.run([*command, web.url], capture_output=True, text=True)
    assert found.returncode == 0 and ("/manifest.json", 0) in web.asked, found.stderr
    lost = subprocess.run([*command, web.url + "/none"], capture_output=True, text=True)
    assert lost.returncode == 1 and f"cannot read {web.url}/none/manifest.json" in lost.stderr
