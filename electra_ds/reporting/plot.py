"""Curves of one or several runs as a picture, drawn from metrics.jsonl only."""

from pathlib import Path
from typing import Any

import numpy as np

from electra_ds.common.errors import UserError
from electra_ds.common.outputs import check_output_file
from electra_ds.common.printable import printable
from electra_ds.training.metrics_file import read_metrics

FORMATS = (".png", ".svg", ".pdf")
# title of a panel -> its curves as SPLIT/KEY, separated by spaces
PANELS = {
    "MLM loss (nats per chosen token)": "train/mlm_loss valid/mlm_loss valid/unigram_loss",
    "discriminator loss (nats per token)": "train/disc_loss valid/disc_loss valid/base_rate_loss",
    "discriminator AUC, held out": "valid/disc_auc valid/fixed_auc",
    "generator, held out": "valid/mlm_accuracy valid/replaced_fraction",
}
NAMES = {
    "disc_auc": "own generator",
    "fixed_auc": "fixed corruption",
    "unigram_loss": "unigram",
    "base_rate_loss": "base rate",
    "mlm_accuracy": "MLM accuracy",
    "replaced_fraction": "replaced share",
}


def plot(runs: list[Path], out: Path) -> None:
    """Draw the curves of runs over tokens into `out` (png, svg, pdf).

    runs: run folders. out: path of the picture. Raises UserError when a run has no metrics.jsonl,
    when `out` cannot be written, and when matplotlib (extra [plot]) is not installed.
    """
    for run in runs:
        if not (run / "metrics.jsonl").exists():
            raise UserError(f"{printable(run)}: no metrics.jsonl here; expected a run folder")
    if out.suffix.lower() not in FORMATS:
        raise UserError(
            f"--out {printable(out)}: expected a file name that ends with one of "
            f"{', '.join(FORMATS)}"
        )
    try:
        import matplotlib
    except ImportError:
        raise UserError("plot needs matplotlib: pip install 'electra_ds[plot]'") from None
    check_output_file(out, "--out")
    matplotlib.use("Agg")
    from matplotlib import pyplot

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
    try:
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise UserError(
            f"--out {printable(out)}: cannot be written ({error.strerror}); expected a file in a "
            "folder with write permission and free space"
        ) from None
    finally:
        pyplot.close(figure)


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
