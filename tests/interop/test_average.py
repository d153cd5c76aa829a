"""Averages of checkpoints: exact arithmetic, what reads them, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import run_folders
import shard_data
import torch
from running import read_json
from safetensors.torch import load_file

from electra_ds.common.errors import UserError
from electra_ds.config.loading import parse_run
from electra_ds.evaluation.detect import Detector
from electra_ds.evaluation.evaluate import evaluate_checkpoint
from electra_ds.interop import average as average_module
from electra_ds.interop.average import average, average_of
from electra_ds.interop.export import export
from electra_ds.interop.load_model import load_objective, load_pretrained
from electra_ds.model.gdes import with_sums
from electra_ds.model.weights import true_state
from electra_ds.training import checkpoint, init_from


def changed(config, **sections):
    """A config with other values, by section."""
    values = config.model_dump(mode="json")
    for section, fields in sections.items():
        values[section] |= fields
    return parse_run(values, "test")


def run(folder, seed, config=None):
    """Write a run folder with weights of this seed; its checkpoint."""
    config = config or run_folders.config()
    state = true_state(run_folders.objective(config, seed))
    made = run_folders.save(folder / "ckpt", "7", state, config.model_dump(mode="json"))
    (folder / "ckpt" / "latest").write_text("7\n")
    run_folders.vocabulary(folder / "tokenizer")
    return made


def runs(folder, count=2, config=None):
    return [run(folder / f"run{seed}", seed, config) for seed in range(count)]


def written_out(paths, weights):
    """Name -> the average in fp64, rounded to fp32."""
    parts = [checkpoint.weights(path) for path in paths]
    total = sum(weights)
    averages = {}
    for name in parts[0]:
        value = np.zeros(tuple(parts[0][name].shape))
        for part, weight in zip(parts, weights, strict=True):
            value = value + (weight / total) * part[name].numpy().astype(np.float64)
        averages[name] = value.astype(np.float32)
    return averages


MODELS = [
    *(("shared", "electra", "electra"), ("untied", "electra", "electra")),
    *(("shared", "mlm", "electra"), ("gdes", "electra", "deberta_v2")),
    ("shared", "electra", "modernbert"),
]


@pytest.mark.parametrize(("sharing", "kind", "architecture"), MODELS)
@pytest.mark.parametrize("weights", [None, [1.0, 2.5, 0.0], [3.0, -1.0, 0.5]])
def test_every_tensor_is_the_arithmetic_in_fp64(sharing, kind, architecture, weights, tmp_path):
    config = run_folders.config(sharing, kind, architecture)
    paths = runs(tmp_path, 3, config)
    average(paths, tmp_path / "i", weights)
    found = checkpoint.weights(tmp_path / "i" / "ckpt" / "0")
    expected = written_out(paths, weights or [1.0] * 3)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name].numpy(), value), name
    module, read = load_objective(tmp_path / "i" / "ckpt" / "0")  # it fits its config
    assert read == config and all(
        torch.equal(value, found[name]) for name, value in true_state(module).items()
    )


def test_the_tables_of_gdes_are_averaged_with_their_deltas(tmp_path):
    paths = runs(tmp_path, 2, run_folders.config("gdes"))
    average(paths, tmp_path / "i")
    sums = [with_sums(checkpoint.weights(path)) for path in paths]
    found = with_sums(checkpoint.weights(tmp_path / "i" / "ckpt" / "0"))
    for name, value in found.items():
        mean = (sums[0][name].double() + sums[1][name].double()) / 2
        torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-6)


def test_equal_checkpoints_have_themselves_as_average(tmp_path):
    paths = [run(tmp_path / name, 0) for name in ("a", "b", "c")]
    average(paths, tmp_path / "i")
    own, found = (checkpoint.weights(p) for p in (paths[0], tmp_path / "i" / "ckpt" / "0"))
    assert all(torch.equal(own[name], found[name]) for name in own)


def test_the_weights_are_written_in_parts_of_limited_size(tmp_path, monkeypatch):
    paths = runs(tmp_path)
    average(paths, tmp_path / "whole")
    limit = 40_000
    monkeypatch.setattr(average_module, "PART_BYTES", limit)
    average(paths, tmp_path / "parts")
    files = sorted((tmp_path / "parts" / "ckpt" / "0").glob("model-*"))
    assert len(files) > 3 and files[-1].name.endswith(f"-of-{len(files):05d}.safetensors")
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(4 * t.numel() for t in tensors.values()) <= limit
    whole, parts = (checkpoint.weights(tmp_path / n / "ckpt" / "0") for n in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[n], parts[n]) for n in whole)


def test_the_report_names_checkpoints_steps_and_weights(tmp_path):
    first = run_folders.config()
    other = changed(
        first,
        model={"hidden_dropout": 0.3, "init_std": 0.05},
        objective={"mask_prob": 0.3, "kind": "electra_15"},
        train={"seed": 9, "micro_batch_size": 1},
    )
    paths = [run(tmp_path / "a", 0, first), run(tmp_path / "b", 1, other)]
    report = average([tmp_path / "a", paths[1]], tmp_path / "i", [1, 3])
    written = read_json(tmp_path / "i" / "average.json")
    assert (written["format"], written["version"]) == ("electra_ds average", 1)
    assert [part["path"] for part in written["checkpoints"]] == list(map(str, paths))
    assert [part["weight"] for part in written["checkpoints"]] == [1.0, 3.0]
    assert [part["share"] for part in written["checkpoints"]] == [0.25, 0.75]
    assert [part["step"] for part in written["checkpoints"]] == [7, 7]
    differ = [line.partition(":")[0] for line in written["checkpoints"][1]["differences"]]
    assert set(differ) == {
        *("model.hidden_dropout", "model.init_std", "objective.mask_prob", "objective.kind"),
        "train.seed",
    }
    assert not written["checkpoints"][0]["differences"]
    assert average_of(tmp_path / "i" / "ckpt" / "0") == report and report.is_trained
    assert average_of(paths[0]) is None
    config = read_json(tmp_path / "i" / "config.json")
    assert {**config, "provenance": None} == first.model_dump(mode="json")


def test_an_average_is_read_by_every_verb(tmp_path, monkeypatch):
    paths = runs(tmp_path)
    average(paths, tmp_path / "i")
    valid = shard_data.best_fit_rows(16, 32, seed=9)
    (tmp_path / "plain").mkdir()
    rows = shard_data.best_fit_rows(40, 32, seed=0)
    plain = shard_data.write_data(tmp_path / "plain", [rows], valid=valid)
    data = shard_data.with_vocabulary(plain, tmp_path / "i" / "tokenizer", tmp_path / "data")
    loaded = load_pretrained(tmp_path / "i")  # finetune
    own = load_pretrained(paths[0])
    assert loaded.trained_length == own.trained_length == 32
    assert "average of 2 checkpoints" in loaded.origin and loaded.tokenizer.names
    assert Detector.load(tmp_path / "i")("aa ab ac")
    export(tmp_path / "i", tmp_path / "hf")
    card = (tmp_path / "hf" / "discriminator" / "README.md").read_text()
    assert f"| average of | 0.5 x {paths[0]}, step 7; 0.5 x {paths[1]}, step 7 |" in card
    monkeypatch.setattr(init_from, "on_rank0", lambda function: function())
    source = init_from.find_source(
        tmp_path / "i",
        run_folders.config(),
        tmp_path / "i" / "tokenizer",
        lambda value: [value],
        needs_generator=True,
    )
    assert source == tmp_path / "i" / "ckpt" / "0"
    assert evaluate_checkpoint(tmp_path / "i", str(data), None, False)["mlm_loss"] > 0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for 2 checkpoints"),
        ([1.0, 2.0, 3.0], "3 weights for 2 checkpoints"),
        ([1.0, float("nan")], "expected finite numbers"),
        ([1.0, float("inf")], "expected finite numbers"),
        ([1.0, -1.0], "their sum is 0"),
        ([0.0, 0.0], "their sum is 0"),
        ([1e308, 1e308], "their sum is inf"),
        ([1e200, 5e-324 - 1e200], "their sum is 0"),
    ],
)
def test_weights_without_an_average_are_refused(weights, message, tmp_path):
    paths = runs(tmp_path)
    with pytest.raises(UserError, match=f"--weights .*{message}"):
        average(paths, tmp_path / "i", weights)
    assert not (tmp_path / "i").exists()


OTHERS = {
    "sizes": (dict(model={"ffn_size": 96}), r"model\.ffn_size: 80 -> 96"),
    "layers": (dict(generator={"num_layers": 1}), r"generator\.num_layers: 2 -> 1"),
    "heads, at equal shapes": (dict(model={"num_heads": 4}), r"model\.num_heads: 2 -> 4"),
    "epsilon": (dict(model={"layer_norm_eps": 1e-5}), r"model\.layer_norm_eps"),
    "sharing": (dict(model={"sharing": "untied"}), r"model\.sharing: shared -> untied"),
    "objective": (dict(objective={"kind": "mlm"}), "objective electra, generator model -> mlm"),
    "generator": (dict(objective={"generator": "uniform"}), "tensors differ from .*uniform"),
    "special ids": (dict(data={"special_ids": run_folders.IDS | {"unk": 9}}), "special_ids"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_model_is_refused(kind, tmp_path):
    sections, message = OTHERS[kind]
    first = run_folders.config()
    paths = [run(tmp_path / "a", 0, first), run(tmp_path / "b", 1, changed(first, **sections))]
    with pytest.raises(UserError, match=message):
        average(paths, tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_another_architecture_is_refused(tmp_path):
    modern = run_folders.config(architecture="modernbert")
    paths = [run(tmp_path / "a", 0), run(tmp_path / "b", 1, modern)]
    with pytest.raises(UserError, match="architecture electra -> architecture modernbert"):
        average(paths, tmp_path / "i")


def test_tensors_that_differ_from_the_config_are_refused(tmp_path):
    """Weights of another size than meta.json states, in the first and in the second checkpoint."""
    config = run_folders.config()
    other = true_state(run_folders.objective(changed(config, model={"ffn_size": 96})))
    paths = runs(tmp_path)
    damaged = run_folders.save(tmp_path / "c" / "ckpt", "7", other, config.model_dump(mode="json"))
    with pytest.raises(UserError, match=r"has shape \(96.*\), but the config gives \(80"):
        average([damaged, *paths], tmp_path / "i")
    with pytest.raises(UserError, match=r"has shape \(96.*\), but \(80.* in .*run0"):
        average([*paths, damaged], tmp_path / "i")


@pytest.mark.parametrize("change", ["words", "options"])
def test_another_tokenizer_of_the_same_size_is_refused(change, tmp_path):
    paths = runs(tmp_path)
    vocab = tmp_path / "run1" / "tokenizer" / "vocab.txt"
    if change == "words":
        vocab.write_text(vocab.read_text().replace("\nab\n", "\nother\n"))
    else:
        vocab.with_name("options.json").write_text('{"lowercase": false, "strip_accents": false}')
    message = r"run1/tokenizer: its vocabulary or its options are not those of .*run0/tokenizer"
    with pytest.raises(UserError, match=message):
        average(paths, tmp_path / "i")
    assert not (tmp_path / "i").exists()
    shutil.rmtree(tmp_path / "run1" / "tokenizer")  # the first one has a tokenizer
    average(paths, tmp_path / "i")
    shutil.rmtree(tmp_path / "run0" / "tokenizer")
    with pytest.raises(UserError, match="run0/tokenizer: not found"):
        average(paths, tmp_path / "j")


def test_mistakes_in_the_checkpoints_are_named(tmp_path):
    paths = runs(tmp_path)
    with pytest.raises(UserError, match="found 1; expected at least two"):
        average(paths[:1], tmp_path / "i")
    with pytest.raises(UserError, match="run0/ckpt/7: given twice"):
        average([*paths, tmp_path / "run0"], tmp_path / "i")
    run_folders.fine_tuned(tmp_path / "tuned" / "seed-0", "classification")
    with pytest.raises(UserError, match="fine-tuned model; expected the checkpoint of a pretrain"):
        average([paths[0], tmp_path / "tuned" / "seed-0" / "model"], tmp_path / "i")
    export(paths[0], tmp_path / "hf")
    with pytest.raises(UserError, match="hf: no checkpoint here: it is a Hugging Face folder"):
        average([paths[0], tmp_path / "hf"], tmp_path / "i")
    for out in (tmp_path / "run1", tmp_path / "run1" / "new"):
        with pytest.raises(UserError, match="lies in the folder that the command reads"):
            average(paths, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="not empty"):
        average(paths, tmp_path / "full")
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("damage", ["content", "not finite"])
def test_damaged_weights_are_refused_and_leave_nothing(damage, tmp_path):
    paths = runs(tmp_path)
    (file,) = paths[1].glob("model-*")
    if damage == "content":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        message = "its content has changed"
    else:
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] = float("nan")
        config = run_folders.config().model_dump(mode="json")
        shutil.rmtree(paths[1])
        run_folders.save(paths[1].parent, "7", tensors, config)
        message = "run1/ckpt/7: 1 of the .* values of .* are not finite"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        average(paths, tmp_path / "i")
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_report_is_named(tmp_path):
    average(runs(tmp_path), tmp_path / "i")
    file = tmp_path / "i" / "average.json"
    file.write_text(json.dumps(read_json(file) | {"version": 2}))
    with pytest.raises(UserError, match=r"average\.json: version = 2"):
        load_pretrained(tmp_path / "i")
