"""Training on real ranks: equal curves, exact resumes, refusals, stops, kills.

The runs are those of tests/support/scenarios.py.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cost import step_traffic
from deberta_scenarios import DEBERTA_STEPS
from deberta_scenarios import RESUMED as DEBERTA_RESUMED
from modern_scenarios import MODERN_STEPS, RESUMED
from run_results import curve, distance, is_bit_equal
from running import read_json
from scenario_runs import KILLS
from small_run import CUT, STAGES, STEPS

from electra_ds.reporting.status import status
from electra_ds.training import checkpoint
from electra_ds.training.metrics_file import read_metrics

# Functions of this project that read tensors in a step. The control message lies on the CPU, and
# rows of one document are searched on a CPU only. At stage 0 in fp32 the finite check is ours.
READS = {
    "electra_ds/training/collectives.py:wait_votes",
    "electra_ds/model/kernels/attention_mask.py:_global_mask_on_cpu",
}
READS_AT_STAGE_0 = {"electra_ds/training/engine.py:_checked_step"}
GUARDED = ("z0", "z1", "z2", "z3", "bf16-z0", "bf16-z2", "fp16-z0", "fp16-z1")


def noted(outs: Path, name: str, rank: int = 0) -> Any:
    """What a rank wrote with scenario_tools.note."""
    return read_json(outs / f"{name}-{rank}.json")


def of_split(outs: Path, run: str, split: str) -> list[dict]:
    """The records of a run's training or held-out evaluations."""
    return [record for record in curve(outs / run) if record["split"] == split]


# ------------------------------------------------------------------------------------ equal curves


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_like_one_at_every_stage(outs: Path, stage: int) -> None:
    assert len(curve(outs / "one")) == STEPS + 1  # and the evaluation at the end
    assert distance(outs / f"full-z{stage}", outs / "one") < 1e-5


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_buckets_smaller_than_the_word_table_change_nothing(outs: Path, stage: int) -> None:
    assert is_bit_equal(outs / f"buckets-z{stage}", outs / f"full-z{stage}")


def test_one_micro_batch_equals_two_halves(outs: Path) -> None:
    assert distance(outs / "full-whole-micro", outs / "full-z1") < 1e-5


def test_a_broken_data_split_shows_in_the_curve(outs: Path) -> None:
    assert distance(outs / "full-broken", outs / "one") > 1e-2
    assert distance(outs / "full-broken-bf16", outs / "full-bf16-z1") > 1e-2


def test_dropout_changes_the_curve(outs: Path) -> None:
    assert distance(outs / "full-dropout", outs / "full-z1") > 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_runs_and_learns(outs: Path, stage: int) -> None:
    losses = [record["loss"] for record in of_split(outs, f"full-bf16-z{stage}", "train")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("stage", (1, 2))
def test_zero_options_for_several_ranks_change_no_bit_on_one(outs: Path, stage: int) -> None:
    assert is_bit_equal(outs / f"alone-z{stage}", outs / f"as-many-z{stage}")


# ----------------------------------------------------------------------------------- communication


def sent(outs: Path, name: str) -> tuple[list[list], list[int], int]:
    """Sorted collectives of a step, sizes of parameters, size of all matrices together."""
    found = noted(outs, f"traffic-{name}", 0)
    assert found == noted(outs, f"traffic-{name}", 1)
    sizes = [math.prod(shape) for shape in found["shapes"]]
    matrices = sum(math.prod(shape) for shape in found["shapes"] if len(shape) > 1)
    return sorted(found["sent"]), sizes, matrices


def even(size: int, to: int = 2) -> int:
    """The next multiple of `to`."""
    return -(-size // to) * to


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("kind", "accumulation"), [("fp32", 1), ("fp32", 2), ("bf16", 2)])
def test_a_step_sends_the_calculated_bytes_and_one_vote(
    outs: Path, stage: int, kind: str, accumulation: int
) -> None:
    found, sizes, matrices = sent(outs, f"zero{stage}-{kind}-{accumulation}")
    number, width = {"fp32": ("float32", 4), "bf16": ("bfloat16", 2)}[kind]
    reduced = ["allreduce", number, sum(sizes)]
    # Stages 1 and 2 gather the two groups of the optimizer, stage 3 halves each parameter.
    vectors = sum(sizes) - matrices
    groups = [["allgather_base", number, even(size, to=4)] for size in (matrices, vectors)]
    halved = sum(map(even, sizes))
    halves = [[name, number, halved] for name in ("allgather_base", "reduce_scatter_base")]
    weights = {
        0: [reduced],
        1: [reduced, *groups],
        2: [reduced] * accumulation + groups,
        3: halves * accumulation,
    }[stage]
    norm = ["allreduce", "float64" if stage == 3 else "float32", 1]
    norms = [] if stage == 0 else [norm, norm]
    finite = [["allreduce", "uint8", 1]] if kind == "bf16" and stage in (1, 2) else []
    assert found == sorted([*weights, *norms, *finite, ["allreduce", "int64", 5]])

    # Numbers that a rank sends by a ring, in units of (n - 1) / n = 1 / 2 of the tensor.
    passes = {"allreduce": 2, "allgather_base": 1, "reduce_scatter_base": 1}
    sent_bytes = sum(passes[name] * elements * width / 2 for name, _, elements in weights)
    theory = step_traffic(sum(sizes), stage, 2, accumulation, width)
    assert sent_bytes == pytest.approx(theory, rel=1e-4)  # padding is the difference


def test_autocast_sends_fp32_and_reducing_to_owners_sends_a_third_less(outs: Path) -> None:
    found, _, _ = sent(outs, "zero1-autocast-1")
    assert found == sent(outs, "zero1-fp32-1")[0]
    owned, sizes, _ = sent(outs, "zero1-owners-1")
    # Two reductions replace one all-reduce, which sends twice as much.
    reduced = [elements for name, _, elements in owned if name == "reduce"]
    assert len(reduced) == 2 and sum(reduced) == sum(sizes)
    others = [call for call in owned if call[0] != "reduce"]
    assert others == [call for call in found if call[2] != sum(sizes)]


def test_one_rank_reduces_nothing_at_stage_0(outs: Path) -> None:
    assert noted(outs, "reduced-at") == [1, 2, 3]


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_prints_a_hint_to_stage_0(outs: Path, stage: int) -> None:
    console = (outs / f"alone-console-z{stage}").read_text()
    assert ("--engine zero0-fp32 is" in console) == (stage > 0)  # in the precision of the run


@pytest.mark.parametrize("stage", STAGES)
def test_no_step_between_log_lines_reads_from_the_device(outs: Path, stage: int) -> None:
    found = noted(outs, f"reads-z{stage}")
    ours = {reader for reader in found if not reader.startswith("deepspeed/")}
    assert "electra_ds/training/collectives.py:wait_votes" in ours
    assert ours <= READS | (READS_AT_STAGE_0 if stage == 0 else set())
    # The probe also records reads of DeepSpeed.
    assert stage == 0 or "deepspeed/runtime/utils.py:is_invalid_grad_norm" in found


def test_waiting_for_data_is_logged_with_its_rank(outs: Path) -> None:
    console = (outs / "slow-console-0").read_text().splitlines()
    warnings = [line for line in console if "WARNING" in line]
    records = read_metrics(outs / "slow/metrics.jsonl")
    shares = [record["data_wait_share"] for record in records if record["split"] == "train"]
    long = [share for share in shares if share > 0.05]
    assert len(shares) == 3 and long[-2:] == shares[1:]  # the start is in the first interval
    for line, share in zip(warnings, long, strict=True):
        assert f"rank 1 waited for data in {share:.0%} of the time" in line
        assert "stage the data" in line


# ----------------------------------------------------------------------------------- exact resumes


@pytest.mark.parametrize("name", [f"{kind}z{stage}" for kind in ("", "bf16-") for stage in STAGES])
def test_a_stop_and_resume_is_bit_exact(outs: Path, name: str) -> None:
    assert is_bit_equal(outs / f"cut-{name}", outs / f"full-{name}")
    assert curve(outs / f"cut-{name}") == curve(outs / f"full-{name}")


def test_a_streamed_run_resumes_bit_for_bit_at_any_world_size(outs: Path) -> None:
    assert len(curve(outs / "streamed")) == STEPS + 2
    assert (outs / "streamed/tokenizer/vocab.txt").exists()
    assert is_bit_equal(outs / "streamed-cut", outs / "streamed")
    assert curve(outs / "streamed-cut") == curve(outs / "streamed")
    assert distance(outs / "streamed-for-one", outs / "streamed") < 1e-5
    assert distance(outs / "streamed", outs / "one") > 1e-3  # another order of the rows


@pytest.mark.parametrize("kill", KILLS)
def test_kill_9_then_resume_is_bit_exact(outs: Path, kill: str) -> None:
    stage = kill.split("-")[0]
    assert is_bit_equal(outs / f"killed-{kill}", outs / f"full-z{stage}")
    assert curve(outs / f"killed-{kill}") == curve(outs / f"full-z{stage}")


@pytest.mark.parametrize("old", STAGES)
@pytest.mark.parametrize("new", STAGES)
def test_a_checkpoint_moves_between_stages(outs: Path, old: int, new: int) -> None:
    name = f"move-z{old}-z{new}" if old != new else f"cut-z{old}"
    assert distance(outs / name, outs / "full-z0") < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_moves_between_world_sizes(outs: Path, stage: int) -> None:
    assert distance(outs / f"for-one-z{stage}", outs / "one") < 1e-5
    assert distance(outs / f"one-to-two-z{stage}", outs / "one") < 1e-5


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("sharing", ("untied", "all", "gdes"))
def test_every_sharing_saves_and_resumes_at_every_stage(
    outs: Path, sharing: str, stage: int
) -> None:
    assert is_bit_equal(outs / f"{sharing}-z{stage}", outs / f"{sharing}-full-z{stage}")
    assert distance(outs / f"{sharing}-full-z{stage}", outs / f"{sharing}-full-z0") < 1e-5


@pytest.mark.parametrize("engine", [*(f"z{stage}" for stage in STAGES), "half"])
def test_a_frozen_generator_keeps_its_weights_and_the_run_resumes(outs: Path, engine: str) -> None:
    run = outs / f"frozen-full-{engine}"
    assert is_bit_equal(outs / f"frozen-{engine}", run)
    if engine != "half":
        assert distance(run, outs / "frozen-full-z0") < 1e-5
    source = checkpoint.weights(outs / "full-z0" / "ckpt" / "final")
    found = checkpoint.weights(run / "ckpt" / "final")
    for name, value in found.items():
        if name.startswith("generator"):
            shared = name.replace("generator_embeddings.", "embeddings.")
            assert torch.equal(value, source[shared]), name
    assert not torch.equal(
        found["discriminator_head.dense.weight"], source["discriminator_head.dense.weight"]
    )


def test_weights_of_a_generator_that_do_not_fit_the_run_are_refused(outs: Path) -> None:
    found = noted(outs, "frozen")
    assert found == noted(outs, "frozen", 1)
    assert "a new run needs the weights of the generator: give --generator-from" in found["missing"]
    assert "objective.generator = model uses no weights of another generator" in found["trained"]
    for name in ("other", "other_half"):
        assert "24 tensors differ from those of the generator in" in found[name]


def test_old_checkpoints_are_pruned_and_no_temporary_file_is_left(outs: Path) -> None:
    for run in ("full-z0", "killed-1-tensors"):
        names = sorted(path.name for path in (outs / run / "ckpt").iterdir())
        assert names == ["10", "15", "final", "latest"]


def test_a_finished_run_resumes_only_when_it_is_extended(outs: Path) -> None:
    found = noted(outs, "refused")
    assert found["done"] == 0 and found["extend"] == 0
    assert read_json(outs / "extended" / "done")["step"] == 24
    names = sorted(path.name for path in (outs / "extended" / "ckpt").iterdir())
    assert names == ["15", "20", "final", "latest"]


def test_init_from_loads_only_weights(outs: Path) -> None:
    first = curve(outs / "init-from")[0]
    assert first["step"] == 1 and first["lr"] == 0.0
    # The weights are trained, the rows are the first ones.
    assert first["mlm_loss"] < curve(outs / "one")[0]["mlm_loss"] - 0.1


@pytest.mark.parametrize("rank", (0, 1))
def test_a_mistake_in_init_from_ends_all_ranks_before_an_engine_and_a_folder(
    outs: Path, rank: int
) -> None:
    found = noted(outs, "refused", rank)
    message, is_made = found["init_missing"]
    assert "nowhere-0: no checkpoint here: it does not exist" in message and not is_made
    message, is_made = found["init_shape"]
    assert "--init-from" in message and "has shape" in message and not is_made
    assert "rank 1: no folder here" in found["init_one"]


# ----------------------------------------------------------------------- refusals, stops, failures


def test_a_resume_refuses_changed_science_and_takes_changed_machine_settings(outs: Path) -> None:
    found = noted(outs, "refused")
    assert "optimizer.peak_lr: 0.003 -> 0.001" in found["science"]
    assert "train.seed: 0 -> 3" in found["seed"]
    assert "the checkpoint belongs to other data: dataset_id" in found["data"]
    assert found["machine"] == 0


@pytest.mark.parametrize("rank", (0, 1))
def test_ranks_with_other_data_than_the_first_are_refused(outs: Path, rank: int) -> None:
    assert "--data is not the same for all ranks" in noted(outs, "refused", rank)["copies"]


@pytest.mark.parametrize("rank", (0, 1))
def test_failures_in_a_row_end_a_run(outs: Path, rank: int) -> None:
    message = noted(outs, "refused", rank)["restarts"]
    assert f"failed 3 times in a row at step {CUT}" in message and "rank 1, node7: why" in message


@pytest.mark.parametrize(
    ("number", "name", "steps"), [(0, "lost-voting", 3), (1, "lost-saving", 5)]
)
def test_a_run_that_lost_its_lock_ends_and_writes_nothing_more(
    outs: Path, number: int, name: str, steps: int
) -> None:
    message, out = noted(outs, "lost")[number], outs / name
    assert "LockedOut: " in message and "lock now names process 1 on node7" in message
    assert "node7" in (out / "lock").read_text()
    assert not (out / "ckpt").exists() and not (out / "stopped.0").exists()
    assert len(curve(out)) == steps


@pytest.mark.parametrize("stage", STAGES)
def test_nan_on_one_rank_stops_all_and_is_named(outs: Path, stage: int) -> None:
    name = f"nan-z{stage}"
    message = noted(outs, name, 0)
    assert message == noted(outs, name, 1)
    where = "RunFailure: step 7 has a loss that is not finite on rank 1: mlm_loss nan"
    assert message.startswith(where)
    assert "in rows [" in message and message.endswith("ckpt/5")
    assert is_bit_equal(outs / name, outs / f"full-z{stage}")  # resumed without the bad loss


@pytest.mark.parametrize(
    ("skipped", "passed"),
    [
        *((f"spiked-{name}", f"passed-{name}") for name in GUARDED),
        ("nan-passed-z2", "passed-z2"),
        ("spiked-cut", "passed-z1"),
    ],
)
def test_a_step_that_is_skipped_for_its_loss_leaves_no_trace(
    outs: Path, skipped: str, passed: str
) -> None:
    """Weights and moments are those of a run that never read the rows of the step."""
    assert is_bit_equal(outs / skipped, outs / passed)
    first, second = curve(outs / skipped), curve(outs / passed)
    assert len(first) == 12 and first[7]["skipped_steps"] == first[6]["skipped_steps"] + 1
    # The tokens of the skipped rows are counted.
    assert [r | {"tokens": 0} for r in first] == [r | {"tokens": 0} for r in second]


def test_the_losses_that_a_spike_is_compared_with_move_between_world_sizes(outs: Path) -> None:
    assert distance(outs / "spiked-for-one", outs / "passed-z1") < 1e-5


def test_a_spike_on_one_rank_stops_all_and_is_named(outs: Path) -> None:
    message = noted(outs, "spiked-stop", 0)
    assert message == noted(outs, "spiked-stop", 1)
    assert message.startswith("RunFailure: step 8 has a loss of ")
    mean = "times the mean of the 4 before it (train.spike_factor = 2), "
    assert f"{mean}most of it on rank 1: mlm_loss" in message
    assert "in rows [" in message
    assert "train.on_bad_loss=skip" in message and message.endswith("ckpt/5")
    # A spike guard that finds no spike changes nothing.
    assert is_bit_equal(outs / "spiked-stop", outs / "full-z1")


@pytest.mark.parametrize("name", ("signal", "term", "stop-file"))
def test_a_stop_that_one_rank_sees_stops_all_at_the_same_step(outs: Path, name: str) -> None:
    stopped = read_json(outs / name / "stopped.0")
    assert checkpoint.latest(outs / name / "ckpt").name == str(stopped["step"])
    assert stopped["step"] < STEPS
    assert name != "stop-file" or stopped["reason"] == "OUT/STOP"


def test_a_save_file_saves_without_a_stop(outs: Path) -> None:
    assert (outs / "save-file" / "done").exists()
    names = sorted(path.name for path in (outs / "save-file" / "ckpt").iterdir())
    assert names[0] != "final"


@pytest.mark.parametrize("rank", (0, 1))
def test_status_reports_a_run_while_it_trains(outs: Path, rank: int) -> None:
    facts = noted(outs, "status-signal", rank)
    assert (facts["state"], facts["total_steps"]) == ("training", STEPS)
    assert facts["missing"] == ["ckpt/latest: not there"]
    assert facts["train"]["step"] >= 2 and facts["eta_seconds"] > 0
    assert facts["owner"].startswith("process ")
    assert (len(facts["nodes"]), facts["launcher"]) == (2, "torchrun or deepspeed")


def test_status_reports_stopped_and_finished_runs_with_their_restarts(outs: Path) -> None:
    assert status(outs / "signal")["state"] == "stopped"
    finished = status(outs / "full-z1")
    assert (finished["state"], finished["restarts"]) == ("finished", 0)
    assert status(outs / "cut-z1")["restarts"] == 1


# -------------------------------------------------------------------------------------------- fp16


def test_fp16_on_a_cpu_is_refused_with_its_reason(outs: Path) -> None:
    assert "fp16.enabled = true, but this run is on a CPU" in noted(outs, "fp16")


@pytest.mark.parametrize("stage", (0, 1))
def test_skipped_fp16_steps_lose_no_rows_and_hold_the_schedule(outs: Path, stage: int) -> None:
    records = of_split(outs, f"overflow-z{stage}", "train")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[0]["skipped_steps"] > 2
    rates = [record["lr"] for record in of_split(outs, "one", "train")]
    assert [record["lr"] for record in records] == rates
    last = records[-1]
    assert last["epoch"] * 300 == pytest.approx((STEPS + last["skipped_steps"]) * 16)
    # The loss scale resumes, too.
    assert curve(outs / f"overflow-z{stage}") == curve(outs / f"overflow-cut-z{stage}")
    assert is_bit_equal(outs / f"overflow-z{stage}", outs / f"overflow-cut-z{stage}")


def test_fp16_norms_are_those_of_the_unscaled_gradients(outs: Path) -> None:
    first, second = (
        [record["grad_norm"] for record in curve(outs / f"overflow-z{stage}")[:5]]
        for stage in (0, 1)
    )
    assert first == pytest.approx(second, rel=1e-3) and 10 < first[0] < 1000


@pytest.mark.parametrize("stage", (0, 1))
def test_too_many_skipped_steps_in_a_row_stop_the_run(outs: Path, stage: int) -> None:
    assert "train.max_skipped_steps = 2" in noted(outs, f"overflow-z{stage}")


# ---------------------------------------------------------------------- held-out metrics, mixtures


@pytest.mark.parametrize("stage", (0, 1, 3))
def test_held_out_metrics_are_equal_at_every_stage_and_after_a_resume(
    outs: Path, stage: int
) -> None:
    whole = of_split(outs, f"evaluated-z{stage}", "valid")
    assert [record["step"] for record in whole] == [4, 8, 12, 16, 20]
    first = [record["mlm_loss"] for record in of_split(outs, "evaluated-z0", "valid")]
    assert [record["mlm_loss"] for record in whole] == pytest.approx(first, rel=1e-5)
    assert curve(outs / f"evaluated-cut-z{stage}") == curve(outs / f"evaluated-z{stage}")


def test_a_mixture_resumes_bit_exact_and_one_source_trains_as_its_folder(outs: Path) -> None:
    assert is_bit_equal(outs / "mixed-cut", outs / "mixed")
    assert curve(outs / "mixed-cut") == curve(outs / "mixed")
    assert distance(outs / "mixed", outs / "full-z2") > 1e-2
    assert is_bit_equal(outs / "mixed-one", outs / "full-z1")


@pytest.mark.parametrize("rank", (0, 1))
def test_a_resume_refuses_other_weights_of_a_mixture(outs: Path, rank: int) -> None:
    windows = "checkpoint {'de': 7000, 'ja': 3000}, now {'de': 6000, 'ja': 4000}"
    assert f"rows_per_window: {windows}" in noted(outs, "mixed", rank)


def test_a_mixture_logs_the_held_out_metrics_of_each_source(outs: Path) -> None:
    events = tensorboard(outs / "mixed-cut")
    records = of_split(outs, "mixed-cut", "valid")
    assert len(records) == 2
    for key in ("mlm_loss", "de/mlm_loss", "ja/mlm_loss", "ja/unigram_loss", "de/fixed_auc"):
        logged = [(record["step"], pytest.approx(record[key])) for record in records]
        assert [(event.step, event.value) for event in events.Scalars(f"valid/{key}")] == logged
    for record in records:
        weighted = 0.7 * record["de/mlm_loss"] + 0.3 * record["ja/mlm_loss"]
        assert record["mlm_loss"] == pytest.approx(weighted)
        assert record["de/mlm_loss"] != record["ja/mlm_loss"]


def tensorboard(run: Path) -> Any:
    """The scalars of a run's TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_of_a_resumed_run_holds_every_curve_without_overlap(outs: Path) -> None:
    events = tensorboard(outs / "evaluated-cut-z1")
    both = "mlm_loss disc_loss mlm_accuracy replaced_fraction disc_auc"
    train = f"{both} disc_precision disc_recall lr grad_norm loss_scale skipped_steps tokens"
    valid = f"{both} fixed_auc unigram_loss base_rate_loss"
    logged_steps = [3, 6, 9, 12, 15, 18, 20]
    for split, keys, steps in (
        ("train", f"{train} tokens_per_second", logged_steps),
        ("valid", valid, [4, 8, 12, 16, 20]),
    ):
        for key in keys.split():
            assert [event.step for event in events.Scalars(f"{split}/{key}")] == steps, key
    assert [event.step for event in events.Scalars("data/wait_share")] == logged_steps
    written = {event.step: event.value for event in events.Scalars("train/loss")}
    records = of_split(outs, "evaluated-cut-z1", "train")
    logged = {record["step"]: record["loss"] for record in records}
    assert written == pytest.approx(logged, rel=1e-6)


# -------------------------------------------------------------------------------------- modernbert


@pytest.mark.parametrize("stage", STAGES)
def test_modernbert_on_two_ranks_trains_like_one_and_resumes_bit_for_bit(
    outs: Path, stage: int
) -> None:
    full, cut = outs / f"modern-full-z{stage}", outs / f"modern-cut-z{stage}"
    assert len(of_split(outs, "modern-one", "train")) == MODERN_STEPS
    assert distance(full, outs / "modern-one") < 1e-5
    assert is_bit_equal(cut, full)
    assert curve(cut) == curve(full)


@pytest.mark.parametrize("name", RESUMED)
def test_modernbert_resumes_bit_for_bit_in_other_ways(outs: Path, name: str) -> None:
    full, cut = outs / f"modern-{name}-full", outs / f"modern-{name}-cut"
    assert is_bit_equal(cut, full)
    assert curve(cut) == curve(full)
    assert distance(full, outs / "modern-one") > 1e-3


def test_recomputed_layers_of_modernbert_train_bit_for_bit(outs: Path) -> None:
    assert is_bit_equal(outs / "modern-recomputed-full", outs / "modern-dropout-full")


def test_a_checkpoint_of_modernbert_moves_to_one_rank(outs: Path) -> None:
    assert distance(outs / "modern-for-one", outs / "modern-one") < 1e-5


@pytest.mark.parametrize("stage", (1, 3))
def test_modernbert_trains_in_bf16(outs: Path, stage: int) -> None:
    fp32 = of_split(outs, "modern-one", "train")
    bf16 = of_split(outs, f"modern-bf16-z{stage}", "train")
    assert [r["mlm_loss"] for r in bf16] == pytest.approx([r["mlm_loss"] for r in fp32], rel=0.05)


def test_modernbert_continues_with_longer_rows_and_other_thetas(outs: Path) -> None:
    config = read_json(outs / "modern-longer/config.json")["model"]
    assert (config["max_positions"], config["global_theta"]) == (16384, 160_000)
    first = curve(outs / "modern-longer")[0]
    assert first["step"] == 1
    # The weights are trained, the rows are the first ones.
    assert first["mlm_loss"] < curve(outs / "modern-one")[0]["mlm_loss"] - 0.01


@pytest.mark.parametrize("rank", (0, 1))
def test_weights_of_another_architecture_are_refused_in_one_line(outs: Path, rank: int) -> None:
    found = noted(outs, "modern-refused", rank)
    assert "model.architecture: modernbert -> electra" in found["resume"]
    assert "Use the old values or choose another --out" in found["resume"]
    assert "--init-from" not in found["resume"]
    expected = "model.architecture = modernbert, but electra in this run: its weights do not fit"
    assert expected in found["start"]
    assert not any("\n" in message for message in found.values())
    assert "model.local_attention: 8 -> 16" in found["window"]
    assert "start from its weights with --init-from" in found["window"]


# -------------------------------------------------------------------------------------- deberta_v2


@pytest.mark.parametrize("stage", STAGES)
def test_deberta_v2_on_two_ranks_trains_like_one_and_resumes_bit_for_bit(
    outs: Path, stage: int
) -> None:
    full, cut = outs / f"deberta-full-z{stage}", outs / f"deberta-cut-z{stage}"
    assert len(of_split(outs, "deberta-one", "train")) == DEBERTA_STEPS
    assert distance(full, outs / "deberta-one") < 1e-5
    assert is_bit_equal(cut, full)
    assert curve(cut) == curve(full)


@pytest.mark.parametrize("name", DEBERTA_RESUMED)
def test_deberta_v2_resumes_bit_for_bit_in_other_ways(outs: Path, name: str) -> None:
    full, cut = outs / f"deberta-{name}-full", outs / f"deberta-{name}-cut"
    assert is_bit_equal(cut, full)
    assert curve(cut) == curve(full)
    assert distance(full, outs / "deberta-one") > 1e-3


def test_recomputed_layers_of_deberta_v2_train_bit_for_bit(outs: Path) -> None:
    assert is_bit_equal(outs / "deberta-recomputed-full", outs / "deberta-dropout-full")


def test_a_checkpoint_of_deberta_v2_moves_to_one_rank(outs: Path) -> None:
    assert distance(outs / "deberta-for-one", outs / "deberta-one") < 1e-5


@pytest.mark.parametrize("stage", (1, 3))
def test_deberta_v2_trains_in_bf16(outs: Path, stage: int) -> None:
    fp32 = of_split(outs, "deberta-one", "train")
    bf16 = of_split(outs, f"deberta-bf16-z{stage}", "train")
    assert [r["mlm_loss"] for r in bf16] == pytest.approx([r["mlm_loss"] for r in fp32], rel=0.05)


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("world_size", (1, 2))
def test_check_predicts_the_model_states_and_the_peak_of_a_step(
    outs: Path, world_size: int
) -> None:
    ranks = [noted(outs, f"memory-of-{world_size}", rank) for rank in range(world_size)]
    assert len(ranks[0]) == 22
    for case, of_rank0 in ranks[0].items():
        measured = max(found[case]["states"][0] for found in ranks)
        # A few bytes of DeepSpeed's. The rows of relative positions are cached, and by stable_adamw
        # the sizes of the parameters.
        allowed = 4096 if case.startswith(("disentangled", "stable_adamw")) else 16
        assert 0 <= measured - of_rank0["states"][1] < allowed, case
        measured = max(found[case]["peak"][0] for found in ranks)
        # 0.7 to 11 % on two cores; 14 % for two ranks on one core, where gloo frees later.
        tolerance = 0.15 if world_size == 1 else 0.2
        assert of_rank0["peak"][1] == pytest.approx(measured, rel=tolerance), case
