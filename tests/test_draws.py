from __future__ import annotations

import pytest
import torch
from small_networks import VectorNetwork
from torch import Tensor

from apex_fast import ApexObjective, ConditionShift

SCHEDULES = ("joint", "retain", "sequential")


def objective(**settings) -> ApexObjective:
    return ApexObjective(ConditionShift(), **{"warmup_steps": 0, "ramp_steps": 0, **settings})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 2), torch.randn(size, 3)


def test_draws_come_from_the_generator_alone():
    x = torch.randn(3, 2, 4)
    before = torch.get_rng_state()
    draws = objective().draw(x, seeded())
    assert torch.equal(torch.get_rng_state(), before)
    again = objective().draw(x, seeded())
    for name in ("z", "s", "z_query", "t_query", "z_sup", "t_sup"):
        assert torch.equal(getattr(draws, name), getattr(again, name)), name
    assert draws.z.shape == draws.z_query.shape == draws.z_sup.shape == x.shape
    for one, other in ((draws.z, draws.z_query), (draws.z_query, draws.z_sup), (draws.z, draws.z_sup)):
        assert not torch.equal(one, other)
    assert torch.equal(draws.s, torch.ones(3))
    assert float(draws.t_sup.max()) <= 0.98


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
def test_a_step_touches_no_global_random_state(schedule):
    model, (x, condition) = VectorNetwork(), batch()
    before = torch.get_rng_state()
    if schedule is None:
        objective()(model, x, condition, step=0, generator=seeded())
    else:
        objective().backward(model, x, condition, step=0, generator=seeded(), schedule=schedule)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_fp32_whatever_the_network_computes_in(dtype):
    x = torch.randn(64, 3)
    draws = objective().draw(x.to(dtype), seeded())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert draws.z.dtype == draws.t_query.dtype == draws.s.dtype == wide
    assert torch.equal(draws.z.float(), objective().draw(x, seeded()).z)


def test_noise_has_the_layout_of_x():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    draws = objective().draw(x, seeded())
    assert draws.z.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(draws.z, objective().draw(x.contiguous(), seeded()).z)


def test_draws_reach_the_step():
    model, (x, condition) = VectorNetwork(), batch()
    apex = objective()
    by_draws = apex(model, x, condition, step=0, draws=apex.draw(x, seeded(3)))
    by_generator = apex(model, x, condition, step=0, generator=seeded(3))
    assert torch.equal(by_draws.total, by_generator.total)
    assert not torch.equal(by_draws.total, apex(model, x, condition, step=0, generator=seeded(4)).total)


def test_paper_draws_use_z_and_t_again_unless_fresh():
    x = torch.randn(3, 2)
    draws = objective(loss="paper").draw(x, seeded())
    assert draws.z_query is draws.z and draws.t_query is draws.s and draws.z_sup is None
    fresh = objective(loss="paper", fresh=True).draw(x, seeded())
    assert not torch.equal(fresh.z_query, fresh.z) and not torch.equal(fresh.t_query, fresh.s)
