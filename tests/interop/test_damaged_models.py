"""Models that do not fit their config, are damaged, or would cost more than they hold."""

import hashlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import run_folders
import torch
from running import read_json, run_cli
from safetensors.torch import load_file, save_file

from electra_ds.common.errors import RunFailure, UserError
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.evaluation.detect import Detector
from electra_ds.interop import export as export_module
from electra_ds.interop.checkpoints import read_checkpoint
from electra_ds.interop.export import export
from electra_ds.interop.hf_folder import read_tensors
from electra_ds.interop.import_weights import import_weights
from electra_ds.interop.load_model import load, load_objective, load_pretrained
from electra_ds.interop.vocabularies import check_same_vocabulary

QKV = "discriminator.layers.0.qkv.weight"


def change(folder: Path, edit, config=None) -> None:
    """Change the weights of a checkpoint, and its config; meta.json fits the new file."""
    file = next(folder.glob("model-*.safetensors"))
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    meta = read_json(folder / "meta.json")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    meta["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256}
    if config is not None:
        config(meta["config"])
    (folder / "meta.json").write_text(json.dumps(meta))


def without_layer(tensors):
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def without_head(tensors):
    for name in [name for name in tensors if "head" in name]:
        del tensors[name]


def more_layers(config):
    config["model"]["num_layers"] = 10**7


def one_layer(config):
    config["model"]["num_layers"] = 1


def huge_vocabulary(config):
    config["model"]["vocab_size"] = 10**15


def odd_heads(config):
    config["model"]["num_heads"] = 5


def huge_layer(config):
    config["model"]["ffn_size"] = 10**18


def nothing(_):
    """No change."""


CHANGES = {
    "a layer is missing": (without_layer, None, "the weights have 1 layers"),
    "the head is missing": (without_head, None, "tensors are missing"),
    "an unknown tensor": (
        lambda t: t.update(other=torch.zeros(3)),
        None,
        "1 are not in the model .other.",
    ),
    "another shape": (lambda t: t.update({QKV: t[QKV][:48].clone()}), None, "qkv.weight has shape"),
    "integers": (lambda t: t.update({QKV: t[QKV].int()}), None, "has (the )?type torch.int32"),
    "NaN": (lambda t: t[QKV][3].fill_(float("nan")), None, "48 of the 6,912 values .* not finite"),
    "infinite": (lambda t: t[QKV][3, 3].fill_(float("inf")), None, "1 of the 6,912 values"),
    "more layers in the config": (
        nothing,
        more_layers,
        "num_layers = 10000000|the config has 10000000",
    ),
    "fewer layers in the config": (nothing, one_layer, "the weights have 2 layers"),
    "a vocabulary of petabytes": (nothing, huge_vocabulary, "1000000000000000"),
    "a layer of exabytes": (nothing, huge_layer, "impossible|has shape|ffn_size = 10{18}"),
    "heads that do not divide": (nothing, odd_heads, "not a multiple of num_heads 5"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_do_not_fit_their_config_are_refused_by_every_reader(tmp_path, name):
    edit, config, part = CHANGES[name]
    run_folders.pretrained(tmp_path / "run")
    run_folders.fine_tuned(tmp_path / "seed-0", "classification")
    final = tmp_path / "run" / "ckpt" / "final"
    change(final, edit, config)
    change(tmp_path / "seed-0" / "model", edit, config)
    readers = [
        lambda: export(tmp_path / "run", tmp_path / "out"),
        lambda: export(tmp_path / "seed-0", tmp_path / "out"),
        lambda: load(tmp_path / "run"),
        lambda: load(tmp_path / "seed-0"),
        lambda: load_pretrained(tmp_path / "run"),
        lambda: load_objective(final),
        lambda: Detector.load(tmp_path / "run"),
    ]
    for reader in readers:
        with pytest.raises(UserError, match=part):
            reader()
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "values",
    [
        {"task": {}},
        {"task": {"name": "x", "kind": "other"}},
        {"task": {"name": "x", "kind": "classification", "labels": [1, 2]}},
        {"task": {"name": "x", "kind": "classification", "labels": []}},
        {"model": []},
        {"model": {"hidden_size": 48.0}},
        {"scores": {"valid": {"accuracy": "high"}}},
        {"train": {"max_length": -3}},
    ],
)
def test_a_fine_tuned_config_of_other_types_is_refused(tmp_path, values):
    run_folders.fine_tuned(tmp_path / "seed-0", "classification")
    change(tmp_path / "seed-0" / "model", nothing, lambda config: config.update(values))
    for reader in (load, lambda path: export(path, tmp_path / "out"), load_pretrained):
        with pytest.raises(UserError, match=r"meta\.json"):
            reader(tmp_path / "seed-0")


# --------------------------------------------------------------------------- Hugging Face folders


@pytest.fixture
def foreign(tmp_path):
    """A Hugging Face folder with discriminator/ and generator/."""
    run_folders.pretrained(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf")
    return tmp_path / "hf"


VALUES = {
    "num_attention_heads": [5, 0, "2", None, 64.0],
    "hidden_size": [48.0, -1, 10**18],
    "num_hidden_layers": [1, 3, 10**7, 10**15],
    "vocab_size": [10**15, "600", -1],
    "hidden_dropout_prob": [1.0, -0.1, "x"],
    "layer_norm_eps": [0, "1e-12"],
    "hidden_act": ["relu", ["gelu"]],
    "max_position_embeddings": [10**12, 39],
    "model_type": ["roberta", None, 3],
}


@pytest.mark.parametrize("key", VALUES)
def test_a_config_of_impossible_values_is_refused_by_every_reader(foreign, tmp_path, key):
    path = foreign / "discriminator" / "config.json"
    config = read_json(path)
    for value in VALUES[key]:
        path.write_text(json.dumps(config | {key: value}))
        for reader in (
            load_pretrained,
            load,
            lambda folder: import_weights(
                folder, tmp_path / "i", "tiny", ["data.sequence_length=32"]
            ),
        ):
            with pytest.raises(UserError) as caught:
                reader(foreign / "discriminator")
            assert len(str(caught.value)) < 600
    assert not (tmp_path / "i").exists()


def test_a_config_may_lack_keys_with_a_default(foreign):
    path = foreign / "discriminator" / "config.json"
    config = read_json(path)
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size"):
        del config[key]
    path.write_text(json.dumps(config))
    assert load_pretrained(foreign / "discriminator").model.hidden_dropout == 0.1
    del config["num_attention_heads"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: num_attention_heads: missing"):
        load_pretrained(foreign / "discriminator")


def four_bits(*shape: int) -> torch.Tensor:
    """A tensor of 4-bit numbers, which torch can neither convert nor compare."""
    kind = getattr(torch, "float4_e2m1fn_x2", torch.float8_e5m2)  # since torch 2.8
    return torch.zeros(shape, dtype=torch.uint8).view(kind)


def test_weights_of_other_layers_types_and_values_are_refused(foreign, tmp_path):
    file = foreign / "discriminator" / "model.safetensors"
    tensors = load_file(file)
    name = "electra.encoder.layer.1.attention.self.query.weight"
    last = "electra.encoder.layer.1."
    for changed, part in (
        ({key: x for key, x in tensors.items() if not key.startswith(last)}, "have 1 layers"),
        (tensors | {"electra.encoder.layer.2.output.dense.bias": torch.zeros(48)}, "have 3 layers"),
        (tensors | {name: tensors[name][:4].clone()}, "have the shapes"),
        (tensors | {name: tensors[name].to(torch.int8)}, "quantized weights are not read"),
        (tensors | {name: tensors[name] * float("nan")}, "not finite"),
        (tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, "quantized weights are not read"),
        (tensors | {name: four_bits(48, 24)}, "quantized weights are not read"),
        (tensors | {"unknown": four_bits(2)}, "quantized weights are not read"),
        (
            tensors
            | {"embeddings.LayerNorm.bias": tensors["electra.embeddings.LayerNorm.bias"] + 1},
            "the same parameter with different values",
        ),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        for reader in (
            load_pretrained,
            load,
            lambda folder: import_weights(
                folder, tmp_path / "i", "tiny", ["data.sequence_length=32"]
            ),
        ):
            with pytest.raises(UserError, match=part):
                reader(foreign / "discriminator")
    half = {key: value.half() for key, value in tensors.items()}
    save_file(half, file, metadata={"format": "pt"})
    assert load_pretrained(foreign / "discriminator").state[QKV].dtype == torch.float32


def test_a_quantized_output_matrix_is_refused(foreign):
    file = foreign / "generator" / "model.safetensors"
    tensors = load_file(file)
    table = tensors["electra.embeddings.word_embeddings.weight"]
    for kind in (torch.int8, torch.complex64):
        save_file(tensors | {"generator_lm_head.weight": table.to(kind)}, file)
        with pytest.raises(UserError, match=r"generator_lm_head\.weight has the type"):
            load(foreign / "generator")


def test_equal_tensors_under_two_names_are_read(foreign):
    file = foreign / "discriminator" / "model.safetensors"
    tensors = load_file(file)
    twice = {name.removeprefix("electra."): value.clone() for name, value in tensors.items()}
    save_file(tensors | twice, file)
    state = load_pretrained(foreign / "discriminator").state
    assert torch.equal(
        state["embeddings.word.weight"], tensors["electra.embeddings.word_embeddings.weight"]
    )


def test_many_tensors_with_the_same_data_are_refused(foreign):
    """A small file would otherwise take memory without a limit."""
    folder = foreign / "discriminator"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    table = tensors["electra.embeddings.word_embeddings.weight"]
    torch.save(tensors | {"tied": table}, folder / "pytorch_model.bin")
    load_pretrained(folder)
    repeated = {f"unknown.{i}": table for i in range(40)}
    torch.save(tensors | repeated, folder / "pytorch_model.bin")
    for reader in (load_pretrained, load):
        with pytest.raises(UserError, match="many are the same data"):
            reader(folder)


def pickled(folder: Path, content: bytes) -> Path:
    (folder / "pytorch_model.bin").write_bytes(content)
    return folder


class Code:
    """A pickle that would run a command."""

    def __reduce__(self):
        return print, ("code of the pickle runs",)


def test_damaged_and_foreign_weight_files_are_explained_without_advice_to_load_them(
    tmp_path, capsys
):
    torch.save({"x": torch.zeros(4)}, tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    torch.save([torch.zeros(4)], tmp_path / "list")
    torch.save({3: torch.zeros(4)}, tmp_path / "numbers")
    torch.save({"x": torch.zeros(4).to_sparse()}, tmp_path / "sparse")
    torch.save({"x": torch.zeros(1).expand(10**12)}, tmp_path / "expanded")
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    contents = {
        "empty": b"",
        "truncated": good[:-40],
        "half": good[: len(good) // 2],
        "noise": b"\x80\x02noise" * 9,
        "pointer": pointer,
        "code": pickle.dumps({"x": Code()}),
        **{
            name: (tmp_path / name).read_bytes()
            for name in ("list", "numbers", "sparse", "expanded", "bomb")
        },
    }
    (tmp_path / "m").mkdir()
    for name, content in contents.items():
        with pytest.raises(UserError, match=r"pytorch_model\.bin") as caught:
            read_tensors(pickled(tmp_path / "m", content))
        text = str(caught.value)
        assert "weights_only" not in text and "unsafe" not in text and "\n" not in text, name
        assert name != "pointer" or "Git LFS pointer" in text
    assert "code of the pickle" not in capsys.readouterr().out
    (tmp_path / "m" / "model.safetensors").write_bytes(pointer)
    with pytest.raises(UserError, match="Git LFS pointer"):
        read_tensors(tmp_path / "m")


def archive_of(folder: Path, program: bytes) -> bytes:
    """A file of torch.save with this pickle."""
    writer = torch._C.PyTorchFileWriter(str(folder / "program"))
    writer.write_record("data.pkl", program, len(program))
    writer.write_record("byteorder", b"little", 6)
    writer.write_end_of_file()
    return (folder / "program").read_bytes()


ENCODE = b"c_codecs\nencode\n"
DICT = b"ccollections\nOrderedDict\n"
PROGRAMS = {  # that torch.load(weights_only=True) runs; each could double its values many times
    "hexadecimal": ENCODE + ENCODE + b"X\1\0\0\0aX\6\0\0\0latin1\x86RX\3\0\0\0hex\x86R.",
    "copies": DICT + b"]\x85R.",
    "copies of a memo": DICT + b"q\0)Rq\1h\0h\1\x85R.",
    "attributes": DICT + b"q\0)R}bh\0)R}b\x86.",
    "bytes": b"c__builtin__\nbytearray\n)R.",
    "size": b"ctorch\nSize\n)R.",
    "storage": b"ctorch.storage\nUntypedStorage\nK\x09\x85R.",
    "many": b"]" * 2**20 + b".",
    "underflow": b"R.",
    "memo": b"h\0.",
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("form", ["zip", "old"])
def test_a_pickle_that_makes_other_values_than_tensors_is_not_run(
    tmp_path, monkeypatch, name, form
):
    program = b"\x80\2" + PROGRAMS[name]
    content = archive_of(tmp_path, program) if form == "zip" else program
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(UserError, match=r"pytorch_model\.bin: cannot be read as weights"):
        read_tensors(pickled(tmp_path, content))


def test_a_pickle_of_parameters_and_one_of_an_old_torch_are_read(tmp_path):
    module = torch.nn.Linear(3, 2)
    state = module.state_dict() | {"own": torch.nn.Parameter(torch.ones(2))}
    for is_zip in (True, False):
        torch.save(state, tmp_path / "w", _use_new_zipfile_serialization=is_zip)
        found = read_tensors(pickled(tmp_path, (tmp_path / "w").read_bytes()))
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], value) for name, value in state.items())
        torch.save(module.state_dict(), tmp_path / "w", _use_new_zipfile_serialization=is_zip)
        found = read_tensors(pickled(tmp_path, (tmp_path / "w").read_bytes()))
        assert torch.equal(found["weight"], module.weight)


def test_no_compressed_archive_is_inflated(tmp_path, monkeypatch):
    """With bytes before or after an archive, torch and zipfile may read different directories."""
    torch.save({"x": torch.ones(400)}, tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    assert read_tensors(pickled(tmp_path, good))["x"].sum() == 400
    with (
        zipfile.ZipFile(tmp_path / "good") as source,
        zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for entry in source.infolist():
            archive.writestr(entry.filename, source.read(entry))
    with zipfile.ZipFile(tmp_path / "bomb", "a") as archive:
        archive.comment = good  # the end of the file is that of a plain archive
    commented = (tmp_path / "bomb").read_bytes()
    bomb = commented[: -len(good)]
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("inflated"))
    for content in (bomb, bomb + b"PK\5\6", commented, bomb + good, good + b"x", good + good):
        with pytest.raises(UserError, match=r"pytorch_model\.bin: cannot be read as weights"):
            read_tensors(pickled(tmp_path, content))


def test_a_fifo_among_the_weights_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "part.safetensors")
    index = {"weight_map": {"x": "part.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a regular file"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("index", "part"),
    [
        ({}, "weight_map: missing"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({"weight_map": {"x": 3}}, "weight_map"),
        ({"weight_map": {"x": "../model.safetensors"}}, "not a file"),
        ({"weight_map": {"x": "/etc/passwd"}}, "not a file"),
        ({"weight_map": {"x": "gone.safetensors"}}, "gone"),
        ({"weight_map": {"y": "part.safetensors"}}, "which is in none of the files"),
    ],
)
def test_an_index_of_other_types_or_names_is_refused(tmp_path, index, part):
    save_file({"x": torch.zeros(3)}, tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=part):
        read_tensors(tmp_path)


# ------------------------------------------------------------------------------- exports, imports


def test_the_length_of_an_export_is_the_trained_one(tmp_path):
    run_folders.pretrained(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf")
    for part in ("discriminator", "generator"):
        stated = read_json(tmp_path / "hf" / part / "tokenizer_config.json")
        assert stated["model_max_length"] == run_folders.config().data.sequence_length
    assert load(tmp_path / "hf").max_length == load(tmp_path / "run").max_length
    assert load_pretrained(tmp_path / "hf").trained_length == stated["model_max_length"]
    run_folders.fine_tuned(tmp_path / "seed-0", "classification")
    meta = tmp_path / "seed-0" / "model"
    change(meta, nothing, lambda config: config.update(train={"max_length": 24}))
    export(tmp_path / "seed-0", tmp_path / "tuned")
    assert read_json(tmp_path / "tuned" / "tokenizer_config.json")["model_max_length"] == 24
    assert load(tmp_path / "seed-0").max_length == load(tmp_path / "tuned").max_length == 24


def test_a_failed_export_or_import_leaves_nothing_and_can_be_repeated(
    tmp_path, monkeypatch, foreign
):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(export_module, "write_json", full)
        with pytest.raises(RunFailure, match=r"--out .*No space left"):
            export(tmp_path / "run", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir()) and not list(tmp_path.glob(".*"))
    export(tmp_path / "run", tmp_path / "out")
    sets = ["data.sequence_length=32"]
    with monkeypatch.context() as patched:
        patched.setattr("electra_ds.interop.import_report.write_json", full)
        with pytest.raises(RunFailure, match=r"--out .*No space left"):
            import_weights(foreign, tmp_path / "i", "tiny", sets)
    assert not (tmp_path / "i").exists()
    import_weights(foreign, tmp_path / "i", "tiny", sets)
    for place in ("file", "file/below"):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="--out"):
            export(tmp_path / "run", tmp_path / place)


def test_settings_that_the_weights_decide_are_refused_and_dropout_is_set(foreign, tmp_path):
    sets = ["data.sequence_length=32"]
    for setting in ("model.num_layers=7", "model.sharing=all", "generator.ffn_size=80"):
        with pytest.raises(UserError, match=f"--set {setting}: the imported weights have"):
            import_weights(foreign, tmp_path / "i", "tiny", [*sets, setting])
    import_weights(
        foreign, tmp_path / "i", "tiny", [*sets, "model.num_layers=2", "model.hidden_dropout=0.3"]
    )
    assert read_json(tmp_path / "i" / "config.json")["model"]["hidden_dropout"] == 0.3


def test_lost_tensors_of_a_generator_are_said_first_and_together(foreign, tmp_path):
    file = foreign / "generator" / "model.safetensors"
    tensors = load_file(file)
    changed = {
        name: value + 1 if ".embeddings." in name and "word" not in name else value
        for name, value in tensors.items()
    }
    save_file(changed, file, metadata={"format": "pt"})
    done = run_cli(
        "import", foreign, "--out", tmp_path / "i", "--run", "tiny", "--set=data.sequence_length=32"
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("WARNING: generator: electra.embeddings.")
    assert "4 tensor(s) not used: differs from that of discriminator" in lines[0]
    assert len(lines) < 8 and lines[-1].endswith("import.json lists them")


def test_another_vocabulary_of_the_same_size_is_refused(tmp_path):
    run_folders.pretrained(tmp_path / "run")
    words = run_folders.VOCABULARY
    (tmp_path / "other.txt").write_text("\n".join([*words[:5], *words[:4:-1]]) + "\n")
    for reader in (
        lambda: Detector.load(tmp_path / "run", tmp_path / "other.txt"),
        lambda: export(tmp_path / "run", tmp_path / "hf", tmp_path / "other.txt"),
        lambda: load(tmp_path / "run", tmp_path / "other.txt"),
        lambda: load_pretrained(tmp_path / "run", tmp_path / "other.txt"),
    ):
        with pytest.raises(UserError, match="its vocabulary is not that of the model"):
            reader()


def test_a_card_escapes_what_files_contain(tmp_path):
    run_folders.fine_tuned(tmp_path / "seed-0", "classification")
    labels = ["a|b", "\x1b[31m", "x\n| y | <script>"]
    change(
        tmp_path / "seed-0" / "model",
        nothing,
        lambda config: config["task"].update(labels=labels),
    )
    origin = {"origin": "https://me:secret@host/run\n# heading"}
    (tmp_path / "seed-0" / "result.json").write_text(json.dumps(origin))
    export(tmp_path / "seed-0", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert not any(bad in card for bad in ("\x1b", "<script>", "secret", "\n# heading", "a|b"))
    assert read_json(tmp_path / "out" / "config.json")["id2label"]["0"] == "a|b"


def test_weights_of_the_built_in_encoder_with_a_factory_in_the_config_are_refused(tmp_path):
    run_folders.pretrained(tmp_path)
    folder = tmp_path / "ckpt" / "final"
    factory = {"model": {"factory": "x:y"}, "generator": None}
    change(folder, nothing, lambda config: config.update(factory))
    with pytest.raises(UserError, match="weights are those of the built-in encoder"):
        read_checkpoint(folder)


def test_a_vocabulary_that_begins_another_is_told_apart_by_its_size(tmp_path):
    words = [*run_folders.VOCABULARY]
    tokenizers = []
    for number in (590, 600):
        (tmp_path / "vocab.txt").write_text("\n".join(words[:number]) + "\n")
        tokenizers.append(load_tokenizer(tmp_path))
    with pytest.raises(UserError, match=r"it is wordpiece of 590 entries, .* of 600 entries"):
        check_same_vocabulary(tokenizers[0], "data", tokenizers[1], "model")
