"""What a GPU needs besides the step: encoding the data before the first one, and drawing validation pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apex_fast.lora import DTYPES
from apex_fast.planning.blueprint import Blueprint, vae_on_meta
from apex_fast.planning.memory import ACTIVATIONS, LiveBytes
from apex_fast.planning.meta import AcceleratorOnMeta
from apex_fast.planning.step import AVERAGE, FROZEN, GRADIENTS, TRAINED, StepBytes, cast_weights
from apex_fast.training.config import TrainConfig

PROMPTS, PICTURES, STEP, VALIDATION = "encoding prompts", "encoding pictures", "a step", "validation"
"""The stages of a run, in order. All have to fit, one at a time."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: one of the four.
        needed: bytes of a GPU, with what is added for the allocator and CUDA.
        activations: of it, what comes and goes; None if that is not counted.
    """

    name: str
    needed: int
    activations: int | None = None


def validates(config: TrainConfig) -> bool:
    """Whether the run draws pictures."""
    return config.draws_pictures


def dtype_bytes(config: TrainConfig) -> int:
    """Bytes of a number in text encoders and VAE, which have the dtype of the weights."""
    return DTYPES[config.weight_dtype].itemsize


def loaded_on_gpu(config: TrainConfig, step: StepBytes) -> int:
    """Bytes of the transformer on the GPU while the data is encoded.

    Loading leaves it in main memory until then, but bitsandbytes quantises on the GPU.
    """
    return round(step.held.get(FROZEN, 0.0)) if config.quantization == "nf4" else 0


def loaded_on_host(model: Blueprint, config: TrainConfig, step: StepBytes) -> int:
    """Bytes of main memory that loading needs: text encoders, VAE and, unless it is on the GPU already, transformer."""
    beside = (model.text_encoder_parameters + model.vae_parameters) * dtype_bytes(config)
    if config.quantization == "nf4":
        return beside
    base = step.held.get(FROZEN, 0.0) + (step.waiting_weights if config.mode == "lora" else 0.0)
    base += step.held.get(TRAINED, 0.0) if config.mode == "full" else 0.0
    return beside + round(base)


def held_while_drawing(step: StepBytes) -> int:
    """Bytes that live while validation draws: everything but gradients, and the trained weights once more where their
    average has taken their place."""
    own = step.held.get(TRAINED, 0.0) if AVERAGE in step.held else 0.0
    return round(sum(size for name, size in step.held.items() if name != GRADIENTS) + own)


def vae_activations(model: Blueprint, size: tuple[int, int] | None, dtype: str) -> tuple[int, int] | None:
    """Bytes that come and go while the VAE (encodes, decodes) one picture of ``size``; None for a VAE that is unknown.

    Weights are not part of it. The structure is run on the meta device and counted, as the step is.
    """
    if model.vae is None:
        return None
    key = (repr(model.vae), model.family, model.pixels(size), dtype)
    if key not in _COUNTED:
        _COUNTED[key] = _count(model, size, DTYPES[dtype])
    return _COUNTED[key]


_COUNTED: dict[tuple[str, str, tuple[int, int], str], tuple[int, int]] = {}


def _count(model: Blueprint, size: tuple[int, int] | None, dtype: torch.dtype) -> tuple[int, int]:
    # The transformer takes no part in this; one block of each kind makes a backbone.
    backbone = model.at_depth(tuple(min(n, 1) for n in model.depth())).backbone()
    assert model.vae is not None
    vae = vae_on_meta(model.vae)
    cast_weights(vae, dtype)
    backbone.components["vae"] = vae
    backbone.vae_scale_factor = model.vae_scale_factor
    shape = model.latent_shape(backbone, size)
    found = []
    for first, call in (((3, *model.pixels(size)), backbone.encode_images), (shape, backbone.decode)):
        with AcceleratorOnMeta(), LiveBytes() as counted:
            counted.hold([*vae.parameters(), *vae.buffers()], "weights")
            call(torch.empty(1, *first, device="meta"))
        found.append(counted.peak_by_category[ACTIVATIONS])
    return found[0], found[1]
