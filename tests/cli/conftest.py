"""The command line in this process."""

import os
import sys

import pytest

from electra_ds import cli


class Exited(BaseException):
    """Raised in the place of os._exit."""


@pytest.fixture
def electra_ds(monkeypatch, capsys):
    """Run the command line here: arguments -> (exit code, standard output, standard error)."""

    def exit_process(code):
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", exit_process)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["electra-ds", *map(str, words)])
        try:
            cli.main()
            code = 0
        except Exited as exited:
            code = exited.args[0]
        except SystemExit as exited:
            code = exited.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
