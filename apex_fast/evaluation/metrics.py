"""Distances between sets of samples: pure functions over tensors."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3
"""k of :func:`precision_recall`, as in its paper."""


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, in float64.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the distance of FID (Heusel et al., arXiv 1706.08500, Eq.
    6) in any feature space. features_a, features_b: [N, D] and [M, D], N, M >= 2; units of feature squared. The
    estimate is biased upwards by an amount that depends on the sample counts, so compare distances of equal counts
    only.

    The trace of the root is taken from the eigenvalues of A C_b A with A = C_a^(1/2): symmetric throughout, so it
    holds for covariances without full rank, where an iterative matrix root fails.
    """
    for features in (features_a, features_b):
        if features.dim() != 2 or features.shape[0] < 2 or features.shape[1] != features_a.shape[1]:
            raise ValueError(
                "frechet_distance: expected features [N, D] and [M, D] with at least two rows each, "
                f"got {list(features_a.shape)} and {list(features_b.shape)}"
            )
    a, b = features_a.detach().to(torch.float64), features_b.detach().to(torch.float64)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError(
            "frechet_distance: the features hold NaN or infinity; the samples they come from have diverged"
        )
    covariance_a, covariance_b = a.T.cov().reshape(a.shape[1], -1), b.T.cov().reshape(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ covariance_b @ root)
    cross = product.clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    distance = mean + covariance_a.trace() + covariance_b.trace() - 2 * cross
    # Rounding can leave a distance of zero at -1e-15.
    return max(distance.item(), 0.0)


def mean_pairwise_distance(samples: Tensor) -> float:
    """Mean Euclidean distance over all pairs of different samples, in their unit. samples: [N, ...], N >= 2."""
    if samples.shape[0] < 2:
        raise ValueError(f"mean_pairwise_distance: expected at least two samples, got {samples.shape[0]}")
    return torch.pdist(samples.detach().to(torch.float64).flatten(1)).mean().item()


def diversity_ratio(samples: Tensor, labels: Tensor, data: Tensor, data_labels: Tensor) -> float:
    """How varied samples of one label are, as a share of how varied the data of that label are; mean over the labels.

    1 means as varied as the data, 0 means that every sample of a label is the same picture. It does not say that the
    samples are good, since noise is varied too: read it next to a Frechet distance.

    samples: [N, ...] with labels [N]; data: [M, ...] with data_labels [M]; at least two of each label that occurs in
    ``labels``.
    """
    ratios = []
    for label in labels.unique().tolist():
        own = mean_pairwise_distance(samples[labels == label])
        ratios.append(own / mean_pairwise_distance(data[data_labels == label]))
    return sum(ratios) / len(ratios)


def precision_recall(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991, Eq. 1 and 2).

    Around each point of a set lies a ball that reaches to its ``k``-th nearest neighbour in the set; the union of the
    balls stands for where the set lives. Precision is the share of ``generated`` points inside that of ``real``: how
    many pictures look like the data. Recall is the share of ``real`` points inside that of ``generated``: how much of
    the data the pictures cover. Both grow with the number of points, so compare equal numbers only.

    real, generated: features [N, D] and [M, D], more than ``k`` rows each. Returns (precision, recall), in [0, 1].

    Raises:
        ValueError: other shapes, or features that are not finite.
    """
    for features in (real, generated):
        if features.dim() != 2 or features.shape[1] != real.shape[1] or features.shape[0] <= k or k < 1:
            raise ValueError(
                f"precision_recall: expected features [N, D] and [M, D] with more than k = {k} rows each, k at least "
                f"1, got {list(real.shape)} and {list(generated.shape)}"
            )
    real, generated = real.detach().to(torch.float64), generated.detach().to(torch.float64)
    if not (real.isfinite().all() and generated.isfinite().all()):
        raise ValueError(
            "precision_recall: the features hold NaN or infinity; the samples they come from have diverged"
        )
    return _share_inside(generated, real, k), _share_inside(real, generated, k)


_ROWS = 1024
"""Points whose distances to all others are in memory together."""


def _share_inside(points: Tensor, others: Tensor, k: int) -> float:
    """Share of ``points`` in any of the balls around ``others``."""
    # A point is its own nearest neighbour, at distance zero, so the k-th other one is number k + 1. Differences and not
    # dot products: those round, and a copy of a point would not be at distance zero.
    exact = "donot_use_mm_for_euclid_dist"
    radius = torch.cat(
        [torch.cdist(part, others, compute_mode=exact).kthvalue(k + 1, dim=1).values for part in others.split(_ROWS)]
    )
    inside = [(torch.cdist(part, others, compute_mode=exact) <= radius).any(1) for part in points.split(_ROWS)]
    return torch.cat(inside).double().mean().item()
