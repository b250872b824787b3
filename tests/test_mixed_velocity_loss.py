"""apex_fast::mixed_velocity_loss: flow matching, and L_mix in velocity space."""

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
    FLOATS,
    HALVES,
    LAYOUTS,
    MIXED_VELOCITY_LOSS,
    SIZES,
    Inputs,
    make_inputs,
    upstream_for,
)
from ops_checks import (
    assert_matches_truth,
    assert_refused,
    assert_same_bits,
    assert_twin_is_the_formula,
    assert_within_twice_plain,
    check_backward_op,
    check_layout,
    check_mixed_layouts,
    run,
)

from apex_fast import ops

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "one_thread")

OP = MIXED_VELOCITY_LOSS
VARIANTS = list(OP.variants)
NOT_A_NUMBER = float("nan")


def small_inputs(**changes: object) -> Inputs:
    return make_inputs(OP, (2, 4), "flow_matching") | changes


# ---- the truth


@pytest.mark.parametrize("variant", VARIANTS)
def test_twin_is_the_formula(variant: str) -> None:
    assert_twin_is_the_formula(OP, variant)


@pytest.mark.parametrize(("velocity", "state"), DTYPE_PAIRS)
def test_every_dtype(velocity: torch.dtype, state: torch.dtype) -> None:
    assert_matches_truth(OP, make_inputs(OP, (3, 3, 701), "flow_matching", velocity=velocity, state=state))
    for fake in FLOATS:
        inputs = make_inputs(OP, (3, 3, 701), "mixed", velocity=velocity, state=state, dtypes={"v_fake": fake})
        assert_matches_truth(OP, inputs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_at_most_twice_as_wrong_as_the_plain_formula(dtype: torch.dtype, variant: str) -> None:
    for state in (dtype, F32):
        assert_within_twice_plain(OP, make_inputs(OP, (5, 3, 701), variant, velocity=dtype, state=state), dtype)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_size(shape: tuple[int, ...]) -> None:
    for variant in VARIANTS:
        assert_matches_truth(OP, make_inputs(OP, shape, variant))
    assert_matches_truth(OP, make_inputs(OP, shape, "mixed", velocity=BF16, state=F32))


@pytest.mark.parametrize("velocity", (F32, BF16))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, velocity: torch.dtype) -> None:
    check_layout(OP, layout, "mixed", velocity=velocity, state=F32)
    check_backward_op(OP, "mixed", layout, velocity=velocity, state=F32)


def test_every_operand_in_a_layout_of_its_own() -> None:
    check_mixed_layouts(OP, "mixed")


@pytest.mark.parametrize("variant", VARIANTS)
def test_backward_op(variant: str) -> None:
    check_backward_op(OP, variant, shape=(3, CHUNK + 5))
    check_backward_op(OP, variant, shape=(3, 301), velocity=F64, state=F64)


@pytest.mark.parametrize("scale", (1e-4, 2e4))
def test_squares_stay_in_range_in_half_precision(scale: float) -> None:
    """Squares that fp16 cannot hold: the arithmetic is fp32."""
    inputs = make_inputs(OP, (2, 3001), "mixed", velocity=F16)
    for name in ("velocity", "x", "z", "v_fake"):
        inputs[name] = (inputs[name].clamp(-3, 3) * scale).to(F16)
    result = assert_matches_truth(OP, inputs)
    assert (result.outputs[0] > 0).all() and result.outputs[0].isfinite().all()


# ---- what it means


def test_without_a_mix_it_is_flow_matching() -> None:
    inputs = make_inputs(OP, (3, 700), "mixed", velocity=F64)
    expected = ((inputs["velocity"] - (inputs["z"] - inputs["x"])) ** 2).mean(1)
    for arguments in (inputs | {"mix_weight": 0.0}, {n: inputs[n] for n in ("velocity", "x", "z")}):
        torch.testing.assert_close(ops.mixed_velocity_loss(**arguments), expected, rtol=1e-13, atol=0)


def test_a_full_mix_is_the_distance_to_the_shifted_velocity() -> None:
    inputs = make_inputs(OP, (3, 700), "mixed", velocity=F64) | {"mix_weight": 1.0}
    result = run(ops.mixed_velocity_loss, inputs, OP.differentiable, upstream_for(OP, inputs))
    expected = ((inputs["velocity"] - inputs["v_fake"]) ** 2).mean(1)
    torch.testing.assert_close(result.outputs[0], expected, rtol=1e-13, atol=0)
    assert not result.gradients["x"].any() and not result.gradients["z"].any()


@pytest.mark.parametrize("mix_weight", (-0.5, 1.75))
def test_a_mix_beyond_the_ends(mix_weight: float) -> None:
    assert_matches_truth(OP, make_inputs(OP, (3, 700), "mixed") | {"mix_weight": mix_weight})


def test_an_empty_sample_has_a_loss_of_zero() -> None:
    assert ops.mixed_velocity_loss(**make_inputs(OP, (3, 0), "mixed")).tolist() == [0.0] * 3


@pytest.mark.parametrize("dtype", (F32, F64, BF16))
@pytest.mark.parametrize("name", ("velocity", "x", "z", "v_fake"))
def test_nan_reaches_the_loss_of_its_sample(name: str, dtype: torch.dtype) -> None:
    for position in (0, 13, 511, CHUNK + 20):
        inputs = make_inputs(OP, (3, CHUNK + 21), "mixed", velocity=dtype)
        inputs[name][1, position] = NOT_A_NUMBER
        result = run(ops.mixed_velocity_loss, inputs, OP.differentiable, upstream_for(OP, inputs))
        assert result.outputs[0].isnan().tolist() == [False, True, False]
        for gradient in result.gradients.values():
            assert gradient.isnan().nonzero().tolist() == [[1, position]]


# ---- gradients


@pytest.mark.parametrize("layout", ("contiguous", "batch_innermost"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str, layout: str) -> None:
    inputs = make_inputs(OP, (3, 2, 2), variant, velocity=F64, layout=layout)
    leaves = [inputs.pop(n).requires_grad_() for n in ("velocity", "x", "z")]
    assert torch.autograd.gradcheck(lambda *v: torch.ops.apex_fast.mixed_velocity_loss(*v, **inputs), leaves)


@pytest.mark.parametrize("wanted", ("velocity", "x", "z"))
def test_only_one_gradient(wanted: str) -> None:
    inputs = make_inputs(OP, (3, 70), "mixed")
    upstream = upstream_for(OP, inputs)
    every, one = (run(ops.mixed_velocity_loss, inputs, n, upstream).gradients for n in (OP.differentiable, [wanted]))
    assert set(one) == {wanted}
    assert_same_bits([one[wanted]], [every[wanted]], wanted)


def test_stop_gradient_of_the_shifted_branch() -> None:
    inputs = make_inputs(OP, (3, 5), "mixed")
    v_fake = inputs["v_fake"].requires_grad_()
    assert not ops.mixed_velocity_loss(**inputs).requires_grad
    inputs["velocity"].requires_grad_()
    ops.mixed_velocity_loss(**inputs).sum().backward()
    assert v_fake.grad is None and inputs["velocity"].grad is not None


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"velocity": torch.zeros(())}, r"velocity must be \[B, ...\], got a tensor without dimensions"),
        ({"velocity": torch.zeros(2, 4, dtype=torch.int64)}, "velocity must be float32, .*got Long"),
        ({"x": torch.zeros(2, 5)}, r"x must have the shape of velocity, got \[2, 5\] and \[2, 4\]"),
        ({"z": torch.zeros(2)}, r"z must have the shape of velocity, got \[2\] and \[2, 4\]"),
        ({"z": torch.zeros(2, 4, dtype=F64)}, "z must have the dtype of x, got Double and Float"),
        (
            {"x": torch.zeros(2, 4, dtype=F16), "z": torch.zeros(2, 4, dtype=F16)},
            r"x must be float32, float64 or have the dtype of velocity \(Float\), got Half; cast it with x.float\(\)",
        ),
        ({"v_fake": torch.zeros(2, 3)}, r"v_fake must have the shape of velocity, got \[2, 3\] and \[2, 4\]"),
        ({"mix_weight": 0.5}, "mix_weight 0.5 needs v_fake, .*; pass it, or leave mix_weight at 0"),
        ({"mix_weight": NOT_A_NUMBER}, "mix_weight nan needs v_fake"),
    ],
)
def test_refusals(changes: Inputs, message: str) -> None:
    assert_refused(ops.mixed_velocity_loss, small_inputs(**changes), f"mixed_velocity_loss: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": torch.zeros(3)}, r"grad must be \[B\] with the batch of velocity \(2\), got \[3\]"),
        ({"grad": torch.zeros(2, dtype=BF16)}, "grad must be float32 or float64, got BFloat16"),
        ({"x": torch.zeros(2, 5)}, r"x must have the shape of velocity"),
        ({"mix_weight": 0.5}, "mix_weight 0.5 needs v_fake"),
    ],
)
def test_refusals_of_backward(changes: Inputs, message: str) -> None:
    inputs = {"grad": torch.ones(2), **small_inputs(), "output_mask": [True] * 3}
    backward = torch.ops.apex_fast.mixed_velocity_loss_backward
    assert_refused(backward, inputs | changes, f"mixed_velocity_loss_backward: {message}")
