"""The rows of the relative table are computed once per length and device, in bounded memory."""

import pytest
import small_objective
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from electra_ds.model import deberta_v2
from electra_ds.model.deberta_v2 import rows_on
from electra_ds.model.kernels.disentangled import distance_rows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The arguments of each computation; before a test nothing is kept."""
    found = []

    def counted(*arguments):
        found.append(arguments)
        return distance_rows(*arguments)

    monkeypatch.setattr(deberta_v2, "distance_rows", counted)
    monkeypatch.setattr(deberta_v2, "_kept_rows", {})
    return found


def test_both_encoders_and_later_batches_use_the_same_rows(calls):
    module = small_objective.build(architecture="deberta_v2")
    batch = small_objective.make_batch()
    assert torch.equal(module(batch).total, module(batch).total)
    assert len(calls) == len(set(calls)) and calls
    assert torch.equal(rows_on(20, 8, 40, CPU), distance_rows(20, 8, 40))


def test_a_bounded_number_of_lengths_is_kept():
    for length in range(10, 10 + 3 * deberta_v2.MAX_KEPT):
        assert len(rows_on(length, 8, 40, CPU)) == 2 * length - 1
    assert len(deberta_v2._kept_rows) == deberta_v2.MAX_KEPT


def test_rows_without_data_are_not_kept():
    """`check` runs the model on tensors without data, in the process of a later training."""
    with FakeTensorMode():
        assert isinstance(rows_on(20, 8, 40, CPU), FakeTensor)
    assert torch.equal(rows_on(20, 8, 40, CPU), distance_rows(20, 8, 40))


def test_rows_made_in_inference_mode_serve_training():
    module = small_objective.build(architecture="deberta_v2")
    batch = small_objective.make_batch()
    with torch.inference_mode():
        module(batch)
    module(batch).total.backward()  # autograd refuses to keep a tensor of inference mode
