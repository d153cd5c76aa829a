"""Import of a run into a deeper or wider config: where each tensor comes from, and what is refused."""

import json
import shutil

import pytest
import run_folders
import torch

from electra_ds.common.errors import UserError
from electra_ds.config.loading import parse_run
from electra_ds.interop.average import average
from electra_ds.interop.export import export
from electra_ds.interop.import_weights import import_weights
from electra_ds.interop.load_model import load, load_objective
from electra_ds.model.weights import true_state
from electra_ds.training import checkpoint, init_from

ARCHITECTURES = list(run_folders.OF_ARCHITECTURE)
MODELS = [
    *((sharing, "electra", "electra") for sharing in ("shared", "untied", "all", "gdes")),
    *((sharing, "electra", "modernbert") for sharing in ("shared", "untied", "all", "gdes")),
    *((sharing, "electra", "deberta_v2") for sharing in ("shared", "gdes")),
    *(("shared", kind, "electra") for kind in ("mlm", "all_tokens_mlm")),
]
DEEPER = ["model.num_layers=7", "generator.num_layers=5"]
# Twice as many heads of the same width.
WIDER = ["model.hidden_size=96", "model.num_heads=4", "model.ffn_size=161"]
WIDER_GENERATOR = ["generator.hidden_size=96", "generator.num_heads=4", "generator.ffn_size=161"]

OWN = "generator_embeddings"
EMBEDDINGS = {  # sharing, encoder -> its embeddings
    **{(sharing, "discriminator"): "embeddings" for sharing in ("shared", "untied", "all")},
    ("gdes", "discriminator"): "embedding_deltas",
    **{
        ("shared", "generator"): "embeddings",
        ("untied", "generator"): OWN,
        ("gdes", "generator"): OWN,
    },
}


def grown(folder, sets, sharing="shared", kind="electra", architecture="electra"):
    """(tensors before, tensors after, report) of an import with settings."""
    module = run_folders.pretrained(folder / "run", sharing, kind, architecture)
    report = import_weights(folder / "run", folder / "i", sets=sets)
    return true_state(module), checkpoint.weights(folder / "i" / "ckpt" / "0"), report


def wider_sets(architecture):
    sets = [*DEEPER, *WIDER]
    if architecture == "electra":
        generator = ["generator.hidden_size=64", "generator.num_heads=2", "generator.ffn_size=131"]
        return [*sets, "model.embedding_size=64", *generator]
    return [*sets, *WIDER_GENERATOR]


@pytest.mark.parametrize(("sharing", "kind", "architecture"), MODELS)
def test_equal_sizes_keep_every_tensor(sharing, kind, architecture, tmp_path):
    before, after, report = grown(tmp_path, [], sharing, kind, architecture)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not (report.initialized or report.unused or report.warnings)
    assert report.loaded == [(name, name) for name in before]


@pytest.mark.parametrize(("sharing", "kind", "architecture"), MODELS)
def test_each_deeper_layer_is_the_one_that_the_report_names(sharing, kind, architecture, tmp_path):
    sets = DEEPER if sharing != "all" else ["model.num_layers=7", "generator.num_layers=7"]
    before, after, report = grown(tmp_path, sets, sharing, kind, architecture)
    assert not report.initialized
    assert {own for own, _ in report.loaded} | report.unused.keys() == before.keys()
    assert sorted(name for _, name in report.loaded) == sorted(after)
    for own, name in report.loaded:
        assert torch.equal(after[name], before[own]), name
        part, is_layer, rest = name.partition(".layers.")
        number, _, parameter = rest.partition(".")
        if is_layer and ".layers." in own:
            assert own == f"{part}.layers.{report.layers[part][int(number)]}.{parameter}"
        elif is_layer:  # the first layer of modernbert has no norm before its attention
            assert parameter == "attention_norm.weight" and report.layers[part][int(number)] == 0
            assert own == f"{EMBEDDINGS[sharing, part]}.norm.weight"
        else:
            assert own == name
    listed = json.loads((tmp_path / "i" / "import.json").read_text())
    assert listed["layers"] == report.layers and len(listed["read"]) == len(after)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sharing", ["shared", "untied", "gdes"])
def test_a_wider_model_holds_the_smaller_one_in_its_centre(architecture, sharing, tmp_path):
    sets = wider_sets(architecture)
    if sharing == "untied" and architecture != "electra":
        sets = [*DEEPER, *WIDER]  # its generator has a width of its own
    before, after, report = grown(tmp_path, sets, sharing, architecture=architecture)
    assert not report.initialized
    fused = (".qkv.weight", ".qkv.bias", ".out.weight")
    for own, name in report.loaded:
        small, large = before[own], after[name]
        is_gated = architecture == "modernbert" and "ffn_in" in name
        if name.endswith(fused) or is_gated:
            continue  # of several parts; the next test
        centre = tuple(
            slice((new - old) // 2, (new - old) // 2 + old)
            for old, new in zip(small.shape, large.shape, strict=True)
        )
        assert torch.equal(large[centre], small), name
        for axis, (old, new) in enumerate(zip(small.shape, large.shape, strict=True)):
            if new > old:  # periodic
                assert torch.equal(
                    large.narrow(axis, old, new - old), large.narrow(axis, 0, new - old)
                )
    module, config = load_objective(tmp_path / "i" / "ckpt" / "0")
    assert config.model.hidden_size == 96
    for name, value in after.items():  # nothing is left at its initial value
        assert torch.equal(true_state(module)[name], value) and torch.isfinite(value).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_of_twice_the_width_compute_twice_the_result_of_their_source(architecture, tmp_path):
    """Every input occurs twice, so that each sum over inputs is doubled: heads, gates and inputs of
    the next matrix stand where they belong."""
    sizes = ["model.hidden_size=96", "model.num_heads=4"]
    ffn = 2 * run_folders.OF_ARCHITECTURE[architecture][1]["model"]["ffn_size"]
    sizes += [f"model.ffn_size={ffn}"]
    if architecture == "electra":
        sizes += ["model.embedding_size=32"]
    else:
        sizes += ["generator.hidden_size=96", "generator.num_heads=4"]
    before, after, _ = grown(tmp_path, sizes, architecture=architecture)
    prefix = "discriminator.layers.1."
    small, large = (
        {n.removeprefix(prefix): t.double() for n, t in tensors.items() if n.startswith(prefix)}
        for tensors in (before, after)
    )
    x = torch.randn(5, 48, dtype=torch.float64)
    repeated = x[:, (torch.arange(96) - 24) % 48]
    heads = x.view(5, 2, 24)[:, [1, 0, 1, 0]].flatten(1)
    q, k, v = (
        (x @ w.T).view(5, 2, 24)[:, [1, 0, 1, 0]].flatten(1) for w in small["qkv.weight"].chunk(3)
    )
    assert torch.allclose(repeated @ large["qkv.weight"].T, 2 * torch.cat([q, k, v], 1))
    out = (x @ small["out.weight"].T)[:, (torch.arange(96) - 24) % 48]
    assert torch.allclose(heads @ large["out.weight"].T, 2 * out)
    parts = 2 if architecture == "modernbert" else 1
    for wide, narrow in zip(
        (repeated @ large["ffn_in.weight"].T).chunk(parts, 1),
        (x @ small["ffn_in.weight"].T).chunk(parts, 1),
        strict=True,
    ):
        half = ffn // 2
        assert torch.allclose(wide, 2 * narrow[:, (torch.arange(ffn) - half // 2) % half])
    assert large["ffn_out.weight"].shape == (96, ffn)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_is_never_split(architecture, tmp_path):
    """2 heads become 3, so that the centre of the axis is not a border of heads."""
    sets = ["model.hidden_size=72", "model.num_heads=3"]
    if architecture != "electra":
        sets += ["generator.hidden_size=72", "generator.num_heads=3"]
    before, after, _ = grown(tmp_path, sets, architecture=architecture)
    name = "discriminator.layers.1.{}.weight"
    qkv, out = name.format("qkv"), name.format("out")
    old, new = before[qkv].view(3, 2, 24, 48), after[qkv].view(3, 3, 24, 72)
    assert torch.equal(new[..., 12:60], old[:, [0, 1, 0]])
    old, new = before[out].view(48, 2, 24), after[out].view(72, 3, 24)
    assert torch.equal(new[12:60], old[:, [0, 1, 0]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_result_computes_starts_a_run_and_is_exported(architecture, tmp_path, monkeypatch):
    _, _, report = grown(tmp_path, wider_sets(architecture), architecture=architecture)
    assert not report.warnings
    model = load(tmp_path / "i")
    ids, _, _ = run_folders.rows_with_padding()
    assert (
        torch.isfinite(model.discriminator(ids)).all()
        and torch.isfinite(model.generator(ids)).all()
    )
    monkeypatch.setattr(init_from, "on_rank0", lambda function: function())
    words = tmp_path / "i" / "tokenizer"
    found = init_from.find_source(
        tmp_path / "i", model.config, words, lambda value: [value], needs_generator=True
    )
    assert found == tmp_path / "i" / "ckpt" / "0"
    export(tmp_path / "i", tmp_path / "h")


def test_global_layers_start_from_global_layers(tmp_path):
    _, _, report = grown(tmp_path, ["model.num_layers=8"], architecture="modernbert")
    assert report.layers["discriminator"] == [0, 1, 1, 0, 2, 2, 0, 2]  # 0, 3 and 6 are global


def test_a_kind_of_attention_that_the_source_lacks_is_no_obstacle(tmp_path):
    sets = ['model.attention_pattern=["global"]', "model.num_layers=4"]
    _, _, report = grown(tmp_path, sets, architecture="modernbert")
    assert report.layers["discriminator"] == [0, 0, 0, 0]
    assert "discriminator.layers.1.qkv.weight" in report.unused
    assert any("attention_pattern" in line for line in report.warnings)


def test_a_base_that_only_a_phase_had_is_named(tmp_path):
    run_folders.pretrained(tmp_path / "run", architecture="modernbert")
    meta = checkpoint.find_checkpoint(tmp_path / "run") / "meta.json"
    values = json.loads(meta.read_text())
    values["config"]["train"]["total_steps"] = None
    phase = {"name": "long", "steps": 9, "set": {"model.global_theta": 900.0}}
    values["config"]["phases"] = [{"name": "short", "steps": 1}, phase]
    values["data"]["phase"] = {"name": "long"}
    meta.write_text(json.dumps(values))
    sets = ["model.num_layers=6"]
    report = import_weights(tmp_path / "run", tmp_path / "i", sets=sets)
    assert any("model.global_theta: 900.0 -> 500.0" in line for line in report.warnings)
    sets += ["phases=[]", "train.total_steps=9", "model.global_theta=900"]
    report = import_weights(tmp_path / "run", tmp_path / "j", sets=sets)
    assert not any("global_theta" in line for line in report.warnings)


def test_a_missing_part_is_initialized_and_another_is_unused(tmp_path):
    run_folders.pretrained(tmp_path / "run", kind="mlm")
    report = import_weights(tmp_path / "run", tmp_path / "i", sets=["objective.kind=electra"])
    parts = {name.split(".")[0] for name in report.initialized}
    assert parts == {"generator", "generator_head", "discriminator_head"}
    assert {name.split(".")[0] for name in report.unused} == {"mlm_head"}
    assert "are initialized" in report.warnings[0]


def test_a_preset_file_gives_the_new_config(tmp_path):
    run_folders.pretrained(tmp_path / "run")
    values = run_folders.config().model_dump(mode="json")
    values["model"] |= {"num_layers": 4, "vocab_size": None}
    values["data"]["special_ids"] = None
    (tmp_path / "deep.json").write_text(json.dumps(values))
    import_weights(tmp_path / "run", tmp_path / "i", str(tmp_path / "deep.json"))
    written = parse_run(json.loads((tmp_path / "i" / "config.json").read_text()), "test")
    assert written.model.num_layers == 4 and written.model.vocab_size == 600
    assert written.data.special_ids.mask == 4


def test_an_average_is_a_source(tmp_path):
    for name in ("a", "b"):
        run_folders.pretrained(tmp_path / name)
    average([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    report = import_weights(tmp_path / "mean", tmp_path / "i", sets=["model.num_layers=4"])
    assert report.layers["discriminator"] == [0, 0, 1, 1]


REFUSED = {
    "model.num_layers=1": r"model.num_layers = 1, but 2 there",
    "model.ffn_size=79": r"model.ffn_size = 79, but 80 there",
    "model.hidden_size=24": r"model.hidden_size = 24, but 48 there.*num_heads = 2.*set model.num_heads = 1",
    "model.num_heads=4": r"heads of 12, but of 24 there: set model.num_heads = 2",
    "model.hidden_size=100": r"heads of 50, but of 24 there; expected",
    "model.embedding_size=16": r"model.embedding_size = 16, but 32 there",
    "model.embedding_size=48": r"no projection after the embeddings, but a projection there",
    "model.max_positions=64": r"model.max_positions = 64, but 40 there",
    "model.type_vocab_size=3": r"model.type_vocab_size = 3, but 2 there",
    "generator.num_layers=1": r"generator.num_layers = 1, but 2 there",
    "model.vocab_size=700": r"model.vocab_size = 700, but 600 in .*; its tokenizer stays",
    "model.sharing=gdes": r"model.sharing = gdes, but shared in .*--set model.sharing=shared",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_does_not_fit_is_refused_and_leaves_nothing(setting, tmp_path):
    run_folders.pretrained(tmp_path / "run")
    with pytest.raises(UserError, match=REFUSED[setting]):
        import_weights(tmp_path / "run", tmp_path / "i", sets=[setting])
    assert not (tmp_path / "i").exists()


def test_all_problems_are_in_one_message(tmp_path):
    run_folders.pretrained(tmp_path / "run")
    sets = ["model.num_layers=1", "model.ffn_size=10", "generator.ffn_size=10"]
    with pytest.raises(UserError) as error:
        import_weights(tmp_path / "run", tmp_path / "i", sets=sets)
    assert all(setting.replace("=", " = ") in str(error.value) for setting in sets)


def test_other_sources_and_options_are_refused(tmp_path):
    run_folders.pretrained(tmp_path / "run")
    run_folders.fine_tuned(tmp_path / "tuned" / "seed-0", "classification")
    with pytest.raises(UserError, match=r"model\.architecture = modernbert, but electra in"):
        import_weights(tmp_path / "run", tmp_path / "i", "modern-tiny")
    with pytest.raises(UserError, match="leave --generator and --config out"):
        import_weights(tmp_path / "run", tmp_path / "i", generator=tmp_path / "run")
    with pytest.raises(UserError, match="output folder of finetune"):
        import_weights(tmp_path / "tuned" / "seed-0", tmp_path / "i")
    shutil.copytree(tmp_path / "run" / "ckpt" / "final", tmp_path / "factory")
    meta = json.loads((tmp_path / "factory" / "meta.json").read_text())
    meta["config"]["model"] = {"factory": "own:build", "vocab_size": 600}
    del meta["config"]["generator"]
    (tmp_path / "factory" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"has a model\.factory; expected a run"):
        import_weights(tmp_path / "factory", tmp_path / "i")
    with pytest.raises(UserError, match="lies in the folder that the command reads"):
        import_weights(tmp_path / "run" / "ckpt" / "final", tmp_path / "run" / "ckpt" / "i")
    other = run_folders.vocabulary(tmp_path / "words") / "vocab.txt"
    other.write_text(other.read_text().replace("\naa\n", "\naaa\n"))
    with pytest.raises(UserError, match="1 of 600 entries differ"):
        import_weights(tmp_path / "run", tmp_path / "i", tokenizer=tmp_path / "words")
    assert not (tmp_path / "i").exists()
