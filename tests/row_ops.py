"""The ops that walk rows of channels, as a table, and how they are held to the truth.

They stand in for parts of a network, with parameters and settings that the sample ops of ops_cases.py do not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from ops_cases import BF16, F32, F64, Inputs, random_like_data
from ops_checks import Result, as_list, assert_fake_kernel_agrees, assert_same_bits, run
from torch import Tensor

from apex_fast import ops
from apex_fast.ops import reference

#: No rows, no channels, one channel, around one SIMD vector and one tile of 512, more rows than a partial sum holds.
ROW_SHAPES = [
    (0, 3, 5),
    (2, 0, 5),
    (1, 1, 1),
    (2, 3, 7),
    (2, 3, 15),
    (2, 3, 16),
    (1, 2, 511),
    (2, 2, 512),
    (1, 3, 513),
    (2, 5, 1100),
    (2, 130, 4500),
    (3, 401, 33),
    (2, 2, 3, 2, 5),
]


@dataclass(frozen=True)
class RowOp:
    """One op: ``rows`` [..., D] decides dtype and shape, ``parameters`` are functions of its shape."""

    name: str
    rows: str
    parameters: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]]
    outputs: tuple[str, ...]  # "rows", or "statistics" without a gradient
    plain: Callable[..., Any]
    variants: dict[str, Inputs]

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
    def differentiable(self) -> tuple[str, ...]:
        return (self.rows, *self.parameters)


def number(shape: tuple[int, ...]) -> tuple[int, ...]:
    return ()


def channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[-1:]


def per_sample(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[-1])


# ---- plain formulas, all tensors of one dtype


def _plain_norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    return values / (values.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _plain_branches(real: Tensor, shifted: Tensor, mask, stacked, output_mask) -> tuple[Tensor, Tensor]:
    if mask is not None:
        shifted = torch.where((mask != 0)[..., None], shifted, real)
    if stacked:
        return torch.cat([real, shifted]), real.new_empty(0)
    return tuple(v if wanted else v.new_empty(0) for v, wanted in zip((real, shifted), output_mask, strict=True))


def plain_condition_shift_rms_norm(
    condition, scale, bias, weight, eps, mask=None, stacked=False, output_mask=(True, True)
):
    real, shifted = _plain_norm(condition, weight, eps), _plain_norm(scale * condition + bias, weight, eps)
    return _plain_branches(real, shifted, mask, stacked, output_mask)


def plain_projected_condition_shift(
    projected, scale, bias, row_sums, linear_bias=None, mask=None, stacked=False, output_mask=(True, True)
):
    beta = 0 if linear_bias is None else linear_bias
    real, shifted = projected + beta, scale * projected + bias * row_sums + beta
    return _plain_branches(real, shifted, mask, stacked, output_mask)


def plain_modulated_layer_norm(hidden, scale, shift, eps):
    tokens = [1] * (hidden.dim() - 2)
    scale, shift = (v.reshape(v.shape[0], *tokens, v.shape[-1]) for v in (scale, shift))
    variance, mean = torch.var_mean(hidden.detach(), -1, correction=0)
    out = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=eps) * (1 + scale) + shift
    return out, mean, (variance + eps).rsqrt()


_BRANCHES = {
    "": {},
    "masked": {"mask": torch.bool},
    "shifted_only": {"output_mask": [False, True], "mask": torch.int64},
    "real_only": {"output_mask": [True, False]},
    "stacked": {"stacked": True},
    "stacked_masked": {"stacked": True, "mask": torch.bool},
}

CONDITION_SHIFT_RMS_NORM = RowOp(
    name="condition_shift_rms_norm",
    rows="condition",
    parameters={"scale": number, "bias": number, "weight": channels},
    outputs=("rows", "rows"),
    plain=plain_condition_shift_rms_norm,
    variants={
        **{name or "scalar": {"eps": 1e-6, **settings} for name, settings in _BRANCHES.items()},
        "diagonal": {"eps": 1e-2, "mask": torch.bool, "scale": channels, "bias": channels},
        "diagonal_bias": {"eps": 1e-6, "bias": channels},
        "diagonal_scale": {"eps": 1e-6, "scale": channels, "output_mask": [False, True]},
    },
)
PROJECTED_CONDITION_SHIFT = RowOp(
    name="projected_condition_shift",
    rows="projected",
    parameters={"scale": number, "bias": number, "row_sums": channels, "linear_bias": channels},
    outputs=("rows", "rows"),
    plain=plain_projected_condition_shift,
    variants={
        **{name or "both": settings for name, settings in _BRANCHES.items()},
        "no_bias": {"leave_out": "linear_bias", "mask": torch.bool},
    },
)
MODULATED_LAYER_NORM = RowOp(
    name="modulated_layer_norm",
    rows="hidden",
    parameters={"scale": per_sample, "shift": per_sample},
    outputs=("rows", "statistics", "statistics"),
    plain=plain_modulated_layer_norm,
    variants={"": {"eps": 1e-6}},
)

ROW_OPS = (CONDITION_SHIFT_RMS_NORM, PROJECTED_CONDITION_SHIFT, MODULATED_LAYER_NORM)


def make_row_inputs(
    op: RowOp,
    shape: tuple[int, ...] = (2, 3, 7),
    variant: str | None = None,
    *,
    dtype: torch.dtype = F32,
    parameters: torch.dtype | dict[str, torch.dtype] = F32,
) -> Inputs:
    """All arguments of ``op`` by name."""
    settings = dict(op.variants[next(iter(op.variants)) if variant is None else variant])
    left_out = settings.pop("leave_out", None)
    inputs: Inputs = {op.rows: random_like_data(shape, dtype, op.name, shape)}
    for name, size in op.parameters.items():
        size = settings.pop(name, size)
        if name != left_out:
            chosen = parameters if isinstance(parameters, torch.dtype) else parameters.get(name, F32)
            inputs[name] = random_like_data(size(shape), chosen, op.name, name, shape)
    if "mask" in settings:
        generator = torch.Generator().manual_seed(len(shape) + shape[-1])
        inputs["mask"] = (torch.rand(shape[:-1], generator=generator) < 0.6).to(settings.pop("mask"))
    return inputs | settings


def leaves_of(op: RowOp, inputs: Inputs) -> list[str]:
    """The inputs that some output of the call depends on."""
    names = [name for name in op.differentiable if name in inputs]
    if list(inputs.get("output_mask", [])) == [True, False]:
        return [name for name in names if name not in ("scale", "bias", "row_sums")]
    return names


def row_upstream(op: RowOp, inputs: Inputs) -> list[Tensor | None]:
    """Upstream gradients, neither one nor uniform; None where an output has none."""
    rows, stacked = inputs[op.rows], inputs.get("stacked", False)
    upstream: list[Tensor | None] = []
    for index, kind in enumerate(op.outputs):
        wanted = kind == "rows" and inputs.get("output_mask", [True, True])[min(index, 1)]
        if not wanted or (stacked and index == 1):
            upstream.append(None)
            continue
        shape = (2 * rows.shape[0], *rows.shape[1:]) if stacked else tuple(rows.shape)
        upstream.append(random_like_data(shape, rows.dtype, "upstream", op.name, index, shape))
    return upstream


# ---- the truth


def _bound(actual: Tensor, truth: Tensor, arithmetic: torch.dtype, typical: float) -> Tensor:
    """Half a unit in the last place of the stored dtype, and roundings of sums whose terms are ``typical`` in size."""
    stored = torch.finfo(actual.dtype)
    noise = 64 * torch.finfo(arithmetic).eps * max(truth.abs().max().item(), typical)
    return 0.5 * stored.eps * truth.abs() + stored.smallest_normal * stored.eps + noise


def assert_rows_close(actual: Tensor, truth: Tensor, arithmetic: torch.dtype, typical: float, what: str) -> None:
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.is_contiguous(), f"{what} is not contiguous"
    if actual.numel() == 0:
        return
    assert truth.isfinite().all(), f"{what}: the truth is not finite, the case tests nothing"
    error = (actual.double() - truth).abs()
    assert not error.isnan().any(), f"{what}: {int(error.isnan().sum())} of {error.numel()} elements are NaN"
    worst = (error - _bound(actual, truth, arithmetic, typical)).max().item()
    assert worst <= 0, f"{what}: beyond what is allowed by {worst:.3e}; largest error {error.max():.3e}"


def assert_rows_match_truth(op: RowOp, inputs: Inputs, function: Callable[..., Any] | None = None) -> Result:
    """The op, outputs and all gradients, against its float64 twin."""
    wanted, upstream = leaves_of(op, inputs), row_upstream(op, inputs)
    actual = run(function or op.public, inputs, wanted, upstream)
    truth = run(op.twin, inputs, wanted, upstream, cast=F64)
    rows = inputs[op.rows]
    arithmetic = F64 if rows.dtype == F64 else F32
    count = max(rows.numel() // max(rows.shape[-1], 1), 1)
    for index, (kind, output, expected) in enumerate(zip(op.outputs, actual.outputs, truth.outputs, strict=True)):
        what = f"{op.name} output {index}"
        assert output.dtype == (rows.dtype if kind == "rows" else arithmetic), f"{what}: {output.dtype}"
        assert_rows_close(output, expected, arithmetic, 1.0, what)
    assert set(actual.gradients) == set(truth.gradients) == set(wanted)
    for name, gradient in actual.gradients.items():
        assert gradient.dtype == inputs[name].dtype, f"gradient of {name}: {gradient.dtype}"
        # sums over rows, and where there is one number over channels: fp32 terms, of random sign
        terms = 1 if name == op.rows else rows.numel() if inputs[name].dim() == 0 else count
        assert_rows_close(gradient, truth.gradients[name], arithmetic, terms**0.5, f"{op.name} gradient of {name}")
    return actual


def assert_rows_within_twice_plain(
    op: RowOp, inputs: Inputs, half: torch.dtype, function: Callable[..., Any] | None = None
) -> None:
    """Outputs and gradients at most twice as wrong as the plain torch formula computed in ``half``."""
    wanted, upstream = leaves_of(op, inputs), row_upstream(op, inputs)
    actual = run(function or op.public, inputs, wanted, upstream)
    plain = run(op.plain, inputs, wanted, upstream, cast=half)
    truth = run(op.twin, inputs, wanted, upstream, cast=F64)
    pairs = list(zip(op.outputs, actual.outputs, plain.outputs, truth.outputs, strict=True))
    pairs += [(n, actual.gradients[n], plain.gradients[n], truth.gradients[n]) for n in wanted]
    for what, value, approximate, expected in pairs:
        if expected.numel() == 0:
            continue
        ours, theirs = ((v.double() - expected).abs().max().item() for v in (value, approximate))
        allowed = 2 * theirs + 1e-6 * expected.abs().max().item()
        assert ours <= allowed, f"{op.name} {what}: error {ours:.3e}, the plain formula in {half} has {theirs:.3e}"


def backward_row_inputs(op: RowOp, inputs: Inputs, output_mask: Iterable[bool] | None = None) -> Inputs:
    """Arguments of ``<op>_backward`` for the inputs of a forward call."""
    upstream = row_upstream(op, inputs)
    wanted = leaves_of(op, inputs)
    mask = [name in wanted for name in op.differentiable] if output_mask is None else list(output_mask)
    if op is MODULATED_LAYER_NORM:
        _, mean, rstd = op.public(**inputs)
        return {
            "grad": upstream[0],
            "hidden": inputs["hidden"],
            "scale": inputs["scale"],
            "mean": mean,
            "rstd": rstd,
            "shift_dtype": inputs["shift"].dtype,
            "output_mask": mask,
        }
    rest = {name: value for name, value in inputs.items() if name not in ("output_mask", "linear_bias")}
    if op is PROJECTED_CONDITION_SHIFT:
        rest["linear_bias_dtype"] = inputs.get("linear_bias", inputs["row_sums"]).dtype
        names = ("grad_real", "grad_shifted")
    else:
        names = ("grad_normed", "grad_shifted")
    return dict(zip(names, upstream, strict=True)) | rest | {"output_mask": mask}


def rows_on(device: str, values: Inputs) -> Inputs:
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in values.items()}


def check_row_backward(
    op: RowOp, variant: str, shape: tuple[int, ...] = (2, 67, 33), device: str = "cpu", **options: Any
) -> None:
    """``<op>_backward``: through autograd to the bit, one gradient alone, its fake kernel, its twin's shapes."""
    inputs = rows_on(device, make_row_inputs(op, shape, variant, **options))
    arguments = rows_on(device, backward_row_inputs(op, inputs))
    gradients = as_list(op.backward(**arguments))
    upstream = [None if g is None else g.to(device) for g in row_upstream(op, inputs)]
    through_autograd = run(op.public, inputs, leaves_of(op, inputs), upstream).gradients
    for name, wanted, gradient in zip(op.differentiable, arguments["output_mask"], gradients, strict=True):
        assert (gradient.shape == (0,)) == (not wanted), f"{op.name}: gradient of {name}"
        if wanted:
            assert_same_bits([through_autograd[name]], [gradient], f"{op.name}: {name} through autograd")
    for index, name in enumerate(op.differentiable):
        alone = [i == index and wanted for i, wanted in enumerate(arguments["output_mask"])]
        partial = as_list(op.backward(**arguments | {"output_mask": alone}))
        if alone[index]:
            assert_same_bits([partial[index]], [gradients[index]], f"{op.name}: only {name}")
        for other in (op.backward_twin(**arguments | {"output_mask": alone}),):
            assert [(g.shape, g.dtype) for g in as_list(other)] == [(g.shape, g.dtype) for g in partial]
        assert_fake_kernel_agrees(op.backward, arguments | {"output_mask": alone}, partial, f"{op.name}, only {name}")


def check_row_dispatch(op: RowOp, variant: str) -> None:
    """Torch's own checks of both ops: schema, autograd registration, fake tensors, tracing with dynamic shapes."""
    for dtype in (F32, BF16):
        inputs = make_row_inputs(op, (3, 5, 7), variant, dtype=dtype)
        torch.library.opcheck(op.backward, (), backward_row_inputs(op, inputs))
        for name in leaves_of(op, inputs):
            inputs[name].requires_grad_()
        torch.library.opcheck(op.dispatcher, (), inputs)


def check_row_gradients(op: RowOp, variant: str) -> None:
    """gradcheck in fp64."""
    inputs = make_row_inputs(op, (2, 3, 5), variant, dtype=F64, parameters=F64)
    names = leaves_of(op, inputs)
    leaves = [inputs.pop(name).requires_grad_() for name in names]

    def outputs(*values: Tensor) -> list[Tensor]:
        results = as_list(op.public(**dict(zip(names, values, strict=True)), **inputs))
        return [r for r, kind in zip(results, op.outputs, strict=True) if kind == "rows" and r.numel()]

    assert torch.autograd.gradcheck(outputs, leaves)


def check_all_row_ops() -> None:
    """Every op and its gradients in every variant, over tiles and tails."""
    for op in ROW_OPS:
        for variant in op.variants:
            for dtype in (F32, F64, BF16):
                for shape in ((2, 5, 7), (2, 67, 1043)):
                    assert_rows_match_truth(op, make_row_inputs(op, shape, variant, dtype=dtype))
