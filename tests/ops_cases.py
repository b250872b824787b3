"""The ops as tables: operands in every dtype, size and layout, and formulas written independently of the twins.

An op is described once (``OPS``) and gets its arguments from ``make_inputs``; ops_checks.py holds it to the truth.
Everything is passed by keyword, so the tables also check that the ops, the twins and the schemas agree on names.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apex_fast import ops
from apex_fast.ops import reference

Inputs = dict[str, Any]

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
FLOATS = (F32, F64, F16, BF16)
HALVES = (F16, BF16)

#: velocity dtype x state dtype, every pair that the ops allow
DTYPE_PAIRS = [(v, s) for v in FLOATS for s in (F32, F64, *([v] if v in HALVES else []))]

#: A sample is cut into pieces of this many elements (csrc/cpu/kernels.h), and these into tiles of 512.
CHUNK = 16384

#: Empty, single, odd, around one SIMD vector, tile and chunk, more chunks than one, many samples, many dimensions.
SIZES = [
    (0,),
    (1,),
    (5,),
    (0, 3),
    (3, 0),
    (2, 0, 4),
    (4, 1),
    (3, 7),
    (2, 15),
    (2, 16),
    (2, 17),
    (3, 511),
    (2, 512),
    (2, 513),
    (2, CHUNK - 1),
    (2, CHUNK),
    (2, CHUNK + 1),
    (3, 2 * CHUNK + 77),
    (1, 5 * CHUNK),
    (700, 3),
    (2, 4, 256, 256),
    (2, 3, 4, 5),
    (2, 1, 3, 1, 2, 3, 2),
]

# ---- layouts


def _in_memory_order(tensor: Tensor, order: Iterable[int]) -> Tensor:
    """The same values, the dimensions lying in memory in ``order``, slowest first."""
    order = list(order)
    inverse = [order.index(d) for d in range(len(order))]
    return tensor.permute(order).contiguous().permute(inverse)


def _inside_nan(tensor: Tensor, shape: list[int], index: tuple[slice, ...]) -> Tensor:
    """The same values as a view of a larger tensor that is NaN all around."""
    larger = torch.full(shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
    larger[index] = tensor
    return larger[index]


def _batch_slice(tensor: Tensor) -> Tensor:
    return _inside_nan(tensor, [2 * tensor.shape[0] + 1, *tensor.shape[1:]], (slice(1, None, 2),))


def _offset_by_one(tensor: Tensor) -> Tensor:
    flat = _inside_nan(tensor.reshape(-1), [tensor.numel() + 2], (slice(1, -1),))
    return flat.view(tensor.shape)


def _channel_slice(tensor: Tensor) -> Tensor:
    return _inside_nan(
        tensor, [tensor.shape[0], 2 * tensor.shape[1] + 1, *tensor.shape[2:]], (slice(None), slice(1, -1, 2))
    )


def _every_second_column(tensor: Tensor) -> Tensor:
    return _inside_nan(tensor, [*tensor.shape[:-1], 2 * tensor.shape[-1]], (..., slice(None, None, 2)))


def _slice_of_moved_batch(tensor: Tensor) -> Tensor:
    moved = tensor.transpose(0, 1)
    larger = [moved.shape[0], 2 * moved.shape[1], *moved.shape[2:]]
    return _inside_nan(moved, larger, (slice(None), slice(0, moved.shape[1]))).transpose(0, 1)


def _dims(tensor: Tensor) -> list[int]:
    return list(range(tensor.dim()))


#: Layouts of [B, C, H, W] that the ops read and write in place.
DENSE_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": lambda t: _in_memory_order(t, [0, *_dims(t)[2:], 1]),
    "width_before_height": lambda t: _in_memory_order(t, [0, *reversed(_dims(t)[1:])]),
    "batch_in_the_middle": lambda t: _in_memory_order(t, [1, 0, *_dims(t)[2:]]),
    "batch_before_last": lambda t: _in_memory_order(t, [*_dims(t)[1:-1], 0, t.dim() - 1]),
    "batch_innermost": lambda t: _in_memory_order(t, [*_dims(t)[1:], 0]),
    "batch_slice": _batch_slice,
    "channels_last_batch_slice": lambda t: _batch_slice(t.movedim(1, -1)).movedim(-1, 1),
    "batch_expanded": lambda t: t[:1].contiguous().expand_as(t),
    "offset_by_one": _offset_by_one,
}
#: Layouts that cost one copy.
COPIED_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channel_slice": _channel_slice,
    "every_second_column": _every_second_column,
    "expanded_channels": lambda t: t[:, :1].contiguous().expand_as(t),
    "slice_of_moved_batch": _slice_of_moved_batch,
}
LAYOUTS = DENSE_LAYOUTS | COPIED_LAYOUTS

#: Two pieces of unequal length per sample, no dimension a multiple of a SIMD vector.
LAYOUT_SHAPE = (3, 17, 31, 33)

# ---- plain formulas, written from the paper and not from the twins; all tensors of one dtype


def _column(times: Tensor, like: Tensor) -> Tensor:
    return times.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def _sample_mean(values: Tensor) -> Tensor:
    if values.numel() == 0:
        return values.new_zeros(values.shape[0])
    return values.reshape(values.shape[0], -1).mean(1)


def _sample_sum(values: Tensor) -> Tensor:
    return values.reshape(values.shape[0], -1).sum(1) if values.numel() else values.new_zeros(values.shape[0])


def _guide(conditional: Tensor, unconditional: Tensor | None, scale: float) -> Tensor:
    return conditional if unconditional is None else scale * conditional + (1 - scale) * unconditional


def plain_condition_shift(condition, scale, bias, mask=None):
    shifted = condition * scale + bias
    return shifted if mask is None else torch.where((mask != 0)[..., None], shifted, condition)


def plain_interpolate(x, z, t):
    t = _column(t, x)
    return (1 - t) * x + t * z


def plain_renoise(velocity, x_s, s, z, t):
    x_fake = x_s - _column(s, x_s) * velocity
    return plain_interpolate(x_fake, z, t), z - x_fake


def plain_shifted_velocity_loss(v_gen, v_shift, v_real, target, v_uncond=None, guidance_scale=1.0, clip=1.0):
    guided = _guide(v_real, v_uncond, guidance_scale).detach()
    dv = v_shift.detach() - guided
    limit = float("inf") if clip is None else clip
    clamped = dv.clamp(-limit, limit)
    if v_gen is None:
        correction = _sample_mean(clamped**2)
    else:
        correction = _sample_mean((v_gen - (v_gen - clamped).detach()) ** 2)
    shift, goal = v_shift.detach(), target.detach()
    stats = [
        _sample_sum(dv**2),
        _sample_sum(clamped**2),
        _sample_mean((dv.abs() > limit).to(dv.dtype)),
        _sample_sum(shift * v_real.detach()),
        _sample_sum(shift**2),
        _sample_sum(v_real.detach() ** 2),
        _sample_mean((guided - goal).abs()),
    ]
    return _sample_mean((v_shift - target) ** 2), correction, torch.stack(stats, 1)


def plain_shifted_velocity_loss_with_gradients(weight_fake, weight_correction, v_shift, v_real, target, **settings):
    """The gradients through autograd."""
    v_gen, leaf = torch.zeros_like(v_shift, requires_grad=True), v_shift.detach().requires_grad_()
    with torch.enable_grad():
        fake, correction, stats = plain_shifted_velocity_loss(v_gen, leaf, v_real, target, **settings)
        total = (weight_fake.to(fake.dtype) * fake + weight_correction.to(fake.dtype) * correction).sum()
        grad_gen, grad_shift = torch.autograd.grad(total, [v_gen, leaf])
    return fake.detach(), correction.detach(), stats, grad_gen, grad_shift


def plain_mixed_velocity_loss(velocity, x, z, v_fake=None, mix_weight=0.0):
    target = (1 - mix_weight) * (z - x)
    if v_fake is not None:
        target = target + mix_weight * v_fake.detach()
    return _sample_mean((velocity - target) ** 2)


def plain_sampler_step(x, velocity, t, t_next, noise=None, v_uncond=None, guidance_scale=1.0, stochasticity=0.0):
    v = _guide(velocity, v_uncond, guidance_scale)
    t, t_next = _column(t, x), _column(t_next, x)
    x_hat, z_hat = x - t * v, x + (1 - t) * v
    noised = (1 - stochasticity) ** 0.5 * z_hat
    if noise is not None:
        noised = noised + stochasticity**0.5 * noise
    return (1 - t_next) * x_hat + t_next * noised


# ---- the ops


@dataclass(frozen=True)
class Op:
    """One op: which of its operands are what, and the settings under which it is tested."""

    name: str
    primary: str  # decides the layout of the outputs
    velocities: tuple[str, ...]  # [B, ...], any float dtype
    states: tuple[str, ...]  # [B, ...], fp32, fp64 or the velocity's half dtype
    times: tuple[str, ...]  # [B]
    differentiable: tuple[str, ...]
    outputs: tuple[str, ...]  # "sample" [B, ...], "loss" [B] or "stats" [B, 7]
    plain: Callable[..., Any]
    # name -> settings; an operand named in `leave_out` is not passed
    variants: dict[str, Inputs] = field(default_factory=lambda: {"": {}})

    @property
    def public(self) -> Callable[..., Any]:
        return getattr(ops, self.name)

    @property
    def twin(self) -> Callable[..., Any]:
        return getattr(reference, self.name)

    @property
    def dispatcher(self) -> Any:
        return getattr(torch.ops.apex_fast, self.name).default

    @property
    def backward(self) -> Any:
        return getattr(torch.ops.apex_fast, f"{self.name}_backward").default

    @property
    def backward_twin(self) -> Callable[..., Any]:
        return getattr(reference, f"{self.name}_backward")

    @property
    def is_loss(self) -> bool:
        return "loss" in self.outputs


CONDITION_SHIFT = Op(
    name="condition_shift",
    primary="condition",
    velocities=("condition",),
    states=(),
    times=(),
    differentiable=("condition", "scale", "bias"),
    outputs=("sample",),
    plain=plain_condition_shift,
    variants={
        "scalar": {"scale": (), "bias": ()},
        "diagonal": {"scale": ("D",), "bias": ("D",)},
        "scalar_scale_masked": {"scale": (), "bias": ("D",), "mask": torch.bool},
        "scalar_bias_masked": {"scale": ("D",), "bias": (), "mask": torch.int64},
    },
)
INTERPOLATE = Op(
    name="interpolate",
    primary="x",
    velocities=(),
    states=("x", "z"),
    times=("t",),
    differentiable=("x", "z"),
    outputs=("sample",),
    plain=plain_interpolate,
)
RENOISE = Op(
    name="renoise",
    primary="x_s",
    velocities=("velocity",),
    states=("x_s", "z"),
    times=("s", "t"),
    differentiable=("velocity",),
    outputs=("sample", "sample"),
    plain=plain_renoise,
)
SHIFTED_VELOCITY_LOSS = Op(
    name="shifted_velocity_loss",
    primary="v_shift",
    velocities=("v_gen", "v_shift", "v_real", "v_uncond"),
    states=("target",),
    times=(),
    differentiable=("v_gen", "v_shift", "target"),
    outputs=("loss", "loss", "stats"),
    plain=plain_shifted_velocity_loss,
    variants={
        "plain": {"leave_out": ("v_uncond",), "clip": 0.9},
        "guided": {"guidance_scale": 2.5, "clip": 1.5},
        "unclipped": {"leave_out": ("v_uncond",), "clip": None},
        "no_generator": {"leave_out": ("v_gen",), "guidance_scale": 0.5, "clip": 0.3},
    },
)
MIXED_VELOCITY_LOSS = Op(
    name="mixed_velocity_loss",
    primary="velocity",
    velocities=("velocity", "v_fake"),
    states=("x", "z"),
    times=(),
    differentiable=("velocity", "x", "z"),
    outputs=("loss",),
    plain=plain_mixed_velocity_loss,
    variants={"flow_matching": {"leave_out": ("v_fake",)}, "mixed": {"mix_weight": 0.3}},
)
SAMPLER_STEP = Op(
    name="sampler_step",
    primary="x",
    velocities=("velocity", "v_uncond"),
    states=("x", "noise"),
    times=("t", "t_next"),
    differentiable=("x", "velocity", "noise", "v_uncond"),
    outputs=("sample",),
    plain=plain_sampler_step,
    variants={
        "euler": {"leave_out": ("noise", "v_uncond")},
        "between": {"leave_out": ("v_uncond",), "stochasticity": 0.36},
        "guided_euler": {"leave_out": ("noise",), "guidance_scale": 2.5},
        "guided_renoise": {"guidance_scale": 2.5, "stochasticity": 1.0},
    },
)

#: Forward and backward of SHIFTED_VELOCITY_LOSS in one; it has no backward op of its own and is not among OPS.
SHIFTED_VELOCITY_LOSS_WITH_GRADIENTS = Op(
    name="shifted_velocity_loss_with_gradients",
    primary="v_shift",
    velocities=("v_shift", "v_real", "v_uncond"),
    states=("target",),
    times=("weight_fake", "weight_correction"),
    differentiable=(),
    outputs=("loss", "loss", "stats", "sample", "sample"),
    plain=plain_shifted_velocity_loss_with_gradients,
    variants={
        "plain": {"leave_out": ("v_uncond",), "clip": 0.9},
        "guided": {"guidance_scale": 2.5, "clip": 1.5},
        "unclipped": {"leave_out": ("v_uncond",), "clip": None},
    },
)

OPS = (CONDITION_SHIFT, INTERPOLATE, RENOISE, SHIFTED_VELOCITY_LOSS, MIXED_VELOCITY_LOSS, SAMPLER_STEP)
OP_VARIANTS = [(op, variant) for op in OPS for variant in op.variants]
OP_VARIANT_IDS = [f"{op.name}-{variant}" if variant else op.name for op, variant in OP_VARIANTS]

# ---- operands


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def random_like_data(shape: Iterable[int], dtype: torch.dtype, *key: object) -> Tensor:
    """Normal numbers, the same for the same key, made in fp64 and rounded to ``dtype``."""
    return torch.randn(tuple(shape), dtype=F64, generator=_generator(*key)).to(dtype)


def random_times(batch: int, dtype: torch.dtype, *key: object) -> Tensor:
    """Times in (0, 1), among them 0.999, 0 and 1 where the batch is large enough."""
    times = 0.02 + 0.96 * torch.rand(batch, dtype=F64, generator=_generator(*key))
    for index, value in ((1, 0.999), (3, 0.0), (4, 1.0)):
        if batch > index:
            times[index] = value
    return times.to(dtype)


def make_inputs(
    op: Op,
    shape: tuple[int, ...],
    variant: str | None = None,
    *,
    velocity: torch.dtype = F32,
    state: torch.dtype | None = None,
    time: torch.dtype = F32,
    layout: str | dict[str, str] = "contiguous",
    dtypes: dict[str, torch.dtype] | None = None,
    seed: int = 0,
) -> Inputs:
    """All arguments of ``op`` by name.

    ``state`` None is the velocity's dtype. ``layout`` names one of ``LAYOUTS`` for all operands, or one per operand.
    ``dtypes`` overrides single operands.
    """
    settings = dict(op.variants[variant or next(iter(op.variants))])
    left_out = settings.pop("leave_out", ())
    inputs: Inputs = {}
    for name in (*op.velocities, *op.states):
        if name in left_out:
            if name == "v_gen":
                inputs[name] = None  # has no default
            continue
        dtype = velocity if name in op.velocities else (state or velocity)
        value = random_like_data(shape, (dtypes or {}).get(name, dtype), op.name, name, shape, seed)
        how = layout if isinstance(layout, str) else layout.get(name, "contiguous")
        inputs[name] = value if how == "contiguous" else LAYOUTS[how](value)
    for name in op.times:
        inputs[name] = random_times(shape[0], (dtypes or {}).get(name, time), op.name, name, seed)
    if op is CONDITION_SHIFT:
        for name in ("scale", "bias"):
            size = [shape[-1] if d == "D" else d for d in settings.pop(name)]
            inputs[name] = random_like_data(size, (dtypes or {}).get(name, state or F32), op.name, name, shape, seed)
        if "mask" in settings:
            inputs["mask"] = (torch.rand(shape[:-1], generator=_generator(shape, seed)) < 0.6).to(settings.pop("mask"))
    return inputs | settings


def backward_inputs(
    op: Op, inputs: Inputs, upstream: list[Tensor | None], output_mask: Iterable[bool] | None = None
) -> Inputs:
    """Arguments of ``<op>_backward`` for the inputs of a forward call and its upstream gradients."""
    mask = [True] * len(op.differentiable) if output_mask is None else list(output_mask)
    if op is CONDITION_SHIFT:
        return {"grad": upstream[0], **inputs, "output_mask": mask}
    if op is INTERPOLATE:
        return {"grad": upstream[0], "t": inputs["t"], "output_mask": mask}
    if op is RENOISE:
        return {
            "grad_x_fake_t": upstream[0],
            "grad_target": upstream[1],
            "s": inputs["s"],
            "t": inputs["t"],
            "velocity_dtype": inputs["velocity"].dtype,
        }
    if op is SHIFTED_VELOCITY_LOSS:
        rest = {name: value for name, value in inputs.items() if name != "v_gen"}
        return {"grad_fake": upstream[0], "grad_correction": upstream[1], **rest, "output_mask": mask}
    if op is MIXED_VELOCITY_LOSS:
        return {"grad": upstream[0], **inputs, "output_mask": mask}
    return {
        "grad": upstream[0],
        "t": inputs["t"],
        "t_next": inputs["t_next"],
        "guidance_scale": inputs.get("guidance_scale", 1.0),
        "stochasticity": inputs.get("stochasticity", 0.0),
        "guided": "v_uncond" in inputs,
        "velocity_dtype": inputs["velocity"].dtype,
        "uncond_dtype": inputs["v_uncond"].dtype if "v_uncond" in inputs else None,
        "noise_dtype": inputs["noise"].dtype if "noise" in inputs else None,
        # the op's order is x, velocity, v_uncond, noise; without an operand there is no gradient for it
        "output_mask": [m and n in inputs for m, n in zip(mask, ("x", "velocity", "v_uncond", "noise"), strict=True)],
    }


#: Operands in the order in which ``<op>_backward`` returns their gradients.
GRADIENT_ORDER = {op.name: op.differentiable for op in OPS} | {"sampler_step": ("x", "velocity", "v_uncond", "noise")}


def upstream_for(op: Op, inputs: Inputs) -> list[Tensor | None]:
    """Upstream gradients, neither one nor uniform, in the dtype and layout of the outputs; None for ``stats``."""
    primary = inputs[op.primary]
    upstream: list[Tensor | None] = []
    for index, kind in enumerate(op.outputs):
        if kind == "stats":
            upstream.append(None)
            continue
        wide = any(isinstance(v, Tensor) and v.dtype == F64 and n not in op.times for n, v in inputs.items())
        shape = primary.shape if kind == "sample" else primary.shape[:1]
        dtype = primary.dtype if kind == "sample" else (F64 if wide else F32)
        upstream.append(random_like_data(shape, dtype, "upstream", op.name, index, tuple(shape)))
    return upstream
