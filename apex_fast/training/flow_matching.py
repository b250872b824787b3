"""Plain flow matching with the objective's interface: what makes a start (``train --loss flow_matching``)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apex_fast import ops
from apex_fast.condition import Condition
from apex_fast.draws import Draws, normal, state_dtype
from apex_fast.finite import GRADIENT_NORM, FiniteWatch
from apex_fast.path import TimeDistribution


@dataclass
class FlowMatchingLosses:
    """Result of one step: ``total`` scalar, ``supervised`` [B] detached, ``metrics`` 0-d tensors on the device."""

    total: Tensor
    supervised: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class FlowMatching:
    """mean ||F(x_t, t, c) - (z - x)||^2 (APEX, arXiv 2604.12322, Eq. 24 with lambda = 0 and without its t(1 - t)).

    times: distribution of t.
    """

    times: TimeDistribution = field(default_factory=TimeDistribution)

    def __post_init__(self) -> None:
        self._watch = FiniteWatch()

    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> Draws:
        """All random draws of a step for ``x`` ``[B, ...]``: noise and times, as the objective draws them."""
        z = normal(x.shape, x.device, state_dtype(x), generator)
        t = self.times.sample(len(x), x.device, generator)
        return Draws(z, t, z, t)

    def backward(
        self,
        velocity: Callable[[Tensor, Tensor, Condition], Tensor],
        x: Tensor,
        condition: Condition,
        *,
        step: int,
        generator: torch.Generator | None = None,
        draws: Draws | None = None,
        backward: Callable[[Tensor], Any] | None = None,
        no_sync: Callable[[], AbstractContextManager] | None = None,
    ) -> FlowMatchingLosses:
        """Computes the loss of ``x`` [B, ...] and its gradients. ``backward``: called with the scalar loss instead of
        ``loss.backward()``. ``draws``: those of :meth:`draw`, in place of a generator.

        Raises NonFiniteLossError at most a step late, so that the device is not waited for."""
        draws = self.draw(x, generator) if draws is None else draws
        z, t = draws.z, draws.s
        losses = ops.mixed_velocity_loss(velocity(ops.interpolate(x, z, t), t, condition), x, z)
        total = losses.mean()
        (backward or torch.autograd.backward)(total)
        detached = losses.detach()
        mean = total.detach()
        self._watch.record(step, {"supervised": mean})
        return FlowMatchingLosses(mean, detached, {"loss_supervised": mean})

    def watch_gradient_norm(self, norm: Tensor, *, step: int) -> None:
        """Has the 0-d norm of the gradients of ``step`` looked at as the losses are."""
        self._watch.add(step, {GRADIENT_NORM: norm})

    def leave_finite_checks(self) -> None:
        """From now on what is not finite is no error here: the caller looks at it."""
        self._watch.enabled = False

    def check_finite(self) -> None:
        """Raises NonFiniteLossError if a loss or a gradient norm so far was not finite."""
        self._watch.check()
