"""Recursive consistency of N-th order (RCGM: Sun and Lin, "Any-step Generation via N-th Order Recursive Consistent
Velocity Field Estimation"; its objective is Eq. 1 of TwinFlow, arXiv 2512.05150, whose released code runs it).

F(x_t, t, r) is the mean velocity from t down to r < t, so f(x_t, r) = (t - r) F is the way from x_t to x_r. Going
first a small step D along the path's own velocity v and then N jumps to r has to cover the same way:

    L = d( (f(x_t, r) - sum_i sg f(x_{t_i}, t_{i+1})) / D,  v ),    t_1 = t - D > ... > t_{N+1} = r    (TwinFlow, Eq. 1)

with x_{t_1} = x_t - D v and each further x where the jump before it ended. N = 0 is flow matching, N = 1 with r = 0 a
consistency model, whose f(x_t) = x_t - t F must not change along the path. As in the released code:

* the jumps are of equal length, D = 0.01, and the loss is taken on F itself, d(F, sg(F - clamp(e, -1, 1))) with e
  the left side minus v; where t - r < D there is no room for a jump, and the target is v within the clamp: flow
  matching;
* a batch is split into parts: t = 1 to r = 0; short jumps, r in [0.95 t, t]; jumps of any length, r in [0, t];
* d is ``barron`` (alpha 1, c 1e-3: close to the root of the mean square) or ``l2``, and each sample weighs
  1 + tan((1 - (t - r)) pi / 2.5): long jumps 1, short ones 4;
* targets come from an average of the network (``real_branch: ema``), from itself (``live``), or, ``frozen``, its own
  jumps follow the start's velocity in place of the data's, which is distillation;
* guidance g enters the target: v + (1 - 1/g) (v_c - v_n) of the network that gives the targets, whose fixed point is
  the guided velocity (UCGM, arXiv 2505.07447, "enhanced" target); with ``frozen``, the start's guided velocity.

One thing differs from the full-parameter runs of the papers: they add an embedding of r to the network. Here networks
are diffusers' own classes, which take one time, so F(x_t, t) does not see r, as in the released LoRA configurations
("aux_time_embed: false"). It then answers for all r at once; ``target_times: zero`` asks for r = 0 alone, which is
one meaning, and gives up Euler sampling in many steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from apex_fast import ops
from apex_fast.condition import Condition, expand_batch
from apex_fast.passes import Passes
from apex_fast.path import per_sample
from apex_fast.peers.base import Backward, Copies, Peer, PeerSettings, noise, times, whole_or_float
from apex_fast.roles import trained
from apex_fast.velocities import Velocities, Velocity

SHORT = 0.05
"""Longest part of t that a short jump covers."""

BARRON_SCALE = 1e-3


def recursive_target(
    velocity: Tensor, jumps: Tensor, v: Tensor, t: Tensor, r: Tensor, *, step_size: float, clip: float
) -> Tensor:
    """``sg(F - clamp(e, -clip, clip))`` with ``e = ((t - r) F - jumps)/D - v``, the residual of Eq. 1 of TwinFlow;
    where ``t - r < D``, ``e = F - v``.

    Args:
        velocity: F at ``(x_t, t)``, ``[B, ...]``.
        jumps: ``sum_i (t_i - t_{i+1}) F_i``, the way of the N jumps, ``[B, ...]``.
        v: velocity of the path at ``x_t``.
        t, r: ``[B]``, begin and end of the whole jump.
    """
    with torch.no_grad():
        near = t - r < step_size
        left = per_sample(torch.where(near, 1.0, (t - r) / step_size), velocity)
        right = per_sample(torch.where(near, 0.0, torch.full_like(t, 1 / step_size)), velocity)
        residual = left * velocity - right * jumps - v
        return velocity - residual.clamp(-clip, clip)


def metric(prediction: Tensor, target: Tensor, kind: str) -> Tensor:
    """d of both papers, ``[B]``: the mean square for "l2"; for "barron" that over ``c sqrt(1 + square/c^2)``, the
    root taken as a constant weight, so that the gradient of every sample has about the same size."""
    square = (prediction - target).square().flatten(1).mean(1)
    if kind == "l2":
        return square
    weight = (square.detach() / (BARRON_SCALE**2 + 1e-8) + 1).rsqrt()
    return square * weight / BARRON_SCALE


def time_weight(t: Tensor, r: Tensor) -> Tensor:
    """``1 + tan((1 - (t - r)) pi / 2.5)``, ``[B]``."""
    return 1 + torch.tan((1 - (t - r)) * (math.pi / 2.5))


def split_rows(batch: int, shares: tuple[float, ...]) -> list[int]:
    """How many rows of ``batch`` each share gets: together all of them, and none that has a share goes without.

    ValueError for a batch that is too small for that.
    """
    total, begun, counts = sum(shares), 0, []
    for number in range(len(shares)):
        end = round(batch * sum(shares[: number + 1]) / total)
        counts.append(end - begun)
        begun = end
    if any(share > 0 and count == 0 for share, count in zip(shares, counts, strict=True)):
        raise ValueError(
            f"a batch of {batch} cannot be split into parts of {list(shares)}: each needs a sample; raise "
            "train_batch_size, or write other shares"
        )
    return counts


@dataclass(frozen=True)
class Rows:
    """The times of a batch, ``[B]`` each, and which rows belong to which part."""

    t: Tensor
    r: Tensor
    ends: slice
    base: slice
    twin: slice


class Rcgm(Peer):
    """RCGM; ``velocities.real`` gives the targets: an average, None for the network itself, or the frozen start.

    ``distils`` says that it is the frozen start, whose velocity then takes the place of the data's.
    """

    name: ClassVar[str] = "rcgm"
    reads: ClassVar[tuple[str, ...]] = (
        "order",
        "step_size",
        "residual_clip",
        "metric",
        "shares",
        "target_times",
        "base_times",
    )
    parts: ClassVar[int] = 3

    def __init__(
        self, velocities: Velocities, settings: PeerSettings, *, copies: Copies, distils: bool = False, **options: Any
    ) -> None:
        super().__init__(velocities, settings, copies=copies, **options)
        self.distils = distils
        self.shares = self.shares_of(settings)
        if distils and velocities.real is None:
            raise ValueError("distils: there is no frozen start to follow: make the roles with real='frozen'")
        if not distils and not self.guidance_scale > 0:
            raise ValueError(
                f"guidance_scale={self.guidance_scale}: targets of the trained network itself can only be guided by a "
                "scale above 0; use the frozen start, or another scale"
            )

    @classmethod
    def shares_of(cls, settings: PeerSettings) -> tuple[float, ...]:
        """The share of each part of the batch. ValueError for another number of parts, or none at all."""
        shares = tuple(settings.shares) or (1.0,) * cls.parts
        if len(shares) != cls.parts or not sum(shares) > 0:
            raise ValueError(
                f"{cls.name} has {cls.parts} parts, got {list(settings.shares)}; write as many numbers, not all of "
                "them 0"
            )
        return shares

    # ---- cost

    def _share(self, *numbers: int) -> float:
        return sum(self.shares[number] for number in numbers) / sum(self.shares)

    @property
    def passes(self) -> Passes:
        """One forward with its backward, and the passes behind the targets of the rows that are not the twin's."""
        without = self._share(0, 1, 2) * (self.settings.order + self._guidance_passes)
        return Passes(whole_or_float(without), 1, 1, 1 if self.checkpointing else 0)

    @property
    def _guidance_passes(self) -> int:
        return (1 + self.guided) if self.distils else 2 * self.guided

    # ---- a step

    def losses(
        self,
        x: Tensor,
        condition: Condition | Tensor,
        negative: Condition | Tensor | None,
        *,
        step: int,
        generator: torch.Generator | None,
        backward: Backward,
    ) -> dict[str, Tensor]:
        rows = self.rows(x, generator)
        z = noise(x, generator)
        x = self.data(x, condition, rows, generator)
        x_t = ops.interpolate(x.to(z.dtype), z, rows.t)
        asked = self.ask("generator", self.velocities.generator, x_t, self.asked(rows), condition, x)
        velocity, target, base = trained(asked, "generator"), z - x.to(z.dtype), rows.base
        if base.stop > base.start:
            away = None if negative is None else part(expand_batch(negative, len(x), "negative"), base)
            known = velocity.detach()[base], target[base], x_t[base], rows.t[base], rows.r[base]
            target[base] = self.target(*known, part(condition, base), away, x[base])
        each = metric(velocity, target, self.settings.metric) * self.weights(rows)
        loss = each.mean()
        found = {"loss_base": each.detach()[base].mean()} if base.stop > base.start else {}
        loss = self.finish(loss, found, each.detach(), velocity, x_t, x, rows, condition, generator)
        backward(loss)
        return {**found, "loss_total": loss.detach()}

    def rows(self, x: Tensor, generator: torch.Generator | None) -> Rows:
        """Times of the batch: noise to data, short jumps, jumps of any length, and the twin's, in this order."""
        counts = split_rows(len(x), self.shares)
        t = times(self.settings.base_times, x, generator)
        place = x.device if generator is None else generator.device
        share = torch.rand(len(x), generator=generator, device=place, dtype=torch.float32).to(t)
        ends, short, over = counts[0], counts[0] + counts[1], sum(counts[:3])
        t[:ends] = 1.0
        r = t - share * t
        r[ends:short] = (t - share * t * SHORT)[ends:short]
        if self.settings.target_times == "zero":
            r[:over] = 0.0
        r[:ends] = 0.0
        return Rows(t, r, slice(0, ends), slice(0, over), slice(over, len(x)))

    def data(self, x: Tensor, condition: Condition | Tensor, rows: Rows, generator: torch.Generator | None) -> Tensor:
        """What x_t is made from: the data."""
        return x

    def asked(self, rows: Rows) -> Tensor:
        """The times that the network is asked with."""
        return rows.t

    def weights(self, rows: Rows) -> Tensor:
        """Of each sample's loss."""
        return time_weight(rows.t, rows.r)

    def finish(
        self,
        loss: Tensor,
        found: dict[str, Tensor],
        each: Tensor,
        velocity: Tensor,
        x_t: Tensor,
        x: Tensor,
        rows: Rows,
        condition: Condition | Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """``loss`` with what else the method adds, noted in ``found``."""
        return loss

    # ---- targets

    @torch.no_grad()
    def target(
        self,
        velocity: Tensor,
        v: Tensor,
        x_t: Tensor,
        t: Tensor,
        r: Tensor,
        condition: Condition | Tensor,
        negative: Condition | Tensor | None,
        like: Tensor,
    ) -> Tensor:
        """What F is fitted to at ``x_t``, where it is ``velocity`` now and the data's path has ``v``."""
        settings = self.settings
        role = self.velocities.generator if self.velocities.real is None else self.velocities.real
        if self.distils:
            v = self.teacher(role, x_t, t, condition, negative, like)
            role = self.velocities.generator
        elif self.guided and negative is not None:
            v_condition, v_negative = self.both(role, x_t, t, condition, negative, like)
            v = v + (1 - 1 / self.guidance_scale) * (v_condition - v_negative)
        if settings.order == 0:
            return v
        begin = torch.maximum(t - settings.step_size, r)
        jumps = self.jumps(role, x_t - settings.step_size * v, begin, r, condition, like)
        return recursive_target(velocity, jumps, v, t, r, step_size=settings.step_size, clip=settings.residual_clip)

    @torch.no_grad()
    def jumps(
        self, role: Velocity, x_t: Tensor, t: Tensor, r: Tensor, condition: Condition | Tensor, like: Tensor
    ) -> Tensor:
        """``sum_i (t_i - t_{i+1}) F_i`` of ``order`` equal jumps from t to r, each beginning where the last ended."""
        way, order = torch.zeros_like(x_t), self.settings.order
        for number in range(order):
            begin, length = t + (r - t) * (number / order), per_sample((t - r) / order, x_t)
            step = length * self.ask("target", role, x_t, begin, condition, like)
            x_t, way = x_t - step, way + step
        return way


def part(condition: Condition | Tensor, rows: slice) -> Condition | Tensor:
    """The conditions of some rows of a batch."""
    return condition.index(rows) if isinstance(condition, Condition) else condition[rows]
