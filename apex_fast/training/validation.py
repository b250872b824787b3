"""Looking at a run without changing it: its averaged weights in eval mode, pictures of them, scores."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from apex_fast.backbones.base import Backbone
from apex_fast.backbones.stock_times import pipeline_times
from apex_fast.condition import Condition
from apex_fast.data.shipped import DIGITS
from apex_fast.sampler import sample
from apex_fast.training import distributed
from apex_fast.training.memory import during
from apex_fast.training.progress import Board
from apex_fast.velocities import Guide

if TYPE_CHECKING:
    from apex_fast.training.loop import Trainer

VALIDATION_SEED = 20260
"""Seed of validation noise: the same noise at every validation of every run, so that pictures can be compared."""

SMALL = 64
"""Edge in pixels up to which pictures are enlarged to be looked at."""

SAMPLES = "samples"
"""Folder of the pictures inside a run."""

FEW_SEEDS = 8
"""Pictures of each diversity prompt in a validation on rendered pictures, which are larger than the digits."""

START = "start.safetensors"
LABEL = 48
"""Characters of a prompt that are written beside its pictures."""


@torch.no_grad()
def draw_pictures(
    backbone: Backbone,
    noise: Tensor,
    condition: Condition,
    *,
    num_inference_steps: int | None,
    times: Tensor | None = None,
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
                times=times,
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
        if trainer.processes.sharded:
            # What a forward without backward has left whole would hide what is written to the parts now.
            distributed.reshard(trainer.backbone)
        try:
            with trainer.average.applied() if trainer.average is not None else contextlib.nullcontext():
                try:
                    yield trainer.backbone
                finally:
                    if trainer.processes.sharded:
                        distributed.reshard(trainer.backbone)
        finally:
            for module, mode in modes:
                module.training = mode


def draw(
    trainer: Trainer,
    prompts: list[str],
    *,
    num_inference_steps: int | None,
    seed: int,
    noise: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Images of ``prompts`` from the averaged weights, as :func:`draw_pictures` returns them; noise depends on ``seed``
    and the count alone.

    Args:
        noise: ``[N, C, h, w]``, in place of ``seed``.
        options: of :func:`draw_pictures`.

    KeyError for a prompt that was not encoded before the run, where the text encoders are gone.
    """
    if noise is None:
        noise = torch.randn(len(prompts), *trainer.sample_shape, generator=torch.Generator().manual_seed(seed))
    with undisturbed(trainer):
        backbone, table = trainer.backbone, trainer.batches.table
        condition = backbone.encode(prompts) if backbone.text is not None or table is None else table(prompts)
        return draw_pictures(backbone, noise, condition, num_inference_steps=num_inference_steps, **options)


# ---- the pictures of a validation


def noises(shape: Sequence[int], count: int) -> Tensor:
    """Noise ``[count, *shape]``: number k is what a stock pipeline draws for one picture from a generator of the CPU
    with the seed VALIDATION_SEED + k, so that every picture of a validation can be drawn again with what a run
    exports."""
    return torch.cat(
        [torch.randn(1, *shape, generator=torch.Generator().manual_seed(VALIDATION_SEED + k)) for k in range(count)]
    )


def draw_prompts(trainer: Trainer, num_inference_steps: int | None, **options: Any) -> Tensor:
    """Images ``[prompts * images of each, C, H, W]`` of the validation prompts, the same noises for each."""
    config = trainer.config
    count = config.validation_images_per_prompt
    prompts = [prompt for prompt in config.validation_prompts for _ in range(count)]
    noise = noises(trainer.sample_shape, count).repeat(len(config.validation_prompts), 1, 1, 1)
    return draw(trainer, prompts, num_inference_steps=num_inference_steps, seed=0, noise=noise, **options)


def draw_start(trainer: Trainer) -> None:
    """Draws the validation prompts in many steps with the model as the run finds it, guided as its real branch is, at
    the times of the model's own pipeline (even ones for a model that came without a scheduler), into
    ``samples/start.safetensors``: what one step is measured by. It has to be called before the first step.

    Raises:
        ValueError: a scheduler whose times cannot be taken.
    """
    config, guidance, backbone = trainer.config, trainer.guidance, trainer.backbone
    steps: int | None = config.validation_base_inference_steps
    assert steps is not None and trainer.step == 0
    options: dict[str, Any] = {}
    if backbone.components.get("scheduler") is not None:
        options["times"] = pipeline_times(backbone, steps, *trainer.picture_size)
        steps = None
    if guidance is not None:
        options |= {
            "guidance_scale": guidance.objective_scale,
            "negative_condition": trainer.negative,
            "guide": guidance.guide,
        }
    images = draw_prompts(trainer, steps, **options)
    if not trainer.is_main:
        return
    pixels = images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    folder = trainer.output_dir / SAMPLES
    folder.mkdir(exist_ok=True)
    temporary = folder / f"{START}.new"
    save_file({"images": pixels.contiguous()}, temporary, metadata={"asked": _asked(trainer)})
    temporary.replace(folder / START)


def read_start(trainer: Trainer) -> Tensor | None:
    """What :func:`draw_start` has drawn, as it was drawn for these prompts and this size; else None."""
    path = trainer.output_dir / SAMPLES / START
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("asked") != _asked(trainer):
                return None
            return file.get_tensor("images").float().div(127.5).sub(1)
    except (OSError, SafetensorError):
        return None


def _asked(trainer: Trainer) -> str:
    config = trainer.config
    asked = [config.validation_prompts, config.validation_images_per_prompt, config.validation_base_inference_steps]
    return json.dumps([*asked, list(trainer.sample_shape)])


def validate(trainer: Trainer, board: Board | None = None) -> dict[str, float]:
    """Draws the validation prompts to ``samples/``, in every number of steps that the config names and beside the
    start's own pictures, and scores the network in the first of these numbers if the config says so."""
    config = trainer.config
    if config.validation_prompts:
        columns = [(_steps(steps), square(draw_prompts(trainer, steps))) for steps in config.inference_steps]
        if trainer.is_main:
            _write_grid(trainer, columns, board)
    return score(trainer, config.inference_steps[0]) if config.validation_metrics else {}


def _write_grid(trainer: Trainer, columns: list[tuple[str, Tensor]], board: Board | None) -> None:
    config = trainer.config
    many = config.validation_base_inference_steps
    if many is not None and (start := read_start(trainer)) is not None:
        columns = [*columns, (f"the start, {_steps(many)}", square(start))]
    picture = _grid(config.validation_prompts, columns, f"Step {trainer.step}")
    folder = trainer.output_dir / SAMPLES
    folder.mkdir(exist_ok=True)
    picture.save(folder / f"step-{trainer.step:06d}.png")
    if board is not None:
        board.image(trainer.step, SAMPLES, np.asarray(picture))


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


def _grid(prompts: list[str], columns: list[tuple[str, Tensor]], title: str) -> Any:
    """One row for each prompt, one block of pictures for each (heading, images) of ``columns``."""
    from apex_fast.evaluation.report import Row, sample_picture

    count = len(columns[0][1]) // len(prompts)
    rows = []
    for i, prompt in enumerate(prompts):
        shown = prompt if len(prompt) <= LABEL else prompt[: LABEL - 3] + "..."
        part = slice(i * count, (i + 1) * count)
        rows.append(Row(f'"{shown}"', "", torch.cat([images[part] for _, images in columns])))
    tile = 80 if columns[0][1].shape[-1] <= SMALL else 256
    headings = [heading for heading, _ in columns]
    return sample_picture(rows, headings, per_column=count, title=title, tile=tile)


def score(trainer: Trainer, num_inference_steps: int, **options: Any) -> dict[str, float]:
    """Frechet distance, accuracy, precision, recall and diversity of the averaged weights on the benchmark of the run's
    data set (:func:`apex_fast.evaluation.benchmark.evaluate`, whose arguments ``options`` are)."""
    from apex_fast.evaluation.benchmark import DIVERSITY_SEEDS, evaluate, open_benchmark

    config = trainer.config
    edge = None if config.image_size is None else config.image_size[0]
    few = config.dataset_name != DIGITS
    asked = {"samples": config.scored_samples, "diversity_seeds": FEW_SEEDS if few else DIVERSITY_SEEDS, **options}
    with undisturbed(trainer) as network:
        # In here: a network that scores draws its first weights before it reads its own.
        benchmark = open_benchmark(config.dataset_name, edge)
        scores = evaluate(network, benchmark, num_inference_steps=num_inference_steps, cost=False, **asked)
    return {name: value for name, value in scores.items() if isinstance(value, float)}


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
