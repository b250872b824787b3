"""What the backbone tests share: one tiny pipeline per family, saved and loaded as a user's model is, and the stock
pipeline run from given latents at given sigmas.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'apex_fast[train]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'apex_fast[train]'")

from apex_fast.backbones.base import Backbone  # noqa: E402
from apex_fast.backbones.tiny import save_tiny_pipeline  # noqa: E402
from apex_fast.condition import Condition  # noqa: E402

# Long enough for the whole of both prompts and for padding after them; Lumina's holds its system prompt too.
LENGTHS = {"sana": 24, "qwen_image": 24, "flux": 16, "z_image": 24, "stable_diffusion_3": 16, "lumina2": 48}
PROMPTS = ["a photo of a red cat on a wooden chair", "two birds"]
NEGATIVE = "an old map"
HEIGHT, WIDTH = 32, 64


_LOADED: dict[str, Backbone] = {}


def load_tiny(family: str, folders: pytest.TempPathFactory) -> Backbone:
    """The tiny model of a family, built once; shared by all tests, so a test that changes it takes a copy."""
    if family not in _LOADED:
        folder = folders.mktemp("models") / family
        save_tiny_pipeline(family, folder)
        _LOADED[family] = Backbone.from_pretrained(folder, max_sequence_length=LENGTHS[family])
        _LOADED[family].folder = folder
    return _LOADED[family]


def draw(backbone: Backbone, batch: int = 2, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *backbone.latent_shape(height, width), generator=generator)


def run_pipeline(backbone: Backbone, latents: Tensor, sigmas: list[float], output_type: str = "latent", **settings):
    """What the stock pipeline makes of ``latents`` with the plain Euler scheduler, and the sigmas that it used."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline = backbone.pipeline()
    # The families' own schedulers move the sigmas; the networks are what is compared here.
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline.set_progress_bar_config(disable=True)
    batch, channels, height, width = latents.shape
    packed = hasattr(pipeline, "_pack_latents")
    if packed:
        latents = pipeline._pack_latents(latents, batch, channels, height, width)
    if backbone.family == "sana":
        settings["use_resolution_binning"] = False
    size = {"height": height * backbone.vae_scale_factor, "width": width * backbone.vae_scale_factor}
    result = pipeline(
        prompt=list(PROMPTS),
        latents=latents.clone(),
        sigmas=list(sigmas),
        max_sequence_length=backbone.max_sequence_length,
        output_type=output_type,
        **size,
        **settings,
    ).images
    if packed and output_type == "latent":
        result = pipeline._unpack_latents(result, size["height"], size["width"], backbone.vae_scale_factor)
        result = result.reshape(batch, channels, height, width)
    return result, pipeline.scheduler.sigmas.double()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Equal to rounding, relative to the largest value."""
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


def with_embeds(condition: Condition, embeds: Tensor) -> Condition:
    return Condition(embeds, condition.prompt_embeds_mask, condition.pooled_prompt_embeds)


def count_hooks(module: torch.nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)
