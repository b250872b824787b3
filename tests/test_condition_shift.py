"""apex_fast::condition_shift: c_fake = A c + b on the tokens that the mask keeps."""

from __future__ import annotations

import pytest
import torch
from ops_cases import (
    BF16,
    CONDITION_SHIFT,
    F16,
    F32,
    F64,
    FLOATS,
    HALVES,
    LAYOUT_SHAPE,
    LAYOUTS,
    Inputs,
    make_inputs,
    random_like_data,
    upstream_for,
)
from ops_checks import (
    allocated_bytes,
    assert_matches_truth,
    assert_refused,
    assert_same_bits,
    assert_twin_is_the_formula,
    assert_within_twice_plain,
    bytes_of,
    check_backward_op,
    check_layout,
    run,
)

from apex_fast import ops

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "one_thread")

OP = CONDITION_SHIFT
VARIANTS = list(OP.variants)

#: [D] alone, no tokens, no channels, around a tile of 512 channels, more rows than one partial sum holds (64 at least)
CONDITION_SIZES = [
    (0,),
    (7,),
    (0, 7),
    (3, 0),
    (0, 5, 4),
    (3, 0, 4),
    (2, 3, 1),
    (2, 5, 511),
    (2, 5, 512),
    (2, 5, 513),
    (3, 7, 1100),
    (70, 5000),
    (129, 4500),
    (9000, 33),
    (1, 2, 1, 3, 1, 2, 1, 2, 5),
]


def small_inputs(**changes: object) -> Inputs:
    return make_inputs(OP, (2, 3, 4), "diagonal") | changes


# ---- the truth


@pytest.mark.parametrize("variant", VARIANTS)
def test_twin_is_the_formula(variant: str) -> None:
    assert_twin_is_the_formula(OP, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_dtype(dtype: torch.dtype, variant: str) -> None:
    for scale, bias in ((F32, F32), (F64, BF16), (BF16, F16), (F16, F64)):
        inputs = make_inputs(OP, (3, 5, 701), variant, velocity=dtype, dtypes={"scale": scale, "bias": bias})
        assert_matches_truth(OP, inputs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_at_most_twice_as_wrong_as_the_plain_formula(dtype: torch.dtype, variant: str) -> None:
    for parameters in (dtype, F32):
        inputs = make_inputs(OP, (3, 5, 301), variant, velocity=dtype, state=parameters)
        assert_within_twice_plain(OP, inputs, dtype)


@pytest.mark.parametrize("shape", CONDITION_SIZES, ids=str)
def test_every_size(shape: tuple[int, ...]) -> None:
    for variant in VARIANTS:
        for dtype in (F32, BF16):
            assert_matches_truth(OP, make_inputs(OP, shape, variant, velocity=dtype))


@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    check_layout(OP, layout, "scalar_scale_masked", velocity=dtype)
    check_backward_op(OP, "scalar_bias_masked", layout, velocity=dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_is_copied(layout: str) -> None:
    inputs = make_inputs(OP, LAYOUT_SHAPE, "diagonal", layout=layout, velocity=BF16)
    with torch.no_grad():
        assert allocated_bytes(lambda: ops.condition_shift(**inputs)) == bytes_of(inputs["condition"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_backward_op(variant: str) -> None:
    check_backward_op(OP, variant, shape=(2, 65, 4100))
    check_backward_op(OP, variant, shape=(3, 4, 30), velocity=F64, state=F64)
    check_backward_op(OP, variant, shape=(3, 4, 30), velocity=BF16, state=F32)


def test_parameters_with_a_stride() -> None:
    inputs = small_inputs()
    plain = run(ops.condition_shift, inputs, OP.differentiable, upstream_for(OP, inputs))
    strided = inputs | {n: torch.stack([inputs[n], torch.full((4,), float("nan"))], 1)[:, 0] for n in ("scale", "bias")}
    assert strided["scale"].stride() == (2,)
    result = run(ops.condition_shift, strided, OP.differentiable, upstream_for(OP, inputs))
    assert_same_bits(result.outputs, plain.outputs, "output")
    assert_same_bits(result.gradients.values(), plain.gradients.values(), "gradients")


# ---- the mask


@pytest.mark.parametrize("kind", (torch.bool, torch.uint8, torch.int64, F32, BF16))
def test_any_kind_of_mask(kind: torch.dtype) -> None:
    inputs = small_inputs()
    keep = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.bool)
    mask = keep if kind == torch.bool else keep.to(kind) * (3 if not kind.is_floating_point else 0.25)
    unmasked = ops.condition_shift(**inputs)
    expected = torch.where(keep[..., None], unmasked, inputs["condition"])
    assert_same_bits([ops.condition_shift(**inputs, mask=mask.to(kind))], [expected], "masked")


@pytest.mark.parametrize("dtype", FLOATS)
def test_masked_tokens_are_returned_to_the_bit(dtype: torch.dtype) -> None:
    """Whatever stands in them, and whatever the parameters are: padding is often NaN or huge."""
    inputs = make_inputs(OP, (2, 3, 40), "diagonal", velocity=dtype)
    inputs["condition"][0, 1] = (
        torch.tensor([float("nan"), float("inf"), torch.finfo(dtype).max, -0.0]).to(dtype).repeat(10)
    )
    inputs["scale"][3] = float("nan")
    mask = torch.tensor([[True, False, True], [False, False, False]])
    result = ops.condition_shift(**inputs, mask=mask)
    before, after = inputs["condition"][~mask], result[~mask]
    number = ~before.isnan()
    assert torch.equal(after.isnan(), ~number) and torch.equal(after[number], before[number])
    assert torch.equal(after[number].signbit(), before[number].signbit())
    assert result[mask][:, 3].isnan().all()


def test_masked_tokens_in_the_gradients() -> None:
    """Their own gradient passes as it is; parameters do not hear of them, even where they are NaN."""
    inputs = make_inputs(OP, (2, 3, 40), "diagonal", velocity=F64, state=F64)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    inputs["condition"][~mask] = float("nan")
    grad = random_like_data((2, 3, 40), F64, "gradient")
    result = run(ops.condition_shift, inputs | {"mask": mask}, OP.differentiable, [grad]).gradients
    assert torch.equal(result["condition"][~mask], grad[~mask])
    torch.testing.assert_close(result["condition"][mask], (grad * inputs["scale"])[mask], rtol=1e-14, atol=0)
    torch.testing.assert_close(result["scale"], (grad * inputs["condition"])[mask].sum(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(result["bias"], grad[mask].sum(0), rtol=1e-13, atol=0)


def test_mask_with_strides() -> None:
    inputs = small_inputs()
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.bool)
    for same in (mask.t().contiguous().t(), torch.stack([mask, ~mask], -1)[..., 0]):
        assert not same.is_contiguous()
        results = [ops.condition_shift(**inputs, mask=m) for m in (mask, same)]
        assert_same_bits(results[:1], results[1:], "strided mask")


def test_mask_that_removes_everything() -> None:
    inputs = small_inputs(mask=torch.zeros(2, 3, dtype=torch.bool))
    result = run(ops.condition_shift, inputs, OP.differentiable, upstream_for(OP, inputs))
    assert_same_bits(result.outputs, [inputs["condition"]], "output")
    assert not result.gradients["scale"].any() and not result.gradients["bias"].any()


def test_nan_reaches_its_token_and_the_scale() -> None:
    inputs = make_inputs(OP, (2, 3, 40), "diagonal")
    inputs["condition"][1, 2, 17] = float("nan")
    result = run(ops.condition_shift, inputs, OP.differentiable, upstream_for(OP, inputs))
    assert result.outputs[0].isnan().nonzero().tolist() == [[1, 2, 17]]
    assert result.gradients["scale"].isnan().nonzero().tolist() == [[17]]
    assert not result.gradients["bias"].isnan().any() and not result.gradients["condition"].isnan().any()


# ---- gradients


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str) -> None:
    inputs = make_inputs(OP, (2, 3, 4), variant, velocity=F64, state=F64)
    leaves = [inputs.pop(n).requires_grad_() for n in ("condition", "scale", "bias")]
    assert torch.autograd.gradcheck(lambda *v: torch.ops.apex_fast.condition_shift(*v, **inputs), leaves)


@pytest.mark.parametrize("wanted", OP.differentiable)
def test_only_one_gradient(wanted: str) -> None:
    inputs = small_inputs()
    upstream = upstream_for(OP, inputs)
    every, one = (run(ops.condition_shift, inputs, n, upstream).gradients for n in (OP.differentiable, [wanted]))
    assert set(one) == {wanted}
    assert_same_bits([one[wanted]], [every[wanted]], wanted)


def test_gradient_that_is_one_number_expanded() -> None:
    inputs = make_inputs(OP, (2, 3, 40), "diagonal", velocity=BF16)
    condition, bias = inputs["condition"].requires_grad_(), inputs["bias"].requires_grad_()
    ops.condition_shift(**inputs).sum().backward()
    torch.testing.assert_close(condition.grad, inputs["scale"].to(BF16).expand_as(condition))
    torch.testing.assert_close(bias.grad, torch.full((40,), 6.0))


def test_parameter_gradients_are_summed_without_loss() -> None:
    """Many tokens of alternating sign and growing size: fp32 sums would drift."""
    rows, channels = 9000, 33
    condition = torch.ones(rows, channels)
    grad = torch.full((rows, channels), 1e-4)
    grad[0], grad[-1] = 3e4, -3e4
    inputs = {"condition": condition, "scale": torch.tensor(1.0), "bias": torch.zeros(channels)}
    result = run(ops.condition_shift, inputs, ("scale", "bias"), [grad]).gradients
    expected = (rows - 2) * torch.tensor(1e-4).double().item()
    torch.testing.assert_close(result["bias"].double(), torch.full((channels,), expected, dtype=F64), rtol=1e-6, atol=0)
    assert result["scale"].item() == pytest.approx(channels * expected, rel=1e-6)


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": torch.zeros(())}, r"condition must be \[..., D\] with 1 to 9 dimensions, got \[\]"),
        ({"condition": torch.zeros([1] * 9 + [4])}, r"condition must be \[..., D\] with 1 to 9 dimensions"),
        ({"condition": torch.zeros(2, 3, 4, dtype=torch.int64)}, "condition must be float32, .*got Long"),
        (
            {"scale": torch.zeros(3)},
            r"scale must be \[\] or \[D\] with D = 4, the last dimension of condition, got \[3\]",
        ),
        ({"scale": torch.zeros(1)}, r"scale must be \[\] or \[D\] with D = 4, .*got \[1\]"),
        ({"bias": torch.zeros(1, 4)}, r"bias must be \[\] or \[D\] with D = 4, .*got \[1, 4\]"),
        ({"scale": torch.tensor(1)}, "scale must be float32, float64, bfloat16 or float16, got Long"),
        ({"bias": torch.zeros(4, dtype=torch.complex64)}, "bias must be float32, .*got ComplexFloat"),
        ({"mask": torch.ones(2, 4)}, r"mask must have the shape of condition without D, \[2, 3\], got \[2, 4\]"),
        ({"mask": torch.ones(2, 3, 1)}, r"mask must have the shape of condition without D, \[2, 3\], got \[2, 3, 1\]"),
    ],
)
def test_refusals(changes: Inputs, message: str) -> None:
    assert_refused(ops.condition_shift, small_inputs(**changes), f"condition_shift: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": torch.zeros(2, 3, 5)}, r"grad must have the shape of condition, got \[2, 3, 5\] and \[2, 3, 4\]"),
        ({"grad": torch.zeros(2, 3, 4, dtype=torch.int64)}, "grad must be float32, .*got Long"),
        ({"scale": torch.zeros(3)}, r"scale must be \[\] or \[D\] with D = 4"),
        ({"mask": torch.ones(3, 2)}, r"mask must have the shape of condition without D"),
    ],
)
def test_refusals_of_backward(changes: Inputs, message: str) -> None:
    inputs = {"grad": torch.ones(2, 3, 4), **small_inputs(), "output_mask": [True] * 3}
    backward = torch.ops.apex_fast.condition_shift_backward
    assert_refused(backward, inputs | changes, f"condition_shift_backward: {message}")
