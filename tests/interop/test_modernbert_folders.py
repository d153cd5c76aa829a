"""Folders of ModernBERT: export, load and import of runs, fine-tuned models and stock folders."""

import json
import re
from pathlib import Path

import pytest
import run_folders
import torch
from running import read_json
from safetensors.torch import load_file, save_file
from stock_folders import (
    LIKE_STOCK,
    SETS,
    assert_close,
    equal,
    exported_run,
    run_card,
    stock_model,
)

from electra_ds.common.errors import UserError
from electra_ds.config.loading import load_run
from electra_ds.evaluation.detect import Detector
from electra_ds.interop.export import export
from electra_ds.interop.import_weights import import_weights
from electra_ds.interop.load_model import load, load_objective, load_pretrained
from electra_ds.model.weights import true_state
from electra_ds.training import checkpoint
from electra_ds.training.checkpoint import find_checkpoint

transformers = pytest.importorskip("transformers")
MODERN = {"architecture": "modernbert"}


def exported(folder: Path, sharing: str = "shared", kind: str = "electra"):
    """(module of a run, the folder that `export` wrote)."""
    return exported_run(folder, sharing, kind, **MODERN)


# ------------------------------------------------------------------------------- export and load


@torch.no_grad()
@pytest.mark.parametrize("sharing", ["shared", "untied", "all", "gdes"])
def test_an_exported_run_has_equal_logits_and_is_loaded(sharing, tmp_path):
    _, folder = exported(tmp_path, sharing)
    ids, mask, _ = run_folders.rows_with_padding()
    run, both = load(tmp_path / "run"), load(folder)
    for part in ("discriminator", "generator"):
        ours = getattr(run, part)(ids, None, mask)
        theirs = stock_model(folder / part)(ids, attention_mask=mask).logits
        assert_close(ours, theirs[..., 0] if part == "discriminator" else theirs, mask)
        assert torch.equal(getattr(both, part)(ids, None, mask), ours)
        assert type(transformers.AutoModel.from_pretrained(folder / part)).__name__ == (
            "ModernBertModel"
        )
    alone = load(folder / "discriminator")
    assert alone.generator is None
    assert torch.equal(alone.discriminator(ids, None, mask), run.discriminator(ids, None, mask))
    config = read_json(folder / "discriminator" / "config.json")
    assert config["architectures"] == ["ModernBertForTokenClassification"]
    assert config["id2label"] == {"0": "replaced"} and config["pad_token_id"] == 0
    assert read_json(folder / "generator" / "config.json").get("id2label") is None


def test_the_tokenizer_of_an_export_returns_no_token_types(tmp_path):
    _, folder = exported(tmp_path)
    for part in ("discriminator", "generator"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / part)
        a, b = load(tmp_path / "run").tokenizer.encode_batch(["aa ab", "ac"])
        pair = tokenizer("aa ab", "ac")
        ids = run_folders.IDS
        assert list(pair) == ["input_ids", "attention_mask"]
        assert pair["input_ids"] == [ids["cls"], *a, ids["sep"], *b, ids["sep"]]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mlm", "replace_mlm", "all_tokens_mlm", "electra_15"])
def test_the_main_encoder_of_every_objective_is_exported_and_imported(kind, tmp_path):
    module, folder = exported(tmp_path, kind=kind)
    assert (folder / "generator").exists() == (kind != "mlm")
    model = stock_model(folder / "discriminator")
    predicts = kind != "electra_15"
    assert type(model).__name__ == (
        "ModernBertForMaskedLM" if predicts else "ModernBertForTokenClassification"
    )
    ids, mask, _ = run_folders.rows_with_padding()
    theirs = model(ids, attention_mask=mask).logits
    ours = load(tmp_path / "run").discriminator(ids, None, mask)
    assert_close(ours, theirs if predicts else theirs[..., 0], mask)
    sets = [*SETS, f"objective.kind={kind}"]
    report = import_weights(folder, tmp_path / "i", "modern-tiny", sets)
    weights = checkpoint.weights(find_checkpoint(tmp_path / "i"))
    state = {n: t for n, t in true_state(module).items() if not n.startswith("copy_gate")}
    assert equal(state, {n: t for n, t in weights.items() if not n.startswith("copy_gate")})
    assert all(name.startswith("copy_gate") for name in report.initialized)


@torch.no_grad()
@pytest.mark.parametrize("name", run_folders.TASKS)
def test_an_exported_fine_tuned_model_has_equal_logits(name, tmp_path):
    parts = run_folders.fine_tuned(tmp_path / "seed-0", name, **MODERN)
    export(tmp_path / "seed-0", tmp_path / "out")
    ids, mask, _ = run_folders.rows_with_padding()
    ours = parts["head"](load(tmp_path / "seed-0").discriminator.encode(ids, None, mask))
    per_token = name == "token_classification"
    model = stock_model(tmp_path / "out")
    logits = model(ids, attention_mask=mask).logits
    if name == "regression":
        ours = 1.0 + 4.0 * ours  # in the unit of the labels
    if per_token:
        assert_close(ours, logits, mask)
    else:
        assert_close(ours[:, 0], logits, torch.ones(3))
    kind = "TokenClassification" if per_token else "SequenceClassification"
    assert type(model).__name__ == f"ModernBertFor{kind}"
    assert model.config.id2label == dict(enumerate(run_folders.TASKS[name]["labels"] or ["own"]))
    assert load_pretrained(tmp_path / "out").model.hidden_size == 48
    assert load(tmp_path / "out").discriminator.head is None or per_token
    assert run_card(tmp_path / "out").strip()


def test_the_code_of_the_cards_of_a_run_runs_as_printed(tmp_path):
    _, folder = exported(tmp_path)
    probabilities = eval(run_card(folder / "discriminator"))
    assert probabilities[0][0] == "[CLS]" and all(0 < p < 1 for _, p in probabilities)
    assert run_card(folder / "generator").strip()
    card = (folder / "discriminator" / "README.md").read_text()
    assert "- modernbert\n" in card and "| needs |" not in card


def test_a_pattern_that_transformers_4_lacks_is_said_in_the_card(tmp_path, monkeypatch):
    sizes = {**run_folders.MODERN_SIZES["model"], "attention_pattern": ["local", "global"]}
    monkeypatch.setitem(run_folders.MODERN_SIZES, "model", sizes)
    _, folder = exported(tmp_path)
    for part in ("discriminator", "generator"):
        assert "| needs | transformers 5: " in (folder / part / "README.md").read_text()
        assert read_json(folder / part / "config.json")["global_attn_every_n_layers"] is None


def test_load_pretrained_and_detect_read_the_same_encoder(tmp_path):
    module, folder = exported(tmp_path)
    state = {
        name: tensor
        for name, tensor in true_state(module).items()
        if name.startswith(("embeddings.", "discriminator."))
    }
    bare = tmp_path / "bare"
    transformers.AutoModel.from_pretrained(folder / "discriminator").save_pretrained(bare)
    words = tmp_path / "run" / "tokenizer"
    for path, tokenizer in ((tmp_path / "run", None), (folder, None), (bare, words)):
        assert equal(load_pretrained(path, tokenizer).state, state), path
    assert load_pretrained(folder).trained_length == 32
    scores = Detector.load(tmp_path / "run")("aa ab ac")
    assert len(scores) == 3 and all(0 < score.probability < 1 for score in scores)


# ----------------------------------------------------------------------------------------- import


@pytest.mark.parametrize("sharing", ["shared", "untied", "all"])
def test_export_then_import_is_bit_equal(sharing, tmp_path):
    module, folder = exported(tmp_path, sharing)
    report = import_weights(folder, tmp_path / "i", "modern-tiny", SETS)
    assert equal(true_state(module), checkpoint.weights(find_checkpoint(tmp_path / "i")))
    assert not report.initialized and not report.warnings
    imported, config = load_objective(tmp_path / "i" / "ckpt" / "0")
    assert equal(true_state(imported), true_state(module))
    model = run_folders.config(sharing, **MODERN).model
    assert config.model == model
    parts = ("discriminator", "generator")
    tensors = sum(len(load_file(folder / part / "model.safetensors")) for part in parts)
    assert len(report.loaded) + len(report.unused) == tensors


def test_a_discriminator_alone_keeps_its_head(tmp_path):
    module, folder = exported(tmp_path)
    sets = [*SETS, "generator.hidden_size=48"]
    report = import_weights(folder / "discriminator", tmp_path / "i", "modern-tiny", sets)
    assert {name.split(".")[0] for name in report.initialized} == {"generator", "generator_head"}
    weights = checkpoint.weights(find_checkpoint(tmp_path / "i"))
    kept = {n: t for n, t in true_state(module).items() if n.startswith(("disc", "embed"))}
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())
    with pytest.raises(UserError, match=r"hidden_size 128 differs .* set model.sharing = untied"):
        import_weights(folder / "discriminator", tmp_path / "j", "modern-tiny", SETS)
    sets = [*SETS, "model.sharing=untied"]
    import_weights(folder / "discriminator", tmp_path / "j", "modern-tiny", sets)
    assert read_json(tmp_path / "j" / "config.json")["model"]["sharing"] == "untied"


def masked_lm(folder: Path, **sizes) -> dict[str, torch.Tensor]:
    """Write a ModernBertForMaskedLM with its vocabulary; its tensors."""
    torch.manual_seed(3)
    values = dict(
        vocab_size=600,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
        local_attention=10,
        **{f"{role}_token_id": i for role, i in run_folders.IDS.items()},
    )
    config = transformers.ModernBertConfig(**(values | sizes))
    model = run_folders.drawn(transformers.ModernBertForMaskedLM(config))
    model.save_pretrained(folder)
    run_folders.vocabulary(folder)
    return model.state_dict()


@pytest.mark.parametrize("sharing", ["shared", "untied"])
def test_a_masked_lm_starts_both_encoders(sharing, tmp_path):
    theirs = masked_lm(tmp_path / "stock")
    sets = [*SETS, *LIKE_STOCK, f"model.sharing={sharing}"]
    report = import_weights(tmp_path / "stock", tmp_path / "i", "modern-tiny", sets)
    weights = checkpoint.weights(find_checkpoint(tmp_path / "i"))
    expected = {
        "embeddings.word.weight": "model.embeddings.tok_embeddings.weight",
        "discriminator.layers.3.ffn_in.weight": "model.layers.3.mlp.Wi.weight",
        "discriminator.final_norm.weight": "model.final_norm.weight",
        "generator.layers.1.qkv.weight": "model.layers.1.attn.Wqkv.weight",
        "generator.final_norm.weight": "model.final_norm.weight",
        "generator_head.dense.weight": "head.dense.weight",
        "generator_head.bias": "decoder.bias",
    }
    if sharing == "untied":
        expected["generator_embeddings.norm.weight"] = "model.embeddings.norm.weight"
    for ours, foreign in expected.items():
        assert torch.equal(weights[ours], theirs[foreign]), ours
    assert all(name.startswith("discriminator_head.") for name in report.initialized)
    assert not report.unused and "the other part" not in report.warnings[0]
    config = read_json(tmp_path / "i" / "config.json")
    assert config["model"]["local_attention"] == 10
    assert config["model"]["attention_pattern"] == ["global", "local", "local"]
    assert config["generator"]["num_layers"] == 2


def test_a_generator_of_another_width_is_initialized(tmp_path):
    masked_lm(tmp_path / "stock")
    sets = [*SETS, "model.sharing=untied"]  # the generator of modern-tiny is 128 wide
    report = import_weights(tmp_path / "stock", tmp_path / "i", "modern-tiny", sets)
    parts = {name.split(".")[0] for name in report.initialized}
    assert parts == {"generator", "generator_embeddings", "generator_head", "discriminator_head"}
    reason = "language-modelling head: this run has no such head of the same size"
    assert set(report.unused) == {
        f"stock: {name}" for name in ("head.dense.weight", "head.norm.weight", "decoder.bias")
    }
    assert set(report.unused.values()) == {reason}
    assert len(report.warnings) == 1


def test_the_default_run_of_a_modernbert_folder_is_modern_small(tmp_path):
    preset = load_run("modern-small")
    sizes = dict(hidden_size=preset.model.hidden_size, num_hidden_layers=1, num_attention_heads=6)
    masked_lm(tmp_path / "stock", **sizes, intermediate_size=576, max_position_embeddings=1024)
    import_weights(tmp_path / "stock", tmp_path / "i")
    config = read_json(tmp_path / "i" / "config.json")
    assert config["optimizer"] == preset.optimizer.model_dump(mode="json")
    assert config["model"]["num_layers"] == 1


@pytest.mark.parametrize(
    ("kind", "labels"),
    [("SequenceClassification", 1), ("SequenceClassification", 3), ("TokenClassification", 3)],
)
def test_heads_of_tasks_are_listed_as_unused(kind, labels, tmp_path):
    masked_lm(tmp_path / "stock")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "stock", num_labels=labels)
    model = getattr(transformers, f"ModernBertFor{kind}")(config)
    run_folders.drawn(model).save_pretrained(tmp_path / "stock")
    report = import_weights(tmp_path / "stock", tmp_path / "i", "modern-tiny", [*SETS, *LIKE_STOCK])
    names = ("classifier.bias", "classifier.weight", "head.dense.weight", "head.norm.weight")
    assert report.unused == {f"stock: {name}": "head of a task" for name in names}
    assert load(tmp_path / "stock").discriminator.head is None


def test_both_styles_of_config_json_give_the_same_run(tmp_path):
    theirs = masked_lm(tmp_path / "stock", global_rope_theta=300.0, local_rope_theta=30.0)
    path = tmp_path / "stock" / "config.json"
    written = read_json(path)
    newer = {
        "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 300.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        },
    }
    older = dict(global_attn_every_n_layers=3, global_rope_theta=300.0, local_rope_theta=30.0)
    stated = {k: v for k, v in written.items() if k not in {**newer, **older}}
    found = []
    for i, style in enumerate((newer, older)):
        path.write_text(json.dumps(stated | style))
        import_weights(tmp_path / "stock", tmp_path / f"i{i}", "modern-tiny", [*SETS, *LIKE_STOCK])
        found.append(read_json(tmp_path / f"i{i}" / "config.json")["model"])
    assert found[0] == found[1]
    assert (found[0]["global_theta"], found[0]["local_theta"]) == (300.0, 30.0)
    assert torch.equal(
        load_pretrained(tmp_path / "stock").state["embeddings.word.weight"],
        theirs["model.embeddings.tok_embeddings.weight"],
    )
    path.write_text(json.dumps(stated | older | {"local_rope_theta": None}))
    assert load_pretrained(tmp_path / "stock").model.local_theta == 300.0  # as in version 4


def test_settings_of_positions_may_be_changed_and_sizes_not(tmp_path):
    masked_lm(tmp_path / "stock")
    longer = [*SETS, *LIKE_STOCK, "model.max_positions=4096", "model.global_theta=160000"]
    import_weights(tmp_path / "stock", tmp_path / "i", "modern-tiny", longer)
    model = read_json(tmp_path / "i" / "config.json")["model"]
    assert (model["max_positions"], model["global_theta"]) == (4096, 160_000)
    for setting in ("model.num_layers=7", 'model.attention_pattern=["global"]'):
        with pytest.raises(UserError, match="which cannot be changed"):
            sets = [*SETS, *LIKE_STOCK, setting]
            import_weights(tmp_path / "stock", tmp_path / "j", "modern-tiny", sets)


# --------------------------------------------------------------------------------------- refusals


def readers(out: Path):
    return (
        load_pretrained,
        load,
        lambda folder: import_weights(folder, out, "modern-tiny", [*SETS, *LIKE_STOCK]),
    )


DEFAULT = {"rope_type": "default", "rope_theta": 300.0}
REFUSED = {
    "another activation": (
        {"hidden_activation": "silu"},
        "hidden_activation = 'silu'; only 'gelu'",
    ),
    "of the head": ({"classifier_activation": "relu"}, "classifier_activation = 'relu'; only"),
    "norm_bias": ({"norm_bias": True}, "norm_bias = True; only False is supported"),
    "attention_bias": ({"attention_bias": True}, "attention_bias = True; only False"),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias = True; only False"),
    "classifier_bias": ({"classifier_bias": True}, "classifier_bias = True; only False"),
    "decoder_bias": ({"decoder_bias": False}, "decoder_bias = False; only True"),
    "scaled positions": (
        {"rope_parameters": {"full_attention": DEFAULT | {"rope_type": "yarn", "factor": 4.0}}},
        r"full_attention: found rope_type = 'yarn', factor = 4\.0; expected rope_type = 'default'",
    ),
    "positions in the style of version 4": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling: found type = 'linear', factor = 2.0; expected",
    ),
    "one base for all layers": ({"rope_parameters": DEFAULT}, "rope_type: unknown key"),
    "a base of 0": (
        {"rope_parameters": {"full_attention": {"rope_theta": 0.0}}},
        r"full_attention\.rope_theta = 0\.0",
    ),
    "no global layer": (
        {"layer_types": ["sliding_attention"] * 4},
        "layer_types: no layer has full_attention; a model needs one global layer",
    ),
    "an unknown kind of layer": (
        {"layer_types": ["full_attention", "linear_attention"] * 2},
        "layer_types: found 'linear_attention'; expected full_attention or sliding_attention",
    ),
    "too few kinds of layers": (
        {"layer_types": ["full_attention"]},
        "layer_types has 1 entries; expected num_hidden_layers = 4",
    ),
    "nothing about the layers": (
        {"layer_types": None, "global_attn_every_n_layers": None},
        "null without layer_types",
    ),
    "DeBERTa": (
        {"model_type": "deberta"},
        "model_type = 'deberta'; expected 'electra' or .*'modernbert' or .*; use a model of such",
    ),
    "RoBERTa": ({"model_type": "roberta"}, "model_type = 'roberta'; expected 'electra' or"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_encoder_does_not_have_is_refused_by_every_reader(name, tmp_path):
    masked_lm(tmp_path / "stock")
    change, part = REFUSED[name]
    path = tmp_path / "stock" / "config.json"
    path.write_text(json.dumps(read_json(path) | change))
    for reader in readers(tmp_path / "i"):
        with pytest.raises(UserError, match=part) as caught:
            reader(tmp_path / "stock")
        assert "config.json" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "i").exists()


VALUES = {
    "num_attention_heads": [5, 64, 0, "2", None, 2.0],  # 64: heads of width 1
    "hidden_size": [64.0, -1, 10**18],
    "num_hidden_layers": [3, 5, 10**7, 10**15],
    "intermediate_size": [0, 95, 10**15],
    "vocab_size": [10**15, "600", -1],
    "mlp_dropout": [1.0, 0.999999, -0.1, "x"],
    "norm_eps": [0, "1e-5", None],
    "local_attention": [0, 1, "128", 10**12],
    "sliding_window": [0, "64", 10**12],
    "layer_types": [[], "full_attention", {}, [1, 2, 3, 4], [["full_attention"]] * 4],
    "rope_parameters": [
        [],
        "default",
        {"full_attention": 3},
        {"full_attention": {"type": 3}},
        {"full_attention": {"rope_theta": 1e-300}},
    ],
    "max_position_embeddings": [10**12, 0, 31],  # 31: the rows of the run have 32 tokens
    "architectures": [3],
    "model_type": [None, 3, ["modernbert"]],
}


@pytest.mark.parametrize("key", VALUES)
def test_a_config_of_impossible_values_is_refused_or_read(key, tmp_path):
    masked_lm(tmp_path / "stock")
    path = tmp_path / "stock" / "config.json"
    config = read_json(path)
    for value in VALUES[key]:
        path.write_text(json.dumps(config | {key: value}))
        *loaders, importer = readers(tmp_path / "i")
        if key == "architectures":  # it decides between two heads only
            load_pretrained(tmp_path / "stock")
            continue
        for reader in (importer,) if value == 31 else (*loaders, importer):
            with pytest.raises(UserError) as caught:
                reader(tmp_path / "stock")
            assert len(str(caught.value)) < 600, value
    assert not (tmp_path / "i").exists()


@torch.no_grad()
def test_a_sliding_window_has_the_meaning_of_transformers(tmp_path):
    masked_lm(tmp_path / "stock")
    path = tmp_path / "stock" / "config.json"
    config = read_json(path)
    ids, mask, _ = run_folders.rows_with_padding()
    found = []
    for value in (1, 3):
        path.write_text(json.dumps(config | {"sliding_window": value}))
        theirs = stock_model(tmp_path / "stock")
        ours = load(tmp_path / "stock").generator(ids, None, mask)
        assert_close(ours, theirs(ids, attention_mask=mask).logits, mask)
        found.append(ours)
    assert not torch.equal(*found)


@pytest.mark.parametrize("key", ["global_rope_theta", "local_rope_theta"])
def test_older_bases_of_impossible_values_are_refused(key, tmp_path):
    masked_lm(tmp_path / "stock")
    path = tmp_path / "stock" / "config.json"
    config = {k: v for k, v in read_json(path).items() if k != "rope_parameters"}
    for value in (0, -1.0, 1e-300, "10000", 1e300):
        path.write_text(json.dumps(config | {key: value}))
        for reader in readers(tmp_path / "i"):
            with pytest.raises(UserError, match=r"theta = "):
                reader(tmp_path / "stock")


def test_damaged_weights_are_refused(tmp_path):
    masked_lm(tmp_path / "stock")
    file = tmp_path / "stock" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.attn.Wqkv.weight"
    for changed, part in (
        ({k: t for k, t in tensors.items() if "layers.3." not in k}, "have 3 layers"),
        (tensors | {"model.layers.4.mlp.Wo.weight": torch.zeros(64, 96)}, "have 5 layers"),
        (tensors | {name: tensors[name][:4].clone()}, "has shape"),
        (tensors | {name: tensors[name].to(torch.int8)}, "quantized weights are not read"),
        (tensors | {name: tensors[name] * float("nan")}, "not finite"),
        ({k: t for k, t in tensors.items() if k != "model.final_norm.weight"}, "final_norm"),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        for reader in readers(tmp_path / "i"):
            with pytest.raises(UserError, match=part):
                reader(tmp_path / "stock")
    assert not (tmp_path / "i").exists()


def test_a_run_of_the_other_architecture_is_refused_in_one_sentence(tmp_path):
    masked_lm(tmp_path / "stock")
    with pytest.raises(UserError) as caught:
        import_weights(tmp_path / "stock", tmp_path / "i", "tiny", SETS)
    assert re.fullmatch(
        r"--run tiny: model\.architecture = electra, but the weights in .* need modernbert: use a "
        r"run of it, such as --run modern-small",
        str(caught.value),
    )
    run_folders.pretrained(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf")
    with pytest.raises(UserError, match=r"need electra: use a run of it, such as --run small"):
        import_weights(tmp_path / "hf", tmp_path / "i", "modern-tiny", SETS)


def test_parts_that_do_not_fit_together_are_refused(tmp_path):
    _, folder = exported(tmp_path)
    path = folder / "generator" / "config.json"
    config = read_json(path)
    for change, part in (
        ({"local_attention": 16}, r"local_attention of discriminator and generator differ \(8 and"),
        ({"rope_parameters": {}}, "global_rope_theta of discriminator"),
        ({"layer_types": ["full_attention"] * 2}, "have different patterns"),
        ({"model_type": "electra"}, "model_type = 'electra'; expected 'modernbert'"),
    ):
        other = {"global_rope_theta": 7.0} if "rope_parameters" in change else {}
        path.write_text(json.dumps(config | change | other))
        with pytest.raises(UserError, match=part):
            import_weights(folder, tmp_path / "i", "modern-tiny", SETS)
