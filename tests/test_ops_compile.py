"""The ops under torch.compile: one graph, forward and backward, dynamic shapes, the same bits from inductor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from functorch.compile import make_boxed_func
from ops_cases import (
    BF16,
    CONDITION_SHIFT,
    F32,
    MIXED_VELOCITY_LOSS,
    OP_VARIANT_IDS,
    OP_VARIANTS,
    RENOISE,
    SAMPLER_STEP,
    SHIFTED_VELOCITY_LOSS,
    Inputs,
    Op,
    make_inputs,
    random_like_data,
    upstream_for,
)
from ops_checks import assert_same_bits, run
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from apex_fast import ops

pytestmark = pytest.mark.usefixtures("one_thread")


def training_step(
    weight: Tensor, x: Tensor, z: Tensor, condition: Tensor, times: Tensor, settings: Inputs
) -> tuple[Tensor, ...]:
    """Every op once, around a network of one layer, as a schedule of the objective strings them together."""
    s, t = times.unbind()
    shifted = ops.condition_shift(condition, settings["scale"], settings["bias"], mask=settings["mask"])

    def network(x_t: Tensor, c: Tensor) -> Tensor:
        return torch.tanh(x_t.to(BF16) @ weight.to(BF16)) + c.mean(1, keepdim=True).to(BF16)

    x_s = ops.interpolate(x, z, s)
    v_gen = network(x_s, condition)
    x_fake_t, target = ops.renoise(v_gen, x_s, s, z, t)
    x_fake_t, target = x_fake_t.detach(), target.detach()
    v_shift = network(x_fake_t, shifted)
    v_real = network(x_fake_t, condition).detach()
    fake, correction, stats = ops.shifted_velocity_loss(v_gen, v_shift, v_real, target, clip=0.5)
    supervised = ops.mixed_velocity_loss(v_gen, x, z, v_fake=v_shift, mix_weight=0.25)
    moved = ops.sampler_step(x_s, v_gen, s, t)
    total = (fake + 2 * correction + 3 * supervised).mean() + moved.square().mean() + x_fake_t.mean()
    return total, fake, correction, supervised, stats, moved


def step_inputs(batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Inputs]:
    width = 24
    weight = (random_like_data((width, width), F32, "weight") / width**0.5).requires_grad_()
    x, z = (random_like_data((batch, 6, width), F32, name) for name in "xz")
    condition = random_like_data((batch, 5, width), F32, "condition")
    times = torch.stack([torch.linspace(0.9, 1, batch), torch.linspace(0.1, 0.8, batch)])
    settings = {
        "scale": torch.tensor(-1.0).requires_grad_(),
        "bias": torch.full((width,), 0.5).requires_grad_(),
        "mask": torch.arange(5).expand(batch, 5) < 4,
    }
    return weight, x, z, condition, times, settings


def check_compiled(compiled: Callable[..., tuple[Tensor, ...]], batch: int) -> None:
    expected_inputs, actual_inputs = step_inputs(batch), step_inputs(batch)
    expected, actual = training_step(*expected_inputs), compiled(*actual_inputs)
    expected[0].backward()
    actual[0].backward()
    # inductor keeps intermediate bf16 results in fp32 where eager rounds them
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(actual_inputs[0].grad, expected_inputs[0].grad, rtol=0.05, atol=0.002)
    for name in ("scale", "bias"):
        torch.testing.assert_close(actual_inputs[5][name].grad, expected_inputs[5][name].grad, rtol=0.05, atol=0.002)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_training_step_compiles_as_one_graph() -> None:
    """Traced by dynamo and by autograd, every op once forward and once backward, nothing decomposed."""
    counts: Counter[str] = Counter()

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        for node in graph.graph.nodes:
            name = str(getattr(node.target, "_schema", node.target)).split("(")[0]
            counts[name] += name.startswith("apex_fast::")
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        training_step, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=count, bw_compiler=count)
    )
    check_compiled(compiled, batch=4)
    counts = +counts
    assert counts["apex_fast::interpolate"] == 1
    for op in (CONDITION_SHIFT, RENOISE, SHIFTED_VELOCITY_LOSS, MIXED_VELOCITY_LOSS, SAMPLER_STEP):
        assert counts[f"apex_fast::{op.name}"] == 1, counts
        assert counts[f"apex_fast::{op.name}_backward"] <= 1, counts
    for op in (CONDITION_SHIFT, SHIFTED_VELOCITY_LOSS, MIXED_VELOCITY_LOSS, SAMPLER_STEP):
        assert counts[f"apex_fast::{op.name}_backward"] == 1, counts


@pytest.mark.usefixtures("fresh_compiler")
def test_losses_and_renoise_compile_to_machine_code() -> None:
    """With inductor, forward and backward, on operands of which some are not contiguous."""

    def loss(v_gen: Tensor, v_shift: Tensor, v_real: Tensor, x: Tensor, z: Tensor, s: Tensor, t: Tensor) -> Tensor:
        x_fake_t, target = ops.renoise(v_gen, x, s, z, t)
        fake, correction, _ = ops.shifted_velocity_loss(v_gen * 2, v_shift + 0.5, v_real, target, clip=0.5)
        mixed = ops.mixed_velocity_loss(v_shift.exp(), x_fake_t, z, v_fake=v_real, mix_weight=0.25)
        return (fake + 2 * correction + 3 * mixed).sum()

    shape, results = (3, 4, 6, 5), []
    for function in (loss, torch.compile(loss, fullgraph=True, dynamic=False)):
        inputs = [random_like_data(shape, F32, "compiled", index) for index in range(5)]
        inputs[1] = inputs[1].to(memory_format=torch.channels_last)
        inputs[4] = inputs[4].transpose(0, 1).contiguous().transpose(0, 1)
        v_gen, v_shift = inputs[0].requires_grad_(), inputs[1].requires_grad_()
        total = function(*inputs, torch.tensor([1.0, 0.9, 0.8]), torch.tensor([0.2, 0.5, 0.7]))
        total.backward()
        results.append((total.detach(), v_gen.grad, v_shift.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_training_step_compiles_with_dynamic_shapes() -> None:
    """One compilation serves every batch size."""
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(training_step, fullgraph=True, dynamic=True, backend=counter)
    check_compiled(compiled, batch=4)
    compilations = counter.frame_count
    for batch in (7, 3):
        check_compiled(compiled, batch)
    assert counter.frame_count == compilations


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("op", "variant"), OP_VARIANTS, ids=OP_VARIANT_IDS)
def test_inductor(op: Op, variant: str) -> None:
    """Each op alone, forward and backward, bit for bit as in eager mode."""
    inputs = make_inputs(op, (3, 4, 6, 5), variant, velocity=BF16, state=F32, layout="channels_last")
    upstream, wanted = upstream_for(op, inputs), [n for n in op.differentiable if inputs.get(n) is not None]
    compiled = torch.compile(lambda **arguments: op.public(**arguments), fullgraph=True, dynamic=False)
    eager, result = (run(f, inputs, wanted, upstream) for f in (op.public, compiled))
    assert_same_bits(result.outputs, eager.outputs, "outputs")
    assert_same_bits(result.gradients.values(), eager.gradients.values(), "gradients")
