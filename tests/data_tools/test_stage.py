"""stage: copies of data folders are complete or absent, and one process at a time writes one."""

import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import fsspec
import pytest
from machines import wait_until
from running import CPU, read_json, run_cli
from small_corpus import contents
from small_corpus import prepare_corpus as run

from data_tools.stage import stage
from data_tools.verify import verify
from electra_ds.common.errors import RunFailure, UserError


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of several shards."""
    folder = tmp_path_factory.mktemp("made") / "data"
    manifest = run(corpus, folder)
    assert len(manifest.splits["train"].shards) > 4
    (folder / "prepare.json").unlink()  # not part of a copy
    return folder


class Web(ThreadingHTTPServer):
    """A folder served over http.

    requests: how often each path was requested
    gate:     while it is not set, one shard is held back
    """

    def __init__(self, folder: Path) -> None:
        self.requests: Counter[str] = Counter()
        self.gate = Event()
        self.gate.set()
        web = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                web.requests[self.path] += 1
                if "train-000001" in self.path:
                    web.gate.wait(120)
                super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except ConnectionError:  # the client was killed
                    self.close_connection = True

        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def web(made: Path) -> Iterator[Web]:
    pytest.importorskip("aiohttp", reason="needs the extra [remote]")
    server = Web(made)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.gate.set()
    server.shutdown()
    server.server_close()


def shard_requests(web: Web) -> dict[str, int]:
    return {path: count for path, count in web.requests.items() if path.startswith("/shards")}


def start(web: Web, to: Path) -> subprocess.Popen:
    """Start the verb stage in another process."""
    command = [sys.executable, "-m", "electra_ds", "stage", web.url]
    command += ["--to", str(to), "--workers", "2"]
    return subprocess.Popen(
        command, env=os.environ | CPU, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_copies_between_folders_and_urls_are_equal_and_complete_ones_are_not_repeated(
    made: Path, web: Web, tmp_path: Path
) -> None:
    memory = fsspec.filesystem("memory")
    locations = [web.url, str(tmp_path / "a"), "memory://bucket/b", f"file://{tmp_path}/c"]
    size = sum(map(len, contents(made).values())) - (made / "manifest.json").stat().st_size
    for source, to in itertools.pairwise(locations):
        assert stage(source, to) == size
        assert stage(source, to) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "c") == contents(made)
    assert verify(tmp_path / "c") == []
    assert set(shard_requests(web).values()) == {1}
    memory.rm("/bucket", recursive=True)


def test_one_of_several_processes_copies_and_if_it_is_killed_another_continues(
    web: Web, made: Path, tmp_path: Path
) -> None:
    web.gate.clear()
    first = start(web, tmp_path / "to")
    wait_until(lambda: web.requests["/shards/train-000001.tar"], "the shard is not requested")
    wait_until(
        lambda: (tmp_path / "to/shards/train-000002.tar").exists(),
        "the other thread does not continue",
    )
    others = [start(web, tmp_path / "to") for _ in range(2)]
    wait_until(lambda: web.requests["/manifest.json"] == 3, "the others do not start")
    beats = read_json(tmp_path / "to/heartbeat.json")["beats"]
    wait_until(
        lambda: read_json(tmp_path / "to/heartbeat.json")["beats"] > beats + 1,
        "the first has no heartbeat",
    )
    assert [other.poll() for other in others] == [None, None]
    (tmp_path / "to/shards/.train-000001.tar.00.tmp").write_text("cut short by the kill")
    damaged = tmp_path / "to/shards/train-000000.tar"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    first.kill()
    first.wait()
    assert not (tmp_path / "to/manifest.json").exists()
    web.gate.set()
    outputs = [other.communicate(timeout=60)[0] for other in others]
    assert [other.returncode for other in others] == [0, 0], outputs
    assert sum("bytes copied" in output for output in outputs) == 1
    assert sum("was complete" in output for output in outputs) == 1
    assert contents(tmp_path / "to") == contents(made)
    damaged_or_cut = {"/shards/train-000000.tar", "/shards/train-000001.tar"}
    assert {path for path, n in shard_requests(web).items() if n > 1} == damaged_or_cut


def test_damage_at_the_source_is_named_and_not_copied(made: Path, web: Web, tmp_path: Path) -> None:
    source, to = tmp_path / "source", tmp_path / "to"
    stage(str(made), str(source))
    shard = source / "shards/train-000003.tar"
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content, found in (
        (flipped, "its sha256 differs from that in the manifest"),
        (whole[:-512], "sha256"),
        (None, "missing"),
    ):
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(
            UserError, match=rf"source/shards/train-000003.tar: damaged \(.*{found}"
        ):
            stage(str(source), str(to))
        assert not (to / "manifest.json").exists() and not (to / "shards/train-000003.tar").exists()
    shard.write_bytes(whole)
    stage(str(source), str(to))
    assert contents(to) == contents(made)


def test_errors_are_one_line_with_the_location(made: Path, web: Web, tmp_path: Path) -> None:
    run_to = str(tmp_path / "to")
    for source, to, message in (
        (
            str(tmp_path),
            run_to,
            f"{tmp_path}/manifest.json: not found; expected a data folder's manifest",
        ),
        (str(made / "manifest.json"), run_to, f"{made}/manifest.json/manifest.json: not found"),
        (web.url + "/none", run_to, f"{web.url}/none/manifest.json: not found"),
        ("s4://x/y", run_to, "s4://x/y: .*expected a path or one of"),
        (str(made), web.url + "/new", f"{web.url}/new/"),
    ):
        with pytest.raises((UserError, RunFailure), match=f"^{message}"):
            stage(source, to)
    stage(str(made), run_to)
    (tmp_path / "to/manifest.json").write_text("{}")
    with pytest.raises(UserError, match=f"^{run_to}: holds other data than {made}"):
        stage(str(made), run_to)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "prepare.json").write_text("{}")
    with pytest.raises(UserError, match=f"^{unfinished}: holds an unfinished `prepare`"):
        stage(str(made), str(unfinished))


def test_missing_disk_space_is_reported_before_copying(made: Path, tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a separate file system needs root and the right to mount")
    try:
        done = run_cli("stage", made, "--to", tmp_path / "to", check=False)
        left = list((tmp_path / "to").rglob("*.tar"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    needed = sum(path.stat().st_size for path in made.glob("shards/*"))
    assert (
        done.returncode == 1
        and f"{needed:,} bytes of shards are missing here and " in done.stderr
        and left == []
    )


def test_prepare_writes_to_a_url_through_a_work_folder(corpus: Path, tmp_path: Path) -> None:
    to, work = f"file://{tmp_path}/bucket/data", ("--work", tmp_path / "work")
    options = (
        "--input",
        corpus / "in",
        "--tokenizer",
        corpus / "tok",
        "--valid-fraction",
        0.1,
        "--out",
        to,
    )
    refused = run_cli("prepare", *options, check=False)
    assert (
        refused.returncode == 2
        and f"--out {to}, --work None: expected --work DIR" in refused.stderr
    )
    run_cli("prepare", *options, *work)
    (tmp_path / "bucket/data/manifest.json").unlink()  # as if killed before its last write
    run_cli("prepare", *options, *work)
    assert verify(tmp_path / "bucket/data") == []
    assert contents(tmp_path / "bucket/data") | contents(tmp_path / "work") == contents(
        tmp_path / "work"
    )
