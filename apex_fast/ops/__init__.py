"""The ops of the library, ``torch.ops.apex_fast.*``, as Python functions with their documentation.

Common to all of them:

* Tensors are ``[B, ...]`` of any shape. Velocities ``v_*`` may be fp32, bf16, fp16 or fp64. State tensors (x, z,
  target) are fp32, fp64 or have the velocity's own half dtype. Times are ``[B]``, fp32 or fp64, in units of the
  path: 1 is pure noise, 0 is data.
* A kernel reads each tensor as it is given and computes in fp32, or in fp64 as soon as one of the ``[B, ...]`` tensors
  is fp64 (the condition, in ``condition_shift``). No upcast copy is made, and there is no autocast rule, which would
  make one.
* Dense tensors run without a copy, permuted ones (channels_last, a moved batch dimension) and slices of the batch
  too. Any other layout, such as a slice of the channels, is copied once, and so is an operand whose layout differs
  from that of the first tensor named in the signature's ``[B, ...]`` group.
* The ops that stand in for parts of a network (``condition_shift_rms_norm``, ``projected_condition_shift``,
  ``modulated_layer_norm``, ``velocity_head``) walk rows of channels ``[..., D]``: the condition or the hidden state
  decides the arithmetic, parameters may have any float dtype, outputs are contiguous, and an input that is not is
  copied once.
* Results repeat bit for bit and do not depend on the number of threads.
* Reverse mode and first derivatives only: differentiating twice, or in forward mode, raises.

Below, N stands for the bytes of one velocity; state tensors of another dtype count for what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import registration

registration.register()

_ops = torch.ops.apex_fast

#: Columns of the ``stats`` that ``shifted_velocity_loss`` returns.
STATS = (
    "dv_squared",
    "clipped_dv_squared",
    "clipped_share",
    "shift_dot_real",
    "shift_squared",
    "real_squared",
    "guided_target_distance",
)


def condition_shift(condition: Tensor, scale: Tensor, bias: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Shifted condition ``c_fake = scale * c + bias`` (APEX, arXiv 2604.12322, Eq. 9).

    Args:
        condition: ``[..., D]``, text embeddings ``[B, L, D]`` or pooled ones ``[B, D]``; fp32, bf16, fp16 or fp64.
        scale: ``[]`` or ``[D]``, any of the same dtypes.
        bias: ``[]`` or ``[D]``, any of the same dtypes.
        mask: ``[...]`` (the condition without D), bool or number; tokens where it is zero are returned as they are.

    Returns:
        Tensor like ``condition``. Differentiable in ``condition``, ``scale`` and ``bias``.

    Moves 2N bytes forward (read, write). Any strides of ``condition`` run without a copy.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message says which.
    """
    return _ops.condition_shift(condition, scale, bias, mask=mask)


def interpolate(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Point of the optimal-transport path, ``x_t = t z + (1 - t) x`` (Eq. 1).

    Args:
        x: data or latent ``[B, ...]``.
        z: noise, shape and dtype of ``x``.
        t: ``[B]``, fp32 or fp64.

    Returns:
        Tensor like ``x``. Differentiable in ``x`` and ``z``. Moves 3N bytes.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, or ``t`` asks for a gradient.
    """
    return _ops.interpolate(x, z, t)


def renoise(velocity: Tensor, x_s: Tensor, s: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The generator's sample, noised again, and the velocity of that path, in one pass.

    ``x_fake = x_s - s * velocity`` (Eq. 11), ``x_fake_t = t z + (1 - t) x_fake`` (Eq. 1), ``target = z - x_fake``
    (Eq. 3). ``x_fake`` itself is ``z - target`` and is not written.

    Args:
        velocity: the generator's output at ``x_s``, ``[B, ...]``.
        x_s: what the generator saw; pure noise for one-step training.
        s: ``[B]``, its time.
        z: fresh noise, dtype of ``x_s``.
        t: ``[B]``, the time to noise to.

    Returns:
        ``(x_fake_t, target)``, both like ``x_s``. Differentiable in ``velocity`` only. Moves 5N bytes forward, 3N
        backward.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, or anything but ``velocity`` asks for a gradient.
    """
    return _ops.renoise(velocity, x_s, s, z, t)


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
    """Both losses on a generated sample, and their statistics, from one read of the velocities.

    With ``v_guided = v_uncond + guidance_scale * (v_real - v_uncond)`` (``v_real`` itself without ``v_uncond``) and
    ``dv = v_shift - v_guided`` (Eq. 17):

    * ``fake = mean (v_shift - target)^2`` (L_fake, Eq. 12). Gradient to ``v_shift``, and to ``target`` where it asks
      for one.
    * ``correction = mean clamp(dv, -clip, clip)^2``, the value of ``mean |v_gen - sg(v_gen - clamp(dv))|^2``. The
      values of ``v_gen`` are never read; its gradient is ``2 clamp(dv) / n``. No gradient to the other velocities.

    Args:
        v_gen: the generator's velocity ``[B, ...]``, dtype of ``v_shift``, or None where its graph is not there.
        v_shift: shifted branch at ``x_fake_t``, ``[B, ...]``.
        v_real: real branch at ``x_fake_t``.
        target: ``z - x_fake`` from :func:`renoise`.
        v_uncond: real branch under the negative condition.
        guidance_scale: classifier-free guidance of the real branch; other than 1 it needs ``v_uncond``.
        clip: bound of ``dv``, in units of the velocity; None switches it off.

    Returns:
        ``(fake, correction, stats)``: ``[B]``, ``[B]`` and ``[B, 7]``, fp32 (fp64 if an input is). Columns of
        ``stats`` (:data:`STATS`), without
        gradient: sum of dv^2, sum of clamp(dv)^2, share of elements clipped, sums of v_shift*v_real, v_shift^2 and
        v_real^2, and mean ``|v_guided - target|``, the normaliser of DMD. Weights are multiplied outside.

    Moves 3N bytes forward and 5N backward (4N and 6N with ``v_uncond``); neither difference, mask, guided velocity
    nor upcast is written.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, ``clip`` is not positive, guidance without ``v_uncond``.
    """
    return _ops.shifted_velocity_loss(
        v_gen, v_shift, v_real, target, v_uncond=v_uncond, guidance_scale=guidance_scale, clip=clip
    )


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
    output_mask: tuple[bool, bool, bool] = (True, True, False),
    grad_gen_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`shifted_velocity_loss`, for a schedule that has no generator graph when the loss runs.

    Args:
        grad_fake: ``[B]``, fp32 or fp64: derivative of the total by ``fake[b]``.
        grad_correction: ``[B]``: derivative of the total by ``correction[b]``.
        v_shift, v_real, target, v_uncond, guidance_scale, clip: as in the forward.
        output_mask: which of the three gradients to compute.
        grad_gen_dtype: dtype of the first; None is that of ``v_shift``. fp32 keeps small gradients alive until a
        loss scale is applied.

    Returns:
        Gradients for ``v_gen``, ``v_shift`` and ``target``; one not asked for is an empty tensor of shape ``[0]``.
        Moves 3N bytes in and N per gradient out.
    """
    return _ops.shifted_velocity_loss_backward(
        grad_fake,
        grad_correction,
        v_shift,
        v_real,
        target,
        v_uncond=v_uncond,
        guidance_scale=guidance_scale,
        clip=clip,
        output_mask=output_mask,
        grad_gen_dtype=grad_gen_dtype,
    )


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
    output_mask: tuple[bool, bool] = (True, True),
    grad_gen_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`shifted_velocity_loss` and its gradients in one pass, for a schedule that knows how much each loss of each
    sample will weigh before the loss runs.

    Args:
        weight_fake: ``[B]``, fp32 or fp64: derivative of the total by ``fake[b]``.
        weight_correction: ``[B]``: derivative of the total by ``correction[b]``.
        v_shift, v_real, target, v_uncond, guidance_scale, clip: as in :func:`shifted_velocity_loss`.
        output_mask: which of the two gradients to compute.
        grad_gen_dtype: dtype of the first; None is that of ``v_shift``.

    Returns:
        ``(fake, correction, stats, grad_gen, grad_shift)``: the results of :func:`shifted_velocity_loss`, and the
        gradients for ``v_gen`` and ``v_shift`` of :func:`shifted_velocity_loss_backward`. One not asked for is an empty
        tensor of shape ``[0]``. Not differentiable. Moves 5N bytes (6N with ``v_uncond``), where forward and backward
        move 8N (10N).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, or an argument asks for a gradient.
    """
    return _ops.shifted_velocity_loss_with_gradients(
        weight_fake,
        weight_correction,
        v_shift,
        v_real,
        target,
        v_uncond=v_uncond,
        guidance_scale=guidance_scale,
        clip=clip,
        output_mask=output_mask,
        grad_gen_dtype=grad_gen_dtype,
    )


def mixed_velocity_loss(
    velocity: Tensor, x: Tensor, z: Tensor, *, v_fake: Tensor | None = None, mix_weight: float = 0.0
) -> Tensor:
    """``mean |F - [(1 - lambda) (z - x) + lambda sg(v_fake)]|^2`` per sample (Eq. 24 in velocity space, without its
    weight t(1-t)).

    ``mix_weight`` 0 is flow matching (Eq. 3).

    Args:
        velocity: F, ``[B, ...]``.
        x: data or latent.
        z: noise, dtype of ``x``.
        v_fake: velocity of the shifted branch at the same point; under a stop-gradient.
        mix_weight: lambda; other than 0 it needs ``v_fake``.

    Returns:
        ``[B]``, fp32 (fp64 if an input is). Differentiable in ``velocity``, ``x`` and ``z``. Moves 3N bytes forward
        and 4N backward (4N and 5N with ``v_fake``).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, or a mix without ``v_fake``.
    """
    return _ops.mixed_velocity_loss(velocity, x, z, v_fake=v_fake, mix_weight=mix_weight)


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
    """One step from time ``t`` to ``t_next``: Euler, re-noise or anything between.

    ``x_hat = x - t v``, ``z_hat = x + (1 - t) v``, ``x' = (1 - t') x_hat + t' (sqrt(1 - eta) z_hat + sqrt(eta)
    noise)``.

    Args:
        x: state at time ``t``, ``[B, ...]``.
        velocity: network's velocity there (under the condition).
        t, t_next: ``[B]``, fp32 or fp64.
        noise: fresh noise, needed where ``stochasticity`` > 0.
        v_uncond: velocity under the negative condition.
        guidance_scale: classifier-free guidance; other than 1 it needs ``v_uncond``.
        stochasticity: eta in [0, 1]; 0 is Euler, 1 replaces the noise altogether.

    Returns:
        Tensor like ``x``. Differentiable in ``x``, ``velocity``, ``v_uncond`` and ``noise``. Moves 3N bytes, and N
        for each of ``noise`` and ``v_uncond``.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, or an operand that a setting needs is missing.
    """
    return _ops.sampler_step(
        x,
        velocity,
        t,
        t_next,
        noise=noise,
        v_uncond=v_uncond,
        guidance_scale=guidance_scale,
        stochasticity=stochasticity,
    )


def condition_shift_rms_norm(
    condition: Tensor,
    scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    eps: float,
    *,
    mask: Tensor | None = None,
    stacked: bool = False,
    output_mask: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    """RMS norm of a condition and of the shifted condition ``scale * c + bias`` (APEX, arXiv 2604.12322, Eq. 9), which
    is never written.

    For networks that read their text through a norm first (Qwen-Image's ``txt_norm``).

    Args:
        condition: ``[..., D]``; fp32, bf16, fp16 or fp64.
        scale: ``[]`` or ``[D]``, any of the same dtypes.
        bias: ``[]`` or ``[D]``.
        weight: of the norm, ``[D]``.
        eps: of the norm, added to the mean square.
        mask: ``[...]`` (the condition without D), bool or number; where it is zero the shifted output is the real one.
        stacked: both branches in one tensor, for a network that is called once for both.
        output_mask: which of the two are made. One that is not is an empty tensor of shape ``[0]``.

    Returns:
        ``(normed, normed_shifted)``, like ``condition``; stacked: ``([2B, ..., D], [0])``, real branch first.
        Differentiable in ``condition``, ``scale``, ``bias`` and ``weight``; kept for backward are the inputs alone.

    Moves 3N bytes forward for both outputs (2N for one), where shift and two norms in separate passes move 6N, and
    backward 3N (2N) and N for the gradient of ``condition`` if it is wanted.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, a negative ``eps``, ``stacked`` with one output.
    """
    return _ops.condition_shift_rms_norm(
        condition, scale, bias, weight, eps, mask=mask, stacked=stacked, output_mask=output_mask
    )


def projected_condition_shift(
    projected: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_sums: Tensor,
    *,
    linear_bias: Tensor | None = None,
    mask: Tensor | None = None,
    stacked: bool = False,
    output_mask: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    """What a linear layer ``W, beta`` makes of a condition and of the shifted one, from one product ``W c``.

    ``W (a c + b) + beta = a (W c) + (b W 1 + beta)``, so the shifted condition (Eq. 9) is never written. For networks
    that read their text through a linear layer first (SANA's ``caption_projection``).

    Args:
        projected: ``W c``, ``[..., D]``, without ``beta``; fp32, bf16, fp16 or fp64.
        scale: a, one number ``[]``. A diagonal does not commute with W: shift the condition itself then.
        bias: b, one number ``[]``.
        row_sums: ``W 1``, ``[D]``: ``weight.sum(1)``.
        linear_bias: ``beta``, ``[D]``.
        mask: ``[...]`` (``projected`` without D), bool or number; where it is zero the shifted output is the real one.
        stacked, output_mask: as in :func:`condition_shift_rms_norm`.

    Returns:
        ``(real, shifted)``, like ``projected``; stacked: ``([2B, ..., D], [0])``, real branch first. Differentiable in
        all but ``mask``. Kept for backward are the small inputs, and ``projected`` only if ``scale`` is trained.

    Moves 3N bytes forward for both outputs (2N for one), and saves the second product; backward 3N (2N), and N more
    where ``scale`` is trained.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, a scale or bias per channel, ``stacked`` with one output.
    """
    return _ops.projected_condition_shift(
        projected,
        scale,
        bias,
        row_sums,
        linear_bias=linear_bias,
        mask=mask,
        stacked=stacked,
        output_mask=output_mask,
    )


def modulated_layer_norm(hidden: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm without parameters of its own, modulated per sample: ``(h - mean) / std * (1 + scale) + shift``.

    Args:
        hidden: ``[B, ..., D]``; fp32, bf16, fp16 or fp64.
        scale: ``[B, D]``, any of the same dtypes and any strides.
        shift: ``[B, D]``.
        eps: added to the variance.

    Returns:
        ``(out, mean, rstd)``: like ``hidden``, and twice ``[B, ...]`` in fp32 (fp64 for an fp64 hidden state), without
        gradient. Differentiable in ``hidden``, ``scale`` and ``shift``; kept for backward are the inputs and the row
        statistics.

    Moves 2N bytes forward and 3N backward.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, or a negative ``eps``.
    """
    return _ops.modulated_layer_norm(hidden, scale, shift, eps)


def velocity_head(
    hidden: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """The end of a diffusion transformer: :func:`modulated_layer_norm`, then the projection to a velocity.

    Kept for backward are ``hidden`` and its row statistics; the modulated state, which the gradient of ``weight``
    needs, is made anew. The matrix products are torch's.

    Args:
        hidden: ``[B, ..., D]``.
        scale, shift: ``[B, D]``.
        weight: ``[O, D]``, dtype of ``hidden``; as everywhere here, autocast casts nothing.
        bias: ``[O]``, dtype of ``hidden``, or None.
        eps: added to the variance.

    Returns:
        Velocity ``[B, ..., O]``, differentiable in everything. Keeps 1N bytes, where torch's own modules keep up to 3N
        (hidden, its norm for the gradient of ``scale``, the modulated state for that of ``weight``).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    return _ops.velocity_head(hidden, scale, shift, weight, bias, eps)[0]


__all__ = [
    "STATS",
    "condition_shift",
    "condition_shift_rms_norm",
    "interpolate",
    "mixed_velocity_loss",
    "modulated_layer_norm",
    "projected_condition_shift",
    "renoise",
    "sampler_step",
    "shifted_velocity_loss",
    "shifted_velocity_loss_backward",
    "shifted_velocity_loss_with_gradients",
    "velocity_head",
]
