"""Where a gradient is not finite, the guard leaves weights and states of Megatron's own optimizers untouched."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from small_models import fill_gradients, start, trainable, weights_and_states

from nemo_brain.host.optimizer import OptimizerGuard


def guarded(distributed: bool, tensor: int, value: float) -> None:
    """Steps with a finite gradient, with one that the last rank spoils, and with a finite one again."""
    start(tensor)
    wrapped, optimizer = trainable(distributed)
    guard = OptimizerGuard(optimizer.mcore_optimizer)
    states = []
    for spoiled in (False, True, False):
        fill_gradients(wrapped, value if spoiled and dist.get_rank() == dist.get_world_size() - 1 else 0.1)
        updated, norm, _ = optimizer.mcore_optimizer.step()
        assert updated and math.isfinite(float(norm)) != spoiled
        states.append(weights_and_states(wrapped, optimizer).clone())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2]) and states[2].isfinite().all()
    assert guard.skipped == 1


@pytest.mark.parametrize(
    ("ranks", "tensor", "distributed"),
    [(1, 1, False), (2, 2, False), (2, 1, True)],
    ids=["one process", "TP2", "DP2 distributed"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_a_finite_gradient_changes_nothing(ranks, tensor, distributed, value):
    run_ranks(guarded, ranks, distributed, tensor, value)


def unguarded() -> bool:
    start()
    wrapped, optimizer = trainable(distributed=False)
    fill_gradients(wrapped, math.nan)
    optimizer.mcore_optimizer.step()
    return bool(weights_and_states(wrapped, optimizer).isfinite().all())


def test_megatron_alone_lets_it_into_the_weights():
    assert run_ranks(unguarded, 1) == [False]
