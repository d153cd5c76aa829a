"""Scenarios: wrong data, losses that are spikes or not finite, fp16 scales that overflow."""

import contextlib
import json
from collections.abc import Iterator

from scenario_tools import SAVED, STOPPED, copy, finish, here, note, stop, train, write_engine
from small_run import CUT, STAGES

from electra_ds.data.loader import Loader
from electra_ds.model.objective import ElectraObjective
from electra_ds.training import engine as engine_module

GUARDED_ENGINES = {f"z{stage}": f"zero{stage}-fp32" for stage in STAGES} | {
    "bf16-z0": "zero0-bf16",
    "bf16-z2": "zero2-bf16",
}
GUARDED = ("train.spike_factor=2", "train.on_bad_loss=skip")
NAN = float("nan")


def wrong_split() -> None:
    """Both ranks read the rows of the first, as with a broken split of the data."""
    original = Loader.__init__

    def broken(self, *arguments, **options):
        original(self, *arguments, **(options | {"rank": 0}))

    Loader.__init__ = broken
    train("full-broken", "zero1-fp32")
    train("full-broken-bf16", "zero1-bf16")
    Loader.__init__ = original


@contextlib.contextmanager
def poisoned(attempt: int, rank: int, factor: float) -> Iterator[None]:
    """Multiply the losses of one rank in one attempt of a step."""
    original, seen, micro_batches = ElectraObjective.forward, [], 4 // here.world_size

    def forward(self, *arguments, **options):
        losses = original(self, *arguments, **options)
        if self.training and here.rank == rank:
            seen.append(1)
            if len(seen) == micro_batches * attempt:
                total, mlm_loss = losses.total * factor, losses.mlm_loss * factor
                return losses._replace(total=total, mlm_loss=mlm_loss)
        return losses

    ElectraObjective.forward = forward
    yield
    ElectraObjective.forward = original


def not_finite() -> None:
    """A loss of NaN on rank 1 ends the run, which then resumes from its last checkpoint."""
    for stage in STAGES:
        with poisoned(attempt=7, rank=1, factor=NAN):
            note(f"nan-z{stage}", train(f"nan-z{stage}", f"zero{stage}-fp32", SAVED))
        finish(f"nan-z{stage}", f"zero{stage}-fp32", SAVED)


def spoiled(
    name: str,
    engine: str,
    *sets: str,
    attempt: int = CUT + 1,
    rank: int = 1,
    factor: float = 1000.0,
) -> int | str:
    """A run to step 12 with a bad loss on one rank; what train returns."""
    with poisoned(attempt, rank, factor):
        return train(name, engine, *sets, stop_at_step=12)


def skips(name: str, engine: str, *sets: str, **options) -> None:
    """A run to step 12 that leaves out the step of a bad loss."""
    ended = spoiled(name, engine, *GUARDED, *sets, **options)
    assert ended in STOPPED, (name, ended)


def passed_over(name: str, engine: str) -> None:
    """A run to step 12 that never reads the rows of attempt CUT + 1."""
    stop(name, engine)
    meta = here.outs / name / "ckpt" / str(CUT) / "meta.json"
    if here.rank == 0:
        values = json.loads(meta.read_text())
        values["data"]["position"] += 16
        values["skipped"] += 1
        meta.write_text(json.dumps(values))
    stop(name, engine, at=12)


def bad_losses() -> None:
    """A spike or NaN on rank 1: skipped at every stage and after a resume, or the run ends."""
    for name, engine in GUARDED_ENGINES.items():
        passed_over(f"passed-{name}", engine)
        skips(f"spiked-{name}", engine)
    skips("nan-passed-z2", "zero2-fp32", factor=NAN)
    stop("spiked-cut", "zero1-fp32", *GUARDED)
    copy("spiked-cut", "spiked-for-one")
    skips("spiked-cut", "zero1-fp32", attempt=1)
    note("spiked-stop", spoiled("spiked-stop", "zero1-fp32", GUARDED[0], SAVED))
    finish("spiked-stop", "zero1-fp32", GUARDED[0], SAVED)


def spike_on_one_rank() -> None:
    """The guarded run of two ranks, resumed on one, with the spike in its first step."""
    skips("spiked-for-one", "zero0-fp32", attempt=1, rank=0)


def half_precision_overflow() -> None:
    """fp16 with a loss scale that overflows in the first steps, stopped and resumed.

    DeepSpeed refuses fp16 on a CPU, so it is made to accept it here.
    """
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    original = engine_module.resolve_precision
    engine_module.resolve_precision = lambda config, device: config
    scaler = {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 18,
        "loss_scale_window": 5,
        "hysteresis": 1,
    }
    for stage in (0, 1):
        values = {"zero_optimization": {"stage": stage}, "fp16": scaler}
        engine = write_engine(f"fp16-z{stage}", values)
        finish(f"overflow-z{stage}", engine)
        stop(f"overflow-cut-z{stage}", engine)
        finish(f"overflow-cut-z{stage}", engine)
        limited = train(f"limit-z{stage}", engine, "train.max_skipped_steps=2")
        note(f"overflow-z{stage}", limited)
        passed_over(f"passed-fp16-z{stage}", engine)
        stop(f"spiked-fp16-z{stage}", engine, *GUARDED)
        skips(f"spiked-fp16-z{stage}", engine, attempt=1, rank=0)
    engine_module.resolve_precision = original
