"""Everything that is encoded once, before the first step: pictures by the VAE, prompts by the text encoders, which are
then dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apex_fast.backbones.base import Backbone
from apex_fast.condition import Condition, condition_tensors
from apex_fast.data.folder import BrokenPictureError, PictureFolder, read_picture
from apex_fast.training.batches import PromptTable, TextImages, load_digits
from apex_fast.training.config import DIGITS, TrainConfig
from apex_fast.training.guidance import RealGuidance
from apex_fast.training.memory import release
from apex_fast.training.settings import SettingsError

PROMPTS_AT_ONCE = 8
PICTURES_AT_ONCE = 1
SHARE_OF_MEMORY = 0.5
"""Share of the machine's memory that latents and embeddings may take."""
_REPORT_SECONDS = 10.0


@dataclass
class Encoded:
    """The data of a run, encoded as far as that can be done before.

    Attributes:
        data: samples in the space of the network, with their prompts.
        table: their embeddings and those of the validation prompts; None where a text encoder of the model's own
            encodes them along the way.
        negative: what the real branch is guided away from, batch 1.
        warnings: what was left out of the data.
    """

    data: TextImages
    table: PromptTable | None = None
    negative: Condition | None = None
    warnings: list[str] = field(default_factory=list)


def open_data(config: TrainConfig) -> TextImages | PictureFolder:
    """The data set of a run, before a model is there to encode it; mistakes in it are found at once.

    Raises:
        FileNotFoundError, SettingsError: no such folder, or nothing in it that can be used.
    """
    if config.dataset_name == DIGITS:
        return load_digits()
    try:
        return PictureFolder.open(config.dataset_name)
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise SettingsError(str(error)) from error


def data_digest(source: TextImages | PictureFolder) -> dict[str, Any] | None:
    """What tells later whether a folder still holds the same pictures and captions; None for data that ships.

    ``names`` are those of the files inside the folder: it may be moved.
    """
    if not isinstance(source, PictureFolder):
        return None
    names = [source.name(file) for file in source.files]
    digests = {
        key: hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        for key, texts in (("names", names), ("captions", source.captions))
    }
    return {"count": len(names), **digests}


def picture_size(config: TrainConfig, backbone: Backbone) -> tuple[int, int]:
    """(height, width) in pixels of the run's pictures. SettingsError for a size that the model cannot make."""
    if config.image_size is None:
        _, height, width = backbone.sample_shape
        return height * backbone.vae_scale_factor, width * backbone.vae_scale_factor
    try:
        backbone.latent_shape(*config.image_size)
    except ValueError as error:
        raise SettingsError(f"resolution: {error}") from error
    return config.image_size


def encode_text(backbone: Backbone, prompts: list[str], *, negative: bool = False) -> Condition:
    """The condition of many prompts, a few at a time; embeddings on the CPU."""
    parts = [
        backbone.encode(prompts[i : i + PROMPTS_AT_ONCE], negative=negative).to("cpu")
        for i in range(0, len(prompts), PROMPTS_AT_ONCE)
    ]
    return parts[0] if len(parts) == 1 else Condition.cat(parts)


def encode_data(
    config: TrainConfig,
    backbone: Backbone,
    source: TextImages | PictureFolder,
    device: torch.device,
    guidance: RealGuidance | None,
    say: Callable[[str], None],
) -> Encoded:
    """Encodes what can be encoded before the run, on ``device``, and drops the parts that did it: always the text
    encoders of a pipeline, and its VAE unless validation pictures are wanted.

    Raises:
        SettingsError: data that this model cannot take, or more of it than fits into memory.
    """
    _check_shape(config, backbone, source)
    if backbone.text is not None:
        # Its text encoder is small, may be trained along, and answers whenever it is asked.
        backbone.to(device)
        negative = None
        if guidance is not None:
            negative = backbone.encode([guidance.negative_prompt], negative=True).to(device)
        data, warnings = _samples(config, backbone, source, device, say)
        return Encoded(data, None, negative, warnings)

    if missing := [part for part in (*backbone.text_parts, "vae") if backbone.components.get(part) is None]:
        raise SettingsError(
            f"pretrained_model_name_or_path: {config.pretrained_model_name_or_path} has no {', '.join(missing)}, so "
            "prompts and pictures cannot be encoded; write the folder or hub id of the whole pipeline"
        )
    captions = source.captions if isinstance(source, PictureFolder) else source.vocabulary or []
    prompts = list(dict.fromkeys([*captions, *config.validation_prompts]))
    if config.proportion_empty_prompts > 0 and "" not in prompts:
        prompts.append("")
    # One after the other, so that text encoders, VAE and transformer are never on the device together.
    move_parts(backbone, backbone.text_parts, device)
    _check_memory(config, backbone, len(source), prompts)
    table = PromptTable(lambda texts: encode_text(backbone, texts), prompts, device)
    negative = None
    if guidance is not None:
        negative = encode_text(backbone, [guidance.negative_prompt], negative=True).to(device)
    backbone.free_text_encoders()
    release()
    data, warnings = _samples(config, backbone, source, device, say)
    if config.validation_steps is None or not config.validation_prompts:
        backbone.free_vae()
        release()
    say(
        f"encoded {len(data)} pictures to {_size(data.images.numel() * data.images.element_size())} of latents and "
        f"{len(prompts)} prompts to {_size(table.bytes)} of embeddings, kept in memory"
    )
    return Encoded(data, table, negative, warnings)


def _check_shape(config: TrainConfig, backbone: Backbone, source: TextImages | PictureFolder) -> None:
    if isinstance(source, PictureFolder):
        if backbone.text is None:
            return
        found: tuple[int, ...] = (3, *picture_size(config, backbone))
    else:
        found = tuple(source.images.shape[1:])
    wanted = backbone.sample_shape
    if found[0] != wanted[0] or (config.dataset_name == DIGITS and found != wanted):
        raise SettingsError(
            f"dataset_name: {config.dataset_name} gives samples of the shape {list(found)}, and this "
            f"{backbone.family} model takes {list(wanted)}"
        )


def _samples(
    config: TrainConfig,
    backbone: Backbone,
    source: TextImages | PictureFolder,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[TextImages, list[str]]:
    """The samples in the space of the network, and what was left out."""
    if not isinstance(source, PictureFolder):
        return source, []
    latents = _encode_pictures(config, backbone, source, device, say)
    captions = source.captions
    return TextImages(latents, lambda chosen, _: [captions[i] for i in chosen.tolist()], captions), source.warnings()


def _encode_pictures(
    config: TrainConfig, backbone: Backbone, source: PictureFolder, device: torch.device, say: Callable[[str], None]
) -> Tensor:
    """Latents ``[N, C, h, w]`` fp32 on the CPU; broken pictures are left out of ``source``."""
    height, width = picture_size(config, backbone)
    move_parts(backbone, ("vae",), device)
    vae = backbone.components.get("vae")
    generator = None if vae is None else torch.Generator(vae.device).manual_seed(config.seed)
    latents: list[Tensor] = []
    broken: list[int] = []
    waiting: list[Tensor] = []
    said = time.monotonic()

    def encode() -> None:
        if waiting:
            batch = torch.stack(waiting).to(device)
            waiting.clear()
            latents.append(backbone.encode_images(batch, generator).float().cpu())

    for index, file in enumerate(source.files):
        try:
            waiting.append(read_picture(file, height, width))
        except BrokenPictureError:
            broken.append(index)
        if len(waiting) == PICTURES_AT_ONCE:
            encode()
        if time.monotonic() - said > _REPORT_SECONDS:
            say(f"encoding pictures: {index + 1} of {len(source)}")
            said = time.monotonic()
    encode()
    try:
        source.drop(broken, "not a picture that can be read")
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return torch.cat(latents)


def _check_memory(config: TrainConfig, backbone: Backbone, count: int, prompts: list[str]) -> None:
    """SettingsError, before hours of encoding, if latents and embeddings would take too much memory."""
    one = encode_text(backbone, prompts[:1])
    text = len(prompts) * sum(part.numel() * part.element_size() for part in condition_tensors(one))
    channels, height, width = backbone.latent_shape(*picture_size(config, backbone))
    pictures = count * channels * height * width * 4
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if text + pictures > SHARE_OF_MEMORY * memory:
        raise SettingsError(
            f"dataset_name: {count} pictures make {_size(pictures)} of latents and {len(prompts)} prompts about "
            f"{_size(text)} of embeddings, and at most half of this machine's {_size(memory)} may go to them; take "
            "fewer pictures, or a smaller resolution or max_sequence_length"
        )


def move_parts(backbone: Backbone, names: tuple[str, ...], device: torch.device) -> None:
    """Moves these components, and neither the transformer nor the others, to ``device``."""
    for name in names:
        part = backbone.components.get(name)
        if isinstance(part, nn.Module) and part.device != device:
            part.to(device)


def _size(count: float) -> str:
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"
