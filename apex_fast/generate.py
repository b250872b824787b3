"""Pictures from prompts with what a run left behind: the work of ``apex-fast generate`` and ``apex-fast eval``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apex_fast.backbones.base import Backbone
from apex_fast.training.config import DIGITS_START
from apex_fast.training.encoding import encode_text, move_parts
from apex_fast.training.guidance import combine
from apex_fast.training.memory import during, release
from apex_fast.training.models import device_of, load_generator
from apex_fast.training.results import Record, find_result
from apex_fast.training.settings import SettingsError
from apex_fast.training.validation import SMALL, draw_pictures, square


def generate(
    run: str | Path,
    prompts: Sequence[str],
    *,
    images_per_prompt: int = 4,
    num_inference_steps: int = 1,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    base: str | None = None,
) -> tuple[Tensor, str]:
    """Images ``[len(prompts) * images_per_prompt, C, H, W]`` in [-1, 1] on the CPU, prompt by prompt, and a phrase
    naming the model.

    Args:
        run, base: see :func:`apex_fast.training.models.load_generator`.
        guidance_scale: classifier-free guidance in the convention of the model's own pipeline; None is none, as a
            one-step generator is made to be used.
        negative_prompt: what guidance leads away from; None is the one of the model's pipeline, or "".
        height, width: in pixels; None is the size that the run trained at.
        seed: of the noise; that of an image depends on it and its place alone.
        device: "auto" (cuda if there is one, else the CPU) or a torch device. Text encoders and transformer are never
            on it together, and pictures are made one at a time.

    Raises:
        ValueError: counts below 1, a size that the model cannot make, a device that is not there.
        FileNotFoundError, CheckpointError: as ``load_generator``.
    """
    for name, value in (("images_per_prompt", images_per_prompt), ("num_inference_steps", num_inference_steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not prompts:
        raise ValueError("at least one prompt is needed")
    device = device_of(str(device))
    with during("loading the model"):
        network, which = load_generator(run, base=base)
    texts = [p for p in prompts for _ in range(images_per_prompt)]
    shape = _latent_shape(run, network, height, width)
    noise = torch.randn(len(texts), *shape, generator=torch.Generator().manual_seed(seed))
    scale, guide = (1.0, None) if guidance_scale is None else combine(network, guidance_scale)
    against = None
    if scale != 1.0 or guide is not None:
        against = network.teacher_guidance.negative_prompt or "" if negative_prompt is None else negative_prompt
    if network.text is not None:
        network.to(device)
        negative = None if against is None else network.encode([against], negative=True)
        condition = network.encode(texts)
    else:
        # The text encoders of a pipeline are large: each prompt once, and they are gone before the transformer comes.
        with during("encoding prompts"):
            move_parts(network, network.text_parts, device)
            negative = None if against is None else encode_text(network, [against], negative=True).to(device)
            once = encode_text(network, list(prompts))
        condition = once.index([i for i in range(len(prompts)) for _ in range(images_per_prompt)])
        network.free_text_encoders()
        release()
        with during(f"moving the transformer to {device}"):
            network.to(device)
    images = draw_pictures(
        network,
        noise,
        condition,
        num_inference_steps=num_inference_steps,
        guidance_scale=scale,
        negative_condition=negative,
        guide=guide,
    )
    return images, which


def _latent_shape(run: str | Path, network: Backbone, height: int | None, width: int | None) -> tuple[int, int, int]:
    if network.text is not None:
        if height is not None or width is not None:
            raise ValueError(
                f"height and width: this model makes pictures of {list(network.sample_shape[1:])} pixels only"
            )
        return network.sample_shape
    record = None if str(run) == DIGITS_START else Record.read(find_result(run).folder)
    own = network.sample_shape[1:]
    size = [edge * network.vae_scale_factor for edge in own]
    if record is not None and record.resolution is not None:
        size = record.resolution
    return network.latent_shape(height or size[0], width or size[1])


def picture_path(run: str | Path, prompt: str, num_inference_steps: int, seed: int) -> Path:
    """Where ``apex-fast generate`` writes when it is not told:
    ``RUN/generated/<prompt>-<steps>-steps-seed-<seed>.png``."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"
    folder = Path(run)
    base = folder if folder.is_dir() else Path(".")
    return (
        base
        / "generated"
        / f"{slug}-{num_inference_steps}-step{'s' if num_inference_steps > 1 else ''}-seed-{seed}.png"
    )


def write_picture(images: Tensor, prompts: Sequence[str], path: Path, *, size: int | None = None) -> Path:
    """One PNG: a single image as it is, several as a grid with one row a prompt. Folders are made. Returns the path.

    size: edge of a single picture and upper bound of a tile; None is 256 for small pictures and their own size for
        others.
    """
    from apex_fast.evaluation.report import Row, grid_picture, pixels, sample_picture
    from apex_fast.extras import require

    path.parent.mkdir(parents=True, exist_ok=True)
    per_prompt = len(images) // len(prompts)
    edge = max(images.shape[2:])
    small = edge <= SMALL
    size = (256 if small else edge) if size is None else size
    if len(images) == 1:
        picture = require("PIL.Image", extra="train").fromarray(pixels(square(images)[0], size))
        if images.shape[2] != images.shape[3]:
            picture = picture.crop(_content(images.shape[2], images.shape[3], size))
        picture.save(path)
        return path
    tiles = square(images)
    if len(prompts) == 1:
        grid_picture(tiles, tile=min(size, 160 if small else edge), across=min(per_prompt, 8)).save(path)
    else:
        rows = [Row(f'"{p}"', "", tiles[i * per_prompt : (i + 1) * per_prompt]) for i, p in enumerate(prompts)]
        sample_picture(
            rows,
            [""],
            per_column=per_prompt,
            title="",
            tile=min(size, 112 if small else 256),
            across=min(per_prompt, 8),
        ).save(path)
    return path


def _content(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """The box that a picture of ``height`` x ``width`` takes in its square of edge ``size``."""
    edge = max(height, width)
    tall, wide = round(size * height / edge), round(size * width / edge)
    left, top = (size - wide) // 2, (size - tall) // 2
    return left, top, left + wide, top + tall


def evaluate_run(
    run: str | Path, steps: Sequence[int], *, samples: int = 600, seed: int = 0, guidance_scale: float = 1.0
) -> dict[str, Any]:
    """Scores of a run at each number of steps and of real data, as written to JSON:
    ``{"model": ..., "scores": {"1": {...}}, "floor": {...}, "samples": 600, "seed": 0}``."""
    from apex_fast.evaluation.digits import digit_floor, evaluate_digits

    network, which = load_generator(run)
    digits = (1, 8, 8)
    if network.sample_shape != digits:
        raise SettingsError(f"eval scores digits, and {which} makes samples of the shape {list(network.sample_shape)}")
    scores = {
        str(n): evaluate_digits(
            network, num_inference_steps=n, samples=samples, seed=seed, guidance_scale=guidance_scale
        )
        for n in steps
    }
    return {
        "model": which,
        "scores": scores,
        "floor": digit_floor(samples=samples),
        "samples": samples,
        "seed": seed,
        "guidance_scale": guidance_scale,
    }


def evaluation_table(result: dict[str, Any]) -> str:
    """The result of :func:`evaluate_run` as aligned text."""
    from apex_fast.evaluation.report import text_table

    def row(name: str, values: dict[str, float]) -> list[str]:
        speed = f"{values['images_per_second']:,.0f}" if "images_per_second" in values else ""
        return [name, f"{values['frechet']:.3f}", f"{values['accuracy']:.3f}", f"{values['diversity']:.3f}", speed]

    rows = [row(f"{n} step{'s' if n != '1' else ''}", values) for n, values in result["scores"].items()]
    return text_table(
        ["", "Frechet distance", "prompt accuracy", "diversity", "images/s"],
        [*rows, row("real data (the floor)", result["floor"])],
    )


def write_evaluation(result: dict[str, Any], path: Path) -> Path:
    """Writes the result of :func:`evaluate_run` as JSON; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path
