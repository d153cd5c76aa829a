"""URLs: known protocols only, and no secret in what is printed."""

import fsspec
import pytest

import electra_ds
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.redaction import redacted, without_secrets_of
from electra_ds.common.urls import PROTOCOLS, file_system


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("protocol", sorted(set(fsspec.available_protocols()) - set(PROTOCOLS)))
def test_other_protocols_are_refused(protocol):
    if protocol in ("http", "https"):
        return
    with pytest.raises(UserError, match="this kind of URL is not opened"):
        file_system(f"{protocol}://host/x")


@pytest.mark.parametrize(
    "place", ["simplecache::http://a/x", "zip://x::file:///y", "reference::/x", "HTTP::x"]
)
def test_chains_are_refused(place):
    with pytest.raises(UserError, match="without '::'"):
        file_system(place)


@pytest.mark.parametrize(
    "place",
    ["http://", "https:///x", "http://two words/x", "http://host:99999/x", "http://host:-1/x"],
)
def test_an_http_url_without_a_host_is_refused_before_any_retry(place):
    with pytest.raises(UserError, match="no valid host and port"):
        file_system(place)


def test_local_folders_and_memory_are_opened(tmp_path):
    for place in (str(tmp_path), f"file://{tmp_path}", "memory://x", "MEMORY://x"):
        assert file_system(place)[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw@host:80/a?x=1", "https://***@host:80/a?x=1"),
        ("s3://KEY:SE/CRET@bucket/d", "s3://***@bucket/d"),
        ("https://h/a?X-Amz-Signature=abc&n=2", "https://h/a?X-Amz-Signature=***&n=2"),
        ("https://h/a?access_token=abc#token=d", "https://h/a?access_token=***"),
        ("pretrain --data https://u:p@h/x --out o", "pretrain --data https://***@h/x --out o"),
        ("http://u:12/34@h", "http://***@h"),
        ("http://u:p@s/w@host/x", "http://***@host/x"),
        ("https://h/package@1.0/x", "https://h/package@1.0/x"),
        ("no url, token=abc", "no url, token=abc"),
        ("https:/me:pw@h/x is no folder", "https:/***@h/x is no folder"),
        ("https://me:p w@h/x: refused", "https://***@h/x: refused"),
        ("s3://KEY:SE/CR ET@bucket/x", "s3://***@bucket/x"),
        ("https://me:p?w#s@h/x", "https://***@h/x"),
        ("https://h/x: refused; write to a@b", "https://h/x: refused; write to a@b"),
        ("https://h:80/x: refused; write to a@b", "https://h:80/x: refused; write to a@b"),
        ("https://h/a?token=a;b'c\" and more", "https://h/a?token=*** and more"),
        ("https://h/a?to%6ben=b&n=2", "https://h/a?to%6ben=***&n=2"),
        ("https://h/a?to%256ben=b", "https://h/a?to%256ben=***"),
        ("https://h/a b?token=c", "https://h/a b?token=***"),
    ],
)
def test_secrets_of_urls_are_replaced(text, expected):
    assert redacted(text) == expected
    assert redacted(expected) == expected


@pytest.mark.parametrize(
    "name",
    ["pass", "passphrase", "passwd", "pwd", "jwt", "code", "auth", "sig", "key", "credential"],
)
def test_secret_parameters_are_known_by_many_names(name):
    assert redacted(f"https://h/a?n=1&{name}=abc") == f"https://h/a?n=1&{name}=***"


def test_redaction_of_a_long_text_ends():
    text = ":/a:b" * 40_000 + "@h"
    assert redacted(text).endswith("***@h")


PLACES = ["https://user:hunter2@host/x", "https:/user:hunter2@host/x", "s3://b/x?token=hunter2"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", [UserError, RunFailure])
def test_an_error_has_no_secret_for_a_program_that_prints_it(place, kind):
    error = kind(f"{place}: not found")
    assert "hunter2" not in f"{error} {error!r} {error.args}" and "not found" in str(error)


@pytest.mark.parametrize("place", PLACES)
def test_the_python_interface_takes_no_url_as_a_local_path(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = [
        lambda: electra_ds.load(place),
        lambda: electra_ds.load(tmp_path, tokenizer=place),
        lambda: electra_ds.load_run(place),
        lambda: electra_ds.pretrain("tiny", "data", place),
        lambda: electra_ds.pretrain("tiny", "data", "out", init_from=place),
        lambda: electra_ds.pretrain("tiny", "data", "out", generator_from=place),
    ]
    for call in calls:
        with pytest.raises(UserError, match="is a URL; expected a local path") as caught:
            call()
        assert "hunter2" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["no file user:hunter2@host/x", "got 'user:hunter2'", "https://user:hunter2@host/x"]
)
def test_a_part_of_a_url_in_the_error_of_a_library_has_no_secret(text):
    assert "hunter2" not in without_secrets_of("hf://user:hunter2@host/x", text)


def test_a_user_name_without_a_password_is_no_secret_elsewhere():
    assert without_secrets_of("s3://a@b/x", "a bad answer") == "a bad answer"
