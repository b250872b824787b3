"""The settings that vary the correction loss: what each does to losses, gradients, draws and calls."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_networks import VectorNetwork, gradients
from test_objective import SCHEDULES, Calls, NoHostReads, seeded
from torch import Tensor

from apex_fast import ApexObjective, ConditionShift, TimeDistribution, Velocities
from apex_fast.weighting import LEAST_NORMALISER, mean_time_factor, time_factor

F64 = torch.float64


def objective(**settings) -> ApexObjective:
    return ApexObjective(ConditionShift(), **{"warmup_steps": 0, "ramp_steps": 0, **settings})


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    generator = seeded(7)
    return tuple(torch.randn(size, width, generator=generator, dtype=F64) for width in (2, 3))


def networks() -> list[VectorNetwork]:
    torch.manual_seed(0)
    return [VectorNetwork().double() for _ in range(3)]


class Asked:
    """A step's branches, spelt out: what the generator, the shifted and the real branch answer to ``draws``."""

    def __init__(self, generator, shifted, real, draws, x, condition):
        s, t = draws.s[:, None], draws.t_query[:, None]
        x_s = s * draws.z + (1 - s) * x
        self.v_gen = generator(x_s, draws.s, condition)
        self.x_fake = (x_s - s * self.v_gen).detach()
        self.x_t = t * draws.z_query + (1 - t) * self.x_fake
        with torch.no_grad():
            self.v_shift = shifted(self.x_t, draws.t_query, 0.5 - condition)
            self.v_real = real(self.x_t, draws.t_query, condition)
        self.dv, self.t = self.v_shift - self.v_real, t
        self.distance = (self.v_real - (draws.z_query - self.x_fake)).abs().mean(1, keepdim=True)


def corrected(apex: ApexObjective, schedule: str | None = None):
    """One step in which the correction alone trains: losses, the generator's gradients, and what was asked."""
    generator, shifted, real = networks()
    x, condition = batch()
    draws = apex.draw(x, seeded())
    roles = Velocities(generator, shifted, real)
    if schedule is None:
        losses = apex(roles, x, condition, step=0, draws=draws)
        losses.total.backward()
    else:
        losses = apex.backward(roles, x, condition, step=0, draws=draws, schedule=schedule)
    return losses, gradients(generator), Asked(generator, shifted, real, draws, x, condition), generator, draws


def alone(**settings) -> ApexObjective:
    return objective(fake_weight=0.0, supervised_weight=0.0, correction_weight=0.3, **settings)


def same(found: list[Tensor], asked: Asked, direction: Tensor, generator, rtol: float = 1e-9) -> None:
    """Whether ``found`` is what ``0.3 mean |v_gen - sg(v_gen - direction)|^2`` gives."""
    (0.3 * (asked.v_gen - (asked.v_gen - direction).detach()).square().mean()).backward()
    for one, other in zip(found, gradients(generator), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-12)


# ---- what a sample's correction weighs


@pytest.mark.parametrize("schedule", [None, "retain", "sequential"])
def test_dmd_weighting_divides_by_the_distance_to_the_real_endpoint(schedule):
    losses, found, asked, generator, _ = corrected(alone(correction_weighting="dmd", clip=0.3), schedule)
    direction = asked.dv.clamp(-0.3, 0.3)
    same(found, asked, direction / asked.distance, generator)
    torch.testing.assert_close(losses.correction, direction.square().mean(1))
    wanted = 0.3 * (direction.square().mean(1, keepdim=True) / asked.distance).mean()
    torch.testing.assert_close(losses.total.detach(), wanted)
    torch.testing.assert_close(losses.metrics["dmd_normaliser"], asked.distance.mean())


def test_the_dmd_gradient_is_that_of_the_two_endpoints():
    """As DMD writes it, in samples: (x_shift - x_real) / mean |x_fake - x_real|, and x_fake = z - v_gen at s = 1."""
    _, found, asked, generator, _ = corrected(alone(correction_weighting="dmd", clip=None))
    x_shift, x_real = asked.x_t - asked.t * asked.v_shift, asked.x_t - asked.t * asked.v_real
    gradient = (x_shift - x_real) / (asked.x_fake - x_real).abs().mean(1, keepdim=True)
    same(found, asked, -gradient, generator)


def test_the_dmd_normaliser_has_a_floor():
    x, condition = batch()
    velocity = VectorNetwork().double()
    apex = alone(correction_weighting="dmd", clip=None)
    draws = apex.draw(x, seeded())
    with torch.no_grad():
        target = draws.z_query - (draws.z - velocity(draws.z, draws.s, condition))
    shifted = lambda x_t, t, c: target + 0.25  # noqa: E731
    real = lambda x_t, t, c: target  # noqa: E731
    losses = apex(Velocities(velocity, shifted, real), x, condition, step=0, draws=draws)
    torch.testing.assert_close(losses.total.detach(), torch.tensor(0.3 * 0.25**2 / LEAST_NORMALISER, dtype=F64))


@pytest.mark.parametrize("schedule", [None, "retain", "sequential"])
def test_time_weighting_is_the_exact_factor_over_its_mean(schedule):
    times = {"generator_times": TimeDistribution("uniform", low=0.2, constant_share=0.5)}
    apex = alone(correction_weighting="time", clip=None, **times)
    _, found, asked, generator, draws = corrected(apex, schedule)
    factor = draws.s * (1 - draws.t_query) ** 2 / (2 * draws.t_query)
    mean = 0.8 * (math.log(0.98 / 0.02) - 1.92 + (0.98**2 - 0.02**2) / 2) / 2 / 0.96
    # The library's mean is a quadrature.
    same(found, asked, asked.dv * (factor / mean)[:, None], generator, rtol=1e-7)


def test_means_of_the_time_factor():
    one, many = TimeDistribution("constant", value=1.0), 400_000
    assert time_factor(torch.tensor([0.5]), torch.tensor([0.02])).item() == pytest.approx(0.5 * 0.98**2 / 0.04)
    for times in (
        TimeDistribution("uniform", low=0.05, high=0.9),
        TimeDistribution("uniform", low=0.05, shift=3.0),
        TimeDistribution("logit_normal", mean=-0.3, std=0.8),
        TimeDistribution("logit_normal", low=0.1, high=0.8, shift=0.5, constant_share=0.25, value=0.3),
        TimeDistribution("discrete", values=(0.25, 0.5, 1.0)),
    ):
        drawn = times.sample(many, generator=seeded()).double()
        sampled = time_factor(torch.ones_like(drawn), drawn)
        tolerance = 6 * (sampled.std() / many**0.5).item() + 1e-7
        assert mean_time_factor(one, times) == pytest.approx(sampled.mean().item(), abs=tolerance)
    # What the documentation says of the default times.
    default = objective().fake_times
    assert time_factor(torch.ones(1), torch.tensor([0.02])).item() / mean_time_factor(one, default) == pytest.approx(
        18.8, abs=0.05
    )


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({"fake_times": TimeDistribution("uniform")}, "fake_times reaches 0"),
        ({"fake_times": TimeDistribution("discrete", values=(0.0, 0.5))}, "fake_times reaches 0"),
        ({"fake_times": TimeDistribution("uniform", low=0.1, constant_share=0.1, value=0.0)}, "fake_times reaches 0"),
        ({"fake_times": TimeDistribution("constant", value=1.0)}, "which is 0 for all"),
        ({"generator_times": TimeDistribution("constant", value=0.0)}, "which is 0 for all"),
    ],
)
def test_time_weighting_refuses_times_without_a_mean(times, message):
    objective(**times)
    with pytest.raises(ValueError, match=message):
        objective(correction_weighting="time", **times)


# ---- the bound on a sample's norm


@pytest.mark.parametrize("weighting", ["constant", "dmd", "time"])
@pytest.mark.parametrize("schedule", [None, "retain", "sequential"])
def test_a_bound_on_the_norm_keeps_the_direction(schedule, weighting):
    apex = alone(clip_mode="norm", clip=0.3, correction_weighting=weighting)
    losses, found, asked, generator, draws = corrected(apex, schedule)
    rms = asked.dv.square().mean(1, keepdim=True).sqrt()
    bounded = asked.dv * (0.3 / rms).clamp_max(1.0)
    assert 0 < (rms > 0.3).sum() < len(rms), "some samples are bounded and some are not"
    weight = torch.ones_like(rms)
    if weighting == "dmd":
        weight = 1 / asked.distance
    if weighting == "time":
        mean = mean_time_factor(apex.generator_times, apex.fake_times)
        weight = (time_factor(draws.s, draws.t_query) / mean)[:, None]
    same(found, asked, weight * bounded, generator)
    torch.testing.assert_close(losses.correction, bounded.square().mean(1))
    torch.testing.assert_close(losses.total.detach(), 0.3 * (weight * bounded.square().mean(1, keepdim=True)).mean())
    torch.testing.assert_close(losses.metrics["dv_clipped_rms"], bounded.square().mean().sqrt())
    torch.testing.assert_close(losses.metrics["dv_rms"], asked.dv.square().mean().sqrt())
    torch.testing.assert_close(losses.metrics["clipped_share"], (rms > 0.3).double().mean())


def test_a_wide_bound_on_the_norm_is_no_bound():
    wide, none = corrected(alone(clip_mode="norm", clip=1e6)), corrected(alone(clip=None))
    for one, other in zip(wide[1], none[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    torch.testing.assert_close(wide[0].total, none[0].total)
    off = corrected(alone(clip_mode="norm", clip=None))
    assert all(torch.equal(one, other) for one, other in zip(off[1], none[1], strict=True))


# ---- steps that leave something out


@pytest.mark.parametrize("schedule", [None, "retain", "sequential"])
def test_between_the_generators_steps_the_shifted_branch_learns_alone(schedule):
    generator, shifted, real = (Calls(network) for network in networks())
    x, condition = batch()
    apex = objective(generator_every=3, supervised_every=2)
    draws = apex.draw(x, seeded())
    found = []
    for step in range(6):
        for role in (generator, shifted, real):
            role.seen.clear()
        roles = Velocities(generator, shifted, real)
        if schedule is None:
            losses = apex(roles, x, condition, step=step, draws=draws)
            losses.total.backward()
        else:
            losses = apex.backward(roles, x, condition, step=step, draws=draws, schedule=schedule)
        corrects, supervises = step in (2, 5), step in (1, 3, 5)
        assert len(shifted.seen) == 1 and len(real.seen) == corrects
        with_graph = [bool((call[1] == 1).all()) for call in generator.seen if call[3]]
        assert sorted(with_graph) == [False] * supervises + [True] * corrects, "no generator graph that is not needed"
        assert (losses.correction is not None) == corrects == ("dv_rms" in losses.metrics)
        assert (losses.supervised is not None) == supervises
        plain = objective(correction_weight=0.5 if corrects else 0.0, supervised_weight=1.0 if supervises else 0.0)
        mine = gradients(generator.network, shifted.network)
        plain(roles, x, condition, step=step, draws=draws).total.backward()
        for one, other in zip(mine, gradients(generator.network, shifted.network), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        found.append(mine)
    assert not any(bool(g.any()) for g in found[0][: len(found[0]) // 2]), "step 0 fits the shifted branch alone"


def test_leaving_steps_out_changes_no_draw():
    x, _ = batch()
    plain, spaced = objective().draw(x, seeded()), objective(generator_every=5, supervised_every=4).draw(x, seeded())
    for name in ("z", "s", "z_query", "t_query", "z_sup", "t_sup"):
        assert torch.equal(getattr(plain, name), getattr(spaced, name))
    with_terms = objective(consistency_weight=1.0, mix_regulariser_weight=1.0).draw(x, seeded())
    assert torch.equal(plain.z_sup, with_terms.z_sup) and with_terms.z_mix is not None
    assert plain.z_consistency is None and plain.t_mix is None


def test_in_the_warm_up_the_correction_is_measured_in_the_generators_steps():
    x, condition = batch()
    apex = objective(generator_every=2, warmup_steps=4)
    network = VectorNetwork().double()
    measured = [apex.backward(network, x, condition, step=step, generator=seeded()) for step in range(6)]
    assert [losses.correction is not None for losses in measured] == [False, True] * 3
    assert [losses.metrics["correction_weight"].item() for losses in measured[1::2]] == [0.0, 0.0, 0.5]
    assert [losses.phase for losses in measured] == ["warm-up"] * 4 + ["full"] * 2


@pytest.mark.parametrize(
    ("settings", "full"),
    [({}, 10), ({"generator_every": 5}, 14), ({"generator_every": 4, "supervised_every": 6}, 11)],
)
def test_a_full_step_trains_every_term(settings, full):
    apex = objective(warmup_steps=7, ramp_steps=3, **settings)
    assert apex.full_step == full
    assert apex.generator_learns(full) and apex.supervises(full) and apex.phase(full) == "full"


# ---- the consistency term


@pytest.mark.parametrize("guided", [False, True])
def test_the_consistency_target_is_one_step_of_the_real_branch_and_the_generators_endpoint(guided):
    generator, shifted, real = networks()
    x, condition = batch()
    negative = torch.zeros(1, 3, dtype=F64)
    apex = objective(
        fake_weight=0.0, correction_weight=0.0, supervised_weight=0.0, consistency_weight=0.7, consistency_gap=0.4,
        guidance_scale=3.0 if guided else 1.0,
    )  # fmt: skip
    draws = apex.draw(x, seeded())
    # One time below the gap, whose target is then the real velocity.
    draws = replace(draws, t_consistency=torch.tensor([0.1, 0.5, 0.7, 0.9, 0.95, 1.0], dtype=F64))
    roles = [Calls(network) for network in (generator, shifted, real)]
    arguments = {"negative_condition": negative} if guided else {}
    losses = apex(Velocities(*roles), x, condition, step=0, draws=draws, **arguments)
    assert [len(role.seen) for role in roles] == [2, 0, 1]
    losses.total.backward()
    found = gradients(generator)
    assert not any(bool(g.any()) for g in gradients(shifted, real))

    s, z = draws.t_consistency[:, None], draws.z_consistency
    x_s, r = s * z + (1 - s) * x, (s - 0.4).clamp_min(0)
    with torch.no_grad():
        v = real(x_s, s[:, 0], condition)
        if guided:
            v_negative = real(x_s, s[:, 0], negative.expand(6, 3))
            v = v_negative + 3.0 * (v - v_negative)
        later = generator(x_s - (s - r) * v, r[:, 0], condition)
        target = ((s - r) * v + r * later) / s
    torch.testing.assert_close(target[0], v[0])
    wanted = (generator(x_s, s[:, 0], condition) - target).square().mean(1)
    torch.testing.assert_close(losses.consistency, wanted.detach())
    torch.testing.assert_close(losses.metrics["loss_consistency"], wanted.detach().mean())
    (0.7 * wanted.mean()).backward()
    for one, other in zip(found, gradients(generator), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gap", [0.05, 0.5, 1.0])
def test_where_every_path_is_straight_the_exact_velocity_is_consistent(gap):
    """Data at a single point a: v(x_t, t) = (x_t - a) / t leads every x_t to a, in any number of steps."""
    point = torch.tensor([0.3, -1.2], dtype=F64)
    scale = torch.ones((), dtype=F64, requires_grad=True)

    def exact(x_t, t, condition):
        return (x_t - point) / t.clamp_min(1e-9)[:, None]

    def generator(x_t, t, condition):
        return scale * exact(x_t, t, condition)

    apex = objective(
        fake_weight=0.0, correction_weight=0.0, supervised_weight=0.0, consistency_weight=1.0, consistency_gap=gap
    )
    x, condition = point.expand(64, 2), torch.zeros(64, 3, dtype=F64)
    roles = Velocities(generator, real=exact)
    losses = apex(roles, x, condition, step=0, generator=seeded())
    assert losses.consistency.max() < 1e-20
    with torch.no_grad():
        scale.mul_(1.5)
    assert apex(roles, x, condition, step=0, generator=seeded()).consistency.mean() > 1e-2


# ---- L_mix beside the correction


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
@pytest.mark.parametrize("mix_weight", [0.0, 0.5])
def test_the_mix_regulariser_is_the_papers_l_mix(schedule, mix_weight):
    network, _, _ = networks()
    x, condition = batch()
    apex = objective(
        fake_weight=0.0, correction_weight=0.0, supervised_weight=0.0, mix_regulariser_weight=0.7, mix_weight=mix_weight
    )
    draws = apex.draw(x, seeded())
    if schedule is None:
        losses = apex(network, x, condition, step=0, draws=draws)
        losses.total.backward()
    else:
        losses = apex.backward(network, x, condition, step=0, draws=draws, schedule=schedule)
    found = gradients(network)
    paper = objective(loss="paper", paper_fake_weight=0.0, paper_mix_weight=0.7, mix_weight=mix_weight)
    wanted = paper(network, x, condition, step=0, draws=replace(draws, z=draws.z_mix, s=draws.t_mix))
    wanted.total.backward()
    torch.testing.assert_close(losses.mix, wanted.mix)
    for one, other in zip(found, gradients(network), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


# ---- values that do not fit, and the host


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_mode": "elements"}, 'clip_mode must be "element" or "norm", got \'elements\''),
        ({"correction_weighting": "snr"}, 'correction_weighting must be "constant" or "dmd" or "time"'),
        ({"generator_every": 0}, "generator_every must be a whole number of steps, at least 1, got 0"),
        ({"supervised_every": 1.5}, "supervised_every must be a whole number"),
        ({"generator_every": True}, "generator_every must be a whole number"),
        ({"consistency_weight": -1.0}, "consistency_weight must be finite and at least 0"),
        ({"mix_regulariser_weight": math.inf}, "mix_regulariser_weight must be finite"),
        ({"consistency_gap": 0.0}, r"consistency_gap must lie in \(0, 1\], got 0.0"),
        ({"consistency_weight": 1.0, "consistency_times": TimeDistribution("uniform")}, "must stay above 0"),
        ({"consistency_times": 0.5}, "consistency_times must be a TimeDistribution, got float"),
        ({"fake_weight": 0.0, "generator_every": 2, "supervised_weight": 0.0}, "steps in which nothing is trained"),
        ({"fake_weight": 0.0, "generator_every": 2, "supervised_every": 3}, "steps in which nothing is trained"),
        ({"loss": "paper", "generator_every": 2}, 'generator_every varies the correction loss, and loss is "paper"'),
        ({"loss": "paper", "clip_mode": "norm"}, "clip_mode varies the correction loss"),
        ({"loss": "paper", "consistency_weight": 0.1}, "consistency_weight varies the correction loss"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        objective(**settings)


def test_draws_of_another_objective_are_refused():
    x, condition = batch()
    apex = objective(consistency_weight=1.0)
    with pytest.raises(ValueError, match=r"draws.z_consistency must be \[6, 2\] on cpu, got None"):
        apex(VectorNetwork().double(), x, condition, step=0, draws=objective().draw(x))


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
def test_nothing_of_it_reads_a_value_on_the_host(schedule):
    network, (x, condition) = VectorNetwork().double(), batch()
    for weighting, clip_mode in (("dmd", "norm"), ("time", "element")):
        apex = objective(
            correction_weighting=weighting,
            clip_mode=clip_mode,
            generator_every=2,
            consistency_weight=1.0,
            mix_regulariser_weight=1.0,
        )
        with NoHostReads():
            for step in range(2):
                if schedule is None:
                    apex(network, x, condition, step=step, generator=seeded()).total.backward()
                else:
                    apex.backward(network, x, condition, step=step, generator=seeded(), schedule=schedule)


# ---- a run


def test_a_run_reaches_every_setting_by_its_key(tmp_path):
    import json

    from tiny_runs import keys, make_start

    start = make_start(tmp_path / "start")
    from apex_fast.training.config import load_config
    from apex_fast.training.loop import Trainer

    settings = {
        "clip_mode": "norm",
        "correction_weighting": "dmd",
        "generator_every": "2",
        "supervised_every": "3",
        "consistency_weight": "0.5",
        "consistency_times.low": "0.1",
        "consistency_gap": "0.2",
        "mix_regulariser_weight": "0.5",
    }
    more = [word for name, value in settings.items() for word in (f"--objective.{name}", value)]
    trainer = Trainer(load_config(None, keys(start, tmp_path / "run", "--max_train_steps", "6", *more)))
    trainer.run()
    assert trainer.objective.consistency_times.low == 0.1 and trainer.objective.consistency_gap == 0.2
    assert any("no multiple of objective.generator_every: 2" in note for note in trainer.notes)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss_total" in line]
    # The number of a line counts finished steps, so the last of every two has an even one.
    assert [line["step"] for line in lines if "dv_rms" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "loss_supervised" in line] == [3, 6]
    assert all(math.isfinite(line["loss_consistency"]) and math.isfinite(line["loss_mix"]) for line in lines)


def test_a_generator_that_never_learns_is_warned_about():
    """A run that ends before the first step in which the generator learns trains nothing of one step."""
    shift = ConditionShift(scale=-1.0, bias=0.5)
    with pytest.warns(UserWarning, match="never starts: warmup_steps=10 and generator_every=500 of total_steps=300"):
        ApexObjective(shift, generator_every=500, warmup_steps=10, ramp_steps=10, total_steps=300)
    # Step 299 is the last of 300 that counts for every 100; with 320 steps it is still 299.
    with pytest.warns(UserWarning, match="never starts"):
        ApexObjective(shift, generator_every=100, warmup_steps=300, ramp_steps=1, total_steps=320)
    with pytest.warns(UserWarning, match="ends at weight"):
        ApexObjective(shift, generator_every=100, warmup_steps=290, ramp_steps=50, total_steps=320)


@pytest.mark.parametrize("low", [1e-2, 1e-4, 1e-7])
def test_the_mean_of_the_exact_factor_holds_near_zero(low):
    """Integral of (1 - t)^2 / (2 t) over [low, 1], by hand: (-ln low - 2 (1 - low) + (1 - low^2) / 2) / 2."""
    times = TimeDistribution("uniform", low=low)
    exact = (-math.log(low) - 2 * (1 - low) + (1 - low**2) / 2) / 2 / (1 - low)
    found = times.average(lambda t: (1 - t).square() / (2 * t))
    assert found == pytest.approx(exact, rel=1e-4)
