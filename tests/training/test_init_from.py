"""Mistakes in --init-from are found before the engine is built; the ranks are in test_ranks_train."""

import itertools
import json

import pytest
import run_folders
from safetensors.torch import save_file

from electra_ds.common.errors import UserError
from electra_ds.config.loading import parse_run
from electra_ds.interop.export import export
from electra_ds.interop.import_weights import import_weights
from electra_ds.training import init_from
from electra_ds.training.init_from import find_source

SHARINGS = ("shared", "untied", "all", "gdes")


@pytest.fixture
def source(tmp_path):
    """A run folder with a checkpoint and its vocabulary."""
    run_folders.pretrained(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def find(tmp_path, monkeypatch):
    """`find_source` in one process without a group."""
    monkeypatch.setattr(init_from, "on_rank0", lambda function: function())

    def found(path, config, tokenizer="no-tokenizer", needs_generator=True):
        return find_source(
            path,
            config,
            tmp_path / tokenizer,
            lambda value: [value],
            needs_generator=needs_generator,
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
        (run_folders.config(sharing="all"), "model.sharing = shared, but all in this run"),
    ],
)
def test_weights_of_another_model_are_refused(source, find, other, message):
    with pytest.raises(UserError, match=f"--init-from .*{message}"):
        find(source, other)


@pytest.mark.parametrize(
    ("theirs", "own"),
    list(itertools.permutations(SHARINGS, 2)),
)
def test_a_run_of_another_sharing_is_refused_with_the_way(theirs, own, find, tmp_path):
    """The commands of the message are run; their result starts the run."""
    run_folders.pretrained(tmp_path / "run", theirs)
    with pytest.raises(UserError) as caught:
        find(tmp_path / "run", run_folders.config(own))
    message = str(caught.value)
    assert f"model.sharing = {theirs}, but {own} in this run" in message
    if "all" in (theirs, own):
        assert "use a run of model.sharing = " in message and "electra-ds" not in message
        return
    assert f"`electra-ds export {tmp_path / 'run'} --out H`" in message
    assert f"`electra-ds import H --out I --set model.sharing={own}`" in message
    export(tmp_path / "run", tmp_path / "H")
    sets = [f"model.sharing={own}", "data.sequence_length=32"]
    import_weights(tmp_path / "H", tmp_path / "I", sets=sets)
    assert find(tmp_path / "I", run_folders.config(own))


def test_tables_of_another_width_have_no_such_way(find, tmp_path):
    values = run_folders.config("untied").model_dump(mode="json")
    values["generator"]["hidden_size"] = 24
    config = parse_run(values, "test")
    run_folders.saved(tmp_path / "run", config)
    with pytest.raises(UserError) as caught:
        find(tmp_path / "run", run_folders.config("gdes"))
    assert "electra-ds" not in str(caught.value)


@pytest.mark.parametrize("theirs", ["shared", "untied", "all"])
def test_a_generator_that_is_replaced_is_not_compared(theirs, find, tmp_path):
    """--generator-from gives all its tensors, so those of the source may have other shapes."""
    run_folders.pretrained(tmp_path / "run", theirs)
    config = run_folders.frozen_config(ffn_size=24, hidden_size=16, num_layers=1, embedding_size=16)
    assert find(tmp_path / "run", config, needs_generator=False)
    with pytest.raises(UserError, match=r"model\.sharing|generator"):
        find(tmp_path / "run", config)


@pytest.mark.parametrize(("hidden", "way"), [(32, "untied"), (24, "shared")])
def test_deltas_do_not_fit_a_run_with_a_frozen_generator(hidden, way, find, tmp_path):
    values = run_folders.config("gdes").model_dump(mode="json")
    values["generator"]["hidden_size"] = hidden
    run_folders.saved(tmp_path / "run", parse_run(values, "test"))
    config = run_folders.frozen_config(ffn_size=24)
    message = f"model.sharing = gdes, but untied .* import H --out I --set model.sharing={way}`"
    with pytest.raises(UserError, match=message):
        find(tmp_path / "run", config, needs_generator=False)
    export(tmp_path / "run", tmp_path / "H")
    sets = [f"model.sharing={way}", "data.sequence_length=32"]
    import_weights(tmp_path / "H", tmp_path / "I", sets=sets)
    assert find(tmp_path / "I", config, needs_generator=False)


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
