"""One training step in its parts: what goes in, the network calls of the three roles, and the losses that come out.

The schedules put these parts in order; nothing here knows of steps, warm-up or trainers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops
from .condition import Condition, concatenate, expand_batch
from .draws import Draws
from .velocities import Velocities, Velocity


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
    paper_weight: float = 0.0  # of L_mix
    mix_weight: float = 0.0  # lambda inside L_mix
    detach_x_fake: bool = True

    @property
    def adversarial(self) -> bool:
        """Whether generated samples are needed at all."""
        return self.fake_weight > 0 or self.measure_correction


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
        self.mix: Tensor | None = None
        self.stats: Tensor | None = None

    def add(self, name: str, losses: Tensor, weight: float) -> Tensor:
        """Notes a term, adds ``weight * mean(losses)`` to the total unless weight is 0, and returns that summand."""
        setattr(self, name, losses.detach())
        if weight == 0:
            return losses.new_zeros(())
        term = weight * losses.mean()
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
def real(inputs: StepInputs, x_fake_t: Tensor) -> tuple[Tensor, Tensor | None]:
    """Velocity of the data at the generated points and, under guidance, its unconditional half; one stacked call.

    Where the roles bring a ``guide`` of their own, the guided velocity comes back alone.
    """
    role = inputs.velocities.generator if inputs.velocities.real is None else inputs.velocities.real
    t = inputs.draws.t_query
    if inputs.negative_condition is None:
        return call(inputs, "real", role, x_fake_t, t, inputs.condition), None
    negative = expand_batch(inputs.negative_condition, x_fake_t.shape[0], "negative_condition")
    both = concatenate([inputs.condition, negative])
    v_real, v_uncond = call(inputs, "real", role, torch.cat([x_fake_t, x_fake_t]), torch.cat([t, t]), both).chunk(2)
    if inputs.velocities.guide is None:
        return v_real, v_uncond
    guided = inputs.velocities.guide(v_real, v_uncond, inputs.guidance_scale)
    return check_velocity(guided, x_fake_t, "guided"), None


def supervised_start(inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, z and t of the flow-matching term on data."""
    z, t = inputs.draws.z_sup, inputs.draws.t_sup
    assert z is not None and t is not None  # the objective checks the draws against the weights
    return ops.interpolate(inputs.x, z, t), z, t


def supervised_loss(inputs: StepInputs) -> Tensor:
    """Flow matching on data, ``[B]`` (Eq. 20 without its weight t(1 - t))."""
    x_t, z, t = supervised_start(inputs)
    velocity = call(inputs, "generator", inputs.velocities.generator, x_t, t, inputs.condition)
    return ops.mixed_velocity_loss(trained(velocity, "generator"), inputs.x, z)


def loss_arguments(inputs: StepInputs, v_shift: Tensor, reals: tuple[Tensor, Tensor | None] | None):
    """``v_real`` and the options of the loss op; without a real pass v_shift stands in, whose dv is zero."""
    v_real, v_uncond = (v_shift.detach(), None) if reals is None else reals
    scale = 1.0 if v_uncond is None else inputs.guidance_scale
    return v_real, {"v_uncond": v_uncond, "guidance_scale": scale, "clip": inputs.clip}
