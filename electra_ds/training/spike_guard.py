"""Is a step fit to learn from? Its loss tells: not finite, or a spike above the losses before it."""

import math

WINDOW = 32  # losses that a spike is measured against; nothing is a spike before there are so many
NOT_FINITE = "a loss that is not finite"


class SpikeGuard:
    """Judges the global losses of a run, one step after another.

    A spike is a loss above `spike_factor` times the mean of the last WINDOW that were accepted; 0 looks for none.
    recent: those losses, from the checkpoint, so that a resumed run judges as one that never stopped, at any number of
    ranks. fault: what is wrong with the loss judged last, for the log; empty when it was accepted.
    """

    def __init__(self, spike_factor: float, recent: list[float]):
        self.spike_factor, self.recent, self.fault = (
            spike_factor,
            recent[-WINDOW:] if spike_factor else [],
            "",
        )

    def refuses(self, loss: float) -> bool:
        """Whether a step with this loss must not be applied."""
        mean = math.fsum(self.recent) / max(1, len(self.recent))
        self.fault = "" if math.isfinite(loss) else NOT_FINITE
        if len(self.recent) == WINDOW and loss > self.spike_factor * mean:
            self.fault = (
                f"a loss of {loss:.4g}, {loss / mean:.1f} times the mean of the {WINDOW} before it "
                f"(train.spike_factor = {self.spike_factor:g}), most of it"
            )
        if not self.fault:
            self.recent = [*self.recent, loss][-WINDOW:]
        return bool(self.fault)

    def blame(self, parts: list[tuple[float, str]]) -> str:
        """What is wrong with a step that was not applied, and where; empty when it is the gradients alone (fp16).

        parts: the loss of each micro-batch of all ranks, and its name for people.
        """
        places = [name for loss, name in parts if not math.isfinite(loss)]
        if self.fault and not places:
            places = [max(parts)[1]]
        return f"{self.fault or NOT_FINITE} on {'; '.join(places)}" if places else ""
