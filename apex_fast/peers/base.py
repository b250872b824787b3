"""What the peers' methods share: their settings, their interface to the training loop, and questions to the network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from apex_fast.condition import Condition, concatenate, expand_batch
from apex_fast.draws import normal, state_dtype
from apex_fast.finite import GRADIENT_NORM, FiniteWatch
from apex_fast.passes import Passes
from apex_fast.path import TimeDistribution
from apex_fast.roles import check_velocity
from apex_fast.velocities import Velocities, Velocity

Backward = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Copies:
    """The weights that a method holds beside its optimizers, whatever average a run evaluates.

    Attributes:
        networks: whole networks.
        trained: how many of them are trained in all of their parameters.
        adapters: LoRA adapters on them, trained or averaged.
    """

    networks: int
    trained: int
    adapters: int

    def __str__(self) -> str:
        whole = f"{self.networks} network{'s' if self.networks > 1 else ''}, {self.trained} trained in full"
        return f"{whole}, {self.adapters} adapter{'' if self.adapters == 1 else 's'}"


@dataclass(frozen=True)
class PeerSettings:
    """Settings of the peers' methods. Their guidance is the run's ``guidance_scale``.

    Args:
        fake_steps: dmd2, dmd2_lora: updates of the fake score for each update of the generator.
        fake_learning_rate: dmd2, dmd2_lora: peak rate of the fake score's own optimizer; null is learning_rate.
        fake_rank: dmd2_lora: rank of the fake score's adapter; null is the student's, or 64 if all of it is tuned.
        fake_times: dmd2, dmd2_lora: distribution of t at which the fake score is fitted.
        query_times: distribution of t at which real and fake velocity are compared (dmd2, dmd2_lora, twinflow).
        generator_steps: dmd2, dmd2_lora: sampling steps that the generator is trained for, its inputs being its own
            samples noised again (backward simulation).
        order: twinflow, rcgm: N, how many jumps the target of the recursive consistency is made of; 0 is flow matching.
        step_size: twinflow, rcgm: the small step in time before those jumps.
        residual_clip: twinflow, rcgm: bound on every element of the residual, and of the velocity difference.
        metric: twinflow, rcgm: distance between velocities: barron (near to its root mean square) or l2 (its mean
            square).
        shares: twinflow, rcgm: parts of the batch for jumps from noise to data, short jumps, jumps of any length, and
            with twinflow the twin trajectory; empty is the same part for each.
        target_times: twinflow, rcgm: where jumps that are not from noise to data end: any time below t, or always zero.
        base_times: twinflow, rcgm: distribution of t in the parts that are not from noise to data.
        rectify_weight: twinflow: weight of the rectification.

    Raises:
        ValueError: a field out of range.
    """

    fake_steps: int = 5
    fake_learning_rate: float | None = None
    fake_rank: int | None = None
    fake_times: TimeDistribution = field(default_factory=TimeDistribution)
    query_times: TimeDistribution = field(default_factory=lambda: TimeDistribution("uniform", low=0.02, high=0.98))
    generator_steps: int = 1
    order: int = 2
    step_size: float = 0.01
    residual_clip: float = 1.0
    metric: Literal["barron", "l2"] = "barron"
    shares: tuple[float, ...] = ()
    target_times: Literal["any", "zero"] = "any"
    base_times: TimeDistribution = field(default_factory=TimeDistribution)
    rectify_weight: float = 0.5

    def __post_init__(self) -> None:
        least = {"fake_steps": 1, "generator_steps": 1, "order": 0}
        if self.fake_rank is not None:
            least["fake_rank"] = 1
        for name, bound in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < bound:
                raise ValueError(f"{name} must be a whole number, at least {bound}, got {value!r}")
        above = ["step_size", "residual_clip"] + ["fake_learning_rate"] * (self.fake_learning_rate is not None)
        for name in above:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not (math.isfinite(self.rectify_weight) and self.rectify_weight >= 0):
            raise ValueError(f"rectify_weight must be finite and at least 0, got {self.rectify_weight}")
        if not self.step_size < 1:
            raise ValueError(f"step_size must be below 1, the length of the path, got {self.step_size}")
        if self.metric not in ("barron", "l2"):
            raise ValueError(f'metric must be "barron" or "l2", got {self.metric!r}')
        if self.target_times not in ("any", "zero"):
            raise ValueError(f'target_times must be "any" or "zero", got {self.target_times!r}')
        if any(not (math.isfinite(share) and share >= 0) for share in self.shares):
            raise ValueError(f"shares must be finite and at least 0, got {list(self.shares)}")


class Peer(ABC):
    """A method that the training loop hands its steps to.

    Attributes:
        velocities: who is asked; the loop may replace ``velocities.generator`` by a wrapper of it.
        guidance_scale: of the teacher, in the convention of :class:`apex_fast.ApexObjective`; 1 is none.
        passes: of one step, a pass being that of a whole batch; parts of a batch count as parts. Where gradients are
            accumulated over several batches, each costs that.
        copies: the weights that are held.
        reads: fields of :class:`PeerSettings` that the method reads itself.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        velocities: Velocities,
        settings: PeerSettings,
        *,
        copies: Copies,
        guidance_scale: float = 1.0,
        checkpointing: bool = False,
    ) -> None:
        self.velocities, self.settings, self.copies = velocities, settings, copies
        self.guidance_scale, self.checkpointing = float(guidance_scale), checkpointing
        self._watch = FiniteWatch()

    # ---- what a method says

    @property
    @abstractmethod
    def passes(self) -> Passes:
        """Passes of one step."""

    @abstractmethod
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
        """The step itself; its losses as 0-d tensors without history, by the names that metrics have."""

    def step(
        self,
        x: Tensor,
        condition: Condition | Tensor,
        negative: Condition | Tensor | None = None,
        *,
        step: int,
        generator: torch.Generator | None = None,
        backward: Backward = Tensor.backward,
    ) -> dict[str, Tensor]:
        """One step: adds to the ``.grad`` of the generator's parameters, whose optimizer is the caller's, and updates
        what else the method trains.

        Args:
            x: data ``[B, ...]``.
            condition: of the B samples.
            negative: condition to guide away from, batch B or 1; needed where ``guidance_scale`` is not 1.
            step: index of this step in the run, from 0.
            generator: source of the random draws.
            backward: called with the scalar loss in place of ``loss.backward()``.

        Returns:
            Metrics: 0-d tensors on the device of x, by name.

        Raises:
            ValueError: guidance without a negative condition, or a batch that cannot be split as the method needs.
            NonFiniteLossError: a loss of the step before was not finite.
        """
        if self.guided and negative is None:
            raise ValueError(
                f"guidance_scale={self.guidance_scale} guides the teacher, which needs a negative condition; pass the "
                "condition of the empty prompt, or set guidance_scale=1"
            )
        found = self.losses(x, condition, negative, step=step, generator=generator, backward=backward)
        terms = {name.removeprefix("loss_"): value for name, value in found.items() if name.startswith("loss_")}
        self._watch.record(step, terms)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of the method beside the roles of the network."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`. ValueError for the state of another method."""
        if state:
            raise ValueError(f"{self.name} has no state of its own, and one with {sorted(state)} was saved")

    # ---- as the loop asks every objective

    def watch_gradient_norm(self, norm: Tensor, *, step: int) -> None:
        """Has the 0-d norm of the gradients of ``step`` looked at as the losses are."""
        self._watch.add(step, {GRADIENT_NORM: norm})

    def leave_finite_checks(self) -> None:
        """From now on what is not finite is no error here: the caller looks at it."""
        self._watch.enabled = False

    def check_finite(self) -> None:
        """Raises NonFiniteLossError if a loss or a gradient norm so far was not finite."""
        self._watch.check()

    # ---- questions to the network

    @property
    def guided(self) -> bool:
        """Whether the teacher is guided, which takes a second pass of it."""
        return self.guidance_scale != 1

    def ask(
        self, name: str, role: Velocity, x_t: Tensor, t: Tensor, condition: Condition | Tensor, like: Tensor
    ) -> Tensor:
        """``role(x_t, t, condition)`` in the dtype of ``x_t``; the network gets x_t in the dtype of ``like``, the data.
        Shape and kind of the answer are checked."""
        return check_velocity(role(x_t.to(like.dtype), t, condition), x_t, name).to(x_t.dtype)

    @torch.no_grad()
    def both(
        self,
        role: Velocity,
        x_t: Tensor,
        t: Tensor,
        condition: Condition | Tensor,
        negative: Condition | Tensor,
        like: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The velocities of ``role`` under the condition and under the negative one, from one stacked call."""
        conditions = concatenate([condition, expand_batch(negative, len(x_t), "negative")])
        stacked = self.ask("teacher", role, torch.cat([x_t, x_t]), torch.cat([t, t]), conditions, like)
        v_condition, v_negative = stacked.chunk(2)
        return v_condition, v_negative

    @torch.no_grad()
    def teacher(
        self,
        role: Velocity,
        x_t: Tensor,
        t: Tensor,
        condition: Condition | Tensor,
        negative: Condition | Tensor | None,
        like: Tensor,
    ) -> Tensor:
        """The velocity of ``role`` under classifier-free guidance, ``v_n + g (v_c - v_n)``, or as the family guides."""
        if not self.guided or negative is None:
            return self.ask("teacher", role, x_t, t, condition, like)
        v_condition, v_negative = self.both(role, x_t, t, condition, negative, like)
        if self.velocities.guide is not None:
            return self.velocities.guide(v_condition, v_negative, self.guidance_scale)
        return v_negative + self.guidance_scale * (v_condition - v_negative)


# ---- random draws


def noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise like ``x``, fp32 (fp64 for fp64 data)."""
    return normal(x.shape, x.device, state_dtype(x), generator)


def times(distribution: TimeDistribution, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """``[B]`` times for ``x`` ``[B, ...]``, fp32 (fp64 for fp64 data)."""
    return distribution.sample(len(x), x.device, generator).to(state_dtype(x))


# ---- counting


def whole_or_float(passes: float) -> int | float:
    """A count of passes as an int where it is one; parts of a batch give fractions."""
    return int(passes) if passes == int(passes) else round(passes, 6)
