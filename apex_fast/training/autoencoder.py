"""Small VAEs for the pictures that the project renders: ``python -m apex_fast.training.autoencoder --output FOLDER``.

In pixels a small network spends itself on carrying noise: a patch of 8 x 8 pixels has 192 numbers, as many as the
network has channels. In the latents of a VAE that is fitted once (the class that the family's stock pipeline decodes
with) a patch has a few dozen, most of them about the picture, so the same network learns from fewer pictures, and what
comes out is decoded by the unmodified pipeline.

The loss is the mean absolute error in pixels, plus for AutoencoderKLQwenImage the Kullback-Leibler divergence of its
latents to a standard normal, and for the deterministic AutoencoderDC noise on the latents (15 % of their spread) and a
small pull towards zero, which serve the same end: what is near a latent decodes to nearly the same picture. Neither has
a perceptual or an adversarial loss, which the pictures, flat shapes and drawings, do not need. Afterwards the scale of
the latents is measured and written into the config (``scaling_factor``, or ``latents_mean`` and ``latents_std``), so
that the latents that the network reads have a spread of one.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apex_fast.data.shipped import SHIPPED, load_shipped
from apex_fast.extras import require

FAMILIES = ("sana", "qwen_image")
DOWN = 4
"""Pixels per latent pixel in each direction."""
LATENT_NOISE = 0.15
LATENT_WEIGHT = 1e-3
KL_WEIGHT = 1e-5
"""Per latent value and pixel value, as both terms are means."""


def new_vae(family: str, latent_channels: int = 8) -> nn.Module:
    """An untrained VAE of about 0.4 M parameters, with ``DOWN`` pixels per latent pixel.

    Raises:
        ValueError: another family than those in ``FAMILIES``.
    """
    diffusers = require("diffusers", extra="train")
    if family == "sana":
        sides = {
            f"{side}_{name}": value
            for side in ("encoder", "decoder")
            for name, value in (
                ("block_types", "ResBlock"),
                ("block_out_channels", (24, 48, 64)),
                ("layers_per_block", (1, 1, 1)),
                ("qkv_multiscales", ((), (), ())),
            )
        }
        return diffusers.AutoencoderDC(
            in_channels=3, latent_channels=latent_channels, attention_head_dim=8, scaling_factor=1.0, **sides
        )
    if family == "qwen_image":
        return diffusers.AutoencoderKLQwenImage(
            base_dim=16,
            z_dim=latent_channels,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, False],
            latents_mean=[0.0] * latent_channels,
            latents_std=[1.0] * latent_channels,
        )
    raise ValueError(f"new_vae: family must be one of {', '.join(FAMILIES)}, got {family!r}")


def _encode(vae: nn.Module, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents to decode, and what keeps them in bounds."""
    model: Any = vae
    if type(vae).__name__ == "AutoencoderDC":
        latents = model.encode(images).latent
        noise = torch.randn(latents.shape, generator=generator)
        return latents + LATENT_NOISE * latents.detach().std() * noise, LATENT_WEIGHT * latents.square().mean()
    posterior = model.encode(images.unsqueeze(2)).latent_dist
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return posterior.sample(generator), KL_WEIGHT * divergence


def _decode(vae: nn.Module, latents: Tensor) -> Tensor:
    decoded = vae.decode(latents).sample  # type: ignore[operator]
    return decoded if decoded.dim() == 4 else decoded.squeeze(2)


def train_vae(
    images: Tensor, family: str, *, steps: int, batch_size: int = 32, learning_rate: float = 2e-3, seed: int = 0
) -> tuple[nn.Module, dict[str, float]]:
    """A VAE fitted to ``images`` ``[N, 3, H, W]`` in [-1, 1], its latents scaled to a spread of one.

    The global random state is left as it was, except for dropout, which these VAEs do not have.

    Returns the VAE, frozen, and ``absolute_error`` and ``squared_error`` per value on the last 500 pictures (fewer if
    there are fewer), which are trained on too.

    Raises:
        ValueError: an unknown family, pictures that ``DOWN`` does not divide, or no step.
    """
    if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % DOWN or images.shape[3] % DOWN:
        raise ValueError(
            f"train_vae: expected images [N, 3, H, W] with H and W multiples of {DOWN}, got {list(images.shape)}"
        )
    if steps < 1 or batch_size < 1:
        raise ValueError(f"train_vae: at least one step and one picture are needed, got {steps} and {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = new_vae(family)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, weight_decay=0.01)
    rise = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / rise) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    began = time.perf_counter()
    for step in range(steps):
        chosen = images[torch.randint(len(images), (batch_size,), generator=generator)]
        latents, bound = _encode(vae, chosen, generator)
        error = (_decode(vae, latents) - chosen).abs().mean()
        optimizer.zero_grad(set_to_none=True)
        (error + bound).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(steps // 20, 1) == 0:
            print(f"{step + 1}/{steps} | absolute error {error.item():.4f} | {time.perf_counter() - began:.0f} s")
    vae.requires_grad_(False).eval()
    return vae, _set_scale(vae, images[-500:], generator)


@torch.no_grad()
def _set_scale(vae: nn.Module, images: Tensor, generator: torch.Generator) -> dict[str, float]:
    model: Any = vae
    latents, errors = [], []
    for part in images.split(100):
        if type(vae).__name__ == "AutoencoderDC":
            latents.append(model.encode(part).latent)
        else:
            latents.append(model.encode(part.unsqueeze(2)).latent_dist.sample(generator))
        errors.append(_decode(vae, latents[-1]) - part)
    found, error = torch.cat(latents), torch.cat(errors)
    if type(vae).__name__ == "AutoencoderDC":
        model.register_to_config(scaling_factor=1.0 / found.std().item())
    else:
        channels = found.transpose(0, 1).flatten(1)
        model.register_to_config(latents_mean=channels.mean(1).tolist(), latents_std=channels.std(1).tolist())
    return {"absolute_error": error.abs().mean().item(), "squared_error": error.square().mean().item()}


def main(arguments: list[str] | None = None) -> None:
    """Fits a small VAE and writes it as diffusers does."""
    rendered = [name for name, offered in SHIPPED.items() if offered.channels == 3]
    parser = argparse.ArgumentParser(prog="python -m apex_fast.training.autoencoder", description=main.__doc__)
    parser.add_argument("--dataset", choices=rendered, default=rendered[0])
    parser.add_argument("--resolution", type=int, help="edge of the pictures in pixels (default: the data set's first)")
    parser.add_argument("--family", choices=FAMILIES, default=FAMILIES[0], help="whose pipeline is to decode with it")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    chosen = parser.parse_args(arguments)
    if chosen.steps < 1 or chosen.batch_size < 1:
        parser.error(f"--steps and --batch-size must be at least 1, got {chosen.steps} and {chosen.batch_size}")
    if chosen.resolution not in (None, *SHIPPED[chosen.dataset].resolutions):
        offered = " or ".join(map(str, SHIPPED[chosen.dataset].resolutions))
        parser.error(f"--resolution: {chosen.dataset} has pictures of {offered} pixels, got {chosen.resolution}")
    data = load_shipped(chosen.dataset, resolution=chosen.resolution)
    images = data.images(torch.arange(len(data)))
    began = time.perf_counter()
    vae, errors = train_vae(images, chosen.family, steps=chosen.steps, batch_size=chosen.batch_size, seed=chosen.seed)
    vae.save_pretrained(chosen.output, safe_serialization=True)  # type: ignore[operator]
    facts = {**errors, "seconds": time.perf_counter() - began, "steps": chosen.steps, "dataset": chosen.dataset}
    (chosen.output / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"{chosen.output}: absolute error {errors['absolute_error']:.4f} of pictures in [-1, 1]")


if __name__ == "__main__":
    main()
