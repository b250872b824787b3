"""The CUDA kernels on a GPU: the same truth, dtypes, sizes and layouts as on the CPU, and what only a GPU has.

Needs a build with CUDA kernels. Where there is no GPU, test_cuda_host.py runs the same kernels compiled for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ops_cases import (
    BF16,
    CHUNK,
    CONDITION_SHIFT,
    DTYPE_PAIRS,
    F16,
    F32,
    F64,
    GRADIENT_ORDER,
    HALVES,
    LAYOUT_SHAPE,
    LAYOUTS,
    OP_VARIANT_IDS,
    OP_VARIANTS,
    SHIFTED_VELOCITY_LOSS,
    SHIFTED_VELOCITY_LOSS_WITH_GRADIENTS,
    SIZES,
    Inputs,
    Op,
    backward_inputs,
    make_inputs,
    upstream_for,
)
from ops_checks import (
    Result,
    as_list,
    assert_fake_kernel_agrees,
    assert_matches_truth,
    assert_refused,
    assert_rounded_once,
    assert_same_bits,
    assert_same_metadata,
    assert_within_twice_plain,
    computes_in,
    elements_per_sample,
    run,
)
from row_ops import (
    MODULATED_LAYER_NORM,
    ROW_OPS,
    ROW_SHAPES,
    RowOp,
    assert_rows_match_truth,
    assert_rows_within_twice_plain,
    check_row_backward,
    leaves_of,
    make_row_inputs,
    row_upstream,
    rows_on,
)
from torch import Tensor
from torch._dynamo.utils import counters

from apex_fast import _library, ops

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda_kernels", "one_thread")]

ONE_PASS = SHIFTED_VELOCITY_LOSS_WITH_GRADIENTS
every_op = pytest.mark.parametrize(("op", "variant"), OP_VARIANTS, ids=OP_VARIANT_IDS)
every_variant = pytest.mark.parametrize(
    ("op", "variant"),
    [*OP_VARIANTS, *((ONE_PASS, variant) for variant in ONE_PASS.variants)],
    ids=[*OP_VARIANT_IDS, *(f"{ONE_PASS.name}-{variant}" for variant in ONE_PASS.variants)],
)
ROW_VARIANTS = [(op, variant) for op in ROW_OPS for variant in op.variants]
every_row_variant = pytest.mark.parametrize(
    ("op", "variant"), ROW_VARIANTS, ids=[f"{op.name}-{variant or 'plain'}" for op, variant in ROW_VARIANTS]
)
# Rows that a block holds in registers, and rows that it reads again.
CHANNELS = (701, 720, 4608)


@pytest.fixture
def cuda_kernels(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """Skips where the library has no CUDA kernels; afterwards makes sure that no plain torch twin stepped in."""
    if not _library.build_module().facts()["cuda_ops"]:
        pytest.skip("this build of apex_fast has no CUDA kernels")
    yield
    assert not [w for w in recwarn if "plain torch twin" in str(w.message)]


# ---- to the device and back


def in_same_place(tensor: Tensor, device: str | torch.device = "cuda") -> Tensor:
    """On the device, with the strides of ``tensor`` and its distance from a 16-byte boundary, and NaN around it."""
    storage = tensor.detach().untyped_storage().to(device=device)
    copy = torch.empty(0, dtype=tensor.dtype, device=device)
    return copy.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


class ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return in_same_place(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.cpu()


def on_device(inputs: Inputs, device: str | torch.device = "cuda") -> Inputs:
    return {n: in_same_place(v, device) if isinstance(v, Tensor) else v for n, v in inputs.items()}


def through_device(function: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """``function`` for CPU tensors, run on the device; differentiable."""

    def call(**arguments: Any) -> list[Tensor]:
        moved = {n: ToDevice.apply(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
        return [output.cpu() for output in as_list(function(**moved))]

    return call


def wanted_of(op: Op, inputs: Inputs) -> list[str]:
    return [n for n in op.differentiable if inputs.get(n) is not None]


def run_on_device(op: Op, inputs: Inputs, function: Callable[..., Any] | None = None) -> Result:
    upstream = [None if g is None else g.cuda() for g in upstream_for(op, inputs)]
    return run(function or op.public, on_device(inputs), wanted_of(op, inputs), upstream)


def results_of(result: Result) -> list[Tensor]:
    return [*result.outputs, *result.gradients.values()]


def check(op: Op, inputs: Inputs) -> None:
    """Outputs and gradients against the float64 twin, and laid out as the CPU lays them out."""
    result = assert_matches_truth(op, inputs, through_device(op.public))
    with torch.no_grad():
        assert_same_metadata(result.outputs, as_list(op.public(**inputs)), op.name)


# ---- the truth


@pytest.mark.parametrize(("velocity", "state"), DTYPE_PAIRS)
@every_variant
def test_every_dtype(op: Op, variant: str, velocity: torch.dtype, state: torch.dtype) -> None:
    for others in ((F32, F64), (F16, BF16), (BF16, F32)):
        dtypes = dict(zip(("v_real", "v_uncond"), others, strict=True)) | {"v_fake": others[0], "scale": others[1]}
        check(op, make_inputs(op, (3, 3, 701), variant, velocity=velocity, state=state, time=F64, dtypes=dtypes))
    check(op, make_inputs(op, (3, 3, 704), variant, velocity=velocity, state=state))


@pytest.mark.parametrize("half", HALVES)
@every_op
def test_half_precision_is_at_most_twice_as_wrong_as_the_plain_formula(op: Op, variant: str, half: torch.dtype) -> None:
    for state in (half, F32):
        inputs = make_inputs(op, (5, 3, 701), variant, velocity=half, state=state)
        assert_within_twice_plain(op, inputs, half, through_device(op.public))


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("shape", SIZES, ids=str)
@every_variant
def test_every_size(op: Op, variant: str, shape: tuple[int, ...]) -> None:
    for dtypes in ({"velocity": F32}, {"velocity": BF16, "state": F32}):
        check(op, make_inputs(op, shape, variant, **dtypes))


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("layout", LAYOUTS)
@every_variant
def test_layouts(op: Op, variant: str, layout: str) -> None:
    names = (*op.velocities, *op.states)
    for layouts in (dict.fromkeys(names, layout), {op.primary: layout}, {n: layout for n in names if n != op.primary}):
        for velocity in (F32, BF16):
            check(op, make_inputs(op, LAYOUT_SHAPE, variant, layout=layouts, velocity=velocity, state=F32))


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("offset", range(1, 16))
@every_variant
def test_every_misalignment(op: Op, variant: str, offset: int) -> None:
    """One operand after the other off by some elements, in rows whose length keeps the slots where they are."""
    names = [n for n in (*op.velocities, *op.states) if n != "v_gen"]
    for odd in names:
        inputs = make_inputs(op, (3, 1024), variant, velocity=BF16, state=F32)
        if odd not in inputs:
            continue
        larger = torch.full((inputs[odd].numel() + offset,), float("nan"), dtype=inputs[odd].dtype)
        larger[offset:] = inputs[odd].flatten()
        inputs[odd] = larger[offset:].view(3, 1024)
        check(op, inputs)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "batch_in_the_middle", "batch_innermost"))
@every_op
def test_backward_op(op: Op, variant: str, layout: str) -> None:
    """All gradients and each of them alone, against the float64 twin; the same bits through autograd."""
    for shape, dtypes in (
        (LAYOUT_SHAPE, {"velocity": BF16, "state": F32}),
        ((3, 1, CHUNK + 5, 1), {"velocity": F32}),
        ((3, 2, 3, 7), {"velocity": F64, "state": F64}),
    ):
        inputs = make_inputs(op, shape, variant, layout=layout, **dtypes)
        upstream = upstream_for(op, inputs)
        if op.outputs[0] == "sample":
            upstream = [LAYOUTS[layout](grad) for grad in upstream]
        arguments = backward_inputs(op, inputs, upstream)
        gradients = as_list(op.backward(**on_device(arguments)))
        exact = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments.items()}
        exact |= {n: F64 for n, v in arguments.items() if n.endswith("_dtype") and v is not None}
        truth = as_list(op.backward_twin(**exact))
        n = elements_per_sample(op, inputs)
        mask = arguments.get("output_mask", [True])
        for name, wanted, gradient, expected in zip(GRADIENT_ORDER[op.name], mask, gradients, truth, strict=True):
            if not wanted:
                assert gradient.shape == (0,)
                continue
            arithmetic, typical = computes_in(inputs, op), 2.0 / max(n, 1) if op.is_loss else 1.0
            if op is CONDITION_SHIFT and name != "condition":
                arithmetic, typical = F64, float(inputs["condition"].numel())
            assert_rounded_once(gradient.cpu(), expected, arithmetic, typical, f"{op.name} gradient of {name}")
        assert_fake_kernel_agrees(op.backward, on_device(arguments), gradients, op.name)
        if "output_mask" not in arguments:
            continue
        for index in range(len(mask)):
            alone = [i == index and m for i, m in enumerate(mask)]
            partial = as_list(op.backward(**on_device(arguments) | {"output_mask": alone}))
            assert [g.shape == (0,) for g in partial] == [not m for m in alone]
            if alone[index]:
                assert_same_bits([partial[index]], [gradients[index]], f"{op.name}, only {index}")


def test_condition_of_many_dimensions_and_any_strides() -> None:
    """Leading dimensions that can and cannot be joined, channels that do not lie side by side, an fp64 gradient."""
    for shape in ((2, 1, 3, 1, 2, 3, 2, 2, 24), (40,), (1, 1, 7), (5, 2, 3, 300)):
        for variant in CONDITION_SHIFT.variants:
            inputs = make_inputs(CONDITION_SHIFT, shape, variant, velocity=BF16)
            check(CONDITION_SHIFT, inputs)
            if len(shape) > 2:
                check(CONDITION_SHIFT, inputs | {"condition": inputs["condition"].transpose(0, -2)} | _mask(inputs))
    inputs = make_inputs(CONDITION_SHIFT, (3, 9, 40), "diagonal")
    inputs["scale"] = inputs["scale"][:1].expand(40)
    check(CONDITION_SHIFT, inputs)
    arguments = backward_inputs(CONDITION_SHIFT, inputs, [torch.randn(3, 9, 40, dtype=F64)])
    actual = CONDITION_SHIFT.backward(**on_device(arguments))
    torch.testing.assert_close([g.cpu() for g in actual], list(CONDITION_SHIFT.backward(**arguments)))


def _mask(inputs: Inputs) -> Inputs:
    return {"mask": inputs["mask"].transpose(0, -1)} if "mask" in inputs else {}


@pytest.mark.parametrize("dtypes", ({"velocity": F32}, {"velocity": BF16, "state": F32}, {"velocity": F64}), ids=str)
@every_variant
def test_equals_the_cpu_to_rounding(op: Op, variant: str, dtypes: dict[str, torch.dtype]) -> None:
    inputs = make_inputs(op, (3, 5, 701), variant, **dtypes)
    here = results_of(run(op.public, inputs, wanted_of(op, inputs), upstream_for(op, inputs)))
    there = results_of(run_on_device(op, inputs))
    for a, b in zip(there, here, strict=True):
        eps, arithmetic = torch.finfo(b.dtype).eps, min(torch.finfo(b.dtype).eps, torch.finfo(F32).eps)
        amplitude = b.abs().max().item()
        if b.dim() == 0:  # a single parameter's gradient is a sum over all elements, which cancels
            amplitude = max(amplitude, (3 * 5 * 701) ** 0.5)
        # sums in another order, products fused elsewhere; a half result may round to the neighbour
        torch.testing.assert_close(a.cpu(), b, rtol=8 * eps, atol=8 * arithmetic * amplitude)


def test_one_pass_equals_forward_and_backward() -> None:
    inputs = on_device(make_inputs(ONE_PASS, (3, 5, 701), "guided", velocity=BF16, state=F32))
    weights = [inputs.pop(n) for n in ("weight_fake", "weight_correction")]
    *losses, grad_gen, grad_shift = ops.shifted_velocity_loss_with_gradients(*weights, **inputs)
    torch.testing.assert_close(losses, list(ops.shifted_velocity_loss(None, **inputs)), rtol=1e-6, atol=1e-6)
    two = ops.shifted_velocity_loss_backward(*weights, **inputs)
    torch.testing.assert_close([grad_gen, grad_shift], list(two[:2]), rtol=2**-7, atol=0)


# ---- rows of channels


def run_rows_on_device(op: RowOp, inputs: Inputs, function: Callable[..., Any] | None = None) -> Result:
    upstream = [None if g is None else g.cuda() for g in row_upstream(op, inputs)]
    return run(function or op.public, on_device(inputs), leaves_of(op, inputs), upstream)


@pytest.mark.parametrize("dtype", (F32, F64, BF16, F16))
@every_row_variant
def test_rows_of_every_dtype(op: RowOp, variant: str, dtype: torch.dtype) -> None:
    for channels in CHANNELS:
        for parameters in (F32, dtype, dict(zip(op.parameters, (F64, F16, BF16, F64), strict=False))):
            inputs = make_row_inputs(op, (2, 5, channels), variant, dtype=dtype, parameters=parameters)
            assert_rows_match_truth(op, inputs, through_device(op.public))


@pytest.mark.parametrize("half", HALVES)
@every_row_variant
def test_rows_in_half_precision_are_at_most_twice_as_wrong(op: RowOp, variant: str, half: torch.dtype) -> None:
    for channels in CHANNELS:
        inputs = make_row_inputs(op, (2, 5, channels), variant, dtype=half, parameters=half)
        assert_rows_within_twice_plain(op, inputs, half, through_device(op.public))


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("shape", [shape for shape in ROW_SHAPES if shape != (1, 1, 1)], ids=str)
@every_row_variant
def test_rows_of_every_size(op: RowOp, variant: str, shape: tuple[int, ...]) -> None:
    for dtype in (F32, BF16):
        assert_rows_match_truth(op, make_row_inputs(op, shape, variant, dtype=dtype), through_device(op.public))


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("offset", range(1, 9))
@every_row_variant
def test_misalignment_of_rows(op: RowOp, variant: str, offset: int) -> None:
    """The rows and each parameter per channel off by some elements, whose lengths are whole slots."""
    base = make_row_inputs(op, (2, 3, 1024), variant, dtype=BF16)
    for odd in (op.rows, *(n for n in op.parameters if n in base and base[n].dim() > 0)):
        larger = torch.full((base[odd].numel() + offset,), float("nan"), dtype=base[odd].dtype)
        larger[offset:] = base[odd].flatten()
        assert_rows_match_truth(op, base | {odd: larger[offset:].view(base[odd].shape)}, through_device(op.public))


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("shape", ((2, 67, 33), (2, 35, 4608)), ids=str)
@every_row_variant
def test_backward_op_of_rows(op: RowOp, variant: str, shape: tuple[int, ...]) -> None:
    for dtype in (F32, BF16):
        check_row_backward(op, variant, shape, "cuda", dtype=dtype)


@every_row_variant
def test_rows_equal_the_cpu_to_rounding(op: RowOp, variant: str) -> None:
    for dtype in (F32, BF16, F64):
        inputs = make_row_inputs(op, (3, 67, 704), variant, dtype=dtype)
        here = results_of(run(op.public, inputs, leaves_of(op, inputs), row_upstream(op, inputs)))
        for a, b in zip(results_of(run_rows_on_device(op, inputs)), here, strict=True):
            eps, amplitude = torch.finfo(b.dtype).eps, b.abs().max().item() if b.numel() else 0.0
            if b.dim() == 0:  # a single parameter's gradient is a sum over all elements, which cancels
                amplitude = max(amplitude, inputs[op.rows].numel() ** 0.5)
            # sums in another order, products fused elsewhere; a half result may round to the neighbour
            arithmetic = min(eps, torch.finfo(F32).eps)
            torch.testing.assert_close(a.cpu(), b, rtol=8 * eps, atol=64 * arithmetic * amplitude)


def test_velocity_head() -> None:
    """The norm's kernel and torch's linear layer: outputs and gradients as on the CPU."""
    inputs = make_row_inputs(MODULATED_LAYER_NORM, (2, 67, 704))
    generator = torch.Generator().manual_seed(0)
    inputs |= {"weight": torch.randn(16, 704, generator=generator) / 30, "bias": torch.randn(16, generator=generator)}
    names, upstream = ("hidden", "scale", "shift", "weight", "bias"), torch.randn(2, 67, 16, generator=generator)
    here = run(ops.velocity_head, inputs, names, [upstream])
    there = run(ops.velocity_head, rows_on("cuda", inputs), names, [upstream.cuda()])
    for a, b in zip(results_of(there), results_of(here), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@every_row_variant
def test_rows_repeat_bit_for_bit(op: RowOp, variant: str) -> None:
    for channels in CHANNELS:
        inputs = make_row_inputs(op, (3, 401, channels), variant, dtype=BF16)
        first = results_of(run_rows_on_device(op, inputs))
        for _ in range(3):
            assert_same_bits(results_of(run_rows_on_device(op, inputs)), first, op.name)


@every_row_variant
def test_rows_wait_for_nothing_and_replay_in_a_cuda_graph(op: RowOp, variant: str) -> None:
    inputs = make_row_inputs(op, (3, 67, 704), variant, dtype=BF16)
    static, wanted = on_device(inputs), leaves_of(op, inputs)
    upstream = [None if g is None else g.cuda() for g in row_upstream(op, inputs)]
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        run(op.public, static, wanted, upstream)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(op.public, static, wanted, upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op.public, static, wanted, upstream)
    for factor in (0.5, -3.0):
        fresh = {n: v * factor if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
        for name, value in tensors(static).items():
            value.copy_(fresh[name])
        graph.replay()
        expected = run(op.public, on_device(fresh), wanted, upstream)
        assert_same_bits(results_of(captured), results_of(expected), f"{op.name}, replay {factor}")


@every_row_variant
def test_rows_compiled_to_cuda_graphs(op: RowOp, variant: str) -> None:
    torch._dynamo.reset()
    counters["inductor"].clear()
    inputs = make_row_inputs(op, (3, 5, 704), variant, dtype=BF16)
    compiled = torch.compile(
        lambda **arguments: op.public(**arguments), fullgraph=True, dynamic=False, mode="reduce-overhead"
    )
    expected = results_of(run_rows_on_device(op, inputs))
    for _ in range(4):  # warms up, captures, replays
        torch.compiler.cudagraph_mark_step_begin()
        actual = [r.clone() for r in results_of(run_rows_on_device(op, inputs, compiled))]
        assert_same_bits(actual, expected, op.name)
    assert counters["inductor"]["cudagraph_skips"] == 0, "it fell back to running without a graph"


# ---- streams, graphs, compilers, devices


@every_variant
def test_repeats_bit_for_bit(op: Op, variant: str) -> None:
    inputs = make_inputs(op, (4, 3 * CHUNK + 5), variant, velocity=BF16, state=F32)
    first = results_of(run_on_device(op, inputs))
    for _ in range(3):
        assert_same_bits(results_of(run_on_device(op, inputs)), first, op.name)


@every_variant
def test_nothing_waits_for_the_device(op: Op, variant: str) -> None:
    inputs = make_inputs(op, (4, 1000), variant, velocity=BF16, state=F32)
    moved, upstream = on_device(inputs), [None if g is None else g.cuda() for g in upstream_for(op, inputs)]
    run(op.public, moved, wanted_of(op, inputs), upstream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op.public, moved, wanted_of(op, inputs), upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_variant
def test_runs_on_the_current_stream(op: Op, variant: str) -> None:
    """Inputs that a slow stream has yet to make: an op that ran on another stream would read the NaN before them."""
    inputs = make_inputs(op, (4, 3 * CHUNK + 5), variant, velocity=F32)
    expected = results_of(run_on_device(op, inputs))
    upstream = [None if g is None else g.cuda() for g in upstream_for(op, inputs)]
    moved = on_device(inputs)
    late = {n: torch.full_like(v, float("nan")) if v.is_floating_point() else v for n, v in tensors(moved).items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for name, value in late.items():
            value.copy_(moved[name])
        actual = results_of(run(op.public, moved | late, wanted_of(op, inputs), upstream))
    stream.synchronize()
    assert_same_bits(actual, expected, op.name)


def tensors(inputs: Inputs) -> dict[str, Tensor]:
    return {n: v for n, v in inputs.items() if isinstance(v, Tensor)}


@every_variant
def test_cuda_graph(op: Op, variant: str) -> None:
    """Captured once, forward and backward, and replayed on new numbers."""
    inputs = make_inputs(op, (4, 3 * CHUNK + 5), variant, velocity=BF16, state=F32)
    static = on_device(inputs)
    upstream = [None if g is None else g.cuda() for g in upstream_for(op, inputs)]
    wanted = wanted_of(op, inputs)
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        run(op.public, static, wanted, upstream)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op.public, static, wanted, upstream)
    for seed in (1, 2):
        fresh = make_inputs(op, (4, 3 * CHUNK + 5), variant, velocity=BF16, state=F32, seed=seed)
        for name, value in tensors(static).items():
            value.copy_(fresh[name])
        graph.replay()
        expected = run(op.public, on_device(fresh), wanted, upstream)
        assert_same_bits(results_of(captured), results_of(expected), f"{op.name}, replay {seed}")


@every_variant
def test_compiled_to_cuda_graphs(op: Op, variant: str) -> None:
    torch._dynamo.reset()
    counters["inductor"].clear()
    inputs = make_inputs(op, (3, 4, 6, 5), variant, velocity=BF16, state=F32, layout="channels_last")
    compiled = torch.compile(
        lambda **arguments: op.public(**arguments), fullgraph=True, dynamic=False, mode="reduce-overhead"
    )
    expected = results_of(run_on_device(op, inputs))
    for _ in range(4):  # warms up, captures, replays
        torch.compiler.cudagraph_mark_step_begin()
        actual = [r.clone() for r in results_of(run_on_device(op, inputs, compiled))]
        assert_same_bits(actual, expected, op.name)
    assert counters["inductor"]["cudagraph_skips"] == 0, "it fell back to running without a graph"


@every_variant
def test_another_device_than_the_current_one(op: Op, variant: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = make_inputs(op, (4, 1000), variant, velocity=BF16, state=F32)
    expected = results_of(run_on_device(op, inputs))
    upstream = [None if g is None else g.to("cuda:1") for g in upstream_for(op, inputs)]
    assert torch.cuda.current_device() == 0
    actual = results_of(run(op.public, on_device(inputs, "cuda:1"), wanted_of(op, inputs), upstream))
    assert all(r.device == torch.device("cuda:1") for r in actual) and torch.cuda.current_device() == 0
    assert_same_bits([r.cpu() for r in actual], [r.cpu() for r in expected], op.name)


# ---- more elements than 32 bits count


def needs_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of free device memory, there are {free:.1f}")


def test_interpolate_of_more_than_2_31_elements() -> None:
    needs_memory(18)
    x = torch.zeros(1, 2**31 + 13, dtype=BF16, device="cuda")
    z = torch.zeros_like(x)
    x[:, -40:], z[:, -40:] = 3, 1
    x_t = ops.interpolate(x, z, torch.tensor([0.25], device="cuda"))
    assert (x_t[:, -40:] == 2.5).all() and (x_t[:, :-40] == 0).all()


def test_loss_of_more_than_2_31_elements() -> None:
    needs_memory(14)
    n = 2**31 + 13
    shift = torch.full((1, n), 0.5, dtype=BF16, device="cuda")
    shift[:, -1] = 2.0
    real = torch.full_like(shift, 0.25)
    fake, correction, stats = ops.shifted_velocity_loss(None, shift, real, real, clip=1.0)
    assert fake.item() == pytest.approx((0.0625 * (n - 1) + 1.75**2) / n, rel=1e-6)
    assert correction.item() == pytest.approx((0.0625 * (n - 1) + 1) / n, rel=1e-6)
    assert stats[0, 2].item() == pytest.approx(1 / n, rel=1e-6)


# ---- refusals


@pytest.mark.parametrize(
    ("op", "name", "message"),
    [
        ("interpolate", "t", "interpolate: t must be on the device of x, got cpu and cuda:0"),
        ("renoise", "velocity", "renoise: velocity must be on the device of x_s, got cpu and cuda:0"),
        ("shifted_velocity_loss", "target", "target must be on the device of v_shift, got cpu and cuda:0"),
        ("mixed_velocity_loss", "z", "z must be on the device of velocity, got cpu and cuda:0"),
        ("sampler_step", "t_next", "t_next must be on the device of x, got cpu and cuda:0"),
        ("condition_shift", "bias", "bias must be on the device of condition, got cpu and cuda:0"),
    ],
)
def test_operands_elsewhere_are_refused(op: str, name: str, message: str) -> None:
    case = next(case for case, _ in OP_VARIANTS if case.name == op)
    inputs = make_inputs(case, (2, 4))
    assert_refused(case.public, on_device(inputs) | {name: inputs[name]}, message)


def test_the_same_refusals_as_on_the_cpu() -> None:
    inputs = on_device(make_inputs(SHIFTED_VELOCITY_LOSS, (2, 4), "plain"))
    with pytest.raises(RuntimeError, match="clip must be positive, got 0; clip=None switches it off"):
        ops.shifted_velocity_loss(**inputs | {"clip": 0.0})
    with pytest.raises(RuntimeError, match="guidance_scale 3 needs v_uncond"):
        ops.shifted_velocity_loss(**inputs | {"guidance_scale": 3.0})
