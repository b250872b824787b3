"""The times at which a model's own pipeline samples, from the scheduler that came with the model.

Most families hand N falling sigmas to their scheduler, which shifts them towards the noise, for larger pictures further
(``mu``); SANA and Stable Diffusion 3 let it make its own. The times are those of the scheduler itself, on a copy; the
step between them is Euler's, which is what ``FlowMatchEulerDiscreteScheduler`` does. SANA comes with a multistep solver
of second order: its times are taken, its step is not.
"""

from __future__ import annotations

import copy
import inspect

import torch
from torch import Tensor

from apex_fast.backbones.base import Backbone

_OWN_SIGMAS = ("sana", "stable_diffusion_3")
"""Families whose pipelines leave the sigmas to the scheduler."""
_MOST_SHIFT = {"stable_diffusion_3": 1.16}
"""``max_shift`` of a pipeline whose scheduler states none; 1.15 for the others."""


def pipeline_times(backbone: Backbone, num_inference_steps: int, height: int, width: int) -> Tensor:
    """The times ``[num_inference_steps + 1]``, fp64, falling from 1 (noise) to 0 (data), of the family's pipeline for a
    picture of ``height`` x ``width`` pixels; for :func:`apex_fast.sample` (``times=``).

    Raises:
        ValueError: no scheduler came with the model, or one whose times do not fall from 1 to 0.
    """
    scheduler = backbone.components.get("scheduler")
    name = type(backbone).__name__
    if scheduler is None:
        raise ValueError(f"{name}: no scheduler came with the model, so its times are not known; load the pipeline")
    scheduler = copy.deepcopy(scheduler)
    config = scheduler.config
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    arguments: dict[str, object] = {}
    if "sigmas" in accepted and backbone.family not in _OWN_SIGMAS:
        arguments["sigmas"] = [1.0 - i / num_inference_steps for i in range(num_inference_steps)]
    if "mu" in accepted and config.get("use_dynamic_shifting", False):
        arguments["mu"] = _mu(backbone, config, height, width)
    scheduler.set_timesteps(num_inference_steps, **arguments)
    times = scheduler.sigmas.double().cpu()
    if len(times) == num_inference_steps and times[-1] > 0:
        times = torch.cat([times, times.new_zeros(1)])
    # Schedulers that go by 1000 trained times begin a little below 1.
    if times[0] > 0.999:
        times[0] = 1.0
    # A last time below one of those 1000 is no step of its own but rounding: SD3's ends at 0.
    if times[0] != 1 or times[-1] != 0 or not bool((times.diff() < 0).all()):
        raise ValueError(
            f"{name}: the times of its {type(scheduler).__name__} do not fall from 1 to 0: "
            f"{[round(v, 4) for v in times.tolist()[:8]]}"
        )
    return times


def _mu(backbone: Backbone, config: dict[str, float], height: int, width: int) -> float:
    """How far the times of this picture are shifted: a line over the number of its tokens."""
    _, rows, columns = backbone.latent_shape(height, width)
    tokens = (rows // backbone.patch) * (columns // backbone.patch)
    if backbone.family == "lumina2":
        # The pipeline counts the latents' channels there, where the others count tokens; its users get what it does.
        tokens = backbone.latent_channels
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least = config.get("base_shift", 0.5)
    slope = (config.get("max_shift", _MOST_SHIFT.get(backbone.family, 1.15)) - least) / (high - low)
    return tokens * slope + least - slope * low
