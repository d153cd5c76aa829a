"""Mistakes in --init-from are found before the engine is built; the ranks are in test_ranks_train."""

import json

import pytest
import run_folders
from safetensors.torch import save_file

from electra_ds.common.errors import UserError
from electra_ds.training import init_from
from electra_ds.training.init_from import find_source


@pytest.fixture
def source(tmp_path):
    """A run folder with a checkpoint and its vocabulary."""
    run_folders.pretrained(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def find(tmp_path, monkeypatch):
    """`find_source` in one process without a group."""
    monkeypatch.setattr(init_from, "on_rank0", lambda function: function())

    def found(path, config, tokenizer="no-tokenizer"):
        return find_source(
            path, config, tmp_path / tokenizer, lambda value: [value], needs_generator=True
        )

    return found


def test_a_run_its_checkpoints_and_one_checkpoint_are_found(source, find):
    for path in (source, source / "ckpt", source / "ckpt" / "final"):
        assert find(path, run_folders.config()) == source / "ckpt" / "final"


def test_each_kind_of_path_is_named(source, find, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    for name, message in {
        "nowhere": "it does not exist",
        "file": "it is a file",
        "data": "it is a folder of prepared data",
        "x" * 300: "File name too long",
    }.items():
        with pytest.raises(UserError, match=f"--init-from .*{message}"):
            find(tmp_path / name, run_folders.config())


def test_a_fine_tuned_model_is_refused(source, find):
    file = source / "ckpt" / "final" / "meta.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"config": meta["config"] | {"task": {}}}))
    with pytest.raises(UserError, match=r"--init-from .*expected a pretraining run"):
        find(source, run_folders.config())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (run_folders.config(architecture="modernbert"), "architecture = electra, but modernbert"),
        (run_folders.config(kind="mlm"), r"has no mlm_head.*, but"),
        (run_folders.config(sharing="untied"), "has no .*, but this run's model has them"),
    ],
)
def test_weights_of_another_model_are_refused(source, find, other, message):
    with pytest.raises(UserError, match=f"--init-from .*{message}"):
        find(source, other)


def test_another_shape_is_refused(source, find):
    config = run_folders.config()
    model = config.model.model_copy(update={"ffn_size": 96})
    with pytest.raises(UserError, match=r"has shape \(80.*\), this run's model has \(96"):
        find(source, config.model_copy(update={"model": model}))


def test_a_damaged_file_is_named(source, find):
    (weights,) = (source / "ckpt" / "final").glob("model-*")
    size = weights.stat().st_size
    weights.write_bytes(b"x" * size)
    with pytest.raises(UserError, match="not a safetensors file"):
        find(source, run_folders.config())
    save_file({}, weights)
    with pytest.raises(UserError, match=f"expected {size} bytes"):
        find(source, run_folders.config())


def test_another_vocabulary_of_the_same_size_is_refused(source, find, tmp_path):
    for name in ("same", "other"):
        run_folders.vocabulary(tmp_path / name)
    assert find(source, run_folders.config(), "same")
    words = tmp_path / "other" / "vocab.txt"
    words.write_text(words.read_text().replace("\nab\n", "\nother\n"))
    with pytest.raises(UserError, match=r"its vocabulary .* is not that of the data"):
        find(source, run_folders.config(), "other")
