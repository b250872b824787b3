"""What the demo shows of the models that ship: a start in many guided steps beside the one-step generator that was made
from it, drawn from the same noise, and the generator once more by the stock pipeline of diffusers.

Nothing is trained here; the pictures and the table say so. The stock pipeline gets embeddings in place of prompts,
since the text encoder of these models is not the one that SANA's pipeline reads, and is otherwise untouched: what it
draws has to be what :func:`apex_fast.sample` draws.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apex_fast.backbones.base import Backbone
from apex_fast.condition import Condition
from apex_fast.data.shapes import parse
from apex_fast.evaluation import report
from apex_fast.export.schedulers import call_arguments, scheduler
from apex_fast.sampler import sample
from apex_fast.shipped import TO_TRY
from apex_fast.training.models import load_generator

SEED = 11
HEAD_WIDTH = 22
"""Letters in a line over a column of the picture."""


@dataclass(frozen=True)
class Shown:
    """A one-step generator that ships and the start that it was made from, by their names, and what to draw.

    guidance_scale: of the start; one step is drawn without.
    """

    generator: str = "shapes_one_step"
    start: str = "shapes_start"
    prompts: tuple[str, ...] = (
        "a red circle",
        "three blue squares",
        "a red circle left of a blue square",
        "a green triangle and a purple square",
        "four cyan circles",
        "a square above a triangle",
    )
    seeds: int = 4
    guidance_scale: float = 2.0
    num_inference_steps: int = 50


@dataclass(frozen=True)
class Look:
    """What :func:`look` found.

    many, one: ``[prompts * seeds, 3, H, W]`` in [-1, 1], by the start and by the generator. seconds_many, seconds_one:
    for one picture of a batch of ``seeds``, from prompt to pixels. difference: the largest between a picture of the
    stock pipeline and the same one of :func:`apex_fast.sample`, in levels of 255.
    """

    many: Tensor
    one: Tensor
    seconds_many: float
    seconds_one: float
    difference: float


def look(shown: Shown) -> Look:
    """Draws everything. FileNotFoundError where the installation lacks a model."""
    start, generator = load_generator(shown.start)[0], load_generator(shown.generator)[0]
    count = len(shown.prompts) * shown.seeds
    noise = torch.randn(count, *start.sample_shape, generator=torch.Generator().manual_seed(SEED))
    many, seconds_many = _draw(start, shown, noise, shown.num_inference_steps, shown.guidance_scale)
    one, seconds_one = _draw(generator, shown, noise, 1, 1.0)
    condition = generator.encode([prompt for prompt in shown.prompts for _ in range(shown.seeds)])
    stock = stock_pictures(generator, noise, condition)
    difference = (stock - (one / 2 + 0.5).clamp(0, 1)).abs().max().item() * 255
    return Look(many, one, seconds_many, seconds_one, difference)


@torch.no_grad()
def _draw(
    network: Backbone, shown: Shown, noise: Tensor, num_inference_steps: int, guidance_scale: float
) -> tuple[Tensor, float]:
    """The pictures, and seconds for each of them."""
    pictures, seconds = [], []
    # The first prompt once more at the beginning: what is slow only once must not count.
    for k, prompt in ((0, shown.prompts[0]), *enumerate(shown.prompts)):
        part = noise[k * shown.seeds : (k + 1) * shown.seeds]
        begun = time.perf_counter()
        guided: dict[str, Any] = {}
        if guidance_scale != 1.0:
            guided = {"guidance_scale": guidance_scale, "negative_condition": network.encode([""], negative=True)}
        condition = network.encode([prompt]).index([0] * shown.seeds)  # one prompt is read once
        latents = sample(network, part, condition, num_inference_steps=num_inference_steps, **guided)
        pictures.append(network.decode(latents))
        seconds.append((time.perf_counter() - begun) / shown.seeds)
    return torch.cat(pictures[1:]), sum(seconds[1:]) / len(shown.prompts)


@torch.no_grad()
def stock_pictures(network: Backbone, noise: Tensor, condition: Condition) -> Tensor:
    """One step of SANA's stock pipeline from ``noise`` and embeddings: ``[N, 3, H, W]`` in [0, 1]."""
    pipeline = network.pipeline()
    pipeline.scheduler = scheduler()
    pipeline.set_progress_bar_config(disable=True)
    edge = noise.shape[-1] * network.vae_scale_factor
    return pipeline(
        prompt_embeds=condition.prompt_embeds,
        prompt_attention_mask=condition.prompt_embeds_mask,
        latents=noise,
        height=edge,
        width=edge,
        num_inference_steps=1,
        output_type="pt",
        **call_arguments(network.family),
    ).images


def model_to_try(prompts: Sequence[str]) -> str:
    """What ``apex-fast generate demo`` draws with: the generator that the demo shows.

    prompts: to be drawn.

    Raises:
        ValueError: a prompt of words that it was not trained on, or a folder ``demo`` in the current one, which may be
            what was meant.
    """
    if Path(TO_TRY).is_dir():
        raise ValueError(
            f"{TO_TRY} is both a folder here and the name of what ships; write ./{TO_TRY} for the folder, or "
            f"{Shown.generator}"
        )
    for prompt in prompts:
        parse(prompt)
    return Shown.generator


def picture_of(look: Look, shown: Shown) -> Any:
    """The start over the one-step generator, a column for each prompt."""
    rows = [
        report.Row(
            f"start, {shown.num_inference_steps} steps",
            f"shipped · guided {shown.guidance_scale:g} · {1e3 * look.seconds_many:.0f} ms a picture",
            look.many,
        ),
        report.Row("one step", f"shipped · {1e3 * look.seconds_one:.1f} ms a picture", look.one, emphasis=True),
    ]
    return report.sample_picture(
        rows,
        [textwrap.fill(prompt, HEAD_WIDTH) for prompt in shown.prompts],
        per_column=shown.seeds,
        title="What ships",
        subtitle="Not trained just now. The same noise in both rows.",
        tile=72,
    )


def told(look: Look, shown: Shown) -> Sequence[str]:
    """Lines for the console and the page."""
    ratio = look.seconds_many / look.seconds_one
    return (
        f"{shown.generator}, shipped: {1e3 * look.seconds_one:.1f} ms a picture in one step, its start "
        f"{1e3 * look.seconds_many:.0f} ms in {shown.num_inference_steps} guided ones, from prompt to pixels "
        f"on the CPU: {ratio:.0f} times as fast",
        f"the stock pipeline of diffusers draws the same: at most {look.difference:.2g} of 255 levels off",
    )
