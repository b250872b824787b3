"""Looking at a run without changing it: its averaged weights in eval mode, pictures of them, scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from apex_fast.backbones.base import Backbone
from apex_fast.condition import Condition
from apex_fast.sampler import sample
from apex_fast.training.memory import during
from apex_fast.training.progress import TensorBoard
from apex_fast.velocities import Guide

if TYPE_CHECKING:
    from apex_fast.training.loop import Trainer

VALIDATION_SEED = 20260
"""Seed of validation noise: the same noise at every validation of every run, so that pictures can be compared."""

SMALL = 64
"""Edge in pixels up to which pictures are enlarged to be looked at."""


@torch.no_grad()
def draw_pictures(
    backbone: Backbone,
    noise: Tensor,
    condition: Condition,
    *,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    negative_condition: Condition | None = None,
    guide: Guide | None = None,
) -> Tensor:
    """Images ``[N, 3, H, W]`` (``[N, C, h, w]`` in pixel space) in about [-1, 1], fp32 on the CPU, from ``noise``
    ``[N, C, h, w]`` and as many conditions, both anywhere; arguments as :func:`apex_fast.sample`.

    Models in pixel space sample all at once; others one picture at a time, since decoding alone takes gigabytes for
    each at 1024 pixels.
    """
    device = backbone.device
    many = len(noise) if backbone.text is not None else 1
    images = []
    for first in range(0, len(noise), many):
        rows = slice(first, first + many)
        with during("sampling pictures"):
            latents = sample(
                backbone,
                noise[rows].to(device),
                condition.index(rows).to(device),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                negative_condition=negative_condition,
                guide=guide,
            )
        with during("decoding pictures"):
            images.append(backbone.decode(latents).float().cpu())
    return torch.cat(images)


@contextlib.contextmanager
def undisturbed(trainer: Trainer) -> Iterator[nn.Module]:
    """The network in eval mode with its averaged weights; weights, mode and random states are as before afterwards."""
    modes = [(m, m.training) for m in trainer.backbone.modules()]
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        trainer.backbone.eval()
        try:
            with trainer.average.applied() if trainer.average is not None else contextlib.nullcontext():
                yield trainer.backbone
        finally:
            for module, mode in modes:
                module.training = mode


def draw(trainer: Trainer, prompts: list[str], *, num_inference_steps: int, seed: int) -> Tensor:
    """Images of ``prompts`` from the averaged weights, as :func:`draw_pictures` returns them; noise depends on ``seed``
    and the count alone.

    KeyError for a prompt that was not encoded before the run, where the text encoders are gone.
    """
    noise = torch.randn(len(prompts), *trainer.sample_shape, generator=torch.Generator().manual_seed(seed))
    with undisturbed(trainer):
        backbone, table = trainer.backbone, trainer.batches.table
        condition = backbone.encode(prompts) if backbone.text is not None or table is None else table(prompts)
        return draw_pictures(backbone, noise, condition, num_inference_steps=num_inference_steps)


def validate(trainer: Trainer, board: TensorBoard | None = None) -> dict[str, float]:
    """Draws the validation prompts to ``samples/`` and scores the network if the config says so."""
    from apex_fast.evaluation.report import Row, sample_picture

    config = trainer.config
    if config.validation_prompts:
        count, steps = config.validation_images_per_prompt, config.validation_num_inference_steps
        prompts = [p for p in config.validation_prompts for _ in range(count)]
        images = square(draw(trainer, prompts, num_inference_steps=steps, seed=VALIDATION_SEED))
        rows = [
            Row(f'"{prompt}"', "", images[i * count : (i + 1) * count])
            for i, prompt in enumerate(config.validation_prompts)
        ]
        title = f"Step {trainer.step}, {steps} sampling step{'s' if steps > 1 else ''}"
        tile = 80 if images.shape[-1] <= SMALL else 256
        picture = sample_picture(rows, [""], per_column=count, title=title, tile=tile, across=min(count, 8))
        folder = trainer.output_dir / "samples"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"step-{trainer.step:06d}.png")
        if board is not None:
            board.image(trainer.step, "samples", np.asarray(picture))
    return score(trainer, config.validation_num_inference_steps) if config.validation_metrics else {}


def score(trainer: Trainer, num_inference_steps: int, **options: Any) -> dict[str, float]:
    """Frechet distance, accuracy and diversity of the averaged weights on the digits (see
    :func:`apex_fast.evaluation.digits.evaluate_digits`)."""
    from apex_fast.evaluation.digits import evaluate_digits

    with undisturbed(trainer) as network:
        return evaluate_digits(network, num_inference_steps=num_inference_steps, **options)


def square(images: Tensor) -> Tensor:
    """Images ``[N, C, H, W]`` with white added to make them square, so that a grid of tiles does not distort them."""
    height, width = images.shape[2:]
    edge = max(height, width)
    if height == width:
        return images
    padded = images.new_ones(*images.shape[:2], edge, edge)
    top, left = (edge - height) // 2, (edge - width) // 2
    padded[:, :, top : top + height, left : left + width] = images
    return padded
