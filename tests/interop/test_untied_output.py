"""A head that predicts tokens with an output matrix of its own: no reader uses another matrix."""

import json

import pytest
import run_folders
import torch
from running import read_json
from safetensors.torch import load_file, save_file

from electra_ds.common.errors import UserError
from electra_ds.config.loading import parse_run
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.interop.export import export
from electra_ds.interop.frozen_generator import read_generator
from electra_ds.interop.hf import format_of
from electra_ds.interop.import_weights import import_weights
from electra_ds.interop.load_model import load, load_pretrained

ARCHITECTURES = ("electra", "modernbert")


def stock_generator(folder, architecture):
    """(the config of a run, the Hugging Face folder of its generator)."""
    run_folders.pretrained(folder / "run", architecture=architecture)
    export(folder / "run", folder / "hf")
    return run_folders.config(architecture=architecture), folder / "hf" / "generator"


def set_output(folder, form, matrix, is_tied):
    """matrix: a function of the word table, or None for no output matrix."""
    config = read_json(folder / "config.json") | {"tie_word_embeddings": is_tied}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(form.output_matrix, None)
    if matrix is not None:
        tensors[form.output_matrix] = matrix(tensors[form.word_table]).clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("is_tied", [False, True])
def test_an_output_matrix_of_its_own_is_refused_by_load_and_listed_by_import(
    architecture, is_tied, tmp_path
):
    config, folder = stock_generator(tmp_path, architecture)
    form = format_of(config.model)
    set_output(folder, form, lambda table: table + 1, is_tied)
    values = config.model_dump(mode="json")
    values["objective"]["generator"] = "frozen"
    values["model"]["sharing"] = "untied"
    frozen = parse_run(values, "test")
    for reader in (load, lambda path: read_generator(path, frozen, load_tokenizer(path))):
        with pytest.raises(UserError, match="differs from the word table; expected tied") as caught:
            reader(folder)
        assert form.output_matrix in str(caught.value) and "\n" not in str(caught.value)
    assert load_pretrained(folder).state  # of the encoder, which has no such matrix
    run = "modern-tiny" if architecture == "modernbert" else "tiny"
    sets = ["data.sequence_length=32"]
    if architecture == "modernbert":
        sizes = config.generator.model_dump(include={"hidden_size", "num_heads", "ffn_size"})
        sets += [f"generator.{key}={value}" for key, value in sizes.items()]
    report = import_weights(folder, tmp_path / "i", run, sets)
    assert any("differs from the word table, which takes its place" in x for x in report.warnings)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tied_output_matrix_may_be_missing_or_a_copy(architecture, tmp_path):
    config, folder = stock_generator(tmp_path, architecture)
    form = format_of(config.model)
    ids, mask, _ = run_folders.rows_with_padding()
    expected = load(folder).generator(ids, None, mask)
    for matrix, is_tied in ((None, True), (torch.clone, True), (torch.clone, False)):
        set_output(folder, form, matrix, is_tied)
        assert torch.equal(load(folder).generator(ids, None, mask), expected)
    set_output(folder, form, None, False)
    with pytest.raises(UserError, match="tie_word_embeddings = false, but the weights have no"):
        load(folder)
