"""apex_fast::sampler_step: Euler, re-noise and anything between."""

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
    SAMPLER_STEP,
    SIZES,
    Inputs,
    backward_inputs,
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

OP = SAMPLER_STEP
VARIANTS = list(OP.variants)


def small_inputs(**changes: object) -> Inputs:
    return make_inputs(OP, (2, 4), "euler") | changes


# ---- the truth


@pytest.mark.parametrize("variant", VARIANTS)
def test_twin_is_the_formula(variant: str) -> None:
    assert_twin_is_the_formula(OP, variant)


@pytest.mark.parametrize("time", (F32, F64))
@pytest.mark.parametrize(("velocity", "state"), DTYPE_PAIRS)
def test_every_dtype(velocity: torch.dtype, state: torch.dtype, time: torch.dtype) -> None:
    for variant in VARIANTS:
        assert_matches_truth(OP, make_inputs(OP, (5, 3, 301), variant, velocity=velocity, state=state, time=time))


@pytest.mark.parametrize("uncond", FLOATS)
def test_dtypes_of_the_optional_operands(uncond: torch.dtype) -> None:
    for state, noise in ((F32, BF16), (BF16, F32), (F32, F64), (F64, F32)):
        dtypes = {"v_uncond": uncond, "noise": noise}
        inputs = make_inputs(OP, (3, 301), "guided_renoise", velocity=BF16, state=state, dtypes=dtypes)
        assert_matches_truth(OP, inputs | {"stochasticity": 0.5})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_at_most_twice_as_wrong_as_the_plain_formula(dtype: torch.dtype, variant: str) -> None:
    for state in (dtype, F32):
        assert_within_twice_plain(OP, make_inputs(OP, (5, 3, 701), variant, velocity=dtype, state=state), dtype)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_size(shape: tuple[int, ...]) -> None:
    for variant in VARIANTS:
        assert_matches_truth(OP, make_inputs(OP, shape, variant))
    assert_matches_truth(OP, make_inputs(OP, shape, "guided_renoise", velocity=BF16, state=F32))


@pytest.mark.parametrize("velocity", (F32, BF16))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, velocity: torch.dtype) -> None:
    check_layout(OP, layout, "guided_renoise", velocity=velocity, state=F32)
    check_backward_op(OP, "guided_renoise", layout, velocity=velocity, state=F32)


def test_every_operand_in_a_layout_of_its_own() -> None:
    check_mixed_layouts(OP, "guided_renoise")


@pytest.mark.parametrize("variant", VARIANTS)
def test_backward_op(variant: str) -> None:
    check_backward_op(OP, variant, shape=(3, CHUNK + 5))
    check_backward_op(OP, variant, shape=(3, 301), velocity=F64, state=F64)
    check_backward_op(OP, variant, shape=(3, 301), velocity=BF16, state=F32)


# ---- what it means


def test_euler() -> None:
    inputs = make_inputs(OP, (5, 300), "euler", velocity=F64, time=F64)
    x, v, t, t_next = (inputs[n] for n in ("x", "velocity", "t", "t_next"))
    torch.testing.assert_close(ops.sampler_step(**inputs), x + (t_next - t)[:, None] * v, rtol=1e-12, atol=1e-14)


def test_renoise_forgets_the_noise_of_the_state() -> None:
    inputs = make_inputs(OP, (5, 300), "between", velocity=F64, time=F64) | {"stochasticity": 1.0}
    x, v, noise = inputs["x"], inputs["velocity"], inputs["noise"]
    t, t_next = inputs["t"][:, None], inputs["t_next"][:, None]
    expected = (1 - t_next) * (x - t * v) + t_next * noise
    torch.testing.assert_close(ops.sampler_step(**inputs), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("stochasticity", (0.0, 0.36, 1.0))
def test_the_last_step_returns_the_endpoint(stochasticity: float) -> None:
    inputs = make_inputs(OP, (5, 300), "between", velocity=F64, time=F64)
    inputs |= {"stochasticity": stochasticity, "t_next": torch.zeros(5, dtype=F64)}
    expected = inputs["x"] - inputs["t"][:, None] * inputs["velocity"]
    torch.testing.assert_close(ops.sampler_step(**inputs), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", (F32, BF16))
def test_no_guidance_and_no_noise_change_nothing(dtype: torch.dtype) -> None:
    """Operands that a setting makes idle, and that are finite, leave the numbers as they are."""
    plain = make_inputs(OP, (3, 700), "euler", velocity=dtype)
    idle = plain | {"v_uncond": plain["velocity"].clone(), "guidance_scale": 7.0}
    assert_same_bits([ops.sampler_step(**idle)], [ops.sampler_step(**plain)], "v_uncond equal to velocity")
    noise = make_inputs(OP, (3, 700), "between", velocity=dtype)["noise"]
    idle = plain | {"noise": noise, "stochasticity": 0.0}
    assert_same_bits([ops.sampler_step(**idle)], [ops.sampler_step(**plain)], "noise without stochasticity")


def test_times_with_any_stride() -> None:
    inputs = make_inputs(OP, (4, 50), "between")
    strided = {"t": torch.linspace(1, 0.3, 8)[::2], "t_next": torch.tensor(0.2).expand(4)}
    assert_matches_truth(OP, inputs | strided)


# ---- gradients


@pytest.mark.parametrize("layout", ("contiguous", "batch_innermost"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str, layout: str) -> None:
    inputs = make_inputs(OP, (3, 2, 2), variant, velocity=F64, time=F64, layout=layout)
    if variant == "guided_renoise":
        inputs["stochasticity"] = 0.7  # at 1 the noise of the state is gone, and half of the formula with it
    names = [n for n in OP.differentiable if n in inputs]
    leaves = [inputs[n].requires_grad_() for n in names]

    def step(*values: torch.Tensor) -> torch.Tensor:
        return torch.ops.apex_fast.sampler_step(**inputs | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(step, leaves)


@pytest.mark.parametrize("wanted", OP.differentiable)
def test_only_one_gradient(wanted: str) -> None:
    inputs = make_inputs(OP, (3, 70), "guided_renoise") | {"stochasticity": 0.3}
    upstream = upstream_for(OP, inputs)
    every, one = (run(ops.sampler_step, inputs, n, upstream).gradients for n in (OP.differentiable, [wanted]))
    assert set(every) == set(OP.differentiable) and set(one) == {wanted}
    assert_same_bits([one[wanted]], [every[wanted]], wanted)


@pytest.mark.parametrize("dtype", (F32, BF16))
def test_gradient_that_is_one_number_expanded(dtype: torch.dtype) -> None:
    inputs = make_inputs(OP, (4, 3, 50), "euler", velocity=dtype)
    velocity = inputs["velocity"].requires_grad_()
    ops.sampler_step(**inputs).sum().backward()
    expected = (inputs["t_next"].double() - inputs["t"].double()).to(dtype)[:, None, None].expand_as(velocity)
    torch.testing.assert_close(velocity.grad, expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_backward_without_v_uncond_knows_no_guidance() -> None:
    """``guided`` decides, not the scale."""
    inputs = make_inputs(OP, (3, 70), "euler")
    arguments = backward_inputs(OP, inputs, upstream_for(OP, inputs))
    plain, scaled = (OP.backward(**arguments | {"guidance_scale": scale}) for scale in (1.0, 2.5))
    assert_same_bits(scaled, plain, "gradients")


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(())}, r"x must be \[B, ...\], got a tensor without dimensions"),
        ({"velocity": torch.zeros(2, 5)}, r"velocity must have the shape of x, got \[2, 5\] and \[2, 4\]"),
        ({"velocity": torch.zeros(2, 4, dtype=torch.int64)}, "velocity must be float32, .*got Long"),
        (
            {"x": torch.zeros(2, 4, dtype=BF16)},
            r"x must be float32, .*of velocity \(Float\), got BFloat16; .*x.float\(\)",
        ),
        ({"t": torch.zeros(2, dtype=BF16)}, r"t must be float32 or float64, got BFloat16: .*0.999 to 1.*t.float\(\)"),
        ({"t_next": torch.zeros(2, dtype=F16)}, "t_next must be float32 or float64, got Half"),
        ({"t": torch.tensor(1.0)}, r"t must be \[B\] with the batch of x \(2\), got \[\]; .*t.expand\(B\)"),
        ({"t_next": torch.zeros(4)}, r"t_next must be \[B\] with the batch of x \(2\), got \[4\]"),
        ({"guidance_scale": 4.5}, "guidance_scale 4.5 needs v_uncond"),
        ({"v_uncond": torch.zeros(2, 3)}, r"v_uncond must have the shape of x, got \[2, 3\] and \[2, 4\]"),
        ({"stochasticity": 0.5}, "stochasticity 0.5 needs noise; pass it, or leave stochasticity at 0"),
        ({"stochasticity": -0.1}, r"stochasticity must lie in \[0, 1\] .*got -0.1"),
        ({"stochasticity": 1.1}, r"stochasticity must lie in \[0, 1\] .*got 1.1"),
        ({"stochasticity": float("nan")}, r"stochasticity must lie in \[0, 1\] .*got nan"),
        (
            {"noise": torch.zeros(2, 5), "stochasticity": 0.5},
            r"noise must have the shape of x, got \[2, 5\] and \[2, 4\]",
        ),
        ({"noise": torch.zeros(2, 4, dtype=F16), "stochasticity": 0.5}, r"noise must be float32, .*got Half"),
    ],
)
def test_refusals(changes: Inputs, message: str) -> None:
    assert_refused(ops.sampler_step, small_inputs(**changes), f"sampler_step: {message}")


@pytest.mark.parametrize("name", ("t", "t_next"))
def test_times_have_no_gradient(name: str) -> None:
    inputs = small_inputs()
    inputs[name] = inputs[name].requires_grad_()
    assert_refused(ops.sampler_step, inputs, "sampler_step: t and t_next have no derivative; detach them")
    with torch.no_grad():
        ops.sampler_step(**inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t": torch.zeros(3)}, r"t must be \[B\] with the batch of grad \(2\), got \[3\]"),
        ({"t_next": torch.zeros(2, dtype=F16)}, "t_next must be float32 or float64, got Half"),
        ({"stochasticity": 2.0}, r"stochasticity must lie in \[0, 1\]"),
        ({"velocity_dtype": torch.int64}, "velocity_dtype must be float32, .*got Long"),
        ({"uncond_dtype": torch.int64}, "uncond_dtype must be float32, .*got Long"),
        ({"noise_dtype": torch.int64}, "noise_dtype must be float32, .*got Long"),
    ],
)
def test_refusals_of_backward(changes: Inputs, message: str) -> None:
    times = torch.ones(2)
    inputs = {"grad": torch.ones(2, 4), "t": times, "t_next": times, "velocity_dtype": F32, "output_mask": [True] * 4}
    assert_refused(torch.ops.apex_fast.sampler_step_backward, inputs | changes, f"sampler_step_backward: {message}")
