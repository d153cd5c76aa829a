"""stage: copies of data folders are complete or absent, and one process at a time writes one."""

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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

from data_tools import stage as stage_module
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
    (tmp_path / "to/shards/.train-000001.tar.0123456789ab.tmp").write_text("cut short by the kill")
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
        (str(made / "manifest.json"), run_to, f"{made}/manifest.json: is a file; expected a data"),
        (web.url + "/none", run_to, f"{web.url}/none/manifest.json: not found"),
        ("s4://x/y", run_to, "s4://x/y: this kind of URL is not opened"),
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


def small_copy(made: Path, folder: Path) -> Path:
    """A copy of the data folder that a test may damage."""
    return Path(shutil.copytree(made, folder))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer/vocab.txt", b"garbage"),
        ("tokenizer/options.json", b'{"lowercase": false}'),
        ("unigrams.npy", b""),
        ("index-train.bin", b"EDSIDX1\0"),
    ],
)
def test_small_files_are_compared_with_the_source_at_every_start(
    made: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    to = tmp_path / "to"
    (to / name).parent.mkdir(parents=True, exist_ok=True)
    (to / name).write_bytes(content)  # before the first copy
    stage(str(made), str(to))
    assert contents(to) == contents(made)
    whole = (to / name).read_bytes()
    (to / name).write_bytes(whole[:-1] + b"!")  # in a complete copy
    assert stage(str(made), str(to)) == len(whole)
    assert contents(to) == contents(made)
    source = small_copy(made, tmp_path / "source")
    (source / name).write_bytes(content)
    with pytest.raises(UserError, match="source/"):
        stage(str(source), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "name",
    ["config.json", "ckpt/final/meta.json", "metrics.jsonl", "shards/x.tar", "tokenizer/spm.model"],
)
def test_other_files_in_the_target_are_never_mixed_with_a_copy(
    made: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "to" / name).parent.mkdir(parents=True)
    (tmp_path / "to" / name).write_text("mine")
    with pytest.raises(UserError, match=r"to: holds '.*', which is no file of this data folder"):
        stage(str(made), str(tmp_path / "to"))
    assert contents(tmp_path / "to") == {name: b"mine"}


@pytest.mark.parametrize("name", ["../../victim", "/VICTIM", "shards/../../victim", "~/victim"])
def test_names_that_leave_the_folder_are_refused(made: Path, tmp_path: Path, name: str) -> None:
    source = small_copy(made, tmp_path / "a/source")
    manifest = read_json(source / "manifest.json")
    shards = manifest["splits"]["valid"]["shards"]
    name = name.replace("/VICTIM", f"{tmp_path}/victim")
    shards.append(shards[0] | {"file": name})
    (source / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json: .*\.file"):
        stage(str(source), str(tmp_path / "a/to"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_links_in_the_target_are_not_followed(made: Path, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "to/shards").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of"):
        stage(str(made), str(tmp_path / "to"))
    assert not list((tmp_path / "elsewhere").iterdir())
    stage(str(made), str(tmp_path / "whole"))
    shard = tmp_path / "whole/shards/train-000000.tar"
    shard.unlink()
    shard.symlink_to(made / "shards/train-000000.tar")
    stage(str(made), str(tmp_path / "whole"))
    assert not shard.is_symlink() and contents(tmp_path / "whole") == contents(made)


def test_a_target_that_is_a_file_or_has_no_room_is_one_message(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for to in ("file", "file/to", "x" * 300):
        with pytest.raises((UserError, RunFailure), match=f"{tmp_path}/{to}"):
            stage(str(made), str(tmp_path / to))


@contextmanager
def answering(head: bytes, body: Iterator[bytes]) -> Iterator[str]:
    """A server that answers every request with one head, and a body that may never end."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.recv(1 << 16)
                connection.sendall(head)
                for part in body:
                    connection.sendall(part)

    Thread(target=answer, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}/D"
    server.close()


PEAK = """
import resource, sys
from data_tools import stage as stage_module
from data_tools.stage import stage
from electra_ds.data import dataset, remote_reader
remote_reader.RETRY_PAUSES = (0.01,)
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
for use in (lambda: stage(sys.argv[1], sys.argv[2]), lambda: dataset.open_data(sys.argv[1])):
    try:
        use()
    except (UserError, RunFailure) as error:
        print(error)
# ru_maxrss is at least that of the parent.
status = dict(line.split(":") for line in open("/proc/self/status"))
print("peak", int(status["VmHWM"].split()[0]) >> 10)
""".replace("import resource", "from electra_ds.common.errors import *\nimport resource")


@pytest.mark.parametrize("kind", ["endless", "gzip"])
def test_an_endless_or_compressed_manifest_is_not_held_in_memory(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("aiohttp", reason="needs the extra [remote]")
    head, body = b"HTTP/1.1 200 OK\r\n", itertools.repeat(b" " * (1 << 20))
    if kind == "gzip":
        head += b"Content-Encoding: gzip\r\n"
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        chunk = bytes(1 << 24)
        body = iter([b"".join(packer.compress(chunk) for _ in range(256)) + packer.flush()])
    with answering(head + b"\r\n", body) as url:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, url, tmp_path / "to"],
            env=os.environ | CPU,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    first, *_, peak = done.stdout.splitlines()
    assert "/manifest.json: " in first and int(peak.split()[1]) < 1500, done.stdout


def test_the_secrets_of_a_url_are_in_no_message(tmp_path: Path) -> None:
    for url in ("http://me:secret@127.0.0.1:9/D", "http://127.0.0.1:9/D?token=secret"):
        with pytest.raises((UserError, RunFailure)) as caught:
            stage(url, str(tmp_path / "to"))
        assert "secret" not in str(caught.value) and "127.0.0.1" in str(caught.value)


@pytest.mark.parametrize("is_missing", [False, True])
def test_an_unreadable_hub_folder_names_the_supported_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_missing: bool
) -> None:
    class Hub:
        """The file system of a hub that does not answer, or that has no such file."""

        def cat_file(self, *_: object, **__: object) -> bytes:
            raise FileNotFoundError if is_missing else OSError("Name or service not known")

    monkeypatch.setattr(stage_module, "file_system", lambda url: (Hub(), "datasets/o/n"))
    with pytest.raises((UserError, RunFailure)) as caught:
        stage("hf://datasets/o/n", str(tmp_path / "to"))
    message = str(caught.value)
    cause = "not found" if is_missing else "Name or service not known; check the URL, the network"
    assert message.startswith(f"hf://datasets/o/n/manifest.json: {cause}")
    for part in ("HF_TOKEN", "s3://BUCKET/FOLDER", "hf://datasets/OWNER/NAME/FOLDER", "--input"):
        assert part in message


def test_a_missing_package_is_named_for_its_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("no such package")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    for protocol, package in (("gs", "gcsfs"), ("hf", "electra_ds[hf]"), ("s3", "[remote]")):
        with pytest.raises(UserError, match=rf"pip install .*{re.escape(package)}"):
            stage(f"{protocol}://a/b", "to")


def test_temporary_files_behind_a_link_are_kept(made, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / ".x.0123456789ab.tmp").write_text("of another program")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / ".cache").symlink_to(other)
    stage(str(made), str(tmp_path / "to"))
    assert len(list(other.iterdir())) == 1
