"""What one sample's correction weighs, and how it is bounded; plain tensors ``[B]``, no network.

The loss op answers with the correction ``mean clamp(dv)^2`` of every sample, whose gradient on the generator's velocity
is ``2 clamp(dv) / n``. Everything here multiplies that gradient by one number per sample:

* ``"time"`` knows its number from the draws, before the loss runs, so it is a weight of the op like any other.
* ``"dmd"`` and the bound on the norm follow from the op's statistics, after the one read of the velocities. A gradient
  that the same read has written is multiplied in place (2N bytes, N being those of one velocity); reading the
  velocities a second time for a gradient with the right weight would be 5N. Where the gradient is made by a backward
  anyway, the number goes in there and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import ops
from .path import TimeDistribution

Weighting = Literal["constant", "dmd", "time"]
ClipMode = Literal["element", "norm"]

LEAST_NORMALISER = 1e-3
"""Lower bound of the normaliser of ``"dmd"``, in units of velocity, so that no sample weighs more than 1000."""

_DV_SQUARED, _CLIPPED, _SHARE, _DISTANCE = (
    ops.STATS.index(name) for name in ("dv_squared", "clipped_dv_squared", "clipped_share", "guided_target_distance")
)


def time_factor(s: Tensor, t: Tensor) -> Tensor:
    """``s (1 - t)^2 / (2 t)``, all ``[B]``: with it, exact velocities and no clip the correction's gradient is that of
    KL(p_theta,t || q_t) (Prop. 1 in Eq. 13). The half takes back the 2 of the square. Needs t > 0."""
    return s * (1 - t).square() / (2 * t)


def mean_time_factor(generator_times: TimeDistribution, fake_times: TimeDistribution) -> float:
    """Mean of :func:`time_factor` over both distributions, which are drawn independently.

    Raises:
        ValueError: it is infinite, because fake_times reaches 0, or 0, because nothing of it is above 0.
    """
    if fake_times.reaches_zero:
        raise ValueError(
            'correction_weighting "time" divides by t, and fake_times reaches 0, where its mean is infinite; write a '
            "lower end above 0, such as the default 0.02"
        )
    starts = generator_times.average(lambda s: s)
    queries = fake_times.average(lambda t: time_factor(torch.ones_like(t), t))
    if starts * queries == 0:
        raise ValueError(
            'correction_weighting "time" is s (1 - t)^2 / (2 t), which is 0 for all of generator_times and fake_times; '
            "give them values with s above 0 and t below 1"
        )
    return starts * queries


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """The correction of a batch as it counts.

    Attributes:
        losses: ``[B]``, the bounded correction without its weight; of the history of what was given.
        summands: ``[B]``, what enters the total's mean: the weighted losses. Their derivative by the velocity is that
            of what was given times ``factor``.
        stats: as the op's, the columns on clipping as this bound has them.
        factor: ``[B]`` without history, of the gradient; None is 1 for every sample.
    """

    losses: Tensor
    summands: Tensor
    stats: Tensor
    factor: Tensor | None


def weigh(
    correction: Tensor,
    stats: Tensor,
    *,
    elements: int,
    clip: float | None,
    clip_mode: ClipMode,
    weighting: Weighting,
    time_weights: Tensor | None,
) -> Weighed:
    """The correction of every sample, bounded and weighted.

    Args:
        correction, stats: of ``ops.shifted_velocity_loss``, which ran with :func:`clip_of_the_op`.
        elements: of one sample.
        clip, clip_mode, weighting: as the fields of :class:`~apex_fast.ApexObjective`.
        time_weights: ``[B]``, for ``"time"``.
    """
    scale = None
    losses = correction
    if clip_mode == "norm" and clip is not None:
        rms = (stats[:, _DV_SQUARED] / max(elements, 1)).sqrt()
        scale = clip / rms.clamp_min(clip)
        losses = correction * scale.square()
        stats = stats.clone()
        stats[:, _CLIPPED] = stats[:, _DV_SQUARED] * scale.square()
        stats[:, _SHARE] = (rms > clip).to(stats.dtype)
    weights = None
    if weighting == "dmd":
        weights = stats[:, _DISTANCE].clamp_min(LEAST_NORMALISER).reciprocal()
    elif weighting == "time":
        assert time_weights is not None  # the objective makes them
        weights = time_weights.to(stats.dtype)
    factor = weights if scale is None else scale if weights is None else scale * weights
    summands = losses if weights is None else losses * weights
    if scale is not None and factor is not None:
        # The loss falls with the square of the scale, the gradient with the scale: a surrogate, as the correction is.
        through = factor * correction
        summands = through + (summands - through).detach()
    return Weighed(losses=losses, summands=summands, stats=stats, factor=factor)


def clip_of_the_op(clip: float | None, clip_mode: ClipMode) -> float | None:
    """The bound per element that the loss op applies; a bound on the norm comes after it."""
    return clip if clip_mode == "element" else None
