"""Sums of losses since the last log line. They are saved in checkpoints."""

from collections.abc import Sequence

import torch
from torch import Tensor

from electra_ds.cluster.launchers import Ranks
from electra_ds.common.errors import UserError
from electra_ds.training.collectives import ControlGroup


class LossSums:
    """Sums of `size` losses of this rank, on the device. Rank 0 also counts the steps.

    values: [size + 1] fp64; the last entry is the number of steps on rank 0, and 0 on other ranks.
    `add_step` does not wait for the device.
    """

    def __init__(
        self, size: int, ranks: Ranks, device: torch.device, saved: list[list[float]] | None = None
    ):
        """saved: the sums of each rank, from a checkpoint.

        At another world size rank 0 starts with the total of all ranks, the other ranks with 0.
        """
        if any(len(row) != size + 1 for row in saved or []):
            raise UserError(
                f"interval of meta.json: expected rows of {size + 1} numbers, found other rows; "
                "use an older checkpoint"
            )
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
        """Return the sums of each rank, [world_size][size + 1], for a checkpoint. Collective."""
        return [values.tolist() for values in control.all_gather(self.values.cpu())]

    def means(self, control: ControlGroup) -> list[float]:
        """Mean loss per step over all ranks, [size]. Collective."""
        *sums, steps = control.sum(self.values).tolist()
        return [value / max(1.0, steps) for value in sums]

    def reset(self) -> None:
        """Set the sums to zero, for the next interval."""
        self.values.zero_()
