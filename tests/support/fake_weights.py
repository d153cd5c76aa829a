"""Plain tensors behind the interface that saving and loading use of an engine."""

from types import SimpleNamespace

import torch

from electra_ds.training.optimizer import MOMENTS
from electra_ds.training.state import TrainingState

PADDED = {"word": 10}  # of 16 rows in memory
PROGRESS = TrainingState(
    step=1000,
    skipped=2,
    skipped_in_a_row=1,
    tokens=5,
    data={"position": 32},
    interval=[[1.0, 2.0, 3.0]],
)
CONFIG = {"model": {"hidden_size": 4}}


class FakeWeights:
    """checkpoint.Weights with random tensors on one rank."""

    def __init__(self, seed=0, shapes=None):
        shapes = shapes or {
            "word": (16, 4),
            "layer.weight": (3, 4),
            "layer.bias": (3,),
            "scale": (),
        }
        random = torch.Generator().manual_seed(seed)
        self.ranks = SimpleNamespace(rank=0, world_size=1)
        self.frozen: dict[str, torch.Tensor] = {}
        self.parameters = dict(shapes)
        self.optimizer_kind = "adam"
        self.moments = dict.fromkeys(shapes, MOMENTS)
        self.values = {
            (name, kind): torch.randn(shape, generator=random)
            for name, shape in shapes.items()
            for kind in ("master", *MOMENTS)
        }
        for name, rows in PADDED.items():
            for kind in ("master", *MOMENTS):
                self.values[name, kind][rows:] = 0
        self.applied_steps, self.scaler, self.fails_at = None, {"cur_scale": 8.0}, None

    def full_tensor(self, name, kind):
        if (name, kind) == self.fails_at:
            raise OSError(28, "No space left on device")
        return self.values[name, kind]

    def set_full_tensor(self, name, kind, value):
        assert value.shape == self.values[name, kind].shape
        self.values[name, kind] = value.clone()

    def shape(self, name):
        return torch.Size(self.parameters[name])

    def all_gather_object(self, value):
        return [value]

    def reset_moments(self, applied_steps):
        self.applied_steps = applied_steps
        for name, kind in self.values:
            if kind != "master":
                self.values[name, kind] = torch.zeros(self.parameters[name])

    def scaler_state(self):
        return dict(self.scaler)

    def set_scaler_state(self, state):
        self.scaler = dict(state)

    def equals(self, other, kinds=("master", *MOMENTS)):
        return all(
            torch.equal(value, other.values[key])
            for key, value in self.values.items()
            if key[1] in kinds
        )
