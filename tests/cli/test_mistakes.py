"""Mistakes of users in every path, number and file of every verb: one message, no traceback."""

import faulthandler
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import run_folders
import shard_data
import small_corpus
import torch.distributed as dist

from electra_ds.finetuning import finetune
from electra_ds.finetuning.seed import SeedRun
from electra_ds.interop.export import export
from electra_ds.training import collectives, pretrain

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# Verb -> its words; names in capitals are replaced by paths of `places`, NEW by a new path.
COMMANDS = {
    "train-tokenizer": "--input CORPUS --vocab-size 300 --out NEW",
    "prepare": "--input CORPUS --tokenizer VOCABULARY --out NEW --sequence-length 32",
    "convert": "TFRECORDS --tokenizer VOCABULARY --out NEW",
    "stage": "DATA --to NEW",
    "verify": "DATA",
    "stats": "DATA --html NEW",
    "inspect": "DATA",
    "check": "RUNFILE --data DATA --engine ENGINE",
    "pretrain": "RUNFILE --data DATA --out NEW --engine ENGINE --init-from RUN --stop-at-step 1",
    "status": "RUN",
    "plot": "RUN --out NEW",
    "evaluate": "RUN --data DATA",
    "detect": "RUN --file TEXT --tokenizer VOCABULARY",
    "finetune": "RUN SUITEFILE --tasks TASK --out NEW --engine ENGINE",
    "predict": "TUNED --input ROWS --out NEW",
    "submit": "SUITE --out NEW",
    "export": "RUN --tokenizer VOCABULARY --out NEW",
    "import": "FOREIGN --run tiny --tokenizer VOCABULARY --generator GENERATOR --out NEW",
    "average": "RUN OTHER --weights 1,2 --out NEW",
}
INPUTS = (
    "missing",
    "a folder for a file, or the other way round",
    "empty",
    "empty folder",
    "noise",
    "JSON",
    "truncated",
    "not UTF-8",
    "too long",
    "below a file",
)
OUTPUTS = ("below a file", "too long", "a file or a folder with content", "below a device")
NUMBERS = ("0", "-1", "9" * 30, "nan", "1e400", "x")
# Verb and option -> value of the option that is valid; other options of the verb are as above.
OPTIONS = {
    "train-tokenizer": ["--vocab-size"],
    "prepare": ["--sequence-length", "--valid-fraction", "--seed", "--near-duplicates"],
    "check": ["--world-size", "--set=train.total_steps", "--set=optimizer.peak_lr"],
    "evaluate": ["--max-rows"],
    "detect": ["--threshold"],
    "finetune": ["--seeds", "--set=train.epochs", "--set=train.max_length", "--set=train.seed"],
    "import": ["--set=model.hidden_dropout", "--set=train.seed", "--set=model.vocab_size"],
    "average": ["--weights"],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Valid arguments by the names in COMMANDS."""
    root = tmp_path_factory.mktemp("places")
    run_folders.pretrained(root / "run")
    run_folders.pretrained(root / "other")
    export(root / "run", root / "hf")
    run_folders.fine_tuned(root / "tuned" / "seed-0", "classification")
    (root / "data").mkdir()
    valid = shard_data.best_fit_rows(16, 32, seed=9)
    shard_data.write_data(root / "data", [shard_data.best_fit_rows(40, 32, seed=0)], valid=valid)
    small_corpus.write_corpus(root)
    (root / "suite" / "own" / "seed-0").mkdir(parents=True)
    (root / "suite" / "own" / "seed-0" / "result.json").write_text('{"status": "done"}')
    rows = [{"sentence": "aa ab", "label": ("no", "maybe", "yes")[i % 3]} for i in range(9)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"splits": {"train": "rows.jsonl", "valid": "rows.jsonl"}}
    (root / "own.json").write_text(json.dumps(task))
    (root / "run.json").write_text(run_folders.config().model_dump_json())
    (root / "text.txt").write_text("aa ab ac")
    shipped = Path(__file__).parents[2]
    (root / "engine.json").write_text((shipped / "ds_configs/engine/zero0.json").read_text())
    (root / "suite.json").write_text((shipped / "ds_configs/glue/tiny.json").read_text())
    names = {
        "CORPUS": "in/b.txt",
        "VOCABULARY": "run/tokenizer",
        "DATA": "data",
        "RUNFILE": "run.json",
        "ENGINE": "engine.json",
        "RUN": "run",
        "OTHER": "other",
        "TEXT": "text.txt",
        "SUITEFILE": "suite.json",
        "TASK": "own.json",
        "TUNED": "tuned",
        "ROWS": "rows.jsonl",
        "SUITE": "suite",
        "FOREIGN": "hf/discriminator",
        "GENERATOR": "hf/generator",
    }
    found = {name: root / path for name, path in names.items()}
    found["TFRECORDS"] = shipped / "tests" / "files" / "tfrecord"
    return found


@pytest.fixture(scope="module", autouse=True)
def no_process_group_afterwards():
    """Remove the process group that the commands share."""
    yield
    if dist.is_initialized():
        import deepspeed

        collectives.destroy_process_groups()
        deepspeed.comm.comm.cdb = None


@pytest.fixture(autouse=True)
def one_process_after_another(monkeypatch):
    """One process group for all commands, and the signal handlers of before each."""
    monkeypatch.setattr(faulthandler, "register", lambda *_, **__: None)  # output has no file here
    monkeypatch.setattr(SeedRun, "fit", lambda self: None)  # nothing is trained
    for module in (finetune, pretrain):
        monkeypatch.setattr(module, "destroy_process_groups", lambda: None)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def wrong_input(kind: str, right: Path, folder: Path) -> str:
    """A path of the same suffix as `right` that is wrong in this way."""
    path = folder / f"wrong{right.suffix}"
    if kind == "a folder for a file, or the other way round":
        path.mkdir() if right.is_file() else path.write_text("a")
    elif kind == "empty":
        path.touch()
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "noise":
        path.write_bytes(random.Random(0).randbytes(3000))
    elif kind == "JSON":
        path.write_text('{"a": [1, {"b": null}], "model": 3, "task": [], "splits": 7}')
    elif kind == "truncated":
        source = (
            next(p for p in sorted(right.rglob("*")) if p.is_file()) if right.is_dir() else right
        )
        path.write_bytes(source.read_bytes()[: max(1, source.stat().st_size // 2)])
    elif kind == "not UTF-8":
        return os.fsdecode(os.fsencode(folder) + b"/caf\xe9" + os.fsencode(right.suffix))
    elif kind == "too long":
        return str(folder / ("x" * 300 + right.suffix))
    elif kind == "below a file":
        (folder / "file").touch()
        return str(folder / "file" / f"x{right.suffix}")
    return str(path)


def wrong_output(kind: str, folder: Path) -> str:
    if kind == "too long":
        return str(folder / ("x" * 300))
    if kind == "below a device":
        return "/dev/full/x"
    (folder / "file").write_text("content")
    (folder / "taken").mkdir()
    (folder / "taken" / "x").write_text("content")
    return str(folder / "file" / "x") if kind == "below a file" else str(folder / "taken")


def cases():
    for verb, words in COMMANDS.items():
        for word in words.split():
            for kind in OUTPUTS if word == "NEW" else INPUTS if word.isupper() else ():
                if (verb, word, kind) == ("pretrain", "NEW", OUTPUTS[2]):
                    continue  # a run can begin in a folder with other files
                yield pytest.param(verb, word, kind, id=f"{verb}-{word}-{kind.replace(' ', '_')}")


def failed_well(code: int, out: str, err: str) -> str:
    """What is wrong with the outcome of a command; empty if nothing is."""
    if "Traceback" in out + err or "Aborted!" in err:
        return f"a traceback: {err[-300:]}"
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if code and not ("error: " in err or "Usage:" in err):
        return f"exit code {code} without a message: {out[-200:]} {err[-200:]}"
    if len(err) > 3000 or "\x1b" in err:
        return f"a message of {len(err)} characters: {err[:300]}"
    return ""


@pytest.mark.parametrize(("verb", "word", "kind"), list(cases()))
def test_a_wrong_path_is_one_message(electra_ds, places, tmp_path, monkeypatch, verb, word, kind):
    monkeypatch.chdir(tmp_path)
    words = []
    for name in COMMANDS[verb].split():
        if name != word:
            new = tmp_path / "new"
            words.append(new if name == "NEW" else places.get(name, name))
        elif word == "NEW":
            words.append(wrong_output(kind, tmp_path))
        else:
            words.append(wrong_input(kind, places[word], tmp_path))
    assert not failed_well(*electra_ds(verb, *words))


@pytest.mark.parametrize(
    ("verb", "place"),
    [
        ("pretrain", "run/new"),
        ("finetune", "run"),
        ("finetune", "run/ckpt/new"),
        ("predict", "tuned/seed-0/model/new.tsv"),
        ("export", "run"),
        ("export", "run/new"),
        ("export", "run/ckpt/new/below"),
        ("export", "run/tokenizer/new"),
        ("average", "run"),
        ("average", "run/ckpt/new"),
        ("average", "other/new"),
        ("import", "hf/discriminator/new"),
        ("import", "hf/generator/new"),
    ],
)
def test_an_output_is_not_written_into_an_input(electra_ds, places, verb, place):
    root = places["RUN"].parent
    before = sorted(root.rglob("*"))
    for model in ("run", "run/ckpt", "run/ckpt/final"):
        paths = {**places, "NEW": root / place, "RUN": root / model}
        words = [paths.get(name, name) for name in COMMANDS[verb].split()]
        code, _, err = electra_ds(verb, *words)
        assert code == 2 and "lies in the folder that the command reads" in err, err
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_an_output_does_not_mix_with_another_kind_of_folder(electra_ds, places, tmp_path, verb):
    for number, kind in enumerate(("DATA", "FOREIGN", "TUNED", "RUN")):
        if (verb, kind) in (("finetune", "TUNED"), ("pretrain", "RUN")):
            continue  # such folders are resumed
        out = shutil.copytree(places[kind], tmp_path / str(number))
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        paths = {**places, "NEW": out}
        words = [paths.get(name, name) for name in COMMANDS[verb].split()]
        code, _, err = electra_ds(verb, *words)
        assert code == 2 and "a folder of its own" in err, err
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("verb", "word"),
    [
        ("evaluate", "RUN"),
        ("evaluate", "DATA"),
        ("detect", "RUN"),
        ("detect", "VOCABULARY"),
        ("predict", "TUNED"),
        ("finetune", "RUN"),
        ("export", "RUN"),
        ("import", "FOREIGN"),
        ("average", "RUN"),
        ("status", "RUN"),
        ("plot", "RUN"),
        ("submit", "SUITE"),
        ("check", "DATA"),
        ("stats", "DATA"),
    ],
)
def test_a_folder_of_another_kind_is_named(electra_ds, places, tmp_path, verb, word):
    kinds = {  # argument -> the part of a message that says what it is
        "FOREIGN": "electra-ds import",
        "DATA": "a folder of prepared data",
        "VOCABULARY": "the folder of a tokenizer",
        "SUITE": "output folder of finetune",
        "RUN": "it is a run",
        "TEXT": "it is a file",
    }
    taken = {  # argument -> kinds that the verb reads
        "RUN": ("RUN", "FOREIGN") if verb == "finetune" else ("RUN",),
        "VOCABULARY": ("VOCABULARY", "DATA", "FOREIGN", "RUN", "TEXT"),
        "TUNED": ("RUN",),  # another message
    }
    for kind, phrase in kinds.items():
        if kind in taken.get(word, (word,)):
            continue
        paths = {**places, "NEW": tmp_path / "new", word: places[kind]}
        words = [paths.get(name, name) for name in COMMANDS[verb].split()]
        code, _, err = electra_ds(verb, *words)
        assert code == 2 and str(places[kind]) in err and phrase in err, err


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    ("verb", "option"), [(verb, option) for verb, names in OPTIONS.items() for option in names]
)
def test_a_wrong_number_is_one_message(
    electra_ds, places, tmp_path, monkeypatch, verb, option, number
):
    monkeypatch.chdir(tmp_path)
    if (verb, option, number) in {("train-tokenizer", "--vocab-size", "9" * 30)}:
        pytest.skip("a vocabulary of any size is trained as far as the text goes")
    words = [
        tmp_path / "new" if name == "NEW" else places.get(name, name)
        for name in COMMANDS[verb].split()
    ]
    setting = [f"{option}={number}"] if "=" not in option else [f"--set={option[6:]}={number}"]
    code, out, err = electra_ds(verb, *words, *setting)
    assert not failed_well(code, out, err)
