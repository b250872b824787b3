from __future__ import annotations

import math
import pickle

import pytest
import torch
from small_networks import VectorNetwork
from torch import Tensor, nn

from apex_fast import ApexObjective, ConditionShift, NonFiniteLossError, Velocities
from apex_fast.finite import FiniteWatch
from apex_fast.training.flow_matching import FlowMatching

SCHEDULES = ("joint", "retain", "sequential")


def objective(**settings) -> ApexObjective:
    return ApexObjective(ConditionShift(), **{"warmup_steps": 0, "ramp_steps": 0, **settings})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 2), torch.randn(size, 3)


def poisoned(network: nn.Module, role_time, at_call: int):
    """Returns NaN in the ``at_call``-th call whose time fulfils ``role_time``."""
    count = 0

    def velocity(x_t, t, condition):
        nonlocal count
        result = network(x_t, t, condition)
        if role_time(t):
            count += 1
            if count == at_call:
                return result * torch.nan
        return result

    return velocity


def test_a_non_finite_loss_is_found_one_step_late():
    torch.manual_seed(0)
    model, (x, condition) = VectorNetwork(), batch()
    shifted = poisoned(VectorNetwork(), lambda t: True, at_call=3)
    apex = objective()
    for step in (10, 11, 12):
        apex.backward(Velocities(model, shifted), x, condition, step=step, schedule="retain")
    with pytest.raises(NonFiniteLossError, match="the fake loss of step 12 is nan") as caught:
        apex.backward(Velocities(model, shifted), x, condition, step=13, schedule="retain")
    assert (caught.value.term, caught.value.step) == ("fake", 12)
    apex.check_finite()  # what was found is not found again
    apex(Velocities(model, shifted), x, condition, step=14)


def test_a_non_finite_loss_is_found_before_a_checkpoint():
    x, condition = batch()
    real = poisoned(VectorNetwork(), lambda t: True, at_call=1)
    apex = objective()
    apex.check_finite()
    losses = apex(Velocities(VectorNetwork(), real=real), x, condition, step=7)
    assert losses.correction.isnan().any()
    with pytest.raises(NonFiniteLossError, match="correction loss of step 7"):
        apex.check_finite()
    apex.check_finite()


def test_infinite_counts_and_the_term_is_named():
    x, condition = batch()
    apex = objective(loss="paper")
    apex(VectorNetwork(), x * 1e30, condition, step=3)
    with pytest.raises(NonFiniteLossError, match="(mix|fake) loss of step 3 is inf"):
        apex.check_finite()


def test_a_gradient_norm_waits_for_the_next_step():
    watch, fine = FiniteWatch(), torch.ones(())
    watch.record(4, {"fake": fine * math.nan})
    watch.add(4, {"gradient norm": fine})  # examines nothing: on a device that would wait for this very step
    with pytest.raises(NonFiniteLossError, match="the fake loss of step 4 is nan"):
        watch.record(5, {"fake": fine})
    watch.record(6, {"fake": fine})
    watch.add(6, {"gradient norm": fine * math.inf})
    with pytest.raises(NonFiniteLossError, match="the gradient norm of step 6 is inf, so that step has spoilt"):
        watch.record(7, {"fake": fine * math.nan})
    watch.check()


@pytest.mark.parametrize("kind", ["apex", "flow matching"])
def test_a_gradient_norm_is_watched_where_the_losses_are_finite(kind):
    model, (x, condition) = VectorNetwork(), batch()
    target = objective() if kind == "apex" else FlowMatching()
    for step in (0, 1):
        target.backward(model, x, condition, step=step)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        target.watch_gradient_norm(norm * (math.nan if step else 1.0), step=step)
    with pytest.raises(NonFiniteLossError, match="gradient norm of step 1 is nan") as caught:
        target.check_finite()
    assert (caught.value.term, caught.value.step) == ("gradient norm", 1)
    assert "loss" not in str(caught.value) and "clipping" not in str(caught.value)
    target.check_finite()


def test_the_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(NonFiniteLossError("fake", 3, math.nan)))
    assert (error.term, error.step) == ("fake", 3) and "the fake loss of step 3" in str(error)
