"""Manifests, indexes and token counts with impossible values are refused in one message."""

import copy
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_data import best_fit_rows, write_data

from data_tools.inspect_rows import describe_rows
from data_tools.stats import stats
from data_tools.verify import verify
from electra_ds.common.errors import UserError
from electra_ds.data.dataset import open_data
from electra_ds.data.shard_format import (
    INDEX_DTYPE,
    index_file,
    read_manifest,
    read_unigrams,
    shard_file,
    write_index,
    write_manifest,
)
from electra_ds.data.shard_reader import ShardReader


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged data folder."""
    folder = tmp_path_factory.mktemp("whole")
    return write_data(folder, [best_fit_rows(40, 32), best_fit_rows(20, 32, 1)])


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return shutil.copytree(whole, tmp_path / "D")


def read_everything(data: Path) -> None:
    """Use a data folder by every reader of this room; UserError when it is damaged."""
    dataset = open_data(data)
    dataset.training(0, 4)[0].read(np.arange(3))
    read_unigrams(data, dataset.manifest.tokenizer.vocab_size)
    stats(data)
    list(describe_rows(data, "train", range(3), source=True))
    problems = verify(data)
    if problems:
        raise UserError("; ".join(problems))


def values_of(part: Any, keys: tuple = ()) -> list[tuple]:
    """The keys of all values of nested objects and arrays."""
    found = [keys] if keys else []
    pairs = part.items() if isinstance(part, dict) else enumerate(part)
    for key, value in pairs:
        inside = (*keys, key)
        found += values_of(value, inside) if isinstance(value, dict | list) else [inside]
    return found


STRANGE: list[Any] = [
    None, True, -1, 0, 1.5, 64.0, 10**15, 10**400, -(2**63), "", "x", "../x", "\u001b[2J", [], {},
    [[[]]], {"a": 1}, [None] * 3,
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(draw=st.data())
def test_no_value_of_a_manifest_ends_in_another_error(draw, whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    changed = copy.deepcopy(manifest)
    *keys, last = draw.draw(st.sampled_from(values_of(manifest)))
    part = changed
    for key in keys:
        part = part[key]
    value = draw.draw(st.sampled_from([*STRANGE, "(missing)"]))
    if value == "(missing)":
        del part[last]
    else:
        part[last] = value
    damaged = whole.with_name(whole.name + "-damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(whole, damaged)
    (damaged / "manifest.json").write_text(json.dumps(changed))
    try:
        read_everything(damaged)
    except UserError as error:
        message = str(error)
        assert len(message) < 4000 and "\x1b" not in message


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda m: m.update(sequence_length=-64), "sequence_length = -64"),
        (lambda m: m["tokenizer"].update(vocab_size=10**15), "tokenizer.vocab_size"),
        (lambda m: m["tokenizer"]["special_ids"].update(pad=599, mask=600), "special_ids"),
        (lambda m: m["splits"].pop("train"), "expected train"),
        (lambda m: m["splits"].update({"../x": m["splits"]["train"]}), "expected train"),
        (lambda m: m["splits"]["train"]["shards"].clear(), "shards"),
        (lambda m: m["splits"]["train"]["shards"][0].update(file="../a.tar"), "shards.0.file"),
        (lambda m: m["splits"]["train"]["shards"][0].update(file="/etc/passwd"), "shards.0.file"),
        (lambda m: m["splits"]["train"]["shards"].reverse(), "shards.0.file"),
        (lambda m: m["splits"]["train"].update(rows=61), "rows = 61"),
        (lambda m: m["splits"]["train"].update(tokens=0), "tokens = 0"),
        (lambda m: m["source"].update(units=[[[1, 0, 5]]]), "units.0"),
        (lambda m: m.update(block_rows=0), "block_rows = 0"),
        (lambda m: m.update(unigrams_sha256="../x"), "unigrams_sha256"),
    ],
)
def test_the_message_names_the_key(data: Path, change: Callable[[dict], Any], key: str) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    change(manifest)
    (data / "manifest.json").write_text(json.dumps(manifest))
    for use in (read_manifest, open_data, verify, stats):
        with pytest.raises(UserError, match=r"manifest\.json: ") as caught:
            use(data)
        assert key in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{" * 100_000, '{"version": NaN}', '{"a": 1, "a": 2}', "\ufeff{}"],
)
def test_a_manifest_that_is_no_object_is_refused(data: Path, content: str) -> None:
    (data / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json: .*expected"):
        open_data(data)


def test_the_manifest_and_another_file_are_no_data_folder(data: Path) -> None:
    with pytest.raises(UserError, match=f"expected the folder itself: {data}$"):
        open_data(data / "manifest.json")
    with pytest.raises(UserError, match=r"unigrams\.npy.*it is a file; expected a data"):
        open_data(data / "unigrams.npy")


def test_a_file_name_that_is_not_utf8_in_an_earlier_manifest_is_read(data: Path) -> None:
    text = (data / "manifest.json").read_text().replace("text.txt", "caf\\udce9.txt")
    (data / "manifest.json").write_text(text)
    assert read_manifest(data).source.files == ("caf\\xe9.txt",)
    assert any("caf\\xe9.txt" in line for line in describe_rows(data, "train", [0], source=True))


# ------------------------------------------------------------------------------------------- index


def crafted_index(data: Path, change: Callable[[np.ndarray], Any]) -> None:
    """Change the index and the sha256 of it in the manifest."""
    manifest = read_manifest(data)
    blocks = ShardReader(data, "train").blocks.copy()
    change(blocks)
    split = manifest.splits["train"]
    sha256 = write_index(data / index_file("train"), blocks)
    split = split.model_copy(update={"index_sha256": sha256})
    write_manifest(data, manifest.model_copy(update={"splits": {"train": split}}))


@pytest.mark.parametrize("field", INDEX_DTYPE.names[:4])
@pytest.mark.parametrize("value", [0, 1, 7, 2**31, 2**32 - 1])
def test_an_index_that_contradicts_the_manifest_is_refused(data, field, value):
    def change(blocks):
        assert blocks[field][1] != value
        blocks[field][1] = value

    crafted_index(data, change) if (field, value) != ("shard", 0) else crafted_index(
        data, lambda blocks: blocks["shard"].fill(0)
    )
    with pytest.raises(UserError, match="give different rows"):
        ShardReader(data, "train")
    assert any("give different rows" in problem for problem in verify(data))


@pytest.mark.parametrize("size", [0, 5, 15, 16, 40, 10**6])
def test_an_index_of_another_size_is_refused(data: Path, size: int) -> None:
    content = (data / index_file("train")).read_bytes()
    (data / index_file("train")).write_bytes(content[:size].ljust(size, b"\0"))
    for use in (stats, lambda folder: list(describe_rows(folder, "train", [0]))):
        with pytest.raises(UserError, match=r"index-train\.bin: "):
            use(data)
    assert any("index-train.bin: " in problem for problem in verify(data))


def test_a_shard_that_is_truncated_while_it_is_read_is_an_error_and_not_the_end(data: Path):
    script = (
        "import sys, os, numpy\n"
        "from electra_ds.data.shard_reader import ShardReader\n"
        "from electra_ds.common.errors import UserError\n"
        "reader = ShardReader(sys.argv[1], 'train')\n"
        "reader.read(numpy.arange(3))\n"
        "os.truncate(sys.argv[2], 100)\n"
        "for _ in range(2):\n"
        "    try: reader.read(numpy.arange(40))\n"
        "    except UserError as error: print(error)\n"
    )
    shard = data / shard_file("train", 0)
    done = subprocess.run(
        [sys.executable, "-c", script, data, shard], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("it was truncated after it was opened") == 2


# ---------------------------------------------------------------------------------------- unigrams


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def lying_header() -> bytes:
    """An array of eight numbers with a header that says 10^15."""
    return npy(np.ones(8, np.int64)).replace(b"(8,), }", b"(1000000000000000,), }")[:192]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"version https://git-lfs.github.com/spec/v1\n",
        npy(np.ones(600, np.int64))[:-8],
        npy(np.ones(600, np.int64)) + b"x",
        npy(np.ones(601, np.int64)),
        npy(np.ones(600, np.float64)),
        npy(np.ones((2, 300), np.int64)),
        npy(-np.ones(600, np.int64)),
        npy(np.zeros(600, np.int64)),
        npy(np.array([print] * 600, object)),
        lying_header(),
        b"\x93NUMPY\x01\x00" + (9999).to_bytes(2, "little") + b"(" * 9999,
    ],
)
def test_token_counts_of_another_kind_are_refused(data: Path, content: bytes) -> None:
    (data / "unigrams.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"unigrams\.npy: ") as caught:
        read_unigrams(data, 600)
    assert "\n" not in str(caught.value)
    assert any("unigrams.npy" in problem for problem in verify(data))


# --------------------------------------------------------------------------------------- tokenizer


def other_vocabulary(folder: Path) -> None:
    path = folder / "vocab.txt"
    words = path.read_text().split("\n")[:-1]
    path.write_text("\n".join(words[:5] + words[:4:-1]) + "\n")


@pytest.mark.parametrize(
    "change",
    [
        shutil.rmtree,
        other_vocabulary,
        lambda folder: (folder / "vocab.txt").unlink(),
        lambda folder: (folder / "vocab.txt").write_text("x\n"),
        lambda folder: (folder / "options.json").write_text('{"lowercase": false}'),
    ],
)
def test_another_tokenizer_than_that_of_the_rows_is_refused(data: Path, change) -> None:
    change(data / "tokenizer")
    for use in (open_data, stats, lambda folder: list(describe_rows(folder, "train", [0]))):
        with pytest.raises(UserError, match="tokenizer"):
            use(data)
    assert any("tokenizer" in problem for problem in verify(data))


def test_the_memory_of_an_index_is_limited(whole, tmp_path):
    """A reader asks for the memory of the index that the manifest describes."""
    folder = shutil.copytree(whole, tmp_path / "data")
    content = json.loads((folder / "manifest.json").read_text())
    content["block_rows"] = 1
    split = content["splits"]["train"]
    split["shards"] = split["shards"][:1]
    split["rows"] = split["shards"][0]["rows"] = 1 << 40
    split["shards"][0]["bytes"] = 1 << 52
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"blocks of 1 rows; expected at most 8,388,608"):
        read_manifest(folder)
