"""The peers' methods: their losses and gradients against the published definitions written out anew, in float64; the
identities that tie them to each other and to the correction; what they cost; and their runs through the trainer."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from small_networks import VectorNetwork, gradients
from torch import Tensor, nn

from apex_fast import ApexObjective, ConditionShift, Velocities
from apex_fast.path import TimeDistribution, endpoint, score
from apex_fast.peers import Copies, Dmd2, FakeScore, PeerSettings, Rcgm, TwinFlow
from apex_fast.peers.base import noise, times
from apex_fast.peers.dmd2 import distribution_matching_gradient
from apex_fast.peers.rcgm import metric, recursive_target, split_rows, time_weight

BATCH, DIM = 8, 2
HELD = Copies(networks=1, trained=1, adapters=0)


def network(seed: int) -> VectorNetwork:
    torch.manual_seed(seed)
    return VectorNetwork(dim=DIM).double()


def batch(size: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, condition = (torch.randn(size, n, generator=generator, dtype=torch.float64) for n in (DIM, 3))
    return x, condition


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Counted:
    """A velocity that counts the samples that it was asked about, and keeps the times."""

    def __init__(self, velocity) -> None:
        self.velocity, self.without, self.graphs, self.times = velocity, 0, 0, []

    def __call__(self, x_t: Tensor, t: Tensor, condition) -> Tensor:
        answer = self.velocity(x_t, t, condition)
        if answer.requires_grad:
            self.graphs += len(x_t)
        else:
            self.without += len(x_t)
        self.times.append(t.clone())
        return answer


# ---- DMD2


def dmd2(student, teacher, fake: nn.Module, *, rate: float = 1.0, **settings) -> Dmd2:
    """With plain gradient descent for the fake score, whose weights then move by its gradient."""
    parameters = dict(fake.named_parameters())
    optimizer = torch.optim.SGD(parameters.values(), lr=rate)
    follows = FakeScore(fake, parameters, optimizer, learning_rate=lambda step: rate)
    guidance = settings.pop("guidance_scale", 1.0)
    velocities = Velocities(student, real=teacher)
    return Dmd2(velocities, PeerSettings(**settings), follows, copies=HELD, guidance_scale=guidance)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_dmd2_has_the_gradients_of_its_papers_formulas(guidance: float) -> None:
    student, teacher, fake, negative = network(1), network(2), network(3), torch.ones(1, 3, dtype=torch.float64)
    x, condition = batch()
    peer = dmd2(student, teacher, fake, fake_steps=1, guidance_scale=guidance)
    before = {name: p.detach().clone() for name, p in fake.named_parameters()}
    found = peer.step(x, condition, negative, step=0, generator=seeded())
    generator_gradients = gradients(student)
    fake_gradients = [before[name] - p.detach() for name, p in fake.named_parameters()]

    # The same draws, then every formula in terms of scores and of predicted samples instead of velocities.
    draws = seeded()
    z = noise(x, draws)
    z_query, t = noise(x, draws), times(peer.settings.query_times, x, draws)
    z_fit, t_fit = noise(x, draws), times(peer.settings.fake_times, x, draws)
    fake.load_state_dict(before)
    fake.requires_grad_(True)
    sample = z - student(z, torch.ones(BATCH, dtype=torch.float64), condition)
    x_t = t[:, None] * z_query + (1 - t[:, None]) * sample.detach()
    with torch.no_grad():
        v_real, v_fake = teacher(x_t, t, condition), fake(x_t, t, condition)
        if guidance != 1:
            v_negative = teacher(x_t, t, negative.expand(BATCH, -1))
            v_real = v_negative + guidance * (v_real - v_negative)
        mu_base = x_t - t[:, None] * v_real
        sigma_squared_over_alpha = (t**2 / (1 - t))[:, None]
        # DMD, Eq. 7 and 8: w_t (s_fake - s_real) with w_t = (sigma^2 / alpha) C S / |mu_base(x_t) - x|_1.
        weight = DIM * sigma_squared_over_alpha / (mu_base - sample).abs().sum(1, keepdim=True)
        gradient = weight * (score(v_fake, x_t, t) - score(v_real, x_t, t))
    (gradient / (BATCH * DIM) * sample).sum().backward()
    for mine, published in zip(generator_gradients, gradients(student), strict=True):
        torch.testing.assert_close(mine, published, rtol=1e-10, atol=1e-13)
    assert any(bool(g.any()) for g in generator_gradients)
    x_fit = t_fit[:, None] * z_fit + (1 - t_fit[:, None]) * sample.detach()
    loss = ((fake(x_fit, t_fit, condition) - (z_fit - sample.detach())) ** 2).mean()
    loss.backward()
    for mine, published in zip(fake_gradients, gradients(fake), strict=True):
        torch.testing.assert_close(mine, published, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found["loss_fake"], loss.detach())
    torch.testing.assert_close(found["loss_generator"], 0.5 * gradient.square().mean())


class Free(nn.Module):
    """A velocity that is a parameter, so that its gradient can be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(BATCH, DIM, generator=seeded(9), dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.v * 1.0


def test_dmd2_is_the_correction_times_t_over_twice_the_normaliser() -> None:
    student, teacher, fake = Free(), network(2), network(3)
    x, condition = batch()
    dmd2(student, teacher, fake, fake_steps=1, rate=1e-30).step(x, condition, step=0, generator=seeded())
    (mine,) = gradients(student)

    draws = seeded()
    z, z_query = noise(x, draws), noise(x, draws)
    t = times(PeerSettings().query_times, x, draws)
    objective = ApexObjective(
        ConditionShift(scale=1.0, bias=0.0).double(),
        fake_weight=0.0, correction_weight=1.0, supervised_weight=0.0, clip=None, warmup_steps=0, ramp_steps=0,
    )  # fmt: skip
    same = dataclasses.replace(objective.draw(x, seeded()), z=z, s=torch.ones_like(t), z_query=z_query, t_query=t)
    velocities = Velocities(student, shifted=fake.requires_grad_(False), real=teacher)
    objective.backward(velocities, x, condition, step=0, draws=same)
    (correction,) = gradients(student)

    sample = z - student.v.detach()
    x_t = t[:, None] * z_query + (1 - t[:, None]) * sample
    with torch.no_grad():
        normaliser = (sample - endpoint(teacher(x_t, t, condition), x_t, t)).abs().mean(1)
    torch.testing.assert_close(mine, correction * (t / (2 * normaliser))[:, None], rtol=1e-10, atol=1e-14)
    assert bool(correction.any())


def test_scores_give_the_same_gradient_as_velocities() -> None:
    x_t, v_real, v_fake, sample = (torch.randn(4, 3, generator=seeded(n), dtype=torch.float64) for n in range(4))
    t = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    gradient, normaliser = distribution_matching_gradient(sample, x_t, t, v_real, v_fake)
    scores = score(v_fake, x_t, t) - score(v_real, x_t, t)
    torch.testing.assert_close(gradient, (t**2 / (1 - t) / normaliser)[:, None] * scores)


def test_the_fake_score_is_fitted_k_times_and_the_generator_once() -> None:
    student, teacher, fake = network(1), Counted(network(2).requires_grad_(False)), network(3)
    asked, follows = Counted(student), Counted(fake)
    x, condition = batch()
    for k in (1, 2, 5):
        peer = dmd2(asked, teacher, fake, fake_steps=k, rate=1e-3)
        peer.fake.velocity = follows
        steps = 0

        def counting(step: int) -> float:
            nonlocal steps
            steps += 1
            return 1e-3

        peer.fake.learning_rate = counting
        for one in (asked, teacher, follows):
            one.without = one.graphs = 0
        peer.step(x, condition, step=0, generator=seeded())
        assert steps == k
        assert (asked.without, asked.graphs) == ((k - 1) * BATCH, BATCH)
        assert (teacher.without, follows.without, follows.graphs) == (BATCH, BATCH, k * BATCH)
        assert peer.passes.total_in_forwards == 4 * k + 4
        assert not any(p.requires_grad for p in fake.parameters())
    # What only the fake score learned left no gradient in the generator: it has that of one backward.
    assert all(p.grad is not None for p in student.parameters())


def test_a_fake_score_with_better_fit_lowers_its_loss() -> None:
    student, teacher, fake = network(1), network(2), network(3)
    x, condition = batch(64)
    peer = dmd2(student, teacher, fake, fake_steps=20, rate=0.05)
    losses = [float(peer.step(x, condition, step=n, generator=seeded(n))["loss_fake"]) for n in range(6)]
    assert losses[-1] < 0.95 * losses[0]


def test_gradients_that_are_no_numbers_do_not_reach_the_fake_score() -> None:
    fake = network(3)
    peer = dmd2(network(1), network(2), fake)
    before = [p.detach().clone() for p in fake.parameters()]
    for parameter in fake.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    peer.fake.update(0)
    assert all(torch.equal(one, other) for one, other in zip(before, fake.parameters(), strict=True))


def test_several_steps_are_simulated_backwards() -> None:
    student = Counted(network(1))
    peer = dmd2(student, network(2), network(3), fake_steps=1, generator_steps=4)
    x, condition = batch()
    ends, generator = set(), seeded()
    for _ in range(30):
        student.times.clear()
        with torch.no_grad():
            sample = peer.sample(x, condition, generator)
        assert sample.shape == x.shape and bool(sample.isfinite().all())
        asked = [float(t[0]) for t in student.times]
        assert asked == [1.0, 0.75, 0.5, 0.25][: len(asked)]
        ends.add(len(asked))
    assert ends == {1, 2, 3, 4}
    assert peer.passes.forward_no_grad == 2 + 1.5


# ---- RCGM


def rcgm(student, real=None, kind=Rcgm, distils: bool = False, guidance: float = 1.0, **settings) -> Rcgm:
    options = {"copies": HELD, "distils": distils, "guidance_scale": guidance}
    return kind(Velocities(student, real=real), PeerSettings(**settings), **options)


def published_base(
    student,
    average,
    x_t: Tensor,
    z: Tensor,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    condition: Tensor,
    *,
    order: int,
    clip: float,
    enhance: float = 0.0,
    negative: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Eq. 1 of TwinFlow, a sample at a time: F and the target that its residual leads to."""
    step_size, targets = 0.01, []
    predictions = student(x_t, t, condition)
    for row in range(len(x)):
        at = slice(row, row + 1)
        c, begin, end, v = condition[at], float(t[row]), float(r[row]), (z - x)[at]

        def ask(model, place, when, c=c):
            with torch.no_grad():
                return model(place, torch.tensor([when], dtype=torch.float64), c)

        if enhance:
            v = v + enhance * (ask(average, x_t[at], begin) - ask(average, x_t[at], begin, c=negative))
        prediction = predictions[at].detach()
        if begin - end < step_size:
            residual = prediction - v
        else:
            place, when = x_t[at] - step_size * v, begin - step_size
            length, way = (when - end) / order, torch.zeros_like(v)
            for _ in range(order):
                jump = length * ask(average, place, when)
                place, way, when = place - jump, way + jump, when - length
            residual = ((begin - end) * prediction - way) / step_size - v
        targets.append(prediction - residual.clamp(-clip, clip))
    return predictions, torch.cat(targets)


def published_distance(prediction: Tensor, target: Tensor, kind: str) -> Tensor:
    """ "l2", and Barron's robust loss at alpha 1 as the released code weighs it."""
    square = ((prediction - target) ** 2).mean(1)
    if kind == "l2":
        return square
    alpha, c = 1.0, 1e-3
    weight = (square / (c**2 + 1e-8) / abs(alpha - 2) + 1) ** ((alpha - 2) / 2)
    return square * weight.detach() / c


@pytest.mark.parametrize("kind", ["l2", "barron"])
@pytest.mark.parametrize(("order", "guidance"), [(1, 1.0), (2, 1.0), (3, 2.0)])
def test_rcgm_has_the_gradients_of_equation_1(kind: str, order: int, guidance: float) -> None:
    student, average = network(1), network(4).requires_grad_(False)
    x, condition = batch(9)
    negative = torch.ones(1, 3, dtype=torch.float64)
    peer = rcgm(student, average, order=order, guidance=guidance, metric=kind)
    found = peer.step(x, condition, negative, step=0, generator=seeded())
    mine = gradients(student)

    draws = seeded()
    t = times(TimeDistribution(), x, draws)
    share = torch.rand(9, generator=draws).double()
    z = noise(x, draws)
    t[:3] = 1.0
    r = torch.cat([torch.zeros(3).double(), (t * (1 - 0.05 * share))[3:6], (t * (1 - share))[6:]])
    x_t = t[:, None] * z + (1 - t[:, None]) * x
    prediction, target = published_base(
        student, average, x_t, z, x, t, r, condition,
        order=order, clip=1.0, enhance=1 - 1 / guidance, negative=negative,
    )  # fmt: skip
    weight = torch.tan((1 - (t - r)) * math.pi / 2.5) + 1
    loss = (published_distance(prediction, target, kind) * weight).mean()
    loss.backward()
    torch.testing.assert_close(found["loss_total"], loss.detach())
    for one, other in zip(mine, gradients(student), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert any(bool(g.any()) for g in mine)


def test_the_target_has_the_gradient_of_equation_1_but_for_its_length() -> None:
    """The published form puts the length (t - r)/D of a jump into the gradient, the released one takes it out."""
    velocity, jumps, v = (torch.randn(3, 2, generator=seeded(n), dtype=torch.float64) for n in range(3))
    t, r = torch.tensor([0.9, 0.6, 0.3]).double(), torch.tensor([0.0, 0.2, 0.1]).double()
    own = velocity.clone().requires_grad_()
    residual = ((t - r)[:, None] * own - jumps) / 0.01 - v
    (residual**2).sum().backward()
    target = recursive_target(velocity, jumps, v, t, r, step_size=0.01, clip=math.inf)
    torch.testing.assert_close(own.grad, 2 * (velocity - target) * ((t - r) / 0.01)[:, None])


def test_order_0_is_flow_matching() -> None:
    student = network(1)
    x, condition = batch(6)
    peer = rcgm(student, order=0, metric="l2")
    found = peer.step(x, condition, step=0, generator=seeded())
    mine = gradients(student)
    draws = seeded()
    rows, z = peer.rows(x, draws), noise(x, draws)
    x_t = rows.t[:, None] * z + (1 - rows.t[:, None]) * x
    plain = ((student(x_t, rows.t, condition) - (z - x)) ** 2).mean(1)
    loss = (plain * time_weight(rows.t, rows.r)).mean()
    loss.backward()
    torch.testing.assert_close(found["loss_total"], loss.detach())
    for one, other in zip(mine, gradients(student), strict=True):
        torch.testing.assert_close(one, other)
    assert peer.passes.total_in_forwards == 3


def test_jumps_without_room_are_flow_matching() -> None:
    student = network(1)
    x, condition = batch(6)
    peer = rcgm(student, shares=(0.0, 1.0, 0.0), base_times=TimeDistribution(high=0.19), residual_clip=1e6, metric="l2")
    found = peer.step(x, condition, step=0, generator=seeded())
    draws = seeded()
    rows, z = peer.rows(x, draws), noise(x, draws)
    assert bool((rows.t - rows.r < 0.01).all()) and bool((rows.t >= rows.r).all())
    x_t = rows.t[:, None] * z + (1 - rows.t[:, None]) * x
    plain = ((student(x_t, rows.t, condition) - (z - x)) ** 2).mean(1).detach()
    torch.testing.assert_close(found["loss_total"], (plain * time_weight(rows.t, rows.r)).mean())


def test_order_1_to_zero_is_a_consistency_model() -> None:
    """Its residual is the change of f(x_t) = x_t - t F(x_t, t) along the path, over the step."""
    student = network(1)
    x, condition = batch()
    z, t = noise(x, seeded()), torch.linspace(0.1, 1.0, BATCH).double()
    x_t, v = t[:, None] * z + (1 - t[:, None]) * x, z - x
    peer = rcgm(student, order=1, residual_clip=1e9)
    with torch.no_grad():
        velocity = student(x_t, t, condition)
        target = peer.target(velocity, v, x_t, t, torch.zeros_like(t), condition, None, x)
        below = t - 0.01
        x_below = below[:, None] * z + (1 - below[:, None]) * x
        f_here = x_t - t[:, None] * velocity
        f_below = x_below - below[:, None] * student(x_below, below, condition)
    torch.testing.assert_close(velocity - target, (f_below - f_here) / 0.01)


def test_distillation_follows_the_frozen_start() -> None:
    student, start = network(1), Counted(network(2).requires_grad_(False))
    x, condition = batch()
    peer = rcgm(student, start, distils=True, order=0, guidance=2.0, shares=(0.0, 0.0, 1.0))
    negative = torch.zeros(1, 3, dtype=torch.float64)
    z, t = noise(x, seeded()), torch.full((BATCH,), 0.4, dtype=torch.float64)
    target = peer.target(z, z - x, x, t, t, condition, negative, x)
    v_condition, v_negative = (start.velocity(x, t, c) for c in (condition, negative.expand(BATCH, -1)))
    torch.testing.assert_close(target, v_negative + 2 * (v_condition - v_negative))
    assert start.without == 2 * BATCH


def test_a_robust_distance_is_near_to_the_root_of_the_mean_square() -> None:
    far = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64, requires_grad=True)
    distance = metric(far, torch.zeros(2, 2, dtype=torch.float64), "barron")
    torch.testing.assert_close(distance, (far.detach() ** 2).mean(1).sqrt(), rtol=1e-2, atol=0)
    distance.sum().backward()
    torch.testing.assert_close(far.grad[0], far.grad[1], rtol=1e-4, atol=0)


def test_rows_are_split_without_a_rest_and_none_is_starved() -> None:
    assert split_rows(32, (1, 1, 1, 1)) == [8, 8, 8, 8]
    for size in range(4, 40):
        counts = split_rows(size, (1, 1, 1, 1))
        assert sum(counts) == size and min(counts) >= 1
    assert split_rows(10, (1, 0, 4)) == [2, 0, 8]
    with pytest.raises(ValueError, match="batch of 2 cannot be split"):
        split_rows(2, (1, 1, 1))


# ---- TwinFlow


@pytest.mark.parametrize("kind", ["l2", "barron"])
def test_twinflow_has_the_gradients_of_equations_1_2_and_9(kind: str) -> None:
    student, average = network(1), network(4).requires_grad_(False)
    x, condition = batch(8)
    peer = rcgm(student, average, TwinFlow, metric=kind, rectify_weight=0.5)
    found = peer.step(x, condition, step=0, generator=seeded())
    mine = gradients(student)

    draws = seeded()
    t = times(TimeDistribution(), x, draws)
    share = torch.rand(8, generator=draws).double()
    z = noise(x, draws)
    z_twin = noise(x[6:], draws)
    z_query, t_query = noise(x[:2], draws), times(peer.settings.query_times, x[:2], draws)
    t[:2] = 1.0
    r = torch.cat([torch.zeros(2).double(), (t * (1 - 0.05 * share))[2:4], (t * (1 - share))[4:6]])
    one = torch.ones(2, dtype=torch.float64)
    with torch.no_grad():
        x_fake = z_twin - student(z_twin, one, condition[6:])
    data = torch.cat([x[:6], x_fake])
    x_t = t[:, None] * z + (1 - t[:, None]) * data
    prediction, target = published_base(
        student, average, x_t[:6], z[:6], data[:6], t[:6], r, condition[:6], order=2, clip=1.0
    )
    weight = torch.tan((1 - (t[:6] - r)) * math.pi / 2.5) + 1
    base = published_distance(prediction, target, kind) * weight
    adversarial = published_distance(student(x_t[6:], -t[6:], condition[6:]), z[6:] - x_fake, kind)
    generated = student(z[:2], one, condition[:2])
    with torch.no_grad():
        sample = z[:2] - generated
        place = t_query[:, None] * z_query + (1 - t_query[:, None]) * sample
        difference = student(place, t_query, condition[:2]) - student(place, -t_query, condition[:2])
        goal = generated + difference.clamp(-1, 1)
    rectify = published_distance(generated, goal, kind).mean()
    loss = torch.cat([base, adversarial]).mean() + 0.5 * rectify
    loss.backward()
    expected = {"loss_total": loss, "loss_base": base.mean(), "loss_adversarial": adversarial.mean()}
    for name, value in {**expected, "loss_rectify": rectify}.items():
        torch.testing.assert_close(found[name], value.detach(), msg=name)
    for own, other in zip(mine, gradients(student), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


def test_rectification_is_the_correction_with_negative_time_for_the_shift() -> None:
    class Branches(nn.Module):
        """A parameter at t = 1, a network with a sign of time elsewhere."""

        def __init__(self) -> None:
            super().__init__()
            self.free, self.inner = Free(), network(2).requires_grad_(False)

        def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return self.free(x_t, t, condition) if bool((t == 1).all()) else self.inner(x_t, t, condition)

    student = Branches()
    x, condition = batch()
    # The base target is switched off by asking for the velocity itself: order 0 of a start that answers it.
    peer = rcgm(student, student.free, TwinFlow, True, order=0, shares=(1.0, 0.0, 0.0, 0.0), metric="l2",
                rectify_weight=1.0, residual_clip=0.3)  # fmt: skip
    peer.step(x, condition, step=0, generator=seeded())
    mine = student.free.v.grad.clone()
    draws = seeded()
    rows, z = peer.rows(x, draws), noise(x, draws)
    assert bool((rows.t == 1).all())
    z_query, t = noise(x, draws), times(peer.settings.query_times, x, draws)
    sample = z - student.free.v.detach()
    place = t[:, None] * z_query + (1 - t[:, None]) * sample
    with torch.no_grad():
        dv = student.inner(place, -t, condition) - student.inner(place, t, condition)
    torch.testing.assert_close(mine, 2 * dv.clamp(-0.3, 0.3) / (BATCH * DIM))
    assert bool(dv.any())


def test_without_a_twin_twinflow_is_rcgm() -> None:
    found = []
    for kind, shares in ((Rcgm, (1.0, 1.0, 1.0)), (TwinFlow, (1.0, 1.0, 1.0, 0.0))):
        student = network(1)
        x, condition = batch(9)
        rcgm(student, network(4).requires_grad_(False), kind, shares=shares, rectify_weight=0.0).step(
            x, condition, step=0, generator=seeded()
        )
        found.append(gradients(student))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_twin_is_asked_in_negative_time() -> None:
    student = Counted(network(1))
    x, condition = batch(8)
    rcgm(student, network(4).requires_grad_(False), TwinFlow).step(x, condition, step=0, generator=seeded())
    asked = torch.cat(student.times)
    trained = next(t for t in student.times if len(t) == 8)
    assert bool((trained[:6] > 0).all()) and bool((trained[6:] < 0).all())
    assert int((asked < 0).sum()) == 2 + 2  # the twin's rows, and the fake velocity of the difference


@pytest.mark.parametrize("family", ["sana", "qwen_image", "flux", "z_image", "stable_diffusion_3", "lumina2"])
def test_every_family_tells_negative_time_from_positive(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    cases = pytest.importorskip("backbone_cases")
    backbone = cases.load_tiny(family, tmp_path_factory)
    condition, t = backbone.encode(cases.PROMPTS), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        x = cases.draw(backbone)
        there, back = backbone(x, t, condition), backbone(x, -t, condition)
    assert bool(back.isfinite().all())
    assert float((there - back).norm() / there.norm()) > 1e-4


# ---- costs


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("kind", [Rcgm, TwinFlow])
@pytest.mark.parametrize("distils", [False, True])
def test_the_passes_that_are_stated_are_those_that_run(
    kind: type[Rcgm], distils: bool, guidance: float, order: int
) -> None:
    size = 12
    student, other = Counted(network(1)), Counted(network(4).requires_grad_(False))
    x, condition = batch(size)
    peer = rcgm(student, other, kind, distils, guidance, order=order)
    peer.step(x, condition, torch.ones(1, 3, dtype=torch.float64), step=0, generator=seeded())
    assert peer.passes.forward_grad * size == student.graphs and peer.passes.backward == 1
    assert peer.passes.forward_no_grad * size == pytest.approx(student.without + other.without)


def test_guidance_without_anything_to_guide_from_is_refused() -> None:
    x, condition = batch()
    with pytest.raises(ValueError, match="needs a negative condition"):
        rcgm(network(1), guidance=2.0).step(x, condition, step=0)
    with pytest.raises(ValueError, match="a scale above 0"):
        rcgm(network(1), guidance=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fake_steps": 0}, "fake_steps must be a whole number, at least 1"),
        ({"step_size": 1.0}, "step_size must be below 1"),
        ({"shares": (1.0, -1.0)}, "shares must be finite"),
        ({"fake_learning_rate": 0.0}, "fake_learning_rate must be above 0"),
        ({"metric": "l1"}, "metric must be"),
        ({"target_times": "half"}, "target_times must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PeerSettings(**settings)


# ---- runs


@pytest.fixture(scope="module")
def tiny_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_runs import make_start

    return make_start(tmp_path_factory.mktemp("tiny") / "start")


def run(start: Path, folder: Path, loss: str, *more: str):
    pytest.importorskip("yaml")
    from tiny_runs import keys

    from apex_fast.training.config import load_config
    from apex_fast.training.loop import Trainer

    words = keys(start, folder, "--loss", loss, "--real_branch", "auto", "--peer.fake_steps", "2", *more)
    trainer = Trainer(load_config(None, words))
    return trainer, trainer.run()


def numbers(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith(("step", "loss", "grad"))} for line in lines]


LORA = ("--rank", "2")


@pytest.mark.parametrize(
    ("loss", "mode"),
    [("dmd2", ()), ("dmd2", LORA), ("dmd2_lora", ()), ("dmd2_lora", LORA), ("twinflow", LORA), ("rcgm", ())],
)
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    tiny_start: Path, tmp_path: Path, one_thread: None, loss: str, mode: tuple[str, ...]
) -> None:
    more = (*mode, "--checkpointing_steps", "2", "--peer.fake_rank", "3")
    trainer, whole = run(tiny_start, tmp_path / "whole", loss, *more)
    assert whole.finished
    weights = {name: p.detach().clone() for name, p in trainer.backbone.named_parameters() if p.requires_grad}
    state = trainer.objective.state_dict()
    resume = str(tmp_path / "whole" / "checkpoint-2")
    (tmp_path / "again").mkdir()
    again, second = run(tiny_start, tmp_path / "again", loss, *more, "--resume_from_checkpoint", resume)
    assert second.finished
    for name, value in weights.items():
        assert torch.equal(dict(again.backbone.named_parameters())[name], value), name
    assert numbers(tmp_path / "again") == [line for line in numbers(tmp_path / "whole") if line["step"] > 2]
    for values in numbers(tmp_path / "whole"):
        assert all(math.isfinite(value) for value in values.values())
    if loss.startswith("dmd2"):
        found = again.objective.state_dict()["fake"]
        assert len(found["weights"]) > 0
        for name, value in state["fake"]["weights"].items():
            assert torch.equal(found["weights"][name], value), name
        assert any(bool(entry["exp_avg"].any()) for entry in found["optimizer"]["state"].values())


def teacher_answer(trainer) -> Tensor:
    x = torch.randn(3, *trainer.sample_shape, generator=seeded())
    condition = trainer.backbone.encode(["a handwritten three"] * 3)
    training = trainer.backbone.training
    trainer.backbone.eval()
    with torch.no_grad():
        answer = trainer.velocities.real(x, torch.full((3,), 0.4), condition)
    trainer.backbone.train(training)
    return answer


@pytest.mark.parametrize("loss", ["dmd2", "dmd2_lora"])
@pytest.mark.parametrize("mode", [(), LORA])
def test_the_teacher_of_dmd2_stays_the_start_and_the_fake_score_moves(
    tiny_start: Path, tmp_path: Path, loss: str, mode: tuple[str, ...]
) -> None:
    from tiny_runs import keys

    from apex_fast.training.config import load_config
    from apex_fast.training.loop import Trainer

    words = keys(tiny_start, tmp_path / "run", "--loss", loss, "--real_branch", "auto", "--learning_rate", "1e-2",
                 "--peer.fake_steps", "2", *mode)  # fmt: skip
    trainer = Trainer(load_config(None, words))
    before, fake = teacher_answer(trainer), trainer.objective.state_dict()["fake"]["weights"]
    trained = {name for name, p in trainer.backbone.named_parameters() if p.requires_grad}
    trainer.run()
    assert torch.equal(teacher_answer(trainer), before)
    moved = trainer.objective.state_dict()["fake"]["weights"]
    assert moved.keys() == fake.keys() and any(not torch.equal(moved[name], fake[name]) for name in fake)
    # The fake score is in nobody else's hands: not in the run's optimizer, not in its average, not in its result.
    ours = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not ours & {id(p) for p in trainer.objective.fake.parameters.values()}
    assert {name for name, p in trainer.backbone.named_parameters() if p.requires_grad} == trained
    held = {"dmd2": (3, 2, 0), "dmd2_lora": (2, 1, 1)} if not mode else {"dmd2": (2, 1, 1), "dmd2_lora": (1, 0, 2)}
    assert dataclasses.astuple(trainer.objective.copies) == held[loss]
    if mode:
        from safetensors.torch import load_file

        names = load_file(str(tmp_path / "run" / "model" / "pytorch_lora_weights.safetensors"))
        assert names and not any("fake" in name for name in names)


def test_copies_are_what_is_held(tiny_start: Path, tmp_path: Path) -> None:
    whole = sum(p.numel() for p in run(tiny_start, tmp_path / "a", "rcgm")[0].backbone.transformer.parameters())
    trainer, _ = run(tiny_start, tmp_path / "b", "dmd2")
    seen = {id(p): p.numel() for p in trainer.backbone.transformer.parameters()}
    seen |= {id(p): p.numel() for p in trainer.velocities.real.transformer.parameters()}
    seen |= {id(p): p.numel() for p in trainer.objective.fake.parameters.values()}
    unused = [p.numel() for n, p in trainer.backbone.transformer.named_parameters()
              if n in trainer.backbone.parameters_without_gradient()]  # fmt: skip
    assert 3 * whole - 2 * sum(unused) <= sum(seen.values()) <= 3 * whole
    assert trainer.objective.copies.networks == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--loss", "dmd2", "--real_branch", "ema"), "the teacher of loss: dmd2 is the frozen start"),
        (("--loss", "dmd2_lora", "--gradient_accumulation_steps", "2"), "updates its fake score in every pass"),
        (("--loss", "dmd2", "--mixed_precision", "fp16"), "without loss scaling"),
        (("--loss", "dmd2", "--rank", "2", "--quantization", "int8"), "write loss: dmd2_lora"),
        (("--loss", "rcgm", "--peer.order", "-1"), "peer.order must be a whole number, at least 0"),
        (("--loss", "rcgm", "--peer.shares", "[1, 1, 1, 1]"), r"peer\.shares: rcgm has 3 parts"),
        (("--loss", "twinflow", "--train_batch_size", "3"), "a batch of 3 cannot be split"),
        (("--loss", "dmd2_lora", "--compile", "true"), "would run uncompiled"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tiny_start: Path, tmp_path: Path, words: tuple, message: str) -> None:
    pytest.importorskip("yaml")
    from tiny_runs import keys

    from apex_fast.training.config import load_config
    from apex_fast.training.settings import SettingsError

    with pytest.raises(SettingsError, match=message):
        load_config(None, keys(tiny_start, tmp_path, "--real_branch", "auto", *words))


def test_a_peer_is_not_planned() -> None:
    pytest.importorskip("yaml")
    from apex_fast.planning.blueprint import PlanError
    from apex_fast.planning.planner import plan
    from apex_fast.training.config import TrainConfig

    with pytest.raises(PlanError, match="loss: dmd2 is not planned"):
        plan(TrainConfig(output_dir="runs/x", pretrained_model_name_or_path="digits_start", loss="dmd2"))


def test_the_rank_of_a_fake_score_is_scaled_by_one(tmp_path: Path) -> None:
    """Whatever the student's adapter is scaled by: rank-stabilised LoRA would make it sqrt(rank)."""
    from tiny_runs import make_start

    from apex_fast.backbones.base import Backbone
    from apex_fast.lora import LoraSettings, add_another, add_lora

    backbone = Backbone.from_pretrained(str(make_start(tmp_path / "start")))
    add_lora(backbone, LoraSettings(rank=4, use_rslora=True), seed=0)
    add_another(backbone, "fake", rank=16, seed=1)
    scales = {layer.scaling["fake"] for layer in backbone.transformer.modules() if hasattr(layer, "scaling")}
    assert scales == {1.0}
