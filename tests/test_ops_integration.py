"""What holds for every op: registration, derivatives, modes, memory and determinism."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ops_cases import (
    BF16,
    CHUNK,
    CONDITION_SHIFT,
    F32,
    F64,
    MIXED_VELOCITY_LOSS,
    OP_VARIANT_IDS,
    OP_VARIANTS,
    OPS,
    SHIFTED_VELOCITY_LOSS,
    Inputs,
    Op,
    backward_inputs,
    make_inputs,
    upstream_for,
)
from ops_checks import (
    allocated_bytes,
    as_list,
    assert_same_bits,
    bytes_of,
    peak_memory_growth,
    run,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import apex_fast
from apex_fast import ops
from apex_fast.ops import registration

pytestmark = pytest.mark.usefixtures("one_thread")

every_op = pytest.mark.parametrize(("op", "variant"), OP_VARIANTS, ids=OP_VARIANT_IDS)
LOSSES = (SHIFTED_VELOCITY_LOSS, MIXED_VELOCITY_LOSS)


def wanted_of(op: Op, inputs: Inputs) -> list[str]:
    return [n for n in op.differentiable if inputs.get(n) is not None]


# ---- registration


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_ops_and_twins_have_the_same_arguments(op: Op) -> None:
    """Names, order and defaults of schema, twin, fake kernel and (forward) public function."""
    for name in (op.name, f"{op.name}_backward"):
        schema = getattr(torch.ops.apex_fast, name).default._schema
        functions = [getattr(registration.reference, name), getattr(registration, f"_fake_{name}")]
        functions += [getattr(ops, name)] if name in ops.__all__ else []
        for function in functions:
            signature = inspect.signature(function)
            assert list(signature.parameters) == [a.name for a in schema.arguments], function
            for argument in schema.arguments:
                parameter = signature.parameters[argument.name]
                assert (parameter.kind == parameter.KEYWORD_ONLY) == argument.kwarg_only, (function, argument.name)
                if argument.has_default_value():
                    default = argument.default_value
                    same = (
                        list(parameter.default) == default
                        if isinstance(default, list)
                        else parameter.default == default
                    )
                    assert same, (function, argument.name)
                else:
                    assert parameter.default is parameter.empty, (function, argument.name)


@every_op
def test_opcheck(op: Op, variant: str) -> None:
    """Torch's own checks: schema, autograd registration, fake tensors, ahead-of-time tracing with dynamic shapes."""
    for dtypes in ({"velocity": F32}, {"velocity": BF16, "state": F32}):
        inputs = make_inputs(op, (3, 5, 7), variant, **dtypes)
        for name in wanted_of(op, inputs):
            inputs[name].requires_grad_()
        torch.library.opcheck(op.dispatcher, (), inputs)


@every_op
def test_opcheck_of_backward(op: Op, variant: str) -> None:
    inputs = make_inputs(op, (3, 5, 7), variant, velocity=BF16, state=F32)
    torch.library.opcheck(op.backward, (), backward_inputs(op, inputs, upstream_for(op, inputs)))


class Calls(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.name()] += 1
        return func(*args, **(kwargs or {}))


@every_op
def test_forward_and_backward_are_one_op_each(op: Op, variant: str) -> None:
    """Nothing beside them: no upcast, no clone, no elementwise op."""
    inputs = make_inputs(op, (3, 40), variant, velocity=BF16, state=F32)
    upstream = upstream_for(op, inputs)
    leaves = [inputs[n].requires_grad_() for n in wanted_of(op, inputs)]
    with Calls() as calls:
        outputs = [o for o in as_list(op.public(**inputs)) if o.requires_grad]
        torch.autograd.grad(
            outputs, leaves, upstream[: len(outputs)] if len(outputs) > 1 else upstream[:1], allow_unused=True
        )
    allowed = {"aten::detach", "aten::zeros_like", "aten::view_as", "aten::alias"}
    beside = {n: c for n, c in calls.names.items() if n not in allowed and not n.startswith("apex_fast::")}
    assert calls.names[f"apex_fast::{op.name}"] == calls.names[f"apex_fast::{op.name}_backward"] == 1
    assert not beside, beside


# ---- derivatives


def second_derivative_inputs(op: Op, variant: str) -> tuple[list[Tensor], list[Tensor]]:
    inputs = make_inputs(op, (3, 5), variant, velocity=F64, state=F64)
    leaves = [inputs[n].requires_grad_() for n in wanted_of(op, inputs)]
    outputs = [o for o in as_list(op.public(**inputs)) if o.requires_grad]
    return leaves, outputs


@every_op
def test_second_derivative_is_refused_when_it_is_used(op: Op, variant: str) -> None:
    leaves, outputs = second_derivative_inputs(op, variant)
    seeds = [torch.ones_like(o, requires_grad=True) for o in outputs]
    first = torch.autograd.grad(outputs, leaves, seeds, create_graph=True)
    assert all(g.requires_grad for g in first)
    message = f"apex_fast::{op.name} cannot be differentiated a second time: .*apex_fast.ops.reference"
    with pytest.raises(RuntimeError, match=message):
        sum(g.square().sum() for g in first).backward()


@every_op
def test_forward_mode_is_refused(op: Op, variant: str) -> None:
    """Rather than a tangent of zero without a word."""
    inputs = make_inputs(op, (3, 5), variant)
    for name in wanted_of(op, inputs):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
            with pytest.raises(RuntimeError, match=f"{op.name}: forward-mode derivatives are not implemented; use"):
                op.public(**inputs | {name: dual})


@every_op
def test_backward_through_a_freed_graph_is_refused(op: Op, variant: str) -> None:
    _, outputs = second_derivative_inputs(op, variant)
    total = sum(o.sum() for o in outputs)
    total.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


@every_op
def test_backward_twice_through_a_kept_graph_doubles(op: Op, variant: str) -> None:
    leaves, outputs = second_derivative_inputs(op, variant)
    total = sum((o * 3).sum() for o in outputs)
    total.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    total.backward()
    assert_same_bits([leaf.grad for leaf in leaves], [2 * g for g in first], op.name)


def mask_bytes(inputs: Inputs) -> int:
    """A mask that is not bool becomes one byte per token, by comparison with a zero."""
    mask = inputs.get("mask")
    return 0 if mask is None or mask.dtype == torch.bool else mask.numel() + mask.element_size()


# ---- modes


@every_op
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_gradients(mode: Callable[[], object], op: Op, variant: str) -> None:
    inputs = make_inputs(op, (3, 40), variant, velocity=BF16, state=F32)
    expected = as_list(op.public(**inputs))
    for name in wanted_of(op, inputs):
        inputs[name].requires_grad_()
    with mode():
        outputs = as_list(op.public(**inputs))
        twice = as_list(op.public(**inputs | {op.primary: outputs[0]})) if op.outputs[0] == "sample" else []
    assert not any(o.requires_grad for o in [*outputs, *twice])
    assert_same_bits(outputs, expected, op.name)


@every_op
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint(reentrant: bool, op: Op, variant: str) -> None:
    inputs = make_inputs(op, (3, 40), variant, velocity=BF16, state=F32)
    upstream = upstream_for(op, inputs)
    wanted = wanted_of(op, inputs)
    plain = run(op.public, inputs, wanted, upstream)
    leaves = [inputs[n].requires_grad_() for n in wanted]

    def forward(*values: Tensor) -> object:
        return op.public(**inputs | dict(zip(wanted, values, strict=True)))

    outputs = as_list(checkpoint(forward, *leaves, use_reentrant=reentrant))
    used = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad and g is not None]
    torch.autograd.backward([o for o, _ in used], [g for _, g in used])
    assert_same_bits([o.detach() for o in outputs], plain.outputs, "outputs")
    assert_same_bits([leaf.grad for leaf in leaves], plain.gradients.values(), "gradients")


@every_op
@pytest.mark.parametrize("dtype", (BF16, F32))
def test_autocast_casts_nothing(dtype: torch.dtype, op: Op, variant: str) -> None:
    inputs = make_inputs(op, (3, 40), variant, velocity=dtype, state=F32)
    upstream, wanted = upstream_for(op, inputs), wanted_of(op, inputs)
    plain = run(op.public, inputs, wanted, upstream)
    with torch.autocast("cpu", BF16):
        result = run(op.public, inputs, wanted, upstream)
        with torch.no_grad():
            extra = allocated_bytes(lambda: op.public(**inputs)) - bytes_of(*result.outputs)
    assert extra == mask_bytes(inputs)
    assert_same_bits(result.outputs, plain.outputs, "outputs")
    assert_same_bits(result.gradients.values(), plain.gradients.values(), "gradients")


@every_op
@pytest.mark.parametrize("shape", ((0, 3, 4), (2, 0, 4)), ids=str)
def test_an_empty_batch_goes_forward_and_backward(shape: tuple[int, ...], op: Op, variant: str) -> None:
    inputs = make_inputs(op, shape, variant, velocity=BF16, state=F32)
    result = run(op.public, inputs, wanted_of(op, inputs), upstream_for(op, inputs))
    assert {n: g.shape for n, g in result.gradients.items()} == {n: inputs[n].shape for n in wanted_of(op, inputs)}
    assert all(g.isfinite().all() for g in [*result.gradients.values(), *result.outputs])


# ---- memory

#: 16 MiB in fp32
LARGE = (4, 16, 256, 256)


def summed_in_fp64(op: Op, names: list[str], gradients: list[Tensor]) -> int:
    """Bytes of the fp64 sums that the parameters of condition_shift have before they are rounded."""
    pairs = zip(names, gradients, strict=True)
    return sum(8 * g.numel() for n, g in pairs if op is CONDITION_SHIFT and n != "condition" and g.dtype != F64)


@pytest.mark.parametrize("dtypes", ({"velocity": F32}, {"velocity": BF16}, {"velocity": BF16, "state": F32}), ids=str)
@every_op
def test_every_byte_is_an_output(op: Op, variant: str, dtypes: dict[str, torch.dtype]) -> None:
    """Forward allocates its outputs, which for a loss is O(B), and backward the gradients that are asked for."""
    inputs = make_inputs(op, (3, 5, CHUNK), variant, **dtypes)
    upstream, wanted = upstream_for(op, inputs), wanted_of(op, inputs)
    leaves = [inputs[n].requires_grad_() for n in wanted]
    graph: list[Tensor] = []
    forward = allocated_bytes(lambda: graph.extend(as_list(op.public(**inputs))))
    assert forward == bytes_of(*graph) + mask_bytes(inputs)
    if op.is_loss:
        assert bytes_of(*graph) <= 3 * 9 * 8
    used = [(o, g) for o, g in zip(graph, upstream, strict=True) if o.requires_grad and g is not None]
    gradients: list[Tensor] = []
    backward = allocated_bytes(
        lambda: gradients.extend(torch.autograd.grad([o for o, _ in used], leaves, [g for _, g in used]))
    )
    sums = summed_in_fp64(op, wanted, gradients)
    # zeros [B] stand in for the upstream gradient of a loss that nobody asked about
    zeros = 4 * 3 if op is SHIFTED_VELOCITY_LOSS and len(used) == 1 else 0
    assert backward == bytes_of(*gradients) + mask_bytes(inputs) + sums + zeros


@every_op
def test_a_gradient_that_nobody_asks_for_is_not_made(op: Op, variant: str) -> None:
    inputs = make_inputs(op, (3, 5, CHUNK), variant, velocity=BF16, state=F32)
    upstream = upstream_for(op, inputs)
    for name in wanted_of(op, inputs):
        fresh = {n: v.detach() if isinstance(v, Tensor) else v for n, v in inputs.items()}
        leaf = fresh[name].requires_grad_()
        outputs = [(o, g) for o, g in zip(as_list(op.public(**fresh)), upstream, strict=True) if o.requires_grad]
        gradients: list[Tensor] = []
        allocated = allocated_bytes(
            lambda outputs=outputs, leaf=leaf, gradients=gradients: gradients.extend(
                torch.autograd.grad([o for o, _ in outputs], [leaf], [g for _, g in outputs])
            )
        )
        # zeros [B] stand in for the upstream gradient of a loss that does not lead to this input
        zeros = 4 * 3 if op is SHIFTED_VELOCITY_LOSS else 0
        expected = bytes_of(*gradients) + mask_bytes(inputs) + summed_in_fp64(op, [name], gradients) + zeros
        assert allocated == expected, f"gradient of {name}: {allocated} bytes, not {expected}"


@pytest.mark.parametrize("used", (0, 1))
def test_a_loss_that_is_not_used_makes_no_gradient(used: int) -> None:
    inputs = make_inputs(SHIFTED_VELOCITY_LOSS, (3, 5 * CHUNK), "guided")
    upstream = upstream_for(SHIFTED_VELOCITY_LOSS, inputs)
    leaves = [inputs[n].requires_grad_() for n in SHIFTED_VELOCITY_LOSS.differentiable]
    output = ops.shifted_velocity_loss(**inputs)[used]
    gradients: list[Tensor | None] = []
    allocated = allocated_bytes(
        lambda: gradients.extend(torch.autograd.grad(output, leaves, upstream[used], allow_unused=True))
    )
    assert [g is not None for g in gradients] == [used == 1, used == 0, used == 0]
    assert allocated == bytes_of(*gradients) + 4 * 3


@pytest.mark.parametrize("op", LOSSES, ids=lambda op: op.name)
@pytest.mark.parametrize("dtypes", ({"velocity": F32}, {"velocity": BF16, "state": F32}), ids=str)
def test_resident_memory_of_the_losses(op: Op, dtypes: dict[str, torch.dtype]) -> None:
    """The same by the kernel's account of the process, which no hidden buffer escapes, from whichever allocator."""
    inputs = make_inputs(op, LARGE, list(op.variants)[1], **dtypes)
    one = min(bytes_of(inputs[n]) for n in (*op.velocities, *op.states))
    upstream = upstream_for(op, inputs)
    arguments = backward_inputs(op, inputs, upstream)
    kept: list[object] = [op.public(**inputs), op.backward(**arguments)]  # the first call may load and set up

    def forward() -> None:
        kept.append(op.public(**inputs))

    def backward() -> None:
        kept.append(op.backward(**arguments))

    assert peak_memory_growth(lambda: torch.ones(LARGE)) > 0.9 * 16 * 2**20, "the measurement sees nothing"
    assert peak_memory_growth(forward) < 0.1 * one
    grown = peak_memory_growth(backward) - bytes_of(*kept[-1])
    assert grown < 0.1 * one


# ---- determinism


@pytest.mark.parametrize(
    ("dtypes", "layout"),
    [
        ({"velocity": F32}, "contiguous"),
        ({"velocity": BF16, "state": F32}, "contiguous"),
        ({"velocity": BF16, "state": F32}, "batch_innermost"),
    ],
    ids=str,
)
def test_repeats_bit_for_bit_on_any_number_of_threads(
    dtypes: dict[str, torch.dtype], layout: str, set_threads: Callable[[int], None]
) -> None:
    for op, variant in OP_VARIANTS:
        # several pieces of work per sample, and of the condition's rows
        shape = (2, 66, 4100) if op is CONDITION_SHIFT else (3, 7, 7001)
        inputs = make_inputs(op, shape, variant, layout=layout, **dtypes)
        upstream = upstream_for(op, inputs)
        results = []
        for threads in (1, 1, 2, 3):
            set_threads(threads)
            result = run(op.public, inputs, wanted_of(op, inputs), upstream)
            results.append([*result.outputs, *result.gradients.values()])
            assert_same_bits(results[-1], results[0], f"{op.name} {variant} on {threads} threads")


def test_kernels_are_parallel() -> None:
    """Compiled without OpenMP, at::parallel_for is serial without a word."""
    library = Path(apex_fast.__file__).parent / "_C.so"
    assert b"GOMP_parallel" in library.read_bytes()
