"""The command line: help without torch, exit codes, one message for a mistake, output of check."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import run_folders
import typer
from factory_run import factory_run

from electra_ds import cli
from electra_ds.cli.console import print_table
from electra_ds.cluster.stop_signals import stop_exit_code
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.config.loading import config_names

ROOT = Path(__file__).resolve().parents[2]
VERBS = sorted(typer.main.get_command(cli.app).commands)


def test_help_lists_the_verbs_in_the_order_of_their_use(electra_ds):
    _, out, _ = electra_ds("--help")
    listed = [line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line]
    assert [verb for verb in listed if verb in VERBS] == [
        *("train-tokenizer", "prepare", "convert", "stage", "verify", "stats", "inspect"),
        *("check", "pretrain", "status", "plot"),
        *("evaluate", "detect"),
        *("finetune", "predict", "submit"),
        *("export", "import", "average"),
    ]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_and_option_has_a_help_text(electra_ds, verb):
    code, out, err = electra_ds(verb, "--help")
    assert (code, err) == (0, "") and f"electra-ds {verb} [OPTIONS]" in out
    command = typer.main.get_command(cli.app).commands[verb]
    assert command.help and command.help.splitlines()[0] in " ".join(out.split())
    for parameter in command.params:
        assert parameter.help, f"{verb}: {parameter.name} has no help"


def test_the_help_of_run_names_every_preset():
    command = typer.main.get_command(cli.app).commands["pretrain"]
    (argument,) = [parameter for parameter in command.params if parameter.name == "run"]
    for preset in config_names("pretrain"):
        family = re.sub(r"-.*", "-*", preset)
        assert re.search(rf"(?<![\w-]){re.escape(family)}(?![\w+])", argument.help), preset


def test_the_help_of_export_names_fine_tuned_models():
    command = typer.main.get_command(cli.app).commands["export"]
    (argument,) = [parameter for parameter in command.params if parameter.name == "model"]
    assert "fine-tuned model" in argument.help


def test_one_function_prints_json():
    """It escapes what a terminal interprets."""
    for path in (ROOT / "electra_ds" / "cli").glob("*.py"):
        assert path.name == "console.py" or "json.dumps" not in path.read_text(), path


def test_the_list_of_verbs_has_a_whole_sentence_for_each(electra_ds):
    _, out, _ = electra_ds("--help")
    for verb in VERBS:
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [verb]]
        assert len(line.split()) > 3 and line.endswith(".") and not line.endswith("...")


MISTAKES = {
    "an unknown preset": (["check", "smal"], "did you mean 'small'"),
    "an unknown engine": (["check", "tiny", "--engine", "zero9"], "no engine config named 'zero9'"),
    "an unknown key": (["check", "tiny", "--set", "train.sead=1"], "did you mean 'seed'"),
    "a setting without a value": (
        ["check", "tiny", "--set", "train.seed"],
        "expected section.field=value",
    ),
    "ranks that do not fit": (
        ["check", "tiny", "--world-size", "5"],
        "cannot be split over 5 ranks",
    ),
    "no data to check against": (["check", "tiny", "--data", "nowhere"], "nowhere"),
    "no data to verify": (["verify", "nowhere"], "nowhere"),
    "no data to inspect": (["inspect", "nowhere"], "nowhere"),
    "no data for stats": (["stats", "nowhere"], "nowhere"),
    "no tokenizer": (
        ["prepare", "--input", "x", "--tokenizer", "nowhere", "--out", "data"],
        "nowhere: not found",
    ),
    "no text for a tokenizer": (
        ["train-tokenizer", "--input", "nowhere.txt", "--out", "tok"],
        "nowhere.txt",
    ),
    "no checkpoint to evaluate": (
        ["evaluate", "nowhere", "--data", "data"],
        "nowhere: no checkpoint here",
    ),
    "no checkpoint for detect": (["detect", "nowhere", "a text"], "nowhere: no checkpoint here"),
    "two texts": (["detect", "nowhere", "a text", "--file", __file__], "choose one"),
    "no metrics to plot": (["plot", "nowhere"], "no metrics.jsonl here"),
    "another number of ranks": (
        ["pretrain", "tiny", "--data", "d", "--out", "o", "--world-size", "2"],
        "--world-size is 2, but there is 1 rank, no launcher",
    ),
    "an unknown run": (
        ["pretrain", "nowhere.json", "--data", "d", "--out", "o"],
        "nowhere.json: not found",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_exit_code_2(electra_ds, monkeypatch, tmp_path, mistake):
    words, expected = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    code, out, err = electra_ds(*words)
    assert code == 2 and expected in err and "Traceback" not in out + err
    assert err.count("error: ") == 1 and err.startswith("electra-ds: error: ")


@pytest.mark.parametrize(
    "words",
    [
        "pretrain",
        "pretrain tiny",
        "nosuchverb",
        "check tiny --nosuch",
        "check tiny --world-size two",
        "detect out --file nowhere.txt",
        "prepare --input x --tokenizer y --out z --packing tight",
    ],
)
def test_wrong_usage_is_exit_code_2_with_the_usage(electra_ds, words):
    code, _, err = electra_ds(*words.split())
    assert code == 2 and "Usage:" in err and "Traceback" not in err


VALUES = [
    (name, option)
    for name, command in typer.main.get_command(cli.app).commands.items()
    for parameter in command.params
    for option in parameter.opts[:1]
    if not getattr(parameter, "is_flag", False) and parameter.name not in ("text", "original")
]


@pytest.mark.parametrize(("name", "option"), VALUES)
def test_an_empty_value_is_refused_and_is_not_the_current_folder(
    electra_ds, monkeypatch, tmp_path, name, option
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    forms = [[option, ""], [f"{option}="]] if option.startswith("-") else [[""]]
    if option in ("rows", "--workers"):
        forms = [["D", *form] for form in forms]
    for form in forms:
        code, out, err = electra_ds(name, *form)
        assert code == 2 and "is an empty string, as an unset variable" in err, (form, out, err)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_the_current_folder_and_an_empty_text_are_accepted(electra_ds, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "manifest.json: not found" in electra_ds("verify", ".")[2]
    assert "no checkpoint here" in electra_ds("detect", "nowhere", "")[2]


@pytest.mark.parametrize(("error", "code"), [(UserError("why"), 2), (RunFailure("why"), 1)])
def test_an_error_names_its_rank_if_there_are_several(electra_ds, monkeypatch, error, code):
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert electra_ds() == (code, "", "electra-ds: error: why\n")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert electra_ds() == (code, "", "electra-ds (rank 3): error: why\n")


def test_a_mistake_keeps_its_exit_code_without_a_reader_of_stderr(
    electra_ds, monkeypatch, tmp_path
):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as console:
        monkeypatch.setattr(sys, "stderr", console)
        assert electra_ds("inspect", tmp_path)[0] == 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # closing flushes the rest


def test_an_unexpected_error_keeps_its_traceback(electra_ds, monkeypatch):
    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    code, _, err = electra_ds()
    assert code == 1 and err.startswith("Traceback") and err.endswith("ZeroDivisionError\n")


def python(*words):
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environ, capture_output=True, text=True
    )


def test_help_imports_neither_torch_nor_deepspeed():
    for words in (["--help"], ["pretrain", "--help"]):
        script = (
            "import sys, electra_ds.cli\n"
            f"sys.argv = ['electra-ds', *{words!r}]\n"
            "try: electra_ds.cli.main()\n"
            "except SystemExit: pass\n"
            "heavy = ('torch', 'deepspeed', 'transformers', 'numpy')\n"
            "print('loaded', [name for name in heavy if name in sys.modules])"
        )
        done = python("-c", script)
        assert "Usage:" in done.stdout and done.stdout.endswith("loaded []\n"), done.stderr


def test_the_module_runs_the_same_command():
    done = python("-m", "electra_ds", "check", "smal")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "electra-ds: error: no pretrain config named 'smal'; did you mean 'small'?"
    )
    assert len(done.stderr.splitlines()) == 1


def test_check_shows_derived_numbers_memory_and_changed_values(electra_ds, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = electra_ds(
        "check", "small", "--world-size", "8", "--set", "train.micro_batch_size=4"
    )
    assert code == 0
    lines = [
        " ".join(line.replace("│", " ").replace("|", " ").split()) for line in out.splitlines()
    ]
    assert "accumulation 4 micro-batches" in "\n".join(lines)  # 128 rows / (8 ranks x 4)
    assert any(line.startswith("discriminator 13,549,057") for line in lines)
    assert any(line.startswith("GiB per rank") for line in lines)
    assert any(line.startswith("train.micro_batch_size 4 machine") for line in lines)  # changed
    assert not any(line.startswith("optimizer.peak_lr") for line in lines)  # as in the preset


def test_check_all_shows_every_value(electra_ds, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = electra_ds("check", "small", "--all")
    lines = [" ".join(line.replace("│", " ").split()) for line in out.splitlines()]
    assert code == 0
    assert any(line.startswith("optimizer.peak_lr 0.0005 science learning rate") for line in lines)
    assert any("shared, untied, all" in line for line in lines)  # the choices of model.sharing


def test_check_predicts_no_memory_of_a_users_model(electra_ds, tmp_path):
    factory_run(tmp_path)
    code, out, _ = electra_ds("check", tmp_path / "run.json")
    assert code == 0 and "parameters in all" in out and "GiB" not in out


def test_an_error_of_the_machine_is_one_line_with_the_path(electra_ds, monkeypatch):
    def failing(error):
        def fail():
            raise error

        monkeypatch.setattr(cli, "app", fail)
        return electra_ds()

    named = PermissionError(errno.EACCES, "Permission denied", "folder/x\x1b[2J")
    code, _, err = failing(named)
    assert (code, err) == (2, "electra-ds: error: folder/x\\x1b[2J: Permission denied\n")
    code, _, err = failing(OSError(errno.ENOSPC, "No space left on device"))
    assert (code, err) == (1, "electra-ds: error: No space left on device\n")
    code, _, err = failing(OSError("a fault of the program"))
    assert code == 1 and err.startswith("Traceback")
    monkeypatch.setenv("WORLD_SIZE", "abc")
    assert failing(UserError("why"))[2].endswith("error: why\n")


def test_the_end_of_a_file_is_not_aborted_without_a_word(electra_ds, monkeypatch):
    def fail(*_):
        raise EOFError

    monkeypatch.setattr("electra_ds.reporting.status.status", fail)
    code, _, err = electra_ds("status", "x")
    assert code == 1 and err.startswith("Traceback") and "Aborted" not in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_standard_output_is_an_error():
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "electra_ds", "check", "tiny"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environ)
    assert done.returncode == 1 and "No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("written", [False, True])
def test_a_suite_stopped_under_torchrun_needs_no_report(electra_ds, monkeypatch, tmp_path, written):
    """torchrun restarts after any other exit code than 0."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    stopped = "electra_ds.finetuning.finetune.finetune"
    monkeypatch.setattr(stopped, lambda *_, **__: stop_exit_code())
    if written:
        (tmp_path / "report.md").write_text("# Fine-tuning\n")
    words = ["finetune", "run", "tiny", "--tasks", "rte", "--out", tmp_path]
    code, out, err = electra_ds(*words)
    assert (code, err) == (0, "") and ("Fine-tuning" in out) == written


def test_a_table_shows_colons_as_they_are(capsys):
    print_table("title", ["text :smile:"], [[":100: [red]x[/red]"]])
    shown = capsys.readouterr().out
    assert "text :smile:" in shown and ":100: [red]x[/red]" in shown


def test_detect_refuses_an_endless_file(electra_ds, tmp_path):
    code, _, error = electra_ds("detect", tmp_path, "--file", "/dev/zero")
    assert code == 2 and "/dev/zero: more than 16,777,216 bytes" in error


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be"])
@pytest.mark.parametrize(
    "text",
    ["\u0432\u0447\u0435\u0440\u0430 \u0443\u0447\u0438\u0442\u0435\u043b\u044c", "a plain text"],
)
def test_detect_names_utf_16_and_utf_32(electra_ds, tmp_path, text, encoding):
    """Without a mark, such bytes may be valid UTF-8: a text of other characters."""
    (tmp_path / "x.txt").write_bytes(text.encode(encoding))
    code, _, error = electra_ds("detect", tmp_path, "--file", tmp_path / "x.txt")
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    assert code == 2 and f"not text in UTF-8 but in {name}; convert it: iconv -f {name}" in error


@pytest.mark.parametrize("head", [(), ("key", "value")])
@pytest.mark.parametrize("width", range(40, 48))
def test_a_table_loses_no_text_of_a_long_cell(capsys, monkeypatch, head, width):
    monkeypatch.setenv("COLUMNS", str(width))
    words = [f"\u732b\u306e{i}," for i in range(60)] + ["folder/" * 20]
    cli.console.print_table("table", head, [("words", " ".join(words))])
    out = capsys.readouterr().out
    cells = "".join(line.split("\u2502")[2] for line in out.splitlines() if line[:1] == "\u2502")
    assert "".join(cells.split()) == "".join(words)


@pytest.mark.parametrize(
    "words",
    [
        ("stats", "URL"),
        ("detect", "URL", "a text"),
        ("import", "URL", "--out", "o"),
        ("import", "missing", "--out", "URL"),
        ("prepare", "--input", "missing", "--tokenizer", "URL", "--out", "o"),
        ("stats", "missing", "--html=URL"),
    ],
)
def test_a_url_in_the_place_of_a_local_path_is_refused_without_its_password(electra_ds, words):
    given = [word.replace("URL", "https://user:PW@host/x") for word in words]
    code, out, err = electra_ds(*given)
    assert code == 2 and "https://***@host/x: is a URL; expected a local path" in err
    assert "PW" not in out + err


@pytest.mark.parametrize(
    "words",
    [
        ("URL",),
        ("stats", "missing", "URL"),
        ("stats", "https:/user:PW@host/x"),
        ("pretrain", "URL"),
    ],
)
def test_errors_of_arguments_hide_passwords(electra_ds, words):
    code, out, err = electra_ds(*(w.replace("URL", "https://user:PW@host/x") for w in words))
    assert code == 2 and "PW" not in out + err


def test_a_picture_of_check_is_refused_before_the_tables(electra_ds, tmp_path):
    pytest.importorskip("matplotlib")
    epochs = ("--set", "train.total_steps=null", "--set", "train.epochs=1")
    for words, message in (
        (("--plot", tmp_path / "rate.txt"), "--plot .*rate.txt: expected a file name that ends"),
        (("--plot", tmp_path), "--plot .*: expected a file name that ends"),
        (("--plot", tmp_path / "rate.png", *epochs), "train.epochs needs the data.*--data"),
    ):
        code, out, err = electra_ds("check", "tiny", *words)
        assert code == 2 and re.search(message, err) and not out, err
    code, out, _ = electra_ds("check", "tiny", "--plot", tmp_path / "rate.svg")
    assert code == 0 and str(tmp_path / "rate.svg") in out and (tmp_path / "rate.svg").exists()


def test_an_average_prints_its_checkpoints_and_refuses_text_as_weights(electra_ds, tmp_path):
    for name in ("a", "b"):
        run_folders.pretrained(tmp_path / name)
    words = ("average", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "i")
    for weights, message in (
        ("1,x", "--weights 1,x: expected numbers separated by commas"),
        ("1,", "--weights 1,: expected numbers"),
        ("1", "1 weights for 2 checkpoints"),
        ("-1,1", "--weights -1,1: their sum is 0"),
    ):
        code, _, err = electra_ds(*words, "--weights", weights)
        assert code == 2 and message in err and not (tmp_path / "i").exists()
    code, out, _ = electra_ds(*words, "--weights", "1,3")
    first, second, last = out.splitlines()
    assert code == 0 and first == f"0.25 x {tmp_path / 'a'}/ckpt/final, step 7"
    assert second.startswith("0.75 x ") and "average of 2 checkpoints" in last
