"""Mixtures and URLs from others: known protocols, bounded work, no secrets; modes of copies."""

import json
import os
import stat
import time
from pathlib import Path

import pytest
from shard_data import best_fit_rows, write_data

from data_tools.inputs.plan import make_plan
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.files import apply_umask, write_bytes
from electra_ds.data.data_tokenizer import copy_tokenizer
from electra_ds.data.dataset import open_data
from electra_ds.data.mixture import MixtureConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data folder."""
    return write_data(tmp_path_factory.mktemp("data"), [best_fit_rows(40, 32)])


def mixture(path: Path, *sources: object) -> Path:
    entries = [
        {"data": str(source), "weight": 1, "name": f"s{i}"} for i, source in enumerate(sources)
    ]
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize(
    "url",
    [
        "reference::file:///ref.json",
        "simplecache::http://127.0.0.1:9/x",
        "zip://x::file:///a.zip",
        "ssh://host/x",
        "ftp://host/x",
        "github://a:b@/x",
        "async_wrapper://x",
        "arrow_hdfs://x",
        "data:text/plain,x",
        "filecache://x",
        "LOCAL://x",
    ],
)
def test_other_protocols_are_refused_wherever_data_is_named(tmp_path: Path, url: str) -> None:
    for use in (
        lambda: open_data(url),
        lambda: open_data(mixture(tmp_path / "mix.json", url)),
        lambda: make_plan([url]),
    ):
        with pytest.raises(UserError, match=r"this kind of URL is not opened.*protocols"):
            use()


def test_mixtures_that_double_are_refused_at_once(data: Path, tmp_path: Path) -> None:
    mixture(tmp_path / "0.json", data)
    for level in range(1, 25):
        mixture(tmp_path / f"{level}.json", *[f"{level - 1}.json"] * 2)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"16\.json: mixtures are nested more than 8 deep"):
        open_data(tmp_path / "24.json")
    assert time.monotonic() - start < 5
    assert open_data(tmp_path / "2.json").manifest.splits["train"].rows == 4 * 40


def test_mixtures_with_many_sources_are_refused(data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("electra_ds.data.mixture.MOST_SOURCES", 10)
    mixture(tmp_path / "0.json", *[data] * 4)
    mixture(tmp_path / "1.json", *["0.json"] * 4)
    with pytest.raises(UserError, match=r"1\.json: more than 10 sources"):
        open_data(tmp_path / "1.json")


def test_the_name_of_a_source_has_no_secret_and_no_control_characters() -> None:
    url = "https://me:pw@host/D?token=secret#key=secret"
    config = MixtureConfig.model_validate({"sources": [{"data": url, "weight": 1}]})
    assert config.names == ["D"]
    with pytest.raises(ValueError, match="control characters"):
        MixtureConfig.model_validate({"sources": [{"data": "a\x1b[2J", "weight": 1}]})


def test_the_secrets_of_a_url_are_in_no_message(monkeypatch, capsys) -> None:
    monkeypatch.setattr("electra_ds.data.remote_reader.RETRY_PAUSES", (0.01,))
    for url in ("http://me:secret@127.0.0.1:9/D", "http://127.0.0.1:9/D?sig=secret"):
        for use in (open_data, lambda given: make_plan([given])):
            with pytest.raises((UserError, RunFailure)) as caught:
                use(url)
            printed = capsys.readouterr()
            assert "secret" not in str(caught.value) + printed.err + printed.out


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_of_the_umask(data: Path, tmp_path: Path, umask, mode) -> None:
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "a", b"x")
        (tmp_path / "b").touch(0o600)
        apply_umask(tmp_path / "b")
        source = open_data(data)
        for path in (data / "tokenizer").iterdir():
            path.chmod(0o444)
        copy_tokenizer(source.manifest.tokenizer, source.tokenizer, tmp_path / "T")
    finally:
        os.umask(before)
    paths = [tmp_path / "a", tmp_path / "b", *(tmp_path / "T").iterdir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {mode}


def test_only_the_files_of_the_manifest_are_copied(data: Path, tmp_path: Path) -> None:
    source = open_data(data)
    (data / "tokenizer" / "link").symlink_to("/etc/passwd")
    copy_tokenizer(source.manifest.tokenizer, source.tokenizer, tmp_path / "T")
    assert {path.name for path in (tmp_path / "T").iterdir()} == {"vocab.txt", "options.json"}
    os.chmod(tmp_path / "T", 0o555)  # as earlier versions left it
    (tmp_path / "T" / "vocab.txt").unlink()
    copy_tokenizer(source.manifest.tokenizer, source.tokenizer, tmp_path / "T")
    assert os.access(tmp_path / "T" / "vocab.txt", os.R_OK)


def test_weights_whose_sum_overflows_keep_their_shares() -> None:
    sources = [{"data": "a", "weight": 1.5e308}, {"data": "b", "weight": 0.5e308}]
    weights = MixtureConfig.model_validate_json(json.dumps({"sources": sources})).weights([1, 1])
    assert weights.tolist() == [0.75, 0.25]
