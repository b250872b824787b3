"""Everything that is encoded once, before the first step: pictures by the VAE, prompts by the text encoders, which are
then dropped.

Either into memory, by :func:`encode_data` in the run itself, or into files that many processes write together
(:mod:`apex_fast.caching`). Both make the same calls, so that both give the same bits: captions are encoded in groups of
``PROMPTS_AT_ONCE`` in the order of the data, the other prompts of a run one by one, and a picture's latents are drawn
with a generator of their own, whose seed is made of the run's and of the picture's index.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apex_fast.backbones.base import Backbone
from apex_fast.command import command_name
from apex_fast.condition import Condition, condition_tensors
from apex_fast.data.pictures import picture_tensor
from apex_fast.data.prompts import PromptFile
from apex_fast.data.shipped import load_shipped
from apex_fast.data.source import BROKEN, BrokenPictureError, Sample, Source, open_source
from apex_fast.training.batches import PromptTable, Samples, TextImages, TextTable
from apex_fast.training.buckets import buckets_for
from apex_fast.training.config import TrainConfig
from apex_fast.training.guidance import RealGuidance
from apex_fast.training.memory import release
from apex_fast.training.settings import SettingsError

if TYPE_CHECKING:
    from apex_fast.caching.reading import Cache

PICTURES_AT_ONCE = 100
"""Small pictures that are encoded together."""
PROMPTS_AT_ONCE = 8
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

    data: Samples
    table: TextTable | None = None
    negative: Condition | None = None
    warnings: list[str] = field(default_factory=list)


class PromptSamples:
    """Prompts without pictures, for runs whose samples are drawn in the step: images are zeros of ``shape``."""

    def __init__(self, prompts: list[str], shape: tuple[int, ...]) -> None:
        self.vocabulary: list[str] | None = prompts
        self.shape = shape
        self.buckets = [torch.arange(len(prompts))]
        self.bytes = 0

    def __len__(self) -> int:
        return len(self.vocabulary or [])

    def images(self, chosen: Tensor) -> Tensor:
        """Zeros ``[len(chosen), C, h, w]``."""
        return torch.zeros(len(chosen), *self.shape)

    def prompts(self, chosen: Tensor, generator: torch.Generator) -> list[str]:
        """See :class:`~apex_fast.training.batches.Samples`."""
        assert self.vocabulary is not None
        return [self.vocabulary[i] for i in chosen.tolist()]


def open_data(config: TrainConfig) -> TextImages | Source:
    """The data set of a run, before a model is there to encode it; mistakes in it are found at once.

    Raises:
        FileNotFoundError, SettingsError: no such data, or nothing in it that can be used.
        ImportError: the package that reads it is missing.
    """
    try:
        if config.ships_data:
            edge = None if config.resolution is None else config.image_size[0]
            return load_shipped(config.dataset_name, resolution=edge, count=config.max_train_samples)
        return open_source(config) if config.prompts is None else PromptFile.open(config.prompts)
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise SettingsError(str(error)) from error


def data_digest(source: TextImages | Source) -> dict[str, Any] | None:
    """What tells later whether a source still lists the same pictures and captions; None for data that ships."""
    return source.digest() if isinstance(source, Source) else None


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


SizeOf = Callable[[int, int], tuple[int, int]]
"""(height, width) that a picture of (width, height) is brought to."""


def size_rule(config: TrainConfig, backbone: Backbone) -> SizeOf:
    """What decides the size that each picture is brought to: the run's one size, or its buckets.

    Raises:
        SettingsError: sizes that the model cannot make.
    """
    return buckets_for(config, picture_size(config, backbone), backbone.size_multiple).of


# ---- one thing at a time


def encode_text(backbone: Backbone, prompts: Sequence[str], *, negative: bool = False) -> Condition:
    """The condition of many prompts, a few at a time; embeddings on the CPU."""
    parts = [
        backbone.encode(list(prompts[i : i + PROMPTS_AT_ONCE]), negative=negative).to("cpu")
        for i in range(0, len(prompts), PROMPTS_AT_ONCE)
    ]
    return parts[0] if len(parts) == 1 else Condition.cat(parts)


def encode_prompts(backbone: Backbone, captions: Sequence[str], extra: Sequence[str]) -> Condition:
    """The condition of ``captions``, in groups, and of ``extra``, each alone; on the CPU."""
    return Condition.cat(
        [*([encode_text(backbone, captions)] if captions else []), *(encode_text(backbone, [one]) for one in extra)]
    )


def extra_prompts(config: TrainConfig, captions: Sequence[str]) -> list[str]:
    """What a run needs beside its captions: the validation prompts, and the empty one where captions are dropped."""
    known = set(captions)
    wanted = [*config.validation_prompts, *([""] if config.proportion_empty_prompts > 0 else [])]
    return [prompt for prompt in dict.fromkeys(wanted) if prompt not in known]


def sample_generator(seed: int, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for the sample ``index`` alone, so that neither the order of samples nor what was left out before
    it changes what is drawn for it."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + index) % (1 << 63))


def encode_sample(backbone: Backbone, sample: Sample, size: SizeOf, seed: int, device: torch.device) -> Tensor:
    """Latents ``[C, h, w]`` of one sample in the dtype of the VAE, on the CPU. BrokenPictureError for a picture that
    cannot be read."""
    picture = sample.open()
    pixels = picture_tensor(picture, *size(*picture.size))[None]
    vae = backbone.components.get("vae")
    generator = None if vae is None else sample_generator(seed, sample.index, vae.device)
    return backbone.encode_images(pixels.to(device), generator)[0].cpu()


# ---- all of it, into memory


def encode_data(
    config: TrainConfig,
    backbone: Backbone,
    source: TextImages | Source | None,
    device: torch.device,
    guidance: RealGuidance | None,
    say: Callable[[str], None],
    *,
    cache: Cache | None = None,
) -> Encoded:
    """Encodes what can be encoded before the run, on ``device``, and drops the parts that did it: always the text
    encoders of a pipeline, and its VAE unless validation pictures are wanted.

    source: the data; None where a cache stands for it.
    cache: what is encoded already; ``backbone`` then needs neither text encoders nor VAE.

    Raises:
        SettingsError: data that this model cannot take, more of it than fits into memory, or a cache of something else.
    """
    if cache is not None:
        return cache.encoded(backbone, device, guidance, say)
    assert source is not None
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
    _check_loaded_text_encoders(config, backbone)
    captions = list(dict.fromkeys(source.captions if isinstance(source, Source) else source.vocabulary or []))
    extra = extra_prompts(config, captions)
    # One after the other, so that text encoders, VAE and transformer are never on the device together.
    move_parts(backbone, backbone.text_parts, device)
    _check_memory(config, backbone, source, [*captions, *extra])
    table = PromptTable(lambda _: encode_prompts(backbone, captions, extra), [*captions, *extra], device)
    negative = None
    if guidance is not None:
        negative = encode_text(backbone, [guidance.negative_prompt], negative=True).to(device)
    backbone.free_text_encoders()
    release()
    data, warnings = _samples(config, backbone, source, device, say)
    if not config.draws_pictures:
        backbone.free_vae()
        release()
    pictures = f"{len(data)} pictures to {size_text(data.bytes)} of latents and " if data.bytes else ""
    say(
        f"encoded {pictures}{len(captions) + len(extra)} prompts to {size_text(table.bytes)} of embeddings, kept in "
        "memory"
    )
    return Encoded(data, table, negative, warnings)


def check_text_encoders(config: TrainConfig, parameters: int, processes: int) -> None:
    """SettingsError if each of ``processes`` would load text encoders of more than ``max_uncached_text_parameters``."""
    limit = config.max_uncached_text_parameters
    if limit is not None and parameters > limit:
        raise SettingsError(
            f"max_uncached_text_parameters: each of {processes} processes would put text encoders of "
            f"{parameters / 1e9:.1f} billion parameters on its GPU to encode the same prompts, and the limit is "
            f"{limit / 1e9:g} billion; encode once, with as many processes as you like, and start the run again: "
            f"{command_name()} cache CONFIG (with the same config and keys); or write "
            "max_uncached_text_parameters: null"
        )


def _check_loaded_text_encoders(config: TrainConfig, backbone: Backbone) -> None:
    """:func:`check_text_encoders` for a model that was not on the disk when files were asked how large it is."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    parts = [backbone.components.get(name) for name in backbone.text_parts]
    count = sum(p.numel() for part in parts if isinstance(part, nn.Module) for p in part.parameters())
    if world > 1:
        check_text_encoders(config, count, world)


def _check_shape(config: TrainConfig, backbone: Backbone, source: TextImages | Source) -> None:
    channels, height, width = backbone.sample_shape
    factor = backbone.vae_scale_factor
    if factor > 1:
        channels = 3
    wanted = (channels, height * factor, width * factor)
    if isinstance(source, Source):
        # Before the text is encoded, which may take hours.
        size_rule(config, backbone)
        if backbone.text is None:
            # A size that the model cannot make is a mistake to be told before prompts are encoded for hours.
            size_rule(config, backbone)
            return
        shapes: list[tuple[int, ...]] = [(3, *picture_size(config, backbone))]
    else:
        shapes = source.shapes
    for found in shapes:
        if found[0] != wanted[0] or (config.ships_data and found != wanted):
            raise SettingsError(
                f"dataset_name: {config.dataset_name} gives samples of the shape {list(found)}, and this "
                f"{backbone.family} model takes {list(wanted)}"
            )


def _latents_of(backbone: Backbone, data: TextImages, seed: int) -> TextImages:
    """``data`` in the latents of a model that has a VAE; as it is for one in pixel space."""
    if backbone.vae_scale_factor == 1:
        return data
    everything = torch.arange(len(data))
    generator = torch.Generator().manual_seed(seed)
    latents = torch.cat(
        [
            backbone.encode_images(data.images(part), generator).float().cpu()
            for part in everything.split(PICTURES_AT_ONCE)
        ]
    )
    return TextImages(latents, data.prompts, data.vocabulary)


def _samples(
    config: TrainConfig,
    backbone: Backbone,
    source: TextImages | Source,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[TextImages | PromptSamples, list[str]]:
    """The samples in the space of the network, and what was left out."""
    if not isinstance(source, Source):
        return _latents_of(backbone, source, config.seed), []
    if isinstance(source, PromptFile):
        # Samples of the student are drawn in the step; those of the base come from a cache.
        return PromptSamples(source.captions, backbone.latent_shape(*picture_size(config, backbone))), []
    latents, kept = _encode_pictures(config, backbone, source, device, say)
    captions = [source.captions[i] for i in kept]
    same = all(one.shape == latents[0].shape for one in latents)
    data = TextImages(
        torch.stack(latents) if same else latents, lambda chosen, _: [captions[i] for i in chosen.tolist()], captions
    )
    return data, source.warnings()


def _encode_pictures(
    config: TrainConfig, backbone: Backbone, source: Source, device: torch.device, say: Callable[[str], None]
) -> tuple[list[Tensor], list[int]]:
    """Latents ``[C, h, w]`` fp32 on the CPU, and the indices of their samples: broken pictures are left out."""
    move_parts(backbone, ("vae",), device)
    size = size_rule(config, backbone)
    latents: list[Tensor] = []
    kept: list[int] = []
    said = time.monotonic()
    try:
        for sample in source.samples():
            try:
                latents.append(encode_sample(backbone, sample, size, config.seed, device).float())
                kept.append(sample.index)
            except BrokenPictureError:
                source.leave_out(BROKEN, sample.name)
            if time.monotonic() - said > _REPORT_SECONDS:
                say(f"encoding pictures: {sample.index + 1} of {len(source)}")
                said = time.monotonic()
        source.check_left(len(kept))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return latents, kept


def _check_memory(config: TrainConfig, backbone: Backbone, source: TextImages | Source, prompts: list[str]) -> None:
    """SettingsError, before hours of encoding, if latents and embeddings would take too much memory."""
    one = encode_text(backbone, prompts[:1])
    text = len(prompts) * sum(part.numel() * part.element_size() for part in condition_tensors(one))
    pictures = 0
    if isinstance(source, Source) and not isinstance(source, PromptFile):
        channels, height, width = backbone.latent_shape(*picture_size(config, backbone))
        pictures = len(source) * channels * height * width * 4
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if text + pictures > SHARE_OF_MEMORY * memory:
        raise SettingsError(
            f"dataset_name: {len(source)} pictures make {size_text(pictures)} of latents and {len(prompts)} prompts "
            f"about {size_text(text)} of embeddings, and at most half of this machine's {size_text(memory)} may go to "
            f"them; encode them into files first, from which the run reads what it needs: {command_name()} cache "
            "CONFIG. Or take fewer pictures, or a smaller resolution or max_sequence_length"
        )


def move_parts(backbone: Backbone, names: tuple[str, ...], device: torch.device) -> None:
    """Moves these components, and neither the transformer nor the others, to ``device``."""
    for name in names:
        part = backbone.components.get(name)
        if isinstance(part, nn.Module) and part.device != device:
            part.to(device)


def size_text(count: float) -> str:
    """Bytes for people: "1.5 GiB", "20.0 MiB"."""
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"
