"""Pictures: curves of runs, drawn from metrics.jsonl only, and the learning rate of a config."""

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from electra_ds.common.errors import UserError
from electra_ds.common.folder_kinds import found_at
from electra_ds.common.outputs import check_output_file
from electra_ds.common.printable import printable
from electra_ds.training.metrics_file import read_metrics
from electra_ds.training.phases import Span

MOST_POINTS = 1000  # evenly spaced steps of a drawn schedule
FORMATS = (".png", ".svg", ".pdf")
# title of a panel -> its curves as SPLIT/KEY, separated by spaces
PANELS = {
    "MLM loss (nats per chosen token)": "train/mlm_loss valid/mlm_loss valid/unigram_loss",
    "discriminator loss (nats per token)": "train/disc_loss valid/disc_loss valid/base_rate_loss",
    "discriminator AUC, held out": "valid/disc_auc valid/fixed_auc",
    "generator, held out": "valid/mlm_accuracy valid/replaced_fraction",
}
# Warnings of matplotlib about characters that its font does not have, or does not join.
FONT_WARNING = re.compile(r"Glyph .* missing|does not support")
NAMES = {
    "disc_auc": "own generator",
    "fixed_auc": "fixed corruption",
    "unigram_loss": "unigram",
    "base_rate_loss": "base rate",
    "mlm_accuracy": "MLM accuracy",
    "replaced_fraction": "replaced share",
}


def plot(runs: list[Path], out: Path) -> str:
    """Draw the curves of runs over tokens into `out` (png, svg, pdf); return a note, or "".

    The note says that the font has no glyphs for the name of a run.

    runs: run folders. out: path of the picture. Raises UserError when a run has no metrics.jsonl,
    when `out` cannot be written, and when matplotlib (extra [plot]) is not installed.
    """
    for run in runs:
        if not (run / "metrics.jsonl").exists():
            clause = found_at(run).clause
            raise UserError(
                f"{printable(run)}: no metrics.jsonl here{clause}; expected the folder of a run "
                "that has logged steps"
            )
    with _drawing(out, "--out") as pyplot, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure = _curves(pyplot, runs)
        _save(figure, out, "--out")
    return _font_note(caught)


def _curves(pyplot: Any, runs: list[Path]) -> Any:
    """Return the figure of `plot`."""
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for run in runs:
        records = read_metrics(run / "metrics.jsonl")
        for axis, (title, curves) in zip(axes.flat, PANELS.items(), strict=True):
            axis.set(title=title, xlabel="million tokens seen")
            axis.grid(alpha=0.3)
            for curve in curves.split():
                split, key = curve.split("/")
                _draw(axis, records, split, key, _label(run) if len(runs) > 1 else "")
    for axis in axes.flat:
        if axis.lines:
            axis.legend(fontsize=8)
    return figure


def plot_schedule(schedules: Sequence[Span], out: Path) -> None:
    """Draw the learning rate of a run over its steps into `out` (png, svg, pdf).

    schedules: of each phase; a schedule of several phases may occur several times.
    Raises UserError when `out` cannot be written, and when matplotlib (extra [plot]) is not
    installed.
    """
    different = list({span.first_step: span for span in schedules}.values())
    kinds = ", ".join(dict.fromkeys(span.options.schedule for span in different))
    with _drawing(out, "--plot") as pyplot:
        figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
        drawn = [(step, span.rate(step)) for span in different for step in _drawn_steps(span)]
        axis.plot(*zip(*drawn, strict=True))
        total_steps = sum(span.steps for span in different)
        title = f"learning rate, schedule {kinds}, {total_steps:,} steps"
        axis.set(title=title, xlabel="applied steps", ylabel="learning rate")
        axis.grid(alpha=0.3)
        _save(figure, out, "--plot")


@contextlib.contextmanager
def _drawing(out: Path, option: str) -> Iterator[Any]:
    """Yield matplotlib's pyplot, after the checks of the picture's path in `option`.

    Pictures have matplotlib's built-in settings. A file `matplotlibrc`, also one in the current
    folder, could set any size, or run LaTeX.
    """
    pyplot = _checked_pyplot(out, option)
    import matplotlib

    others = set(pyplot.get_fignums())
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        try:
            yield pyplot
        finally:
            for number in set(pyplot.get_fignums()) - others:
                pyplot.close(number)


def _drawn_steps(span: Span) -> list[int]:
    """Steps of the run at which a schedule is drawn: evenly spaced ones, and where it changes."""
    warmup, decay, steps = span.options.warmup_steps, span.options.decay_steps, span.steps
    corners = {0, warmup, steps - 1, *(() if decay is None else (steps - decay,))}
    evenly = np.linspace(0, steps - 1, min(steps, MOST_POINTS)).astype(int).tolist()
    return sorted(span.first_step + step for step in {*corners, *evenly} if step < steps)


def _checked_pyplot(out: Path, option: str) -> Any:
    """Return pyplot, after the checks of the picture's path."""
    if out.suffix.lower() not in FORMATS:
        raise UserError(
            f"{option} {printable(out)}: expected a file name that ends with one of "
            f"{', '.join(FORMATS)}"
        )
    try:
        import matplotlib
    except ImportError:
        what = "plot" if option == "--out" else option
        raise UserError(f"{what} needs matplotlib: pip install 'electra_ds[plot]'") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"{option} {printable(out)}: matplotlib cannot read its settings ({error}); correct or "
            "remove the file matplotlibrc in this folder"
        ) from None
    check_output_file(out, option)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, out: Path, option: str) -> None:
    try:
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise UserError(
            f"{option} {printable(out)}: cannot be written ({error.strerror}); expected a file in a "
            "folder with write permission and free space"
        ) from None


def _font_note(caught: list[warnings.WarningMessage]) -> str:
    """Return a note if warnings are about glyphs of the font; show the other warnings."""
    about_font = [w for w in caught if FONT_WARNING.search(str(w.message))]
    for warning in caught:
        if warning not in about_font:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    if not about_font:
        return ""
    return (
        "the font of matplotlib lacks characters of the run names, or their shaping; the legend "
        "shows boxes or separate letters for them; the curves are complete"
    )


def _label(run: Path) -> str:
    """The name of a run in the legend. `$` would start a formula, `_` hides an entry."""
    return printable(run.resolve().name).replace("$", r"\$").lstrip("_") + " "


def _draw(axis: Any, records: list[dict[str, Any]], split: str, key: str, prefix: str) -> None:
    train = [record for record in records if record["split"] == "train"]
    drawn = [r for r in records if train and r["split"] == split and r.get(key) is not None]
    train = [record for record in train if record.get("tokens") is not None]
    if not train:
        return
    steps = [record["step"] for record in train]
    millions = [record["tokens"] / 1e6 for record in train]
    # Million tokens at each record, interpolated between the training log lines.
    tokens = np.interp([r["step"] for r in drawn], steps, millions) if drawn else []
    style: dict[str, Any] = (
        {"linewidth": 0.8, "alpha": 0.5} if split == "train" else {"marker": ".", "linewidth": 1.5}
    )
    label = NAMES.get(key, "training" if split == "train" else "held out")
    axis.plot(tokens, [r[key] for r in drawn], label=prefix + label, **style)
