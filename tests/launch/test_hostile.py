"""Hostile values in the options and variables of the launch scripts.

Nothing in a value is executed: it arrives unchanged, or is refused. The launched programs are
stand-ins that record their arguments. bash and DeepSpeed's runner are real; a second shell that
parses the joined arguments takes the place of ssh.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

from electra_ds.common.errors import UserError
from electra_ds.common.redaction import redacted
from electra_ds.config.loading import load_run

COMMANDS = (
    "touch executed",
    "touch${IFS}executed",
    "{touch,executed}",
    ">executed",
    "touch\texecuted",
    "touch executed#",
)
SETTINGS = (
    "$({})",
    "`{}`",
    ";{};",
    "|{}",
    "&&{}",
    "||{}",
    "&{}&",
    "\n{}\n",
    "\r\n{}",
    "'{}'",
    "';{};'",
    '";{};"',
    '"$({})"',
    "'$({})'",
    "PATH[$({})]",
    "x=PATH[$({})]+1",
    "${{x:-$({})}}",
    "<({})",
    "$((PATH[`{}`]))",
    "\\\n{}",
    "\\$({})",
    "-oProxyCommand={}",
    "--out=$({})",
    "--data=`{}`",
    "--set=model.x=$({})",
    "%h;{}",
    "~/{}",
    "* {}",
    "!{}",
    "\x1b[0m{}",
    "node1 slots=1;{}",
    "node1,$({})",
    "-e\n{}",
    "-e1e{}",
    "\u00e9 \u2028 $({})",
    " {} ",
    "-",
    "--",
    "",
    "'",
    '"',
    "\\",
    "$",
    "$((",
    "a b",
    "*",
    "?",
    "[",
    "~",
    "-rf",
    "%h%n",
)
STANDIN = r"""#!/bin/sh
printf '%s\0' "${0##*/}" "$@" > "$RECORDS/${0##*/}.$$"
case "$*" in *free_port*) echo 29500 ;; *device_count*) echo 2 ;; esac
"""
REMOTE = r"""#!/bin/sh
# Like pdsh: replaces %h, %u, %n; detects a host that ssh would read as an option.
# Like sshd: runs the joined arguments in a shell.
while :; do
    case $1 in
        -w) case ",$2" in *,-*) touch executed ;; esac; shift 2 ;;
        -f) shift 2 ;;
        -S) shift ;;
        *) break ;;
    esac
done
exec sh -c "$(printf '%s' "$*" | sed 's/%h/node1/g; s/%u/root/g; s/%n/0/g')"
"""
ENVIRON = {
    "NODES": "1",
    "RANKS": "2",
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "2",
    "SLURM_NNODES": "1",
    "SLURM_JOB_NODELIST": "node1",
    "SLURM_ARRAY_TASK_ID": "0",
}


class Sandbox:
    """A copy of the launch folder, with stand-ins first on PATH that record their arguments."""

    def __init__(self, folder: Path, seed: str):
        self.dice, self.folder = random.Random(seed), folder
        self.launch, self.records, self.bin = (
            folder / "checkout/launch",
            folder / "records",
            folder / "bin",
        )
        shutil.copytree(ROOT / "launch", self.launch)
        (folder / "data").mkdir()
        (folder / "data/manifest.json").write_text("{}")
        for path in (self.records, self.bin, folder / "home"):
            path.mkdir()
        for name in (
            "python",
            "deepspeed",
            "torchrun",
            "mpirun",
            "srun",
            "pdsh",
            "electra-ds",
            "nvidia-smi",
        ):
            (self.bin / name).write_text(REMOTE if name == "pdsh" else STANDIN)
            (self.bin / name).chmod(0o755)
        self.environ = ENVIRON | {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "RECORDS": str(self.records),
            "SLURM_SUBMIT_DIR": str(folder / "checkout"),
            "HOME": str(folder / "home"),
        }

    def value(self) -> str:
        """A command that creates a file, quoted so that some shell would run it."""
        parts = self.dice.choices(SETTINGS, k=self.dice.choice((1, 1, 1, 2)))
        return "".join(part.format(self.dice.choice(COMMANDS)) for part in parts)

    def run(
        self, script: str, *arguments: str, **environ: str
    ) -> tuple[int, dict[str, list[list[str]]]]:
        """Run a script; returns its exit code and the arguments of each call of a stand-in.

        Fails if a command in a value was executed.
        """
        environ = self.environ | environ
        command = ["bash", str(Path(environ["SLURM_SUBMIT_DIR"]) / "launch" / script), *arguments]
        done = subprocess.run(
            command, env=environ, cwd=self.folder, input=b"-\n", capture_output=True, timeout=60
        )
        self.check(script, arguments, environ)
        assert done.returncode != 2 or done.stderr, "refused without a message"
        self.errors = done.stderr.decode(errors="replace")
        self.output = done.stdout.decode(errors="replace")
        return done.returncode, self.calls()

    def check(self, *values: object) -> None:
        """Fail if a command in a value was executed."""
        created = [path for path in self.folder.rglob("executed*") if path.is_file()]
        assert not created, values

    def calls(self) -> dict[str, list[list[str]]]:
        found = {}
        for path in sorted(self.records.iterdir()):
            program, *arguments = (
                path.read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
            )
            found.setdefault(program, []).append(arguments)
            path.unlink()
        return found


@pytest.fixture
def sandbox(tmp_path: Path, request: pytest.FixtureRequest) -> Sandbox:
    return Sandbox(tmp_path, request.node.name)


def contains(call: list[str], arguments: list[str]) -> bool:
    return any(call[i : i + len(arguments)] == arguments for i in range(len(call)))


LAUNCHERS = {
    "local.sh": "deepspeed",
    "torchrun.sh": "torchrun",
    "mpi.sh": "mpirun",
    "pretrain.sbatch": "srun",
}


@pytest.mark.parametrize("script", LAUNCHERS)
def test_options_arrive_unchanged(sandbox: Sandbox, script: str) -> None:
    arrived = 0
    for _ in range(25):
        options = [
            sandbox.value(),
            "--data",
            sandbox.value(),
            "--out",
            sandbox.value(),
            "--set",
            sandbox.value(),
        ]
        if script == "torchrun.sh":  # its health check reads the folder
            options[2] = str(sandbox.folder / "data")
        other = sandbox.dice.choice(
            ["JOB", "RENDEZVOUS", "RESTARTS", "MPIRUN", "MASTER_ADDR", "SLURM_JOB_NODELIST"]
        )
        code, calls = sandbox.run(script, *options, **{other: sandbox.value()})
        if LAUNCHERS[script] not in calls:
            refused = "" in options or "expected an integer" in sandbox.errors
            assert (code == 2 and refused) or "bad node" in sandbox.errors, sandbox.errors
        else:
            assert contains(
                calls[LAUNCHERS[script]][-1], ["pretrain", *options, "--world-size", "2"]
            )
            arrived += 1
    assert arrived > 10


@pytest.mark.parametrize("name", ["RANKS", "NODES", "PYTHON"])
def test_a_variable_that_is_no_number_is_refused(sandbox: Sandbox, name: str) -> None:
    for script in LAUNCHERS:
        for _ in range(10):
            options = ["tiny", "--data", str(sandbox.folder / "data"), "--out", "out"]
            code, calls = sandbox.run(script, *options, **{name: sandbox.value() or "-"})
            assert code == 2 or contains(
                calls[LAUNCHERS[script]][-1], ["pretrain", *options, "--world-size", "2"]
            )


def test_hostile_paths_of_the_checkout_and_of_python(sandbox: Sandbox) -> None:
    options = ["tiny", "--data", str(sandbox.folder / "data"), "--out", "out"]
    (sandbox.folder / "hosts").write_text("node1 slots=2\n")
    for number in range(15):
        checkout, tools = (
            sandbox.folder / f"{number} {sandbox.value().replace('/', '')}"[:250] for _ in range(2)
        )
        tools = tools.with_name(tools.name.replace(":", ""))  # PATH cannot hold a colon
        shutil.copytree(sandbox.launch, checkout / "launch", dirs_exist_ok=True)
        shutil.copytree(sandbox.bin, tools, dirs_exist_ok=True)
        environ = {"PYTHON": str(tools / "python"), "SLURM_SUBMIT_DIR": str(checkout)}
        for script, program in LAUNCHERS.items():
            code, calls = sandbox.run(script, *options, **environ)
            assert contains(calls[program][-1], ["pretrain", *options, "--world-size", "2"]), (
                code,
                environ,
            )
        assert (
            sandbox.run(
                "deepspeed.sh", *options, HOSTFILE=str(sandbox.folder / "hosts"), **environ
            )[0]
            == 2
        )


def test_the_other_scripts_pass_arguments_unchanged(sandbox: Sandbox) -> None:
    sandbox.environ |= {"SLURM_NTASKS": "2", "TASKS": "rte"}
    for _ in range(15):
        values = [sandbox.value() for _ in range(6)]
        model, config, data, out, *options = values
        expected = ["finetune", model, config, "--data", data, "--out", out]
        for script, program in (("glue.sh", "torchrun"), ("glue.sbatch", "srun")):
            (call,) = sandbox.run(script, *values)[1][program]
            assert contains(call, expected) and call[-2:] == options
        sandbox.run("glue.sbatch", *values, TASKS=sandbox.value())
        options = [
            "--input",
            values[0],
            "--tokenizer",
            values[1],
            "--out",
            values[2] or "out",
            *values[3:],
        ]
        for script, program in (("prepare.sh", "mpirun"), ("prepare.sbatch", "srun")):
            (call,) = sandbox.run(script, *options, MPIRUN=values[0], SLURM_MPI_TYPE=values[1])[1][
                program
            ]
            assert call[-len(options) - 1 :] == ["prepare", *options]
        assert sandbox.run("prepare.sh", *options, RANKS=sandbox.value() or "-") == (2, {})
        assert sandbox.run("health.sh", sandbox.value())[0] == 1


def test_quickstart_passes_arguments_unchanged(sandbox: Sandbox) -> None:
    venv = sandbox.folder / "checkout/.venv"
    shutil.copytree(sandbox.bin, venv / "bin")
    (venv / ".installed").touch()
    for _ in range(15):
        source, out, steps = "/" + sandbox.value(), "/" + sandbox.value(), sandbox.value()
        steps = sandbox.dice.choice((steps, "PATH[$(touch executed)]"))
        code, calls = sandbox.run(
            "quickstart.sh", "--input", source, "--out", out, "--steps", steps
        )
        assert code == 2 and not calls
        calls = sandbox.run("quickstart.sh", "--input", source, "--out", out)[1]
        assert all(contains(call, ["--input", source]) for call in calls["electra-ds"])
        assert contains(calls["deepspeed"][0], ["--data", f"{out}/data", "--out", f"{out}/run"])


def remote(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, environ: dict, arguments: list[str]
) -> dict[str, list]:
    """Calls of the stand-ins when DeepSpeed's runner starts with these arguments."""
    from deepspeed.launcher import runner

    with monkeypatch.context() as here:
        here.chdir(sandbox.folder)
        for name in list(os.environ):
            here.delenv(name)
        for name, value in (sandbox.environ | environ).items():
            here.setenv(name, value)
        here.setattr(sys, "executable", str(sandbox.bin / "python"))
        here.setattr(runner, "DEEPSPEED_ENVIRONMENT_NAME", environ["DS_ENV_FILE"])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with contextlib.suppress(SystemExit):
            runner.main(arguments)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    sandbox.check(arguments, environ)
    return sandbox.calls()


def test_arguments_through_ssh_arrive_unchanged_or_are_refused(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second shell parses options, exported variables, their file and host names."""
    hosts, variables = sandbox.folder / "hosts", sandbox.folder / "variables"
    plain = "".join(
        chr(code) for code in range(33, 127) if chr(code).isalnum() or chr(code) in "_@+=:,./-"
    )
    arrived = refused = 0
    for number in range(120):
        hosts.write_text("node1 slots=2\n")
        variables.write_text("NCCL_DEBUG=INFO\nOWN=a b;c|d&e<f>'g' (h) * ~\n")
        odd = "".join(sandbox.dice.choices(plain, k=sandbox.dice.randint(1, 12)))
        options = ["tiny", "--data", "data", "--out", "out", "--set", odd]
        environ = {"HOSTFILE": str(hosts), "DS_ENV_FILE": str(variables), "MASTER_ADDR": "node1"}
        value, hostile = sandbox.value(), number % 8
        if hostile == 0:
            options[-1] = sandbox.dice.choice((value, value, "50%h"))
        elif hostile == 1:
            environ[
                sandbox.dice.choice(
                    ["MASTER_ADDR", "PYTHONPATH", "PYTHONSTARTUP", "UCX_TLS", "NCCL_X"]
                )
            ] = value
        elif hostile == 2:
            before, after = sandbox.dice.choice(("A=1", "A=", "")), sandbox.dice.choice(("=1", ""))
            variables.write_text(f"{before}{value}{after}\nB=2")
        elif hostile == 3:
            line = sandbox.dice.choice(
                (
                    "{} slots=1",
                    "node2 {}",
                    "node2 slots=1{}",
                    "{}",
                    "node2 slots=1 #\r-oProxyCommand={} slots=1",
                )
            )
            hosts.write_bytes(f"node1 slots=2\n{line.format(value)}\n".encode())
        elif hostile == 4:
            environ["HOSTFILE"] = sandbox.dice.choice((value, "-e1e touch executed"))
        code, calls = sandbox.run("deepspeed.sh", *options, **environ)
        assert (code in (1, 2)) if "deepspeed" not in calls else code == 1
        if "deepspeed" not in calls:
            refused += 1
            assert hostile < 5, sandbox.errors
            continue
        arrived += 1
        (start,) = remote(sandbox, monkeypatch, environ, calls["deepspeed"][0])["python"]
        assert contains(start, ["electra_ds", "pretrain", *options, "--world-size"]), (
            start,
            options,
            environ,
        )
    assert arrived > 40 and refused > 40


def test_a_hostile_setting_raises_user_error(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sandbox.folder)
    for _ in range(250):
        value = sandbox.value()
        for text in (value, f"train.seed={value}", f"model.{value}=1", f"{value}=1"):
            with pytest.raises(UserError):
                load_run("tiny", [text])
        with pytest.raises(UserError):
            load_run(value or "-")
    sandbox.check()


@pytest.mark.parametrize("name", ["SLURM_ARRAY_TASK_ID", "SLURM_NTASKS"])
def test_a_number_of_an_array_job_is_refused_or_used_as_it_is(sandbox: Sandbox, name: str) -> None:
    for _ in range(15):
        code, calls = sandbox.run("glue.sbatch", "m", "c", "d", "o", **{name: sandbox.value()})
        assert code == 2 and not calls.get("srun"), sandbox.errors
    assert sandbox.run("glue.sbatch", "m", "c", "d", "o", SLURM_ARRAY_TASK_ID="9")[0] == 2
    (call,) = sandbox.run("glue.sbatch", "m", "c", "d", "o", SLURM_ARRAY_TASK_ID="8")[1]["srun"]
    assert contains(call, ["--tasks", "wnli", "--seeds", "2"])


@pytest.mark.parametrize(
    "name", ["SLURM_RESTART_COUNT", "MAX_RESTARTS", "RESTARTS", "SLURM_NTASKS"]
)
def test_a_count_becomes_no_path_and_no_option(sandbox: Sandbox, name: str) -> None:
    """SLURM_RESTART_COUNT is a part of the name of a file that is removed."""
    kept = sandbox.folder / "kept"
    kept.write_text("")
    script = "torchrun.sh" if name == "RESTARTS" else "pretrain.sbatch"
    options = ["tiny", "--data", str(sandbox.folder / "data"), "--out", "out"]
    for value in ("/../../kept", "-1", "1.5", "1e9", "9" * 30, sandbox.value() or "-"):
        code, _ = sandbox.run(script, *options, **{name: value})
        assert code == 2 and name in sandbox.errors, sandbox.errors
    assert kept.exists()


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1 slots=8\nnode2 slots=4", "node1,node2"),  # no newline at the end
        ("node1 slots=8 \r\nnode2  slots=4\t\r\n\n", "node1,node2"),
        ("# nodes\nnode1 slots=8 # the first\n", "node1"),
        ("node1 slots=8\nnode1 slots=8\n", "occurs twice"),
        ("node1 slots=99999999999999999999\n", "expected a line"),
        ("node1 slots=0\n", "expected a line"),
        ("", "contains no nodes"),
    ],
)
def test_a_hostfile_is_read_to_its_end(sandbox: Sandbox, text: str, hosts: str) -> None:
    (sandbox.folder / "hosts file").write_text(text)
    options = ["tiny", "--data", str(sandbox.folder / "data"), "--out", "out"]
    code, _ = sandbox.run("deepspeed.sh", *options, HOSTFILE="hosts file")
    if "node1" in hosts:
        printed = sandbox.output.replace("\\", "")
        assert f"pdsh -S -w {hosts} " in printed, sandbox.output + sandbox.errors
    else:
        assert code == 2 and hosts in sandbox.errors


def test_a_hostfile_that_is_no_file_is_refused(sandbox: Sandbox) -> None:
    for place in ("nowhere", "data"):
        code, _ = sandbox.run("deepspeed.sh", "tiny", "--data", "d", "--out", "o", HOSTFILE=place)
        assert code == 2 and "not a readable file" in sandbox.errors


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2@host/D?token=hunter3&x=1",
        "https://user:hunter2/hunter3@host/D",
        "https://user:hunter2@host/D#sig=hunter3",
        "https://user:hunter2@host/D;token=hunter3",
        "https://user:hunter1@hunter2@host/D",
        "https://hunter1@hunter2:80@host/D",
    ],
)
def test_printed_commands_show_no_secret(sandbox: Sandbox, url: str) -> None:
    sandbox.run("local.sh", "tiny", "--data", url, "--out", "out")
    assert "hunter" not in sandbox.output + sandbox.errors and "***@host/D" in sandbox.output


FUNCTION = """
set -u
source "$1/common.sh"
shift
"$@"
"""


def call(sandbox: Sandbox, *words: str, **variables: str) -> str:
    """The output, on both streams, of a function of common.sh; it ends within seconds."""
    done = subprocess.run(
        ["bash", "-c", FUNCTION, "x", str(sandbox.launch), *words],
        env=sandbox.environ | variables,
        input=variables.get("input", "").encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    )
    return done.stdout.decode(errors="surrogateescape")


def test_users_and_passwords_are_hidden_as_in_python(sandbox: Sandbox) -> None:
    parts = ["a", "b.c", ":", "@", "/", "?x=1", "&n=1", "#", ":80", "p@q", "-", "?"]
    urls = ["https://" + "".join(sandbox.dice.choices(parts, k=6)) for _ in range(300)]
    urls += ["https://user:first@second@host/D", "https://h/package@1.0/x", "s3://K:S/T@bucket"]
    found = call(sandbox, "redacted", input="\n".join(urls)).splitlines()
    for url, shown in zip(urls, found, strict=True):
        in_python = redacted(url)
        if "***" in in_python:
            assert "***" in shown and len(shown) <= len(in_python), (url, in_python)
    assert found[-3:] == ["https://***@host/D", "https://***@1.0/x", "s3://***@bucket"]


def test_a_password_with_a_blank_is_hidden_in_a_printed_command(sandbox: Sandbox) -> None:
    found = call(sandbox, "redacted", input="--data https://me:hunter\\ 2@host/D?code=abc --out o")
    assert found.strip() == "--data https://***@host/D?code=*** --out o"


def test_error_files_are_printed_without_control_characters(sandbox: Sandbox) -> None:
    out = sandbox.folder / "out"
    out.mkdir()
    (out / "error-rank-0.json").write_text('{"error": "lost \x1b[1m \x9b31m \u202e evil \x7f"}')
    (out / "error-rank-\u202e1.json").write_text("second https://me:hunter2@host")
    printed = call(sandbox, "judge", "1", out=str(out), stopped="none", was_done="")
    assert "lost" in printed and "second https://***@host" in printed
    assert printed.isascii() and all(char.isprintable() or char == "\n" for char in printed)


def test_error_files_that_are_no_regular_files_are_left_out(sandbox: Sandbox) -> None:
    out = sandbox.folder / "out"
    out.mkdir()
    os.mkfifo(out / "error-rank-0.json")
    (sandbox.folder / "foreign").write_text("foreign")
    (out / "error-rank-1.json").symlink_to(sandbox.folder / "foreign")
    (out / "error-rank-2.json").mkdir()
    (out / "error-rank-3.json").write_text("third")
    printed = call(sandbox, "judge", "1", out=str(out), stopped="none", was_done="")
    assert "third" in printed and "foreign" not in printed and "failed (exit code 1" in printed


def test_no_module_is_imported_from_the_current_folder(sandbox: Sandbox) -> None:
    (sandbox.bin / "deepspeed").write_text(
        "#!/bin/sh\necho safe path $PYTHONSAFEPATH $PYTHONPATH\n"
    )
    sandbox.run("local.sh", "tiny", "--data", "d", "--out", "out")
    assert f"safe path 1 {sandbox.launch.parent}" in sandbox.output


@pytest.mark.parametrize(
    "url", ["http://user:hunter2@127.0.0.1:9/x", "file:///user:hunter2@host/x"]
)
def test_the_check_of_a_node_shows_no_secret(url: str) -> None:
    done = subprocess.run(
        ["bash", ROOT / "launch/health.sh", url],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "cannot read" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr


def test_quickstart_takes_a_url_and_shows_no_secret(sandbox: Sandbox) -> None:
    venv = sandbox.folder / "checkout/.venv"
    shutil.copytree(sandbox.bin, venv / "bin")
    (venv / ".installed").touch()
    url = "https://user:hunter2@host/x.txt"
    calls = sandbox.run("quickstart.sh", "--input", url)[1]
    assert all(contains(call, ["--input", url]) for call in calls["electra-ds"])
    assert "hunter2" not in sandbox.output + sandbox.errors


def test_a_text_is_printed_without_control_characters_and_links(sandbox: Sandbox) -> None:
    (sandbox.folder / "text").write_text(
        "| t\u00e4sk | 1.0 |\n\x1b]0;x\x07\u009b2J https://u:hunter2@h/\n"
    )
    (sandbox.folder / "link").symlink_to("text")
    shown = call(sandbox, "show_text", str(sandbox.folder / "text"))
    assert "| t\u00e4sk | 1.0 |\n" in shown and "hunter2" not in shown
    assert not set(shown) & set("\x1b\x07\u009b")
    assert call(sandbox, "show_text", str(sandbox.folder / "link")) == ""
