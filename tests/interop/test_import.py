"""Import: every tensor is loaded, initialized, or listed as unused with a reason."""

import json
from pathlib import Path

import numpy as np
import pytest
import run_folders
import torch
from running import read_json, run_cli
from safetensors.torch import load_file, save_file
from shard_data import with_vocabulary
from stock_folders import SETS, equal

from electra_ds.common.errors import UserError
from electra_ds.data.batch import Batch
from electra_ds.interop.export import export
from electra_ds.interop.import_weights import import_weights
from electra_ds.interop.load_model import load_objective, load_pretrained
from electra_ds.model.gdes import with_deltas, with_sums
from electra_ds.model.weights import true_state
from electra_ds.training import checkpoint
from electra_ds.training.checkpoint import find_checkpoint

transformers = pytest.importorskip("transformers")
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "tf_reference"


def imported(*arguments, **keywords):
    """(report, all weights) of an import, after checks of report, config and checkpoint."""
    *_, out = arguments
    report = import_weights(*arguments, "tiny", SETS + keywords.pop("sets", []), **keywords)
    weights = checkpoint.weights(find_checkpoint(out))
    assert sorted([ours for _, ours in report.loaded] + report.initialized) == sorted(weights)
    written = read_json(out / "import.json")
    assert list(written) == ["source", "read", "made", "left", "warnings"]
    assert written["made"] == report.initialized and written["left"] == report.unused
    module, config = load_objective(out / "ckpt" / "0")  # the sizes in config.json fit the weights
    assert read_json(out / "config.json")["model"] == config.model.model_dump(mode="json")
    assert equal(true_state(module), weights)
    return report, weights


def exported(folder: Path, sharing: str = "shared", kind: str = "electra") -> tuple[dict, Path]:
    """(our tensors, the folder that `export` wrote)."""
    state = true_state(run_folders.pretrained(folder / "run", sharing, kind))
    export(folder / "run", folder / "hf")
    return state, folder / "hf"


@pytest.mark.parametrize(("unused", "is_read"), [(8, True), (64, True), (65, False)])
def test_rows_without_an_entry_are_left_out(unused, is_read, tmp_path):
    """Word tables are padded to a multiple of 8 or 64; more unused rows are another vocabulary."""
    state, folder = exported(tmp_path)
    for part in ("discriminator", "generator"):
        file, config = folder / part / "model.safetensors", folder / part / "config.json"
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.shape[0] == 600:
                tensors[name] = torch.cat([tensor, torch.ones(unused, *tensor.shape[1:])])
        save_file(tensors, file, {"format": "pt"})
        config.write_text(json.dumps(read_json(config) | {"vocab_size": 600 + unused}))
    if not is_read:
        with pytest.raises(UserError, match="600 entries, but the model was trained with 665"):
            load_pretrained(folder)
        return
    assert equal(state, imported(folder, tmp_path / "i")[1])
    words = load_pretrained(folder).state["embeddings.word.weight"]
    assert torch.equal(words, state["embeddings.word.weight"])


@pytest.mark.parametrize("sharing", ["shared", "untied", "all"])
def test_export_then_import_is_bit_equal(sharing, tmp_path):
    state, folder = exported(tmp_path, sharing)
    report, weights = imported(folder, tmp_path / "i")
    assert equal(state, weights) and not report.initialized and not report.warnings
    assert read_json(tmp_path / "i" / "config.json")["model"]["sharing"] == sharing
    tensors = sum(
        len(load_file(folder / part / "model.safetensors"))
        for part in ("discriminator", "generator")
    )
    assert (
        sum(len(foreign.split(", ")) for foreign, _ in report.loaded) + len(report.unused)
        == tensors
    )


def test_an_exported_pair_with_deltas_is_imported_with_sums_or_with_deltas(tmp_path):
    state, folder = exported(tmp_path, "gdes")
    _, sums = imported(folder, tmp_path / "sums", sets=["model.sharing=untied"])
    assert read_json(tmp_path / "sums" / "config.json")["model"]["sharing"] == "untied"
    assert equal(sums, with_sums(state))
    report, deltas = imported(folder, tmp_path / "deltas", sets=["model.sharing=gdes"])
    assert not report.initialized and deltas.keys() == state.keys()
    for name, value in state.items():
        rounding = 1e-6 if name.startswith("embedding_deltas.") else 0.0
        assert float((deltas[name] - value).abs().max()) <= rounding, name
    assert equal(with_sums(deltas), with_sums(with_deltas(with_sums(state))))


@pytest.mark.parametrize("kind", ["mlm", "replace_mlm"])
def test_export_then_import_of_an_encoder_that_predicts_tokens_is_bit_equal(kind, tmp_path):
    state, folder = exported(tmp_path, kind=kind)
    report, weights = imported(folder, tmp_path / "i", sets=[f"objective.kind={kind}"])
    assert equal(state, weights) and not report.initialized and not report.warnings


def test_a_missing_part_is_initialized(tmp_path):
    state, folder = exported(tmp_path)
    report, weights = imported(folder / "discriminator", tmp_path / "d")
    made = {"generator", "generator_head"}
    assert {
        name.split(".")[0] for name in report.initialized
    } == made and "initialized; shared" in report.warnings[0]
    assert all(
        torch.equal(weights[name], state[name])
        for name in weights
        if name.split(".")[0] not in made
    )
    assert weights["generator.layers.0.qkv.weight"].shape == (3 * 128, 128)  # the run's own sizes
    report, weights = imported(folder / "generator", tmp_path / "g")
    assert {name.split(".")[0] for name in report.initialized} == {
        "discriminator",
        "discriminator_head",
    }
    assert "shared parameters come from the other part" in report.warnings[0]
    kept = [name for name in weights if name.startswith(("embeddings", "generator"))]
    assert all(torch.equal(weights[name], state[name]) for name in kept)
    report, weights = imported(
        folder / "discriminator", tmp_path / "both", generator=folder / "generator"
    )
    assert equal(state, weights) and not report.initialized


def test_a_generator_tensor_that_differs_from_the_shared_one_gives_a_warning(tmp_path):
    state, folder = exported(tmp_path)
    file, name = (
        folder / "generator" / "model.safetensors",
        "electra.embeddings.token_type_embeddings.weight",
    )
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] + 1}, file, metadata={"format": "pt"})
    report, weights = imported(folder, tmp_path / "i")
    assert equal(state, weights) and len(report.warnings) == 1
    assert name in report.warnings[0] and "differs from that of discriminator" in report.warnings[0]


def test_a_pickled_bare_encoder_is_loaded_and_an_unknown_tensor_gives_a_warning(tmp_path):
    state, folder = exported(tmp_path)
    bare = transformers.ElectraModel.from_pretrained(folder / "discriminator").state_dict()
    torch.save(
        bare | {"unknown.weight": torch.zeros(3), "embeddings.position_ids": torch.zeros(1, 40)},
        folder / "discriminator" / "pytorch_model.bin",
    )
    (folder / "discriminator" / "model.safetensors").unlink()
    report, weights = imported(folder, tmp_path / "i")
    assert [name for name in report.initialized] == [
        name for name in state if name.startswith("discriminator_head.")
    ]
    assert torch.equal(
        weights["discriminator.layers.1.qkv.bias"], state["discriminator.layers.1.qkv.bias"]
    )
    assert "unknown.weight" in report.warnings[0] and "(3,)" in report.warnings[0]
    assert report.unused["discriminator: embeddings.position_ids"] == "a buffer, not a weight"
    del bare["encoder.layer.1.output.dense.weight"]
    torch.save(bare, folder / "discriminator" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"electra\.encoder\.layer\.1\.output\.dense\.weight"):
        imported(folder, tmp_path / "gap")


def bert(folder: Path, old_names: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=600,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=40,
    )
    model = run_folders.drawn(transformers.BertForPreTraining(config))
    model.save_pretrained(folder)
    run_folders.vocabulary(folder)
    if old_names:
        (folder / "model.safetensors").unlink()
        new = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        state = {name: value for name, value in model.state_dict().items()}
        for ending, old in new.items():
            state = {name.replace(ending, old): value for name, value in state.items()}
        torch.save(state, folder / "pytorch_model.bin")
    return model.state_dict()


@pytest.mark.parametrize("old_names", [False, True])
def test_bert_initializes_both_encoders(old_names, tmp_path):
    theirs = bert(tmp_path / "bert", old_names)
    sizes = [
        f"generator.{key}={value}"
        for key, value in dict(hidden_size=64, num_layers=2, num_heads=2, ffn_size=96).items()
    ]
    report, weights = imported(tmp_path / "bert", tmp_path / "i", sets=sizes)
    assert torch.equal(
        weights["embeddings.word.weight"], theirs["bert.embeddings.word_embeddings.weight"]
    )
    layer = theirs["bert.encoder.layer.1.output.LayerNorm.weight"]
    assert torch.equal(weights["discriminator.layers.1.ffn_norm.weight"], layer)
    assert torch.equal(
        weights["generator.layers.1.ffn_norm.weight"], layer
    )  # cut to its two layers
    assert torch.equal(weights["generator_head.bias"], theirs["cls.predictions.bias"])
    assert all(name.startswith("discriminator_head.") for name in report.initialized)
    reasons = {name.split(": ")[1]: reason for name, reason in report.unused.items()}
    assert "pooler" in reasons["bert.pooler.dense.weight"]
    assert "next-sentence" in reasons["cls.seq_relationship.weight"]
    assert not any("no parameter corresponds" in reason for reason in reasons.values())
    report, _ = imported(tmp_path / "bert", tmp_path / "other")  # tiny's own generator is wider
    assert {name.split(".")[0] for name in report.initialized} == {
        "discriminator_head",
        "generator",
        "generator_head",
    }
    assert not any("the other part" in warning for warning in report.warnings)


def test_unsupported_models_and_vocabularies_are_refused(tmp_path):
    _, folder = exported(tmp_path)
    part = folder / "discriminator"
    config = read_json(part / "config.json")
    (part / "config.json").write_text(json.dumps(config | {"model_type": "roberta"}))
    with pytest.raises(UserError, match=r"'roberta'; expected 'electra' or 'bert'"):
        imported(folder, tmp_path / "i")
    (part / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    with pytest.raises(UserError, match="600 entries, but the model was trained with 500"):
        imported(part, tmp_path / "i")
    (part / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(UserError, match="shape"):
        imported(part, tmp_path / "i")
    (part / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-5}))
    with pytest.raises(UserError, match="layer_norm_eps of discriminator and generator differ"):
        imported(folder, tmp_path / "i")
    (part / "config.json").write_text(json.dumps(config))
    bert(tmp_path / "b")
    with pytest.raises(UserError, match=r"BERT .* initializes both encoders"):
        imported(tmp_path / "b", tmp_path / "i", generator=folder / "generator")
    stored = read_json(part / "tokenizer_config.json")
    (part / "tokenizer_config.json").write_text(
        json.dumps(stored | {"tokenize_chinese_chars": False})
    )
    with pytest.raises(UserError, match="tokenize_chinese_chars = false"):
        imported(part, tmp_path / "i")
    (part / "tokenizer_config.json").write_text(json.dumps(stored))
    (part / "vocab.txt").write_text("".join(f"w{i}\n" for i in range(600)))
    with pytest.raises(UserError, match=r"no \[PAD\]"):
        imported(part, tmp_path / "i")
    with pytest.raises(UserError, match="--config with a TensorFlow"):
        imported(part, tmp_path / "i", config=part / "config.json")
    with pytest.raises(UserError, match="no weights here"):
        imported(tmp_path / "run" / "tokenizer", tmp_path / "i")


def test_pretraining_starts_from_an_import(data, tmp_path):
    state, folder = exported(tmp_path)
    output = run_cli("import", folder, "--out", tmp_path / "i", "--run", "tiny").stdout
    assert " 0 initialized, " in output and len(output.splitlines()) < 8
    listed = read_json(tmp_path / "i" / "import.json")["read"]
    assert ["generator: generator_lm_head.bias", "generator_head.bias"] in listed
    data = with_vocabulary(data, tmp_path / "i" / "tokenizer", tmp_path / "data")
    run = ["pretrain", tmp_path / "i" / "config.json", "--data", data, "--out", tmp_path / "o"]
    sets = [
        "--set=train.total_steps=1",
        "--set=train.eval_rows=16",
        "--set=logging.tensorboard=false",
    ]
    run_cli(*run, "--init-from", tmp_path / "i", *sets)
    # The learning rate of the first step is 0: the weights are still the imported ones.
    assert equal(checkpoint.weights(tmp_path / "o" / "ckpt" / "final"), state)


def test_an_imported_tensorflow_checkpoint_gives_the_logits_of_the_authors_code(tmp_path):
    pytest.importorskip("tensorflow", reason="the extra [tf] is not installed")
    source = SHARED / "shared_small"
    if not source.exists():
        pytest.skip("needs the shared TensorFlow checkpoint")
    report, _ = imported(source, tmp_path / "i", tokenizer=SHARED / "vocab.txt")
    assert not report.initialized and not report.unused and not report.warnings
    module, config = load_objective(tmp_path / "i" / "ckpt" / "0")
    assert (config.model.num_heads, config.generator.num_heads) == (2, 1)
    values = np.load(source / "reference.npz")
    ref = {
        k: torch.tensor(values[k]).long() for k in ("disc_input_ids", "segment_ids", "input_mask")
    }
    positions, none = (
        torch.arange(ref["input_mask"].shape[1]).expand_as(ref["input_mask"]),
        torch.zeros(1, 1),
    )
    batch = Batch(
        ref["disc_input_ids"],
        ref["segment_ids"],
        ref["input_mask"],
        positions,
        positions[:, :1],
        none,
        none > 0,
        none,
    )
    probabilities = module.discriminate(ref["disc_input_ids"], batch).sigmoid()
    real = ref["input_mask"] > 0
    assert float((probabilities - torch.tensor(values["disc_probs"]))[real].abs().max()) <= 1e-5


def test_a_tensorflow_checkpoint_without_tensorflow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow.train", None)
    (tmp_path / "tf").mkdir()
    (tmp_path / "tf" / "model.ckpt.index").touch()
    with pytest.raises(UserError, match=r"electra_ds\[tf\]"):
        imported(tmp_path / "tf", tmp_path / "i")
