"""Scenarios: branches of a run with other configs and data; batches that grow."""

import hashlib
import json
from pathlib import Path

from loss_scenarios import poisoned
from scenario_tools import copy, finish, here, note, stop, train, wait_for_ranks
from small_run import CUT, STAGES

STABLE = ("optimizer.schedule=constant",)
BRANCH_STEPS = 14
DECAY = (
    "optimizer.schedule=wsd",
    "optimizer.decay_steps=5",
    "optimizer.decay_shape=1-sqrt",
    f"train.total_steps={BRANCH_STEPS}",
)
GROWN_STEPS = 12
# On two ranks 2, 4 and 1 micro-batches of 4 rows per step and rank.
GROWTH = ("train.batch_schedule=[[5,32],[9,8]]", f"train.total_steps={GROWN_STEPS}")


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def branches() -> None:
    """A stable run, its decay as a branch in several ways, and the same decay from the start."""
    stop("stable", "zero1-fp32", *STABLE)
    stop("stable-z0", "zero0-fp32", *STABLE)
    parent = here.outs / "stable"
    before = hashes(parent)
    finish("decay-full", "zero1-fp32", *DECAY)
    finish("decay", "zero1-fp32", *DECAY, branch_from=parent)
    stop("decay-cut", "zero1-fp32", *DECAY, at=10, branch_from=parent / "ckpt" / str(CUT))
    copy("decay-cut", "decay-cut-for-one")
    finish("decay-cut", "zero1-fp32", *DECAY, branch_from=parent)
    finish("decay-z2", "zero2-fp32", *DECAY, branch_from=here.outs / "stable-z0")
    # Another batch; then a branch of the branch with other data and another objective.
    batch = ("train.global_batch_size=8", *STABLE)
    stop("branch-batch", "zero1-fp32", *batch, at=9, branch_from=parent)
    masking = ("objective.mask_prob=0.3", "train.total_steps=12", *batch)
    other = {"data": here.other_data, "branch_from": here.outs / "branch-batch"}
    stop("branch-data", "zero1-fp32", *masking, at=10, **other)
    finish("branch-data", "zero1-fp32", *masking, data=here.other_data)
    stop("branch-batch", "zero1-fp32", *batch, at=11)
    refused_branches(parent)
    wait_for_ranks()
    note("parent", [before, hashes(parent)])


def refused_branches(parent: Path) -> None:
    """Branches that end all ranks before their folder is made."""
    damaged = here.outs / "damaged"
    copy("stable", "damaged")
    if here.rank == 0:
        (file,) = (damaged / "ckpt" / str(CUT)).glob("optim-00002-*")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    wait_for_ranks()
    found = {}
    for name, source, *sets in (
        ("shape", parent, "model.ffn_size=48"),
        ("steps", parent, f"train.total_steps={CUT}"),
        ("damaged", damaged),
    ):
        ended = train(f"refused-{name}", "zero1-fp32", *sets, branch_from=source)
        found[name] = [ended, (here.outs / f"refused-{name}").exists()]
    note("refused-branches", found)


def branches_on_one_rank() -> None:
    """The stable run and a stopped branch of two ranks, continued on one; a run for two."""
    finish("decay-one", "zero0-fp32", *DECAY, branch_from=here.outs / "stable")
    finish("decay-cut-for-one", "zero1-fp32", *DECAY)
    stop("stable-one", "zero0-fp32", *STABLE)


def branch_from_one_to_two() -> None:
    """The stable run of one rank, decayed on two."""
    finish("decay-from-one", "zero3-fp32", *DECAY, branch_from=here.outs / "stable-one")


def growing_batches() -> None:
    """A run with three batch sizes: whole, and stopped before, at and after each change."""
    for stage in STAGES:
        finish(f"grown-z{stage}", f"zero{stage}-fp32", *GROWTH)
    for at in (4, 5, 6, 9):
        stop(f"grown-cut-{at}", "zero1-fp32", *GROWTH, at=at)
    copy("grown-cut-6", "grown-for-one")
    for at in (4, 5, 6, 9):
        finish(f"grown-cut-{at}", "zero1-fp32", *GROWTH)
    stop("grown-before", "zero1-fp32", *GROWTH, at=5)
    # The rows of step 6 as one micro-batch of each rank.
    whole = ("train.global_batch_size=32", "train.micro_batch_size=16")
    finish(
        "grown-whole",
        "zero1-fp32",
        *whole,
        "train.total_steps=6",
        branch_from=here.outs / "grown-before",
    )
    # A skipped step: the third attempt is not applied, and the change comes after 5 attempts.
    guarded = (*GROWTH, "train.on_bad_loss=skip")
    with poisoned(attempt=3, rank=1, factor=float("nan")):
        stop("grown-skipped", "zero1-fp32", *guarded, at=5)
    finish("grown-skipped", "zero1-fp32", *guarded)
    found = json.loads((here.outs / "grown-skipped" / "ckpt" / "final" / "meta.json").read_text())
    note("grown-skipped", {"skipped": found["skipped"], "position": found["data"]["position"]})


def growing_on_one_rank() -> None:
    """The run with three batch sizes on one rank, whole and continued from two."""
    finish("grown-one", "zero0-fp32", *GROWTH)
    finish("grown-for-one", "zero0-fp32", *GROWTH)
