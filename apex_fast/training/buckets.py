"""The sizes of a run's pictures, as its keys say."""

from __future__ import annotations

from apex_fast.data.pictures import Buckets
from apex_fast.training.config import TrainConfig
from apex_fast.training.settings import SettingsError

STEPS_OF_AN_EDGE = 16
"""The edges of buckets are multiples of about this part of the resolution: 64 pixels at 1024."""


def buckets_for(config: TrainConfig, size: tuple[int, int], multiple: int) -> Buckets:
    """The sizes that pictures are brought to: one, or with ``aspect_buckets`` several with about as many pixels.

    size: (height, width) in pixels of the run's pictures. multiple: what the model's edges must be multiples of.

    Raises:
        SettingsError: a step of the buckets that does not fit the model or the resolution.
    """
    if not config.aspect_buckets:
        return Buckets.single(*size)
    step = config.aspect_bucket_step
    if step is None:
        step = multiple
        # A step that divides the resolution too, which need not be a power of two.
        while step * STEPS_OF_AN_EDGE < min(size) and not any(edge % (2 * step) for edge in size):
            step *= 2
    elif step % multiple:
        raise SettingsError(f"aspect_bucket_step: {step} is no multiple of this model's {multiple} pixels")
    try:
        return Buckets(size, step, config.max_aspect_ratio)
    except ValueError as error:
        raise SettingsError(str(error)) from error
