from __future__ import annotations

import math

import pytest
import torch
from small_networks import TextNetwork, VectorNetwork
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apex_fast import Condition, SamplerInfo, Velocities, path, sample, time_grid

CONDITION = torch.zeros(4, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 3, dtype=torch.float64, generator=seeded()).to(dtype)


class Gaussian:
    """Exact velocity for data N(mean, variance), whose flow is known: it carries z to mean + std z."""

    mean, variance = 0.8, 0.09

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.times.append(t[0].item())
        assert bool((t == t[0]).all()) and t.shape == x_t.shape[:1]
        t = path.per_sample(t, x_t)
        gain = (t - (1 - t) * self.variance) / (t**2 + (1 - t) ** 2 * self.variance)
        return -self.mean + gain * (x_t - (1 - t) * self.mean)

    def exact(self, z: Tensor) -> Tensor:
        return self.mean + math.sqrt(self.variance) * z


def error(steps: int, method: str, times: str = "uniform") -> float:
    velocity, z = Gaussian(), noise()
    found = sample(velocity, z, CONDITION, num_inference_steps=steps, method=method, times=times)
    return (found - velocity.exact(z)).abs().max().item()


@pytest.mark.parametrize("times", ["uniform", "shifted:2", "power:1.5"])
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(method, order, times):
    errors = [error(steps, method, times) for steps in (64, 128, 256, 512)]
    orders = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert all(order - 0.15 < found < order + 0.15 for found in orders), orders


def test_one_step_is_the_endpoint():
    z, velocity = noise(), Gaussian()
    one = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(sample(velocity, z, CONDITION), path.endpoint(velocity(z, one, CONDITION), z, one))
    # one step of Heun is one of Euler: there is no velocity to be had at t = 0
    torch.testing.assert_close(sample(velocity, z, CONDITION, method="heun"), sample(velocity, z, CONDITION))


def test_euler_steps_by_hand():
    z, velocity = noise(), Gaussian()
    x, grid = z.clone(), [1.0, 0.7, 0.2, 0.0]
    for t, t_next in zip(grid, grid[1:], strict=False):
        x = x + (t_next - t) * velocity(x, torch.full((4,), t, dtype=torch.float64), CONDITION)
    torch.testing.assert_close(sample(velocity, z, CONDITION, times=torch.tensor(grid, dtype=torch.float64)), x)


@pytest.mark.parametrize("stochasticity", [1.0, 0.4])
def test_noise_is_renewed_between_the_steps(stochasticity):
    z, velocity = noise(), Gaussian()
    found = sample(
        velocity, z, CONDITION, num_inference_steps=3, stochasticity=stochasticity, generator=seeded(5), times="uniform"
    )
    x, generator = z.clone(), seeded(5)
    for t, t_next in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
        v = velocity(x, torch.full((4,), t, dtype=torch.float64), CONDITION)
        x_hat, z_hat = x - t * v, x + (1 - t) * v
        fresh = torch.randn(4, 3, generator=generator).double() if t_next else 0.0
        end = math.sqrt(1 - stochasticity) * z_hat + math.sqrt(stochasticity) * fresh
        x = (1 - t_next) * x_hat + t_next * end
    torch.testing.assert_close(found, x)


def test_the_last_step_draws_nothing():
    generator = seeded()
    before = generator.get_state()
    sample(Gaussian(), noise(), CONDITION, stochasticity=1.0, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_the_generator_decides_and_the_global_state_is_left_alone():
    arguments = {"num_inference_steps": 3, "stochasticity": 1.0}
    before = torch.get_rng_state()
    one = sample(Gaussian(), noise(), CONDITION, generator=seeded(1), **arguments)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, sample(Gaussian(), noise(), CONDITION, generator=seeded(1), **arguments))
    assert not torch.equal(one, sample(Gaussian(), noise(), CONDITION, generator=seeded(2), **arguments))


# ---- guidance, counts, callback


@pytest.mark.parametrize(
    ("method", "steps", "guided", "evaluations"),
    [
        ("euler", 1, False, 1),
        ("euler", 4, False, 4),
        ("euler", 4, True, 8),
        ("heun", 4, False, 7),
        ("heun", 4, True, 14),
    ],
)
def test_steps_and_network_evaluations_are_counted(method, steps, guided, evaluations):
    calls = []

    def velocity(x_t, t, condition):
        calls.append(len(x_t))
        assert len(condition) == len(t) == len(x_t)
        return x_t * 0.1

    guidance = {"guidance_scale": 2.0, "negative_condition": torch.zeros(1, 1)} if guided else {}
    _, info = sample(
        velocity, noise(), CONDITION, num_inference_steps=steps, method=method, return_info=True, **guidance
    )
    assert info == SamplerInfo(steps, evaluations)
    # guidance doubles the batch of a call, not the number of calls
    assert sum(calls) == 4 * evaluations and set(calls) == {8 if guided else 4}


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_guidance_extrapolates_from_the_negative_condition(method):
    def velocity(x_t, t, condition):
        return condition * x_t

    z = noise()
    positive, negative = torch.full((4, 1), 0.3).double(), torch.full((1, 1), 0.1).double()
    found = sample(
        velocity,
        z,
        positive,
        negative_condition=negative,
        guidance_scale=3.0,
        num_inference_steps=2,
        method=method,
    )
    wanted = sample(lambda x, t, c: (0.1 + 3.0 * (0.3 - 0.1)) * x, z, positive, num_inference_steps=2, method=method)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_a_family_may_guide_in_its_own_way():
    def velocity(x_t, t, condition):
        return condition * x_t

    options = {"negative_condition": torch.full((1, 1), 0.1).double(), "guidance_scale": 3.0, "num_inference_steps": 2}
    positive = torch.full((4, 1), 0.3).double()
    found = sample(velocity, noise(), positive, guide=lambda v, u, scale: v + scale * (v - u), **options)
    wanted = sample(velocity, noise(), positive, **{**options, "guidance_scale": 4.0})
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="the guided velocity must return the shape"):
        sample(velocity, noise(), positive, guide=lambda v, u, scale: v[:1], **options)


def test_the_callback_sees_every_step():
    seen = []
    velocity, z = Gaussian(), noise()
    result = sample(velocity, z, CONDITION, num_inference_steps=3, callback=lambda *arguments: seen.append(arguments))
    assert [index for index, *_ in seen] == [0, 1, 2]
    assert [t for _, t, *_ in seen] == pytest.approx([2 / 3, 1 / 3, 0.0])
    assert torch.equal(seen[-1][2], result)
    one = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(seen[0][3], path.endpoint(velocity(z, one, CONDITION), z, one))
    torch.testing.assert_close(seen[-1][3], result)  # the last step goes to its own clean estimate
    assert torch.equal(result, sample(velocity, z, CONDITION, num_inference_steps=3))


# ---- dtypes, state, conditions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_state_is_fp32_whatever_the_network_computes_in(dtype):
    fed = set()

    def velocity(x_t, t, condition):
        fed.add((x_t.dtype, t.dtype))
        return (x_t * 1e-3).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = noise(dtype)
    found = sample(velocity, z, CONDITION, num_inference_steps=64)
    assert found.dtype == wide and fed == {(dtype, wide)}
    if dtype == torch.bfloat16:
        # steps of 1e-3 / 64 vanish in a bf16 state; in fp32 they add up
        torch.testing.assert_close(found, z.float() * math.exp(-1e-3), rtol=1e-4, atol=1e-5)
        assert not torch.equal(found, z.float())


def test_noise_is_not_modified():
    z = noise()
    before = z.clone()
    sample(Gaussian(), z, CONDITION, num_inference_steps=3, stochasticity=0.5, generator=seeded())
    assert torch.equal(z, before) and z._version == 0


def test_a_condition_reaches_the_network_and_one_serves_the_batch():
    torch.manual_seed(0)
    model = TextNetwork()
    one = Condition(torch.randn(1, 3, 4), torch.tensor([[1, 1, 0]]))
    z = torch.randn(2, 2, 4, 4)
    found = sample(model, z, one, num_inference_steps=2, guidance_scale=2.0, negative_condition=one.index([0]))
    torch.testing.assert_close(found, sample(model, z, one.index([0, 0]), num_inference_steps=2))


def test_history_is_kept_only_on_request():
    torch.manual_seed(0)
    model = VectorNetwork(dim=3, condition_dim=1).double()
    assert not sample(model, noise(), CONDITION, num_inference_steps=2).requires_grad
    found = sample(model, noise(), CONDITION, num_inference_steps=2, with_grad=True)
    found.sum().backward()
    gradient = model.last.bias.grad.clone()
    with torch.no_grad():
        shifted = []
        for by in (1e-5, -2e-5):
            model.last.bias += by
            shifted.append(sample(model, noise(), CONDITION, num_inference_steps=2).sum())
    assert gradient.sum().item() == pytest.approx(((shifted[0] - shifted[1]) / 2e-5).item(), rel=1e-5)


def test_sampling_runs_the_ops():
    class OpsSeen(TorchDispatchMode):
        names: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    with OpsSeen() as seen:
        sample(Gaussian(), noise(), CONDITION, num_inference_steps=2)
    assert "apex_fast::sampler_step" in seen.names


# ---- grids


def test_presets():
    torch.testing.assert_close(time_grid(4), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))
    torch.testing.assert_close(time_grid(2, "shifted"), torch.tensor([1, 0.75, 0], dtype=torch.float64))
    torch.testing.assert_close(time_grid(2, "shifted:5"), torch.tensor([1, 5 / 6, 0], dtype=torch.float64))
    torch.testing.assert_close(time_grid(2, "power"), torch.tensor([1, 0.25, 0], dtype=torch.float64))
    torch.testing.assert_close(time_grid(2, "power:0.5"), torch.tensor([1, 0.5**0.5, 0], dtype=torch.float64))


def test_a_grid_reaches_the_network():
    velocity = Gaussian()
    sample(velocity, noise(), CONDITION, times=torch.tensor([1.0, 0.4, 0.1, 0.0]))
    assert velocity.times == pytest.approx([1.0, 0.4, 0.1])
    velocity = Gaussian()
    sample(velocity, noise(), CONDITION, num_inference_steps=4, times="shifted:3")
    assert velocity.times == pytest.approx(time_grid(4, "shifted:3").tolist()[:-1])


@pytest.mark.parametrize(
    "times",
    [[1.0, 0.5], [0.9, 0.0], [1.0, 0.5, 0.5, 0.0], [0.0, 1.0], [1.0], [1.0, math.nan, 0.0], [[1.0, 0.0]]],
)
def test_grids_that_do_not_fall_from_noise_to_data_are_refused(times):
    with pytest.raises(ValueError, match=r"falling strictly from 1 \(noise\) to 0 \(data\)"):
        sample(Gaussian(), noise(), CONDITION, times=torch.tensor(times))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"times": "cosine"}, ValueError, "'cosine'"),
        ({"times": "uniform:2"}, ValueError, "'uniform:2'"),
        ({"times": "shifted:x"}, ValueError, 'after "shifted:" must be a number above 0'),
        ({"times": "power:-1"}, ValueError, 'after "power:" must be a number above 0'),
        ({"num_inference_steps": 0}, ValueError, "at least 1, got 0"),
        ({"num_inference_steps": 2.0}, ValueError, "at least 1, got 2.0"),
        ({"num_inference_steps": 2, "times": torch.tensor([1.0, 0.0])}, ValueError, "makes 1 steps, but"),
        ({"stochasticity": 1.5}, ValueError, r"must lie in \[0, 1\]"),
        ({"method": "rk4"}, ValueError, '"euler" or "heun"'),
        ({"method": "heun", "stochasticity": 0.5}, ValueError, "deterministic"),
        ({"guidance_scale": 2.0}, ValueError, "guidance_scale=2.0 needs negative_condition="),
        ({"condition": torch.zeros(3, 1)}, ValueError, r"condition must have batch size 4 \(or 1"),
        ({"noise": torch.zeros(4)}, ValueError, r"noise must be a floating-point tensor \[B, ...\]"),
        ({"velocity": Velocities(Gaussian())}, TypeError, "such as velocities.generator"),
        ({"velocity": lambda x, t, c: x[:2]}, ValueError, r"the sampled velocity .* got \[2, 3\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        sample(**{"velocity": Gaussian(), "noise": noise(), "condition": CONDITION, **arguments})
