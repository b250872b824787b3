"""apex_fast::interpolate: the optimal-transport path x_t = t z + (1 - t) x."""

from __future__ import annotations

import os

import pytest
import torch
from ops_cases import (
    BF16,
    F16,
    F32,
    F64,
    FLOATS,
    HALVES,
    INTERPOLATE,
    LAYOUTS,
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

from apex_fast import ops

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "one_thread")


def small_inputs(**changes: object) -> Inputs:
    return make_inputs(INTERPOLATE, (2, 4)) | changes


# ---- the truth


def test_twin_is_the_formula() -> None:
    assert_twin_is_the_formula(INTERPOLATE, "")


@pytest.mark.parametrize("time", (F32, F64))
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_dtype(dtype: torch.dtype, time: torch.dtype) -> None:
    assert_matches_truth(INTERPOLATE, make_inputs(INTERPOLATE, (5, 3, 701), state=dtype, time=time))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_at_most_twice_as_wrong_as_the_plain_formula(dtype: torch.dtype) -> None:
    assert_within_twice_plain(INTERPOLATE, make_inputs(INTERPOLATE, (5, 3, 701), state=dtype), dtype)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_size(shape: tuple[int, ...]) -> None:
    for dtype in (F32, F16):
        assert_matches_truth(INTERPOLATE, make_inputs(INTERPOLATE, shape, state=dtype))


@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    check_layout(INTERPOLATE, layout, "", state=dtype)
    check_backward_op(INTERPOLATE, "", layout, state=dtype)


def test_every_operand_in_a_layout_of_its_own() -> None:
    check_mixed_layouts(INTERPOLATE, "")


def test_samples_that_overlap_in_memory() -> None:
    windows = random_like_data((40,), F32, "windows").unfold(0, 30, 1)
    inputs = small_inputs(x=windows, z=random_like_data(windows.shape, F32, "noise"), t=torch.linspace(0, 1, 11))
    assert_matches_truth(INTERPOLATE, inputs)


@pytest.mark.slow
def test_more_elements_than_32_bits_count() -> None:
    """4.6 GB of output from two small tensors, expanded."""
    batch, n = 70_000, 32_768
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 * 2**30:
        pytest.skip("needs 8 GB of free memory")
    x, z = (random_like_data((1, n), BF16, name) for name in "xz")
    t = torch.linspace(0, 1, batch)
    torch.use_deterministic_algorithms(False)  # filling the output with NaN takes longer than the op
    result = ops.interpolate(x.expand(batch, n), z.expand(batch, n), t)
    for b in (0, 1, 2**31 // n - 1, 2**31 // n, 2**31 // n + 1, batch - 1):
        assert_same_bits([result[b : b + 1]], [ops.interpolate(x, z, t[b : b + 1])], f"sample {b}")


# ---- times


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_ends_of_the_path_are_exact(dtype: torch.dtype) -> None:
    inputs = make_inputs(INTERPOLATE, (2, 1001), state=dtype) | {"t": torch.tensor([0.0, 1.0])}
    assert_same_bits([ops.interpolate(**inputs)], [torch.stack([inputs["x"][0], inputs["z"][1]])], "ends")


def test_one_minus_t_keeps_its_digits() -> None:
    """1 - t is formed before it is rounded: with fp64 times it does not vanish next to 1."""
    t = torch.tensor([1 - 1e-9, 0.999], dtype=F64)
    result = ops.interpolate(torch.ones(2, 33), torch.zeros(2, 33), t)
    torch.testing.assert_close(result[:, 0].double(), 1 - t, rtol=1e-6, atol=0)


@pytest.mark.parametrize("time", (F32, F64))
def test_times_with_any_stride(time: torch.dtype) -> None:
    inputs = make_inputs(INTERPOLATE, (6, 50))
    for t in (torch.linspace(0, 1, 12, dtype=time)[::2], torch.tensor(0.3, dtype=time).expand(6)):
        assert t.stride() != (1,)
        assert_matches_truth(INTERPOLATE, inputs | {"t": t})


# ---- gradients


def test_gradcheck() -> None:
    x, z, t = (make_inputs(INTERPOLATE, (3, 5), state=F64, time=F64)[name] for name in "xzt")
    assert torch.autograd.gradcheck(
        lambda x, z: torch.ops.apex_fast.interpolate(x, z, t), (x.requires_grad_(), z.requires_grad_())
    )


@pytest.mark.parametrize("wanted", ("x", "z"))
def test_only_one_gradient(wanted: str) -> None:
    inputs = make_inputs(INTERPOLATE, (3, 70))
    upstream = upstream_for(INTERPOLATE, inputs)
    both, one = (run(ops.interpolate, inputs, names, upstream).gradients for names in ("xz", wanted))
    assert set(one) == {wanted}
    assert_same_bits([one[wanted]], [both[wanted]], wanted)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_that_is_one_number_expanded(dtype: torch.dtype) -> None:
    """What ``.sum().backward()`` sends: strides of zero."""
    inputs = make_inputs(INTERPOLATE, (4, 3, 50), state=dtype)
    x, t = inputs["x"].requires_grad_(), inputs["t"]
    ops.interpolate(x, inputs["z"], t).sum().backward()
    expected = (1 - t.double()).to(dtype)[:, None, None].expand_as(x)
    torch.testing.assert_close(x.grad, expected)


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(())}, r"interpolate: x must be \[B, ...\], got a tensor without dimensions"),
        (
            {"x": torch.zeros(2, 4, dtype=torch.int64)},
            "interpolate: x must be float32, float64, bfloat16 or float16, got Long",
        ),
        ({"x": torch.zeros(2, 4, dtype=torch.complex64)}, "interpolate: x must be float32, .*got ComplexFloat"),
        ({"z": torch.zeros(2, 3)}, r"interpolate: z must have the shape of x, got \[2, 3\] and \[2, 4\]"),
        ({"z": torch.zeros(1, 4)}, r"interpolate: z must have the shape of x, got \[1, 4\] and \[2, 4\]"),
        (
            {"z": torch.zeros(2, 4, dtype=BF16)},
            "interpolate: z must have the dtype of x, got BFloat16 and Float; cast one",
        ),
        (
            {"t": torch.zeros(2, dtype=BF16)},
            r"interpolate: t must be float32 or float64, got BFloat16: .*0.999.*t.float\(\)",
        ),
        ({"t": torch.zeros(2, dtype=F16)}, "interpolate: t must be float32 or float64, got Half"),
        ({"t": torch.zeros(2, dtype=torch.int64)}, "interpolate: t must be float32 or float64, got Long"),
        ({"t": torch.zeros(3)}, r"interpolate: t must be \[B\] with the batch of x \(2\), got \[3\]"),
        ({"t": torch.zeros(2, 1)}, r"interpolate: t must be \[B\] with the batch of x \(2\), got \[2, 1\]"),
        ({"t": torch.tensor(0.5)}, r"interpolate: t must be \[B\].*got \[\]; .*t.expand\(B\)"),
        ({"t": torch.zeros(2, requires_grad=True)}, "interpolate: t has no derivative; detach it"),
    ],
)
def test_refusals(changes: Inputs, message: str) -> None:
    assert_refused(ops.interpolate, small_inputs(**changes), message)


def test_times_may_want_a_gradient_where_none_is_recorded() -> None:
    inputs = small_inputs(t=torch.full((2,), 0.5, requires_grad=True))
    with torch.no_grad():
        assert ops.interpolate(**inputs).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": torch.zeros(())}, r"interpolate_backward: grad must be \[B, ...\]"),
        ({"t": torch.zeros(3)}, r"interpolate_backward: t must be \[B\] with the batch of grad \(2\), got \[3\]"),
        ({"t": torch.zeros(2, dtype=F16)}, "interpolate_backward: t must be float32 or float64, got Half"),
    ],
)
def test_refusals_of_backward(changes: Inputs, message: str) -> None:
    inputs = {"grad": torch.ones(2, 4), "t": torch.ones(2), "output_mask": [True, True]}
    assert_refused(torch.ops.apex_fast.interpolate_backward, inputs | changes, message)
