"""apex_fast::condition_shift_rms_norm: the RMS norm of c and of A c + b."""

from __future__ import annotations

import pytest
import torch
from ops_cases import BF16, F16, F32, F64, FLOATS, HALVES, Inputs
from ops_checks import allocated_bytes, assert_refused, assert_same_bits, bytes_of, run
from row_ops import CONDITION_SHIFT_RMS_NORM as OP
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
    for scale, bias, weight in ((F32, F32, dtype), (F64, BF16, F16), (F16, F64, F32)):
        parameters = {"scale": scale, "bias": bias, "weight": weight}
        assert_rows_match_truth(OP, make_row_inputs(OP, (2, 5, 701), variant, dtype=dtype, parameters=parameters))


@every_variant
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_at_most_twice_as_wrong_as_the_plain_formula(dtype: torch.dtype, variant: str) -> None:
    for parameters in (dtype, F32):
        inputs = make_row_inputs(OP, (2, 5, 301), variant, dtype=dtype, parameters=parameters)
        assert_rows_within_twice_plain(OP, inputs, dtype)


@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_every_size(shape: tuple[int, ...]) -> None:
    for variant in ("masked", "stacked_masked", "diagonal"):
        for dtype in (F32, BF16):
            assert_rows_match_truth(OP, make_row_inputs(OP, shape, variant, dtype=dtype))


def test_channels_alone() -> None:
    assert_rows_match_truth(OP, make_row_inputs(OP, (9,), "scalar"))


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
    inputs = make_row_inputs(OP, (2, 6, 40), "diagonal")
    expected = ops.condition_shift_rms_norm(**inputs)
    strided = inputs | {
        "condition": inputs["condition"].transpose(0, 1).contiguous().transpose(0, 1),
        "scale": torch.stack([inputs["scale"], inputs["bias"]], 1)[:, 0],
        "mask": inputs["mask"].t().contiguous().t(),
    }
    assert not any(strided[name].is_contiguous() for name in ("condition", "scale", "mask"))
    assert_same_bits(ops.condition_shift_rms_norm(**strided), expected, "strided")


def test_one_output_is_the_one_of_both() -> None:
    inputs = make_row_inputs(OP, (2, 6, 40), "masked", dtype=BF16)
    both = ops.condition_shift_rms_norm(**inputs)
    real, nothing = ops.condition_shift_rms_norm(**inputs, output_mask=(True, False))
    none, shifted = ops.condition_shift_rms_norm(**inputs, output_mask=(False, True))
    stacked, rest = ops.condition_shift_rms_norm(**inputs, stacked=True)
    assert [t.shape for t in (nothing, none, rest)] == [(0,)] * 3
    assert_same_bits((real, shifted), both, "one")
    assert_same_bits(stacked.chunk(2), both, "stacked")


def test_only_the_used_output_sends_a_gradient() -> None:
    inputs = make_row_inputs(OP, (2, 6, 40), "masked")
    leaves = {name: inputs[name].requires_grad_() for name in OP.differentiable}
    normed, _ = ops.condition_shift_rms_norm(**inputs)
    gradients = torch.autograd.grad(normed.sum(), list(leaves.values()))
    assert gradients[0].any() and gradients[3].any() and not gradients[1].any() and not gradients[2].any()


def test_masked_tokens_are_the_real_ones_whatever_the_shift_is() -> None:
    inputs = make_row_inputs(OP, (2, 3, 40), "scalar", dtype=BF16)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    inputs["scale"] = torch.tensor(float("nan"))
    normed, shifted = ops.condition_shift_rms_norm(**inputs, mask=mask)
    assert torch.equal(normed[~mask], shifted[~mask]) and shifted[mask].isnan().all()
    gradients = run(ops.condition_shift_rms_norm, inputs | {"mask": torch.zeros_like(mask)}, OP.differentiable,
                    row_upstream(OP, inputs)).gradients  # fmt: skip
    assert not gradients["scale"].any() and not gradients["bias"].any()
    assert gradients["condition"].isfinite().all()


def test_statistics_are_fp32_and_sums_do_not_drift() -> None:
    condition = torch.full((1, 1, 200_000), 1e-3, dtype=BF16)
    condition[..., 0] = 1.0
    inputs = {
        "condition": condition,
        "scale": torch.tensor(1.0),
        "bias": torch.tensor(0.0),
        "weight": torch.ones(200_000),
        "eps": 0.0,
    }
    normed, shifted = ops.condition_shift_rms_norm(**inputs)
    truth, _ = OP.twin(**inputs | {"condition": condition.double()})
    torch.testing.assert_close(normed.double(), truth, rtol=2**-8, atol=0)
    assert torch.equal(normed, shifted)


def test_bytes() -> None:
    """The outputs and nothing else forward; nothing saved but the inputs."""
    inputs = make_row_inputs(OP, (2, 64, 512), "scalar", dtype=BF16)
    with torch.no_grad():
        assert allocated_bytes(lambda: ops.condition_shift_rms_norm(**inputs)) == 2 * bytes_of(inputs["condition"])
    saved: list[torch.Tensor] = []
    leaves = [inputs[name].requires_grad_() for name in OP.differentiable]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.condition_shift_rms_norm(**inputs)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in leaves}


def test_repeats_bit_for_bit_on_any_number_of_threads(set_threads) -> None:
    for variant in VARIANTS:
        inputs = make_row_inputs(OP, (3, 130, 1100), variant, dtype=BF16)
        results = []
        for threads in (1, 1, 2, 3):
            set_threads(threads)
            result = run(ops.condition_shift_rms_norm, inputs, leaves_of(OP, inputs), row_upstream(OP, inputs))
            results.append([*result.outputs, *result.gradients.values()])
            assert_same_bits(results[-1], results[0], f"{variant} on {threads} threads")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": torch.zeros(())}, r"condition must be \[..., D\], got a tensor without dimensions"),
        ({"condition": torch.zeros(2, 3, 7, dtype=torch.int64)}, "condition must be float32, .*got Long"),
        (
            {"scale": torch.zeros(3)},
            r"scale must be \[\] or \[D\] with D = 7, the last dimension of condition, .*\[3\]",
        ),
        ({"bias": torch.zeros(1, 7)}, r"bias must be \[\] or \[D\] with D = 7, .*got \[1, 7\]"),
        ({"weight": torch.zeros(())}, r"weight must be \[D\] with D = 7, the last dimension of condition, got \[\]"),
        ({"weight": torch.zeros(7, dtype=torch.int64)}, "weight must be float32, .*got Long"),
        ({"mask": torch.ones(2, 4)}, r"mask must have the shape of condition without D, \[2, 3\], got \[2, 4\]"),
        ({"eps": -1.0}, "eps must not be negative, got -1"),
        (
            {"stacked": True, "output_mask": [True, False]},
            r"stacked holds both branches, so output_mask must be \[True, True\]",
        ),
        ({"condition": torch.zeros(7), "stacked": True}, r"condition must be \[B, ..., D\] to be stacked, got \[7\]"),
    ],
)
def test_refusals(changes: Inputs, message: str) -> None:
    inputs = make_row_inputs(OP) | changes
    assert_refused(ops.condition_shift_rms_norm, inputs, f"condition_shift_rms_norm: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_normed": None, "grad_shifted": None}, "grad_normed or grad_shifted must be given"),
        ({"grad_normed": torch.zeros(2, 3)}, r"grad_normed must be \[2, 3, 7\], the shape of condition, got \[2, 3\]"),
        ({"stacked": True}, "stacked has one gradient, grad_normed; leave grad_shifted out"),
        (
            {"stacked": True, "grad_shifted": None},
            r"grad_normed must be \[4, 3, 7\], both branches of condition, got \[2, 3, 7\]",
        ),
        ({"weight": torch.zeros(8)}, r"weight must be \[D\] with D = 7"),
    ],
)
def test_refusals_of_backward(changes: Inputs, message: str) -> None:
    grads = {"grad_normed": torch.ones(2, 3, 7), "grad_shifted": torch.ones(2, 3, 7)}
    inputs = grads | make_row_inputs(OP) | {"output_mask": [True] * 4} | changes
    backward = torch.ops.apex_fast.condition_shift_rms_norm_backward
    assert_refused(backward, inputs, f"condition_shift_rms_norm_backward: {message}")
