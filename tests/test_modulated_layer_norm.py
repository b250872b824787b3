"""apex_fast::modulated_layer_norm and apex_fast::velocity_head: the end of a diffusion transformer."""

from __future__ import annotations

import pytest
import torch
from ops_cases import BF16, F16, F32, F64, FLOATS, HALVES, Inputs, random_like_data
from ops_checks import allocated_bytes, assert_refused, assert_same_bits, bytes_of, run
from row_ops import MODULATED_LAYER_NORM as OP
from row_ops import (
    ROW_SHAPES,
    assert_rows_match_truth,
    assert_rows_within_twice_plain,
    backward_row_inputs,
    check_row_backward,
    check_row_dispatch,
    check_row_gradients,
    leaves_of,
    make_row_inputs,
    row_upstream,
)
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_dtype(dtype: torch.dtype) -> None:
    for scale, shift in ((F32, dtype), (F64, BF16), (BF16, F16), (F16, F64)):
        inputs = make_row_inputs(OP, (2, 5, 701), dtype=dtype, parameters={"scale": scale, "shift": shift})
        assert_rows_match_truth(OP, inputs)


def test_rows_that_are_not_finite_do_not_get_finite_statistics() -> None:
    """A variance that overflows, or an inf or NaN in the row, must not turn into a variance of zero."""
    inputs = make_row_inputs(OP, (1, 5, 1000), dtype=F32, parameters=F32)
    hidden = inputs[OP.rows]
    with torch.no_grad():
        hidden[0, 1] = 1e30 * (1 + 0.5 * hidden[0, 1].clamp(-1, 1))
        hidden[0, 2, 5] = float("nan")
        hidden[0, 3, 7] = float("inf")
    found, expected = (run(function, inputs).outputs for function in (OP.dispatcher, OP.twin))
    rows = [0, 1, 4]
    torch.testing.assert_close(found[0][0, rows], expected[0][0, rows])
    torch.testing.assert_close(found[2], expected[2], equal_nan=True)
    assert found[2][0, 1] == 0 and found[2][0, 2:4].isnan().all() and found[0][0, 2:4].isnan().any()


@every_variant
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_at_most_twice_as_wrong_as_the_plain_formula(dtype: torch.dtype, variant: str) -> None:
    for parameters in (dtype, F32):
        inputs = make_row_inputs(OP, (2, 5, 301), variant, dtype=dtype, parameters=parameters)
        assert_rows_within_twice_plain(OP, inputs, dtype)


@pytest.mark.parametrize("shape", [*ROW_SHAPES, (3, 700)], ids=str)
def test_every_size(shape: tuple[int, ...]) -> None:
    if shape == (1, 1, 1):
        pytest.skip("one channel is its own mean: what is left is rounding, enlarged")
    for dtype in (F32, BF16):
        assert_rows_match_truth(OP, make_row_inputs(OP, shape, dtype=dtype))


def test_one_channel_is_its_own_mean() -> None:
    out, mean, rstd = ops.modulated_layer_norm(torch.full((2, 3, 1), 5.0), torch.ones(2, 1), torch.ones(2, 1), 1e-6)
    assert torch.equal(out, torch.ones(2, 3, 1)) and torch.equal(mean, torch.full((2, 3), 5.0))
    torch.testing.assert_close(rstd, torch.full((2, 3), 1e3))


@pytest.mark.parametrize("channels", (16, 37, 1000))
def test_a_large_mean_does_not_cost_the_variance(channels: int) -> None:
    inputs = make_row_inputs(OP, (2, 3, channels))
    inputs["hidden"] = (inputs["hidden"] * 0.1 + 1000).round(decimals=3)
    _, mean, rstd = ops.modulated_layer_norm(**inputs)
    _, true_mean, true_rstd = OP.twin(**inputs | {"hidden": inputs["hidden"].double()})
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(rstd.double(), true_rstd, rtol=1e-4, atol=0)


@every_variant
def test_backward_op(variant: str) -> None:
    check_row_backward(OP, variant, dtype=BF16)


@every_variant
def test_dispatch(variant: str) -> None:
    check_row_dispatch(OP, variant)


@every_variant
def test_gradcheck(variant: str) -> None:
    check_row_gradients(OP, variant)


def test_strides_change_nothing() -> None:
    inputs = make_row_inputs(OP, (2, 6, 40))
    expected = ops.modulated_layer_norm(**inputs)
    both = torch.cat([inputs["shift"], inputs["scale"]], 1)
    strided = inputs | {
        "hidden": inputs["hidden"].transpose(0, 1).contiguous().transpose(0, 1),
        "shift": both[:, :40],
        "scale": torch.stack([inputs["scale"], inputs["shift"]], -1)[..., 0],
    }
    assert not any(strided[name].is_contiguous() for name in ("hidden", "scale", "shift"))
    assert_same_bits(ops.modulated_layer_norm(**strided), expected, "strided")
    upstream = row_upstream(OP, inputs)
    ours, theirs = (run(OP.public, i, OP.differentiable, upstream).gradients for i in (strided, inputs))
    assert_same_bits(ours.values(), theirs.values(), "gradients of strided")


def test_bytes() -> None:
    """Output and row statistics; nothing saved but hidden, scale and those."""
    inputs = make_row_inputs(OP, (2, 64, 512), dtype=BF16)
    with torch.no_grad():
        made = allocated_bytes(lambda: ops.modulated_layer_norm(**inputs))
    assert made == bytes_of(inputs["hidden"]) + 2 * 4 * 2 * 64
    saved: list[torch.Tensor] = []
    leaves = [inputs[name].requires_grad_() for name in OP.differentiable]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = ops.modulated_layer_norm(**inputs)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (*leaves[:2], *outputs[1:])}


def test_repeats_bit_for_bit_on_any_number_of_threads(set_threads) -> None:
    for variant in VARIANTS:
        inputs = make_row_inputs(OP, (3, 130, 1100), variant, dtype=BF16)
        results = []
        for threads in (1, 1, 2, 3):
            set_threads(threads)
            result = run(ops.modulated_layer_norm, inputs, leaves_of(OP, inputs), row_upstream(OP, inputs))
            results.append([*result.outputs, *result.gradients.values()])
            assert_same_bits(results[-1], results[0], f"{variant} on {threads} threads")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(7)}, r"hidden must be \[B, ..., D\], got \[7\]"),
        ({"hidden": torch.zeros(2, 3, 7, dtype=torch.int64)}, "hidden must be float32, .*got Long"),
        ({"scale": torch.zeros(7)}, r"scale must be \[B, D\] = \[2, 7\], batch and channels of hidden, got \[7\]"),
        (
            {"shift": torch.zeros(1, 7)},
            r"shift must be \[B, D\] = \[2, 7\], batch and channels of hidden, got \[1, 7\]",
        ),
        ({"shift": torch.zeros(2, 7, dtype=torch.int64)}, "shift must be float32, .*got Long"),
        ({"eps": -1.0}, "eps must not be negative, got -1"),
    ],
)
def test_refusals(changes: Inputs, message: str) -> None:
    assert_refused(ops.modulated_layer_norm, make_row_inputs(OP) | changes, f"modulated_layer_norm: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": torch.zeros(2, 3)}, r"grad must have the shape of hidden, got \[2, 3\] and \[2, 3, 7\]"),
        (
            {"mean": torch.zeros(2)},
            r"mean must be Float \[2, 3\], as modulated_layer_norm returned it, got Float \[2\]",
        ),
        ({"rstd": torch.zeros(2, 3, dtype=F64)}, r"rstd must be Float \[2, 3\], .*got Double \[2, 3\]"),
        ({"scale": torch.zeros(7)}, r"scale must be \[B, D\] = \[2, 7\]"),
        ({"shift_dtype": torch.int64}, "shift_dtype must be float32, .*got Long"),
    ],
)
def test_refusals_of_backward(changes: Inputs, message: str) -> None:
    inputs = backward_row_inputs(OP, make_row_inputs(OP)) | changes
    backward = torch.ops.apex_fast.modulated_layer_norm_backward
    assert_refused(backward, inputs, f"modulated_layer_norm_backward: {message}")


# ---- the head


def head_inputs(dtype: torch.dtype = F32, shape: tuple[int, ...] = (2, 6, 40), modulation=None) -> Inputs:
    inputs = make_row_inputs(OP, shape, dtype=dtype, parameters=modulation or dtype)
    weight = random_like_data((9, shape[-1]), dtype, "head", "weight")
    return inputs | {"weight": weight, "bias": random_like_data((9,), dtype, "head", "bias")}


HEAD = ("hidden", "scale", "shift", "weight", "bias")


def plain_head(hidden, scale, shift, weight, bias, eps):
    return torch.nn.functional.linear(OP.plain(hidden, scale, shift, eps)[0], weight, bias)


def head_results(
    function, inputs: Inputs, upstream: torch.Tensor, cast: torch.dtype | None = None
) -> list[torch.Tensor]:
    result = run(function, inputs, HEAD, [upstream], cast=cast)
    return [*result.outputs, *(result.gradients[name] for name in HEAD if name in result.gradients)]


@pytest.mark.parametrize("bias", (True, False))
def test_head_is_the_formula(bias: bool) -> None:
    inputs = head_inputs(F64)
    if not bias:
        inputs["bias"] = None
    upstream = random_like_data((2, 6, 9), F64, "head", "upstream")
    ours, plain = (head_results(f, inputs, upstream) for f in (ops.velocity_head, plain_head))
    assert len(ours) == 5 + bias
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-12)
    leaves = [v.detach().requires_grad_() for v in inputs.values() if isinstance(v, torch.Tensor)]
    rest = () if bias else (None,)
    assert torch.autograd.gradcheck(lambda *v: ops.velocity_head(*v, *rest, eps=1e-2), leaves)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("modulation", (None, F32))
def test_head_in_half_precision_is_at_most_twice_as_wrong(dtype: torch.dtype, modulation) -> None:
    inputs = head_inputs(dtype, (2, 33, 301), modulation)
    upstream = random_like_data((2, 33, 9), dtype, "head", "upstream")
    ours = head_results(ops.velocity_head, inputs, upstream)
    plain, truth = (head_results(plain_head, inputs, upstream, cast=cast) for cast in (dtype, F64))
    for value, approximate, expected in zip(ours, plain, truth, strict=True):
        mine, theirs = ((v.double() - expected).abs().max().item() for v in (value, approximate))
        assert mine <= 2 * theirs + 1e-6 * expected.abs().max().item(), f"{mine} against {theirs}"


def test_head_keeps_hidden_and_its_row_statistics() -> None:
    inputs = head_inputs(BF16, (2, 64, 512))
    leaves = [inputs[name].requires_grad_() for name in HEAD]
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.velocity_head(**inputs)
    new = [t for t in saved if t.data_ptr() not in {leaf.data_ptr() for leaf in leaves}]
    assert [tuple(t.shape) for t in new] == [(2, 64), (2, 64)]
    assert not any(t.data_ptr() == inputs["bias"].data_ptr() for t in saved)


def test_head_gives_only_the_gradients_that_are_wanted() -> None:
    for wanted in HEAD:
        inputs = head_inputs()
        inputs[wanted].requires_grad_()
        calls: list[str] = []

        class Calls(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, calls=calls):
                calls.append(func.name())
                return func(*args, **(kwargs or {}))

        velocity = ops.velocity_head(**inputs)
        with Calls():
            velocity.sum().backward()
        assert inputs[wanted].grad.shape == inputs[wanted].shape
        assert calls.count("apex_fast::velocity_head_backward") == 1


def test_head_under_autocast_keeps_its_dtypes() -> None:
    inputs = head_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        velocity = ops.velocity_head(**inputs)
    assert_same_bits([velocity], [ops.velocity_head(**inputs)], "autocast")


def test_head_dispatch() -> None:
    for dtype in (F32, BF16):
        inputs = head_inputs(dtype)
        velocity, mean, rstd = torch.ops.apex_fast.velocity_head(**inputs)
        rest = {name: value for name, value in inputs.items() if name != "bias"}
        arguments = {"grad": torch.ones_like(velocity), **rest, "mean": mean, "rstd": rstd, "output_mask": [True] * 5}
        torch.library.opcheck(torch.ops.apex_fast.velocity_head_backward.default, (), arguments)
        for name in HEAD:
            inputs[name].requires_grad_()
        torch.library.opcheck(torch.ops.apex_fast.velocity_head.default, (), inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": torch.zeros(9, 41)},
            r"weight must be \[O, D\] with D = 40, the last dimension of hidden, got \[9, 41\]",
        ),
        ({"weight": torch.zeros(9, 40, dtype=BF16)}, "weight must have the dtype of hidden, got BFloat16 and Float"),
        ({"bias": torch.zeros(8)}, r"bias must be \[O\] with O = 9, the rows of weight, got \[8\]"),
        ({"hidden": torch.zeros(40)}, r"hidden must be \[B, ..., D\], got \[40\]"),
    ],
)
def test_head_complains(changes: Inputs, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"velocity_head: {message}"):
        ops.velocity_head(**head_inputs() | changes)
