"""The verdict about learning: of real runs, and of log lines that are written out.

The runs are those of tests/support/verdict_scenarios.py.
"""

import math
from pathlib import Path

import pytest
import torch
from run_results import curve
from running import read_json
from torch.utils._python_dispatch import TorchDispatchMode

from electra_ds.config.loading import load_run
from electra_ds.config.schema import VerdictConfig
from electra_ds.model import losses
from electra_ds.model.losses import BINS, COUNTS_SIZE, Counts, centred_square, histogram
from electra_ds.reporting.status import lines, status
from electra_ds.training.entropy import entropy
from electra_ds.training.metrics import average_precision, deviation, rates
from electra_ds.training.verdict import (
    COLLAPSED,
    LEARNING,
    PLATEAU,
    WARMING_UP,
    Verdict,
    VerdictTracker,
    advice,
    word_of_evaluation,
)

# ------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("run", "word"),
    [("learning", LEARNING), ("plateau", PLATEAU), ("rate", COLLAPSED), ("head", COLLAPSED)],
)
def test_a_run_has_the_word_of_what_happens_to_it(outs: Path, run: str, word: str) -> None:
    out = outs / f"verdict-{run}"
    train = [record for record in curve(out) if record["split"] == "train"]
    words = [Verdict.of_record(record).word for record in train]
    assert words[0] == WARMING_UP and set(words[13:]) == {word}
    since = train[-1]["verdict_since"]
    assert 10 < since <= 52 and {r["verdict_since"] for r in train if r["step"] >= since} == {since}
    text = f"{word} since step {since:.0f}" if word in (PLATEAU, COLLAPSED) else word
    assert status(out)["verdict"] == text == lines(status(out))["verdict"]
    line = (outs / "one.log").read_text().split(f"resuming {out}")[0]
    assert text in line


def test_the_verdict_of_a_resumed_run_is_that_of_the_whole_one(outs: Path) -> None:
    assert curve(outs / "verdict-resumed") == curve(outs / "verdict-learning")


def test_a_collapse_ends_the_run_if_asked_and_says_what_helps(outs: Path) -> None:
    found = read_json(outs / "verdict-stop-0.json")
    assert found.startswith("RunFailure: step 48: collapsed (train.on_collapse = stop)")
    assert "a lower optimizer.peak_lr" in found and "a longer optimizer.warmup_steps" in found


def test_advice_is_printed_once(outs: Path) -> None:
    log = (outs / "one.log").read_text()
    first = log.index("step 48  collapsed: the discriminator gives nearly the same probability")
    run = log[first : log.index("finished at step", first)]
    assert run.count("What helps: ") == 1


def test_no_other_run_of_the_scenarios_is_called_collapsed(outs: Path) -> None:
    words = {}
    for path in outs.glob("*/metrics.jsonl"):
        run = path.parent
        found = [Verdict.of_record(record) for record in curve(run) if record["split"] == "train"]
        if any(verdict is not None and verdict.word == COLLAPSED for verdict in found):
            words[run.name] = True
    assert set(words) == {"verdict-rate", "verdict-head", "verdict-stop"}


# ------------------------------------------------------------------------------------------- lines


def line(gain: float, hidden_rms: float = 0.6, logit_std: float = 1.0) -> dict[str, float]:
    """The metrics of a log line. gain: a share of the entropy of the base rate."""
    return {
        "disc_gain": gain * entropy(0.15),
        "replaced_fraction": 0.15,
        "hidden_rms": hidden_rms,
        "logit_std": logit_std,
    }


def words(samples: list[dict[str, float]], warmup_steps: int = 0, **options) -> list[str]:
    """The verdict after each line, at steps 1, 2, ..."""
    tracker = VerdictTracker(VerdictConfig(window=3, **options), warmup_steps)
    found = []
    for step, values in enumerate(samples, 1):
        tracker.add(step, values)
        found.append(str(tracker.verdict))
    return found


def test_it_warms_up_until_the_window_is_full_of_lines_after_the_warmup():
    plateau = [line(0.01)] * 5
    assert words(plateau) == ["warming up"] * 2 + ["on the plateau since step 3"] * 3
    assert words(plateau, warmup_steps=2) == ["warming up"] * 4 + ["on the plateau since step 5"]


def test_the_gain_against_an_untrained_generator_does_not_count():
    """In the warmup rare samples are easy to detect; see the metrics of any run."""
    found = words([line(g) for g in (0.2, 0.25, 0.15, 0.1)] + [line(0.01)] * 3, warmup_steps=4)
    assert found == ["warming up"] * 6 + ["on the plateau since step 7"]


def test_means_over_the_window_decide():
    assert words([line(g) for g in (0.0, 0.0, 0.18)])[-1] == "learning"
    assert words([line(g) for g in (0.0, 0.0, 0.17)])[-1] == "on the plateau since step 3"


def test_the_word_learning_is_kept_down_to_two_thirds_of_the_limit():
    assert words([line(0.07)] * 3 + [line(0.041)] * 3)[-1] == "learning"
    assert words([line(0.07)] * 3 + [line(0.039)] * 3)[-1] == "on the plateau since step 6"


@pytest.mark.parametrize("flat", [{"hidden_rms": 1e-4}, {"logit_std": 0.0}])
def test_equal_states_or_logits_of_all_tokens_are_a_collapse(flat):
    found = words([line(0.1)] * 3 + [line(0.0, **flat)] * 4)
    assert found[2] == "learning" and found[-1] == "collapsed since step 6"


def test_a_lost_gain_alone_is_no_collapse():
    assert words([line(0.2)] * 3 + [line(0.005)] * 4)[-1] == "on the plateau since step 6"


def test_a_run_that_learns_again_is_not_collapsed():
    flat = line(0.0, logit_std=0.0)
    assert words([line(0.2)] * 3 + [flat] * 4 + [line(0.2)] * 3)[-1] == "learning"


def test_encoders_without_known_hidden_states_have_a_verdict():
    assert words([line(0.01, hidden_rms=math.nan)] * 3)[-1] == "on the plateau since step 3"


@pytest.mark.parametrize("key", ["disc_gain", "replaced_fraction", "logit_std"])
def test_lines_without_a_metric_change_nothing(key):
    without, null = line(0.01), line(0.01) | {key: None}
    del without[key]
    assert words([without, null, line(0.01) | {key: math.nan}] * 3)[-1] == "warming up"


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (line(0.07), LEARNING),
        (line(0.03), PLATEAU),
        (line(0.03, logit_std=0.001), COLLAPSED),
        (line(0.0, hidden_rms=0.001), COLLAPSED),
        (line(0.07) | {"fixed_auc": 0.52}, PLATEAU),  # easy samples of an untrained generator
        (line(0.07) | {"fixed_auc": 0.599}, PLATEAU),
        (line(0.07) | {"fixed_auc": 0.6}, LEARNING),
        (line(0.07) | {"fixed_auc": math.nan}, LEARNING),  # no token was replaced
        (line(0.03) | {"fixed_auc": 0.9}, PLATEAU),
        (line(0.07, logit_std=0.001) | {"fixed_auc": 0.52}, COLLAPSED),
        ({"mlm_loss": 3.0}, None),
    ],
)
def test_one_evaluation_has_a_word_without_a_history(values, word):
    assert word_of_evaluation(values, VerdictConfig()) == word


def test_the_least_auc_of_an_evaluation_can_be_set_and_training_lines_do_not_use_it():
    weak = line(0.07) | {"fixed_auc": 0.52}
    assert word_of_evaluation(weak, VerdictConfig(learning_auc=0.51)) == LEARNING
    assert word_of_evaluation(weak, VerdictConfig(learning_auc=0)) == LEARNING
    assert words([weak] * 3)[-1] == "learning"


def test_the_state_is_carried_to_other_ranks():
    tracker = VerdictTracker(VerdictConfig(window=3), 0)
    records = [line(0.2, hidden_rms=math.nan) | {"step": s, "split": "train"} for s in range(1, 6)]
    tracker.add_all(records, step=4)
    other = VerdictTracker(VerdictConfig(window=3), 0)
    other.set_state(tracker.state())
    assert other.verdict == tracker.verdict == Verdict(LEARNING, 3)
    for step in range(5, 9):
        flat = line(0.0, logit_std=0.0)
        assert other.add(step, flat) == tracker.add(step, flat)
    assert other.verdict == tracker.verdict and other.verdict.word == COLLAPSED


def test_advice_names_only_what_the_config_lacks():
    tiny, modern, small = (
        advice(PLATEAU, load_run(name)) for name in ("tiny", "modern-tiny", "small")
    )
    assert "a modern-* preset" in tiny and "model.init" not in tiny and "beta2" not in tiny
    assert "modern" not in modern
    assert "model.init = fan_in" in small and "optimizer.beta2 = 0.98" in small
    uniform = load_run("tiny", ["objective.generator=uniform"])
    assert "a smaller generator" in advice(COLLAPSED, load_run("tiny"))
    assert "a smaller generator" not in advice(COLLAPSED, uniform)
    assert advice(LEARNING, load_run("tiny")) == ""


# ----------------------------------------------------------------------------------------- metrics


def test_the_average_precision_is_that_of_its_definition():
    torch.manual_seed(0)
    logits, label = torch.randn(4, 50), torch.rand(4, 50) < 0.2
    logits += label  # replaced tokens have larger logits
    found = average_precision(histogram(logits, label, torch.ones(4, 50)))
    order = (logits.flatten() / (40 / BINS)).floor().argsort(descending=True)
    hits = label.flatten()[order].double()
    precision = hits.cumsum(0) / torch.arange(1, 201)
    assert found == pytest.approx(float((precision * hits).sum() / hits.sum()), abs=0.01)


def test_the_average_precision_without_information_is_the_share_of_replaced_tokens():
    label = torch.arange(100).view(4, 25) < 17
    assert average_precision(histogram(torch.zeros(4, 25), label, torch.ones(4, 25))) == 0.17
    none = torch.zeros(4, 25, dtype=torch.bool)
    assert math.isnan(average_precision(histogram(torch.zeros(4, 25), none, torch.ones(4, 25))))


def test_the_spread_of_logits_is_their_standard_deviation():
    torch.manual_seed(0)
    logits = torch.randn(4, 500) * 2 - 1
    found = deviation(histogram(logits, logits > 0, torch.ones(4, 500)))
    assert found == pytest.approx(float(logits.std(unbiased=False)), abs=0.01)
    assert deviation(histogram(torch.full((2, 3), -1.7), logits[:2, :3] > 0, torch.ones(2, 3))) == 0


def test_the_spread_of_hidden_states_is_that_of_the_counted_tokens_of_each_row():
    torch.manual_seed(0)
    hidden, weights = torch.randn(2, 5, 8), torch.tensor([[1.0] * 5, [1.0] * 2 + [0.0] * 3])
    rows = (hidden[0], hidden[1, :2])
    expected = sum(float((row - row.mean(0)).square().mean(1).sum()) for row in rows)
    found = float(centred_square(hidden, weights.double()))
    assert found == pytest.approx(expected, rel=1e-5)
    assert math.isnan(float(centred_square(None, weights.double())))


class Operations(TorchDispatchMode):
    """Counts the operations, and the elements of the largest result."""

    def __init__(self):
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += 1
        is_new = isinstance(result, torch.Tensor) and result._base is None
        self.largest = max(self.largest, result.numel() if is_new else 0)
        return result


@pytest.mark.parametrize("limit", [1, 80, 100, 10**9])  # one, two, two and all rows of 40 elements
def test_hidden_states_are_counted_in_chunks_of_rows(monkeypatch, limit):
    """The operations do not grow with the rows, nor the memory beyond the limit."""
    torch.manual_seed(0)
    hidden, weights = torch.randn(7, 5, 8).bfloat16(), (torch.rand(7, 5) > 0.3).double()
    weights[3] = 0
    expected = sum(
        centred_square(row[None], w[None]) for row, w in zip(hidden, weights, strict=True)
    )
    monkeypatch.setattr(losses, "CHUNK", limit)
    with Operations() as found:
        total = centred_square(hidden, weights)
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    assert found.largest <= max(limit, 40)
    chunks = -(-7 // max(1, limit // 40))
    assert found.count <= 20 * chunks


def test_unknown_hidden_states_have_no_spread():
    """An encoder of the user returns no hidden states; 0 would be a collapse."""
    counts = Counts.from_vector(torch.ones(COUNTS_SIZE, dtype=torch.float64))
    unknown = counts._replace(hidden_square=torch.tensor(math.nan, dtype=torch.float64))
    assert math.isnan(rates(unknown)["hidden_rms"]) and rates(counts)["hidden_rms"] == 1.0
