"""How the tests hold an op to the truth: its float64 twin, the plain formula in half precision, and counted bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ops_cases import (
    BF16,
    CONDITION_SHIFT,
    DENSE_LAYOUTS,
    F16,
    F32,
    F64,
    GRADIENT_ORDER,
    LAYOUT_SHAPE,
    LAYOUTS,
    OP_VARIANTS,
    SHIFTED_VELOCITY_LOSS_WITH_GRADIENTS,
    Inputs,
    Op,
    backward_inputs,
    make_inputs,
    upstream_for,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode

from apex_fast.ops import registration

# ---- running


@dataclass
class Result:
    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def as_list(outputs: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def run(
    function: Callable[..., Any],
    inputs: Inputs,
    wanted: Iterable[str] = (),
    upstream: list[Tensor | None] | None = None,
    cast: torch.dtype | None = None,
) -> Result:
    """Call ``function``, with the gradients of those ``wanted`` inputs that are there.

    ``cast`` is the dtype for all float tensors; None leaves them.
    """
    arguments: Inputs = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.detach()
            if value.is_floating_point() and cast:
                value = value.to(cast)
            if name in wanted:
                value.requires_grad_()
        arguments[name] = value
    outputs = as_list(function(**arguments))
    leaves = [name for name in wanted if isinstance(arguments.get(name), Tensor)]
    if not leaves:
        return Result([o.detach() for o in outputs], {})
    used = [
        (output, grad.to(output.dtype))
        for output, grad in zip(outputs, upstream or [], strict=True)
        if grad is not None and output.requires_grad
    ]
    found = torch.autograd.grad(
        [output for output, _ in used], [arguments[n] for n in leaves], [grad for _, grad in used], allow_unused=True
    )
    gradients = {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
    return Result([o.detach() for o in outputs], gradients)


# ---- bounds


def computes_in(inputs: Inputs, op: Op) -> torch.dtype:
    """The dtype of the op's arithmetic: fp64 as soon as a sample tensor is."""
    names = (*op.velocities, *op.states)
    return F64 if any(inputs.get(n) is not None and inputs[n].dtype == F64 for n in names) else F32


def assert_rounded_once(actual: Tensor, truth: Tensor, arithmetic: torch.dtype, typical: float, what: str) -> None:
    """Error at most half a unit in the last place of the stored dtype and a few roundings of the arithmetic.

    ``typical`` is the size of the terms that are summed, against which the arithmetic's own rounding counts.
    """
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if actual.numel() == 0:
        return
    assert truth.isfinite().all(), f"{what}: the truth is not finite, the case tests nothing"
    stored = torch.finfo(actual.dtype)
    amplitude = max(truth.abs().max().item(), typical)
    noise = 16 * torch.finfo(arithmetic).eps * amplitude
    bound = 0.5 * stored.eps * truth.abs() + stored.smallest_normal * stored.eps + noise
    error = (actual.double() - truth).abs()
    assert not error.isnan().any(), f"{what}: {int(error.isnan().sum())} of {error.numel()} elements are NaN"
    worst = (error / bound).argmax()
    assert (error <= bound).all(), (
        f"{what}: error {error.flatten()[worst]:.3e} where {bound.flatten()[worst]:.3e} is allowed, "
        f"at element {int(worst)} of {tuple(actual.shape)}: {actual.flatten()[worst]} for {truth.flatten()[worst]}"
    )


def assert_losses_close(actual: Tensor, truth: Tensor, arithmetic: torch.dtype, what: str) -> None:
    assert actual.shape == truth.shape and actual.dtype == arithmetic, f"{what}: {actual.shape}, {actual.dtype}"
    assert truth.isfinite().all(), f"{what}: the truth is not finite, the case tests nothing"
    rtol = 2e-6 if arithmetic == F32 else 1e-13
    # a difference of two velocities cancels, which one-element samples do not average away
    torch.testing.assert_close(actual.double(), truth, rtol=rtol, atol=0.1 * rtol, msg=lambda text: f"{what}: {text}")


def assert_stats_close(actual: Tensor, truth: Tensor, arithmetic: torch.dtype, n: int, what: str) -> None:
    assert actual.shape == truth.shape and actual.dtype == arithmetic, f"{what}: {actual.shape}, {actual.dtype}"
    rtol = 2e-6 if arithmetic == F32 else 1e-13
    # an inner product cancels: its error counts against the norms of its factors
    slack = torch.full_like(truth, 0.1 * rtol * n)
    slack[:, 3] += rtol * (truth[:, 4] * truth[:, 5]).sqrt()
    # one element that lies on the clip within rounding may count either way
    slack[:, 2] += 1.01 / max(n, 1) if arithmetic == F32 else 0
    error = (actual.double() - truth).abs()
    bound = rtol * truth.abs() + slack
    assert (error <= bound).all(), f"{what}: stats {actual.tolist()}, expected {truth.tolist()}"


def elements_per_sample(op: Op, inputs: Inputs) -> int:
    primary = inputs[op.primary]
    return primary[0].numel() if primary.shape[0] else 0


def assert_matches_truth(
    op: Op, inputs: Inputs, function: Callable[..., Any] | None = None, gradients: bool = True
) -> Result:
    """The op, outputs and all gradients, against its float64 twin: rounded once, nothing else."""
    wanted = [n for n in op.differentiable if inputs.get(n) is not None] if gradients else []
    upstream = upstream_for(op, inputs)
    actual = run(function or op.public, inputs, wanted, upstream)
    truth = run(op.twin, inputs, wanted, upstream, cast=F64)
    arithmetic, n = computes_in(inputs, op), elements_per_sample(op, inputs)
    for index, (kind, output, expected) in enumerate(zip(op.outputs, actual.outputs, truth.outputs, strict=True)):
        what = f"{op.name} output {index}"
        if kind == "sample":
            assert output.dtype == inputs[op.primary].dtype, f"{what}: {output.dtype}"
            assert_rounded_once(output, expected, arithmetic, 1.0, what)
        elif kind == "loss":
            assert_losses_close(output, expected, arithmetic, what)
        else:
            assert_stats_close(output, expected, arithmetic, n, what)
    assert set(actual.gradients) == set(truth.gradients) == set(wanted)
    for name, gradient in actual.gradients.items():
        assert gradient.dtype == inputs[name].dtype, f"gradient of {name}: {gradient.dtype}"
        typical = 2.0 / max(n, 1) if op.is_loss else 1.0
        exact = arithmetic
        if op is CONDITION_SHIFT and name != "condition":
            exact, typical = F64, float(max(inputs["condition"].numel(), 1))  # a sum over all tokens, formed in fp64
        assert_rounded_once(gradient, truth.gradients[name], exact, typical, f"{op.name} gradient of {name}")
    return actual


def assert_within_twice_plain(
    op: Op, inputs: Inputs, half: torch.dtype, function: Callable[..., Any] | None = None
) -> None:
    """Outputs and gradients at most twice as wrong as the plain torch formula computed in ``half``."""
    wanted = [n for n in op.differentiable if inputs.get(n) is not None]
    upstream = upstream_for(op, inputs)
    actual = run(function or op.public, inputs, wanted, upstream)
    plain = run(op.plain, inputs, wanted, upstream, cast=half)
    truth = run(op.twin, inputs, wanted, upstream, cast=F64)

    def error(value: Tensor, expected: Tensor) -> float:
        return (value.double() - expected).abs().max().item()

    assert wanted and len(truth.gradients) == len(wanted)
    pairs = list(zip(op.outputs, actual.outputs, plain.outputs, truth.outputs, strict=True))
    pairs += [(n, actual.gradients[n], plain.gradients[n], truth.gradients[n]) for n in wanted]
    for what, value, approximate, expected in pairs:
        if what == "stats":
            continue  # sums of thousands of squares overflow half precision: no yardstick
        ours, theirs = error(value, expected), error(approximate, expected)
        allowed = 2 * theirs + 1e-6 * expected.abs().max().item()
        assert ours <= allowed, f"{op.name} {what}: error {ours:.3e}, the plain formula in {half} has {theirs:.3e}"


def assert_same_bits(first: Iterable[Tensor], second: Iterable[Tensor], what: str) -> None:
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        assert same, f"{what}: result {index} differs"


# ---- layouts, fake kernels and memory


def assert_same_metadata(actual: Iterable[Tensor], expected: Iterable[Tensor], what: str) -> None:
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{what} {index}: {a.shape} {a.dtype}, not {b.shape} {b.dtype}"
        if a.numel() > 0:
            assert a.stride() == b.stride(), f"{what} {index}: strides {a.stride()}, not {b.stride()}"


def assert_fake_kernel_agrees(
    call: Callable[..., Any], arguments: Inputs, results: Iterable[Tensor], what: str
) -> None:
    """The fake kernel, which compilers believe, gives the shapes, dtypes and strides of the ``results``."""
    mode = FakeTensorMode()
    fake = {n: mode.from_tensor(v.detach()) if isinstance(v, Tensor) else v for n, v in arguments.items()}
    with mode:
        made = as_list(call(**fake))
    assert_same_metadata(made, results, f"fake kernel of {what}")


def allocated_bytes(call: Callable[[], object]) -> int:
    """Bytes that torch's CPU allocator hands out during ``call``, freed again or not."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    del kept
    events = profile.profiler.kineto_results.events()
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


def bytes_of(*tensors: Tensor | None) -> int:
    """Bytes of dense tensors of these shapes; an expanded one counts in full."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def check_layout(op: Op, layout: str, variant: str, **dtypes: torch.dtype) -> None:
    """All operands in ``layout``, only the one that decides, or only the others: same numbers, layout of empty_like."""
    names = (*op.velocities, *op.states)
    arrangements = {
        "all": dict.fromkeys(names, layout),
        "first": {op.primary: layout},
        "others": {name: layout for name in names if name != op.primary},
    }
    for arrangement, layouts in arrangements.items():
        what = f"{op.name} {variant}, {layout} for {arrangement}"
        inputs = make_inputs(op, LAYOUT_SHAPE, variant, layout=layouts, **dtypes)
        result = assert_matches_truth(op, inputs)
        primary = inputs[op.primary]
        samples = [o for o, kind in zip(result.outputs, op.outputs, strict=True) if kind == "sample"]
        assert_same_metadata(samples, [torch.empty_like(primary)] * len(samples), what)
        assert_fake_kernel_agrees(op.dispatcher, inputs, result.outputs, what)
        if arrangement == "all" and layout in DENSE_LAYOUTS:
            with torch.no_grad():
                extra = allocated_bytes(lambda inputs=inputs: op.public(**inputs)) - bytes_of(*result.outputs)
            assert extra == 0, f"{what}: {extra} bytes beside the outputs, so something was copied"


def check_mixed_layouts(op: Op, variant: str) -> None:
    """Every operand in a layout of its own."""
    names = [n for n in (*op.velocities, *op.states)]
    for shift in range(0, len(LAYOUTS), 2):
        chosen = {name: list(LAYOUTS)[(shift + 3 * i) % len(LAYOUTS)] for i, name in enumerate(names)}
        assert_matches_truth(op, make_inputs(op, LAYOUT_SHAPE, variant, layout=chosen))


def check_backward_op(
    op: Op, variant: str, layout: str = "contiguous", shape: tuple[int, ...] = LAYOUT_SHAPE, **dtypes: torch.dtype
) -> None:
    """``<op>_backward`` against its float64 twin, the op's autograd, and itself with fewer gradients asked for."""
    inputs = make_inputs(op, shape, variant, layout=layout, **dtypes)
    upstream = upstream_for(op, inputs)
    sample = op.outputs[0] == "sample"
    if sample:
        upstream = [LAYOUTS[layout](grad) for grad in upstream]
    arguments = backward_inputs(op, inputs, upstream)
    gradients = as_list(op.backward(**arguments))
    what = f"{op.name}_backward {variant} {layout}"
    exact = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments.items()}
    exact |= {n: F64 for n, v in arguments.items() if n.endswith("_dtype") and v is not None}
    truth = as_list(op.backward_twin(**exact))
    order = GRADIENT_ORDER[op.name]
    mask = arguments.get("output_mask", [True])
    n = elements_per_sample(op, inputs)
    through_autograd = run(op.public, inputs, order, upstream).gradients
    like = upstream[0] if sample else inputs[op.primary]
    for name, wanted, gradient, expected in zip(order, mask, gradients, truth, strict=True):
        if not wanted:
            assert gradient.shape == (0,), f"{what}: {name} was not asked for and has shape {tuple(gradient.shape)}"
            continue
        arithmetic, typical = computes_in(inputs, op), 2.0 / max(n, 1) if op.is_loss else 1.0
        if op is CONDITION_SHIFT and name != "condition":
            arithmetic, typical = F64, float(inputs["condition"].numel())
        elif op is not CONDITION_SHIFT:
            dtype = gradient.dtype if inputs.get(name) is None else inputs[name].dtype
            assert_same_metadata([gradient], [torch.empty_like(like, dtype=dtype)], f"{what}: gradient of {name}")
        assert_rounded_once(gradient, expected, arithmetic, typical, f"{what}: gradient of {name}")
        if inputs.get(name) is not None:
            assert_same_bits([through_autograd[name]], [gradient], f"{what}: gradient of {name} through autograd")
    assert_fake_kernel_agrees(op.backward, arguments, gradients, what)
    if "output_mask" not in arguments:
        return
    for index, name in enumerate(order):
        alone = [i == index and mask[i] for i in range(len(order))]
        partial = as_list(op.backward(**arguments | {"output_mask": alone}))
        assert [g.shape == (0,) for g in partial] == [not wanted for wanted in alone], f"{what}: only {name}"
        if alone[index]:
            assert_same_bits([partial[index]], [gradients[index]], f"{what}: only {name}")
        assert_fake_kernel_agrees(op.backward, arguments | {"output_mask": alone}, partial, f"{what}, only {name}")
        twins = as_list(op.backward_twin(**arguments | {"output_mask": alone}))
        assert_same_metadata(twins, partial, f"twin of {what}, only {name}")


# ---- refusals and formulas


def assert_refused(call: Callable[..., Any], inputs: Inputs, message: str) -> None:
    """The kernel refuses the arguments, and so, in the same words, does the twin that runs where there is no kernel."""
    with pytest.raises(RuntimeError, match=message):
        call(**inputs)
    asks_for_gradient = any(isinstance(v, torch.Tensor) and v.requires_grad for v in inputs.values())
    if not asks_for_gradient:  # that is refused above the kernels, for all devices at once
        name = getattr(call, "__name__", None) or call._qualified_op_name.split("::")[1]
        with pytest.raises(RuntimeError, match=message):
            registration._fallback(name.split("::")[-1], "reference")(**inputs)


def assert_twin_is_the_formula(op: Op, variant: str) -> None:
    """The twin, on which all else rests, against the formula written anew: outputs and autograd, in fp64."""
    inputs = make_inputs(op, (4, 3, 5), variant, velocity=F64, state=F64, time=F64)
    upstream = upstream_for(op, inputs)
    twin, plain = (run(f, inputs, op.differentiable, upstream) for f in (op.twin, op.plain))
    torch.testing.assert_close(twin.outputs, plain.outputs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(twin.gradients, plain.gradients, rtol=1e-12, atol=1e-13)


# ---- everything at once, for other processes and other instruction sets


def check_all_ops() -> None:
    """Every op and its gradients in every variant, over tiles and tails, in place and permuted."""
    one_pass = SHIFTED_VELOCITY_LOSS_WITH_GRADIENTS
    for op, variant in (*OP_VARIANTS, *((one_pass, variant) for variant in one_pass.variants)):
        for velocity, state in ((F32, F32), (F64, F64), (BF16, F32), (F16, F16)):
            for shape, layout in (
                ((2, 1043), "contiguous"),
                ((2, 3, 5, 7), "channels_last"),
                ((3, 5, 9), "batch_innermost"),
            ):
                assert_matches_truth(op, make_inputs(op, shape, variant, velocity=velocity, state=state, layout=layout))


def peak_memory_growth(call: Callable[[], object]) -> int:
    """By how many bytes the resident memory of the process rises at most during ``call``."""

    def resident(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    # Memory that was freed but is still held would be handed out again without a trace.
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    except OSError as error:
        pytest.skip(f"the peak of resident memory cannot be set back here: {error}")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before
