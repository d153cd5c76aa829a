"""The spike guard: a loss is compared with those before it, which a checkpoint holds."""

import json
import math

import pytest

from electra_ds.training.spike_guard import NOT_FINITE, WINDOW, SpikeGuard

FULL = [2.0] * WINDOW


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_and_named_so(loss):
    for recent in ([], FULL):  # inf is above every mean, but "inf times the mean" says little
        guard = SpikeGuard(3.0, recent)
        assert guard.refuses(loss) and guard.fault == NOT_FINITE and guard.recent == recent


def test_a_loss_above_the_factor_times_the_mean_is_a_spike():
    assert not SpikeGuard(3.0, FULL).refuses(6.0)
    guard = SpikeGuard(3.0, FULL)
    assert guard.refuses(6.1) and "a loss of 6.1, 3.0 times the mean" in guard.fault
    assert "(train.spike_factor = 3)" in guard.fault
    assert guard.recent == FULL  # a refused loss does not enter the mean


def test_nothing_is_a_spike_before_the_window_is_full():
    guard = SpikeGuard(3.0, FULL[1:])
    assert not guard.refuses(1000.0) and guard.refuses(1000.0)


def test_the_window_moves_and_a_checkpoint_holds_it():
    guard = SpikeGuard(3.0, [100.0, *FULL[1:]])
    assert not guard.refuses(2.0) and guard.recent == FULL and guard.fault == ""
    losses = [1.0 + (7 * i % 11) / 10 for i in range(3 * WINDOW)] + [9.0]
    whole, first = SpikeGuard(3.0, []), SpikeGuard(3.0, [])
    refused = [whole.refuses(loss) for loss in losses]
    for loss in losses[:-3]:
        first.refuses(loss)
    resumed = SpikeGuard(3.0, json.loads(json.dumps(first.recent)))
    assert [resumed.refuses(loss) for loss in losses[-3:]] == refused[-3:] == [False, False, True]
    assert resumed.recent == whole.recent


def test_without_a_factor_no_losses_are_kept():
    assert SpikeGuard(0.0, FULL).recent == []


def test_the_blame_names_every_part_that_is_not_finite_or_the_largest():
    parts = [(1.0, "rank 0"), (math.nan, "rank 1"), (9.0, "rank 2"), (math.inf, "rank 3")]
    assert SpikeGuard(0.0, []).blame(parts) == f"{NOT_FINITE} on rank 1; rank 3"
    assert SpikeGuard(0.0, []).blame(parts[::2]) == ""  # only the gradients are not finite
    guard = SpikeGuard(3.0, FULL)
    assert guard.refuses(10.0) and guard.blame(parts[::2]).endswith(
        "(train.spike_factor = 3), most of it on rank 2"
    )
