"""Pictures from prompts with what a run left behind: the work of ``apex-fast generate`` and ``apex-fast eval``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apex_fast.sampler import sample
from apex_fast.training.models import device_of, load_generator


def generate(
    run: str | Path,
    prompts: Sequence[str],
    *,
    images_per_prompt: int = 4,
    num_inference_steps: int = 1,
    guidance_scale: float = 1.0,
    negative_prompt: str = "",
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, str]:
    """Images ``[len(prompts) * images_per_prompt, C, H, W]`` in [-1, 1] on the CPU, prompt by prompt, and a phrase
    naming the model.

    run: see :func:`apex_fast.training.models.load_generator`, whose errors this raises. The noise of an image depends
    on ``seed`` and its place alone. Raises ValueError for counts below 1 and for a device that is not there.
    """
    for name, value in (("images_per_prompt", images_per_prompt), ("num_inference_steps", num_inference_steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not prompts:
        raise ValueError("at least one prompt is needed")
    device = device_of(str(device))
    network, which = load_generator(run)
    network = network.to(device)
    texts = [p for p in prompts for _ in range(images_per_prompt)]
    noise = torch.randn(len(texts), *network.sample_shape, generator=torch.Generator().manual_seed(seed)).to(device)
    with torch.no_grad():
        negative = network.encode([negative_prompt]) if guidance_scale != 1.0 else None
        images = sample(
            network,
            noise,
            network.encode(texts),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_condition=negative,
        )
    return images.float().cpu(), which


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


def write_picture(images: Tensor, prompts: Sequence[str], path: Path, *, size: int = 256) -> Path:
    """One PNG: a single image as it is, several as a grid with one row a prompt. Folders are made. Returns the path."""
    from apex_fast.evaluation.report import Row, grid_picture, pixels, sample_picture
    from apex_fast.extras import require

    path.parent.mkdir(parents=True, exist_ok=True)
    per_prompt = len(images) // len(prompts)
    if len(images) == 1:
        require("PIL.Image", extra="train").fromarray(pixels(images[0], size)).save(path)
    elif len(prompts) == 1:
        grid_picture(images, tile=min(size, 160), across=min(per_prompt, 8)).save(path)
    else:
        rows = [Row(f'"{p}"', "", images[i * per_prompt : (i + 1) * per_prompt]) for i, p in enumerate(prompts)]
        sample_picture(
            rows, [""], per_column=per_prompt, title="", tile=min(size, 112), across=min(per_prompt, 8)
        ).save(path)
    return path


def evaluate_run(
    run: str | Path, steps: Sequence[int], *, samples: int = 600, seed: int = 0, guidance_scale: float = 1.0
) -> dict[str, Any]:
    """Scores of a run at each number of steps and of real data, as written to JSON:
    ``{"model": ..., "scores": {"1": {...}}, "floor": {...}, "samples": 600, "seed": 0}``."""
    from apex_fast.evaluation.digits import digit_floor, evaluate_digits

    network, which = load_generator(run)
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
