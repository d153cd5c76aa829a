"""train.batch_schedule: arithmetic, refusals, rows, and runs on ranks (branch_scenarios.py)."""

from pathlib import Path

import numpy as np
import pytest
from branch_scenarios import GROWN_STEPS
from hypothesis import given
from hypothesis import strategies as st
from run_results import curve, distance, is_bit_equal
from running import read_json
from small_run import STAGES

from electra_ds.common.errors import UserError
from electra_ds.config.batch_sizes import BatchSizes
from electra_ds.config.loading import load_run
from electra_ds.data.dataset import open_data
from electra_ds.data.loader import Loader, StepBatch
from electra_ds.reporting.check import check
from electra_ds.training.positions import check_position, last_position, position_after
from electra_ds.training.run_plan import plan
from electra_ds.training.state import TrainingState

SIZES = st.builds(
    lambda first, steps: BatchSizes(first, sorted(steps.items())),
    st.integers(1, 64),
    st.dictionaries(st.integers(1, 40), st.integers(1, 64), max_size=4),
)
GROWTH = "train.batch_schedule=[[5,64],[9,128]]"


# ------------------------------------------------------------------------------------ arithmetic


@given(SIZES, st.integers(0, 60))
def test_rows_before_are_the_sum_of_the_rows_of_each_attempt(sizes: BatchSizes, attempt: int):
    assert sizes.rows_before(attempt) == sum(map(sizes.rows, range(attempt)))
    assert sizes.rows_between(attempt, attempt + 3) == sum(
        map(sizes.rows, range(attempt, attempt + 3))
    )


@given(SIZES, st.integers(1, 60))
def test_the_length_for_a_number_of_rows_is_the_inverse(sizes: BatchSizes, attempts: int):
    assert sizes.nearest_attempt(sizes.rows_before(attempts)) == attempts


def test_each_entry_holds_from_its_step_on():
    sizes = BatchSizes(16, [[5, 32], [9, 8]])
    assert [sizes.rows(attempt) for attempt in (0, 4, 5, 8, 9, 1000)] == [16, 16, 32, 32, 8, 8]
    assert sizes.rows_before(9) == 5 * 16 + 4 * 32


def test_the_position_counts_attempts_and_a_branch_its_own():
    sizes = BatchSizes(16, [[5, 32]])
    state = TrainingState(step=6, skipped=1, data={"position": 5 * 16 + 2 * 32})
    check_position("ckpt", state, sizes)
    assert last_position(state, sizes, 10) == 5 * 16 + 6 * 32
    branch = TrainingState(
        step=6, skipped=1, data={"position": 1032}, first_attempt=6, first_position=1000
    )
    check_position("ckpt", branch, sizes)
    assert position_after(branch, sizes, 8) == 1064
    for wrong in ({"position": 1033}, {"position": 5 * 16 + 2 * 32}):
        expected = r"data\.position = .*; expected 1,032, the rows of 1 steps after position 1,000"
        with pytest.raises(UserError, match=expected):
            check_position(
                "ckpt",
                TrainingState(6, 1, data=wrong, first_attempt=6, first_position=1000),
                sizes,
            )


# -------------------------------------------------------------------------------- config, check


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("[[5,64],[5,128]]", r"entry \[5, 128\] after the step 5; expected ascending"),
        ("[[9,64],[5,128]]", r"entry \[5, 128\] after the step 9; expected ascending"),
        ("[[0,64]]", r"entry \[0, 64\]; expected a step from 1"),
        ("[[5,0]]", r"entry \[5, 0\]; .* rows"),
        ("[[5,99999999]]", r"entry \[5, 99999999\]; .* rows"),
        ("[[5]]", r"entry \[5\]; expected \[step, rows\]"),
        ("[[5,64,1]]", r"entry \[5, 64, 1\]; expected \[step, rows\]"),
        ("[5,64]", "batch_schedule"),
        ("[[5.5,64]]", "batch_schedule"),
        ("64", "batch_schedule"),
    ],
)
def test_a_wrong_entry_is_named(schedule: str, message: str):
    with pytest.raises(UserError, match=message):
        load_run("tiny", [f"train.batch_schedule={schedule}"])


def test_a_batch_that_the_ranks_cannot_split_is_refused_with_its_entry(data: Path):
    sets = ["train.global_batch_size=32", "train.micro_batch_size=16"]
    config = load_run("tiny", [*sets, "train.batch_schedule=[[5,64],[9,104]]"])
    for act in (
        lambda: plan(config, open_data(data), 2),
        lambda: check(config, 2, open_data(data)),
        lambda: check(config, 2),
    ):
        with pytest.raises(UserError, match=r"\[9, 104\] of train\.batch_schedule: 104 rows") as e:
            act()
    assert "largest micro_batch_size that fits is 4" in str(e.value)
    fitting = load_run(
        "tiny", [*sets, "train.batch_schedule=[[5,64],[9,104]]", "train.micro_batch_size=4"]
    )
    plan(fitting, open_data(data), 2)
    with pytest.raises(UserError, match=r"\[5, 63\].* cannot be split over 2 ranks; choose"):
        check(load_run("tiny", [*sets, "train.batch_schedule=[[5,63]]"]), 2)


def test_check_shows_each_batch_and_counts_its_rows(data: Path):
    sets = ["train.global_batch_size=32", "train.micro_batch_size=8", GROWTH]
    report = check(load_run("tiny", [*sets, "train.total_steps=20"]), 2, open_data(data))
    lines = {line.key: line for line in report.derived}
    rows = 5 * 32 + 4 * 64 + 11 * 128
    assert lines["accumulation"].value == "2"
    assert lines["batch(9)"].value == "128 rows"
    assert (
        "13,312 tokens before, 4,096 tokens per step, accumulation 8" in lines["batch(9)"].meaning
    )
    assert lines["tokens"].value == f"{rows * 32:,}"
    assert lines["epochs"].value == f"{rows / 300:.3f}"
    assert not any("batch_schedule" in line for line in report.warnings)
    short = check(load_run("tiny", [*sets, "train.total_steps=9"]), 2)
    assert "[9, 128] of train.batch_schedule has no effect" in "".join(short.warnings)


def test_epochs_give_the_steps_of_the_growing_batches(data: Path):
    sets = ["train.total_steps=null", "train.epochs=3", "optimizer.warmup_steps=0", GROWTH]
    steps = plan(load_run("tiny", sets), open_data(data), 1).total_steps
    assert steps == 9 + round((900 - 5 * 32 - 4 * 64) / 128)


# ------------------------------------------------------------------------------------------ rows


def batches(data: Path | str, sizes: BatchSizes, attempts: int = 0, **options) -> list[StepBatch]:
    """The batches of one rank from `attempts` to attempt 12."""
    planned = plan(load_run("tiny"), open_data(data), 1).data
    loader = Loader(
        planned.reader,
        planned.row_order,
        planned.recipe,
        global_batch_size=sizes,
        consumed_rows=sizes.rows_before(attempts),
        attempts=attempts,
        **options,
    )
    steps = [next(loader) for _ in range(12 - attempts)]
    loader.close()
    return steps


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("attempts", [0, 4, 5, 6, 9])
def test_rows_are_read_without_a_gap_or_a_repeat(
    data: Path, attempts: int, world_size: int, is_streamed: bool
):
    sizes = BatchSizes(16, [[5, 32], [9, 8]])
    source = f"file://{data}" if is_streamed else data
    order = plan(load_run("tiny"), open_data(source), 1).data.row_order
    ranks = [
        batches(source, sizes, attempts, micro_batch_size=4, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    position = sizes.rows_before(attempts)
    for attempt, parts in enumerate(zip(*ranks, strict=True), attempts):
        rows = sizes.rows(attempt)
        expected, _ = order.rows(np.arange(position, position + rows))
        assert np.array_equal(np.concatenate([part.rows for part in parts]), expected)
        firsts = [first for part in parts for first in part.first_rows]
        assert firsts == list(range(position, position + rows, 4))
        assert {(part.first_row, part.global_rows) for part in parts} == {(position, rows)}
        assert sum(len(part.micro_batches) for part in parts) == rows // 4
        position += rows
    assert position == sizes.rows_before(12)


def test_counts_of_a_grown_step_are_those_of_its_rows(data: Path):
    for step in batches(data, BatchSizes(4, [[3, 16]]), micro_batch_size=4):
        masked = sum(int(micro.masked_weights.sum()) for micro in step.micro_batches)
        tokens = sum(int((micro.document_ids > 0).sum()) for micro in step.micro_batches)
        assert (step.masked_count, step.token_count) == (masked, tokens)


# ------------------------------------------------------------------------------------- on ranks


@pytest.mark.parametrize("stage", STAGES)
def test_growing_batches_train_like_one_rank_at_every_stage(outs: Path, stage: int):
    assert len(curve(outs / "grown-one")) == GROWN_STEPS + 1
    assert distance(outs / f"grown-z{stage}", outs / "grown-one") < 1e-5


@pytest.mark.parametrize("step", (4, 5, 6, 9))
def test_a_resume_around_a_change_is_bit_exact(outs: Path, step: int):
    assert is_bit_equal(outs / f"grown-cut-{step}", outs / "grown-z1")
    assert curve(outs / f"grown-cut-{step}") == curve(outs / "grown-z1")


def test_a_run_with_growing_batches_moves_to_one_rank(outs: Path):
    assert distance(outs / "grown-for-one", outs / "grown-one") < 1e-5


def test_a_grown_step_equals_its_rows_in_one_large_batch(outs: Path):
    """Losses and gradient norm of four micro-batches per rank, against one."""
    (whole,) = [r for r in curve(outs / "grown-whole") if r["split"] == "train"]
    grown = curve(outs / "grown-z1")[5]
    assert whole["step"] == grown["step"] == 6 and whole["epoch"] == grown["epoch"]
    for key in ("loss", "mlm_loss", "disc_loss", "grad_norm"):
        assert whole[key] == pytest.approx(grown[key], rel=1e-5)


def test_a_skipped_step_counts_for_the_batch_schedule(outs: Path):
    found = read_json(outs / "grown-skipped-0.json")
    rows = BatchSizes(16, [[5, 32], [9, 8]]).rows_before(GROWN_STEPS + 1)
    assert found == {"skipped": 1, "position": rows}
