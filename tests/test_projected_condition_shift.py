"""apex_fast::projected_condition_shift: what a linear layer makes of c and of a c + b, from one product."""

from __future__ import annotations

import pytest
import torch
from ops_cases import BF16, F16, F32, F64, FLOATS, HALVES, Inputs
from ops_checks import allocated_bytes, assert_refused, assert_same_bits, bytes_of, run
from row_ops import PROJECTED_CONDITION_SHIFT as OP
from row_ops import (
    ROW_SHAPES,
    assert_rows_match_truth,
    assert_rows_within_twice_plain,
    check_row_backward,
    check_row_dispatch,
    check_row_gradients,
    leaves_of,
    make_row_inputs,
    row_upstream,
)

from apex_fast import ops

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "one_thread")

VARIANTS = list(OP.variants)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
def test_twin_is_the_formula(variant: str) -> None:
    inputs = make_row_inputs(OP, (2, 3, 7), variant, dtype=F64, parameters=F64)
    wanted, upstream = leaves_of(OP, inputs), row_upstream(OP, inputs)
    twin, plain = (run(function, inputs, wanted, upstream) for function in (OP.twin, OP.plain))
    torch.testing.assert_close(twin.outputs, plain.outputs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(twin.gradients, plain.gradients, rtol=1e-12, atol=1e-13)


@every_variant
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_dtype(dtype: torch.dtype, variant: str) -> None:
    for scale, bias, rest in ((F32, F32, dtype), (F64, BF16, F16), (F16, F64, F32)):
        parameters = {"scale": scale, "bias": bias, "row_sums": F32, "linear_bias": rest}
        assert_rows_match_truth(OP, make_row_inputs(OP, (2, 5, 701), variant, dtype=dtype, parameters=parameters))


@every_variant
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_at_most_twice_as_wrong_as_the_plain_formula(dtype: torch.dtype, variant: str) -> None:
    for parameters in (dtype, F32):
        inputs = make_row_inputs(OP, (2, 5, 301), variant, dtype=dtype, parameters=parameters)
        assert_rows_within_twice_plain(OP, inputs, dtype)


@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_every_size(shape: tuple[int, ...]) -> None:
    for variant in ("masked", "stacked_masked", "no_bias"):
        for dtype in (F32, BF16):
            assert_rows_match_truth(OP, make_row_inputs(OP, shape, variant, dtype=dtype))


def test_it_is_the_linear_layer_of_the_shifted_condition() -> None:
    """W (a c + b) + beta from W c, with every gradient, the layer's included."""
    generator = torch.Generator().manual_seed(0)
    c, weight = (torch.randn(*size, dtype=F64, generator=generator) for size in ((2, 3, 5), (7, 5)))
    beta, a, b = (torch.randn(size, dtype=F64, generator=generator) for size in ((7,), (), ()))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    leaves = [v.requires_grad_() for v in (c, weight, beta, a, b)]
    linear = torch.nn.functional.linear
    expected = linear(ops.condition_shift(c, a, b, mask=mask), weight, beta)
    real, shifted = ops.projected_condition_shift(linear(c, weight), a, b, weight.sum(1), linear_bias=beta, mask=mask)
    torch.testing.assert_close(shifted, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(real, linear(c, weight, beta), rtol=1e-12, atol=1e-13)
    upstream = torch.randn(2, 3, 7, dtype=F64, generator=generator)
    ours, theirs = (torch.autograd.grad(v, leaves, upstream) for v in (shifted, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@every_variant
def test_backward_op(variant: str) -> None:
    check_row_backward(OP, variant, dtype=BF16)


@every_variant
def test_dispatch(variant: str) -> None:
    check_row_dispatch(OP, variant)


@every_variant
def test_gradcheck(variant: str) -> None:
    check_row_gradients(OP, variant)


def test_strides_cost_one_copy_and_change_nothing() -> None:
    inputs = make_row_inputs(OP, (2, 6, 40), "masked")
    expected = ops.projected_condition_shift(**inputs)
    strided = inputs | {
        "projected": inputs["projected"].transpose(0, 1).contiguous().transpose(0, 1),
        "row_sums": torch.stack([inputs["row_sums"], inputs["linear_bias"]], 1)[:, 0],
        "mask": inputs["mask"].t().contiguous().t(),
    }
    assert not any(strided[name].is_contiguous() for name in ("projected", "row_sums", "mask"))
    assert_same_bits(ops.projected_condition_shift(**strided), expected, "strided")


def test_one_output_is_the_one_of_both() -> None:
    inputs = make_row_inputs(OP, (2, 6, 40), "masked", dtype=BF16)
    both = ops.projected_condition_shift(**inputs)
    real, nothing = ops.projected_condition_shift(**inputs, output_mask=(True, False))
    none, shifted = ops.projected_condition_shift(**inputs, output_mask=(False, True))
    stacked, rest = ops.projected_condition_shift(**inputs, stacked=True)
    assert [t.shape for t in (nothing, none, rest)] == [(0,)] * 3
    assert_same_bits((real, shifted), both, "one")
    assert_same_bits(stacked.chunk(2), both, "stacked")


def test_masked_tokens_are_the_real_ones_whatever_the_shift_is() -> None:
    inputs = make_row_inputs(OP, (2, 3, 40), "both", dtype=BF16)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    inputs["scale"] = torch.tensor(float("nan"))
    real, shifted = ops.projected_condition_shift(**inputs, mask=mask)
    assert torch.equal(real[~mask], shifted[~mask]) and shifted[mask].isnan().all()
    inputs["projected"][:] = float("nan")
    inputs["mask"] = torch.zeros_like(mask)
    gradients = run(ops.projected_condition_shift, inputs, OP.differentiable, row_upstream(OP, inputs)).gradients
    assert not any(gradients[name].any() for name in ("scale", "bias", "row_sums"))
    assert gradients["projected"].isfinite().all() and gradients["linear_bias"].isfinite().all()


@pytest.mark.parametrize("trained", (True, False))
def test_bytes(trained: bool) -> None:
    """The outputs and nothing else forward; the projection is saved only where the scale is trained."""
    inputs = make_row_inputs(OP, (2, 64, 512), "both", dtype=BF16)
    projected = inputs["projected"]
    with torch.no_grad():
        assert allocated_bytes(lambda: ops.projected_condition_shift(**inputs)) == 2 * bytes_of(projected)
    saved: list[torch.Tensor] = []
    projected.requires_grad_()
    inputs["scale"].requires_grad_(trained)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.projected_condition_shift(**inputs)
    assert (projected.data_ptr() in {t.data_ptr() for t in saved}) == trained
    assert bytes_of(*saved) < 4 * 512 + 16 + trained * bytes_of(projected)


def test_repeats_bit_for_bit_on_any_number_of_threads(set_threads) -> None:
    for variant in VARIANTS:
        inputs = make_row_inputs(OP, (3, 130, 1100), variant, dtype=BF16)
        results = []
        for threads in (1, 1, 2, 3):
            set_threads(threads)
            result = run(ops.projected_condition_shift, inputs, leaves_of(OP, inputs), row_upstream(OP, inputs))
            results.append([*result.outputs, *result.gradients.values()])
            assert_same_bits(results[-1], results[0], f"{variant} on {threads} threads")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projected": torch.zeros(())}, r"projected must be \[..., D\], got a tensor without dimensions"),
        ({"projected": torch.zeros(2, 3, 7, dtype=torch.int64)}, "projected must be float32, .*got Long"),
        (
            {"scale": torch.zeros(7)},
            r"scale must be one number, \[\], got \[7\]; one number per channel .*condition_shift",
        ),
        ({"bias": torch.zeros(1)}, r"bias must be one number, \[\], got \[1\]"),
        ({"bias": torch.tensor(1)}, "bias must be float32, .*got Long"),
        (
            {"row_sums": torch.zeros(8)},
            r"row_sums must be \[D\] with D = 7, the last dimension of projected, got \[8\]",
        ),
        ({"linear_bias": torch.zeros(())}, r"linear_bias must be \[D\] with D = 7, .*got \[\]"),
        ({"mask": torch.ones(2, 4)}, r"mask must have the shape of projected without D, \[2, 3\], got \[2, 4\]"),
        ({"stacked": True, "output_mask": [False, True]}, r"stacked holds both branches, so output_mask must be"),
    ],
)
def test_refusals(changes: Inputs, message: str) -> None:
    inputs = make_row_inputs(OP) | changes
    assert_refused(ops.projected_condition_shift, inputs, f"projected_condition_shift: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_real": None, "grad_shifted": None}, "grad_real or grad_shifted must be given"),
        (
            {"grad_shifted": torch.zeros(2, 3)},
            r"grad_shifted must be \[2, 3, 7\], the shape of projected, got \[2, 3\]",
        ),
        ({"stacked": True}, "stacked has one gradient, grad_real; leave grad_shifted out"),
        (
            {"stacked": True, "grad_real": torch.zeros(3, 3, 7), "grad_shifted": None},
            r"stacked needs grad_real with both branches, an even batch, got \[3, 3, 7\]",
        ),
        ({"projected": None}, "the gradient of scale needs projected"),
        ({"row_sums": torch.zeros(8)}, r"row_sums must be \[D\] with D = 7"),
    ],
)
def test_refusals_of_backward(changes: Inputs, message: str) -> None:
    grads = {"grad_real": torch.ones(2, 3, 7), "grad_shifted": torch.ones(2, 3, 7)}
    inputs = grads | make_row_inputs(OP) | {"linear_bias_dtype": F32, "output_mask": [True] * 5} | changes
    del inputs["linear_bias"]
    backward = torch.ops.apex_fast.projected_condition_shift_backward
    assert_refused(backward, inputs, f"projected_condition_shift_backward: {message}")
