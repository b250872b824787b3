"""apex_fast::shifted_velocity_loss_with_gradients: losses, statistics and both gradients from one pass."""

from __future__ import annotations

import pytest
import torch
from ops_cases import (
    BF16,
    CHUNK,
    DTYPE_PAIRS,
    F16,
    F32,
    F64,
    HALVES,
    LAYOUTS,
    SHIFTED_VELOCITY_LOSS_WITH_GRADIENTS,
    SIZES,
    Inputs,
    make_inputs,
)
from ops_checks import (
    assert_fake_kernel_agrees,
    assert_matches_truth,
    assert_refused,
    assert_same_bits,
    assert_same_metadata,
    assert_twin_is_the_formula,
    check_layout,
    check_mixed_layouts,
)
from torch import Tensor

from apex_fast import ops

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "one_thread")

OP = SHIFTED_VELOCITY_LOSS_WITH_GRADIENTS
VARIANTS = list(OP.variants)


def small_inputs(**changes: object) -> Inputs:
    return make_inputs(OP, (2, 4), "plain") | changes


def in_two_passes(inputs: Inputs) -> list[Tensor]:
    settings = {n: v for n, v in inputs.items() if n in ("v_uncond", "guidance_scale", "clip")}
    velocities = [inputs[n] for n in ("v_shift", "v_real", "target")]
    losses = ops.shifted_velocity_loss(None, *velocities, **settings)
    weights = (inputs["weight_fake"], inputs["weight_correction"])
    gradients = ops.shifted_velocity_loss_backward(
        *weights, *velocities, **settings, grad_gen_dtype=inputs.get("grad_gen_dtype")
    )
    return [*losses, *gradients[:2]]


def assert_equals_two_passes(inputs: Inputs) -> None:
    """The forward's and the backward's results: the same formulas on the same numbers in the same order."""
    one, two = OP.public(**inputs), in_two_passes(inputs)
    assert_same_metadata(one, two, OP.name)
    for actual, expected in zip(one, two, strict=True):
        # two compilations of one formula may fuse its multiplications and additions differently
        eps = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(
            actual, expected, rtol=4 * eps, atol=4 * eps * (expected.abs().max().item() or 1e-30)
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_twin_is_the_formula(variant: str) -> None:
    assert_twin_is_the_formula(OP, variant)


@pytest.mark.parametrize(("velocity", "state"), DTYPE_PAIRS)
def test_every_dtype(velocity: torch.dtype, state: torch.dtype) -> None:
    for real, unconditional in ((F32, F64), (F64, F32), (F16, BF16), (BF16, F16)):
        for variant in ("plain", "guided"):
            dtypes = {"v_real": real, "v_uncond": unconditional}
            inputs = make_inputs(OP, (3, 3, 701), variant, velocity=velocity, state=state, dtypes=dtypes)
            assert_matches_truth(OP, inputs)
            assert_equals_two_passes(inputs)


@pytest.mark.parametrize("shape", [shape for shape in SIZES if 0 not in shape], ids=str)
def test_every_size(shape: tuple[int, ...]) -> None:
    for variant in VARIANTS:
        inputs = make_inputs(OP, shape, variant)
        assert_matches_truth(OP, inputs)
        assert_equals_two_passes(inputs)
    assert_equals_two_passes(make_inputs(OP, shape, "guided", velocity=BF16, state=F32))


@pytest.mark.parametrize("shape", [shape for shape in SIZES if 0 in shape], ids=str)
def test_empty_samples_have_losses_of_zero(shape: tuple[int, ...]) -> None:
    inputs = make_inputs(OP, shape, "guided")
    *losses, grad_gen, grad_shift = OP.public(**inputs)
    assert all((loss == 0).all() for loss in losses)
    assert_same_metadata([grad_gen, grad_shift], [torch.empty_like(inputs["v_shift"])] * 2, OP.name)


@pytest.mark.parametrize("velocity", (F32, BF16))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, velocity: torch.dtype) -> None:
    check_layout(OP, layout, "guided", velocity=velocity, state=F32)


def test_every_operand_in_a_layout_of_its_own() -> None:
    check_mixed_layouts(OP, "guided")


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_that_are_not_wanted(variant: str) -> None:
    inputs = make_inputs(OP, (3, CHUNK + 5), variant, velocity=BF16, state=F32)
    both = OP.public(**inputs)
    for mask in ((True, False), (False, True), (False, False)):
        results = OP.public(**inputs, output_mask=mask)
        assert_same_bits(results[:3], both[:3], "losses")
        for wanted, gradient, expected in zip(mask, results[3:], both[3:], strict=True):
            assert_same_bits([gradient], [expected if wanted else expected.new_empty(0)], f"{mask}")
        arguments = inputs | {"output_mask": mask}
        assert_fake_kernel_agrees(OP.dispatcher, arguments, results, f"{mask}")
        assert_same_metadata(OP.twin(**arguments), results, f"twin, {mask}")


@pytest.mark.parametrize("wide", (F32, F64))
@pytest.mark.parametrize("dtype", HALVES)
def test_gradient_of_the_generator_in_a_wider_dtype(dtype: torch.dtype, wide: torch.dtype) -> None:
    inputs = make_inputs(OP, (2, CHUNK + 9), "guided", velocity=dtype) | {"grad_gen_dtype": wide}
    results = OP.public(**inputs)
    assert [r.dtype for r in results] == [F32, F32, F32, wide, dtype]
    assert_equals_two_passes(inputs)
    assert_fake_kernel_agrees(OP.dispatcher, inputs, results, str(wide))


def test_results_repeat_on_any_number_of_threads(set_threads) -> None:
    inputs = make_inputs(OP, (3, 5 * CHUNK + 3), "guided", velocity=BF16)
    first = OP.public(**inputs)
    for threads in (1, 2, 3):
        set_threads(threads)
        assert_same_bits(OP.public(**inputs), first, f"{threads} threads")


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(variant: str) -> None:
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(OP.dispatcher, (), make_inputs(OP, (3, 4, 5), variant, velocity=BF16, state=F32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v_real": torch.zeros(2, 8)}, r"v_real must have the shape of v_shift, got \[2, 8\] and \[2, 4\]"),
        ({"target": torch.zeros(2, 4, dtype=F16)}, "target must be float32, .*of v_shift .*got Half"),
        ({"weight_fake": torch.zeros(3)}, r"weight_fake must be \[B\] with the batch of v_shift \(2\), got \[3\]"),
        ({"weight_correction": torch.zeros(2, dtype=BF16)}, "weight_correction must be float32 or float64, got BFl"),
        ({"grad_gen_dtype": torch.int32}, "grad_gen_dtype must be float32, .*got Int"),
        ({"guidance_scale": 3.0}, "guidance_scale 3 needs v_uncond"),
        ({"clip": 0.0}, "clip must be positive, got 0; clip=None switches it off"),
    ],
)
def test_refusals(changes: Inputs, message: str) -> None:
    assert_refused(OP.public, small_inputs(**changes), f"{OP.name}: {message}")


@pytest.mark.parametrize("name", ("weight_fake", "weight_correction", "v_shift", "v_real", "target"))
def test_gradients_are_refused(name: str) -> None:
    inputs = small_inputs()
    inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match="is not differentiable; detach the inputs or call it under torch.no_grad"):
        OP.public(**inputs)
    with torch.no_grad():
        assert not any(result.requires_grad for result in OP.public(**inputs))
