"""Guidance of the real branch: one stacked call without gradient, whose halves meet inside the loss op and nowhere
else."""

from __future__ import annotations

import pytest
import torch
from small_networks import TextNetwork
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apex_fast import ApexObjective, Condition, ConditionShift, Velocities

BATCH, CHANNELS, EDGE = 3, 2, 16
SAMPLES = BATCH * CHANNELS * EDGE * EDGE  # elements of one velocity


class Written(TorchDispatchMode):
    """Notes every op outside the networks that allocates a tensor of a velocity's size or more."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        memory = {a.untyped_storage().data_ptr() for a in torch.utils._pytree.tree_leaves((args, kwargs))
                  if isinstance(a, Tensor)}  # fmt: skip
        for value in torch.utils._pytree.tree_leaves(result):
            if self.inside == 0 and isinstance(value, Tensor) and value.numel() >= SAMPLES:
                if value.untyped_storage().data_ptr() not in memory:
                    self.found.append((func.name(), value.numel() * value.element_size()))
        return result


class Watched:
    """A velocity callable whose own work is left out of the account."""

    def __init__(self, network: TextNetwork, written: Written) -> None:
        self.network, self.written = network, written
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls.append((x_t.shape[0], torch.is_grad_enabled()))
        self.written.inside += 1
        try:
            return self.network(x_t, t, condition)
        finally:
            self.written.inside -= 1


def step(scale: float, schedule: str, guide=None) -> tuple[list[tuple[str, int]], list[tuple[int, bool]]]:
    torch.manual_seed(0)
    network, frozen = TextNetwork(CHANNELS), TextNetwork(CHANNELS).requires_grad_(False)
    written = Written()
    real = Watched(frozen, written)
    objective = ApexObjective(ConditionShift(), guidance_scale=scale, warmup_steps=0, ramp_steps=0, supervised_weight=0)
    x = torch.randn(BATCH, CHANNELS, EDGE, EDGE)
    condition, negative = Condition(torch.randn(BATCH, 4, 4)), Condition(torch.zeros(1, 4, 4))
    draws = objective.draw(x)

    def backward(loss: Tensor) -> None:
        written.inside += 1
        loss.backward()
        written.inside -= 1

    with written:
        objective.backward(
            Velocities(Watched(network, written), real=real, guide=guide),
            x,
            condition,
            step=0,
            draws=draws,
            schedule=schedule,
            backward=backward,
            negative_condition=None if scale == 1 else negative,
        )
    return written.found, real.calls


@pytest.mark.parametrize("schedule", ("sequential", "retain", "joint"))
def test_nothing_is_written_for_guidance_but_the_stacked_input(schedule: str) -> None:
    plain, calls = step(1.0, schedule)
    assert calls == [(BATCH, False)]
    guided, calls = step(3.0, schedule)
    assert calls == [(2 * BATCH, False)]
    # x_fake_t for both halves: neither v_guided, nor a difference, nor a copy of a half
    extra = sum(size for _, size in guided) - sum(size for _, size in plain)
    assert extra == 2 * SAMPLES * 4


def test_the_account_sees_a_guided_velocity_that_is_written() -> None:
    plain, _ = step(1.0, "sequential")
    guided, _ = step(3.0, "sequential", guide=lambda v, negative, scale: negative + scale * (v - negative))
    assert sum(size for _, size in guided) - sum(size for _, size in plain) > 2 * SAMPLES * 4
