"""Training on real ranks: the same curve anywhere, exact resumes, refusals, stops, kills (runs by scenarios.py)."""

import json
import math
import random
from pathlib import Path

import pytest
import shard_data
from cost import step_traffic
from run_results import curve, distance, is_bit_equal
from running import run_ranks

from electra_ds.reporting.status import status
from electra_ds.training import checkpoint
from electra_ds.training.metrics_file import read_metrics

STAGES = (0, 1, 2, 3)
# Who of ours reads tensors in a step: the control message is a CPU's, and rows of one piece are looked for on a CPU.
# Stage 0 in fp32 has no finite check but ours (and clipping reads on a CPU, where it has no fused kernel).
READS = {
    "electra_ds/training/collectives.py:wait_votes",
    "electra_ds/model/kernels/attention.py:packed_mask",
}
READS_AT_STAGE_0 = {"electra_ds/training/engine.py:_checked_step"}
# Killed in a random step of 1 to 20 at each stage (the names of the tests say which), and inside the second save.
KILLS = (*(f"{stage}-step{random.randint(1, 20)}" for stage in STAGES), "1-tensors", "1-latest")


@pytest.fixture(scope="session")
def outs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of scenarios.py: two ranks, ranks that kill themselves, one rank, two ranks again."""
    folder = tmp_path_factory.mktemp("outs")
    other = data.with_name(data.name + "-other")
    other.mkdir()
    shards = [shard_data.best_fit_rows(100, 32, seed=seed) for seed in range(3, 6)]
    shard_data.write_data(other, shards, valid=shard_data.best_fit_rows(40, 32, seed=8))
    run_ranks(2, "scenarios.py", "two", data, folder)
    for kind in KILLS:
        assert run_ranks(2, "scenarios.py", "die", data, folder, kind, check=False).returncode != 0
    run_ranks(1, "scenarios.py", "one", data, folder)
    run_ranks(2, "scenarios.py", "two-again", data, folder)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_like_one_at_every_stage(outs: Path, stage: int) -> None:
    assert len(curve(outs / "one")) == 21  # twenty steps and the evaluation at the end
    assert distance(outs / f"full-z{stage}", outs / "one") < 1e-5


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_buckets_smaller_than_the_word_table_change_nothing(outs: Path, stage: int) -> None:
    assert is_bit_equal(outs / f"buckets-z{stage}", outs / f"full-z{stage}")


def sent(outs: Path, name: str) -> tuple[list[list], list[int], int]:
    """What both ranks sent in a step, in order of names; the sizes of the parameters; of the matrices together."""
    found, other = (
        json.loads((outs / f"traffic-{name}-{rank}.json").read_text()) for rank in (0, 1)
    )
    assert found == other
    sizes = [math.prod(shape) for shape in found["shapes"]]
    matrices = sum(
        size for size, shape in zip(sizes, found["shapes"], strict=True) if len(shape) > 1
    )
    return sorted(found["sent"]), sizes, matrices


def even(size: int, to: int = 2) -> int:
    """The next multiple."""
    return -(-size // to) * to


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("kind", "accumulation"), [("fp32", 1), ("fp32", 2), ("bf16", 2)])
def test_a_step_sends_what_theory_says_and_one_vote(
    outs: Path, stage: int, kind: str, accumulation: int
) -> None:
    found, sizes, matrices = sent(outs, f"zero{stage}-{kind}-{accumulation}")
    number, width = {"fp32": ("float32", 4), "bf16": ("bfloat16", 2)}[kind]
    reduced = ["allreduce", number, sum(sizes)]
    # Stages 1 and 2 gather the two groups of the optimizer, stage 3 halves each parameter.
    groups = [
        ["allgather_base", number, even(size, to=4)] for size in (matrices, sum(sizes) - matrices)
    ]
    halves = [
        [name, number, sum(map(even, sizes))] for name in ("allgather_base", "reduce_scatter_base")
    ]
    weights = {
        0: [reduced],
        1: [reduced, *groups],
        2: [reduced] * accumulation + groups,
        3: halves * accumulation,
    }
    norms = {0: [], 3: [["allreduce", "float64", 1]] * 2}.get(
        stage, [["allreduce", "float32", 1]] * 2
    )
    finite = [["allreduce", "uint8", 1]] if kind == "bf16" and stage in (1, 2) else []
    assert found == sorted([*weights[stage], *norms, *finite, ["allreduce", "int64", 5]])
    shares = {
        "allreduce": 2,
        "allgather_base": 1,
        "reduce_scatter_base": 1,
    }  # of (n - 1) / n, by a ring
    on_progress = sum(shares[name] * elements * width / 2 for name, _, elements in weights[stage])
    assert on_progress == pytest.approx(
        step_traffic(sum(sizes), stage, 2, accumulation, width), rel=1e-4
    )  # but for padding


def test_autocast_sends_fp32_and_reducing_to_owners_sends_a_third_less(outs: Path) -> None:
    found, _, _ = sent(outs, "zero1-autocast-1")
    assert found == sent(outs, "zero1-fp32-1")[0]
    owned, sizes, _ = sent(outs, "zero1-owners-1")
    parts = [elements for name, _, elements in owned if name == "reduce"]
    assert len(parts) == 2 and sum(parts) == sum(
        sizes
    )  # in place of one all-reduce, twice as much on the wire
    assert [call for call in owned if call[0] != "reduce"] == [
        call for call in found if call[2] != sum(sizes)
    ]


def test_one_micro_batch_equals_two_halves(outs: Path) -> None:
    assert distance(outs / "full-whole-micro", outs / "full-z1") < 1e-5


def test_a_broken_data_split_is_seen_in_the_curve(outs: Path) -> None:
    assert distance(outs / "full-broken", outs / "one") > 1e-2
    assert distance(outs / "full-broken-bf16", outs / "full-bf16-z1") > 1e-2


def test_waiting_for_data_is_said_with_the_rank_that_waits(outs: Path) -> None:
    said = [
        line for line in (outs / "slow-console-0").read_text().splitlines() if "WARNING" in line
    ]
    shares = [
        r["data_wait_share"]
        for r in read_metrics(outs / "slow/metrics.jsonl")
        if r["split"] == "train"
    ]
    long = [share for share in shares if share > 0.05]
    assert len(shares) == 3 and long[-2:] == shares[1:]  # the first interval holds the start
    for line, share in zip(said, long, strict=True):
        assert (
            f"rank 1 waited for data in {share:.0%} of the time" in line
            and "stage the data" in line
        )


def test_dropout_changes_the_curve(outs: Path) -> None:
    assert distance(outs / "full-dropout", outs / "full-z1") > 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_runs_and_learns(outs: Path, stage: int) -> None:
    losses = [
        record["loss"]
        for record in curve(outs / f"full-bf16-z{stage}")
        if record["split"] == "train"
    ]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize(
    "name", [*(f"z{stage}" for stage in STAGES), *(f"bf16-z{stage}" for stage in STAGES)]
)
def test_a_stop_and_resume_is_bit_exact(outs: Path, name: str) -> None:
    assert is_bit_equal(outs / f"cut-{name}", outs / f"full-{name}")
    assert curve(outs / f"cut-{name}") == curve(outs / f"full-{name}")


def test_a_streamed_run_resumes_bit_for_bit_at_any_world_size(outs: Path) -> None:
    assert len(curve(outs / "streamed")) == 22 and (outs / "streamed/tokenizer/vocab.txt").exists()
    assert is_bit_equal(outs / "streamed-cut", outs / "streamed")
    assert curve(outs / "streamed-cut") == curve(outs / "streamed")
    assert distance(outs / "streamed-for-one", outs / "streamed") < 1e-5
    assert distance(outs / "streamed", outs / "one") > 1e-3  # another order


@pytest.mark.parametrize("kind", KILLS)
def test_kill_9_then_resume_is_bit_exact(outs: Path, kind: str) -> None:
    stage = kind.split("-")[0]
    assert is_bit_equal(outs / f"killed-{kind}", outs / f"full-z{stage}")
    assert curve(outs / f"killed-{kind}") == curve(outs / f"full-z{stage}")


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
@pytest.mark.parametrize("sharing", ("untied", "all"))
def test_every_sharing_saves_and_resumes_at_every_stage(
    outs: Path, sharing: str, stage: int
) -> None:
    assert is_bit_equal(outs / f"{sharing}-z{stage}", outs / f"{sharing}-full-z{stage}")
    assert distance(outs / f"{sharing}-full-z{stage}", outs / f"{sharing}-full-z0") < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_nan_on_one_rank_stops_all_and_is_named(outs: Path, stage: int) -> None:
    messages = {json.loads((outs / f"nan-z{stage}-{rank}.json").read_text()) for rank in (0, 1)}
    (message,) = messages  # the same on both ranks
    assert message.startswith(
        "RunFailure: step 7 has a loss that is not finite on rank 1: mlm_loss nan"
    )
    assert "in rows [" in message and message.endswith("ckpt/5")
    assert is_bit_equal(
        outs / f"nan-z{stage}", outs / f"full-z{stage}"
    )  # resumed without the poison


@pytest.mark.parametrize(
    ("spoiled", "passed"),
    [
        *(
            (f"spiked-{name}", f"passed-{name}")
            for name in ("z0", "z1", "z2", "z3", "bf16-z0", "bf16-z2")
        ),
        *((f"spiked-fp16-z{stage}", f"passed-fp16-z{stage}") for stage in (0, 1)),
        ("nan-passed-z2", "passed-z2"),
        ("spiked-cut", "passed-z1"),
    ],
)
def test_a_step_left_out_for_its_loss_leaves_no_trace(
    outs: Path, spoiled: str, passed: str
) -> None:
    assert is_bit_equal(
        outs / spoiled, outs / passed
    )  # weights and moments, of a run that never saw the rows
    ours, theirs = curve(outs / spoiled), curve(outs / passed)
    assert len(ours) == 12 and ours[7]["skipped_steps"] == ours[6]["skipped_steps"] + 1
    assert [r | {"tokens": 0} for r in ours] == [
        r | {"tokens": 0} for r in theirs
    ]  # those of the rows count


def test_what_a_spike_is_measured_against_moves_between_world_sizes(outs: Path) -> None:
    assert distance(outs / "spiked-for-one", outs / "passed-z1") < 1e-5


def test_a_spike_on_one_rank_stops_all_and_is_named(outs: Path) -> None:
    (message,) = {json.loads((outs / f"spiked-stop-{rank}.json").read_text()) for rank in (0, 1)}
    assert message.startswith("RunFailure: step 8 has a loss of ")
    assert (
        "times the mean of the 4 before it (train.spike_factor = 2), most of it on rank 1: mlm_loss"
        in message
    )
    assert "in rows [" in message
    assert "train.on_bad_loss=skip" in message and message.endswith("ckpt/5")
    assert is_bit_equal(
        outs / "spiked-stop", outs / "full-z1"
    )  # and a guard that finds nothing changes nothing


def test_other_science_is_refused_and_other_machine_is_not(outs: Path) -> None:
    found = json.loads((outs / "refused-0.json").read_text())
    assert "optimizer.peak_lr: 0.003 -> 0.001" in found["science"]
    assert "train.seed: 0 -> 3" in found["seed"]
    assert "the checkpoint belongs to other data: dataset_id" in found["data"]
    assert found["machine"] == 0


def test_ranks_with_other_data_than_the_first_are_refused(outs: Path) -> None:
    for rank in (0, 1):
        found = json.loads((outs / f"refused-{rank}.json").read_text())
        assert "--data is not the same for all ranks" in found["copies"]


def test_failures_in_a_row_end_a_run(outs: Path) -> None:
    for rank in (0, 1):
        found = json.loads((outs / f"refused-{rank}.json").read_text())
        assert (
            "failed 3 times in a row at step 7" in found["restarts"]
            and "rank 1, node7: why" in found["restarts"]
        )


def test_a_run_that_lost_its_folder_ends_and_leaves_it_alone(outs: Path) -> None:
    for message, name, steps in zip(
        json.loads((outs / "lost-0.json").read_text()),
        ("lost-voting", "lost-saving"),
        (3, 5),
        strict=True,
    ):
        assert "LockedOut: " in message and "lock now names process 1 on node7" in message
        assert "node7" in (outs / name / "lock").read_text() and not (outs / name / "ckpt").exists()
        assert len(curve(outs / name)) == steps and not (outs / name / "stopped.0").exists()


def test_a_finished_run_goes_on_only_when_extended(outs: Path) -> None:
    found = json.loads((outs / "refused-0.json").read_text())
    assert found["done"] == 0 and found["extend"] == 0
    assert json.loads((outs / "extended" / "done").read_text())["step"] == 24
    assert sorted(p.name for p in (outs / "extended" / "ckpt").iterdir()) == [
        "15",
        "20",
        "final",
        "latest",
    ]


def test_init_from_takes_weights_alone(outs: Path) -> None:
    first = curve(outs / "init-from")[0]
    assert first["step"] == 1 and first["lr"] == 0.0
    assert (
        first["mlm_loss"] < curve(outs / "one")[0]["mlm_loss"] - 0.1
    )  # trained weights, first rows


def test_a_signal_to_one_rank_stops_all_at_the_same_step(outs: Path) -> None:
    for name in ("signal", "term", "stop-file"):
        stopped = json.loads((outs / name / "stopped.0").read_text())
        assert (
            checkpoint.latest(outs / name / "ckpt").name == str(stopped["step"])
            and stopped["step"] < 20
        )
    assert json.loads((outs / "stop-file" / "stopped.0").read_text())["reason"] == "OUT/STOP"


def test_status_follows_a_run_from_its_files(outs: Path) -> None:
    for rank in (0, 1):
        facts = json.loads((outs / f"status-signal-{rank}.json").read_text())
        assert (facts["state"], facts["total_steps"], facts["missing"]) == (
            "training",
            20,
            ["ckpt/latest: not there"],
        )
        assert (
            facts["train"]["step"] >= 2
            and facts["eta_seconds"] > 0
            and facts["owner"].startswith("process ")
        )
        assert (len(facts["nodes"]), facts["launcher"]) == (2, "torchrun or deepspeed")
    assert (
        status(outs / "signal")["state"] == "stopped"
        and status(outs / "full-z1")["state"] == "finished"
    )
    assert (status(outs / "full-z1")["restarts"], status(outs / "cut-z1")["restarts"]) == (0, 1)


def test_a_save_file_saves_and_goes_on(outs: Path) -> None:
    assert (outs / "save-file" / "done").exists()
    assert sorted(p.name for p in (outs / "save-file" / "ckpt").iterdir())[0] != "final"


def test_fp16_on_a_cpu_is_refused_with_a_sentence(outs: Path) -> None:
    assert "fp16.enabled = true, but this run is on a CPU" in json.loads(
        (outs / "fp16-0.json").read_text()
    )


def test_old_checkpoints_are_pruned_and_no_temporary_is_left(outs: Path) -> None:
    for run in (outs / "full-z0", outs / "killed-1-tensors"):
        assert sorted(path.name for path in (run / "ckpt").iterdir()) == [
            "10",
            "15",
            "final",
            "latest",
        ]


@pytest.mark.parametrize("stage", STAGES)
def test_no_step_between_log_lines_reads_from_the_device(outs: Path, stage: int) -> None:
    found = json.loads((outs / f"reads-z{stage}-0.json").read_text())
    ours = {reader for reader in found if not reader.startswith("deepspeed/")}
    assert "electra_ds/training/collectives.py:wait_votes" in ours and ours <= READS | (
        set() if stage else READS_AT_STAGE_0
    )
    assert (
        stage == 0 or "deepspeed/runtime/utils.py:is_invalid_grad_norm" in found
    )  # the probe reaches everywhere


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_is_told_of_stage_0(outs: Path, stage: int) -> None:
    said = (outs / f"alone-console-z{stage}").read_text()
    assert ("--engine zero0-fp32 is" in said) == (stage > 0)  # of the same precision


def test_one_rank_reduces_nothing_at_stage_0(outs: Path) -> None:
    assert json.loads((outs / "reduced-at-0.json").read_text()) == [1, 2, 3]


@pytest.mark.parametrize("stage", (1, 2))
def test_one_rank_trains_bit_exact_without_what_several_need(outs: Path, stage: int) -> None:
    assert is_bit_equal(outs / f"alone-z{stage}", outs / f"as-many-z{stage}")


@pytest.mark.parametrize("stage", (0, 1))
def test_skipped_fp16_steps_lose_no_rows_and_hold_the_schedule(outs: Path, stage: int) -> None:
    records = [
        record for record in curve(outs / f"overflow-z{stage}") if record["split"] == "train"
    ]
    assert [record["step"] for record in records] == list(range(1, 21)) and records[0][
        "skipped_steps"
    ] > 2
    assert [record["lr"] for record in records] == [
        record["lr"] for record in curve(outs / "one")[:20]
    ]
    last = records[-1]
    assert last["epoch"] * 300 == pytest.approx((20 + last["skipped_steps"]) * 16)
    assert curve(outs / f"overflow-z{stage}") == curve(
        outs / f"overflow-cut-z{stage}"
    )  # the scaler resumes, too
    assert is_bit_equal(outs / f"overflow-z{stage}", outs / f"overflow-cut-z{stage}")


def test_fp16_norms_are_those_of_the_unscaled_gradients(outs: Path) -> None:
    norms = [
        [record["grad_norm"] for record in curve(outs / f"overflow-z{stage}")[:5]]
        for stage in (0, 1)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and 10 < norms[0][0] < 1000


@pytest.mark.parametrize("stage", (0, 1))
def test_too_many_skipped_steps_in_a_row_stop_the_run(outs: Path, stage: int) -> None:
    assert "train.max_skipped_steps = 2" in json.loads(
        (outs / f"overflow-z{stage}-0.json").read_text()
    )


@pytest.mark.parametrize("stage", (0, 1, 3))
def test_held_out_figures_are_the_same_at_every_stage_and_after_a_resume(
    outs: Path, stage: int
) -> None:
    whole, first = (
        [record for record in curve(outs / name) if record["split"] == "valid"]
        for name in (f"evaluated-z{stage}", "evaluated-z0")
    )
    assert [record["step"] for record in whole] == [4, 8, 12, 16, 20]
    assert [record["mlm_loss"] for record in whole] == pytest.approx(
        [r["mlm_loss"] for r in first], rel=1e-5
    )
    assert curve(outs / f"evaluated-cut-z{stage}") == curve(outs / f"evaluated-z{stage}")


def test_a_mixture_resumes_bit_exact_and_one_source_trains_as_its_folder(outs: Path) -> None:
    assert is_bit_equal(outs / "mixed-cut", outs / "mixed") and curve(outs / "mixed-cut") == curve(
        outs / "mixed"
    )
    assert distance(outs / "mixed", outs / "full-z2") > 1e-2
    assert is_bit_equal(outs / "mixed-one", outs / "full-z1")
    for rank in (0, 1):
        refused = json.loads((outs / f"mixed-{rank}.json").read_text())
        assert (
            "rows_per_window: checkpoint {'de': 7000, 'ja': 3000}, now {'de': 6000, 'ja': 4000}"
            in refused
        )


def test_a_mixture_tells_the_held_out_figures_of_each_source(outs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(outs / "mixed-cut" / "tensorboard"))
    events.Reload()
    records = [record for record in curve(outs / "mixed-cut") if record["split"] == "valid"]
    for key in ("mlm_loss", "de/mlm_loss", "ja/mlm_loss", "ja/unigram_loss", "de/fixed_auc"):
        logged = [(record["step"], pytest.approx(record[key])) for record in records]
        assert [
            (event.step, event.value) for event in events.Scalars(f"valid/{key}")
        ] == logged and len(logged) == 2
    for record in records:
        assert record["mlm_loss"] == pytest.approx(
            0.7 * record["de/mlm_loss"] + 0.3 * record["ja/mlm_loss"]
        )
        assert record["de/mlm_loss"] != record["ja/mlm_loss"]


def test_tensorboard_of_a_resumed_run_holds_every_curve_without_overlap(outs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(outs / "evaluated-cut-z1" / "tensorboard"))
    events.Reload()
    train = "mlm_loss disc_loss mlm_accuracy replaced_fraction disc_auc disc_precision disc_recall lr grad_norm"
    train += " loss_scale skipped_steps tokens tokens_per_second"
    valid = "mlm_loss disc_loss mlm_accuracy replaced_fraction disc_auc fixed_auc unigram_loss base_rate_loss"
    for split, keys, steps in (
        ("train", train, [3, 6, 9, 12, 15, 18, 20]),
        ("valid", valid, [4, 8, 12, 16, 20]),
    ):
        for key in keys.split():
            assert [event.step for event in events.Scalars(f"{split}/{key}")] == steps, key
    assert [event.step for event in events.Scalars("data/wait_share")] == [3, 6, 9, 12, 15, 18, 20]
    written = {event.step: event.value for event in events.Scalars("train/loss")}
    logged = {
        r["step"]: r["loss"] for r in curve(outs / "evaluated-cut-z1") if r["split"] == "train"
    }
    assert written == pytest.approx(logged, rel=1e-6)


@pytest.mark.parametrize("world_size", (1, 2))
def test_check_tells_the_model_states_to_a_few_bytes_and_the_peak_nearly(
    outs: Path, world_size: int
) -> None:
    ranks = [
        json.loads((outs / f"memory-of-{world_size}-{rank}.json").read_text())
        for rank in range(world_size)
    ]
    assert len(ranks[0]) == 12
    for case in ranks[0]:
        measured, predicted = (max(found[case]["states"][i] for found in ranks) for i in (0, 1))
        assert 0 <= measured - predicted < 16, case  # bytes: a few numbers of DeepSpeed's own
        measured, predicted = (max(found[case]["peak"][i] for found in ranks) for i in (0, 1))
        # .7 to 11 % on two cores; two ranks on one core free what gloo has sent later: 14 %
        assert predicted == pytest.approx(measured, rel=0.15 if world_size == 1 else 0.2), case
