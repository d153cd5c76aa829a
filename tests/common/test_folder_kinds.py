"""What lies at a path, for messages: every kind of folder that the project writes."""

import json
import os
import re

import pytest

from electra_ds.common.folder_kinds import found_at


def write(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    return root


@pytest.mark.parametrize(
    ("files", "kind", "phrase"),
    [
        (["manifest.json", "vocab.txt"], "data", "prepared data"),
        (["config.json", "model.safetensors", "vocab.txt"], "hugging face", "electra-ds import"),
        (["config.json", "pytorch_model.bin.index.json"], "hugging face", "electra-ds import"),
        (["generator/config.json", "generator/model.safetensors"], "hugging face", "exported"),
        (["t/seed-0/result.json", "config.json"], "fine-tuned", "no model was kept"),
        (["t/seed-3/model/meta.json"], "fine-tuned", "model .*seed-3/model"),
        (["seed-3/model/meta.json", "task.json"], "fine-tuned", "model .*seed-3/model"),
        (["meta.json", "model-00001-of-00001.safetensors"], "checkpoint", "is a checkpoint$"),
        (["model-00001-of-00001.safetensors"], "checkpoint", "without meta.json"),
        (["latest", "5/meta.json"], "checkpoint", "ckpt folder of a run$"),
        (["5/meta.json"], "checkpoint", "without ckpt/latest; name a checkpoint, such as .*/5$"),
        (["ckpt/latest", "ckpt/5/meta.json", "config.json"], "run", "it is a run$"),
        (["ckpt/5/meta.json", "ckpt/40/meta.json"], "run", "without ckpt/latest.*such as .*/40$"),
        (["ckpt/40/meta.json", "ckpt/final/meta.json"], "run", "such as .*/final$"),
        (["metrics.jsonl", "config.json"], "run", "a run without a checkpoint$"),
        (["vocab.txt", "options.json"], "tokenizer", "tokenizer"),
        (["notes.txt"], "other", "^$"),
    ],
)
def test_a_folder_is_recognized_by_its_files(tmp_path, files, kind, phrase):
    found = found_at(write(tmp_path / "x", *files))
    assert found.kind == kind
    assert re.search(phrase, found.phrase), found.phrase
    assert found.clause == (f": {found.phrase}" if found.phrase else "")


def test_other_paths_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name, kind, phrase in (
        ("pipe", "file", "a device or a pipe"),
        ("file", "file", "is a file"),
        ("empty", "other", "an empty folder"),
        ("none", "missing", "does not exist"),
        ("file/below", "missing", "does not exist"),
        ("x" * 300, "unreadable", "cannot be read .*too long"),
        ("a\0b", "unreadable", "cannot be read"),
        ("loop", "unreadable", "cannot be read"),
    ):
        found = found_at(tmp_path / name)
        assert found.kind == kind and re.search(phrase, found.phrase), found


@pytest.mark.parametrize(
    "content", ["", "[", "[]", "3", '{"architectures": 3}', '{"architectures": [[]]}', "[" * 9999]
)
def test_an_exported_folder_with_a_broken_config_is_still_one(tmp_path, content):
    write(tmp_path, "model.safetensors", "config.json")
    (tmp_path / "config.json").write_text(content)
    assert found_at(tmp_path).kind == "hugging face"


def test_an_exported_fine_tuned_model_is_told_apart(tmp_path):
    write(tmp_path, "model.safetensors")
    for name in ("ElectraForSequenceClassification", "ElectraForTokenClassification"):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
        assert "an exported fine-tuned model" in found_at(tmp_path).phrase


def test_checkpoints_without_permission_are_not_said_to_be_absent(tmp_path, monkeypatch):
    write(tmp_path, "ckpt/5/meta.json")
    listed = os.listdir

    def listdir(folder):
        if str(folder).endswith("ckpt"):
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    found = found_at(tmp_path)
    assert found.kind == "run" and "that cannot be read" in found.phrase
