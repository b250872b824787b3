"""The cases of the ops suite: operands, the bytes that an op must move, and the formula that it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apex_fast import ops
from apex_fast.ops import reference

from . import plain_torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("forward", "forward_backward")

Results = tuple[Tensor, ...]
Function = Callable[..., Any]

#: Width of the text embeddings in the condition cases, and their tokens at training size: SANA's.
TEXT_WIDTH, TEXT_TOKENS = 2304, 300

#: Width of the hidden state in the case of a final norm, and its tokens: a quarter of Qwen-Image's at 1024 pixels.
HIDDEN_WIDTH, HIDDEN_TOKENS = 3072, 1024

_TIMES = ("s", "t", "t_next")


@dataclass(frozen=True)
class Case:
    """An op with its settings.

    Attributes:
        op: name in ``apex_fast.ops``.
        variant: what distinguishes it from the op's other cases.
        operands: tensors that the op takes.
        forward_reads: those that it must read forward.
        backward_reads: those that it must read again backward, beside the gradients of its results.
        gradients: those that get a gradient in ``forward_backward``.
        parameters: operands without a batch, whose gradients are sums over it.
        shape: ``latent`` [B, C, h, w], ``text`` [B, tokens, D] or ``hidden`` [B, tokens, D].
        settings: numbers that the op takes.
        formula: the same in plain torch.
        results: how many of the op's results are compared; all by default.
    """

    op: str
    operands: tuple[str, ...]
    forward_reads: tuple[str, ...]
    backward_reads: tuple[str, ...]
    gradients: tuple[str, ...]
    formula: Function
    variant: str = ""
    settings: dict[str, float] = field(default_factory=dict)
    results: int | None = None
    parameters: tuple[str, ...] = ()
    shape: str = "latent"

    @property
    def modes(self) -> tuple[str, ...]:
        """An op that returns its gradients has no backward."""
        return MODES if self.gradients else MODES[:1]

    @property
    def name(self) -> str:
        return f"{self.op}[{self.variant}]" if self.variant else self.op

    def fused(self, **arguments: Any) -> Results:
        return _tuple(getattr(ops, self.op)(**arguments))[: self.results]

    def plain(self, **arguments: Any) -> Results:
        return _tuple(self.formula(**arguments))

    def truth(self, **arguments: Any) -> Results:
        return _tuple(getattr(reference, self.op)(**arguments))[: self.results]


def _tuple(results: Tensor | Iterable[Tensor]) -> Results:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _shifted(variant: str, guided: bool, formula: Function, results: int | None = None) -> Case:
    reads = ("v_shift", "v_real", "target") + (("v_uncond",) if guided else ())
    return Case(
        "shifted_velocity_loss",
        ("v_gen", *reads),
        forward_reads=reads,  # v_gen's values are never read
        backward_reads=reads,
        gradients=("v_gen", "v_shift"),
        formula=formula,
        variant=variant,
        settings={"guidance_scale": 4.5 if guided else 1.0, "clip": 1.0},
        results=results,
    )


def _mixed(variant: str, mixed: bool) -> Case:
    reads = ("velocity", "x", "z") + (("v_fake",) if mixed else ())
    return Case(
        "mixed_velocity_loss",
        reads,
        forward_reads=reads,
        backward_reads=reads,
        gradients=("velocity",),
        formula=plain_torch.mixed_velocity_loss,
        variant=variant,
        settings={"mix_weight": 0.5} if mixed else {},
    )


def _sampler(variant: str, extra: tuple[str, ...], gradients: tuple[str, ...], settings: dict[str, float]) -> Case:
    reads = ("x", "velocity", "t", "t_next", *extra)
    return Case(
        "sampler_step",
        reads,
        forward_reads=reads,
        backward_reads=("t", "t_next"),
        gradients=gradients,
        formula=plain_torch.sampler_step,
        variant=variant,
        settings=settings,
    )


def _condition(variant: str, operands: tuple[str, ...], gradients: tuple[str, ...]) -> Case:
    return Case(
        "condition_shift",
        operands,
        forward_reads=operands,
        backward_reads=operands,
        gradients=gradients,
        formula=plain_torch.condition_shift,
        variant=variant,
        parameters=("scale", "bias"),
        shape="text",
    )


def _with_gradients(variant: str, guided: bool) -> Case:
    reads = ("v_shift", "v_real", "target", *(("v_uncond",) if guided else ()), "weight_fake", "weight_correction")
    return Case(
        "shifted_velocity_loss_with_gradients",
        reads,
        forward_reads=reads,
        backward_reads=(),
        gradients=(),
        formula=plain_torch.shifted_velocity_loss_with_gradients,
        variant=variant,
        settings={"guidance_scale": 4.5 if guided else 1.0, "clip": 1.0},
    )


CASES = (
    # a trainable scalar shift on a frozen text encoder's output, and a trainable diagonal one on a trained encoder's
    _condition("scalar", ("condition", "scale", "bias"), ("scale", "bias")),
    _condition("diagonal,mask", ("condition", "scale", "bias", "mask"), ("condition", "scale", "bias")),
    Case(
        "interpolate",
        ("x", "z", "t"),
        forward_reads=("x", "z", "t"),
        backward_reads=("t",),
        gradients=("x",),
        formula=plain_torch.interpolate,
    ),
    Case(
        "renoise",
        ("velocity", "x_s", "s", "z", "t"),
        forward_reads=("velocity", "x_s", "s", "z", "t"),
        backward_reads=("s", "t"),
        gradients=("velocity",),
        formula=plain_torch.renoise,
    ),
    _shifted("", False, plain_torch.shifted_velocity_loss),
    _shifted("v_uncond", True, plain_torch.shifted_velocity_loss),
    # The op cannot leave its statistics out. Who does without them compares with this.
    _shifted("without stats", False, plain_torch.shifted_velocity_losses, results=2),
    _with_gradients("", False),
    _with_gradients("v_uncond", True),
    _mixed("", False),
    _mixed("v_fake", True),
    # Euler's gradient to x is the gradient it was given: plain torch hands that on as it is and has nothing to compute.
    _sampler("", (), ("velocity",), {}),
    _sampler("guided,noised", ("noise", "v_uncond"), ("x", "velocity"), {"guidance_scale": 4.5, "stochasticity": 0.5}),
    # Rows of a text path and of a velocity head. What they save inside a network: suites/fusions.py.
    Case(
        "condition_shift_rms_norm",
        ("condition", "scale", "bias", "weight"),
        forward_reads=("condition", "scale", "bias", "weight"),
        backward_reads=("condition", "scale", "bias", "weight"),
        gradients=("scale", "bias", "weight"),
        formula=plain_torch.condition_shift_rms_norm,
        settings={"eps": 1e-6},
        parameters=("scale", "bias", "weight"),
        shape="text",
    ),
    Case(
        "projected_condition_shift",
        ("projected", "scale", "bias", "row_sums", "linear_bias"),
        forward_reads=("projected", "scale", "bias", "row_sums", "linear_bias"),
        backward_reads=("scale", "bias"),
        gradients=("projected", "row_sums", "linear_bias"),
        formula=plain_torch.projected_condition_shift,
        parameters=("scale", "bias", "row_sums", "linear_bias"),
        shape="text",
    ),
    Case(
        "modulated_layer_norm",
        ("hidden", "scale", "shift"),
        forward_reads=("hidden", "scale", "shift"),
        backward_reads=("hidden", "scale"),
        gradients=("hidden", "scale", "shift"),
        formula=plain_torch.modulated_layer_norm,
        settings={"eps": 1e-6},
        results=1,
        shape="hidden",
    ),
)


# ---- tensors


def shape_of(case: Case, tensor_bytes: int | None, dtype: torch.dtype, tiny: bool) -> list[int]:
    """Shape of a case's large tensors: of ``tensor_bytes`` each, or with None the size that is met in training."""
    rows = case.shape != "latent"
    scale = 2 if tensor_bytes else 1
    if tiny:
        return [2, 7 * scale, 64] if rows else [2, 4 * scale, 16, 16]
    text = case.shape == "text"
    batch, tokens, width = (8, TEXT_TOKENS, TEXT_WIDTH) if text else (2, HIDDEN_TOKENS, HIDDEN_WIDTH)
    if tensor_bytes is None:
        return [batch, tokens, width] if rows else [8, 16, 128, 128]
    elements = tensor_bytes // dtype.itemsize
    return [batch, elements // (batch * width), width] if rows else [8, 16, elements // (8 * 16 * 512), 512]


def make_operands(
    case: Case, shape: list[int], dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> dict[str, Tensor]:
    """Operands of a case. Times, weights of losses and the parameters of the shift are fp32, as in training; the rest
    is ``dtype``. The numbers are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    width = shape[-1]

    def around(centre: float, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator) * 0.1 + centre

    def near(centre: Tensor | float, spread: float) -> Tensor:
        return (torch.randn(shape, generator=generator).mul_(spread) + centre).to(dtype)

    made: dict[str, Tensor] = {}
    data = near(0.0, 1.0)
    for name in case.operands:
        if name in _TIMES:
            made[name] = torch.rand(shape[0], generator=generator)
        elif name in ("weight_fake", "weight_correction"):
            made[name] = (torch.rand(shape[0], generator=generator) + 0.5) * _per_element(shape)
        elif name in ("scale", "bias") and name in case.parameters:
            centre = {"scale": -1.0, "bias": 0.5}[name]
            made[name] = around(centre, width) if "diagonal" in case.variant else torch.tensor(centre)
        elif name in ("weight", "linear_bias"):
            made[name] = around(1.0, width).to(dtype)
        elif name == "row_sums":
            made[name] = around(1.0, width)
        elif name in ("scale", "shift"):
            made[name] = around(0.5, shape[0], width).to(dtype)
        elif name == "mask":
            made[name] = torch.rand(shape[:-1], generator=generator) < 0.75
        elif name in ("condition", "projected"):
            made[name] = near(0.5, 1.0)
        else:
            # Velocities around a common one, so that the clip at 1 acts on some elements and not on most.
            made[name] = near(data, 0.6)
    return {name: tensor.to(device).requires_grad_(name in case.gradients) for name, tensor in made.items()}


def _per_element(shape: list[int]) -> float:
    """A weight of a mean per sample that makes the gradients of its elements about 1."""
    return torch.Size(shape).numel() / shape[0] / 2


def make_upstream(results: Results, shape: list[int], seed: int = 1) -> list[Tensor | None]:
    """Gradients of the results, scaled so that those of the operands are far from the limits of every dtype.

    None for ``stats``, the only result with two dimensions [B, 7], which has no gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    elements = torch.Size(shape).numel()
    upstream: list[Tensor | None] = []
    for result in results:
        if result.shape == (shape[0], 7):
            upstream.append(None)
            continue
        scale = _per_element(shape) if result.dim() == 1 else 4 * elements**-0.5
        values = (torch.rand(result.shape, generator=generator) + 0.5) * scale
        upstream.append(values.to(result.device, result.dtype))
    return upstream


def run(function: Function, case: Case, operands: dict[str, Tensor], upstream: list[Tensor | None] | None) -> Results:
    """Results of ``function``; with ``upstream`` the gradients of the operands behind them."""
    if upstream is None:
        with torch.no_grad():
            return function(**operands, **case.settings)
    results = function(**operands, **case.settings)
    pairs = [(result, g) for result, g in zip(results, upstream, strict=True) if g is not None]
    inputs = [operands[name] for name in case.gradients]
    return *(r.detach() for r in results), *torch.autograd.grad([r for r, _ in pairs], inputs, [g for _, g in pairs])


# ---- bytes


def minimum_bytes(
    case: Case, operands: dict[str, Tensor], results: Results, upstream: list[Tensor | None] | None
) -> int:
    """Every input and output of each pass once. ``results`` are those of :func:`run`: gradients behind outputs."""
    moved = sum(operands[name].nbytes for name in case.forward_reads) + sum(r.nbytes for r in results)
    if upstream is not None:
        moved += sum(operands[name].nbytes for name in case.backward_reads)
        moved += sum(g.nbytes for g in upstream if g is not None)
    return moved


# ---- truth

#: Largest error of a result, relative to its largest value. Rounding to the dtype takes half a unit of its last place
#: (2^-9 in bf16, 2^-12 in fp16) of it, and an intermediate rounding in the plain formula about as much again.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def disagreements(
    case: Case,
    operands: dict[str, Tensor],
    upstream: list[Tensor | None] | None,
    candidates: dict[str, Results],
) -> dict[str, str]:
    """Which of ``candidates`` differ from the op's fp64 twin, and how.

    The twin runs sample by sample, since its fp64 copies of a large problem would not fit a small machine. Gradients
    of parameters, which have no batch, are sums over the samples.
    """
    first = next(iter(candidates.values()))
    dtype = operands[_velocity_of(case)].dtype
    outputs = len(first) - (len(case.gradients) if upstream else 0)
    summed = [k for k in range(outputs, len(first)) if case.gradients[k - outputs] in case.parameters]
    sums: dict[int, Tensor] = {}
    largest = [0.0] * len(first)
    errors = {name: [0.0] * len(first) for name in candidates}

    def compare(k: int, truth: Tensor, b: int | None) -> None:
        if truth.numel() == 0:
            return
        largest[k] = max(largest[k], truth.abs().max().item())
        for name, results in candidates.items():
            value = (results[k] if b is None else results[k][b : b + 1]).double()
            error = (value - truth).abs().max().item() if value.shape == truth.shape else float("inf")
            # a NaN is the largest error, and max() would drop it
            errors[name][k] = max(errors[name][k], error if error == error else float("inf"))

    for b in range(first[0].shape[0]):
        sample = {
            name: _double(t if name in case.parameters else t[b : b + 1], name in case.gradients)
            for name, t in operands.items()
        }
        slices = None if upstream is None else [None if g is None else g[b : b + 1].double() for g in upstream]
        for k, truth in enumerate(run(case.truth, case, sample, slices)):
            if k in summed:
                sums[k] = sums[k] + truth if k in sums else truth
            else:
                compare(k, truth, b)
    for k, truth in sums.items():
        compare(k, truth, None)

    found = {}
    for name, results in candidates.items():
        for k, error in enumerate(errors[name]):
            what = f"result {k}" if k < outputs else f"gradient of {case.gradients[k - outputs]}"
            if results[k].dtype != first[k].dtype:
                found[name] = f"{what} is {results[k].dtype}, the first provider's is {first[k].dtype}"
            elif error > TOLERANCE[dtype] * largest[k]:
                found[name] = (
                    f"{what} is off by {error:.3g}, its largest value being {largest[k]:.3g}"
                    f" (allowed: {TOLERANCE[dtype]:g} of that)"
                )
    return found


def _velocity_of(case: Case) -> str:
    """An operand with the dtype of the case."""
    return next(name for name in case.operands if name not in (*_TIMES, *case.parameters))


def _double(tensor: Tensor, gradient: bool) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(gradient)
