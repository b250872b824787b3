"""apex_fast::shifted_velocity_loss: L_fake, the velocity correction and their statistics."""

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
    SHIFTED_VELOCITY_LOSS,
    SIZES,
    Inputs,
    make_inputs,
    random_like_data,
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
from torch import Tensor

from apex_fast import ops

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "one_thread")

OP = SHIFTED_VELOCITY_LOSS
VARIANTS = list(OP.variants)
INFINITE, NOT_A_NUMBER = float("inf"), float("nan")


def small_inputs(**changes: object) -> Inputs:
    return make_inputs(OP, (2, 4), "plain") | changes


def from_difference(dv: Tensor, **changes: object) -> Inputs:
    """Inputs whose v_shift - v_real is ``dv``, exactly."""
    return {"v_gen": torch.zeros_like(dv), "v_shift": dv, "v_real": torch.zeros_like(dv), "target": dv} | changes


# ---- the truth


@pytest.mark.parametrize("variant", VARIANTS)
def test_twin_is_the_formula(variant: str) -> None:
    assert_twin_is_the_formula(OP, variant)


@pytest.mark.parametrize(("velocity", "state"), DTYPE_PAIRS)
def test_every_dtype(velocity: torch.dtype, state: torch.dtype) -> None:
    for real, unconditional in ((F32, F64), (F64, F32), (F16, BF16), (BF16, F16)):
        for variant in ("plain", "guided"):
            dtypes = {"v_real": real, "v_uncond": unconditional}
            assert_matches_truth(
                OP, make_inputs(OP, (3, 3, 701), variant, velocity=velocity, state=state, dtypes=dtypes)
            )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_at_most_twice_as_wrong_as_the_plain_formula(dtype: torch.dtype, variant: str) -> None:
    for state in (dtype, F32):
        assert_within_twice_plain(OP, make_inputs(OP, (5, 3, 701), variant, velocity=dtype, state=state), dtype)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_size(shape: tuple[int, ...]) -> None:
    for variant in VARIANTS:
        assert_matches_truth(OP, make_inputs(OP, shape, variant))
    assert_matches_truth(OP, make_inputs(OP, shape, "guided", velocity=BF16, state=F32))


@pytest.mark.parametrize("velocity", (F32, BF16))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, velocity: torch.dtype) -> None:
    check_layout(OP, layout, "guided", velocity=velocity, state=F32)
    check_backward_op(OP, "guided", layout, velocity=velocity, state=F32)


def test_every_operand_in_a_layout_of_its_own() -> None:
    check_mixed_layouts(OP, "guided")


@pytest.mark.parametrize("variant", VARIANTS)
def test_backward_op(variant: str) -> None:
    check_backward_op(OP, variant, shape=(3, CHUNK + 5))
    check_backward_op(OP, variant, shape=(3, 301), velocity=F64, state=F64)


@pytest.mark.parametrize("scale", (1e-4, 2e4))
def test_squares_stay_in_range_in_half_precision(scale: float) -> None:
    """Squares that fp16 cannot hold: the arithmetic is fp32."""
    inputs = make_inputs(OP, (2, 3001), "unclipped", velocity=F16)
    for name in ("v_gen", "v_shift", "v_real", "target"):
        inputs[name] = (inputs[name].clamp(-3, 3) * scale).to(F16)
    result = assert_matches_truth(OP, inputs)
    assert (result.outputs[0] > 0).all() and result.outputs[0].isfinite().all()


def test_names_of_the_statistics() -> None:
    inputs = make_inputs(OP, (2, 600), "guided")
    stats = dict(zip(ops.STATS, ops.shifted_velocity_loss(**inputs)[2].double().unbind(1), strict=True))
    shift, real, uncond, target = (inputs[n].double() for n in ("v_shift", "v_real", "v_uncond", "target"))
    guided = uncond + 2.5 * (real - uncond)
    dv = shift - guided
    expected = {
        "dv_squared": (dv**2).sum(1),
        "clipped_dv_squared": (dv.clamp(-1.5, 1.5) ** 2).sum(1),
        "clipped_share": (dv.abs() > 1.5).double().mean(1),
        "shift_dot_real": (shift * real).sum(1),
        "shift_squared": (shift**2).sum(1),
        "real_squared": (real**2).sum(1),
        "guided_target_distance": (guided - target).abs().mean(1),
    }
    assert 0.05 < expected["clipped_share"].min() and expected["clipped_share"].max() < 0.95
    torch.testing.assert_close(stats, expected, rtol=1e-5, atol=1e-3)


def test_an_empty_sample_has_losses_of_zero() -> None:
    inputs = make_inputs(OP, (3, 0), "guided")
    fake, correction, stats = ops.shifted_velocity_loss(**inputs)
    assert fake.tolist() == correction.tolist() == [0.0] * 3 and stats.tolist() == [[0.0] * 7] * 3


# ---- clip


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_difference_on_the_clip_is_not_clipped(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    dv = torch.tensor([[0.5, -0.5, 0.5 + eps, -0.5 - eps, 0.25, 0.0, -0.0, 7.0]], dtype=dtype)
    inputs = from_difference(dv, clip=0.5)
    result = run(ops.shifted_velocity_loss, inputs, ["v_gen"], [None, torch.full((1,), 4.0), None])
    # weights 2 * 4 / 8
    assert result.gradients["v_gen"].tolist() == [[0.5, -0.5, 0.5, -0.5, 0.25, 0.0, 0.0, 0.5]]
    assert result.outputs[2][0, 2] == 3 / 8
    assert result.outputs[1].item() == (6 * 0.25 - 0.25 + 0.0625) / 8


@pytest.mark.parametrize("variant", ("plain", "guided"))
@pytest.mark.parametrize("clip", (1e30, INFINITE))
def test_a_huge_clip_is_none(clip: float, variant: str) -> None:
    inputs = make_inputs(OP, (3, 700), variant)
    upstream = upstream_for(OP, inputs)
    off, huge = (
        run(ops.shifted_velocity_loss, inputs | {"clip": c}, OP.differentiable, upstream) for c in (None, clip)
    )
    assert_same_bits(huge.outputs, off.outputs, "outputs")
    assert_same_bits(huge.gradients.values(), off.gradients.values(), "gradients")
    assert off.outputs[2][:, 2].tolist() == [0.0] * 3
    assert_same_bits([off.outputs[2][:, 0]], [off.outputs[2][:, 1]], "dv_squared and clipped_dv_squared")


@pytest.mark.parametrize("dtype", (F32, BF16))
def test_a_tiny_clip_keeps_the_sign(dtype: torch.dtype) -> None:
    inputs = make_inputs(OP, (3, 700), "plain", velocity=dtype) | {"clip": 1e-10}
    fake, correction, stats = ops.shifted_velocity_loss(**inputs)
    distinct = (inputs["v_shift"] != inputs["v_real"]).double().mean(1)
    torch.testing.assert_close(correction.double(), 1e-20 * distinct, rtol=1e-5, atol=0)
    torch.testing.assert_close(stats[:, 2].double(), distinct, rtol=1e-6, atol=0)
    gradient = run(ops.shifted_velocity_loss, inputs, ["v_gen"], [None, torch.full((3,), 350.0), None]).gradients[
        "v_gen"
    ]
    sign = (inputs["v_shift"].float() - inputs["v_real"].float()).sign()
    torch.testing.assert_close(gradient, (sign * 1e-10).to(dtype))


# ---- NaN and infinity

#: first element, inside a SIMD vector, last of a tile, in the tail of the second piece
POSITIONS = (0, 13, 511, CHUNK + 20)


@pytest.mark.parametrize("dtype", (F32, F64, BF16))
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", ("v_shift", "v_real", "v_uncond", "target"))
def test_nan_reaches_the_losses_of_its_sample(name: str, position: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(OP, (3, CHUNK + 21), "guided", velocity=dtype)
    inputs[name][1, position] = NOT_A_NUMBER
    upstream = upstream_for(OP, inputs)
    result = run(ops.shifted_velocity_loss, inputs, OP.differentiable, upstream)
    fake, correction, stats = result.outputs
    in_fake, in_correction = name in ("v_shift", "target"), name != "target"
    assert fake.isnan().tolist() == [False, in_fake, False]
    assert correction.isnan().tolist() == [False, in_correction, False]
    assert stats[:, 1].isnan().tolist() == correction.isnan().tolist() and not stats[[0, 2]].isnan().any()
    for gradient, reached in (("v_gen", in_correction), ("v_shift", in_fake), ("target", in_fake)):
        where = result.gradients[gradient].isnan().nonzero().tolist()
        assert where == ([[1, position]] if reached else []), gradient


@pytest.mark.parametrize("clip", (0.5, None))
def test_infinity(clip: float | None) -> None:
    dv = torch.zeros(2, 40)
    dv[0, 3], dv[1, 39] = INFINITE, -INFINITE
    inputs = from_difference(dv, clip=clip, target=torch.zeros(2, 40))
    result = run(ops.shifted_velocity_loss, inputs, ["v_gen"], [None, torch.full((2,), 20.0), None])
    fake, correction, stats = result.outputs
    assert fake.tolist() == stats[:, 0].tolist() == [INFINITE] * 2
    limit = INFINITE if clip is None else clip
    assert correction.tolist() == pytest.approx([limit**2 / 40] * 2, rel=1e-7)
    assert result.gradients["v_gen"][0, 3] == limit and result.gradients["v_gen"][1, 39] == -limit


def test_infinity_on_both_sides_is_nan() -> None:
    inputs = from_difference(torch.full((1, 20), INFINITE), v_real=torch.full((1, 20), INFINITE), clip=0.5)
    fake, correction, _ = ops.shifted_velocity_loss(**inputs)
    assert correction.isnan().all() and fake.isnan().all()


# ---- gradients


@pytest.mark.parametrize("layout", ("contiguous", "batch_innermost"))
def test_gradcheck_of_fake(layout: str) -> None:
    inputs = make_inputs(OP, (3, 2, 2), "guided", velocity=F64, layout=layout)
    shift, target = inputs.pop("v_shift").requires_grad_(), inputs.pop("target").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, y: torch.ops.apex_fast.shifted_velocity_loss(v_shift=v, target=y, **inputs)[0], (shift, target)
    )


def test_correction_gradient_by_hand() -> None:
    """2 g[b] clamp(dv) / n, whatever v_gen is, and nothing for the velocities under the stop-gradient."""
    inputs = make_inputs(OP, (3, 50), "plain", velocity=F64)
    names = ("v_gen", "v_shift", "v_real", "target")
    upstream = torch.tensor([0.3, -2.0, 5.0], dtype=F64)
    gradients = run(ops.shifted_velocity_loss, inputs, names, [None, upstream, None]).gradients
    assert set(gradients) == {"v_gen"}
    expected = 2 * upstream[:, None] * (inputs["v_shift"] - inputs["v_real"]).clamp(-0.9, 0.9) / 50
    torch.testing.assert_close(gradients["v_gen"], expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("used", (0, 1))
def test_only_one_loss_used(used: int) -> None:
    inputs = make_inputs(OP, (3, 50), "guided")
    both = upstream_for(OP, inputs)
    alone = [grad if index == used else None for index, grad in enumerate(both)]
    expected = run(ops.shifted_velocity_loss, inputs, OP.differentiable, both).gradients
    actual = run(ops.shifted_velocity_loss, inputs, OP.differentiable, alone).gradients
    assert set(actual) == ({"v_shift", "target"} if used == 0 else {"v_gen"})
    assert_same_bits(actual.values(), [expected[n] for n in actual], "gradients")


@pytest.mark.parametrize(
    ("wanted", "fake", "correction"),
    [((), False, False), (("v_gen",), False, True), (("v_shift",), True, False), (("target",), True, False)],
)
def test_what_depends_on_what(wanted: tuple[str, ...], fake: bool, correction: bool) -> None:
    inputs = small_inputs()
    for name in wanted:
        inputs[name].requires_grad_()
    outputs = ops.shifted_velocity_loss(**inputs)
    assert [o.requires_grad for o in outputs] == [fake, correction, False]


@pytest.mark.parametrize("wanted", (("v_real",), ("v_gen", "v_shift", "v_real", "v_uncond")))
def test_stop_gradient_of_the_real_branch(wanted: tuple[str, ...]) -> None:
    inputs = make_inputs(OP, (3, 5), "guided")
    for name in wanted:
        inputs[name].requires_grad_()
    fake, correction, _ = ops.shifted_velocity_loss(**inputs)
    if fake.requires_grad:
        (fake + correction).sum().backward()
    assert inputs["v_real"].grad is None and inputs["v_uncond"].grad is None
    assert fake.requires_grad == ("v_shift" in wanted)


def test_generator_and_shifted_branch_as_one_tensor() -> None:
    inputs = make_inputs(OP, (3, 5), "plain", velocity=F64)
    v = inputs["v_shift"].requires_grad_()
    fake, correction, _ = ops.shifted_velocity_loss(**inputs | {"v_gen": v})
    (fake + 3 * correction).sum().backward()
    dv = (v - inputs["v_real"]).detach()
    expected = 2 * (v.detach() - inputs["target"]) / 5 + 6 * dv.clamp(-0.9, 0.9) / 5
    torch.testing.assert_close(v.grad, expected, rtol=1e-13, atol=1e-15)


def test_values_of_the_generator_are_never_read() -> None:
    inputs = make_inputs(OP, (3, 70), "guided")
    upstream = upstream_for(OP, inputs)
    plain = run(ops.shifted_velocity_loss, inputs, OP.differentiable, upstream)
    poisoned = inputs | {"v_gen": torch.full_like(inputs["v_gen"], NOT_A_NUMBER)}
    result = run(ops.shifted_velocity_loss, poisoned, OP.differentiable, upstream)
    assert_same_bits(result.outputs, plain.outputs, "outputs")
    assert_same_bits(result.gradients.values(), plain.gradients.values(), "gradients")


def test_generator_is_not_kept_for_backward() -> None:
    """It may be overwritten, or freed; what is kept may not."""
    inputs = small_inputs()
    leaf = torch.zeros(2, 4, requires_grad=True)
    v_gen = leaf + 1
    _, correction, _ = ops.shifted_velocity_loss(**inputs | {"v_gen": v_gen})
    with torch.no_grad():
        v_gen.add_(1)
    correction.sum().backward()
    assert leaf.grad.abs().sum() > 0
    for name in ("v_shift", "v_real", "target"):
        inputs = small_inputs(v_gen=torch.zeros(2, 4, requires_grad=True))
        _, correction, _ = ops.shifted_velocity_loss(**inputs)
        inputs[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            correction.sum().backward()


# ---- the public backward


def test_public_backward_has_the_defaults_of_the_schedule() -> None:
    inputs = make_inputs(OP, (3, 50), "plain")
    upstream = upstream_for(OP, inputs)
    expected = run(ops.shifted_velocity_loss, inputs, OP.differentiable, upstream).gradients
    v_gen, v_shift, target = ops.shifted_velocity_loss_backward(
        *upstream[:2], inputs["v_shift"], inputs["v_real"], inputs["target"], clip=0.9
    )
    assert_same_bits([v_gen, v_shift], [expected["v_gen"], expected["v_shift"]], "gradients")
    assert target.shape == (0,)


@pytest.mark.parametrize("wide", (F32, F64))
@pytest.mark.parametrize("dtype", HALVES)
def test_gradient_of_the_generator_in_a_wider_dtype(dtype: torch.dtype, wide: torch.dtype) -> None:
    """Before a loss scale the gradient of a large fp16 sample is below the smallest number of fp16."""
    inputs = make_inputs(OP, (1, CHUNK + 9), "plain", velocity=dtype)
    grads = (torch.full((1,), 1e-4), torch.full((1,), 1e-4))
    arguments = (*grads, inputs["v_shift"], inputs["v_real"], inputs["target"])
    narrow, _, _ = ops.shifted_velocity_loss_backward(*arguments, clip=0.9)
    assert narrow.dtype == dtype and (dtype == BF16 or (narrow == 0).all())
    kept, shift, _ = ops.shifted_velocity_loss_backward(*arguments, clip=0.9, grad_gen_dtype=wide)
    assert kept.dtype == wide and shift.dtype == dtype
    dv = inputs["v_shift"].double() - inputs["v_real"].double()
    expected = 2e-4 * dv.clamp(-0.9, 0.9) / (CHUNK + 9)
    torch.testing.assert_close(kept.double(), expected, rtol=3e-7, atol=0)


def test_upstream_gradients_with_any_stride() -> None:
    inputs = make_inputs(OP, (4, 50), "plain")
    rest = [inputs[n] for n in ("v_shift", "v_real", "target")]
    strided = torch.arange(8.0)[::2], torch.tensor(3.0).expand(4)
    dense = [grad.contiguous() for grad in strided]
    results = [ops.shifted_velocity_loss_backward(*grads, *rest, output_mask=(True,) * 3) for grads in (strided, dense)]
    assert_same_bits(*results, "gradients")


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v_shift": torch.zeros(())}, r"v_shift must be \[B, ...\], got a tensor without dimensions"),
        (
            {"v_shift": torch.zeros(2, 4, dtype=torch.int8)},
            "v_shift must be float32, float64, bfloat16 or float16, got Char",
        ),
        ({"v_real": torch.zeros(2, 8)}, r"v_real must have the shape of v_shift, got \[2, 8\] and \[2, 4\]"),
        ({"v_real": torch.zeros(2, 4, dtype=torch.int64)}, "v_real must be float32, .*got Long"),
        ({"target": torch.zeros(2, 4, 1)}, r"target must have the shape of v_shift, got \[2, 4, 1\] and \[2, 4\]"),
        (
            {"target": torch.zeros(2, 4, dtype=F16)},
            r"target must be float32, .*of v_shift \(Float\), got Half; .*target.float\(\)",
        ),
        ({"v_gen": torch.zeros(3, 4)}, r"v_gen must have the shape of v_shift, got \[3, 4\] and \[2, 4\]"),
        (
            {"v_gen": torch.zeros(2, 4, dtype=BF16)},
            "v_gen must have the dtype of v_shift, got BFloat16 and Float; cast one",
        ),
        ({"v_uncond": torch.zeros(2, 5)}, r"v_uncond must have the shape of v_shift, got \[2, 5\] and \[2, 4\]"),
        ({"v_uncond": torch.zeros(2, 4, dtype=torch.bool)}, "v_uncond must be float32, .*got Bool"),
        ({"guidance_scale": 3.0}, "guidance_scale 3 needs v_uncond, .*; pass it, or leave guidance_scale at 1"),
        ({"guidance_scale": NOT_A_NUMBER}, "guidance_scale nan needs v_uncond"),
        ({"clip": 0.0}, "clip must be positive, got 0; clip=None switches it off"),
        ({"clip": -1.0}, "clip must be positive, got -1"),
        ({"clip": NOT_A_NUMBER}, "clip must be positive, got nan"),
    ],
)
def test_refusals(changes: Inputs, message: str) -> None:
    assert_refused(ops.shifted_velocity_loss, small_inputs(**changes), f"shifted_velocity_loss: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_fake": torch.zeros(3)}, r"grad_fake must be \[B\] with the batch of v_shift \(2\), got \[3\]"),
        (
            {"grad_correction": torch.tensor(1.0)},
            r"grad_correction must be \[B\] with the batch of v_shift \(2\), got \[\]",
        ),
        ({"grad_correction": torch.zeros(2, dtype=F16)}, "grad_correction must be float32 or float64, got Half"),
        ({"v_real": torch.zeros(2, 8)}, "v_real must have the shape of v_shift"),
        ({"guidance_scale": 3.0}, "guidance_scale 3 needs v_uncond"),
        ({"clip": 0.0}, "clip must be positive, got 0"),
        ({"grad_gen_dtype": torch.int64}, "grad_gen_dtype must be float32, .*got Long"),
    ],
)
def test_refusals_of_backward(changes: Inputs, message: str) -> None:
    rest = {name: value for name, value in small_inputs().items() if name != "v_gen"}
    inputs = {"grad_fake": torch.ones(2), "grad_correction": torch.ones(2)} | rest
    assert_refused(ops.shifted_velocity_loss_backward, inputs | changes, f"shifted_velocity_loss_backward: {message}")


def test_differences_too_small_to_see_in_fp32_are_seen_in_fp64() -> None:
    """One fp64 input makes the arithmetic and the losses fp64."""
    base = random_like_data((2, 300), F32, "base")
    real = base.double() + 1e-9
    fake, correction, stats = ops.shifted_velocity_loss(base, base, real, base, clip=1.0)
    assert fake.dtype == correction.dtype == stats.dtype == F64
    torch.testing.assert_close(correction, torch.full((2,), 1e-18, dtype=F64), rtol=1e-5, atol=0)
