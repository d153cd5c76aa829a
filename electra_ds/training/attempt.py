"""One start of a run: its options, what it consists of, and the checks of the run folder."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from electra_ds.cluster.launchers import Ranks
from electra_ds.common.errors import UserError
from electra_ds.common.folder_kinds import found_at
from electra_ds.common.folder_lock import Lock
from electra_ds.common.outputs import check_outside
from electra_ds.common.printable import printable, printable_lines, shortened
from electra_ds.common.redaction import redacted
from electra_ds.config.schema import MAX_STEPS, RunConfig
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.training.branch import Branch
from electra_ds.training.checkpoint import folder_of_model
from electra_ds.training.phases import Phase, TrainingData


@dataclass(frozen=True)
class AttemptOptions:
    """Options of one attempt.

    stop_at_step: save and stop after this step.
    max_minutes: save and stop after this time.
    extend: continue a finished run with a larger train.total_steps, or with longer or more phases.
    init_from: a run or checkpoint; a new run starts from its weights.
    branch_from: a run or checkpoint with moments; a new run continues it with its own config.
    read_generator: returns the weights of a frozen generator by canonical name, for the config with
        the values of the data and the tokenizer of the data.
    asked: reasons to stop at the next vote; signal handlers append to it.
    Raises UserError when stop_at_step or max_minutes is out of range, and for options that exclude
    each other.
    """

    stop_at_step: int | None = None
    max_minutes: float | None = None
    extend: bool = False
    init_from: Path | None = None
    read_generator: Callable[[RunConfig, Tokenizer], dict[str, Tensor]] | None = None
    branch_from: Path | None = None
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.stop_at_step is not None and not 1 <= self.stop_at_step <= MAX_STEPS:
            raise UserError(
                f"--stop-at-step {shortened(self.stop_at_step)}: expected a step from 1 to "
                f"{MAX_STEPS:,}"
            )
        minutes = self.max_minutes
        if minutes is not None and not (minutes >= 0 and math.isfinite(minutes)):
            raise UserError(f"--max-minutes {minutes}: expected a number of minutes, 0 or more")
        if self.branch_from is None:
            return
        for given, option in (
            (self.init_from, "--init-from"),
            (self.read_generator, "--generator-from"),
        ):
            if given is not None:
                raise UserError(
                    f"--branch-from and {option} exclude each other: a branch has all weights of "
                    f"its checkpoint; leave {option} out"
                )


def check_out(out: Path, init_from: Path | None = None, branch_from: Path | None = None) -> None:
    """Check the path of the run folder, before anything is written to it.

    Raises UserError when it is no folder or a folder of prepared data, for a new run in the folder
    of a model or of finetune, and for one below the run that its weights come from.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {printable(out)}: is a file; expected a folder for the run")
    if (out / "manifest.json").exists():
        raise UserError(
            f"--out {printable(out)}: holds prepared data; give the run a folder of its own"
        )
    found = found_at(out)
    is_taken = found.kind in ("hugging face", "fine-tuned", "checkpoint")
    if is_taken and not (out / "ckpt").exists():
        raise UserError(f"--out {printable(out)}: {found.phrase}; give the run a folder of its own")
    if not (out / "config.json").exists():
        sources = {"--init-from": init_from, "--branch-from": branch_from}
        check_outside(out, "--out", {name: _run_of(path) for name, path in sources.items()})


def _run_of(path: Path | None) -> Path | None:
    """The run folder of a run or checkpoint; None for other paths."""
    is_model = path is not None and found_at(path).kind in ("run", "checkpoint")
    return folder_of_model(path) if path is not None and is_model else None


@dataclass(frozen=True)
class Attempt:
    """One start of a run: its config, data, run folder, ranks and options.

    data: of the first phase. phases: a run without phases is one phase.
    """

    config: RunConfig
    data: TrainingData
    phases: list[Phase]
    out: Path
    ranks: Ranks
    options: AttemptOptions
    lock: Lock
    began: float  # time.monotonic()
    total_steps: int
    init_from: Path | None = None  # the checkpoint that --init-from stands for, in a new run
    branch: Branch | None = None  # what --branch-from stands for, in a new run
    generator: dict[str, Tensor] | None = None  # weights of --generator-from, emptied once set

    def print(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.ranks.rank == 0:
            with contextlib.suppress(OSError):  # the console may be a file on a full disk
                print(redacted(printable_lines(text)), flush=True)
