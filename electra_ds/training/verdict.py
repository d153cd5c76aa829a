"""A word about how the detection of replaced tokens learns, from the metrics of the log lines.

The word is a function of metrics that are equal on every rank, so every rank computes the same one.
A resumed run continues with the records of metrics.jsonl.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from electra_ds.config.architectures import ModelConfig
from electra_ds.config.schema import RunConfig, VerdictConfig
from electra_ds.training.entropy import entropy

WARMING_UP, PLATEAU, LEARNING, COLLAPSED = "warming up", "on the plateau", "learning", "collapsed"
WORDS = (WARMING_UP, PLATEAU, LEARNING, COLLAPSED)  # `verdict` in metrics.jsonl is an index
NEEDED = ("disc_gain", "replaced_fraction", "logit_std")  # metrics of a log line
# A run that learns keeps the word until the gain is below this share of the limit.
KEPT = 2 / 3


class Verdict(NamedTuple):
    """The word, and the step of the log line since which it holds."""

    word: str
    since: int

    def __str__(self) -> str:
        if self.word in (PLATEAU, COLLAPSED):
            return f"{self.word} since step {self.since:,}"
        return self.word

    def to_metrics(self) -> dict[str, float]:
        """The verdict as metrics of a log line."""
        return {"verdict": float(WORDS.index(self.word)), "verdict_since": float(self.since)}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Verdict | None":
        """The verdict in a record of metrics.jsonl; None without a valid one."""
        index, since = record.get("verdict"), record.get("verdict_since")
        if not isinstance(index, (int, float)) or not isinstance(since, (int, float)):
            return None
        if index not in range(len(WORDS)):
            return None
        return cls(WORDS[int(index)], int(since))


class Sample(NamedTuple):
    """One log line: disc_gain as a share of the base-rate entropy, and two spreads.

    hidden_rms is NaN for encoders of the user.
    """

    gain: float
    hidden_rms: float
    logit_std: float


class VerdictTracker:
    """The verdict after each log line.

    The window takes the lines after the warmup, and until it is full the verdict is "warming up":
    the samples of a generator that has just begun are easy to detect. Then the means over the
    window decide: "learning" above the least gain; otherwise "collapsed" for hidden states or
    logits that are nearly equal for all tokens, and "on the plateau" for others.
    """

    def __init__(self, options: VerdictConfig, warmup_steps: int) -> None:
        self.options = options
        self.warmup_steps = warmup_steps
        self.verdict = Verdict(WARMING_UP, 0)
        self._window: deque[Sample] = deque(maxlen=options.window)

    def add(self, step: int, values: Mapping[str, Any]) -> bool:
        """Take the metrics of a log line into account. Returns whether the word has changed.

        Lines of the warmup and lines without the metrics of a discriminator change nothing.
        """
        sample = _sample(values)
        if sample is None or step <= self.warmup_steps:
            return False
        self._window.append(sample)
        if len(self._window) < self.options.window:
            return False
        columns = zip(*self._window, strict=True)
        mean = Sample(*(sum(column) / len(self._window) for column in columns))
        kept = KEPT if self.verdict.word == LEARNING else 1.0
        word = _word_of(mean, self.options, self.options.learning_gain * kept)
        is_new = word != self.verdict.word
        if is_new:
            self.verdict = Verdict(word, step)
        return is_new

    def add_all(self, records: Iterable[Mapping[str, Any]], step: int) -> None:
        """Take records of a metrics.jsonl up to a step into account, except held-out ones."""
        for record in records:
            if record["split"] == "train" and record["step"] <= step:
                self.add(record["step"], record)

    def state(self) -> dict[str, Any]:
        """The state as JSON values, for `set_state` on other ranks."""
        window = [[None if math.isnan(x) else x for x in sample] for sample in self._window]
        return {"verdict": list(self.verdict), "window": window}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state` returned."""
        self.verdict = Verdict(*state["verdict"])
        self._window.clear()
        for values in state["window"]:
            self._window.append(Sample(*(math.nan if x is None else x for x in values)))


def word_of_evaluation(values: Mapping[str, Any], options: VerdictConfig) -> str | None:
    """The word for the metrics of one evaluation, without a history; None without a discriminator.

    The gain is that against samples of the run's own generator. They are easy to detect while the
    generator is untrained, so the word "learning" also needs the least AUC of the fixed corruption.
    Without that metric the gain alone decides.
    """
    sample = _sample(values)
    if sample is None:
        return None
    fixed_auc = values.get("fixed_auc")
    is_weak = fixed_auc is not None and fixed_auc < options.learning_auc  # NaN is not
    return _word_of(sample, options, math.inf if is_weak else options.learning_gain)


def _word_of(sample: Sample, options: VerdictConfig, least_gain: float) -> str:
    if sample.gain >= least_gain:
        return LEARNING
    is_flat = sample.hidden_rms < options.collapsed_rms or sample.logit_std < options.collapsed_std
    return COLLAPSED if is_flat else PLATEAU


def _sample(values: Mapping[str, Any]) -> Sample | None:
    """The sample of a log line; None if it lacks a metric, or a metric has no value."""
    numbers = [values.get(key) for key in NEEDED]
    if any(number is None or not math.isfinite(number) for number in numbers):
        return None
    gain, replaced_fraction, logit_std = map(float, numbers)  # type: ignore[arg-type]
    base_rate = entropy(replaced_fraction) if 0 < replaced_fraction < 1 else 0.0
    if base_rate <= 0:  # no token was replaced
        return None
    rms = values.get("hidden_rms")
    return Sample(gain / base_rate, math.nan if rms is None else float(rms), logit_std)


def advice(word: str, config: RunConfig) -> str:
    """What helps against a plateau or a collapse, among what the config does not have yet."""
    model, optimizer, hints = config.model, config.optimizer, []
    is_fan_in = isinstance(model, ModelConfig) and model.init == "fan_in"
    if word == PLATEAU:
        text = (
            "the discriminator uses little more than the frequencies of the tokens; post-LN "
            "models of any size stay here for some time"
        )
        hints.append("more steps")
        if optimizer.beta2 > 0.98:
            hints.append("optimizer.beta2 = 0.98")
        if isinstance(model, ModelConfig) and model.architecture != "modernbert":
            hints.append("a modern-* preset")
    elif word == COLLAPSED:
        text = (
            "the discriminator gives nearly the same probability to every token; it rarely "
            "recovers. Start again, or from an earlier checkpoint with --init-from"
        )
        hints += ["a lower optimizer.peak_lr", "a longer optimizer.warmup_steps"]
        if config.objective.has_generator:
            hints.append("a smaller generator")
    else:
        return ""
    if isinstance(model, ModelConfig) and not is_fan_in:
        hints.append("model.init = fan_in with model.embedding_init_std = 0.2")
    return f"{text}. What helps: {', '.join(hints)}"
