"""The optimal-transport path in pure functions, and how its times are drawn.

Notation of the paper (APEX, arXiv 2604.12322): t in [0, 1], t = 1 is pure noise and t = 0 data, x_t = t z + (1 - t) x
(Eq. 1), and the network predicts the velocity v = z - x (Eq. 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """Times ``[B]`` as a view ``[B, 1, ...]`` that broadcasts against ``like`` ``[B, ...]``."""
    return t.reshape(-1, *[1] * (like.dim() - 1))


def endpoint(velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The clean sample that a velocity implies, ``x_t - t v`` (Eq. 10). ``[B, ...]``, t ``[B]``; differentiable."""
    return x_t - per_sample(t, x_t) * velocity


def noise_endpoint(velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The noise that a velocity implies, ``x_t + (1 - t) v``. ``[B, ...]``, t ``[B]``; differentiable."""
    return x_t + (1 - per_sample(t, x_t)) * velocity


def score(velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The score of the marginal of x_t from its exact velocity: ``-(x_t + (1 - t) v) / t`` (Prop. 1). Needs t > 0."""
    return -noise_endpoint(velocity, x_t, t) / per_sample(t, x_t)


@dataclass(frozen=True)
class TimeDistribution:
    """How times in [0, 1] are drawn, one per sample.

    Args:
        kind: ``"uniform"`` on [low, high); ``"logit_normal"``: sigmoid(mean + std n) with standard normal n, laid onto
            [low, high]; ``"constant"``: always ``value``; ``"discrete"``: one of ``values``, each as likely.
        low, high: range of the continuous kinds.
        mean, std: of the logit, for ``"logit_normal"``.
        shift: moves times towards noise: u becomes ``shift u / (1 + (shift - 1) u)`` before it is laid onto [low, high]
            (continuous kinds); 1 leaves them.
        value: the time of ``"constant"``, and of the share below.
        values: the times of ``"discrete"``.
        constant_share: probability with which a sample gets ``value`` instead of a draw. ``TimeDistribution("uniform",
            constant_share=0.6)`` trains one step (t = 1) in 60 % of the samples and any start in the others.

    Raises:
        ValueError: a field out of range.
    """

    kind: Literal["uniform", "logit_normal", "constant", "discrete"] = "uniform"
    low: float = 0.0
    high: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    value: float = 1.0
    values: tuple[float, ...] = ()
    constant_share: float = 0.0

    def __post_init__(self) -> None:
        kinds = ("uniform", "logit_normal", "constant", "discrete")
        if self.kind not in kinds:
            raise ValueError(f"TimeDistribution: kind must be one of {', '.join(kinds)}, got {self.kind!r}")
        # lists come from configuration files; a frozen value must be hashable
        object.__setattr__(self, "values", tuple(float(v) for v in self.values))
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"TimeDistribution: 0 <= low <= high <= 1 is required, got low {self.low} and high {self.high}"
            )
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std >= 0):
            raise ValueError(f"TimeDistribution: mean must be finite and std >= 0, got {self.mean} and {self.std}")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"TimeDistribution: shift must be above 0 (1 = none), got {self.shift}")
        if not 0 <= self.value <= 1:
            raise ValueError(f"TimeDistribution: value must lie in [0, 1], got {self.value}")
        if not 0 <= self.constant_share <= 1:
            raise ValueError(f"TimeDistribution: constant_share must lie in [0, 1], got {self.constant_share}")
        if (self.kind == "discrete") != bool(self.values) or not all(0 <= v <= 1 for v in self.values):
            raise ValueError(
                'TimeDistribution: kind "discrete" needs values in [0, 1], and only that kind takes them, '
                f"got kind {self.kind!r} and values {self.values}"
            )

    def sample(
        self, batch: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws ``[batch]`` times, fp32, on ``device``.

        They are drawn on the generator's device and moved if that is another one; without a generator the global one of
        ``device`` is used.
        """
        source = generator.device if generator is not None else torch.device("cpu" if device is None else device)
        drawn = self._draw(batch, source, generator)
        if 0 < self.constant_share:
            chosen = torch.rand(batch, generator=generator, device=source, dtype=torch.float32) < self.constant_share
            drawn = torch.where(chosen, self.value, drawn)
        return drawn if device is None else drawn.to(device)

    @property
    def reaches_zero(self) -> bool:
        """Whether times come as close to 0 as one likes and ``1 / t`` has no mean, or t = 0 itself is drawn."""
        drawn = {"constant": self.value, "discrete": min(self.values, default=1.0), "uniform": self.low}
        # A logit-normal time above 0 thins out so fast there that every power of 1 / t has a mean.
        least = drawn.get(self.kind, 1.0 if self.high > 0 else 0.0)
        return least == 0 or (self.constant_share > 0 and self.value == 0)

    def average(self, function: Callable[[Tensor], Tensor]) -> float:
        """Mean of ``function``, elementwise on fp64 times, over the distribution: exact for the discrete kinds, by
        quadrature with 65,536 points for the others."""
        points, wide = 1 << 16, torch.float64
        if self.kind in ("constant", "discrete"):
            times = torch.tensor(self.values or (self.value,), dtype=wide)
            weights = torch.ones_like(times)
        elif self.kind == "uniform":
            # Many points where the times are small: functions such as 1 / t vary most there.
            roots = (torch.arange(points, dtype=wide) + 0.5) / points
            times, weights = self._placed(roots**4), 4 * roots**3
        else:
            normal = torch.linspace(-16, 16, points, dtype=wide)
            times = self._placed(torch.sigmoid(self.mean + self.std * normal))
            weights = torch.exp(-normal.square() / 2)
        result = float((function(times) * weights).sum() / weights.sum())
        if self.constant_share == 0:
            return result
        constant = float(function(torch.tensor([self.value], dtype=wide)))
        return self.constant_share * constant + (1 - self.constant_share) * result

    def _draw(self, batch: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        if self.kind == "constant":
            return torch.full((batch,), self.value, device=device, dtype=torch.float32)
        if self.kind == "discrete":
            picked = torch.randint(len(self.values), (batch,), generator=generator, device=device)
            times = torch.full((batch,), self.values[0], device=device, dtype=torch.float32)
            for index, value in enumerate(self.values[1:], 1):
                # not a lookup in a tensor of the values: bringing that to an accelerator would stall it
                times = torch.where(picked == index, value, times)
            return times
        if self.kind == "uniform":
            unit = torch.rand(batch, generator=generator, device=device, dtype=torch.float32)
        else:
            normal = torch.randn(batch, generator=generator, device=device, dtype=torch.float32)
            unit = torch.sigmoid(self.mean + self.std * normal)
        return self._placed(unit)

    def _placed(self, unit: Tensor) -> Tensor:
        if self.shift != 1:
            unit = self.shift * unit / (1 + (self.shift - 1) * unit)
        return self.low + (self.high - self.low) * unit
