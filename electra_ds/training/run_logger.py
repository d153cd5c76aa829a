"""What does a run say while it runs? A console line, metrics.jsonl and TensorBoard, continuous across resumes.

metrics.jsonl: the first line names the schema; every other one is {"step", "split": "train" | "valid", numbers}.
"""

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from electra_ds.common.files import write_bytes
from electra_ds.training.metrics_file import SCHEMA, TRAIN, read_metrics, summary

TAGS = {"data_wait_share": "data/wait_share"}  # TensorBoard's names where they are not SPLIT/KEY


class RunLogger:
    """The three outputs of a run; rank 0 owns one. Use as a context manager."""

    def __init__(
        self, out: Path, step: int, total_steps: int, total_epochs: float | None, tensorboard: bool
    ):
        """step: where the run continues; later records of an earlier attempt are cut away."""
        self._cut_back(out / "metrics.jsonl", step)
        self._file = open(out / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115 (closed in __exit__)
        self._unwritten = b""
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _except_tensorboard
            self._writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)
        self._console = Console(soft_wrap=True)
        self._epochs = f"/{total_epochs:.4g}" if total_epochs else ""
        columns = (
            "{task.description}",
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            "ETA",
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("pretrain", total=total_steps, completed=step)

    def __enter__(self) -> "RunLogger":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        with contextlib.suppress(
            OSError
        ):  # the last checkpoint's flush had all that a resume keeps
            self.flush()
        self._file.close()
        self._tensorboard(lambda writer: writer.close())

    def train(self, step: int, values: dict[str, float], seconds_left: float) -> None:
        """Log one interval of training."""
        self._record(step, "train", values)
        self.say(
            f"step {step}  {summary(values, TRAIN)}  lr {values['lr']:.2e}  "
            f"norm {values['grad_norm']:.2f}  {values['tokens_per_second']:,.0f} tokens/s  "
            f"epoch {values['epoch']:.2f}{self._epochs}  ETA {_duration(seconds_left)}"
        )

    def valid(self, step: int, values: dict[str, float]) -> None:
        """Log one held-out evaluation; figures of a mixture's sources are called source/figure."""
        self._record(step, "valid", values)
        for source in dict.fromkeys(key.rpartition("/")[0] for key in values):
            own = {
                key.rpartition("/")[2]: value
                for key, value in values.items()
                if key.rpartition("/")[0] == source
            }
            self.say(f"step {step}  held out{source and f', {source}'}: {summary(own)}")

    def saved(self, step: int, pause_seconds: float) -> None:
        """How long the training stood still for the checkpoint of `step`; metrics.jsonl has the sum of an interval."""
        self._tensorboard(
            lambda writer: writer.add_scalar("checkpoint/pause_seconds", pause_seconds, step)
        )

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """One line for people, above the progress bar."""
        with contextlib.suppress(
            OSError, SystemExit
        ):  # a file on a full disk; a pipe nobody reads: rich would leave
            self._console.print(text, highlight=False, markup=False)

    def flush(self) -> None:
        """Make what was logged durable, before a checkpoint points past it; OSError when it cannot be."""
        self._write()
        os.fsync(self._file.fileno())
        self._tensorboard(lambda writer: writer.flush())

    def _record(self, step: int, split: str, values: dict[str, float]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._unwritten += (json.dumps({"step": step, "split": split, **finite}) + "\n").encode()
        try:
            self._write()
        except OSError as error:
            self.say(
                f"step {step}: not logged yet, tried again with the next line and by the next checkpoint: {error}"
            )
        for key, value in values.items():
            tag = TAGS.get(key, f"{split}/{key}")
            self._tensorboard(
                lambda writer, tag=tag, value=value: writer.add_scalar(tag, value, step)
            )

    def _write(self) -> None:
        try:
            while self._unwritten:  # a disk that gets full takes a part
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            error.filename = self._file.name
            raise

    def _tensorboard(self, act: Callable[[Any], None]) -> None:
        try:
            if self._writer is not None:
                act(self._writer)
        except OSError as error:  # it repeats metrics.jsonl: nothing to stop for
            self._writer = None
            self.say(f"TensorBoard's file is given up until the next start: {error}")

    def _cut_back(self, path: Path, step: int) -> None:
        found = read_metrics(path) if path.exists() and path.stat().st_size else []
        records = (SCHEMA, *(record for record in found if record["step"] <= step))
        write_bytes(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def _except_tensorboard(failure: threading.ExceptHookArgs) -> None:
    # The thread that writes its file hands the error on; the traceback that it prints beside would say it twice.
    if not type(failure.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failure)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
