"""Metrics, weights and moments in a run folder, and their comparison with another run."""

from pathlib import Path

import torch

from electra_ds.training import checkpoint
from electra_ds.training.metrics_file import TIMED, read_metrics


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of a run's latest checkpoint."""
    found = checkpoint.latest(run / "ckpt")
    meta = checkpoint.read_meta(found)
    return dict(checkpoint.tensors(found, meta)) | dict(checkpoint.tensors(found, meta, "optim"))


def curve(run: Path) -> list[dict]:
    """The records of metrics.jsonl without times and rates."""
    return [
        {key: value for key, value in record.items() if key not in TIMED}
        for record in read_metrics(run / "metrics.jsonl")
    ]


def is_bit_equal(run: Path, other: Path) -> bool:
    """Whether the weights and moments of two runs are equal to the last bit."""
    first, second = tensors(run), tensors(other)
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def distance(run: Path, other: Path) -> float:
    """The largest relative difference of losses and gradient norms; both logged the same steps."""
    first, second = (
        [record for record in curve(folder) if record["split"] == "train"]
        for folder in (run, other)
    )
    return max(
        abs(a[key] - b[key]) / abs(b[key])
        for a, b in zip(first, second, strict=True)
        for key in ("loss", "mlm_loss", "disc_loss", "grad_norm")
    )
