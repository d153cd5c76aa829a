"""Folders of DeBERTa-v2: export, load and import of runs, fine-tuned models and stock folders."""

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
from electra_ds.interop.hf_deberta_v2 import MICROSOFT_HEAD
from electra_ds.interop.import_weights import import_weights
from electra_ds.interop.load_model import load, load_objective, load_pretrained
from electra_ds.model.weights import true_state
from electra_ds.training import checkpoint
from electra_ds.training.checkpoint import find_checkpoint

transformers = pytest.importorskip("transformers")
DEBERTA = {"architecture": "deberta_v2"}


def exported(folder: Path, sharing: str = "shared", kind: str = "electra"):
    """(module of a run, the folder that `export` wrote)."""
    return exported_run(folder, sharing, kind, **DEBERTA)


def accounted(report) -> int:
    """Number of foreign tensors in the report of an import; query, key and value are one of ours."""
    return sum(1 + label.count(", ") for label, _ in report.loaded) + len(report.unused)


def token_logits(model, ids, mask):
    """Logits of every token: [B, S] of a discriminator, as in its card, or [B, S, V]."""
    if not hasattr(model, "pooler"):
        return model(ids, attention_mask=mask).logits
    hidden = model.deberta(ids, attention_mask=mask).last_hidden_state
    return model.classifier(model.pooler(hidden.flatten(0, 1)[:, None])).view(ids.shape)


# ------------------------------------------------------------------------------- export and load


@torch.no_grad()
@pytest.mark.parametrize("sharing", ["shared", "untied", "all"])
def test_an_exported_run_has_equal_logits_and_is_loaded(sharing, tmp_path):
    _, folder = exported(tmp_path, sharing)
    ids, mask, _ = run_folders.rows_with_padding()
    run, both = load(tmp_path / "run"), load(folder)
    for part in ("discriminator", "generator"):
        ours = getattr(run, part)(ids, None, mask)
        theirs = token_logits(stock_model(folder / part), ids, mask)
        assert_close(ours, theirs, mask)
        assert torch.equal(getattr(both, part)(ids, None, mask), ours)
        assert type(transformers.AutoModel.from_pretrained(folder / part)).__name__ == (
            "DebertaV2Model"
        )
    alone = load(folder / "discriminator")
    assert alone.generator is None
    assert torch.equal(alone.discriminator(ids, None, mask), run.discriminator(ids, None, mask))
    config = read_json(folder / "discriminator" / "config.json")
    assert config["architectures"] == ["DebertaV2ForSequenceClassification"]
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
        "DebertaV2ForMaskedLM" if predicts else "DebertaV2ForSequenceClassification"
    )
    ids, mask, _ = run_folders.rows_with_padding()
    ours = load(tmp_path / "run").discriminator(ids, None, mask)
    assert_close(ours, token_logits(model, ids, mask), mask)
    sets = [*SETS, f"objective.kind={kind}"]
    report = import_weights(folder, tmp_path / "i", "deberta-tiny", sets)
    weights = checkpoint.weights(find_checkpoint(tmp_path / "i"))
    state = {n: t for n, t in true_state(module).items() if not n.startswith("copy_gate")}
    assert equal(state, {n: t for n, t in weights.items() if not n.startswith("copy_gate")})
    assert all(name.startswith("copy_gate") for name in report.initialized)


@torch.no_grad()
@pytest.mark.parametrize("name", run_folders.TASKS)
def test_an_exported_fine_tuned_model_has_equal_logits(name, tmp_path):
    parts = run_folders.fine_tuned(tmp_path / "seed-0", name, **DEBERTA)
    export(tmp_path / "seed-0", tmp_path / "out")
    ids, mask, _ = run_folders.rows_with_padding()
    ours = parts["head"](load(tmp_path / "seed-0").discriminator.encode(ids, None, mask))
    per_token = name in ("token_classification", "many classes")
    model = stock_model(tmp_path / "out")
    logits = model(ids, attention_mask=mask).logits
    if name == "regression":
        ours = 1.0 + 4.0 * ours  # in the unit of the labels
    if per_token:  # of many classes the logits at [CLS] are those of the text
        assert_close(ours, logits, mask)
    else:
        assert_close(ours[:, 0], logits, torch.ones(3))
    kind = "TokenClassification" if per_token else "SequenceClassification"
    assert type(model).__name__ == f"DebertaV2For{kind}"
    assert model.config.id2label == dict(enumerate(run_folders.TASKS[name]["labels"] or ["own"]))
    assert load_pretrained(tmp_path / "out").model.hidden_size == 48
    assert load(tmp_path / "out").discriminator.head is None
    assert run_card(tmp_path / "out").strip()


def test_the_code_of_the_cards_of_a_run_runs_as_printed(tmp_path):
    _, folder = exported(tmp_path)
    probabilities = eval(run_card(folder / "discriminator"))
    assert probabilities[0][0] == "[CLS]" and all(0 < p < 1 for _, p in probabilities)
    assert run_card(folder / "generator").strip()
    card = (folder / "discriminator" / "README.md").read_text()
    assert "- deberta-v2\n" in card and "| needs |" not in card


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
    report = import_weights(folder, tmp_path / "i", "deberta-tiny", SETS)
    assert equal(true_state(module), checkpoint.weights(find_checkpoint(tmp_path / "i")))
    assert not report.initialized and not report.warnings
    imported, config = load_objective(tmp_path / "i" / "ckpt" / "0")
    assert equal(true_state(imported), true_state(module))
    model = run_folders.config(sharing, **DEBERTA).model
    assert config.model == model
    parts = ("discriminator", "generator")
    tensors = sum(len(load_file(folder / part / "model.safetensors")) for part in parts)
    assert accounted(report) == tensors


def test_a_discriminator_alone_keeps_its_head(tmp_path):
    module, folder = exported(tmp_path)
    sets = [*SETS, "generator.hidden_size=48"]
    report = import_weights(folder / "discriminator", tmp_path / "i", "deberta-tiny", sets)
    assert {name.split(".")[0] for name in report.initialized} == {"generator", "generator_head"}
    weights = checkpoint.weights(find_checkpoint(tmp_path / "i"))
    kept = {n: t for n, t in true_state(module).items() if n.startswith(("disc", "embed"))}
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())
    with pytest.raises(UserError, match=r"hidden_size 128 differs .* set model.sharing = untied"):
        import_weights(folder / "discriminator", tmp_path / "j", "deberta-tiny", SETS)
    sets = [*SETS, "model.sharing=untied"]
    import_weights(folder / "discriminator", tmp_path / "j", "deberta-tiny", sets)
    assert read_json(tmp_path / "j" / "config.json")["model"]["sharing"] == "untied"


def masked_lm(folder: Path, **sizes) -> dict[str, torch.Tensor]:
    """Write a DebertaV2ForMaskedLM with its vocabulary; its tensors."""
    torch.manual_seed(3)
    values = dict(
        vocab_size=600,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
        position_buckets=8,
        relative_attention=True,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        pos_att_type="p2c|c2p",
        **{f"{role}_token_id": i for role, i in run_folders.IDS.items()},
    )
    config = transformers.DebertaV2Config(**(values | sizes))
    model = run_folders.drawn(transformers.DebertaV2ForMaskedLM(config))
    model.save_pretrained(folder)
    run_folders.vocabulary(folder)
    return model.state_dict()


def microsoft(folder: Path, *heads: str, pickled: bool = False) -> dict[str, torch.Tensor]:
    """Write a folder as Microsoft's: their names, a position table that is not used; its tensors."""
    names = {stock: theirs for theirs, stock in MICROSOFT_HEAD.items()}
    tensors = {}
    for name, tensor in masked_lm(folder).items():
        for stock, theirs in names.items():
            name = name.replace(stock, theirs)
        tensors[name] = tensor
    extra = {
        "mask_predictions.dense.weight": torch.randn(64, 64),
        "mask_predictions.dense.bias": torch.randn(64),
        "mask_predictions.LayerNorm.weight": torch.randn(64),
        "mask_predictions.LayerNorm.bias": torch.randn(64),
        "mask_predictions.classifier.weight": torch.randn(1, 64),
        "mask_predictions.classifier.bias": torch.randn(1),
        "deberta.embeddings.position_embeddings.weight": torch.randn(64, 64),
    }
    kept = {
        name: tensor.contiguous().clone()
        for name, tensor in (tensors | extra).items()
        if name.startswith(("deberta.", *heads))
    }
    (folder / "model.safetensors").unlink()
    if pickled:
        torch.save(kept, folder / "pytorch_model.bin")
    else:
        save_file(kept, folder / "model.safetensors")
    path = folder / "config.json"
    config = read_json(path) | {"pos_att_type": "p2c|c2p", "max_relative_positions": -1}
    for key in ("architectures", "legacy", "id2label", "pooler_hidden_act", "transformers_version"):
        config.pop(key, None)
    path.write_text(json.dumps(config))
    return kept


@pytest.mark.parametrize("sharing", ["shared", "untied"])
def test_a_masked_lm_starts_both_encoders(sharing, tmp_path):
    theirs = masked_lm(tmp_path / "stock")
    sets = [*SETS, *LIKE_STOCK, f"model.sharing={sharing}"]
    report = import_weights(tmp_path / "stock", tmp_path / "i", "deberta-tiny", sets)
    weights = checkpoint.weights(find_checkpoint(tmp_path / "i"))
    expected = {
        "embeddings.word.weight": "deberta.embeddings.word_embeddings.weight",
        "discriminator.layers.3.ffn_in.weight": "deberta.encoder.layer.3.intermediate.dense.weight",
        "discriminator.relative.weight": "deberta.encoder.rel_embeddings.weight",
        "generator.layers.1.out.weight": "deberta.encoder.layer.1.attention.output.dense.weight",
        "generator.relative.weight": "deberta.encoder.rel_embeddings.weight",
        "generator.relative_norm.bias": "deberta.encoder.LayerNorm.bias",
        "generator_head.dense.weight": "cls.predictions.transform.dense.weight",
        "generator_head.bias": "cls.predictions.bias",
    }
    if sharing == "untied":
        expected["generator_embeddings.norm.weight"] = "deberta.embeddings.LayerNorm.weight"
    for ours, foreign in expected.items():
        assert torch.equal(weights[ours], theirs[foreign]), ours
    assert all(name.startswith("discriminator_head.") for name in report.initialized)
    assert not report.unused and "the other part" not in report.warnings[0]
    config = read_json(tmp_path / "i" / "config.json")
    assert config["model"]["position_buckets"] == 8
    assert config["generator"]["num_layers"] == 2


def test_a_generator_of_another_width_is_initialized(tmp_path):
    masked_lm(tmp_path / "stock")
    sets = [*SETS, "model.sharing=untied"]  # the generator of deberta-tiny is 128 wide
    report = import_weights(tmp_path / "stock", tmp_path / "i", "deberta-tiny", sets)
    parts = {name.split(".")[0] for name in report.initialized}
    assert parts == {"generator", "generator_embeddings", "generator_head", "discriminator_head"}
    reason = "language-modelling head: this run has no such head of the same size"
    head = ("transform.dense", "transform.LayerNorm")
    names = [f"{module}.{kind}" for module in head for kind in ("weight", "bias")]
    assert set(report.unused) == {f"stock: cls.predictions.{name}" for name in (*names, "bias")}
    assert set(report.unused.values()) == {reason}
    assert len(report.warnings) == 1


def test_the_default_run_of_a_folder_is_deberta_v3_small(tmp_path):
    preset = load_run("deberta-v3-small")
    sizes = dict(hidden_size=preset.model.hidden_size, num_hidden_layers=1, num_attention_heads=12)
    masked_lm(tmp_path / "stock", **sizes, intermediate_size=576, max_position_embeddings=512)
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
    model = getattr(transformers, f"DebertaV2For{kind}")(config)
    run_folders.drawn(model).save_pretrained(tmp_path / "stock")
    report = import_weights(
        tmp_path / "stock", tmp_path / "i", "deberta-tiny", [*SETS, *LIKE_STOCK]
    )
    names = ["classifier.bias", "classifier.weight"]
    if kind == "SequenceClassification":
        names += ["pooler.dense.bias", "pooler.dense.weight"]
    assert report.unused == {f"stock: {name}": "head of a task" for name in names}
    assert load(tmp_path / "stock").discriminator.head is None


@pytest.mark.parametrize("pickled", [False, True])
def test_a_folder_of_microsoft_with_a_head_that_predicts_tokens_starts_both_encoders(
    pickled, tmp_path
):
    theirs = microsoft(tmp_path / "v3", "lm_predictions.", pickled=pickled)
    report = import_weights(tmp_path / "v3", tmp_path / "i", "deberta-tiny", [*SETS, *LIKE_STOCK])
    weights = checkpoint.weights(find_checkpoint(tmp_path / "i"))
    for ours, foreign in {
        "discriminator.layers.3.ffn_out.bias": "deberta.encoder.layer.3.output.dense.bias",
        "generator.layers.1.ffn_out.bias": "deberta.encoder.layer.1.output.dense.bias",
        "generator_head.dense.weight": "lm_predictions.lm_head.dense.weight",
        "generator_head.norm.bias": "lm_predictions.lm_head.LayerNorm.bias",
        "generator_head.bias": "lm_predictions.lm_head.bias",
    }.items():
        assert torch.equal(weights[ours], theirs[foreign]), ours
    assert {name.split(".")[0] for name in report.initialized} == {"discriminator_head"}
    assert report.unused == {
        "v3: deberta.embeddings.position_embeddings.weight": (
            "position table: position_biased_input = false"
        )
    }
    assert load(tmp_path / "v3").generator is not None


@torch.no_grad()
def test_a_discriminator_of_microsoft_is_imported_with_its_generator(tmp_path):
    """The encoders are taken, their head that detects replaced tokens is accounted for."""
    torch.manual_seed(5)
    main = microsoft(tmp_path / "v3", "lm_predictions.", "mask_predictions.")
    masked_lm(tmp_path / "gen", num_hidden_layers=2)
    report = import_weights(
        tmp_path / "v3", tmp_path / "i", "deberta-tiny", SETS, generator=tmp_path / "gen"
    )
    weights = checkpoint.weights(find_checkpoint(tmp_path / "i"))
    name = "encoder.layer.1.output.dense.weight"
    other = load_file(tmp_path / "gen" / "model.safetensors")[f"deberta.{name}"]
    assert torch.equal(weights["generator.layers.1.ffn_out.weight"], other)
    assert torch.equal(weights["discriminator.layers.1.ffn_out.weight"], main[f"deberta.{name}"])
    config = read_json(tmp_path / "i" / "config.json")
    assert (config["model"]["num_layers"], config["generator"]["num_layers"]) == (4, 2)
    assert {name.split(".")[0] for name in report.initialized} == {"discriminator_head"}
    listed = read_json(tmp_path / "i" / "import.json")["left"]
    heads = [name for name in listed if "mask_predictions" in name]
    assert len(heads) == 6
    assert all("head of our form is initialized" in listed[name] for name in heads)
    assert all(
        "lm_predictions" in name or "mask_" in name or "position" in name
        for name in listed
        if name.startswith("v3: ")
    )
    tensors = len(main) + len(load_file(tmp_path / "gen" / "model.safetensors"))
    assert accounted(report) == tensors


def test_a_sentencepiece_file_of_deberta_gets_its_mask_token(tmp_path):
    """The file has no [MASK]; DeBERTa's programs give it the id after the last piece."""
    import sentencepiece

    words = [f"{a}{b}{c}" for a in "abcde" for b in "fghij" for c in "klmno"]
    (tmp_path / "text").write_text("\n".join(f"{x} {y}" for x in words[:60] for y in words[60:]))
    pieces = dict(pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]")
    numbers = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=48,
        minloglevel=2,
        **pieces,
        **numbers,
    )
    tensors = microsoft(tmp_path / "v3", "mask_predictions.")
    (tmp_path / "v3" / "vocab.txt").unlink()
    (tmp_path / "spm.model").rename(tmp_path / "v3" / "spm.model")
    path = tmp_path / "v3" / "config.json"
    path.write_text(json.dumps(read_json(path) | {"vocab_size": 80}))  # padded, as Microsoft's
    name = "deberta.embeddings.word_embeddings.weight"
    save_file(tensors | {name: tensors[name][:80].clone()}, path.with_name("model.safetensors"))
    found = load_pretrained(tmp_path / "v3")
    assert found.tokenizer.vocab_size == 49 and found.tokenizer.special_ids.mask == 48
    assert found.tokenizer.special_ids.cls == 1
    assert found.state["embeddings.word.weight"].shape == (49, 64)
    sets = [*SETS, "generator.hidden_size=64"]
    import_weights(tmp_path / "v3", tmp_path / "i", "deberta-tiny", sets)
    stock = sentencepiece.SentencePieceProcessor(str(tmp_path / "v3" / "spm.model"))
    (ids,) = load_pretrained(tmp_path / "i").tokenizer.encode_batch(["afk bgl"])
    assert list(ids) == stock.encode("afk bgl")
    export(tmp_path / "i", tmp_path / "hf")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf" / "discriminator")
    assert fast("afk [MASK] bgl")["input_ids"].count(48) == 1
    assert list(fast("afk")) == ["input_ids", "attention_mask"]


def test_a_discriminator_of_microsoft_alone_starts_the_main_encoder(tmp_path):
    main = microsoft(tmp_path / "v3", "mask_predictions.")
    sets = [*SETS, "generator.hidden_size=64"]
    report = import_weights(tmp_path / "v3", tmp_path / "i", "deberta-tiny", sets)
    parts = {name.split(".")[0] for name in report.initialized}
    assert parts == {"discriminator_head", "generator", "generator_head"}
    state = load_pretrained(tmp_path / "v3").state
    table = main["deberta.encoder.rel_embeddings.weight"]
    assert torch.equal(state["discriminator.relative.weight"], table)


@pytest.mark.parametrize("head", ["mask_predictions.", "lm_predictions."])
def test_a_folder_of_microsoft_alone_starts_deltas_of_zero(head, tmp_path):
    main = microsoft(tmp_path / "v3", head)
    sets = [*SETS, "generator.hidden_size=64", "model.sharing=gdes"]
    report = import_weights(tmp_path / "v3", tmp_path / "i", "deberta-tiny", sets)
    weights = checkpoint.weights(find_checkpoint(tmp_path / "i"))
    table = main["deberta.embeddings.word_embeddings.weight"]
    assert torch.equal(weights["generator_embeddings.word.weight"], table)
    assert not weights["embedding_deltas.word.weight"].any()
    name = "v3: deberta.embeddings.word_embeddings.weight"
    assert (name, "generator_embeddings.word.weight") in report.loaded
    assert (name, "embedding_deltas.word.weight") in report.loaded
    assert not any("embedding" in name for name in report.initialized)


def test_max_positions_may_be_changed_and_sizes_not(tmp_path):
    masked_lm(tmp_path / "stock")
    longer = [*SETS, *LIKE_STOCK, "model.max_positions=4096"]
    report = import_weights(tmp_path / "stock", tmp_path / "i", "deberta-tiny", longer)
    (warning,) = [text for text in report.warnings if "model.max_positions" in text]
    assert "model.max_positions 64 -> 4096: the buckets of distances change" in warning
    same = [*SETS, *LIKE_STOCK, "model.max_positions=64"]
    report = import_weights(tmp_path / "stock", tmp_path / "same", "deberta-tiny", same)
    assert not any("model.max_positions" in text for text in report.warnings)
    assert read_json(tmp_path / "i" / "config.json")["model"]["max_positions"] == 4096
    for setting in ("model.num_layers=7", "model.position_buckets=16"):
        with pytest.raises(UserError, match="which cannot be changed"):
            sets = [*SETS, *LIKE_STOCK, setting]
            import_weights(tmp_path / "stock", tmp_path / "j", "deberta-tiny", sets)


# --------------------------------------------------------------------------------------- refusals


def readers(out: Path):
    return (
        load_pretrained,
        load,
        lambda folder: import_weights(folder, out, "deberta-tiny", [*SETS, *LIKE_STOCK]),
    )


REFUSED = {
    "another activation": ({"hidden_act": "silu"}, "hidden_act = 'silu'; only 'gelu' is supported"),
    "no relative positions": (
        {"relative_attention": False},
        "relative_attention = False; only True is supported; use a model",
    ),
    "projections of their own": ({"share_att_key": False}, "share_att_key = False; only True"),
    "absolute positions": (
        {"position_biased_input": True},
        "position_biased_input = True; only False is supported",
    ),
    "token types": ({"type_vocab_size": 2}, "type_vocab_size = 2; only 0 is supported"),
    "no norm": ({"norm_rel_ebd": "none"}, "norm_rel_ebd = 'none'; only 'layer_norm'"),
    "one kind of products": (
        {"pos_att_type": "c2p"},
        r"pos_att_type = 'c2p'; only 'p2c\|c2p' is supported; use a model",
    ),
    "another kind of products": ({"pos_att_type": ["c2p", "p2p"]}, "pos_att_type = "),
    "no kind of products": ({"pos_att_type": None}, "pos_att_type = None; only"),
    "a convolution": (
        {"conv_kernel_size": 3},
        "conv_kernel_size = 3, a convolution after the first layer; only models without one",
    ),
    "no buckets": ({"position_buckets": -1}, "position_buckets: -1: expected an even number"),
    "an odd number of buckets": ({"position_buckets": 7}, "position_buckets: 7: expected an even"),
    "a table of another width": ({"embedding_size": 32}, "embedding_size = 32; expected 64"),
    "heads of another width": (
        {"attention_head_size": 64},
        "attention_head_size = 64; expected 32",
    ),
    "other distances": (
        {"max_relative_positions": 128},
        "max_relative_positions = 128; expected 64, as the other sizes give",
    ),
    "DeBERTa": (
        {"model_type": "deberta"},
        "model_type = 'deberta'; expected 'electra' or .*'deberta-v2'; use a model of such",
    ),
}
MISSING = {  # keys for which the default of the stock class is not supported
    "relative_attention": "relative_attention = False; only True",
    "share_att_key": "share_att_key = False; only True",
    "norm_rel_ebd": "norm_rel_ebd = 'none'; only",
    "position_biased_input": "position_biased_input = True; only",
    "pos_att_type": "pos_att_type = None; only",
    "position_buckets": "position_buckets: -1: expected",
}


@pytest.mark.parametrize("key", MISSING)
def test_a_missing_key_means_the_default_of_the_stock_class(key, tmp_path):
    masked_lm(tmp_path / "stock")
    path = tmp_path / "stock" / "config.json"
    path.write_text(json.dumps({k: v for k, v in read_json(path).items() if k != key}))
    with pytest.raises(UserError, match=MISSING[key]):
        load_pretrained(tmp_path / "stock")


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
    "num_attention_heads": [5, 0, "2", None, 2.0],
    "hidden_size": [64.0, -1, 10**18],
    "num_hidden_layers": [3, 5, 10**7, 10**15],
    "intermediate_size": [0, 95, 10**15],
    "vocab_size": [10**15, "600", -1],
    "hidden_dropout_prob": [1.0, -0.1, "x"],
    "layer_norm_eps": [0, "1e-7", None],
    "position_buckets": [0, 1, "8", 16, 10**12],  # 16: the table has rows for 8
    "pos_att_type": [[], {}, 3, [1, 2], "p2c|c2p|p2p"],
    "conv_kernel_size": ["3", [1]],
    "max_position_embeddings": [10**12, 0, 5, 31],  # 31: the rows of the run have 32 tokens
    "id2label": [3],
    "model_type": [None, 3, ["deberta-v2"]],
}


@pytest.mark.parametrize("key", VALUES)
def test_a_config_of_impossible_values_is_refused_or_read(key, tmp_path):
    masked_lm(tmp_path / "stock")
    path = tmp_path / "stock" / "config.json"
    config = read_json(path)
    for value in VALUES[key]:
        path.write_text(json.dumps(config | {key: value}))
        *loaders, importer = readers(tmp_path / "i")
        if key == "id2label":  # it decides between two heads only
            load_pretrained(tmp_path / "stock")
            continue
        for reader in (importer,) if value == 31 else (*loaders, importer):
            with pytest.raises(UserError) as caught:
                reader(tmp_path / "stock")
            assert len(str(caught.value)) < 600, value
    assert not (tmp_path / "i").exists()


def test_damaged_weights_are_refused(tmp_path):
    masked_lm(tmp_path / "stock")
    file = tmp_path / "stock" / "model.safetensors"
    tensors = load_file(file)
    name = "deberta.encoder.layer.1.attention.self.key_proj.weight"
    layer = "deberta.encoder.layer.4.output.dense.weight"
    relative = "deberta.encoder.rel_embeddings.weight"
    for changed, part in (
        ({k: t for k, t in tensors.items() if "layer.3." not in k}, "have 3 layers"),
        (tensors | {layer: torch.zeros(64, 96)}, "have 5 layers"),
        (tensors | {name: tensors[name][:4].clone()}, "have the shapes"),
        (tensors | {relative: tensors[relative][:4].clone()}, "has shape"),
        (tensors | {relative: tensors[relative].to(torch.int8)}, "quantized weights are not read"),
        (tensors | {name: tensors[name] * float("nan")}, "not finite"),
        ({k: t for k, t in tensors.items() if k != relative}, "rel_embeddings"),
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
        r"--run tiny: model\.architecture = electra, but the weights in .* need deberta_v2: use a "
        r"run of it, such as --run deberta-v3-small",
        str(caught.value),
    )
    run_folders.pretrained(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf")
    with pytest.raises(UserError, match=r"need electra: use a run of it, such as --run small"):
        import_weights(tmp_path / "hf", tmp_path / "i", "deberta-tiny", SETS)


def test_parts_that_do_not_fit_together_are_refused(tmp_path):
    _, folder = exported(tmp_path)
    path = folder / "generator" / "config.json"
    config = read_json(path)
    for change, part in (
        (
            {"position_buckets": 16},
            r"position_buckets of discriminator and generator differ \(8 and",
        ),
        ({"max_position_embeddings": 64}, "max_position_embeddings of discriminator"),
        ({"model_type": "electra"}, "model_type = 'electra'; expected 'deberta-v2'"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=part):
            import_weights(folder, tmp_path / "i", "deberta-tiny", SETS)


def test_a_discriminator_with_another_activation_in_its_head_is_refused(tmp_path):
    _, folder = exported(tmp_path)
    path = folder / "discriminator" / "config.json"
    config = read_json(path)
    path.write_text(json.dumps(config | {"pooler_hidden_act": "tanh"}))
    for reader in readers(tmp_path / "i"):
        with pytest.raises(UserError, match="pooler_hidden_act = 'tanh'; only 'gelu'"):
            reader(folder / "discriminator")
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "pooler_hidden_act"}))
    assert load(folder / "discriminator").discriminator is not None


def test_two_heads_that_predict_tokens_are_refused_unless_equal(tmp_path):
    masked_lm(tmp_path / "stock")
    file = tmp_path / "stock" / "model.safetensors"
    tensors = load_file(file)
    twice = {
        theirs + name.removeprefix(stock): tensors[name].clone()
        for theirs, stock in MICROSOFT_HEAD.items()
        for name in tensors
        if name.startswith(stock)
    }
    save_file(tensors | twice, file, metadata={"format": "pt"})
    importer = readers(tmp_path / "i")[-1]
    report = importer(tmp_path / "stock")
    assert len(twice) == sum("lm_predictions" in name for name in report.unused)
    other = {name: value + 1 for name, value in twice.items()}
    save_file(tensors | other, file, metadata={"format": "pt"})
    for reader in readers(tmp_path / "j"):
        with pytest.raises(UserError, match="the same parameter with different values"):
            reader(tmp_path / "stock")
