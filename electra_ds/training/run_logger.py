"""Output of a run: console lines, metrics.jsonl and TensorBoard, continuous across resumes."""

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

from electra_ds.common.errors import UserError
from electra_ds.common.files import replacing
from electra_ds.common.json_files import set_aside
from electra_ds.common.own_folder import open_to_append, own_folder
from electra_ds.common.printable import printable_lines
from electra_ds.common.redaction import redacted
from electra_ds.training.metrics_file import SCHEMA, TRAIN, metric_lines, summary

TAGS = {"data_wait_share": "data/wait_share"}  # TensorBoard tags that are not SPLIT/KEY


class Logger:
    """A logger without output, for all ranks but 0. Rank 0 uses `RunLogger`."""

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def train(
        self, step: int, values: dict[str, float], seconds_left: float, verdict: str = ""
    ) -> None:
        """Log one interval of training. verdict: about learning; "" if there is none."""

    def valid(self, step: int, values: dict[str, float]) -> None:
        """Log one held-out evaluation; metrics of a mixture's sources are called source/metric."""

    def saved(self, step: int, pause_seconds: float) -> None:
        """Log the seconds that the checkpoint of `step` paused the training."""

    def advance(self, step: int) -> None:
        """Move the progress bar."""

    def say(self, text: str) -> None:
        """Print one line."""

    def running(self, step: int, seconds_per_step: float, every: int, seconds_left: float) -> None:
        """Say that the run trains, before its first log line."""

    def begin_phase(self, name: str, total_epochs: float) -> None:
        """Name the phase of the records that follow."""

    def flush(self) -> None:
        """Write all records to disk and sync them. Raises OSError when this fails."""


class RunLogger(Logger):
    """Console, OUT/metrics.jsonl and OUT/tensorboard. Use as a context manager."""

    def __init__(
        self, out: Path, step: int, total_steps: int, total_epochs: float | None, tensorboard: bool
    ):
        """Open the files. Raises OSError when a file cannot be written, UserError for a link.

        step: last step that is kept in the log; later records of an earlier attempt are removed.
        """
        note = _remove_later_records(out / "metrics.jsonl", step)
        self._file = open_to_append(out / "metrics.jsonl")
        self._unwritten = b""
        self._total_steps = total_steps
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _except_tensorboard
            self._writer = SummaryWriter(str(own_folder(out, "tensorboard")), purge_step=step + 1)
        self._console = Console(soft_wrap=True)
        if note:
            self.say(note)
        self._epochs = f"/{total_epochs:.4g}" if total_epochs else ""
        self._phase: dict[str, str] = {}
        self._bar = Progress(
            "{task.description}",
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            "ETA",
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("pretrain", total=total_steps, completed=step)

    def __enter__(self) -> "RunLogger":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        # The flush before the last checkpoint wrote everything that a resume keeps.
        with contextlib.suppress(OSError):
            self.flush()
        self._file.close()
        self._tensorboard(lambda writer: writer.close())

    def train(
        self, step: int, values: dict[str, float], seconds_left: float, verdict: str = ""
    ) -> None:
        """Log one interval of training. verdict: about learning; "" if there is none."""
        self._record(step, "train", values)
        self.say(
            f"step {step}  {summary(values, TRAIN)}  lr {values['lr']:.2e}  "
            f"norm {values['grad_norm']:.2f}  {values['tokens_per_second']:,.0f} tokens/s  "
            f"epoch {values['epoch']:.2f}{self._epochs}  ETA {_duration(seconds_left)}"
            + (f"  {verdict}" if verdict else "")
        )

    def valid(self, step: int, values: dict[str, float]) -> None:
        """Log one held-out evaluation; metrics of a mixture's sources are called source/metric."""
        self._record(step, "valid", values)
        sources: dict[str, dict[str, float]] = {}
        for key, value in values.items():
            source, _, name = key.rpartition("/")
            sources.setdefault(source, {})[name] = value
        for source, metrics in sources.items():
            title = f"held out, {source}" if source else "held out"
            self.say(f"step {step}  {title}: {summary(metrics)}")

    def saved(self, step: int, pause_seconds: float) -> None:
        """Log to TensorBoard the seconds that a checkpoint paused the training.

        metrics.jsonl has their sum per interval.
        """
        tag = "checkpoint/pause_seconds"
        self._tensorboard(lambda writer: writer.add_scalar(tag, pause_seconds, step))

    def running(self, step: int, seconds_per_step: float, every: int, seconds_left: float) -> None:
        """Say that the run trains, before its first log line.

        every: logging.every. seconds_left: to the end of the run.
        """
        self.say(
            f"step {step}  {seconds_per_step:.2f} s per step  ETA {_duration(seconds_left)}; "
            f"losses are logged every {every} steps (logging.every)"
        )

    def begin_phase(self, name: str, total_epochs: float) -> None:
        """Name the phase of the records that follow. total_epochs: of its data, at its end."""
        self._phase = {"phase": name} if name else {}
        self._epochs = f"/{total_epochs:.4g}"

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """Print one line above the progress bar."""
        # The console may be a file on a full disk, or a closed pipe, for which rich exits.
        with contextlib.suppress(OSError, SystemExit):
            shown = redacted(printable_lines(text))
            self._console.print(shown, highlight=False, markup=False)

    def flush(self) -> None:
        """Write all records to disk and sync them. Raises OSError when this fails.

        It is called before each commit, so that the log of a checkpoint's steps is on disk.
        """
        self._write()
        os.fsync(self._file.fileno())
        self._tensorboard(lambda writer: writer.flush())

    def _record(self, step: int, split: str, values: dict[str, float]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        record = {"step": step, "split": split, **self._phase, **finite}
        self._unwritten += (json.dumps(record) + "\n").encode()
        try:
            self._write()
        except OSError as error:
            self.say(
                f"step {step}: not logged yet ({error}); the write is repeated with the next line "
                "and at the next checkpoint"
            )
        for key, value in values.items():
            self._add_scalar(TAGS.get(key, f"{split}/{key}"), value, step)

    def _add_scalar(self, tag: str, value: float, step: int) -> None:
        self._tensorboard(lambda writer: writer.add_scalar(tag, value, step))

    def _write(self) -> None:
        try:
            while self._unwritten:  # a disk that fills up accepts a part
                written = self._file.write(self._unwritten)
                self._unwritten = self._unwritten[written:]
        except OSError as error:
            error.filename = self._file.name
            raise

    def _tensorboard(self, act: Callable[[Any], None]) -> None:
        try:
            if self._writer is not None:
                act(self._writer)
        except OSError as error:  # metrics.jsonl holds the same metrics, so the run continues
            self._writer = None
            self.say(f"TensorBoard's file is not written until the next start: {error}")


def _remove_later_records(path: Path, step: int) -> str:
    """Rewrite metrics.jsonl up to a step. A damaged file is set aside, and its readable lines are
    kept. Returns a line that says so, or ""."""
    note = ""
    count = 0
    with replacing(path) as file:
        file.write((json.dumps(SCHEMA) + "\n").encode())
        if path.is_dir() or (path.exists() and path.stat().st_size):
            try:
                for line, record in metric_lines(path):
                    count += 1
                    if record["step"] <= step:
                        file.write(line)
            except UserError as error:
                note = f"{error}; {set_aside(path)}; the {count} records before the damage are kept"
    return note


def _except_tensorboard(failure: threading.ExceptHookArgs) -> None:
    # The error of the thread that writes TensorBoard's file is also raised in the caller, so the
    # traceback of the thread is not printed.
    if not type(failure.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failure)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
