from __future__ import annotations

import pytest
import torch

from apex_fast import TimeDistribution, path


def test_both_ends_of_the_path_come_back_from_the_velocity():
    x, z = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(4, 3, 2, dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=torch.float64)
    x_t = path.per_sample(t, x) * z + (1 - path.per_sample(t, x)) * x
    torch.testing.assert_close(path.endpoint(z - x, x_t, t), x)
    torch.testing.assert_close(path.noise_endpoint(z - x, x_t, t), z)


def test_endpoint_is_differentiable():
    v = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    x_t = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v, x: path.endpoint(v, x, t), (v, x_t))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "distribution",
    [
        TimeDistribution(),
        TimeDistribution(low=0.02, high=0.98),
        TimeDistribution("logit_normal", mean=0.5, std=2.0, low=0.1, high=0.9),
        TimeDistribution(shift=3.0),
        TimeDistribution("uniform", constant_share=0.6),
        TimeDistribution("discrete", values=(0.25, 0.5, 1.0)),
        TimeDistribution("constant", value=0.7),
    ],
)
def test_times_are_fp32_in_range_and_repeat_with_the_seed(distribution):
    times = distribution.sample(4096, "cpu", seeded())
    assert times.shape == (4096,) and times.dtype == torch.float32
    assert torch.equal(times, distribution.sample(4096, "cpu", seeded()))
    continuous = times[times != distribution.value]
    assert bool(((continuous >= distribution.low) & (continuous <= distribution.high)).all())


def test_a_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    TimeDistribution("logit_normal", constant_share=0.5).sample(8, "cpu", seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_shares_and_shapes_of_the_distributions():
    n = 40_000  # standard error of a share near one half: 0.0025
    mixed = TimeDistribution("uniform", constant_share=0.6).sample(n, "cpu", seeded())
    assert (mixed == 1).float().mean().item() == pytest.approx(0.6, abs=0.01)
    assert mixed[mixed != 1].mean().item() == pytest.approx(0.5, abs=0.01)
    # a shift of 3 carries the median from 1/2 to 3/4
    assert TimeDistribution(shift=3.0).sample(n, "cpu", seeded()).median().item() == pytest.approx(0.75, abs=0.01)
    logit = TimeDistribution("logit_normal", mean=1.0, std=0.5).sample(n, "cpu", seeded()).logit()
    assert logit.mean().item() == pytest.approx(1.0, abs=0.02) and logit.std().item() == pytest.approx(0.5, abs=0.02)
    discrete = TimeDistribution("discrete", values=(0.5, 1.0)).sample(n, "cpu", seeded())
    assert set(discrete.tolist()) == {0.5, 1.0}
    assert (discrete == 1).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_lists_from_configuration_files_are_taken():
    assert TimeDistribution("discrete", values=[0.5, 1]).values == (0.5, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "beta"}, "kind must be one of uniform, logit_normal"),
        ({"low": 0.5, "high": 0.4}, "low <= high"),
        ({"high": 1.5}, "low <= high"),
        ({"std": -1.0}, "std >= 0"),
        ({"shift": 0.0}, "shift must be above 0"),
        ({"value": 2.0}, "value must lie"),
        ({"constant_share": 1.5}, "constant_share must lie"),
        ({"kind": "discrete"}, "needs values"),
        ({"values": (0.5,)}, "only that kind takes them"),
    ],
)
def test_fields_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimeDistribution(**arguments)
