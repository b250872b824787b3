"""The statements of APEX (arXiv 2604.12322) that the objective rests on, in float64 against closed forms."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch
from small_networks import VectorNetwork, gradients
from torch import Tensor

from apex_fast import ApexObjective, ConditionShift, Velocities, ops, path
from apex_fast.objective import Losses

F64 = torch.float64


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def gaussian_velocity(x_t: Tensor, t: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """E[z - x | x_t] for x ~ N(mean, variance) and z ~ N(0, 1): jointly Gaussian, so the conditional mean is affine."""
    t = path.per_sample(t, x_t)
    marginal_variance = t**2 + (1 - t) ** 2 * variance
    covariance = t - (1 - t) * variance  # of z - x with x_t
    return -mean + covariance / marginal_variance * (x_t - (1 - t) * mean)


def log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * ((x - mean) ** 2 / variance + variance.log() + math.log(2 * math.pi))


# ---- Prop. 1, 3, 4


def test_proposition_1_the_score_of_the_marginal_follows_from_its_velocity():
    mean, variance = torch.tensor([0.7, -1.3], dtype=F64), torch.tensor([0.2, 3.0], dtype=F64)
    t = times(0.05, 0.3, 0.5, 0.8, 1.0)
    x_t = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    column = t[:, None]
    density = log_normal(x_t, (1 - column) * mean, column**2 + (1 - column) ** 2 * variance)
    (score,) = torch.autograd.grad(density.sum(), x_t)
    velocity = gaussian_velocity(x_t.detach(), t, mean, variance)
    torch.testing.assert_close(path.score(velocity, x_t.detach(), t), score, rtol=1e-10, atol=1e-12)


def test_propositions_3_and_4_endpoint_distances_are_velocity_distances_times_t_squared():
    generator = torch.Generator().manual_seed(0)
    x, z, velocity, other = (torch.randn(6, 3, 2, dtype=F64, generator=generator) for _ in range(4))
    t = torch.rand(6, dtype=F64, generator=generator)
    x_t = ops.interpolate(x, z, t)

    def squared(a: Tensor) -> Tensor:
        return a.square().flatten(1).sum(1)

    # Prop. 3: against the data, whose velocity is z - x; Prop. 4: between two predictions
    at = path.endpoint(velocity, x_t, t)
    torch.testing.assert_close(squared(at - x), t**2 * squared(velocity - (z - x)))
    torch.testing.assert_close(squared(at - path.endpoint(other, x_t, t)), t**2 * squared(velocity - other))


# ---- Prop. 2 and Theorem 1: L_mix (Eq. 24) and G_APEX (Eq. 22) in the endpoint form of the text


def endpoint_form(model, x: Tensor, z: Tensor, t: Tensor, condition: Tensor, shifted: Tensor):
    """The network's clean prediction, the shifted one under a stop-gradient, and the weight 1 / w(t), w = t / (1 -
    t).
    """
    x_t = ops.interpolate(x, z, t)
    with torch.no_grad():
        v_fake = model(x_t, t, shifted)
    velocity = model(x_t, t, condition)
    return velocity, v_fake, path.endpoint(velocity, x_t, t), path.endpoint(v_fake, x_t, t), (1 - t) / t


def setting():
    torch.manual_seed(0)
    model = VectorNetwork().double()
    x, z, condition = torch.randn(7, 2, dtype=F64), torch.randn(7, 2, dtype=F64), torch.randn(7, 3, dtype=F64)
    return model, x, z, torch.linspace(0.1, 0.95, 7, dtype=F64), condition, 0.5 - condition


@pytest.mark.parametrize("mix_weight", [0.0, 0.3, 1.0])
def test_theorem_1_the_mixed_loss_has_the_gradient_of_g_apex(mix_weight):
    model, x, z, t, condition, shifted = setting()
    _, _, endpoint, fake_endpoint, weight = endpoint_form(model, x, z, t, condition, shifted)
    mixed_target = (1 - mix_weight) * x + mix_weight * fake_endpoint
    (weight * (endpoint - mixed_target).square().mean(1)).mean().backward()
    of_mix = gradients(model)

    _, _, endpoint, fake_endpoint, weight = endpoint_form(model, x, z, t, condition, shifted)
    supervised = (weight * (endpoint - x).square().mean(1)).mean()  # Eq. 20
    consistency = (weight * (endpoint - fake_endpoint).square().mean(1)).mean()  # Eq. 21
    ((1 - mix_weight) * supervised + mix_weight * consistency).backward()
    for one, other in zip(of_mix, gradients(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("mix_weight", [0.0, 0.3, 1.0])
def test_the_velocity_space_op_is_the_endpoint_form(mix_weight):
    model, x, z, t, condition, shifted = setting()
    _, _, endpoint, fake_endpoint, weight = endpoint_form(model, x, z, t, condition, shifted)
    literal = weight * (endpoint - ((1 - mix_weight) * x + mix_weight * fake_endpoint)).square().mean(1)
    literal.mean().backward()
    wanted = gradients(model)

    velocity, v_fake, *_ = endpoint_form(model, x, z, t, condition, shifted)
    loss = t * (1 - t) * ops.mixed_velocity_loss(velocity, x, z, v_fake=v_fake, mix_weight=mix_weight)
    torch.testing.assert_close(loss, literal)
    loss.mean().backward()
    for one, other in zip(gradients(model), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_a_mix_weight_of_zero_is_flow_matching():
    model, x, z, t, condition, _ = setting()
    velocity = model(ops.interpolate(x, z, t), t, condition)
    torch.testing.assert_close(ops.mixed_velocity_loss(velocity, x, z), (velocity - (z - x)).square().mean(1))

    apex = ApexObjective(ConditionShift(), loss="paper", mix_weight=0.0, paper_fake_weight=0.0)
    draws = apex.draw(x, torch.Generator().manual_seed(0))
    losses = apex(model, x, condition, step=0, draws=draws)
    velocity = model(ops.interpolate(x, draws.z, draws.s), draws.s, condition)
    flow_matching = draws.s * (1 - draws.s) * (velocity - (draws.z - x)).square().mean(1)
    torch.testing.assert_close(losses.mix, flow_matching.detach())


# ---- Eq. 25 as a whole


@pytest.mark.parametrize("detached", [False, True])
def test_the_paper_loss_is_equation_25_to_the_letter(detached):
    model, x, _, _, condition, shifted = setting()
    settings = {"paper_fake_weight": 0.7, "paper_mix_weight": 1.3, "mix_weight": 0.4, "detach_x_fake": detached}
    apex = ApexObjective(ConditionShift(), loss="paper", **settings)
    draws = apex.draw(x, torch.Generator().manual_seed(0))
    losses = apex(model, x, condition, step=0, draws=draws)
    losses.total.backward()
    found = gradients(model)

    z, t, column = draws.z, draws.s, draws.s[:, None]
    x_t = column * z + (1 - column) * x
    velocity = model(x_t, t, condition)
    v_fake = model(x_t, t, shifted).detach()
    x_fake = x_t - column * velocity
    if detached:
        x_fake = x_fake.detach()
    x_fake_t = column * z + (1 - column) * x_fake
    l_fake = (model(x_fake_t, t, shifted) - (z - x_fake)).square().mean(1)
    l_mix = t * (1 - t) * (velocity - (0.6 * (z - x) + 0.4 * v_fake)).square().mean(1)
    total = 0.7 * l_fake.mean() + 1.3 * l_mix.mean()
    torch.testing.assert_close(losses.total.detach(), total.detach())
    torch.testing.assert_close(losses.fake, l_fake.detach())
    torch.testing.assert_close(losses.mix, l_mix.detach())
    total.backward()
    for one, other in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


# ---- the correction and the divergence that it descends


def gauss_hermite(points: int) -> list[tuple[float, float]]:
    """Nodes and weights with which a mean over N(0, 1) of a polynomial of degree < 2 points is exact."""
    nodes, weights = numpy.polynomial.hermite_e.hermegauss(points)
    return list(zip(nodes.tolist(), (weights / weights.sum()).tolist(), strict=True))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("s", [1.0, 0.6])
def test_the_correction_is_the_gradient_of_the_divergence_for_gaussians(s, t):
    """With exact velocities, no clip and the factor s (1 - t)^2 / (2 t): grad KL(p_theta,t || q_t), in closed form.

    Data N(mean, variance) and a generator F(x_s) = offset + slope x_s make everything Gaussian. The integrand is then a
    polynomial of degree 2 in each of the noises x, z and z', so the quadrature is exact and only rounding is left.
    """
    mean, variance = torch.tensor([0.4, -0.8], dtype=F64), torch.tensor([0.5, 1.7], dtype=F64)
    offset = torch.tensor([0.3, 0.2], dtype=F64, requires_grad=True)
    slope = torch.tensor([0.6, -0.4], dtype=F64, requires_grad=True)

    # what the generator makes: x_fake = (1 - s slope) x_s - s offset
    def generated() -> tuple[Tensor, Tensor]:
        start_mean, start_variance = (1 - s) * mean, s**2 + (1 - s) ** 2 * variance
        return (1 - s * slope) * start_mean - s * offset, (1 - s * slope) ** 2 * start_variance

    fake_mean, fake_variance = generated()
    p_mean, p_variance = (1 - t) * fake_mean, t**2 + (1 - t) ** 2 * fake_variance
    q_mean, q_variance = (1 - t) * mean, t**2 + (1 - t) ** 2 * variance
    ratio = p_variance / q_variance
    divergence = 0.5 * (ratio + (p_mean - q_mean) ** 2 / q_variance - 1 - ratio.log()).sum()
    wanted = torch.autograd.grad(divergence, (offset, slope))

    # the dimensions are independent and alike, so the same node may serve both of them
    nodes = list(itertools.product(gauss_hermite(2), repeat=3))
    unit, weights = (
        torch.tensor([[n for n, _ in node] for node in nodes], dtype=F64),
        [math.prod(w for _, w in node) for node in nodes],
    )
    column = lambda k: unit[:, k, None].expand(-1, 2).contiguous()  # noqa: E731
    x, z, z_query = mean + variance.sqrt() * column(0), column(1), column(2)
    starts, queries = torch.full((len(nodes),), s, dtype=F64), torch.full((len(nodes),), t, dtype=F64)

    x_s = ops.interpolate(x, z, starts)
    v_gen = offset + slope * x_s
    with torch.no_grad():
        x_fake_t, target = ops.renoise(v_gen.detach(), x_s, starts, z_query, queries)
        v_shift = gaussian_velocity(x_fake_t, queries, fake_mean, fake_variance)
        v_real = gaussian_velocity(x_fake_t, queries, mean, variance)
    _, correction, _ = ops.shifted_velocity_loss(v_gen, v_shift, v_real, target, clip=None)
    factor = s * (1 - t) ** 2 / (2 * t)
    elements = 2  # the op takes the mean over a sample's elements, the divergence is their sum
    (torch.tensor(weights, dtype=F64) * factor * elements * correction).sum().backward()
    torch.testing.assert_close(offset.grad, wanted[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(slope.grad, wanted[1], rtol=1e-10, atol=1e-12)
    assert bool((wanted[0].abs() > 1e-3).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_shift_a_live_real_branch_corrects_nothing(dtype):
    torch.manual_seed(0)
    model = VectorNetwork().to(dtype)
    x, condition = torch.randn(9, 2, dtype=dtype), torch.randn(9, 3, dtype=dtype)
    settings = {"fake_weight": 0.0, "supervised_weight": 0.0, "warmup_steps": 0, "ramp_steps": 0}
    velocities = Velocities.from_module(model, real="live")

    unshifted = ApexObjective(ConditionShift(scale=1.0, bias=0.0), **settings)
    for run in (
        lambda: unshifted(velocities, x, condition, step=0),
        lambda: unshifted.backward(velocities, x, condition, step=0, schedule="retain"),
        lambda: unshifted.backward(velocities, x, condition, step=0, schedule="sequential"),
    ):
        losses = run()
        if losses.total.requires_grad:
            losses.total.backward()
        assert torch.equal(losses.correction, torch.zeros(9, dtype=dtype))
        assert losses.metrics["dv_rms"] == 0
        assert not any(bool(gradient.any()) for gradient in gradients(model))

    losses = ApexObjective(ConditionShift(), **settings).backward(velocities, x, condition, step=0)
    assert bool((losses.correction > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_shift_a_stacked_pass_corrects_no_more_than_its_rounding(dtype):
    """Under ``joint`` the shifted branch runs in a larger batch than the real one, whose sums may be rounded in another
    order, so the difference of the two need not vanish to the last bit."""
    torch.manual_seed(0)
    model = VectorNetwork().to(dtype)
    x, condition = torch.randn(9, 2, dtype=dtype), torch.randn(9, 3, dtype=dtype)
    velocities = Velocities.from_module(model, real="live")
    rounding = 1e-6 if dtype == torch.float32 else 1e-14

    def step(shift: ConditionShift, weight: float) -> tuple[Losses, list[Tensor]]:
        objective = ApexObjective(shift, correction_weight=weight, warmup_steps=0, ramp_steps=0)
        draws = objective.draw(x, torch.Generator().manual_seed(1))
        return objective.backward(velocities, x, condition, step=0, draws=draws, schedule="joint"), gradients(model)

    losses, corrected = step(ConditionShift(scale=1.0, bias=0.0), 1.0)
    _, uncorrected = step(ConditionShift(scale=1.0, bias=0.0), 0.0)
    assert losses.metrics["dv_rms"] <= rounding and bool((losses.correction <= rounding**2).all())
    for found, wanted in zip(corrected, uncorrected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=10 * rounding, atol=10 * rounding)

    losses, corrected = step(ConditionShift(), 1.0)
    _, uncorrected = step(ConditionShift(), 0.0)
    assert losses.metrics["dv_rms"] > 1e3 * rounding
    assert any(bool(((a - b).abs() > 1e3 * rounding).any()) for a, b in zip(corrected, uncorrected, strict=True))
