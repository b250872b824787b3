"""What families share between image and network: 2 x 2 packing into tokens, and the scale of AutoencoderKL latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """``[B, C, h, w]`` to tokens of 2 x 2 patches ``[B, h w / 4, 4 C]``, rows first, channels slowest in a token."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack` for latents of ``height`` x ``width``."""
    b, _, c = tokens.shape
    grid = tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, height, width)


def encode_kl(vae: Any, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """A sample of an AutoencoderKL's latents, ``(z - config.shift_factor) config.scaling_factor``."""
    sample = vae.encode(images).latent_dist.sample(generator)
    return (sample - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode_kl(vae: Any, latents: Tensor) -> Tensor:
    """Images of latents in the scale of :func:`encode_kl`."""
    unscaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(unscaled, return_dict=False)[0]
