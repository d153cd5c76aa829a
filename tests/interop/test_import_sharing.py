"""model.sharing of an import: kept, or changed with --set where the tables allow it."""

from pathlib import Path

import numpy as np
import pytest
import run_folders
import torch

from electra_ds.common.errors import UserError
from electra_ds.config.loading import parse_run
from electra_ds.interop import import_weights as import_module
from electra_ds.interop.export import export
from electra_ds.interop.import_weights import import_weights
from electra_ds.interop.tf import as_tensors
from electra_ds.model.gdes import with_sums
from electra_ds.model.weights import true_state
from electra_ds.training import checkpoint
from electra_ds.training.checkpoint import find_checkpoint

REFERENCE = Path(__file__).parents[1] / "files" / "tf_reference" / "weights.npz"
SETS = ["data.sequence_length=32"]
PARTS = ("embedding_deltas", "generator_embeddings")
TABLES = ("word", "position", "token_type")


def exported(folder, architecture, sharing="shared"):
    """(our tensors, the folder that `export` wrote)."""
    run = run_folders.pretrained(folder / "run", sharing, architecture=architecture)
    export(folder / "run", folder / "hf")
    return true_state(run), folder / "hf"


def imported(source, out, architecture, *sets):
    """(report, all weights) of an import."""
    preset, _ = run_folders.OF_ARCHITECTURE[architecture]
    report = import_weights(source, out, preset, [*SETS, *sets])
    return report, checkpoint.weights(find_checkpoint(out))


@pytest.mark.parametrize("architecture", run_folders.OF_ARCHITECTURE)
def test_a_discriminator_alone_starts_deltas_of_zero(architecture, tmp_path):
    state, folder = exported(tmp_path, architecture)
    width = [] if architecture == "electra" else ["generator.hidden_size=48"]
    sets = ["model.sharing=gdes", *width]
    report, weights = imported(folder / "discriminator", tmp_path / "i", architecture, *sets)
    sums = with_sums(weights)
    for name in [name for name in state if name.startswith("embeddings.")]:
        delta, table = (name.replace("embeddings", part, 1) for part in PARTS)
        assert torch.equal(weights[table], state[name]) and torch.equal(sums[name], state[name])
        assert not (name.split(".")[1] in TABLES and weights[delta].any())
        assert {delta, table} <= {ours for _, ours in report.loaded}
    assert {name.split(".")[0] for name in report.initialized} == {"generator", "generator_head"}


@pytest.mark.parametrize("architecture", run_folders.OF_ARCHITECTURE)
def test_a_shared_pair_becomes_gdes_without_a_change_of_its_tables(architecture, tmp_path):
    state, folder = exported(tmp_path, architecture)
    report, weights = imported(folder, tmp_path / "i", architecture, "model.sharing=gdes")
    assert not report.initialized
    found = with_sums(weights)
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("architecture", run_folders.OF_ARCHITECTURE)
def test_a_gdes_pair_becomes_shared_with_the_tables_of_the_discriminator(architecture, tmp_path):
    state, folder = exported(tmp_path, architecture, "gdes")
    report, weights = imported(folder, tmp_path / "i", architecture, "model.sharing=shared")
    sums = {n: t for n, t in with_sums(state).items() if not n.startswith("generator_embeddings.")}
    assert weights.keys() == sums.keys()
    assert all(torch.equal(weights[name], value) for name, value in sums.items())
    assert not report.initialized
    (warning,) = report.warnings
    assert "differs from that of discriminator, which is loaded" in warning


@pytest.mark.parametrize("architecture", run_folders.OF_ARCHITECTURE)
def test_a_shared_pair_becomes_untied_where_the_generator_is_as_wide_as_its_tables(
    architecture, tmp_path
):
    state, folder = exported(tmp_path, architecture)
    report, weights = imported(folder, tmp_path / "i", architecture, "model.sharing=untied")
    assert not report.initialized and not report.warnings
    for name, value in state.items():
        assert torch.equal(weights[name], value)
        if name.startswith("embeddings."):
            assert torch.equal(weights[f"generator_{name}"], value)


def test_another_sharing_that_the_tables_do_not_allow_is_refused(tmp_path):
    values = run_folders.config().model_dump(mode="json")
    values["generator"]["hidden_size"] = 24
    run_folders.saved(tmp_path / "run", parse_run(values, "test"))
    export(tmp_path / "run", tmp_path / "hf")
    for sharing in ("untied", "all"):
        with pytest.raises(UserError, match=f"--set model.sharing={sharing}: .*cannot be changed"):
            imported(tmp_path / "hf", tmp_path / "i", "electra", f"model.sharing={sharing}")
    values = run_folders.config("untied").model_dump(mode="json")
    values["generator"]["hidden_size"] = 24
    run_folders.saved(tmp_path / "untied", parse_run(values, "test"))
    export(tmp_path / "untied", tmp_path / "hf2")
    for sharing in ("shared", "gdes"):
        with pytest.raises(UserError, match=f"--set model.sharing={sharing}: .*cannot be changed"):
            imported(tmp_path / "hf2", tmp_path / "i", "electra", f"model.sharing={sharing}")


def test_a_tensorflow_checkpoint_with_shared_tables_starts_deltas_of_zero(tmp_path, monkeypatch):
    tensors = as_tensors(np.load(REFERENCE))
    monkeypatch.setattr(import_module, "read_tf", lambda prefix: tensors)
    (tmp_path / "tf").mkdir()
    (tmp_path / "tf" / "model.ckpt.index").touch()
    run_folders.vocabulary(tmp_path / "tf")
    report, weights = imported(tmp_path / "tf", tmp_path / "i", "electra", "model.sharing=gdes")
    table = tensors["electra/embeddings/word_embeddings"]
    assert torch.equal(weights["generator_embeddings.word.weight"], table)
    assert not weights["embedding_deltas.word.weight"].any() and not report.initialized
