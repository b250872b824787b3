"""One training step in its parts: what goes in, the network calls of the three roles, and the losses that come out.

The schedules put these parts in order; nothing here knows of steps, warm-up or trainers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops
from .condition import Condition, concatenate, expand_batch
from .draws import Draws
from .path import endpoint, per_sample
from .velocities import Velocities, Velocity
from .weighting import ClipMode, Weighting, clip_of_the_op


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """One step, validated: ``x`` ``[B, ...]`` in the state dtype and without history, the weights as of this step."""

    velocities: Velocities
    shift: nn.Module
    x: Tensor
    network_dtype: torch.dtype
    condition: Tensor | Condition
    negative_condition: Tensor | Condition | None
    draws: Draws
    fake_weight: float
    correction_weight: float = 0.0
    measure_correction: bool = False  # also while its weight is still 0
    supervised_weight: float = 0.0
    guidance_scale: float = 1.0
    clip: float | None = None
    clip_mode: ClipMode = "element"
    correction_weighting: Weighting = "constant"
    time_weights: Tensor | None = None  # [B], for "time"
    consistency_weight: float = 0.0
    consistency_gap: float = 0.0
    mix_regulariser_weight: float = 0.0
    paper_weight: float = 0.0  # of L_mix in the paper loss
    mix_weight: float = 0.0  # lambda inside L_mix
    detach_x_fake: bool = True

    @property
    def adversarial(self) -> bool:
        """Whether generated samples are needed at all."""
        return self.fake_weight > 0 or self.measure_correction

    @property
    def weighs_after_the_loss(self) -> bool:
        """Whether what a sample's correction weighs follows from the statistics of the loss."""
        return self.correction_weighting == "dmd" or (self.clip_mode == "norm" and self.clip is not None)


class Terms:
    """The losses ``[B]`` of a step without history, their weighted ``total``, and the ``stats`` ``[B, 7]`` of dv.

    ``total`` is differentiable until :meth:`settle`, which a schedule calls after each backward so that no dead graph
    is kept.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.fake: Tensor | None = None
        self.correction: Tensor | None = None
        self.supervised: Tensor | None = None
        self.consistency: Tensor | None = None
        self.mix: Tensor | None = None
        self.stats: Tensor | None = None

    def add(self, name: str, losses: Tensor, weight: float, *, summands: Tensor | None = None) -> Tensor:
        """Notes a term, adds ``weight * mean(losses)`` to the total unless weight is 0, and returns that summand.

        summands: ``[B]``, what is averaged in place of the losses, where samples weigh differently.
        """
        setattr(self, name, losses.detach())
        if weight == 0:
            return losses.new_zeros(())
        term = weight * (losses if summands is None else summands).mean()
        self.total = term if self.total is None else self.total + term
        return term

    def settle(self) -> None:
        """Drops the history of the total."""
        if self.total is not None:
            self.total = self.total.detach()


# ---- calling the roles


def check_velocity(result: object, x_t: Tensor, name: str) -> Tensor:
    """``result`` if it is a floating-point tensor of x_t's shape, on its device.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another shape or device.
    """
    if not isinstance(result, Tensor) or not result.is_floating_point():
        kind = f"a tensor of {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
        raise TypeError(
            f"the {name} velocity must return a floating-point Tensor, got {kind}; unwrap the network's output in "
            "the callable, such as lambda x_t, t, c: model(x_t, t, c).sample"
        )
    if result.shape != x_t.shape or result.device != x_t.device:
        raise ValueError(
            f"the {name} velocity must return the shape and device of x_t, {list(x_t.shape)} on {x_t.device}, "
            f"got {list(result.shape)} on {result.device}; drop extra channels, such as a predicted variance, "
            "in the callable"
        )
    return result


def call(inputs: StepInputs, name: str, velocity: Velocity, x_t: Tensor, t: Tensor, condition) -> Tensor:
    """One network call, its input in the dtype of the caller's x, its result checked."""
    return check_velocity(velocity(x_t.to(inputs.network_dtype), t, condition), x_t, name)


def trained(velocity: Tensor, name: str) -> Tensor:
    """``velocity`` if a loss on it can train something (or no gradient is wanted); ValueError if not."""
    if torch.is_grad_enabled() and not velocity.requires_grad:
        raise ValueError(
            f"the {name} velocity carries no gradient, so its term cannot train anything: its parameters are frozen, "
            "or it was computed under no_grad; unfreeze it, or set the weight of its term to 0"
        )
    return velocity


def start(inputs: StepInputs) -> Tensor:
    """x_s = s z + (1 - s) x, where the generator starts (Eq. 1): z itself for one step."""
    return ops.interpolate(inputs.x, inputs.draws.z, inputs.draws.s)


def generate(inputs: StepInputs, x_s: Tensor) -> Tensor:
    """F(x_s, s, c)."""
    return call(inputs, "generator", inputs.velocities.generator, x_s, inputs.draws.s, inputs.condition)


def query(inputs: StepInputs, velocity: Tensor, x_s: Tensor) -> tuple[Tensor, Tensor]:
    """x_fake_t, where the other branches are asked, and the target z' - x_fake (Eq. 11 and 12)."""
    draws = inputs.draws
    return ops.renoise(velocity, x_s, draws.s, draws.z_query, draws.t_query)


def shifted(inputs: StepInputs, x_t: Tensor, t: Tensor) -> Tensor:
    """F(x_t, t, c_fake)."""
    role = inputs.velocities.generator if inputs.velocities.shifted is None else inputs.velocities.shifted
    return call(inputs, "shifted", role, x_t, t, inputs.shift(inputs.condition))


@torch.no_grad()
def real(inputs: StepInputs, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
    """Velocity of the data at x_t and, under guidance, its unconditional half; one stacked call.

    Where the roles bring a ``guide`` of their own, the guided velocity comes back alone.
    """
    role = inputs.velocities.generator if inputs.velocities.real is None else inputs.velocities.real
    if inputs.negative_condition is None:
        return call(inputs, "real", role, x_t, t, inputs.condition), None
    negative = expand_batch(inputs.negative_condition, x_t.shape[0], "negative_condition")
    both = concatenate([inputs.condition, negative])
    v_real, v_uncond = call(inputs, "real", role, torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    if inputs.velocities.guide is None:
        return v_real, v_uncond
    guided = inputs.velocities.guide(v_real, v_uncond, inputs.guidance_scale)
    return check_velocity(guided, x_t, "guided"), None


# ---- the terms on data


@dataclass(frozen=True)
class DataTerm:
    """A loss on the generator's velocity at points that are made from data.

    Attributes:
        x_t, t: where the generator is asked, with gradient, under the condition.
        loss: its velocity there to the loss ``[B]``.
    """

    x_t: Tensor
    t: Tensor
    loss: Callable[[Tensor], Tensor]

    def losses(self, inputs: StepInputs) -> Tensor:
        """``[B]``, by a call of its own."""
        velocity = call(inputs, "generator", inputs.velocities.generator, self.x_t, self.t, inputs.condition)
        return self.loss(trained(velocity, "generator"))


def data_terms(inputs: StepInputs) -> list[tuple[str, float, Callable[[StepInputs], DataTerm]]]:
    """Name, weight and maker of every term on data that has weight; making one may call the network, without
    gradient."""
    terms = [
        ("supervised", inputs.supervised_weight, supervised),
        ("consistency", inputs.consistency_weight, consistency),
        ("mix", inputs.mix_regulariser_weight, mix),
    ]
    return [term for term in terms if term[1] > 0]


def supervised(inputs: StepInputs) -> DataTerm:
    """Flow matching (Eq. 20 without its weight t(1 - t))."""
    z, t = inputs.draws.z_sup, inputs.draws.t_sup
    assert z is not None and t is not None  # the objective checks the draws against the weights
    return DataTerm(ops.interpolate(inputs.x, z, t), t, lambda velocity: ops.mixed_velocity_loss(velocity, inputs.x, z))


def consistency(inputs: StepInputs) -> DataTerm:
    """The endpoint from x_s is the endpoint from a later point r = max(s - gap, 0) of the real branch's path.

    Consistency distillation (arXiv 2303.01469, Eq. 7) with the real branch, guided as everywhere, as the solver: one
    Euler step x_r = x_s - (s - r) v_real(x_s, s), and the stopped endpoint e_r = x_r - r sg(F(x_r, r, c)). As a target
    for the velocity that is (x_s - e_r) / s = ((s - r) v_real + r F(x_r, r)) / s, which is the first-order recursion of
    RCGM; the squared distance of the endpoints is s^2 times that of the velocities (Prop. 3). Where r = 0 the target is
    v_real itself.
    """
    z, s = inputs.draws.z_consistency, inputs.draws.t_consistency
    assert z is not None and s is not None
    with torch.no_grad():
        x_s = ops.interpolate(inputs.x, z, s)
        r = (s - inputs.consistency_gap).clamp_min(0)
        v_real, v_uncond = real(inputs, x_s, s)
        scale = 1.0 if v_uncond is None else inputs.guidance_scale
        x_r = ops.sampler_step(x_s, v_real, s, r, v_uncond=v_uncond, guidance_scale=scale)
        del v_real, v_uncond
        later = call(inputs, "generator", inputs.velocities.generator, x_r, r, inputs.condition)
        target = (x_s - endpoint(later.to(x_r.dtype), x_r, r)) / per_sample(s, x_s)
    # lambda = 1: the mixed target is the given velocity alone.
    return DataTerm(
        x_s, s, lambda velocity: ops.mixed_velocity_loss(velocity, inputs.x, z, v_fake=target, mix_weight=1.0)
    )


def mix(inputs: StepInputs) -> DataTerm:
    """L_mix with its weight t^2 / w(t) = t (1 - t) (Eq. 23 and 24, Prop. 2)."""
    z, t = inputs.draws.z_mix, inputs.draws.t_mix
    assert z is not None and t is not None
    x_t, v_fake = ops.interpolate(inputs.x, z, t), None
    if inputs.mix_weight > 0:
        with torch.no_grad():
            v_fake = shifted(inputs, x_t, t)

    def loss(velocity: Tensor) -> Tensor:
        mixed = ops.mixed_velocity_loss(velocity, inputs.x, z, v_fake=v_fake, mix_weight=inputs.mix_weight)
        return t * (1 - t) * mixed

    return DataTerm(x_t, t, loss)


def loss_arguments(inputs: StepInputs, v_shift: Tensor, reals: tuple[Tensor, Tensor | None] | None):
    """``v_real`` and the options of the loss op; without a real pass v_shift stands in, whose dv is zero."""
    v_real, v_uncond = (v_shift.detach(), None) if reals is None else reals
    scale = 1.0 if v_uncond is None else inputs.guidance_scale
    clip = clip_of_the_op(inputs.clip, inputs.clip_mode)
    return v_real, {"v_uncond": v_uncond, "guidance_scale": scale, "clip": clip}
