"""apex_fast::renoise: the generator's sample noised again, and the velocity of that path."""

from __future__ import annotations

import pytest
import torch
from ops_cases import (
    BF16,
    DTYPE_PAIRS,
    F16,
    F32,
    F64,
    HALVES,
    LAYOUTS,
    RENOISE,
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


def small_inputs(**changes: object) -> Inputs:
    return make_inputs(RENOISE, (2, 4)) | changes


# ---- the truth


def test_twin_is_the_formula() -> None:
    assert_twin_is_the_formula(RENOISE, "")


@pytest.mark.parametrize("time", (F32, F64))
@pytest.mark.parametrize(("velocity", "state"), DTYPE_PAIRS)
def test_every_dtype(velocity: torch.dtype, state: torch.dtype, time: torch.dtype) -> None:
    assert_matches_truth(RENOISE, make_inputs(RENOISE, (5, 3, 701), velocity=velocity, state=state, time=time))


def test_times_of_two_dtypes() -> None:
    assert_matches_truth(RENOISE, make_inputs(RENOISE, (5, 90), velocity=BF16, state=F32, dtypes={"s": F64, "t": F32}))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_at_most_twice_as_wrong_as_the_plain_formula(dtype: torch.dtype) -> None:
    for state in (dtype, F32):
        assert_within_twice_plain(RENOISE, make_inputs(RENOISE, (5, 3, 701), velocity=dtype, state=state), dtype)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_size(shape: tuple[int, ...]) -> None:
    for velocity, state in ((F32, F32), (BF16, F32)):
        assert_matches_truth(RENOISE, make_inputs(RENOISE, shape, velocity=velocity, state=state))


@pytest.mark.parametrize("velocity", (F32, BF16))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, velocity: torch.dtype) -> None:
    check_layout(RENOISE, layout, "", velocity=velocity, state=F32)
    check_backward_op(RENOISE, "", layout, velocity=velocity, state=F32)


def test_every_operand_in_a_layout_of_its_own() -> None:
    check_mixed_layouts(RENOISE, "")


def test_gradients_in_two_layouts() -> None:
    inputs = make_inputs(RENOISE, (3, 5, 7, 11))
    first, second = upstream_for(RENOISE, inputs)
    mixed = [LAYOUTS["channels_last"](first), LAYOUTS["channel_slice"](second)]
    plain, strided = (run(ops.renoise, inputs, ["velocity"], grads).gradients for grads in ([first, second], mixed))
    assert_same_bits(strided.values(), plain.values(), "gradient")


# ---- what it means


@pytest.mark.parametrize(("velocity", "state"), DTYPE_PAIRS)
def test_the_sample_is_z_minus_target(velocity: torch.dtype, state: torch.dtype) -> None:
    """x_fake is not written; whoever needs it takes it from the target, and it lies on the path that was returned."""
    inputs = make_inputs(RENOISE, (5, 900), velocity=velocity, state=state)
    x_fake_t, target = ops.renoise(**inputs)
    x_fake = inputs["x_s"].double() - inputs["s"].double()[:, None] * inputs["velocity"].double()
    tolerance = {"rtol": 0, "atol": 16 * torch.finfo(state).eps}
    torch.testing.assert_close(inputs["z"].double() - target.double(), x_fake, **tolerance)
    torch.testing.assert_close(
        x_fake_t.double(), inputs["z"].double() - (1 - inputs["t"].double())[:, None] * target.double(), **tolerance
    )


def test_time_zero_of_the_generator_leaves_the_sample() -> None:
    inputs = small_inputs(s=torch.zeros(2), t=torch.zeros(2))
    x_fake_t, target = ops.renoise(**inputs)
    assert_same_bits([x_fake_t, target], [inputs["x_s"], inputs["z"] - inputs["x_s"]], "s = t = 0")


# ---- gradients


@pytest.mark.parametrize("layout", ("contiguous", "batch_innermost"))
def test_gradcheck(layout: str) -> None:
    inputs = make_inputs(RENOISE, (3, 2, 2), velocity=F64, time=F64, layout=layout)
    velocity = inputs.pop("velocity").requires_grad_()
    assert torch.autograd.gradcheck(lambda v: torch.ops.apex_fast.renoise(v, **inputs), (velocity,))


@pytest.mark.parametrize("used", (0, 1))
def test_only_one_output_used(used: int) -> None:
    inputs = make_inputs(RENOISE, (3, 70), velocity=BF16, state=F32)
    upstream = upstream_for(RENOISE, inputs)
    alone = [grad if index == used else None for index, grad in enumerate(upstream)]
    exact = run(RENOISE.twin, inputs, ["velocity"], alone, cast=F64).gradients["velocity"]
    actual = run(ops.renoise, inputs, ["velocity"], alone).gradients["velocity"]
    torch.testing.assert_close(actual, exact.to(BF16))


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_s": torch.zeros(())}, r"renoise: x_s must be \[B, ...\]"),
        ({"velocity": torch.zeros(2, 5)}, r"renoise: velocity must have the shape of x_s, got \[2, 5\] and \[2, 4\]"),
        ({"velocity": torch.zeros(2, 4, dtype=torch.int32)}, "renoise: velocity must be float32, .*got Int"),
        ({"z": torch.zeros(4, 2)}, r"renoise: z must have the shape of x_s, got \[4, 2\] and \[2, 4\]"),
        ({"z": torch.zeros(2, 4, dtype=F64)}, "renoise: z must have the dtype of x_s, got Double and Float"),
        (
            {"x_s": torch.zeros(2, 4, dtype=F16), "z": torch.zeros(2, 4, dtype=F16)},
            r"renoise: x_s must be float32, float64 or have the dtype of velocity \(Float\), got Half; .*x_s.float\(\)",
        ),
        (
            {
                "x_s": torch.zeros(2, 4, dtype=F16),
                "z": torch.zeros(2, 4, dtype=F16),
                "velocity": torch.zeros(2, 4, dtype=BF16),
            },
            r"renoise: x_s must be float32, float64 or have the dtype of velocity \(BFloat16\), got Half",
        ),
        ({"s": torch.zeros(2, dtype=F16)}, r"renoise: s must be float32 or float64, got Half: .*s.float\(\)"),
        ({"t": torch.zeros(2, dtype=BF16)}, "renoise: t must be float32 or float64, got BFloat16"),
        ({"s": torch.zeros(1)}, r"renoise: s must be \[B\] with the batch of x_s \(2\), got \[1\]"),
        ({"t": torch.zeros(2, 1)}, r"renoise: t must be \[B\] with the batch of x_s \(2\), got \[2, 1\]"),
    ],
)
def test_refusals(changes: Inputs, message: str) -> None:
    assert_refused(ops.renoise, small_inputs(**changes), message)


@pytest.mark.parametrize("name", ("x_s", "s", "z", "t"))
def test_no_gradient_but_for_the_velocity(name: str) -> None:
    inputs = small_inputs()
    inputs[name] = inputs[name].requires_grad_()
    assert_refused(ops.renoise, inputs, "renoise: differentiable in velocity only; detach x_s, s, z and t")
    with torch.no_grad():
        ops.renoise(**inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_target": torch.zeros(2, 3)}, "renoise_backward: grad_target must have the shape of grad_x_fake_t, got"),
        ({"s": torch.zeros(3)}, r"renoise_backward: s must be \[B\] with the batch of grad_x_fake_t \(2\), got \[3\]"),
        ({"t": torch.zeros(2, dtype=F16)}, "renoise_backward: t must be float32 or float64, got Half"),
        ({"velocity_dtype": torch.int64}, "renoise_backward: velocity_dtype must be float32, .*got Long"),
    ],
)
def test_refusals_of_backward(changes: Inputs, message: str) -> None:
    grad, times = torch.ones(2, 4), torch.ones(2)
    inputs = {"grad_x_fake_t": grad, "grad_target": grad, "s": times, "t": times, "velocity_dtype": F32}
    assert_refused(torch.ops.apex_fast.renoise_backward, inputs | changes, message)
