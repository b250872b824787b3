from __future__ import annotations

import math
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from small_networks import TextNetwork, VectorNetwork, gradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from apex_fast import (
    ApexObjective,
    Condition,
    ConditionShift,
    NonFiniteLossError,
    TimeDistribution,
    Velocities,
)

SCHEDULES = ("joint", "retain", "sequential")


def objective(**settings) -> ApexObjective:
    return ApexObjective(ConditionShift(), **{"warmup_steps": 0, "ramp_steps": 0, **settings})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 2), torch.randn(size, 3)


# ---- fields, warm-up and ramp


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "distill"}, "loss must be"),
        ({"fake_weight": -1.0}, "fake_weight must be finite and at least 0, got -1.0"),
        ({"correction_weight": math.nan}, "correction_weight must be finite"),
        ({"paper_mix_weight": math.inf}, "paper_mix_weight must be finite"),
        ({"mix_weight": 1.5}, r"mix_weight .* \[0, 1\], got 1.5"),
        ({"clip": 0.0}, "clip must be above 0, or None"),
        ({"guidance_scale": math.inf}, "guidance_scale must be finite"),
        ({"loss": "paper", "guidance_scale": 2.0}, "no real branch to guide"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number"),
        ({"ramp_steps": 1.5}, "ramp_steps must be a whole number"),
        ({"total_steps": True}, "total_steps must be a whole number"),
        ({"fake_times": 0.5}, "fake_times must be a TimeDistribution, got float"),
    ],
)
def test_fields_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        objective(**settings)


def test_shift_must_be_callable_and_the_rest_is_by_keyword():
    with pytest.raises(ValueError, match="shift must be a ConditionShift, got float"):
        ApexObjective(0.5)
    with pytest.raises(TypeError):
        ApexObjective(ConditionShift(), "correction")


def test_every_field_is_documented():
    for field in fields(ApexObjective):
        assert f" {field.name}:" in ApexObjective.__doc__, field.name


def test_weight_over_warm_up_and_ramp():
    apex = objective(correction_weight=0.8, warmup_steps=10, ramp_steps=3)
    weights = [apex.correction_weight_at(step) for step in (0, 9, 10, 11, 12, 13, 500)]
    assert weights == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert [apex.phase(step) for step in (0, 9, 10, 12, 13)] == ["warm-up", "warm-up", "ramp", "ramp", "full"]
    assert objective().correction_weight_at(0) == 0.5
    assert objective(loss="paper").phase(0) == "full"


@pytest.mark.parametrize("total", [1, 5, 50, 800, 2400, 100_000])
def test_defaults_fit_into_every_run(total):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apex = ApexObjective(ConditionShift(), total_steps=total)
    assert apex.phase(total - 1) == "full"
    assert apex.warmup_steps <= total / 10 and apex.ramp_steps <= total / 8
    assert apex.warmup_steps <= 150 and apex.ramp_steps <= 200


def test_a_run_that_is_all_warm_up_says_so():
    with pytest.warns(UserWarning, match="the correction never starts: warmup_steps=50 of total_steps=50"):
        ApexObjective(ConditionShift(), warmup_steps=50, total_steps=50)
    with pytest.warns(UserWarning, match="ends at weight 0.25 of 0.5: warmup_steps=40 and ramp_steps=19"):
        ApexObjective(ConditionShift(), warmup_steps=40, ramp_steps=19, total_steps=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ApexObjective(ConditionShift(), loss="paper", warmup_steps=50, total_steps=50)
        ApexObjective(ConditionShift(), correction_weight=0.0, warmup_steps=50, total_steps=50)


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
def test_in_the_warm_up_the_correction_is_measured_and_trains_nothing(schedule):
    torch.manual_seed(0)
    model, x, condition = VectorNetwork(), *batch()
    calls = []

    def generator(x_t, t, c):
        calls.append(torch.is_grad_enabled() and bool((t == 1).all()))
        return model(x_t, t, c)

    apex = objective(warmup_steps=5, supervised_weight=0.0)
    arguments = {"step": 4, "generator": seeded()}
    if schedule is None:
        losses = apex(generator, x, condition, **arguments)
        losses.total.backward()
    else:
        losses = apex.backward(generator, x, condition, schedule=schedule, **arguments)
    assert losses.phase == "warm-up"
    assert losses.correction is not None and losses.metrics["dv_rms"] > 0
    assert losses.metrics["correction_weight"] == 0
    assert not any(calls)  # no generator pass with a graph
    found = gradients(model)
    objective(correction_weight=0.0, supervised_weight=0.0).backward(model, x, condition, step=0, generator=seeded())
    for one, other in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(one, other)


# ---- what the roles are given


class Calls:
    """A network that keeps what it was called with."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.seen: list[tuple[Tensor, Tensor, Tensor | Condition, bool]] = []

    def __call__(self, x_t, t, condition):
        self.seen.append((x_t, t, condition, torch.is_grad_enabled()))
        return self.network(x_t, t, condition)


def test_each_role_is_asked_at_its_point():
    torch.manual_seed(0)
    generator, shifted, real = (Calls(VectorNetwork().double()) for _ in range(3))
    x, condition = (a.double() for a in batch())
    apex = objective(generator_times=TimeDistribution("constant", value=0.7))
    draws = apex.draw(x, seeded())
    apex(Velocities(generator, shifted, real), x, condition, step=0, draws=draws)

    (x_s, s, c, _), (x_t, t, c_sup, _) = generator.seen
    torch.testing.assert_close(x_s, 0.7 * draws.z + (1 - 0.7) * x, rtol=1e-6, atol=1e-6)
    assert torch.equal(s, draws.s) and c is condition and c_sup is condition
    torch.testing.assert_close(x_t, draws.t_sup[:, None] * draws.z_sup + (1 - draws.t_sup[:, None]) * x)
    assert torch.equal(t, draws.t_sup)

    x_fake = x_s - s[:, None] * generator.network(x_s, s, condition)
    x_fake_t = draws.t_query[:, None] * draws.z_query + (1 - draws.t_query[:, None]) * x_fake
    (x_shift, t_shift, c_shift, with_grad), *rest = shifted.seen
    assert not rest and with_grad
    torch.testing.assert_close(x_shift, x_fake_t.detach())
    torch.testing.assert_close(c_shift, 0.5 - condition)
    (x_real, t_real, c_real, with_grad), *rest = real.seen
    assert not rest and not with_grad
    assert torch.equal(x_real, x_shift) and torch.equal(t_real, t_shift) and c_real is condition
    assert torch.equal(t_shift, draws.t_query)
    assert not x_shift.requires_grad


def test_losses_are_those_of_the_formulas():
    torch.manual_seed(0)
    generator, shifted, real = (VectorNetwork().double() for _ in range(3))
    x, condition = (a.double() for a in batch())
    apex = objective(fake_weight=0.7, correction_weight=0.3, supervised_weight=0.2, clip=0.1)
    draws = apex.draw(x, seeded())
    losses = apex(Velocities(generator, shifted, real), x, condition, step=0, draws=draws)
    with torch.no_grad():
        t = draws.t_query[:, None]
        x_fake = draws.z - generator(draws.z, draws.s, condition)
        x_fake_t = t * draws.z_query + (1 - t) * x_fake
        v_shift, v_real = shifted(x_fake_t, draws.t_query, 0.5 - condition), real(x_fake_t, draws.t_query, condition)
        dv = v_shift - v_real
        fake = (v_shift - (draws.z_query - x_fake)).square().mean(1)
        correction = dv.clamp(-0.1, 0.1).square().mean(1)
        t = draws.t_sup[:, None]
        x_t = t * draws.z_sup + (1 - t) * x
        supervised = (generator(x_t, draws.t_sup, condition) - (draws.z_sup - x)).square().mean(1)
    torch.testing.assert_close(losses.fake, fake)
    torch.testing.assert_close(losses.correction, correction)
    torch.testing.assert_close(losses.supervised, supervised)
    total = 0.7 * fake.mean() + 0.3 * correction.mean() + 0.2 * supervised.mean()
    torch.testing.assert_close(losses.total.detach(), total)
    metrics = losses.metrics
    torch.testing.assert_close(metrics["dv_rms"], dv.square().mean().sqrt())
    torch.testing.assert_close(metrics["dv_clipped_rms"], dv.clamp(-0.1, 0.1).square().mean().sqrt())
    torch.testing.assert_close(metrics["clipped_share"], (dv.abs() > 0.1).double().mean())
    torch.testing.assert_close(metrics["dv_relative"], (dv.norm(dim=1) / v_real.norm(dim=1)).mean())
    torch.testing.assert_close(metrics["shift_real_cosine"], torch.cosine_similarity(v_shift, v_real, dim=1).mean())
    torch.testing.assert_close(metrics["dmd_normaliser"], (v_real - (draws.z_query - x_fake)).abs().mean())
    torch.testing.assert_close(metrics["loss_total"], total)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


def test_guidance_is_one_stacked_call():
    model, real = VectorNetwork(), Calls(VectorNetwork())
    x, condition = batch()
    negative = torch.zeros(1, 3)
    apex = objective(guidance_scale=3.0, clip=None, fake_weight=0.0, supervised_weight=0.0)
    draws = apex.draw(x, seeded())
    losses = apex(Velocities(model, real=real), x, condition, step=0, draws=draws, negative_condition=negative)
    ((x_t, t, both, with_grad),) = real.seen
    assert x_t.shape == (8, 2) and not with_grad
    assert torch.equal(x_t[:4], x_t[4:]) and torch.equal(t, torch.cat([draws.t_query, draws.t_query]))
    assert torch.equal(both, torch.cat([condition, negative.expand(4, 3)]))
    v, v_uncond = real.network(x_t, t, both).chunk(2)
    v_shift = model(x_t[:4], t[:4], 0.5 - condition)
    wanted = (v_shift - (v_uncond + 3.0 * (v - v_uncond))).square().mean(1)
    torch.testing.assert_close(losses.correction, wanted.detach())


def test_roles_may_guide_in_their_own_way():
    """A family whose pipeline rescales, say: it gets both velocities and the scale, and its result is what counts."""
    model, real = VectorNetwork(), Calls(VectorNetwork())
    x, condition = batch()
    negative = torch.zeros(1, 3)
    seen = []

    def guide(v, v_negative, scale):
        seen.append((v, v_negative, scale))
        guided = v_negative + scale * (v - v_negative)
        return guided * (v.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True))

    apex = objective(guidance_scale=3.0, clip=None, supervised_weight=0.0)
    draws = apex.draw(x, seeded())
    roles = Velocities(model, real=real, guide=guide)
    losses = apex(roles, x, condition, step=0, draws=draws, negative_condition=negative)
    ((x_t, t, both, _),) = real.seen
    v, v_negative = real.network(x_t, t, both).chunk(2)
    ((seen_v, seen_negative, scale),) = seen
    assert torch.equal(seen_v, v) and torch.equal(seen_negative, v_negative) and scale == 3.0
    wanted = (model(x_t[:4], t[:4], 0.5 - condition) - guide(v, v_negative, 3.0)).square().mean(1)
    torch.testing.assert_close(losses.correction, wanted.detach())
    # Without a negative condition there is nothing to combine.
    seen.clear()
    objective()(roles, x, condition, step=0)
    assert not seen
    roles.guide = lambda v, v_negative, scale: v[:2]
    with pytest.raises(ValueError, match="the guided velocity must return the shape"):
        apex(roles, x, condition, step=0, negative_condition=negative)


def test_a_negative_condition_without_guidance_costs_nothing():
    real = Calls(VectorNetwork())
    x, condition = batch()
    objective()(Velocities(VectorNetwork(), real=real), x, condition, step=0, negative_condition=torch.zeros(4, 3))
    assert real.seen[0][0].shape == (4, 2)


def test_terms_of_weight_zero_call_nothing():
    x, condition = batch()
    generator, shifted, real = (Calls(VectorNetwork()) for _ in range(3))
    velocities = Velocities(generator, shifted, real)
    losses = objective(correction_weight=0.0)(velocities, x, condition, step=0)
    assert losses.correction is None and not real.seen and "dv_rms" not in losses.metrics
    objective(correction_weight=0.0, guidance_scale=2.0)(velocities, x, condition, step=0)
    assert not real.seen
    losses = objective(fake_weight=0.0, correction_weight=0.0)(velocities, x, condition, step=0)
    assert losses.fake is None and len(shifted.seen) == 2 and len(generator.seen) == 5
    losses = objective(supervised_weight=0.0)(velocities, x, condition, step=0)
    assert losses.supervised is None and "loss_supervised" not in losses.metrics


def test_a_condition_reaches_the_network_as_a_condition():
    torch.manual_seed(0)
    model = TextNetwork()
    condition = Condition(torch.randn(2, 3, 4), torch.tensor([[1, 1, 1], [1, 0, 0]]))
    x = torch.randn(2, 2, 4, 4)
    for schedule in SCHEDULES:
        objective().backward(model, x, condition, step=0, schedule=schedule)
    assert all(bool(g.any()) for g in gradients(model))


def test_a_half_network_is_fed_halves_and_judged_in_fp32():
    model = Calls(VectorNetwork().bfloat16())
    x, condition = (a.bfloat16() for a in batch())
    losses = objective().backward(model, x, condition, step=0)
    assert {call[0].dtype for call in model.seen} == {torch.bfloat16}
    assert {call[1].dtype for call in model.seen} == {torch.float32}
    assert losses.total.dtype == losses.fake.dtype == torch.float32
    assert all(bool(g.any()) for g in gradients(model.network))


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
def test_the_callers_tensors_are_left_alone(schedule):
    model, (x, condition) = VectorNetwork(), batch()
    x.requires_grad_(True)
    apex = objective()
    draws = apex.draw(x, seeded())
    inputs = [x, condition, draws.z, draws.s, draws.z_query, draws.t_query, draws.z_sup, draws.t_sup]
    before = [value.detach().clone() for value in inputs]
    versions = [value._version for value in inputs]
    if schedule is None:
        apex(model, x, condition, step=0, draws=draws).total.backward()
    else:
        apex.backward(model, x, condition, step=0, draws=draws, schedule=schedule)
    for value, was, version in zip(inputs, before, versions, strict=True):
        assert torch.equal(value, was) and value._version == version
    assert x.grad is None


# ---- arguments that do not fit


def test_step_is_required_and_by_keyword():
    x, condition = batch()
    for call in (objective(), objective().backward):
        with pytest.raises(TypeError, match="step"):
            call(VectorNetwork(), x, condition)
        for step in (-1, 1.0, True, None, "3", np.int64(-1), np.float64(3), np.bool_(True)):
            with pytest.raises(ValueError, match="step must be the index"):
                call(VectorNetwork(), x, condition, step=step)


def test_a_step_may_be_anything_that_is_a_whole_number():
    x, condition = batch()
    apex = objective(warmup_steps=5)
    for call in (apex, apex.backward):
        assert call(VectorNetwork(), x, condition, step=np.int64(4)).phase == "warm-up"
        assert call(VectorNetwork(), x, condition, step=np.uint8(5)).phase == "full"
    apex.watch_gradient_norm(torch.tensor(math.nan), step=np.int64(5))
    with pytest.raises(NonFiniteLossError) as caught:
        apex.check_finite()
    assert type(caught.value.step) is int and caught.value.step == 5


@pytest.mark.parametrize("loss", ["correction", "paper"])
def test_an_empty_batch_is_refused(loss):
    apex = objective(loss=loss)
    for call in (apex, apex.backward):
        with pytest.raises(ValueError, match=r"x must hold at least one sample, got \[0, 2\]"):
            call(VectorNetwork(), *batch(0), step=0)
    apex.check_finite()  # nothing was noted that a later step would stumble over


def test_arguments_that_do_not_fit_are_refused():
    model, (x, condition) = VectorNetwork(), batch()
    apex = objective()
    cases = [
        (
            dict(x=torch.zeros(4, 2, dtype=torch.long)),
            ValueError,
            r"x must be a floating-point tensor .*int64 \[4, 2\]",
        ),
        (dict(x=torch.zeros(4)), ValueError, r"float32 \[4\]"),
        (dict(condition=condition[:3]), ValueError, "batch size of x, 4, got 3"),
        (dict(condition="a cat"), TypeError, "a Tensor or an apex_fast.Condition, got str"),
        (dict(velocities=3), TypeError, "generator must be a callable"),
        (dict(draws=apex.draw(x), generator=seeded()), ValueError, "draws or a generator, not both"),
        (dict(draws=apex.draw(x[:2])), ValueError, r"draws.z must be \[4, 2\] on cpu, got \[2, 2\] on cpu"),
        (dict(draws=replace(apex.draw(x), z_sup=None)), ValueError, "draws.z_sup must be .* got None; make draws with"),
    ]
    for change, error, message in cases:
        arguments = {"velocities": model, "x": x, "condition": condition, **change}
        with pytest.raises(error, match=message):
            apex(**arguments, step=0)


def test_guidance_needs_a_negative_condition():
    x, condition = batch()
    apex = objective(guidance_scale=2.0)
    with pytest.raises(ValueError, match="guidance_scale=2.0 guides the real branch, which needs negative_condition="):
        apex(VectorNetwork(), x, condition, step=0)
    with pytest.raises(ValueError, match=r"negative_condition must have batch size 4 \(or 1"):
        apex(VectorNetwork(), x, condition, step=0, negative_condition=torch.zeros(2, 3))


def test_a_velocity_that_does_not_fit_is_refused_by_the_name_of_its_role():
    model, (x, condition) = VectorNetwork(), batch()

    class Output:
        sample = x

    cases = [
        (Velocities(lambda *_: Output()), TypeError, "the generator velocity must return .* got Output; unwrap"),
        (Velocities(model, shifted=lambda x, t, c: x[:, :1]), ValueError, r"the shifted velocity .* got \[4, 1\]"),
        (Velocities(model, real=lambda x, t, c: x.long()), TypeError, "the real velocity .* a tensor of torch.int64"),
    ]
    for velocities, error, message in cases:
        with pytest.raises(error, match=message):
            objective()(velocities, x, condition, step=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_network_that_cannot_learn_is_noticed(schedule):
    x, condition = batch()
    with pytest.raises(ValueError, match="carries no gradient, so its term cannot train anything"):
        objective().backward(VectorNetwork().requires_grad_(False), x, condition, step=0, schedule=schedule)
    with torch.no_grad():  # a validation loss is fine
        assert not objective()(VectorNetwork(), x, condition, step=0).total.requires_grad


def test_a_step_that_trains_nothing_is_refused():
    x, condition = batch()
    apex = objective(fake_weight=0.0, supervised_weight=0.0, warmup_steps=3)
    with pytest.raises(ValueError, match=r"nothing to train at step 2: .*warmup_steps=3"):
        apex(VectorNetwork(), x, condition, step=2)
    apex(VectorNetwork(), x, condition, step=3)
    with pytest.raises(ValueError, match="paper_fake_weight and paper_mix_weight are both 0"):
        objective(loss="paper", paper_fake_weight=0.0, paper_mix_weight=0.0)(VectorNetwork(), x, condition, step=0)


# ---- no host synchronisation


class NoHostReads(TorchDispatchMode):
    """Fails where a value is read on the host, which on an accelerator would stall it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", ["correction", "paper"])
@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
def test_no_step_reads_a_value_on_the_host(schedule, loss):
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        torch.ones(()).item()  # the mode does see what it is to forbid
    model, (x, condition) = VectorNetwork(), batch()
    if loss == "paper" and schedule == "sequential":
        apex = objective(loss="paper", detach_x_fake=True)
    else:
        apex = objective(loss=loss)
    with NoHostReads():
        for step in range(3):
            if schedule is None:
                apex(model, x, condition, step=step, generator=seeded()).total.backward()
            else:
                apex.backward(model, x, condition, step=step, generator=seeded(), schedule=schedule)
            apex.watch_gradient_norm(torch.ones(()), step=step)


@pytest.mark.cuda
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_step_makes_the_device_wait(schedule):
    model = VectorNetwork().cuda()
    x, condition = (a.cuda() for a in batch())
    apex = ApexObjective(ConditionShift().cuda(), warmup_steps=0, ramp_steps=0)
    generator = torch.Generator("cuda").manual_seed(0)
    apex.backward(model, x, condition, step=0, generator=generator, schedule=schedule)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2):
            apex.backward(model, x, condition, step=step, generator=generator, schedule=schedule)
            apex.watch_gradient_norm(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), step=step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    apex.check_finite()


@pytest.mark.cuda
def test_a_cpu_generator_gives_a_gpu_run_the_same_draws():
    x = torch.randn(3, 2)
    on_gpu = objective().draw(x.cuda(), seeded())
    assert on_gpu.z.is_cuda and torch.equal(on_gpu.z.cpu(), objective().draw(x, seeded()).z)
