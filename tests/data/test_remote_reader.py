"""Rows behind a URL: equal to those on disk, fetched once, checked, retried."""

import io
import json
import subprocess
import tarfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from threading import Timer

import fsspec
import numpy as np
import pytest
from running import ROOT
from shard_data import SPECIAL, best_fit_rows, write_data
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
    """A data folder with a held-out split and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    write_data(
        folder,
        np.split(best_fit_rows(ROWS, 32), [400, 800, 1200, 1584]),
        valid=best_fit_rows(50, 32, seed=9),
    )
    return folder


@pytest.fixture
def web(folder, monkeypatch):
    """The folder behind a URL, with chunks of two blocks, a small cache and short pauses."""
    monkeypatch.setattr(remote_reader, "CHUNK_BYTES", 2 * 16 * 32 * 2)
    monkeypatch.setattr(remote_reader, "CACHED_CHUNKS", 2)
    monkeypatch.setattr(remote_reader, "RETRY_PAUSES", (0.01, 0.02))
    monkeypatch.setattr(loader, "READ_TOKENS", 12 * 32)  # one step at a time
    with served(folder) as web:
        yield web


def chunk_requests(web: Web) -> list[tuple[str, int]]:
    return [request for request in web.requests if request[0].startswith("/shards/train")]


def steps_of(data, steps, **options):
    """(rows [G / world], input_ids, masked_positions) of the first steps."""
    reader, row_order = data.training(7, 12)
    loader = Loader(reader, row_order, **RUN | options)
    step_batches = [next(loader) for _ in range(steps)]
    loader.close()
    return [
        (
            step.rows.tolist(),
            [batch.input_ids.tolist() for batch in step.micro_batches],
            [batch.masked_positions.tolist() for batch in step.micro_batches],
        )
        for step in step_batches
    ]


def flip_bit(content: bytes, index: int) -> bytes:
    changed = bytearray(content)
    changed[index] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("kind", ["http", "http with a slash", "file", "memory"])
def test_rows_equal_those_on_disk(folder, web, kind):
    if kind == "memory":
        memory = fsspec.filesystem("memory")
        memory.put(str(folder), "/somewhere/", recursive=True)
        is_inside = memory.exists(f"/somewhere/{folder.name}")
        url = f"memory://somewhere/{folder.name}" if is_inside else "memory://somewhere"
    else:
        url = {"http": web.url, "file": f"file://{folder}"}.get(kind, web.url + "/")
    disk, streamed = open_data(folder), open_data(url)
    assert streamed.manifest == disk.manifest
    held_out, expected = streamed.held_out()[""], disk.held_out()[""]
    assert np.array_equal(held_out.unigrams, expected.unigrams)
    files = sorted(path.name for path in streamed.tokenizer.iterdir())
    assert files == ["options.json", "vocab.txt"]
    rows = np.random.default_rng(0).integers(0, ROWS, 300)
    reader, _ = streamed.training(0, 12)
    for numbers in (rows, rows[:0]):
        assert np.array_equal(reader.read(numbers), disk.training(0, 12)[0].read(numbers))
    for (batch, _), (expected_batch, _) in zip(
        evaluation_batches(held_out.rows, RECIPE, batch_rows=8),
        evaluation_batches(expected.rows, RECIPE, batch_rows=8),
        strict=True,
    ):
        assert all(map(np.array_equal, batch, expected_batch))


def test_ranks_fetch_different_chunks_and_read_the_same_rows_as_one(web):
    for world in (1, 3):
        rows_of_ranks = []
        for rank in range(world):
            reader, row_order = open_data(web.url).training(7, 12)
            assert (row_order.lanes, len(reader.chunk_rows)) == (12, 52)
            web.requests.clear()
            own = np.arange(rank * 12 // world, (rank + 1) * 12 // world)
            steps_of_an_epoch = range(133)
            rows_of_ranks.append(
                [reader.read(row_order.rows(step * 12 + own)[0]) for step in steps_of_an_epoch]
            )
            requests = Counter(chunk_requests(web))
            # the chunks of its lanes, and those in which two lanes meet
            assert 52 / world - 2 <= len(requests) <= 52 / world + 2
            assert sum(requests.values()) <= 52 / world + 12 / world + 1
        if world == 1:
            expected = rows_of_ranks[0]
        assert np.array_equal(np.concatenate(rows_of_ranks, axis=1), expected)


def test_a_row_number_out_of_range_is_an_error_with_the_range(web):
    reader = open_data(web.url).reader("train")
    for row in (-1, reader.rows):
        with pytest.raises(IndexError, match=rf"expected 0\.\.{reader.rows - 1}"):
            reader.read(np.array([row]))


def test_a_resumed_run_does_not_fetch_the_chunks_of_consumed_rows(web):
    data = open_data(web.url)
    steps = steps_of(data, 104)
    web.requests.clear()
    assert steps_of(data, 2, consumed_rows=100 * 12) == steps[100:102]
    # one chunk for each lane, and the following one for a lane at the end of its chunk
    assert len(chunk_requests(web)) <= 12 + 6


def test_a_checkpoint_of_other_chunks_is_refused(web, monkeypatch):
    reader, row_order = open_data(web.url).training(7, 12)
    state = row_order.state() | {"dataset_id": reader.manifest.dataset_id, "position": 240}
    assert loader.consumed_rows_from_state(state, reader, row_order) == 240
    monkeypatch.setattr(remote_reader, "CHUNK_BYTES", 4 * 16 * 32 * 2)
    with pytest.raises(UserError, match="chunks: checkpoint 52, now 28"):
        loader.consumed_rows_from_state(state, *open_data(web.url).training(7, 12))


def test_a_source_of_a_mixture_may_be_a_url(folder, web, tmp_path):
    sources = [
        {"data": data, "name": name, "weight": 1}
        for name, data in (("here", str(folder)), ("there", web.url))
    ]
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(sources))
    steps = steps_of(open_data(path), 20)
    assert {row >= ROWS for rows, _, _ in steps for row in rows} == {True, False}
    ranks = [steps_of(open_data(path), 20, rank=rank, world_size=2) for rank in (0, 1)]
    ids_of_ranks = [first[1] + second[1] for first, second in zip(*ranks, strict=True)]
    assert ids_of_ranks == [ids for _, ids, _ in steps]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: flip_bit(content, 1000),  # in the rows of a block
        lambda content: b"x" + content[1:],  # in the first header
        lambda content: content[:-700],
        lambda content: 503,
        lambda content: 429,
    ],
    ids=["rows", "header", "short", "503", "429"],
)
def test_an_answer_that_fails_once_is_requested_again(folder, web, change):
    expected = steps_of(open_data(f"file://{folder}"), 3)
    data = open_data(web.url)
    failed = set()

    def fail_once(path, content):
        if path in failed:
            return content
        failed.add(path)
        return change(content)

    web.change = fail_once
    assert steps_of(data, 3) == expected
    assert failed


def test_a_server_that_restarts_is_waited_for(folder, web, monkeypatch):
    expected = steps_of(open_data(f"file://{folder}"), 3)
    data, port = open_data(web.url), web.server_port
    web.shutdown()
    web.server_close()
    monkeypatch.setattr(remote_reader, "RETRY_PAUSES", (0.1, 0.2, 0.5, 1, 2))
    with ExitStack() as later:
        Timer(0.3, lambda: later.enter_context(served(folder, port))).start()
        assert steps_of(data, 3) == expected


HEADER = (
    "block 4: its tar header differs from the expected one for train-000002-000004.ids.npy; copy"
)


@pytest.mark.parametrize(
    ("change", "error", "message", "is_retried"),
    [
        (
            lambda content: flip_bit(content, -700),
            UserError,
            "block 5: the crc32 of its rows differs from that in the index; copy",
            True,
        ),
        (lambda content: flip_bit(content, 0), UserError, HEADER, True),
        (lambda content: b"\0" * len(content), UserError, HEADER, True),
        (
            lambda content: content[:700],
            RunFailure,
            "requested bytes .*, received 700 bytes, 3 times",
            True,
        ),
        (
            lambda content: 500,
            RunFailure,
            "requested bytes .*, received ClientResponseError: 500",
            True,
        ),
        (lambda content: 403, UserError, "ClientResponseError: 403", False),
        (lambda content: 404, UserError, "FileNotFoundError: ", False),
    ],
    ids=["rows", "header", "zeros", "short", "500", "403", "404"],
)
def test_an_answer_that_always_fails_is_an_error(web, capsys, change, error, message, is_retried):
    reader, _ = open_data(web.url).training(7, 12)
    name = f"{web.url}/shards/train-000002.tar"
    row = 800 + 5 * 16  # shard 2, block 5, the second of its chunk
    web.change = lambda path, content: change(content)
    web.requests.clear()
    with pytest.raises(error, match=f"^{name}: {message}"):
        reader.read(np.array([row]))
    warnings = capsys.readouterr().err.count(f"{name}: no complete answer yet")
    assert warnings == is_retried
    # aiohttp repeats a request after its connection was closed
    requests = len(remote_reader.RETRY_PAUSES) + 1 if is_retried else 1
    assert requests <= len(web.requests) <= 2 * requests


def test_a_server_without_byte_ranges_is_refused(web):
    reader, _ = open_data(web.url).training(7, 12)
    web.supports_ranges = False
    message = "requested .*, received .* bytes; expected a server that supports Range"
    with pytest.raises(UserError, match=f"^{web.url}/shards/train-000002.tar: {message}"):
        reader.read(np.array([880]))


def test_a_server_that_does_not_answer_is_an_error(web):
    reader, _ = open_data(web.url).training(7, 12)
    web.shutdown()
    web.server_close()
    message = "requested bytes .*, received ClientConnectorError: .*resumes"
    with pytest.raises(RunFailure, match=f"^{web.url}/shards/train-000002.tar: {message}"):
        reader.read(np.array([880]))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("WEB/none", "WEB/none/manifest.json: FileNotFoundError"),
        ("s4://bucket/D", "s4://bucket/D: this kind of URL is not opened"),
        ("pipe:curl http://host/D", "pipe:curl http://host/D: commands are not run"),
        ("memory://nowhere", "memory://nowhere/manifest.json: FileNotFoundError"),
    ],
)
def test_a_url_without_a_data_folder_is_refused(web, url, message):
    with pytest.raises(UserError, match=message.replace("WEB", web.url)):
        open_data(url.replace("WEB", web.url))


def test_a_damaged_small_file_is_an_error(web):
    web.change = lambda path, content: b"<html>sign in" if path == "/manifest.json" else content
    with pytest.raises(UserError, match=f"{web.url}/manifest.json: not valid JSON"):
        open_data(web.url)
    web.change = lambda path, content: content[:-1] if path == "/index-train.bin" else content
    with pytest.raises(UserError, match=f"{web.url}/index-train.bin: its sha256 differs"):
        open_data(web.url)


def test_copies_that_cannot_be_written_are_an_error_with_their_path(web, tmp_path):
    (tmp_path / "tokenizer").touch()  # a file instead of a folder: an OSError, as of a full disk
    with pytest.raises(
        RunFailure, match=f"^{tmp_path}/tokenizer/vocab.txt: .*; free disk space, or set TMPDIR"
    ):
        remote_reader.RemoteFolder(web.url).copy(
            {"tokenizer/vocab.txt": remote_reader.SmallFile()}, tmp_path
        )


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
    for offset, replacement, message in (
        (
            0,
            link.tobuf(tarfile.USTAR_FORMAT),
            "block 0: its tar header differs from the expected one for",
        ),
        (TAR_BLOCK, pickled.getvalue(), "block 0: the npy header of"),
    ):
        end = offset + len(replacement)
        web.change = lambda path, content, start=offset, end=end, new=replacement: (
            content[:start] + new + content[end:]
        )
        with pytest.raises(UserError, match=message):
            reader.read(np.array([0]))


def test_the_health_check_of_a_node_reads_the_url(web):
    command = ["bash", str(ROOT / "launch" / "health.sh")]
    found = subprocess.run([*command, web.url], capture_output=True, text=True)
    assert found.returncode == 0 and ("/manifest.json", 0) in web.requests, found.stderr
    lost = subprocess.run([*command, web.url + "/none"], capture_output=True, text=True)
    assert lost.returncode == 1 and f"cannot read {web.url}/none/manifest.json" in lost.stderr
