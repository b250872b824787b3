"""Plain torch twins of every op: the truth that the kernels are tested against, and what runs where no kernel was
built.

A forward twin is written as the formula stands in the paper, with the stop-gradients where the op has them, so that
autograd through a float64 twin is the reference for every gradient. The ``*_backward`` twins spell the same
derivatives out; they serve a device without kernels, where the op's own autograd formula calls them.

All of them compute in fp32 (fp64 as soon as one input is fp64) and round once on return, as the kernels do, but they
do make the upcast copies and temporaries that the kernels avoid.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any of the tensors is fp64, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _per_sample(times: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    # Coefficients such as 1 - t are formed in double before they are rounded: 1 - 0.999 must not lose digits to fp32.
    return times.to(torch.float64).reshape(-1, *[1] * (like.dim() - 1))


def _mean(values: Tensor) -> Tensor:
    # An empty sample has loss 0, not NaN: a defined value for a defined (empty) problem.
    return _sum(values) / max(values[0].numel() if values.shape[0] else 1, 1)


def _sum(values: Tensor) -> Tensor:
    # Dimension by dimension: a sum that stays differentiable where a sample is empty, which reshape(B, -1) refuses.
    return values.sum(tuple(range(1, values.dim()))) if values.dim() > 1 else values


def _rounded(values: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``values`` in the dtype and the memory layout of ``like``; differentiable."""
    return torch.empty_like(like, dtype=dtype, requires_grad=False).copy_(values)


def _nothing(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(0, dtype=dtype or like.dtype, device=like.device)


# ---- condition_shift


def condition_shift(condition: Tensor, scale: Tensor, bias: Tensor, *, mask: Tensor | None = None) -> Tensor:
    dtype = compute_dtype(condition)
    shifted = condition.to(dtype) * scale.to(dtype) + bias.to(dtype)
    if mask is not None:
        shifted = torch.where(mask.ne(0).unsqueeze(-1), shifted, condition.to(dtype))
    return _rounded(shifted, condition)


def condition_shift_backward(
    grad: Tensor,
    condition: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    mask: Tensor | None = None,
    output_mask: tuple[bool, bool, bool] | list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(condition)
    g = grad.to(dtype)
    keep = torch.ones_like(g) if mask is None else mask.ne(0).unsqueeze(-1).to(dtype).expand_as(g)
    grad_condition, grad_scale, grad_bias = _nothing(condition), _nothing(scale), _nothing(bias)
    if output_mask[0]:
        # where, not arithmetic: a masked token's gradient passes untouched even if scale is inf or NaN
        grad_condition = _rounded(torch.where(keep.bool(), g * scale.to(dtype), g), condition)
    # Sums over tokens in fp64: one rounding at the end.
    wide = torch.float64
    if output_mask[1]:
        product = torch.where(keep.bool(), g.to(wide) * condition.to(wide), 0.0)
        grad_scale = product.sum_to_size(scale.shape).to(scale.dtype).contiguous()
    if output_mask[2]:
        grad_bias = torch.where(keep.bool(), g.to(wide), 0.0).sum_to_size(bias.shape).to(bias.dtype).contiguous()
    return grad_condition, grad_scale, grad_bias


# ---- interpolate


def interpolate(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    dtype = compute_dtype(x, z)
    time = _per_sample(t, x, dtype)
    result = time.to(dtype) * z.to(dtype) + (1 - time).to(dtype) * x.to(dtype)
    return _rounded(result, x)


def interpolate_backward(
    grad: Tensor, t: Tensor, *, output_mask: tuple[bool, bool] | list[bool]
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(grad)
    time = _per_sample(t, grad, dtype)
    grad_x, grad_z = _nothing(grad), _nothing(grad)
    if output_mask[0]:
        grad_x = _rounded((1 - time).to(dtype) * grad.to(dtype), grad)
    if output_mask[1]:
        grad_z = _rounded(time.to(dtype) * grad.to(dtype), grad)
    return grad_x, grad_z


# ---- renoise


def renoise(velocity: Tensor, x_s: Tensor, s: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(velocity, x_s, z)
    start, time = _per_sample(s, x_s, dtype), _per_sample(t, x_s, dtype)
    x_fake = x_s.to(dtype) - start.to(dtype) * velocity.to(dtype)
    x_fake_t = time.to(dtype) * z.to(dtype) + (1 - time).to(dtype) * x_fake
    target = z.to(dtype) - x_fake
    return _rounded(x_fake_t, x_s), _rounded(target, x_s)


def renoise_backward(
    grad_x_fake_t: Tensor, grad_target: Tensor, s: Tensor, t: Tensor, *, velocity_dtype: torch.dtype
) -> Tensor:
    dtype = torch.float64 if velocity_dtype == torch.float64 else compute_dtype(grad_x_fake_t, grad_target)
    start, time = _per_sample(s, grad_target, dtype), _per_sample(t, grad_target, dtype)
    first = (-start * (1 - time)).to(dtype) * grad_x_fake_t.to(dtype)
    return _rounded(first + start.to(dtype) * grad_target.to(dtype), grad_x_fake_t, velocity_dtype)


# ---- shifted_velocity_loss


def _guided(v_real: Tensor, v_uncond: Tensor | None, guidance_scale: float, dtype: torch.dtype) -> Tensor:
    if v_uncond is None:
        return v_real.to(dtype)
    unconditional = v_uncond.to(dtype)
    return unconditional + guidance_scale * (v_real.to(dtype) - unconditional)


def _clamp(dv: Tensor, clip: float | None) -> Tensor:
    return dv if clip is None else dv.clamp(-clip, clip)


def shifted_velocity_loss(
    v_gen: Tensor | None,
    v_shift: Tensor,
    v_real: Tensor,
    target: Tensor,
    *,
    v_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    clip: float | None = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(v_gen, v_shift, v_real, target, v_uncond)
    shift = v_shift.to(dtype)
    with torch.no_grad():
        guided = _guided(v_real, v_uncond, guidance_scale, dtype)
        dv = shift - guided
        clipped = _clamp(dv, clip)
        over = torch.zeros_like(dv) if clip is None else (dv.abs() > clip).to(dtype)
        real = v_real.to(dtype)
        columns = [
            _sum(dv * dv),
            _sum(clipped * clipped),
            _mean(over),
            _sum(shift * real),
            _sum(shift * shift),
            _sum(real * real),
            _mean((guided - target.to(dtype)).abs()),
        ]
        stats = torch.stack(columns, 1)
    fake = _mean((shift - target.to(dtype)) ** 2)
    if v_gen is not None and v_gen.requires_grad and torch.is_grad_enabled():
        # mean |F - sg(F - clamp dv)|^2: its value does not depend on F, its gradient is 2 clamp(dv) / n.
        generated = v_gen.to(dtype)
        correction = _mean((generated - generated.detach() + clipped) ** 2)
    else:
        correction = _mean(clipped * clipped)
    return fake, correction, stats


def shifted_velocity_loss_backward(
    grad_fake: Tensor,
    grad_correction: Tensor,
    v_shift: Tensor,
    v_real: Tensor,
    target: Tensor,
    *,
    v_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    clip: float | None = 1.0,
    output_mask: tuple[bool, bool, bool] | list[bool] = (True, True, False),
    grad_gen_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = grad_gen_dtype == torch.float64
    dtype = torch.float64 if wide else compute_dtype(v_shift, v_real, target, v_uncond)
    per_sample = max(v_shift[0].numel() if v_shift.shape[0] else 1, 1)
    shift = v_shift.to(dtype)
    grad_gen, grad_shift, grad_target = _nothing(v_shift, grad_gen_dtype), _nothing(v_shift), _nothing(target)
    if output_mask[0]:
        clipped = _clamp(shift - _guided(v_real, v_uncond, guidance_scale, dtype), clip)
        weight = _per_sample(grad_correction, v_shift, dtype) * 2 / per_sample
        grad_gen = _rounded(weight.to(dtype) * clipped, v_shift, grad_gen_dtype or v_shift.dtype)
    if output_mask[1] or output_mask[2]:
        weight = _per_sample(grad_fake, v_shift, dtype) * 2 / per_sample
        gradient = weight.to(dtype) * (shift - target.to(dtype))
        if output_mask[1]:
            grad_shift = _rounded(gradient, v_shift)
        if output_mask[2]:
            grad_target = _rounded(-gradient, v_shift, target.dtype)
    return grad_gen, grad_shift, grad_target


def shifted_velocity_loss_with_gradients(
    weight_fake: Tensor,
    weight_correction: Tensor,
    v_shift: Tensor,
    v_real: Tensor,
    target: Tensor,
    *,
    v_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    clip: float | None = 1.0,
    output_mask: tuple[bool, bool] | list[bool] = (True, True),
    grad_gen_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    settings = {"v_uncond": v_uncond, "guidance_scale": guidance_scale, "clip": clip}
    losses = shifted_velocity_loss(None, v_shift, v_real, target, **settings)
    grad_gen, grad_shift, _ = shifted_velocity_loss_backward(
        weight_fake,
        weight_correction,
        v_shift,
        v_real,
        target,
        **settings,
        output_mask=(*output_mask, False),
        grad_gen_dtype=grad_gen_dtype,
    )
    return *losses, grad_gen, grad_shift


# ---- mixed_velocity_loss


def mixed_velocity_loss(
    velocity: Tensor, x: Tensor, z: Tensor, *, v_fake: Tensor | None = None, mix_weight: float = 0.0
) -> Tensor:
    dtype = compute_dtype(velocity, x, z, v_fake)
    target = (1 - mix_weight) * (z.to(dtype) - x.to(dtype))
    if v_fake is not None:
        target = target + mix_weight * v_fake.detach().to(dtype)
    return _mean((velocity.to(dtype) - target) ** 2)


def mixed_velocity_loss_backward(
    grad: Tensor,
    velocity: Tensor,
    x: Tensor,
    z: Tensor,
    *,
    v_fake: Tensor | None = None,
    mix_weight: float = 0.0,
    output_mask: tuple[bool, bool, bool] | list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(velocity, x, z, v_fake)
    per_sample = max(velocity[0].numel() if velocity.shape[0] else 1, 1)
    residual = velocity.to(dtype) - (1 - mix_weight) * (z.to(dtype) - x.to(dtype))
    if v_fake is not None:
        residual = residual - mix_weight * v_fake.to(dtype)
    weight = _per_sample(grad, velocity, dtype) * 2 / per_sample
    grad_velocity, grad_x, grad_z = _nothing(velocity), _nothing(x), _nothing(z)
    if output_mask[0]:
        grad_velocity = _rounded(weight.to(dtype) * residual, velocity)
    if output_mask[1]:
        weight_x = (weight * (1 - mix_weight)).to(dtype)
        grad_x = _rounded(weight_x * residual, velocity, x.dtype)
    if output_mask[2]:
        weight_z = (-weight * (1 - mix_weight)).to(dtype)
        grad_z = _rounded(weight_z * residual, velocity, z.dtype)
    return grad_velocity, grad_x, grad_z


# ---- sampler_step


def _step_coefficients(t: Tensor, t_next: Tensor, stochasticity: float) -> tuple[Tensor, Tensor, Tensor]:
    """x' = a x + b v + c noise, collected from x_hat, z_hat and the noise; fp64 [B] each."""
    time, following = t.to(torch.float64), t_next.to(torch.float64)
    keep = (1.0 - stochasticity) ** 0.5
    a = (1 - following) + following * keep
    b = following * keep * (1 - time) - (1 - following) * time
    return a, b, following * stochasticity**0.5


def sampler_step(
    x: Tensor,
    velocity: Tensor,
    t: Tensor,
    t_next: Tensor,
    *,
    noise: Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    stochasticity: float = 0.0,
) -> Tensor:
    dtype = compute_dtype(x, velocity, noise, v_uncond)
    a, b, c = (_per_sample(k, x, dtype).to(dtype) for k in _step_coefficients(t, t_next, stochasticity))
    result = a * x.to(dtype) + b * _guided(velocity, v_uncond, guidance_scale, dtype)
    if noise is not None:
        result = result + c * noise.to(dtype)
    return _rounded(result, x)


def sampler_step_backward(
    grad: Tensor,
    t: Tensor,
    t_next: Tensor,
    *,
    guidance_scale: float = 1.0,
    stochasticity: float = 0.0,
    guided: bool = False,
    velocity_dtype: torch.dtype,
    uncond_dtype: torch.dtype | None = None,
    noise_dtype: torch.dtype | None = None,
    output_mask: tuple[bool, bool, bool, bool] | list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, velocity, v_uncond and noise."""
    outputs = (velocity_dtype, uncond_dtype, noise_dtype)
    dtype = torch.float64 if torch.float64 in outputs else compute_dtype(grad)
    a, b, c = (_per_sample(k, grad, dtype) for k in _step_coefficients(t, t_next, stochasticity))
    scale = guidance_scale if guided else 1.0
    factors = (a, b * scale, b * (1.0 - scale), c)
    dtypes = (grad.dtype, velocity_dtype, uncond_dtype or velocity_dtype, noise_dtype or grad.dtype)
    gradients = []
    for wanted, factor, out in zip(output_mask, factors, dtypes, strict=True):
        if wanted:
            gradients.append(_rounded(factor.to(dtype) * grad.to(dtype), grad, out))
        else:
            gradients.append(_nothing(grad))
    return tuple(gradients)


# ---- a text path that starts with a norm


def _branch(wanted: bool, values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).contiguous() if wanted else _nothing(like)


def _both(real: Tensor, shifted: Tensor, like: Tensor, stacked: bool, output_mask) -> tuple[Tensor, Tensor]:
    if stacked:
        return torch.cat([real, shifted]).to(like.dtype), _nothing(like)
    return _branch(output_mask[0], real, like), _branch(output_mask[1], shifted, like)


def _halves(first: Tensor | None, second: Tensor | None, stacked: bool) -> tuple[Tensor | None, Tensor | None]:
    if not stacked:
        return first, second
    half = first.shape[0] // 2
    return first[:half], first[half:]


def _summed(values: Tensor, parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return values.sum_to_size(parameter.shape).to(dtype or parameter.dtype).contiguous()


def _shifted_tokens(mask: Tensor | None, like: Tensor) -> Tensor:
    shape = like.shape[:-1]
    keep = torch.ones(shape, dtype=torch.bool, device=like.device) if mask is None else mask.ne(0)
    return keep.unsqueeze(-1)


def _rms_norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * weight


def condition_shift_rms_norm(
    condition: Tensor,
    scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    eps: float,
    *,
    mask: Tensor | None = None,
    stacked: bool = False,
    output_mask: tuple[bool, bool] | list[bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(condition)
    c, w = condition.to(dtype), weight.to(dtype)
    real = _rms_norm(c, w, eps)
    moved = torch.where(_shifted_tokens(mask, c), c * scale.to(dtype) + bias.to(dtype), c)
    return _both(real, _rms_norm(moved, w, eps), condition, stacked, output_mask)


def _rms_norm_backward(grad: Tensor, values: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of the values and, per row, of the weight."""
    reciprocal = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    normed, weighted = values * reciprocal, grad * weight
    return reciprocal * (weighted - normed * (weighted * normed).mean(-1, keepdim=True)), grad * normed


def condition_shift_rms_norm_backward(
    grad_normed: Tensor | None,
    grad_shifted: Tensor | None,
    condition: Tensor,
    scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    eps: float,
    *,
    mask: Tensor | None = None,
    stacked: bool = False,
    output_mask: tuple[bool, bool, bool, bool] | list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(condition)
    c, a, w = condition.to(dtype), scale.to(dtype), weight.to(dtype)
    keep = _shifted_tokens(mask, c)
    grad_c = grad_a = grad_b = grad_w = torch.zeros_like(c)
    first, second = _halves(grad_normed, grad_shifted, stacked)
    if first is not None:
        grad_c, grad_w = _rms_norm_backward(first.to(dtype), c, w, eps)
    if second is not None:
        moved = torch.where(keep, c * a + bias.to(dtype), c)
        grad_moved, of_weight = _rms_norm_backward(second.to(dtype), moved, w, eps)
        grad_c = grad_c + torch.where(keep, a * grad_moved, grad_moved)
        grad_a, grad_b = torch.where(keep, grad_moved * c, 0.0), torch.where(keep, grad_moved, 0.0)
        grad_w = grad_w + of_weight
    wide = torch.float64
    return (
        _branch(output_mask[0], grad_c, condition),
        _summed(grad_a.to(wide), scale) if output_mask[1] else _nothing(scale),
        _summed(grad_b.to(wide), bias) if output_mask[2] else _nothing(bias),
        _summed(grad_w.to(wide), weight) if output_mask[3] else _nothing(weight),
    )


# ---- a text path that starts with a linear layer


def projected_condition_shift(
    projected: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_sums: Tensor,
    *,
    linear_bias: Tensor | None = None,
    mask: Tensor | None = None,
    stacked: bool = False,
    output_mask: tuple[bool, bool] | list[bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(projected)
    p = projected.to(dtype)
    beta = torch.zeros_like(row_sums, dtype=dtype) if linear_bias is None else linear_bias.to(dtype)
    real = p + beta
    shifted = scale.to(dtype) * p + (bias.to(dtype) * row_sums.to(dtype) + beta)
    return _both(real, torch.where(_shifted_tokens(mask, p), shifted, real), projected, stacked, output_mask)


def projected_condition_shift_backward(
    grad_real: Tensor | None,
    grad_shifted: Tensor | None,
    projected: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    row_sums: Tensor,
    *,
    mask: Tensor | None = None,
    stacked: bool = False,
    linear_bias_dtype: torch.dtype,
    output_mask: tuple[bool, bool, bool, bool, bool] | list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    first, second = _halves(grad_real, grad_shifted, stacked)
    like = second if first is None else first
    dtype, wide = compute_dtype(like), torch.float64
    real = torch.zeros_like(like, dtype=dtype) if first is None else first.to(dtype)
    shifted = torch.zeros_like(like, dtype=dtype) if second is None else second.to(dtype)
    keep = _shifted_tokens(mask, like)
    moved = torch.where(keep, shifted, 0.0).to(wide)
    grad_scale = _nothing(scale)
    if output_mask[1]:
        grad_scale = _summed(torch.where(keep, moved * projected.to(wide), 0.0), scale)
    columns, sums = moved.sum_to_size(row_sums.shape), row_sums.to(wide)
    return (
        _branch(output_mask[0], real + torch.where(keep, scale.to(dtype) * shifted, shifted), like),
        grad_scale,
        (columns * sums).sum().to(bias.dtype) if output_mask[2] else _nothing(bias),
        (columns * bias.to(wide)).to(row_sums.dtype) if output_mask[3] else _nothing(row_sums),
        _summed((real + shifted).to(wide), row_sums, linear_bias_dtype)
        if output_mask[4]
        else _nothing(row_sums, linear_bias_dtype),
    )


# ---- the velocity head


def _over_tokens(per_sample: Tensor, hidden: Tensor) -> Tensor:
    return per_sample.reshape(per_sample.shape[0], *[1] * (hidden.dim() - 2), per_sample.shape[-1])


def modulated_layer_norm(hidden: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(hidden)
    h = hidden.to(dtype)
    if hidden.shape[-1] == 0:
        rows = h.new_zeros(hidden.shape[:-1])
        return torch.empty_like(hidden, memory_format=torch.contiguous_format), rows, rows.clone()
    mean = h.mean(-1, keepdim=True)
    rstd = torch.rsqrt((h - mean).square().mean(-1, keepdim=True) + eps)
    out = (h - mean) * rstd * (1 + _over_tokens(scale.to(dtype), h)) + _over_tokens(shift.to(dtype), h)
    return out.to(hidden.dtype).contiguous(), mean.squeeze(-1).contiguous(), rstd.squeeze(-1).contiguous()


def modulated_layer_norm_backward(
    grad: Tensor,
    hidden: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    shift_dtype: torch.dtype,
    output_mask: tuple[bool, bool, bool] | list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, wide = compute_dtype(hidden), torch.float64
    g, factor = grad.to(dtype), rstd.to(dtype).unsqueeze(-1)
    normed = (hidden.to(dtype) - mean.to(dtype).unsqueeze(-1)) * factor
    weighted = g * (1 + _over_tokens(scale.to(dtype), g))
    product = (weighted * normed).mean(-1, keepdim=True)
    grad_hidden = factor * (weighted - weighted.mean(-1, keepdim=True) - normed * product)
    tokens = tuple(range(1, hidden.dim() - 1))

    def over_tokens(values: Tensor) -> Tensor:
        return values.to(wide).sum(tokens) if tokens else values.to(wide)

    return (
        _branch(output_mask[0], grad_hidden, hidden),
        over_tokens(g * normed).to(scale.dtype) if output_mask[1] else _nothing(scale),
        over_tokens(g).to(shift_dtype) if output_mask[2] else _nothing(scale, shift_dtype),
    )


def velocity_head(
    hidden: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, rstd = modulated_layer_norm(hidden, scale, shift, eps)
    return torch.nn.functional.linear(out, weight, bias), mean, rstd
