"""Sampling: from noise to data in one step or many, by a pure function over (velocity, noise, condition)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import ops
from .condition import Condition, concatenate, expand_batch
from .draws import normal, state_dtype
from .roles import check_velocity
from .velocities import Guide, Velocity

SamplerCallback = Callable[[int, float, Tensor, Tensor], object]
"""``callback(index, t, x, x_hat)`` after step ``index``: x ``[B, ...]`` is the state at its new time t, x_hat the clean
sample that the step's velocity implied."""


@dataclass(frozen=True)
class SamplerInfo:
    """What a call cost.

    Attributes:
        steps: on the time grid.
        network_evaluations: per sample; guidance counts twice, and so does every step of Heun but the last.
    """

    steps: int
    network_evaluations: int


def time_grid(num_inference_steps: int, times: str = "uniform") -> Tensor:
    """A grid of ``num_inference_steps + 1`` times from 1 (noise) down to 0 (data), fp64 on the CPU.

    Args:
        num_inference_steps: N, at least 1.
        times: ``"uniform"``: u = 1 - i / N. ``"shifted:3"``: ``a u / (1 + (a - 1) u)`` with a = 3 (any a > 0; above 1
            takes more steps near the noise, as flow models at high resolution are sampled; ``"shifted"`` alone is 3).
            ``"power:2"``: ``u ** 2`` (any exponent > 0; above 1 takes more steps near the data; ``"power"`` alone is
            2).

    Raises:
        ValueError: an unknown preset or a value out of range.
    """
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be a whole number, at least 1, got {num_inference_steps!r}")
    name, _, text = times.partition(":")
    defaults = {"uniform": None, "shifted": 3.0, "power": 2.0}
    if name not in defaults or (name == "uniform" and text):
        raise ValueError(
            f'times must be "uniform", "shifted", "shifted:A", "power" or "power:P", or a tensor, got {times!r}'
        )
    u = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)
    if name == "uniform":
        return u
    try:
        value = float(text) if text else defaults[name]
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):  # type: ignore[operator]
        raise ValueError(f'times: the value after "{name}:" must be a number above 0, got {text!r}')
    return value * u / (1 + (value - 1) * u) if name == "shifted" else u**value


def sample(
    velocity: Velocity,
    noise: Tensor,
    condition: Tensor | Condition,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
    negative_condition: Tensor | Condition | None = None,
    guide: Guide | None = None,
    generator: torch.Generator | None = None,
    stochasticity: float = 0.0,
    times: str | Tensor | None = None,
    method: Literal["euler", "heun"] = "euler",
    callback: SamplerCallback | None = None,
    return_info: bool = False,
    with_grad: bool = False,
) -> Tensor | tuple[Tensor, SamplerInfo]:
    """Turns noise into samples.

    A step from t to t' goes through the two ends that a velocity implies, x_hat = x - t v and z_hat = x + (1 - t) v:
    ``x' = (1 - t') x_hat + t' (sqrt(1 - eta) z_hat + sqrt(eta) noise)``. With stochasticity eta = 0 that is Euler,
    which suits many steps; with eta = 1 the state is noised anew, which suits the few steps of a one-step generator.

    Args:
        velocity: ``velocity(x_t, t, condition)``; it gets x_t in the dtype of ``noise`` and t ``[B]`` in fp32 (fp64 for
            fp64 noise). It is used as it is: a module with dropout should be in eval mode.
        noise: ``[B, ...]``, standard normal: the state at t = 1. It is not modified.
        condition: of the B samples.
        num_inference_steps: number of steps N; None is 1, or what a tensor ``times`` implies.
        guidance_scale: classifier-free guidance ``v_uncond + g (v - v_uncond)``; other than 1 it needs
            ``negative_condition``. Both halves are one stacked call.
        negative_condition: batch B, or 1 to be repeated.
        guide: ``guide(v, v_uncond, guidance_scale)`` in place of that line, for model families whose pipelines combine
            the two in another way (:meth:`apex_fast.Backbone.guide`).
        generator: source of the noise that ``stochasticity`` adds, on any device; None takes the global one of the
            noise's device.
        stochasticity: eta in [0, 1].
        times: the grid: a preset of :func:`time_grid`, or a tensor of N + 1 times falling from 1 to 0. None is
            ``"uniform"``.
        method: ``"euler"``, or ``"heun"``: second order with two evaluations a step, for ``stochasticity=0``. Its last
            step, to t = 0, is an Euler step: that needs no velocity at t = 0, where networks are not trained, and the
            order stays two.
        callback: called after every step with (index, t, x, x_hat); x is the state at the new time t and must not be
            modified.
        return_info: also return a :class:`SamplerInfo`.
        with_grad: keep autograd history, to differentiate through the sampler; otherwise it runs under ``no_grad``.

    Returns:
        Samples ``[B, ...]`` in fp32 (fp64 for fp64 noise), whatever the network's dtype; with ``return_info`` a pair
        with the info.

    Raises:
        TypeError, ValueError: arguments that do not fit, or a velocity of another shape than its input.
    """
    if not callable(velocity):
        raise TypeError(
            f"velocity must be a callable velocity(x_t, t, condition), got {type(velocity).__name__}; "
            "of Velocities, pass the role, such as velocities.generator"
        )
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.dim() < 2:
        got = f"{noise.dtype} {list(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"noise must be a floating-point tensor [B, ...], got {got}")
    batch = noise.shape[0]
    condition = expand_batch(condition, batch)
    if not 0 <= stochasticity <= 1:
        raise ValueError(
            f"stochasticity must lie in [0, 1] (0 = Euler, 1 = new noise in every step), got {stochasticity}"
        )
    if method not in ("euler", "heun"):
        raise ValueError(f'method must be "euler" or "heun", got {method!r}')
    if method == "heun" and stochasticity > 0:
        raise ValueError(
            f'method="heun" is deterministic: stochasticity must be 0, got {stochasticity}; use method="euler"'
        )
    guided = guidance_scale != 1
    if guided and negative_condition is None:
        raise ValueError(
            f"guidance_scale={guidance_scale} needs negative_condition=, such as the condition of the empty prompt; "
            "1 needs none"
        )
    both = concatenate([condition, expand_batch(negative_condition, batch, "negative_condition")]) if guided else None

    dtype = state_dtype(noise)
    grid = _grid(num_inference_steps, times)
    on_device = grid.to(noise.device, dtype)
    evaluations = 0

    def evaluate(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        nonlocal evaluations
        x = x.to(noise.dtype)
        if both is None:
            evaluations += 1
            return check_velocity(velocity(x, t, condition), x, "sampled"), None
        evaluations += 2
        x, t = torch.cat([x, x]), torch.cat([t, t])
        v, v_uncond = check_velocity(velocity(x, t, both), x, "sampled").chunk(2)
        if guide is not None:
            return check_velocity(guide(v, v_uncond, float(guidance_scale)), v, "guided"), None
        return v, v_uncond

    def step(
        x: Tensor, velocities: tuple[Tensor, Tensor | None], t: Tensor, t_next: Tensor, fresh: Tensor | None = None
    ):
        v, v_uncond = velocities
        return ops.sampler_step(
            x,
            v,
            t,
            t_next,
            noise=fresh,
            v_uncond=v_uncond,
            # a guide of the family's has combined the two already
            guidance_scale=float(guidance_scale) if v_uncond is not None else 1.0,
            # without noise to add, at t' = 0, every stochasticity gives the same step
            stochasticity=float(stochasticity) if fresh is not None else 0.0,
        )

    with nullcontext() if with_grad else torch.no_grad():
        x = noise.to(dtype)
        steps = len(grid) - 1
        for i in range(steps):
            t, t_next = on_device[i].repeat(batch), on_device[i + 1].repeat(batch)
            last = i == steps - 1
            velocities = evaluate(x, t)
            x_hat = step(x, velocities, t, torch.zeros_like(t)) if callback is not None else None
            if method == "heun" and not last:
                # x + h/2 v is an Euler step to the middle; from there the same with the velocity found at the far end.
                middle = (t + t_next) / 2
                corrected = evaluate(step(x, velocities, t, t_next), t_next)
                x = step(step(x, velocities, t, middle), corrected, middle, t_next)
            else:
                renew = stochasticity > 0 and not last
                x = step(x, velocities, t, t_next, normal(x.shape, x.device, dtype, generator) if renew else None)
            if callback is not None:
                callback(i, grid[i + 1].item(), x, x_hat)  # type: ignore[arg-type]
    return (x, SamplerInfo(steps, evaluations)) if return_info else x


def _grid(num_inference_steps: int | None, times: str | Tensor | None) -> Tensor:
    if not isinstance(times, Tensor):
        return time_grid(
            1 if num_inference_steps is None else num_inference_steps, "uniform" if times is None else times
        )
    grid = times.detach().to("cpu", torch.float64)
    if grid.dim() != 1 or len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or not bool((grid.diff() < 0).all()):
        raise ValueError(
            "times must be a 1-d tensor falling strictly from 1 (noise) to 0 (data), both included, "
            f"got {[round(v, 4) for v in grid.flatten().tolist()[:12]]} of shape {list(times.shape)}"
        )
    if num_inference_steps is not None and num_inference_steps != len(grid) - 1:
        raise ValueError(
            f"times has {len(grid)} values, which makes {len(grid) - 1} steps, but num_inference_steps="
            f"{num_inference_steps}; leave num_inference_steps out"
        )
    return grid
