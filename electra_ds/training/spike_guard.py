"""Detection of bad losses: not finite, or a spike above the losses before it."""

import math

WINDOW = 32  # accepted losses in the mean of the spike test; with fewer no loss is a spike
NOT_FINITE = "a loss that is not finite"


class SpikeGuard:
    """Test of the loss of each global batch. The result is equal on every rank.

    spike_factor: a loss above this multiple of the mean of the last WINDOW accepted losses is a
        spike; 0 disables the test.
    recent: the last accepted losses, at most WINDOW. A checkpoint holds them, so that a resumed run
        has the same results as one without a stop, at any number of ranks.
    fault: description of the last loss if it was refused; otherwise empty.
    """

    def __init__(self, spike_factor: float, recent: list[float]):
        self.spike_factor = spike_factor
        self.recent = recent[-WINDOW:] if spike_factor else []
        self.fault = ""

    def refuses(self, loss: float) -> bool:
        """Return whether a step with this loss must be skipped. Updates `recent` and `fault`."""
        self.fault = "" if math.isfinite(loss) else NOT_FINITE
        mean = math.fsum(self.recent) / max(1, len(self.recent))
        if not self.fault and len(self.recent) == WINDOW and loss > self.spike_factor * mean:
            self.fault = (
                f"a loss of {loss:.4g}, {loss / mean:.1f} times the mean of the {WINDOW} before it "
                f"(train.spike_factor = {self.spike_factor:g}), most of it"
            )
        if not self.fault:
            self.recent = [*self.recent, loss][-WINDOW:]
        return bool(self.fault)

    def blame(self, parts: list[tuple[float, str]]) -> str:
        """Return the fault of a skipped step with the micro-batches that caused it, for messages.

        parts: (loss, description) of each micro-batch of all ranks.
        The result is empty if all losses were accepted and only gradients are not finite (fp16).
        """
        blamed = [description for loss, description in parts if not math.isfinite(loss)]
        if self.fault and not blamed:
            blamed = [max(parts)[1]]
        return f"{self.fault or NOT_FINITE} on {'; '.join(blamed)}" if blamed else ""
