"""Checkpoints: whole or absent, refused with the file's name when damaged, executing nothing."""

import json
import pickle
import shutil

import pytest
import torch
from fake_weights import CONFIG, PADDED, PROGRESS, FakeWeights
from safetensors.torch import load_file, save_file

from electra_ds.common import files
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.files import sha256_file
from electra_ds.config.schema import CheckpointConfig
from electra_ds.training import checkpoint, checkpointer
from electra_ds.training.optimizer import MOMENTS
from electra_ds.training.state import TrainingState


def save(folder, name="1000", weights=None, progress=PROGRESS):
    return checkpointer.save(weights or FakeWeights(), folder, name, progress, CONFIG, PADDED)


@pytest.fixture
def saved(tmp_path):
    """(OUT/ckpt, OUT/ckpt/1000)"""
    return tmp_path / "ckpt", save(tmp_path / "ckpt")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ----------------------------------------------------------------------------------- save and load


def test_a_saved_state_is_loaded_again(saved):
    folder, path = saved
    assert checkpoint.latest(folder) == path and names(folder) == ["1000", "latest"]
    other = FakeWeights(seed=1)
    other.scaler = {}
    meta = checkpoint.load(other, path, PADDED)
    assert (
        other.equals(FakeWeights())
        and other.applied_steps == 1000
        and other.scaler == {"cur_scale": 8.0}
    )
    assert (meta.state, meta.config, meta.world_size) == (PROGRESS, CONFIG, 1)


def test_loading_only_weights_keeps_the_initial_moments(saved):
    other = FakeWeights(seed=1)
    other.scaler = {"cur_scale": 4.0}
    checkpoint.load(other, saved[1], PADDED, weights_only=True)
    assert other.equals(FakeWeights(), kinds=("master",))
    assert all(not value.any() for (_, kind), value in other.values.items() if kind != "master")
    assert other.applied_steps == 0 and other.scaler == {"cur_scale": 4.0}


def test_tensors_that_are_given_otherwise_are_skipped_whatever_their_shapes(saved):
    """As those of a generator that --generator-from replaces."""
    name = "layer.bias"
    shapes = {key: shape for key, shape in FakeWeights().parameters.items() if key != name}
    other = FakeWeights(seed=1, shapes=shapes)
    other.frozen = {name: torch.ones(7, 2)}
    with pytest.raises(UserError, match="bias has shape"):
        checkpoint.load(other, saved[1], PADDED, weights_only=True)
    checkpoint.load(other, saved[1], PADDED, weights_only=True, skipped=(name,))
    stored = FakeWeights().values
    assert all(torch.equal(other.values[key, "master"], stored[key, "master"]) for key in shapes)
    assert torch.equal(other.frozen[name], torch.ones(7, 2))


def test_padding_rows_are_not_stored_and_load_as_zeros(saved):
    stored = load_file(saved[1] / "model-00001-of-00001.safetensors")
    assert stored["word"].shape == (10, 4) and checkpoint.weights(saved[1])["word"].shape == (10, 4)
    moments = load_file(saved[1] / "optim-00001-of-00001.safetensors")
    assert moments["exp_avg/word"].shape == (10, 4) and moments["exp_avg_sq/layer.bias"].shape == (
        3,
    )
    wider = FakeWeights(
        seed=1, shapes=FakeWeights().parameters | {"word": (64, 4)}
    )  # another padding
    for key in wider.values:
        wider.values[key] += 1.0
    checkpoint.load(wider, saved[1], PADDED)
    for kind in ("master", *MOMENTS):
        assert torch.equal(wider.values["word", kind][:10], FakeWeights().values["word", kind][:10])
        assert not wider.values["word", kind][10:].any()


def test_meta_lists_every_file_with_its_size_and_sha256(saved):
    meta = json.loads((saved[1] / "meta.json").read_text())
    assert (meta["format"], meta["version"], meta["step"], meta["data"]) == (
        "electra_ds checkpoint",
        1,
        1000,
        {"position": 32},
    )
    assert sorted([*meta["files"], "meta.json"]) == names(saved[1])
    for name, facts in meta["files"].items():
        assert facts["bytes"] == (saved[1] / name).stat().st_size
        assert facts["sha256"] == files.sha256_file(saved[1] / name)


def test_a_checkpoint_without_recent_losses_is_read(saved):
    values = json.loads((saved[1] / "meta.json").read_text())
    del values["recent_losses"]
    (saved[1] / "meta.json").write_text(json.dumps(values))
    assert checkpoint.read_meta(saved[1]).state == PROGRESS


def test_the_moments_of_another_optimizer_are_refused_and_its_weights_are_not(tmp_path):
    muon = FakeWeights()
    muon.optimizer_kind = "muon"
    muon.moments["layer.weight"] = ("momentum_buffer",)
    muon.values["layer.weight", "momentum_buffer"] = torch.ones(3, 4)
    path = save(tmp_path, "1000", muon)
    assert checkpoint.read_meta(path).optimizer == "muon"
    moments = load_file(path / "optim-00001-of-00001.safetensors").keys()
    assert {key for key in moments if "layer.weight" in key} == {"momentum_buffer/layer.weight"}

    adam = FakeWeights(seed=1)
    with pytest.raises(UserError) as refused:
        checkpoint.load(adam, path, PADDED)
    expected = "has the moments of optimizer.kind = muon, but this run has optimizer.kind = adam"
    assert expected in str(refused.value) and "--init-from" in str(refused.value)
    checkpoint.load(adam, path, PADDED, weights_only=True)
    assert adam.equals(muon, kinds=("master",))
    checkpoint.load(muon, path, PADDED)


def test_a_checkpoint_without_the_name_of_its_optimizer_has_the_moments_of_adam(saved):
    values = json.loads((saved[1] / "meta.json").read_text())
    assert values.pop("optimizer") == "adam"
    (saved[1] / "meta.json").write_text(json.dumps(values))
    other = FakeWeights(seed=1)
    checkpoint.load(other, saved[1], PADDED)
    assert other.equals(FakeWeights())


def test_every_parameter_has_one_owner_and_owners_hold_equal_shares():
    sizes = {f"p{i}": 10 + i for i in range(40)} | {"table": 300}
    for world in (1, 2, 3, 8):
        owners = checkpointer._owners(sizes, world)
        assert set(owners) == set(sizes) and set(owners.values()) == set(range(world))
        loads = [
            sum(sizes[name] for name in owners if owners[name] == rank) for rank in range(world)
        ]
        assert max(loads) - min(loads) <= (300 if world > 3 else 50)
        assert owners == checkpointer._owners(
            dict(reversed(sizes.items())), world
        )  # the same on every rank


# ----------------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("name", ["1000", "2000"])
@pytest.mark.parametrize("stage", ["gather", "tensors", "meta", "rename"])
def test_a_failed_save_leaves_latest_and_the_old_folder(saved, monkeypatch, name, stage):
    folder, path = saved
    before = {file: (path / file).read_bytes() for file in names(path)}
    other = FakeWeights(seed=1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    if stage == "gather":
        other.fails_at = ("layer.bias", "exp_avg_sq")
    else:
        target = {"tensors": "save_file", "meta": "write_json", "rename": "_replace_folder"}[stage]
        monkeypatch.setattr(checkpointer, target, fail)
    with pytest.raises(RunFailure, match=rf"saving .*ckpt/{name} failed: rank 0: .*No space left"):
        save(folder, name, other)
    monkeypatch.undo()
    other.fails_at = None
    assert (
        checkpoint.latest(folder) == path
        and {file: (path / file).read_bytes() for file in names(path)} == before
    )
    assert [found for found in names(folder) if not found.startswith(".")] == ["1000", "latest"]
    save(folder, name, other)  # the next save succeeds
    assert names(folder) == sorted({"1000", name, "latest"})
    again = FakeWeights()
    checkpoint.load(again, folder / name, PADDED)
    assert again.equals(other)


def test_a_crash_inside_a_save_leaves_latest_and_the_old_folder(saved, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpointer, "sha256_file", crash)
    with pytest.raises(KeyboardInterrupt):
        save(saved[0], "2000")
    assert checkpoint.latest(saved[0]) == saved[1] and not (saved[0] / "2000").exists()


def test_a_failure_on_another_rank_is_raised_here_too(tmp_path):
    weights = FakeWeights()
    weights.all_gather_object = lambda value: [value, ["failure", "disk full", {}]]
    with pytest.raises(RunFailure, match="rank 1: disk full"):
        save(tmp_path / "ckpt", weights=weights)
    assert checkpoint.latest(tmp_path / "ckpt") is None


def test_saving_the_same_step_again_replaces_the_folder(saved):
    other = FakeWeights(seed=1)
    save(saved[0], "1000", other)
    found = FakeWeights()
    checkpoint.load(found, saved[1], PADDED)
    assert found.equals(other) and names(saved[0]) == ["1000", "latest"]


def test_the_final_checkpoint_of_an_extended_run_is_named_by_its_step(tmp_path):
    path = save(tmp_path / "ckpt", "final")
    checkpointer.rename_final(FakeWeights(), path, 1000)
    assert names(tmp_path / "ckpt") == ["1000", "latest"]
    assert checkpoint.latest(tmp_path / "ckpt") == tmp_path / "ckpt" / "1000"


# ------------------------------------------------------------------------------------------- prune


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({}, {500, 600}),
        ({"keep_last": 3}, {400, 500, 600}),
        ({"keep_last": 9}, {100, 200, 300, 400, 500, 600}),
        ({"keep_every": 300}, {300, 500, 600}),
        ({"keep_steps": [100, 700]}, {100, 500, 600}),
        ({"keep_every": 200, "keep_steps": [100]}, {100, 200, 400, 500, 600}),
    ],
)
def test_pruning_keeps_what_the_rules_name_and_never_final(tmp_path, rules, kept):
    for step in (100, 200, 300, 400, 500, 600):
        (tmp_path / str(step)).mkdir()
        (tmp_path / str(step) / "meta.json").write_text("{}")
    (tmp_path / "final").mkdir()
    (tmp_path / "latest").write_text("final\n")
    removed = checkpointer.prune(tmp_path, CheckpointConfig(**rules), 600)
    assert names(tmp_path) == sorted([*map(str, kept), "final", "latest"])
    assert {int(name) for name in removed} == {100, 200, 300, 400, 500, 600} - kept


def test_fewer_than_two_are_never_kept():
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        CheckpointConfig(keep_last=1)


def test_pruning_continues_after_a_crash(tmp_path):
    for name in ("1", ".1.old", "2", "3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text("{}")
    assert checkpointer.prune(tmp_path, CheckpointConfig(), 3) == ["1"] and names(tmp_path) == [
        "2",
        "3",
    ]


# ----------------------------------------------------------------------------------------- refusal


def test_latest_that_names_nothing_is_refused(saved):
    folder, path = saved
    assert checkpoint.latest(folder.parent / "elsewhere") is None
    for name in ("2000", "../ckpt/1000", "", "."):
        (folder / "latest").write_text(name + "\n")
        with pytest.raises(UserError, match="latest names"):
            checkpoint.latest(folder)
    shutil.move(path / "meta.json", folder)
    (folder / "latest").write_text("1000\n")
    with pytest.raises(UserError, match="write the name of a complete checkpoint"):
        checkpoint.latest(folder)


FILES = ["model-00001-of-00001.safetensors", "optim-00001-of-00001.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_reported_with_its_file(saved, name):
    data = bytearray((saved[1] / name).read_bytes())
    data[-1] ^= 1
    (saved[1] / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: its content has changed.*older checkpoint"):
        checkpoint.load(FakeWeights(), saved[1], PADDED)
    with pytest.raises(UserError, match=name):
        checkpoint.weights(saved[1])


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_cut_file_is_named(saved, name):
    data = (saved[1] / name).read_bytes()
    (saved[1] / name).write_bytes(data[:-10])
    with pytest.raises(
        UserError, match=f"{name}: expected {len(data)} bytes, found {len(data) - 10}"
    ):
        checkpoint.load(FakeWeights(), saved[1], PADDED)
    (saved[1] / name).unlink()
    with pytest.raises(UserError, match=f"{name}: expected {len(data)} bytes, found no file"):
        checkpoint.load(FakeWeights(), saved[1], PADDED)


def edit_meta(path, change):
    values = json.loads((path / "meta.json").read_text())
    change(values)
    (path / "meta.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": "other", "version": 1}', '{"step": 1000}']
)
def test_a_meta_that_is_not_ours_is_refused(saved, content):
    (saved[1] / "meta.json").write_text(content)
    wrong = "expected 'electra_ds checkpoint' version 1|not valid JSON|found a JSON list"
    with pytest.raises(UserError, match=rf"meta\.json: ({wrong})"):
        checkpoint.read_meta(saved[1])
    shutil.rmtree(saved[1])
    with pytest.raises(UserError, match="not found; expected a checkpoint of electra_ds"):
        checkpoint.read_meta(saved[1])


def test_a_later_version_is_refused(saved):
    edit_meta(saved[1], lambda values: values.update(version=2))
    with pytest.raises(UserError, match=r"version 1, found .*2"):
        checkpoint.read_meta(saved[1])


@pytest.mark.parametrize(
    "name", ["../model-00001-of-00001.safetensors", "/etc/passwd", "model.pt", "weights.pkl"]
)
def test_a_listed_name_that_no_checkpoint_has_is_refused(saved, name):
    edit_meta(
        saved[1], lambda values: values["files"].update({name: {"bytes": 1, "sha256": "0" * 64}})
    )
    with pytest.raises(UserError, match="which no checkpoint has"):
        checkpoint.read_meta(saved[1])


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", FILES)
def test_reading_executes_nothing(saved, tmp_path, name):
    marker = tmp_path / "marker"
    data = pickle.dumps({"word": Trap(marker)})
    pickle.loads(data)["word"].close()
    assert marker.exists()  # unpickling executes the trap
    marker.unlink()

    (saved[1] / name).write_bytes(data)
    facts = {"bytes": len(data), "sha256": files.sha256_file(saved[1] / name)}
    edit_meta(saved[1], lambda values: values["files"].update({name: facts}))
    with pytest.raises(UserError, match=f"{name}: .*safetensors"):
        checkpoint.load(FakeWeights(), saved[1], PADDED)
    assert not marker.exists()


def test_the_checkpoint_of_another_model_is_refused_with_the_difference(saved):
    shapes = FakeWeights().parameters
    wider = FakeWeights(shapes=shapes | {"layer.weight": (3, 5)})
    with pytest.raises(
        UserError, match=r"layer\.weight has shape \(3, 4\), this run's model has \(3, 5\)"
    ):
        checkpoint.load(wider, saved[1], PADDED)
    more = FakeWeights(shapes=shapes | {"extra": (2,)})
    with pytest.raises(UserError, match="these tensors are missing: extra"):
        checkpoint.load(more, saved[1], PADDED)
    fewer = FakeWeights(shapes={"word": (16, 4)})
    with pytest.raises(UserError, match="no such parameter"):
        checkpoint.load(fewer, saved[1], PADDED)
    with pytest.raises(
        UserError, match=r"word has shape \(10, 4\), this run's model has \(12, 4\)"
    ):
        checkpoint.load(FakeWeights(), saved[1], {"word": 12})  # another vocabulary


def test_a_run_that_resumed_earlier_keeps_what_it_saves(tmp_path):
    for step in (5, 7, 10, 15):
        (tmp_path / str(step)).mkdir()
    assert (
        checkpointer.prune(tmp_path, CheckpointConfig(), newest=7) == []
    )  # 10 and 15 are overwritten later
    assert names(tmp_path) == sorted(["5", "7", "10", "15"])


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    for name in ("10", ".13.tmp", ".13.0123abcd.tmp", ".final.0123abcd.tmp", ".5.old"):
        (tmp_path / name).mkdir()
    (tmp_path / ".latest.0123456789ab.tmp").write_text("10")
    checkpointer.remove_stale(tmp_path)
    assert names(tmp_path) == ["10"]
    checkpointer.remove_stale(tmp_path / "none")


def test_foreign_files_in_a_folder_of_checkpoints_are_kept(tmp_path):
    """OUT/ckpt may be a link to a folder on another disk, with other files."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "ckpt").symlink_to(tmp_path / "disk")
    foreign = [".cfg.old", ".notes.tmp", ".bashrc.old", "1", "notes"]
    for name in foreign:
        (tmp_path / "disk" / name).mkdir()
    folder = tmp_path / "ckpt"
    checkpointer.remove_stale(folder)
    for step in (2, 3, 4):
        checkpointer.save(FakeWeights(), folder, str(step), TrainingState(step), CONFIG, PADDED)
    assert checkpointer.prune(folder, CheckpointConfig(), 4) == ["2"]
    assert names(folder) == sorted([*foreign, "3", "4", "latest"])


def test_a_checkpoint_that_is_a_link_is_replaced_and_pruned_without_its_target(tmp_path):
    checkpointer.save(FakeWeights(), tmp_path / "other", "1", TrainingState(1), CONFIG, PADDED)
    folder = tmp_path / "ckpt"
    folder.mkdir()
    for name in ("1", "2", "latest", ".3.old"):
        (folder / name).symlink_to(tmp_path / "other" / ("latest" if name == "latest" else "1"))
    for step in (2, 3, 4):
        checkpointer.save(FakeWeights(), folder, str(step), TrainingState(step), CONFIG, PADDED)
    assert checkpointer.prune(folder, CheckpointConfig(), 4) == ["1", "2"]
    assert names(folder) == ["3", "4", "latest"]
    assert (tmp_path / "other" / "latest").read_text() == "1\n"
    checkpoint.load(FakeWeights(), tmp_path / "other" / "1", PADDED)


@pytest.mark.parametrize(
    "change",
    [
        {"config": []},
        {"config": None},
        {"files": None},
        {"files": {}},
        {"files": []},
        {"files": {"model-00001-of-00001.safetensors": {"bytes": 1}}},
        {"files": {"model-00001-of-00001.safetensors": {"bytes": -1, "sha256": "0" * 64}}},
        {"files": {"model-00001-of-00001.safetensors": {"bytes": 10**30, "sha256": "0" * 64}}},
        {"files": {"model-00001-of-00001.safetensors": 3}},
        {"step": "x"},
        {"step": -1},
        {"step": 10**30},
        {"step": 1.5},
        {"step": True},
        {"skipped": None},
        {"tokens": -5},
        {"data": []},
        {"data": {"position": -32}},
        {"data": {"position": "32"}},
        {"data": {"position": 10**30}},
        {"interval": 3},
        {"interval": [[1.0], [1.0, 2.0]]},
        {"interval": [["x"]]},
        {"recent_losses": [0.0] * 33},
        {"scaler": {"__class__": 3}},
        {"scaler": {"cur_scale": "x"}},
        {"scaler": {"cur_scale": -1.0}},
        {"world_size": 0},
        {"format": ["x"]},
        {"version": "\x1b[31m"},
    ],
    ids=str,
)
def test_a_value_of_meta_json_of_another_type_or_size_is_refused(saved, change):
    edit_meta(saved[1], lambda values: values.update(change))
    with pytest.raises(UserError, match=r"meta\.json: ") as caught:
        checkpoint.read_meta(saved[1])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "content", ["", "\x00", "\u0661", "1000\n1000", "9" * 5000, "../ckpt/1000", "\x1b[31m"]
)
def test_latest_with_another_content_is_refused(saved, content):
    (saved[0] / "latest").write_text(content)
    with pytest.raises(UserError) as caught:
        checkpoint.latest(saved[0])
    assert str(caught.value).isprintable()


def test_latest_that_is_no_text_file_is_refused(saved):
    (saved[0] / "latest").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError):
        checkpoint.latest(saved[0])
    (saved[0] / "latest").unlink()
    (saved[0] / "latest").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        checkpoint.latest(saved[0])


def test_tensors_of_another_type_are_refused(saved):
    file = saved[1] / "model-00001-of-00001.safetensors"
    save_file({"scale": torch.zeros((), dtype=torch.int64)}, file)
    facts = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    edit_meta(saved[1], lambda values: values["files"].update({file.name: facts}))
    with pytest.raises(UserError, match=r"scale has type torch\.int64; expected float32"):
        checkpoint.weights(saved[1])
