"""Sums of losses since the last report, continued by a resumed run."""

from collections.abc import Sequence

import torch
from torch import Tensor

from electra_ds.cluster.launchers import Ranks
from electra_ds.training.collectives import ControlGroup


class LossSums:
    """This rank's sums of `size` losses, on the device, and rank 0's number of steps.

    values: [size + 1] fp64, the steps last. Adding does not wait for the device.
    """

    def __init__(
        self, size: int, ranks: Ranks, device: torch.device, saved: list[list[float]] | None = None
    ):
        """saved: the sums of each rank, from a checkpoint. At another world size rank 0 takes all."""
        self._is_rank0 = ranks.rank == 0
        own = [0.0] * (size + 1)
        if saved and len(saved) == ranks.world_size:
            own = saved[ranks.rank]
        elif saved and self._is_rank0:
            own = [sum(column) for column in zip(*saved, strict=True)]
        self.values = torch.tensor(own, dtype=torch.float64, device=device)

    def add_step(self, losses: Sequence[Tensor]) -> None:
        """Add the losses of one applied step, a vector [size] for each micro-batch of this rank."""
        for vector in losses:
            self.values[:-1] += vector
        if self._is_rank0:
            self.values[-1] += 1

    def per_rank(self, control: ControlGroup) -> list[list[float]]:
        """The sums of each rank, for a checkpoint. Collective."""
        return [values.tolist() for values in control.all_gather(self.values.cpu())]

    def means(self, control: ControlGroup) -> list[float]:
        """Mean loss per step over all ranks, [size]. Collective."""
        *sums, steps = control.sum(self.values).tolist()
        return [value / max(1.0, steps) for value in sums]

    def reset(self) -> None:
        """Start the next interval."""
        self.values.zero_()
