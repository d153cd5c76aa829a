"""Schedules against their formulas, their limits, refusals, and the rates of a resumed run."""

import math

import pytest
import shard_data
from hypothesis import given
from hypothesis import strategies as st
from running import run_cli
from small_run import SMALL_MODEL

from electra_ds.common.errors import UserError
from electra_ds.config.loading import load_run
from electra_ds.config.schema import OptimizerConfig
from electra_ds.data.dataset import open_data
from electra_ds.reporting.check import check
from electra_ds.training.metrics_file import read_metrics
from electra_ds.training.run_plan import plan
from electra_ds.training.schedule import learning_rate, linear

PEAK = 3e-4
SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 + 0.5 * math.cos(math.pi * x),
    "1-sqrt": lambda x: 1 - x**0.5,
}


def options(schedule, warmup_steps, final=0.0, decay=None, shape=None):
    return OptimizerConfig(
        peak_lr=PEAK,
        warmup_steps=warmup_steps,
        schedule=schedule,
        final_lr_ratio=final,
        decay_steps=decay,
        decay_shape=shape,
    )


def rates(chosen, total):
    return [learning_rate(chosen, step, total) for step in range(total + 1)]


def written_out(schedule, t, total, warmup, final, decay=None, shape=None):
    """The rate at one step, written in another form than in the code."""
    warm = 1 if t >= warmup else t / warmup
    if schedule == "linear":
        return PEAK * warm * (1 - (1 - final) * t / total)
    if schedule == "constant":
        return PEAK * warm
    if schedule == "inverse_sqrt":  # Vaswani et al., equation 3, times a constant
        return PEAK * warmup**0.5 * min(t * warmup**-1.5, t**-0.5) if t else 0.0
    if t <= warmup:
        return PEAK * warm
    if schedule == "cosine":
        x = (t - warmup) / (total - warmup)
        return PEAK * (final + (1 - final) * SHAPES["cosine"](x))
    x = max(0, t - total + decay) / decay
    return PEAK * (final + (1 - final) * SHAPES[shape or "linear"](x))


RUNS = [  # total, warmup, final ratio
    *((20, 5, 0.0), (20, 5, 0.1), (1, 0, 0.0), (7, 0, 0.5), (30, 1, 1.0)),
]


@pytest.mark.parametrize(("total", "warmup", "final"), RUNS)
@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        *(("linear", None), ("cosine", None), ("constant", None), ("inverse_sqrt", None)),
        *(("wsd", shape) for shape in (None, *SHAPES)),
    ],
)
def test_each_step_has_the_rate_of_the_formula(schedule, shape, total, warmup, final):
    if schedule in ("constant", "inverse_sqrt"):
        warmup, final = max(warmup, int(schedule == "inverse_sqrt")), 0.0
    decays = (1, (total - warmup + 1) // 2, total - warmup) if schedule == "wsd" else (None,)
    for decay in decays:
        found = rates(options(schedule, warmup, final, decay, shape), total)
        expected = [
            written_out(schedule, t, total, warmup, final, decay, shape) for t in range(total + 1)
        ]
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_linear_is_the_product_of_warmup_and_decay_to_the_last_bit():
    """The default of earlier versions, so that their runs resume with the same rates."""
    for total, warmup in ((20, 5), (1000, 0), (997, 101), (5, 9)):
        earlier = [
            PEAK * max(0.0, 1 - t / total) * (min(1.0, t / warmup) if warmup else 1.0)
            for t in range(total + 1)
        ]
        assert rates(OptimizerConfig(peak_lr=PEAK, warmup_steps=warmup), total) == earlier


def test_warmup_multiplies_the_linear_decay():
    def rate_at(step):
        return linear(5e-4, 10_000, step, 1_000_000)

    expected = {
        0: 0.0,  # the first step changes nothing, as in the authors' code
        1: 5e-4 * (1 - 1e-6) * 1e-4,
        5_000: 5e-4 * 0.995 * 0.5,
        10_000: 5e-4 * 0.99,
        505_000: 5e-4 * 0.495,
        999_999: 5e-4 * 1e-6,
        1_000_000: 0.0,
    }
    for step, rate in expected.items():
        assert math.isclose(rate_at(step), rate, rel_tol=1e-9, abs_tol=1e-18), step
    assert max(expected, key=rate_at) == 10_000


def test_the_rate_is_never_negative_and_warmup_may_be_none():
    assert [linear(1.0, 0, step, 4) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_rate_rises_then_is_stable_then_falls_to_the_final_share(shape, final):
    found = rates(options("wsd", 6, final, 10, shape), 40)
    assert found[:7] == sorted(set(found[:7])) and found[0] == 0
    assert set(found[6:31]) == {PEAK}
    assert found[30:] == sorted(found[30:], reverse=True)
    assert found[40] == pytest.approx(PEAK * final, abs=0) and (final == 1) == (found[39] == PEAK)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "inverse_sqrt"])
def test_after_the_warmup_the_rate_does_not_rise(schedule):
    found = rates(options(schedule, 6), 40)
    assert found[6:] == sorted(found[6:], reverse=True) and max(found) == found[6]
    ends = {"linear": 0.0, "cosine": 0.0, "constant": PEAK, "inverse_sqrt": PEAK * 0.15**0.5}
    assert found[40] == pytest.approx(ends[schedule], rel=1e-12, abs=0)


@given(st.data(), st.floats(1e-300, 1e38), st.floats(0, 1), st.integers(1, 10**9))
def test_a_rate_is_between_zero_and_the_peak(draw, peak, final, total):
    schedule = draw.draw(
        st.sampled_from(["linear", "cosine", "constant", "wsd", "inverse_sqrt"]), "schedule"
    )
    warmup = draw.draw(st.integers(int(schedule == "inverse_sqrt"), total), "warmup")
    has_end = schedule not in ("constant", "inverse_sqrt")
    decay = None
    if schedule == "wsd":
        warmup = min(warmup, total - 1)
        decay = draw.draw(st.integers(1, total - warmup), "decay")
    chosen = OptimizerConfig(
        peak_lr=peak,
        warmup_steps=warmup,
        schedule=schedule,
        final_lr_ratio=final if has_end else 0.0,
        decay_steps=decay,
        decay_shape=draw.draw(st.sampled_from([None, *SHAPES]), "shape") if decay else None,
    )
    for step in {0, warmup, total - (decay or 1), draw.draw(st.integers(0, total)), total}:
        assert 0 <= learning_rate(chosen, step, total) <= peak


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["schedule=wsd"], "schedule = wsd needs decay_steps"),
        (["decay_steps=5"], "decay_steps = 5, but schedule = linear; only wsd"),
        (["schedule=cosine", "decay_shape=1-sqrt"], "decay_shape = 1-sqrt, but schedule = cosine"),
        (["schedule=constant", "final_lr_ratio=0.1"], "final_lr_ratio = 0.1, but schedule = const"),
        (["schedule=inverse_sqrt", "final_lr_ratio=1"], "final_lr_ratio = 1"),
        (["schedule=inverse_sqrt", "warmup_steps=0"], "inverse_sqrt, but warmup_steps = 0"),
        (["schedule=step"], 'optimizer.schedule = "step"'),
        (["schedule=wsd", "decay_steps=0"], "optimizer.decay_steps = 0"),
        (["schedule=wsd", "decay_steps=2000000000"], "optimizer.decay_steps = 2000000000"),
        (["final_lr_ratio=1.01"], "optimizer.final_lr_ratio = 1.01"),
        (["final_lr_ratio=-0.1"], "optimizer.final_lr_ratio = -0.1"),
        (["schedule=wsd", "decay_steps=5", "decay_shape=sqrt"], "optimizer.decay_shape"),
    ],
)
def test_a_setting_without_a_meaning_is_refused(sets, message):
    with pytest.raises(UserError) as refused:
        load_run("tiny", [f"optimizer.{setting}" for setting in sets])
    assert message in str(refused.value)


LENGTHS = {"total_steps": ["train.total_steps=40"], "epochs": ["train.epochs=1"]}


@pytest.mark.parametrize("length", LENGTHS)
def test_a_decay_longer_than_the_run_is_the_same_error_in_check_and_pretrain(length, tmp_path):
    """640 rows in batches of 16 are 40 steps."""
    rows = shard_data.best_fit_rows(640, 32, seed=0)
    source = open_data(shard_data.write_data(tmp_path, [rows]))
    clear = ["train.total_steps=null"] if length == "epochs" else []
    sets = [*clear, *LENGTHS[length], "train.global_batch_size=16", "optimizer.warmup_steps=10"]

    def run(decay):
        return load_run("tiny", [*sets, "optimizer.schedule=wsd", f"optimizer.decay_steps={decay}"])

    assert plan(run(30), source, 1).total_steps == check(run(30), 1, source).total_steps == 40
    messages = set()
    for act in (lambda: plan(run(31), source, 1), lambda: check(run(31), 1, source)):
        with pytest.raises(
            UserError, match=r"optimizer\.decay_steps = 31, but the schedule has 40"
        ) as e:
            act()
        messages.add(str(e.value))
    if length == "total_steps":  # known without the data
        with pytest.raises(UserError) as e:
            check(run(31), 1)
        messages.add(str(e.value))
    else:
        assert check(run(31), 1).total_steps is None
    assert len(messages) == 1


# --------------------------------------------------------------------------------------- real runs


def test_a_run_has_the_rates_of_its_schedule_also_after_a_resume(tmp_path):
    rows = shard_data.best_fit_rows(64, 32, seed=0)
    data = shard_data.write_data(tmp_path, [rows])
    chosen = ["schedule=wsd", "decay_steps=4", "decay_shape=1-sqrt", "final_lr_ratio=0.1"]
    optimizer = [f"optimizer.{setting}" for setting in (*chosen, "warmup_steps=3")]
    sets = [*SMALL_MODEL, *optimizer, "train.total_steps=10", "logging.every=1"]
    sets += ["train.global_batch_size=8", "train.micro_batch_size=8"]
    words = [
        "pretrain",
        "tiny",
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--engine",
        "zero0-fp32",
    ]

    def pretrain(*more, check=True):
        settings = [word for setting in (*sets, *more) for word in ("--set", setting)]
        return run_cli(*words, *settings, *stop, check=check)

    stop = ["--stop-at-step", 8]
    assert pretrain(check=False).returncode == 85
    stop = []
    refused = pretrain("optimizer.decay_shape=cosine", check=False)
    assert refused.returncode == 2 and "optimizer.decay_shape: 1-sqrt -> cosine" in refused.stderr
    pretrain()
    found = {
        r["step"]: r["lr"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "lr" in r
    }
    run = load_run("tiny", sets)
    expected = {t + 1: written_out("wsd", t, 10, 3, 0.1, 4, "1-sqrt") for t in range(10)}
    scale = run.optimizer.peak_lr / PEAK
    assert found == pytest.approx({step: rate * scale for step, rate in expected.items()}, rel=1e-6)
