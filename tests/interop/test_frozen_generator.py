"""The weights of a frozen generator: from every kind of model, or one clear refusal."""

import itertools

import pytest
import run_folders
import torch
from run_folders import frozen_config

from electra_ds.common.errors import UserError
from electra_ds.config.loading import parse_run
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.interop.export import export
from electra_ds.interop.frozen_generator import read_generator
from electra_ds.interop.load_model import load
from electra_ds.model.build import build_objective
from electra_ds.model.weights import load_true_state

ARCHITECTURES = ("electra", "modernbert", "deberta_v2")


def words(run):
    return load_tokenizer(run / "tokenizer")


@torch.no_grad()
def assert_same_predictions(weights, config, generator):
    """The frozen generator predicts the tokens that a loaded one predicts."""
    module = build_objective(config).eval()
    load_true_state(module, weights, partial=True)
    ids, mask, types = run_folders.rows_with_padding()
    positions = torch.arange(ids.shape[1]) * mask
    embedded = module.generator_embeddings(ids, types, positions)
    hidden = module.generator(embedded, mask, position_ids=positions)
    found = module.generator_head(hidden, module.generator_embeddings.word)
    expected = generator(ids, types, mask)
    assert float((found - expected)[mask > 0].abs().max()) < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sharing", ["shared", "gdes", "all"])
def test_the_generator_of_a_run_and_of_its_export_is_found(architecture, sharing, tmp_path):
    run, config = tmp_path / "run", frozen_config(architecture)
    run_folders.pretrained(run, sharing, architecture=architecture)
    if sharing == "all":
        main = run_folders.config(sharing, architecture=architecture).generator
        config = frozen_config(architecture, **main.model_dump(exclude={"embedding_size"}))
    weights = read_generator(run, config, words(run))
    assert_same_predictions(weights, config, load(run).generator)
    export(run, tmp_path / "hf")
    for folder in (tmp_path / "hf", tmp_path / "hf" / "generator"):
        exported = read_generator(folder, config, words(run))
        assert exported.keys() == weights.keys()
        assert all(torch.equal(exported[name], value) for name, value in weights.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_main_encoder_that_predicts_tokens_is_a_generator(architecture, tmp_path):
    run = tmp_path / "run"
    run_folders.pretrained(run, kind="mlm", architecture=architecture)
    main = run_folders.config(architecture=architecture).model
    fields = ("hidden_size", "num_layers", "num_heads", "ffn_size")
    config = frozen_config(architecture, **{name: getattr(main, name) for name in fields})
    weights = read_generator(run, config, words(run))
    assert_same_predictions(weights, config, load(run).discriminator)


def refusal(path, config, tokenizer):
    with pytest.raises(UserError) as caught:
        read_generator(path, config, tokenizer)
    return str(caught.value)


def test_other_sizes_are_refused_with_the_settings_that_fit(tmp_path):
    run = tmp_path / "run"
    run_folders.pretrained(run)
    config = frozen_config("electra", num_layers=1, embedding_size=None, ffn_size=80)
    message = refusal(run, config, words(run))
    assert "generator.num_layers = 2, but 1 here" in message
    for setting in ("generator.num_layers=2", "generator.ffn_size=64"):
        assert f"--set {setting}" in message
    assert "embedding_size" not in message  # as wide as its encoder in both


def test_other_mathematics_are_refused(tmp_path):
    run = tmp_path / "run"
    run_folders.pretrained(run, architecture="modernbert")
    values = frozen_config("modernbert").model_dump(mode="json")
    values["model"] |= {"global_theta": 7.0, "attention_pattern": ["global"]}
    message = refusal(run, parse_run(values, "test"), words(run))
    assert "model.global_theta = 500.0, but 7.0 here" in message
    assert """--set 'model.attention_pattern=["global", "local", "local"]'""" in message


def test_another_distance_of_the_last_bucket_is_refused(tmp_path):
    """Buckets of distances depend on max_positions in deberta_v2, and nothing in modernbert."""
    for architecture, is_refused in (("deberta_v2", True), ("modernbert", False)):
        run = tmp_path / architecture
        run_folders.pretrained(run, architecture=architecture)
        folder = tmp_path / f"{architecture}-hf"
        export(run, folder)
        values = frozen_config(architecture).model_dump(mode="json")
        values["model"]["max_positions"] = 64
        config = parse_run(values, "test")
        for path in (run, folder):
            if is_refused:
                message = refusal(path, config, words(run))
                assert "model.max_positions = 40, but 64 here" in message
                assert "--set model.max_positions=40" in message
            else:
                assert read_generator(path, config, words(run))


@pytest.mark.parametrize(("theirs", "own"), list(itertools.permutations(ARCHITECTURES, 2)))
def test_another_architecture_is_refused(theirs, own, tmp_path):
    run = tmp_path / "run"
    run_folders.pretrained(run, architecture=theirs)
    export(run, tmp_path / "hf")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    for path in (run, tmp_path / "hf", tmp_path / "hf" / "generator"):
        for tokenizer in (words(run), load_tokenizer(tmp_path / "other")):
            message = refusal(path, frozen_config(own), tokenizer)
            expected = f"model.architecture = {theirs}, but {own} in this run"
            assert message.startswith(f"--generator-from {path}: {expected}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layers", [1, 3])
def test_other_sizes_of_a_hugging_face_folder_are_refused(architecture, layers, tmp_path):
    run = tmp_path / "run"
    run_folders.pretrained(run, architecture=architecture)
    export(run, tmp_path / "hf")
    config = frozen_config(architecture, num_layers=layers, ffn_size=24)
    ffn_size = run_folders.config(architecture=architecture).generator.ffn_size
    message = refusal(tmp_path / "hf", config, words(run))
    assert f"generator.num_layers = 2, but {layers} here" in message
    assert f"--set generator.ffn_size={ffn_size} --set generator.num_layers=2" in message


def test_another_width_of_the_tables_of_a_hugging_face_folder_is_refused(tmp_path):
    run = tmp_path / "run"
    run_folders.pretrained(run)
    export(run, tmp_path / "hf")
    config = frozen_config("electra", embedding_size=24)
    message = refusal(tmp_path / "hf", config, words(run))
    assert "generator.embedding_size = 32, but 24 here" in message


def test_a_path_without_a_generator_is_refused_with_the_option(tmp_path):
    (tmp_path / "empty").mkdir()
    run_folders.vocabulary(tmp_path / "words")
    tokenizer = load_tokenizer(tmp_path / "words")
    for name in ("empty", "nowhere", "x" * 300):
        message = refusal(tmp_path / name, frozen_config("electra"), tokenizer)
        assert message.startswith(f"--generator-from {tmp_path / name}: ")
        assert "expected a run or checkpoint with a generator" in message
        assert "Hugging Face folder" in message and "fine-tuned" not in message
    for seed in range(2):
        run_folders.fine_tuned(tmp_path / "tuned" / f"seed-{seed}", "classification")
    message = refusal(tmp_path / "tuned", frozen_config("electra"), tokenizer)
    assert "a fine-tuned model has a main encoder only" in message


def test_another_vocabulary_is_refused(tmp_path):
    run = tmp_path / "run"
    run_folders.pretrained(run)
    (tmp_path / "other").mkdir()
    entries = [*run_folders.VOCABULARY[:-1], "other"]
    (tmp_path / "other" / "vocab.txt").write_text("".join(f"{entry}\n" for entry in entries))
    message = refusal(run, frozen_config("electra"), load_tokenizer(tmp_path / "other"))
    assert "--data: its vocabulary is not that of the model" in message


def test_a_model_without_a_generator_is_refused(tmp_path):
    run = tmp_path / "run"
    run_folders.pretrained(run)
    export(run, tmp_path / "hf")
    tuned = run_folders.fine_tuned(tmp_path / "tuned", "classification")
    assert tuned
    for path, found in (
        (tmp_path / "hf" / "discriminator", "its class has no language-modelling head"),
        (tmp_path / "tuned", "a fine-tuned model has a main encoder only"),
    ):
        message = refusal(path, frozen_config("electra"), words(run))
        assert f"no generator here ({found})" in message
        assert "expected a run or checkpoint with a generator" in message
