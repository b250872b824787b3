"""Argument checks of the plain torch twins, with the messages of the compiled kernels.

Plain torch would broadcast, cast or ignore what a kernel refuses, and a mistake would change its result with the
device. A twin that runs in a kernel's place therefore refuses the same arguments in the same words
(csrc/common/checks.h).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_FLOAT = (torch.float32, torch.float64, *_HALF)


def _require(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise RuntimeError(f"{op}: {message}")


def _kind(dtype: torch.dtype) -> str:
    # "Long" for torch.int64, as C++ names it
    return torch.empty((), dtype=dtype).type().rsplit(".", 1)[-1].removesuffix("Tensor")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _float_type(op: str, name: str, dtype: torch.dtype) -> None:
    _require(dtype in _FLOAT, op, f"{name} must be float32, float64, bfloat16 or float16, got {_kind(dtype)}")


def _batched(op: str, name: str, tensor: Tensor) -> None:
    _float_type(op, name, tensor.dtype)
    _require(tensor.dim() >= 1, op, f"{name} must be [B, ...], got a tensor without dimensions")


def _on_device(op: str, name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    message = f"{name} must be on the device of {reference_name}, got {tensor.device} and {reference.device}"
    _require(tensor.device == reference.device, op, message)


def _sample(op: str, name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    _float_type(op, name, tensor.dtype)
    got = f"got {_shape(tensor)} and {_shape(reference)}"
    _require(tensor.shape == reference.shape, op, f"{name} must have the shape of {reference_name}, {got}")
    _on_device(op, name, tensor, reference_name, reference)


def _state(op: str, name: str, state: Tensor, velocity_name: str, velocity: Tensor) -> None:
    message = (
        f"{name} must be float32, float64 or have the dtype of {velocity_name} ({_kind(velocity.dtype)}), "
        f"got {_kind(state.dtype)}; cast it with {name}.float()"
    )
    _require(state.dtype not in _HALF or state.dtype == velocity.dtype, op, message)


def _same_dtype(op: str, name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    got = f"got {_kind(tensor.dtype)} and {_kind(reference.dtype)}; cast one of them"
    _require(tensor.dtype == reference.dtype, op, f"{name} must have the dtype of {reference_name}, {got}")


def _per_sample(op: str, name: str, values: Tensor, reference_name: str, reference: Tensor) -> None:
    half = "half precision rounds 0.999 to 1; pass " + name + ".float(), made before any cast to half"
    expected = f"{name} must be float32 or float64, got {_kind(values.dtype)}"
    _require(values.dtype not in _HALF, op, f"{expected}: {half}")
    _require(values.dtype in (torch.float32, torch.float64), op, f"{expected}; pass {name}.float()")
    batch = reference.shape[0]
    remedy = "; repeat a single time for the batch with t.expand(B)" if values.dim() == 0 else ""
    message = f"{name} must be [B] with the batch of {reference_name} ({batch}), got {_shape(values)}{remedy}"
    _require(values.shape == (batch,), op, message)
    _on_device(op, name, values, reference_name, reference)


def _guidance(op: str, v_uncond: Tensor | None, scale: float, reference_name: str, reference: Tensor) -> None:
    if v_uncond is not None:
        _sample(op, "v_uncond", v_uncond, reference_name, reference)
    message = (
        f"guidance_scale {scale:g} needs v_uncond, the velocity under the negative condition; "
        "pass it, or leave guidance_scale at 1"
    )
    _require(v_uncond is not None or scale == 1.0, op, message)


def _stochasticity(op: str, value: float) -> None:
    _require(0 <= value <= 1, op, f"stochasticity must lie in [0, 1] (0 is Euler, 1 is re-noise), got {value:g}")


# ---- one function per op, with the op's own arguments


def condition_shift(
    condition: Tensor, scale: Tensor, bias: Tensor, *, mask: Tensor | None = None, op: str = "condition_shift"
) -> None:
    _float_type(op, "condition", condition.dtype)
    message = f"condition must be [..., D] with 1 to 9 dimensions, got {_shape(condition)}"
    _require(1 <= condition.dim() <= 9, op, message)
    channels = condition.shape[-1]
    for name, parameter in (("scale", scale), ("bias", bias)):
        _float_type(op, name, parameter.dtype)
        message = (
            f"{name} must be [] or [D] with D = {channels}, the last dimension of condition, got {_shape(parameter)}"
        )
        _require(parameter.dim() == 0 or parameter.shape == (channels,), op, message)
        _on_device(op, name, parameter, "condition", condition)
    if mask is not None:
        expected = list(condition.shape[:-1])
        message = f"mask must have the shape of condition without D, {expected}, got {_shape(mask)}"
        _require(list(mask.shape) == expected, op, message)
        _on_device(op, "mask", mask, "condition", condition)


def condition_shift_backward(grad, condition, scale, bias, *, mask=None, output_mask=None) -> None:
    op = "condition_shift_backward"
    condition_shift(condition, scale, bias, mask=mask, op=op)
    _sample(op, "grad", grad, "condition", condition)


def interpolate(x: Tensor, z: Tensor, t: Tensor) -> None:
    op = "interpolate"
    _batched(op, "x", x)
    _sample(op, "z", z, "x", x)
    _same_dtype(op, "z", z, "x", x)
    _per_sample(op, "t", t, "x", x)


def interpolate_backward(grad: Tensor, t: Tensor, *, output_mask=None) -> None:
    _batched("interpolate_backward", "grad", grad)
    _per_sample("interpolate_backward", "t", t, "grad", grad)


def renoise(velocity: Tensor, x_s: Tensor, s: Tensor, z: Tensor, t: Tensor) -> None:
    op = "renoise"
    _batched(op, "x_s", x_s)
    _sample(op, "velocity", velocity, "x_s", x_s)
    _sample(op, "z", z, "x_s", x_s)
    _same_dtype(op, "z", z, "x_s", x_s)
    _state(op, "x_s", x_s, "velocity", velocity)
    _per_sample(op, "s", s, "x_s", x_s)
    _per_sample(op, "t", t, "x_s", x_s)


def renoise_backward(grad_x_fake_t, grad_target, s, t, *, velocity_dtype) -> None:
    op = "renoise_backward"
    _float_type(op, "velocity_dtype", velocity_dtype)
    _batched(op, "grad_x_fake_t", grad_x_fake_t)
    _sample(op, "grad_target", grad_target, "grad_x_fake_t", grad_x_fake_t)
    _per_sample(op, "s", s, "grad_x_fake_t", grad_x_fake_t)
    _per_sample(op, "t", t, "grad_x_fake_t", grad_x_fake_t)


def _loss_arguments(op, v_shift, v_real, target, v_uncond, guidance_scale, clip) -> None:
    _batched(op, "v_shift", v_shift)
    _sample(op, "v_real", v_real, "v_shift", v_shift)
    _sample(op, "target", target, "v_shift", v_shift)
    _state(op, "target", target, "v_shift", v_shift)
    _guidance(op, v_uncond, guidance_scale, "v_shift", v_shift)
    if clip is not None:
        _require(clip > 0, op, f"clip must be positive, got {clip:g}; clip=None switches it off")


def shifted_velocity_loss(
    v_gen, v_shift, v_real, target, *, v_uncond=None, guidance_scale=1.0, clip: float | None = 1.0
) -> None:
    op = "shifted_velocity_loss"
    _loss_arguments(op, v_shift, v_real, target, v_uncond, guidance_scale, clip)
    if v_gen is not None:
        _sample(op, "v_gen", v_gen, "v_shift", v_shift)
        _same_dtype(op, "v_gen", v_gen, "v_shift", v_shift)


def shifted_velocity_loss_backward(
    grad_fake,
    grad_correction,
    v_shift,
    v_real,
    target,
    *,
    v_uncond=None,
    guidance_scale=1.0,
    clip: float | None = 1.0,
    output_mask=None,
    grad_gen_dtype=None,
) -> None:
    op = "shifted_velocity_loss_backward"
    _loss_arguments(op, v_shift, v_real, target, v_uncond, guidance_scale, clip)
    if grad_gen_dtype is not None:
        _float_type(op, "grad_gen_dtype", grad_gen_dtype)
    _per_sample(op, "grad_fake", grad_fake, "v_shift", v_shift)
    _per_sample(op, "grad_correction", grad_correction, "v_shift", v_shift)


def shifted_velocity_loss_with_gradients(
    weight_fake,
    weight_correction,
    v_shift,
    v_real,
    target,
    *,
    v_uncond=None,
    guidance_scale=1.0,
    clip: float | None = 1.0,
    output_mask=None,
    grad_gen_dtype=None,
) -> None:
    op = "shifted_velocity_loss_with_gradients"
    _loss_arguments(op, v_shift, v_real, target, v_uncond, guidance_scale, clip)
    if grad_gen_dtype is not None:
        _float_type(op, "grad_gen_dtype", grad_gen_dtype)
    _per_sample(op, "weight_fake", weight_fake, "v_shift", v_shift)
    _per_sample(op, "weight_correction", weight_correction, "v_shift", v_shift)


def mixed_velocity_loss(velocity, x, z, *, v_fake=None, mix_weight=0.0, op: str = "mixed_velocity_loss") -> None:
    _batched(op, "velocity", velocity)
    _sample(op, "x", x, "velocity", velocity)
    _sample(op, "z", z, "velocity", velocity)
    _same_dtype(op, "z", z, "x", x)
    _state(op, "x", x, "velocity", velocity)
    if v_fake is not None:
        _sample(op, "v_fake", v_fake, "velocity", velocity)
    message = (
        f"mix_weight {mix_weight:g} needs v_fake, the velocity under the shifted condition; "
        "pass it, or leave mix_weight at 0"
    )
    _require(v_fake is not None or mix_weight == 0, op, message)


def mixed_velocity_loss_backward(grad, velocity, x, z, *, v_fake=None, mix_weight=0.0, output_mask=None) -> None:
    op = "mixed_velocity_loss_backward"
    mixed_velocity_loss(velocity, x, z, v_fake=v_fake, mix_weight=mix_weight, op=op)
    _per_sample(op, "grad", grad, "velocity", velocity)


def sampler_step(x, velocity, t, t_next, *, noise=None, v_uncond=None, guidance_scale=1.0, stochasticity=0.0) -> None:
    op = "sampler_step"
    _batched(op, "x", x)
    _sample(op, "velocity", velocity, "x", x)
    _state(op, "x", x, "velocity", velocity)
    _per_sample(op, "t", t, "x", x)
    _per_sample(op, "t_next", t_next, "x", x)
    _guidance(op, v_uncond, guidance_scale, "x", x)
    _stochasticity(op, stochasticity)
    message = f"stochasticity {stochasticity:g} needs noise; pass it, or leave stochasticity at 0"
    _require(noise is not None or stochasticity == 0, op, message)
    if noise is not None:
        _sample(op, "noise", noise, "x", x)
        _state(op, "noise", noise, "velocity", velocity)


def sampler_step_backward(
    grad,
    t,
    t_next,
    *,
    guidance_scale=1.0,
    stochasticity=0.0,
    guided=False,
    velocity_dtype,
    uncond_dtype=None,
    noise_dtype=None,
    output_mask=None,
) -> None:
    op = "sampler_step_backward"
    _batched(op, "grad", grad)
    _per_sample(op, "t", t, "grad", grad)
    _per_sample(op, "t_next", t_next, "grad", grad)
    _stochasticity(op, stochasticity)
    for name, dtype in (
        ("velocity_dtype", velocity_dtype),
        ("uncond_dtype", uncond_dtype),
        ("noise_dtype", noise_dtype),
    ):
        if dtype is not None:
            _float_type(op, name, dtype)


# ---- rows of channels (csrc/common/rows.h)


def _rows(op: str, name: str, tensor: Tensor) -> None:
    _float_type(op, name, tensor.dtype)
    _require(tensor.dim() >= 1, op, f"{name} must be [..., D], got a tensor without dimensions")


def _channels(op: str, name: str, values: Tensor, rows_name: str, rows: Tensor, *, number_too: bool = False) -> None:
    _float_type(op, name, values.dtype)
    channels = rows.shape[-1]
    shapes = "[] or [D]" if number_too else "[D]"
    message = f"{name} must be {shapes} with D = {channels}, the last dimension of {rows_name}, got {_shape(values)}"
    _require(values.shape == (channels,) or (number_too and values.dim() == 0), op, message)
    _on_device(op, name, values, rows_name, rows)


def _token_mask(op: str, mask: Tensor | None, rows_name: str, rows: Tensor) -> None:
    if mask is not None:
        expected = list(rows.shape[:-1])
        message = f"mask must have the shape of {rows_name} without D, {expected}, got {_shape(mask)}"
        _require(list(mask.shape) == expected, op, message)
        _on_device(op, "mask", mask, rows_name, rows)


def _eps(op: str, eps: float) -> None:
    _require(eps >= 0, op, f"eps must not be negative, got {eps:g}")


def _branches(op: str, rows_name: str, rows: Tensor, stacked: bool, output_mask) -> None:
    if stacked:
        _require(rows.dim() >= 2, op, f"{rows_name} must be [B, ..., D] to be stacked, got {_shape(rows)}")
        message = "stacked holds both branches, so output_mask must be [True, True]; leave one of them out"
        _require(all(output_mask), op, message)


def _branch_gradients(op, first, first_name, second, second_name, rows_name, rows, stacked) -> None:
    _require(first is not None or second is not None, op, f"{first_name} or {second_name} must be given")
    message = f"stacked has one gradient, {first_name}; leave {second_name} out"
    _require(not stacked or second is None, op, message)
    expected = list(rows.shape)
    if stacked:
        expected[0] *= 2
    what = "both branches of" if stacked else "the shape of"
    for name, grad in ((first_name, first), (second_name, second)):
        if grad is not None:
            _float_type(op, name, grad.dtype)
            message = f"{name} must be {expected}, {what} {rows_name}, got {_shape(grad)}"
            _require(list(grad.shape) == expected, op, message)
            _on_device(op, name, grad, rows_name, rows)


def condition_shift_rms_norm(
    condition,
    scale,
    bias,
    weight,
    eps,
    *,
    mask=None,
    stacked=False,
    output_mask=(True, True),
    op="condition_shift_rms_norm",
) -> None:
    _rows(op, "condition", condition)
    _channels(op, "scale", scale, "condition", condition, number_too=True)
    _channels(op, "bias", bias, "condition", condition, number_too=True)
    _channels(op, "weight", weight, "condition", condition)
    _token_mask(op, mask, "condition", condition)
    _eps(op, eps)
    _branches(op, "condition", condition, stacked, output_mask)


def condition_shift_rms_norm_backward(
    grad_normed, grad_shifted, condition, scale, bias, weight, eps, *, mask=None, stacked=False, output_mask=None
) -> None:
    op = "condition_shift_rms_norm_backward"
    condition_shift_rms_norm(condition, scale, bias, weight, eps, mask=mask, stacked=stacked, op=op)
    _branch_gradients(op, grad_normed, "grad_normed", grad_shifted, "grad_shifted", "condition", condition, stacked)


def _projection_parameters(op, scale, bias, row_sums, rows_name, rows) -> None:
    _channels(op, "row_sums", row_sums, rows_name, rows)
    for name, value in (("scale", scale), ("bias", bias)):
        _float_type(op, name, value.dtype)
        message = (
            f"{name} must be one number, [], got {_shape(value)}; one number per channel does not pass through the "
            "linear layer: shift its input with condition_shift"
        )
        _require(value.dim() == 0, op, message)
        _on_device(op, name, value, "row_sums", row_sums)


def projected_condition_shift(
    projected, scale, bias, row_sums, *, linear_bias=None, mask=None, stacked=False, output_mask=(True, True)
) -> None:
    op = "projected_condition_shift"
    _rows(op, "projected", projected)
    _projection_parameters(op, scale, bias, row_sums, "projected", projected)
    if linear_bias is not None:
        _channels(op, "linear_bias", linear_bias, "projected", projected)
    _token_mask(op, mask, "projected", projected)
    _branches(op, "projected", projected, stacked, output_mask)


def projected_condition_shift_backward(
    grad_real,
    grad_shifted,
    projected,
    scale,
    bias,
    row_sums,
    *,
    mask=None,
    stacked=False,
    linear_bias_dtype,
    output_mask,
) -> None:
    op = "projected_condition_shift_backward"
    _require(grad_real is not None or grad_shifted is not None, op, "grad_real or grad_shifted must be given")
    _float_type(op, "linear_bias_dtype", linear_bias_dtype)
    grad = grad_shifted if grad_real is None else grad_real
    _rows(op, "grad_shifted" if grad_real is None else "grad_real", grad)
    _branches(op, "grad_real", grad, stacked, (True, True))
    message = f"stacked needs grad_real with both branches, an even batch, got {_shape(grad)}"
    _require(not stacked or (grad_real is not None and grad.shape[0] % 2 == 0), op, message)
    like = grad[: grad.shape[0] // 2] if stacked else grad
    rows = like if projected is None else projected
    _branch_gradients(op, grad_real, "grad_real", grad_shifted, "grad_shifted", "projected", rows, stacked)
    _projection_parameters(op, scale, bias, row_sums, "grad_real", like)
    _token_mask(op, mask, "projected", like)
    _require(projected is not None or not output_mask[1], op, "the gradient of scale needs projected")


def _modulation(op: str, name: str, values: Tensor, hidden: Tensor) -> None:
    _float_type(op, name, values.dtype)
    expected = [hidden.shape[0], hidden.shape[-1]]
    message = f"{name} must be [B, D] = {expected}, batch and channels of hidden, got {_shape(values)}"
    _require(list(values.shape) == expected, op, message)
    _on_device(op, name, values, "hidden", hidden)


def _hidden(op: str, hidden: Tensor) -> None:
    _float_type(op, "hidden", hidden.dtype)
    _require(hidden.dim() >= 2, op, f"hidden must be [B, ..., D], got {_shape(hidden)}")


def modulated_layer_norm(hidden: Tensor, scale: Tensor, shift: Tensor, eps: float) -> None:
    op = "modulated_layer_norm"
    _hidden(op, hidden)
    _modulation(op, "scale", scale, hidden)
    _modulation(op, "shift", shift, hidden)
    _eps(op, eps)


def modulated_layer_norm_backward(grad, hidden, scale, mean, rstd, *, shift_dtype, output_mask=None) -> None:
    op = "modulated_layer_norm_backward"
    _hidden(op, hidden)
    _sample(op, "grad", grad, "hidden", hidden)
    _modulation(op, "scale", scale, hidden)
    _float_type(op, "shift_dtype", shift_dtype)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = list(hidden.shape[:-1])
    for name, values in (("mean", mean), ("rstd", rstd)):
        message = (
            f"{name} must be {_kind(dtype)} {rows}, as modulated_layer_norm returned it, "
            f"got {_kind(values.dtype)} {_shape(values)}"
        )
        _require(list(values.shape) == rows and values.dtype == dtype, op, message)
        _on_device(op, name, values, "hidden", hidden)


def checks_of(op: str) -> Callable[..., None]:
    """The check of an op, to be called with the op's arguments."""
    return globals()[op]
