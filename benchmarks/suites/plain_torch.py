"""The ops as plain torch formulas: what providers ``eager`` and ``compile`` run.

Written as a user would who knows torch well, with the forms that were fastest of those that fit on a line: ``lerp`` and
``addcmul`` where the textbook formula has three temporaries, ``mse_loss`` (its difference and square are one kernel,
its gradient too), ``vector_norm`` for sums of squares, no result computed twice. Arithmetic on halves is in fp32, as
in the ops, through ``.float()``, which is no copy for fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def _per_sample(times: Tensor, like: Tensor) -> Tensor:
    return times.view(-1, *[1] * (like.dim() - 1))


def _mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    return functional.mse_loss(a, b, reduction="none").flatten(1).mean(1)


def _sum_of_squares(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values.flatten(1), dim=1).square()


def condition_shift(condition: Tensor, scale: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    if scale.dim() == 0:
        shifted = scale * condition + bias
    else:
        shifted = torch.addcmul(bias, condition.float(), scale).to(condition.dtype)
    return shifted if mask is None else torch.where(mask.unsqueeze(-1), shifted, condition)


def interpolate(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return torch.lerp(x.float(), z.float(), _per_sample(t, x)).to(x.dtype)


def renoise(velocity: Tensor, x_s: Tensor, s: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    noise = z.float()
    x_fake = torch.addcmul(x_s.float(), velocity.float(), _per_sample(s, x_s), value=-1)
    x_fake_t = torch.lerp(x_fake, noise, _per_sample(t, x_s))
    return x_fake_t.to(x_s.dtype), (noise - x_fake).to(x_s.dtype)


def shifted_velocity_losses(
    v_gen: Tensor,
    v_shift: Tensor,
    v_real: Tensor,
    target: Tensor,
    v_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The two losses alone, for who does without the statistics."""
    generated, shift, guided = v_gen.float(), v_shift.float(), v_real.float()
    if v_uncond is not None:
        guided = torch.lerp(v_uncond.float(), guided, guidance_scale)
    with torch.no_grad():
        corrected = generated - (shift - guided).clamp(-clip, clip)
    return _mean_squared_error(shift, target.float()), _mean_squared_error(generated, corrected)


def shifted_velocity_loss(
    v_gen: Tensor,
    v_shift: Tensor,
    v_real: Tensor,
    target: Tensor,
    v_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    clip: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses and the seven statistics, as the op returns them."""
    generated, shift, real, goal = v_gen.float(), v_shift.float(), v_real.float(), target.float()
    with torch.no_grad():
        guided = real if v_uncond is None else torch.lerp(v_uncond.float(), real, guidance_scale)
        dv = shift - guided
        clipped = dv.clamp(-clip, clip)
        corrected = generated - clipped
    fake = _mean_squared_error(shift, goal)
    correction = _mean_squared_error(generated, corrected)
    with torch.no_grad():
        columns = [
            _sum_of_squares(dv),
            _sum_of_squares(clipped),
            (dv != clipped).flatten(1).sum(1) / dv[0].numel(),
            (shift * real).flatten(1).sum(1),
            _sum_of_squares(shift),
            _sum_of_squares(real),
            functional.l1_loss(guided, goal, reduction="none").flatten(1).mean(1),
        ]
        stats = torch.stack(columns, 1)
    return fake, correction, stats


def shifted_velocity_loss_with_gradients(
    v_shift: Tensor,
    v_real: Tensor,
    target: Tensor,
    weight_fake: Tensor,
    weight_correction: Tensor,
    v_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    clip: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses and statistics as above, and the two gradients written down instead of left to autograd."""
    losses = shifted_velocity_loss(v_shift, v_shift, v_real, target, v_uncond, guidance_scale, clip)
    shift, guided = v_shift.float(), v_real.float()
    if v_uncond is not None:
        guided = torch.lerp(v_uncond.float(), guided, guidance_scale)
    factor = 2 / v_shift[0].numel()
    grad_gen = (shift - guided).clamp_(-clip, clip).mul_(_per_sample(weight_correction * factor, shift))
    grad_shift = (shift - target.float()).mul_(_per_sample(weight_fake * factor, shift))
    return *losses, grad_gen.to(v_shift.dtype), grad_shift.to(v_shift.dtype)


def mixed_velocity_loss(
    velocity: Tensor, x: Tensor, z: Tensor, v_fake: Tensor | None = None, mix_weight: float = 0.0
) -> Tensor:
    with torch.no_grad():
        target = z.float() - x.float()
        if v_fake is not None:
            target = torch.lerp(target, v_fake.float(), mix_weight)
    return _mean_squared_error(velocity.float(), target)


def sampler_step(
    x: Tensor,
    velocity: Tensor,
    t: Tensor,
    t_next: Tensor,
    noise: Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    stochasticity: float = 0.0,
) -> Tensor:
    now, following = _per_sample(t, x), _per_sample(t_next, x)
    if v_uncond is not None:
        velocity = torch.lerp(v_uncond, velocity, guidance_scale)
    if noise is None:
        return torch.addcmul(x.float(), velocity.float(), following - now).to(x.dtype)
    # x' = (1 - t') (x - t v) + t' (sqrt(1 - eta) (x + (1 - t) v) + sqrt(eta) noise), coefficients collected
    keep = (1 - stochasticity) ** 0.5
    step = (1 - following + following * keep) * x.float()
    step = torch.addcmul(step, velocity.float(), following * keep * (1 - now) - (1 - following) * now)
    return torch.addcmul(step, noise.float(), following * stochasticity**0.5).to(x.dtype)


def condition_shift_rms_norm(
    condition: Tensor, scale: Tensor, bias: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    values = condition.float()
    shifted = torch.addcmul(bias, values, scale) if scale.dim() else scale * values + bias
    norms = [functional.rms_norm(v, v.shape[-1:], weight.float(), eps) for v in (values, shifted)]
    return norms[0].to(condition.dtype), norms[1].to(condition.dtype)


def projected_condition_shift(
    projected: Tensor, scale: Tensor, bias: Tensor, row_sums: Tensor, linear_bias: Tensor
) -> tuple[Tensor, Tensor]:
    values = projected.float()
    shifted = torch.addcmul(torch.addcmul(linear_bias.float(), row_sums, bias), values, scale)
    return (values + linear_bias.float()).to(projected.dtype), shifted.to(projected.dtype)


def modulated_layer_norm(hidden: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    normed = functional.layer_norm(hidden.float(), hidden.shape[-1:], eps=eps)
    rows = (hidden.shape[0], *[1] * (hidden.dim() - 2), hidden.shape[-1])
    return torch.addcmul(shift.float().view(rows), normed, 1 + scale.float().view(rows)).to(hidden.dtype)
