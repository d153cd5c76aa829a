"""Detection of bad losses: not finite, or a spike above the losses before it."""

import math

WINDOW = 32  # losses against which a spike is measured; with fewer no loss is a spike
NOT_FINITE = "a loss that is not finite"


class SpikeGuard:
    """Judges the loss of each global batch, the same on every rank.

    spike_factor: a loss above this multiple of the mean of the last WINDOW accepted losses is a
    spike; 0 disables.
    recent: these losses. They come from the checkpoint, so that a resumed run decides like one that
    never stopped, at any number of ranks.
    fault: what is wrong with the last loss, for messages; empty when it was accepted.
    """

    def __init__(self, spike_factor: float, recent: list[float]):
        self.spike_factor = spike_factor
        self.recent = recent[-WINDOW:] if spike_factor else []
        self.fault = ""

    def refuses(self, loss: float) -> bool:
        """Whether a step with this loss must not be applied."""
        self.fault = "" if math.isfinite(loss) else NOT_FINITE
        mean = math.fsum(self.recent) / max(1, len(self.recent))
        if len(self.recent) == WINDOW and loss > self.spike_factor * mean:
            self.fault = (
                f"a loss of {loss:.4g}, {loss / mean:.1f} times the mean of the {WINDOW} before it "
                f"(train.spike_factor = {self.spike_factor:g}), most of it"
            )
        if not self.fault:
            self.recent = [*self.recent, loss][-WINDOW:]
        return bool(self.fault)

    def blame(self, parts: list[tuple[float, str]]) -> str:
        """What is wrong with a step that was not applied, and where.

        parts: (loss, description) of each micro-batch of all ranks. Empty when the losses are good
        and the gradients alone are not finite (fp16).
        """
        places = [description for loss, description in parts if not math.isfinite(loss)]
        if self.fault and not places:
            places = [max(parts)[1]]
        return f"{self.fault or NOT_FINITE} on {'; '.join(places)}" if places else ""
