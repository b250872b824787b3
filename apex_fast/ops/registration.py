"""Fake kernels (shapes without data, for torch.compile) and the plain torch twins for devices without a compiled
kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _library
from . import checks, reference

SAMPLE_OPS = (
    "condition_shift",
    "interpolate",
    "renoise",
    "shifted_velocity_loss",
    "mixed_velocity_loss",
    "sampler_step",
)
ROW_OPS = ("condition_shift_rms_norm", "projected_condition_shift", "modulated_layer_norm")
OPS = SAMPLE_OPS + ROW_OPS
CUDA_OPS = OPS  # those with sources in csrc/cuda
ONE_PASS = "shifted_velocity_loss_with_gradients"  # built with shifted_velocity_loss
TWINS = (*(name + suffix for name in OPS for suffix in ("", "_backward")), ONE_PASS)

_told: set[str] = set()


# ---- devices without a compiled kernel


def _device_of(arguments: tuple[object, ...]) -> str:
    return next((a.device.type for a in arguments if isinstance(a, Tensor)), "unknown device")


def _mend(op: str, device: str) -> str:
    if device != "cuda":
        return "there are kernels for cpu and cuda only"
    if op.removesuffix("_backward").removesuffix("_with_gradients") not in CUDA_OPS:
        return "this version of apex_fast has no CUDA kernel of it; a later one may"
    return "build with CUDA: APEX_FAST_CUDA=on pip install --force-reinstall --no-deps . in the source folder"


def _announce(op: str, device: str, setting: str) -> None:
    """Refuse under ``compiled``; under ``auto`` say once per device type that the plain torch twins run."""
    if setting == "reference":
        return
    mend = _mend(op, device)
    if setting == "compiled":
        raise RuntimeError(
            f"apex_fast::{op} has no compiled kernel for {device} in this build, and APEX_FAST_KERNELS=compiled forbids"
            f" the plain torch twin. Mend: {mend}; or set APEX_FAST_KERNELS=auto."
        )
    if device not in _told:
        _told.add(device)
        warnings.warn(
            f"apex_fast: no compiled kernel of {op} for {device} in this build, its plain torch twin runs instead"
            f" (slower, more memory; `apex-fast env` lists every op). Mend: {mend}. APEX_FAST_KERNELS=compiled makes"
            " this an error.",
            stacklevel=3,
        )


def _fallback(op: str, setting: str) -> Callable[..., object]:
    twin, check = getattr(reference, op), checks.checks_of(op)

    def run(*arguments: object, **options: object) -> object:
        check(*arguments, **options)
        _announce(op, _device_of(arguments), setting)
        return twin(*arguments, **options)

    return run


# ---- fake kernels


def _loss_dtype(*tensors: Tensor | None) -> torch.dtype:
    return reference.compute_dtype(*tensors)


def _like(wanted: bool, tensor: Tensor, dtype: torch.dtype | None = None, layout: Tensor | None = None) -> Tensor:
    dtype = dtype or tensor.dtype
    return (
        torch.empty_like(tensor if layout is None else layout, dtype=dtype)
        if wanted
        else tensor.new_empty(0, dtype=dtype)
    )


def _fake_condition_shift(condition, scale, bias, *, mask=None):
    return torch.empty_like(condition)


def _fake_condition_shift_backward(grad, condition, scale, bias, *, mask=None, output_mask):
    parameters = [
        p.new_empty(p.shape if wanted else 0) for p, wanted in zip((scale, bias), output_mask[1:], strict=True)
    ]
    return _like(output_mask[0], condition), *parameters


def _fake_interpolate(x, z, t):
    return torch.empty_like(x)


def _fake_interpolate_backward(grad, t, *, output_mask):
    return tuple(_like(wanted, grad) for wanted in output_mask)


def _fake_renoise(velocity, x_s, s, z, t):
    return torch.empty_like(x_s), torch.empty_like(x_s)


def _fake_renoise_backward(grad_x_fake_t, grad_target, s, t, *, velocity_dtype):
    return torch.empty_like(grad_x_fake_t, dtype=velocity_dtype)


def _fake_shifted_velocity_loss(v_gen, v_shift, v_real, target, *, v_uncond=None, guidance_scale=1.0, clip=1.0):
    dtype = _loss_dtype(v_shift, v_real, target, v_uncond)
    batch = v_shift.shape[0]
    loss = v_shift.new_empty(batch, dtype=dtype)
    return loss, torch.empty_like(loss), v_shift.new_empty((batch, 7), dtype=dtype)


def _fake_shifted_velocity_loss_backward(
    grad_fake,
    grad_correction,
    v_shift,
    v_real,
    target,
    *,
    v_uncond=None,
    guidance_scale=1.0,
    clip=1.0,
    output_mask=(True, True, False),
    grad_gen_dtype=None,
):
    return (
        _like(output_mask[0], v_shift, grad_gen_dtype),
        _like(output_mask[1], v_shift),
        _like(output_mask[2], target, layout=v_shift),
    )


def _fake_shifted_velocity_loss_with_gradients(
    weight_fake,
    weight_correction,
    v_shift,
    v_real,
    target,
    *,
    v_uncond=None,
    guidance_scale=1.0,
    clip=1.0,
    output_mask=(True, True),
    grad_gen_dtype=None,
):
    return (
        *_fake_shifted_velocity_loss(None, v_shift, v_real, target, v_uncond=v_uncond),
        _like(output_mask[0], v_shift, grad_gen_dtype),
        _like(output_mask[1], v_shift),
    )


def _fake_mixed_velocity_loss(velocity, x, z, *, v_fake=None, mix_weight=0.0):
    return velocity.new_empty(velocity.shape[0], dtype=_loss_dtype(velocity, x, z, v_fake))


def _fake_mixed_velocity_loss_backward(grad, velocity, x, z, *, v_fake=None, mix_weight=0.0, output_mask):
    return tuple(
        _like(wanted, tensor, layout=velocity) for wanted, tensor in zip(output_mask, (velocity, x, z), strict=True)
    )


def _fake_sampler_step(x, velocity, t, t_next, *, noise=None, v_uncond=None, guidance_scale=1.0, stochasticity=0.0):
    return torch.empty_like(x)


def _fake_sampler_step_backward(
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
    output_mask,
):
    dtypes = (grad.dtype, velocity_dtype, uncond_dtype or velocity_dtype, noise_dtype or grad.dtype)
    return tuple(
        _like(wanted, grad, dtype if wanted else grad.dtype) for wanted, dtype in zip(output_mask, dtypes, strict=True)
    )


def _fake_branches(rows, stacked, output_mask):
    if stacked:
        return rows.new_empty((2 * rows.shape[0], *rows.shape[1:])), rows.new_empty(0)
    return tuple(rows.new_empty(rows.shape if wanted else 0) for wanted in output_mask)


def _fake_parameters(parameters, wanted):
    return tuple(p.new_empty(p.shape if one else 0) for p, one in zip(parameters, wanted, strict=True))


def _fake_condition_shift_rms_norm(
    condition, scale, bias, weight, eps, *, mask=None, stacked=False, output_mask=(True, True)
):
    return _fake_branches(condition, stacked, output_mask)


def _fake_condition_shift_rms_norm_backward(
    grad_normed, grad_shifted, condition, scale, bias, weight, eps, *, mask=None, stacked=False, output_mask
):
    return _fake_parameters((condition, scale, bias, weight), output_mask)


def _fake_projected_condition_shift(
    projected, scale, bias, row_sums, *, linear_bias=None, mask=None, stacked=False, output_mask=(True, True)
):
    return _fake_branches(projected, stacked, output_mask)


def _fake_projected_condition_shift_backward(
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
):
    like = grad_shifted if grad_real is None else grad_real
    shape = (like.shape[0] // 2, *like.shape[1:]) if stacked else like.shape
    linear_bias = row_sums.new_empty(row_sums.shape if output_mask[4] else 0, dtype=linear_bias_dtype)
    return (
        like.new_empty(shape if output_mask[0] else 0),
        *_fake_parameters((scale, bias, row_sums), output_mask[1:4]),
        linear_bias,
    )


def _fake_modulated_layer_norm(hidden, scale, shift, eps):
    statistics = [hidden.new_empty(hidden.shape[:-1], dtype=_loss_dtype(hidden)) for _ in range(2)]
    return hidden.new_empty(hidden.shape), *statistics


def _fake_modulated_layer_norm_backward(grad, hidden, scale, mean, rstd, *, shift_dtype, output_mask):
    shift = scale.new_empty(scale.shape if output_mask[2] else 0, dtype=shift_dtype)
    return *_fake_parameters((hidden, scale), output_mask[:2]), shift


def register() -> None:
    """Load the compiled library and add what Python adds to its ops. Called once, by ``import apex_fast.ops``.

    ``velocity_head`` is made of other ops, with one body for every device: it needs nothing from here.
    """
    _library.load()
    setting = _library.kernels_setting()
    for op in TWINS:
        name = f"apex_fast::{op}"
        # CompositeExplicitAutograd: below autograd, on every device that has no kernel of its own.
        torch.library.impl(name, "CompositeExplicitAutograd", _fallback(op, setting))
        torch.library.register_fake(name, globals()[f"_fake_{op}"])
