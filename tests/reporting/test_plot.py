"""Plots of metrics."""

import os
import subprocess
import sys

import pytest
from logged_run import log_run, valid_values
from running import CPU

from electra_ds.common.errors import UserError
from electra_ds.config.schema import OptimizerConfig
from electra_ds.reporting.plot import PANELS, plot, plot_schedule
from electra_ds.training.phases import Span
from electra_ds.training.run_logger import RunLogger
from electra_ds.training.schedule import learning_rate


def test_a_plot_needs_only_metrics_and_shows_every_held_out_point(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        log_run(tmp_path / name, range(2, 11, 2))  # step 5 has no record of the training
        with RunLogger(tmp_path / name, 10, 100, 1.0, tensorboard=False) as metrics:
            metrics.valid(7, valid_values(7))
    drawn = []

    def draw(_axis, x, y, label, **_):
        drawn.append((label, list(x), list(y)))

    monkeypatch.setattr(pyplot.Axes, "plot", draw)
    monkeypatch.setattr(pyplot.Axes, "legend", lambda self, **_: None)
    plot([tmp_path / "one", tmp_path / "two"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    held_out = next((x, y) for label, x, y in drawn if label == "two fixed corruption")
    assert held_out == (pytest.approx([0.01, 0.007]), [10.7, 7.7])  # a thousand tokens per step
    assert len(PANELS) == 4 and len({label for label, _, _ in drawn}) > 8


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.jsonl here"):
        plot([tmp_path], tmp_path / "curves.png")


@pytest.mark.filterwarnings("error")
def test_names_that_the_font_lacks_give_one_note_and_no_warning(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("\u0e44\u0e17\u0e22", "\u0639\u0631\u0628\u064a", "plain"):
        (tmp_path / name).mkdir()
        log_run(tmp_path / name, range(1, 6))
    runs = sorted(tmp_path.iterdir())
    assert plot(runs[:1], tmp_path / "a.png") == ""
    assert "lacks characters of the run names" in plot(runs, tmp_path / "b.png")


def test_a_pipe_in_the_place_of_the_picture_is_refused(tmp_path):
    """Opening it would wait for a reader."""
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 1}\n')
    os.mkfifo(tmp_path / "curves.png")
    with pytest.raises(UserError, match=r"--out .*curves\.png: is a named pipe"):
        plot([tmp_path], tmp_path / "curves.png")


def test_a_drawn_schedule_has_its_corners(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(
        pyplot.Axes, "plot", lambda _axis, x, y: drawn.append(dict(zip(x, y, strict=True)))
    )
    wsd = {"schedule": "wsd", "decay_steps": 1234}
    options = OptimizerConfig(peak_lr=0.5, warmup_steps=777, **wsd)
    plot_schedule([Span(options, 0, 100_000)], tmp_path / "rate.png")
    assert (tmp_path / "rate.png").read_bytes().startswith(b"\x89PNG")
    (rates,) = drawn
    assert {0, 777, 100_000 - 1234, 99_999} <= rates.keys() and len(rates) < 1010
    assert all(rate == learning_rate(options, step, 100_000) for step, rate in rates.items())
    plot_schedule([Span(options, 0, 2000)], tmp_path / "short.png")
    short = Span(OptimizerConfig(peak_lr=0.5, warmup_steps=9), 0, 1)
    plot_schedule([short], tmp_path / "one.png")
    drawn.clear()
    later = Span(options, 2000, 3000)
    plot_schedule([Span(options, 0, 2000), later, later], tmp_path / "phases.png")
    (rates,) = drawn
    assert {1999, 2000, 2777, 4999} <= rates.keys() and max(rates) == 4999
    assert rates[2777] == 0.5


def test_settings_of_the_current_folder_have_no_effect(tmp_path):
    """matplotlib reads matplotlibrc of the current folder when it is imported."""
    settings = "text.usetex: True\nfigure.figsize: 100000, 100000\n"
    (tmp_path / "matplotlibrc").write_text(settings)
    command = [sys.executable, "-P", "-m", "electra_ds", "check", "tiny", "--plot", "x.png"]
    done = subprocess.run(command, cwd=tmp_path, env=CPU, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "x.png").exists(), done.stderr
    (tmp_path / "matplotlibrc").write_bytes(b"\xff")
    done = subprocess.run(command, cwd=tmp_path, env=CPU, capture_output=True, text=True)
    assert done.returncode == 2 and "matplotlibrc" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_figures_and_settings_of_a_program_are_kept(tmp_path):
    from matplotlib import pyplot, rcParams

    figure = pyplot.figure()
    before = dict(rcParams)
    schedule = Span(OptimizerConfig(peak_lr=1, warmup_steps=1), 0, 10)
    plot_schedule([schedule], tmp_path / "x.png")
    assert pyplot.get_fignums() == [figure.number] and dict(rcParams) == before
    pyplot.close(figure)
