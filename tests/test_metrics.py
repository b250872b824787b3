"""The distances that scores are made of, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from apex_fast.evaluation.metrics import (
    diversity_ratio,
    frechet_distance,
    mean_pairwise_distance,
    precision_recall,
)


def _with_moments(mean: torch.Tensor, covariance: torch.Tensor, count: int = 400, seed: int = 0) -> torch.Tensor:
    """Samples whose sample mean and covariance are exactly the given ones, so that no statistical slack is needed."""
    draws = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws = draws - draws.mean(0)
    values, vectors = torch.linalg.eigh(draws.T.cov())
    white = draws @ vectors / values.sqrt()
    values, vectors = torch.linalg.eigh(covariance)
    return white @ (vectors * values.clamp(min=0).sqrt()).T + mean


def _positive(size: int, seed: int) -> torch.Tensor:
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)


def test_closed_form_for_commuting_covariances():
    # Diagonal covariances: |mu|^2 + sum (sd_a - sd_b)^2.
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    a, b = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64), torch.tensor([1.0, 9.0, 0.25], dtype=torch.float64)
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    measured = frechet_distance(_with_moments(torch.zeros_like(mean), a.diag()), _with_moments(mean, b.diag(), seed=1))
    assert measured == pytest.approx(expected.item(), rel=1e-10)


def test_closed_form_for_covariances_that_do_not_commute():
    # In two dimensions tr (C_a C_b)^(1/2) = sqrt(tr(C_a C_b) + 2 sqrt(det C_a det C_b)).
    a, b, mean = _positive(2, 0), _positive(2, 1), torch.zeros(2, dtype=torch.float64)
    assert not torch.allclose(a @ b, b @ a)
    cross = math.sqrt((a @ b).trace() + 2 * math.sqrt(a.det() * b.det()))
    measured = frechet_distance(_with_moments(mean, a), _with_moments(mean, b, seed=1))
    assert measured == pytest.approx((a.trace() + b.trace() - 2 * cross).item(), rel=1e-9)


def test_symmetric_zero_on_itself_and_blind_to_rotation():
    a = _with_moments(torch.zeros(8, dtype=torch.float64), _positive(8, 2))
    b = _with_moments(torch.ones(8, dtype=torch.float64), _positive(8, 3), seed=1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a[torch.randperm(len(a))]) == pytest.approx(0, abs=1e-9)
    rotation = torch.linalg.qr(_positive(8, 4)).Q
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_a_covariance_without_full_rank_is_no_obstacle():
    # Five samples in twenty dimensions; a constant set against them leaves the trace and the mean.
    a = torch.randn(5, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = torch.full((5, 20), 2.0, dtype=torch.float64)
    expected = (a.mean(0) - 2).square().sum() + a.T.cov().trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-10)


def test_fp32_features_are_compared_in_float64():
    # A large common offset: in fp32 the covariance of these features would have no correct digit.
    base = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    shifted = (base + 4096).to(torch.float32)
    expected = frechet_distance(shifted.double(), (shifted * 1.01).double())
    assert frechet_distance(shifted, shifted * 1.01) == expected


@pytest.mark.parametrize("shape", [(1, 3), (5, 4), (5,)])
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="at least two rows"):
        frechet_distance(torch.zeros(5, 3), torch.zeros(shape))


def test_diverged_features_are_refused():
    features = torch.randn(5, 3)
    features[2, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        frechet_distance(features, torch.randn(5, 3))


def test_mean_pairwise_distance_of_a_square():
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert mean_pairwise_distance(corners) == pytest.approx((4 + 2 * math.sqrt(2)) / 6)
    assert mean_pairwise_distance(corners.view(4, 1, 2, 1)) == pytest.approx((4 + 2 * math.sqrt(2)) / 6)
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        mean_pairwise_distance(corners[:1])


def test_diversity_is_a_ratio_within_each_label():
    data = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(2).repeat_interleave(20)
    data[labels == 1] += 100
    assert diversity_ratio(data, labels, data, labels) == pytest.approx(1.0)
    assert diversity_ratio(data * 0.5, labels, data, labels) == pytest.approx(0.5)
    # The distance between the two labels is spread that no single prompt has; it must not count.
    collapsed = torch.where((labels == 1).view(-1, 1, 1, 1), torch.full_like(data, 100), torch.zeros_like(data))
    assert diversity_ratio(collapsed, labels, data, labels) == 0
    # Labels with other numbers of samples than the data are fine.
    assert 0.5 < diversity_ratio(data[::3], labels[::3], data, labels) < 1.5


# ---- precision and recall


def _inside(point: list[float], others: list[list[float]], k: int) -> bool:
    """Whether ``point`` lies in the ball around any of ``others`` that reaches to its k-th neighbour: the definition,
    one number at a time."""
    for i, centre in enumerate(others):
        radius = sorted(math.dist(centre, other) for j, other in enumerate(others) if j != i)[k - 1]
        if math.dist(point, centre) <= radius:
            return True
    return False


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_those_of_the_definition(k):
    generator = torch.Generator().manual_seed(k)
    real = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    generated = 0.6 * torch.randn(31, 3, generator=generator, dtype=torch.float64) + 0.8
    precision, recall = precision_recall(real, generated, k)
    a, b = real.tolist(), generated.tolist()
    assert precision == pytest.approx(sum(_inside(p, a, k) for p in b) / len(b), abs=1e-12)
    assert recall == pytest.approx(sum(_inside(p, b, k) for p in a) / len(a), abs=1e-12)
    assert 0 < recall < precision < 1, "this case is to tell the two apart"


def test_precision_and_recall_tell_what_is_wrong():
    generator = torch.Generator().manual_seed(0)
    real, same = (torch.randn(500, 4, generator=generator) for _ in range(2))
    assert min(precision_recall(real, same)) > 0.8
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, same + 20) == (0.0, 0.0)
    narrow = precision_recall(real, same * 0.1)
    assert narrow[0] > 0.95 and narrow[1] < 0.2, "all near the middle: like the data, and covering little of it"
    wide = precision_recall(real, same * 5)
    assert wide[0] < 0.2 < wide[1]


def test_rows_in_parts_give_the_same(monkeypatch):
    from apex_fast.evaluation import metrics

    real, generated = (torch.randn(50, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    whole = precision_recall(real, generated)
    monkeypatch.setattr(metrics, "_ROWS", 7)
    assert precision_recall(real, generated) == whole


@pytest.mark.parametrize(("a", "b"), [((3, 2), (9, 2)), ((9, 2), (3, 2)), ((9, 2), (9, 3)), ((9,), (9,))])
def test_too_few_or_other_features_are_refused(a, b):
    with pytest.raises(ValueError, match="more than k = 3 rows"):
        precision_recall(torch.zeros(a), torch.zeros(b))


def test_diverged_features_have_no_precision():
    with pytest.raises(ValueError, match="NaN or infinity"):
        precision_recall(torch.randn(9, 2), torch.full((9, 2), math.inf))
