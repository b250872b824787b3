"""Pictures from prompts with what a run left behind: the work of ``apex-fast generate``."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apex_fast.backbones.base import Backbone
from apex_fast.condition import Condition
from apex_fast.evaluation.layouts import Layout, LayoutName, Prompt, as_picture
from apex_fast.lora import WEIGHTS, load_lora, load_start_lora
from apex_fast.sampler import sample
from apex_fast.shipped import is_shipped, local_folder, shipped_folder
from apex_fast.training.encoding import encode_text, move_parts
from apex_fast.training.guidance import combine
from apex_fast.training.memory import during, release
from apex_fast.training.models import (
    device_of,
    fingerprint,
    is_hub_id,
    load_found,
    load_generator,
    load_pretrained,
    pretrained_source,
    start_lora_file,
)
from apex_fast.training.progress import Console
from apex_fast.training.results import (
    INDEX,
    TRANSFORMER,
    Found,
    Record,
    find_result,
    has_own_text,
    holds_model,
    load_weights,
)
from apex_fast.training.validation import SMALL, draw_pictures, square
from apex_fast.velocities import Guide


@dataclass(frozen=True)
class Generator:
    """A network to generate with, in eval mode.

    Attributes:
        network: on the CPU.
        phrase: which it is, in words.
        resolution: [height, width] in pixels that it was trained at, where that is known.
    """

    network: Backbone
    phrase: str
    resolution: list[int] | None = None


def open_generator(
    model: str | Path,
    *,
    lora: str | Path | None = None,
    base: str | None = None,
    weight_dtype: Literal["fp32", "bf16"] | None = None,
) -> Generator:
    """Loads what is to be generated with.

    Args:
        model: a run (see :func:`apex_fast.training.models.load_generator`) or what ``apex-fast export`` made of it, or
            with ``lora`` the model that the LoRA adapts; a diffusers folder or a hub id is taken without a LoRA too.
        lora: a ``.safetensors`` file, or a folder with ``pytorch_lora_weights.safetensors``: of a run, of its export,
            or of somebody else. What a run or an export noted beside its weights (precision, length of the text, the
            LoRA that it started from) is heeded.
        base: where the model that a run or an export belongs to is now, if it was moved.
        weight_dtype: of a pipeline; None is as noted with the LoRA or by the export, or fp32. A run says itself.

    Raises:
        ValueError: settings that do not go together, or a LoRA of another model.
        FileNotFoundError, CheckpointError, SettingsError: as ``load_generator``.
    """
    local = shipped_folder(model) if is_shipped(model) else None if is_hub_id(str(model)) else Path(model)
    if lora is None and local is not None and (facts := _exported(local)):
        return _open_export(local, facts, base, weight_dtype)
    if lora is None and local is not None and not _is_pipeline(local):
        if weight_dtype is not None:
            raise ValueError(
                "weight_dtype: a run or a saved model says itself how its weights are stored; leave it out"
            )
        network, phrase = load_generator(model, base=base)
        record = Record.read(find_result(model).folder)
        return Generator(network, phrase, None if record is None else record.resolution)
    if base is not None:
        raise ValueError(f"base: {model} is the base itself; leave --base out")
    file = None if lora is None else start_lora_file(str(lora), "lora")
    phrase = str(model) if file is None else f"{model} with the LoRA {file}"
    # Of a pipeline that export merged, the file of its transformer says what otherwise that of a LoRA does.
    facts = {} if local is None else _header_of(local / TRANSFORMER)
    noted = facts if file is None else _noted(file)
    if file is not None and isinstance(noted, Record):
        record = noted if weight_dtype is None else dataclasses.replace(noted, weight_dtype=weight_dtype)
        if str(model) != record.base:
            # A commit of one repository is none of another.
            record = dataclasses.replace(record, revision=None)
        network, _ = load_found(Found(file.parent, phrase), base=str(model), record=record)
        return Generator(network, phrase, record.resolution)
    assert not isinstance(noted, Record)
    noted = {**facts, **noted}
    try:
        network = _load(str(model), noted, weight_dtype)
    except FileNotFoundError as error:
        if not is_hub_id(str(model)):
            raise
        raise FileNotFoundError(
            f"{model}: no such folder here, and as a hub id it cannot be loaded ({error}); write the folder of a run "
            "(such as runs/demo), of a checkpoint or of a saved model, or owner/name of a model on the hub"
        ) from error
    if file is not None:
        if "start_lora" in noted:
            load_start_lora(network, file.parent / Path(noted["start_lora"]).name, "frozen")
        load_lora(network, file)
    return Generator(network.eval(), phrase, _resolution(noted))


def exported_base(model: str | Path) -> str | None:
    """The base that an export without one (a LoRA, or a transformer alone) is loaded with; None for all else."""
    folder = local_folder(model)
    return None if folder is None or is_hub_id(str(model)) else _exported(folder).get("base_model")


def _open_export(
    folder: Path, facts: dict[str, str], base: str | None, weight_dtype: Literal["fp32", "bf16"] | None
) -> Generator:
    """A LoRA or a transformer as :mod:`apex_fast.export.stock` wrote it, on the base that its header names."""
    base = facts["base_model"] if base is None else base
    try:
        pretrained_source(base)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} was exported for {base}, and that model is not there any more; say where it is with --base"
        ) from error
    if (folder / WEIGHTS).is_file():
        return open_generator(base, lora=folder, weight_dtype=weight_dtype)
    network = _load(base, facts, weight_dtype)
    load_weights(network.transformer, folder / TRANSFORMER)
    return Generator(network.eval(), f"{base} with the transformer of {folder}", _resolution(facts))


_OPTIONS: dict[str, Callable[[str], Any]] = {"max_sequence_length": int, "embedded_guidance": float}


def _load(model: str, facts: dict[str, str], weight_dtype: str | None) -> Backbone:
    """The pipeline ``model``, with the settings that ``facts`` of a header name."""
    # A commit of one repository is none of another.
    same = model == facts.get("base_model")
    return load_pretrained(
        pretrained_source(model),
        weight_dtype=weight_dtype or facts.get("weight_dtype", "fp32"),
        revision=facts.get("base_model_revision") if same else None,
        variant=facts.get("base_model_variant") if same else None,
        **{key: kind(facts[key]) for key, kind in _OPTIONS.items() if key in facts},
    )


def _resolution(facts: dict[str, str]) -> list[int] | None:
    return [int(edge) for edge in facts["resolution"].split("x")] if "resolution" in facts else None


def _is_pipeline(folder: Path) -> bool:
    """Whether ``folder`` is a stock pipeline, and no run or model of this library's own."""
    return (folder / INDEX).is_file() and Record.read(folder) is None and not has_own_text(folder)


def _exported(folder: Path) -> dict[str, str]:
    """What the header of an export without its base says; empty for every other folder."""
    if not folder.is_dir() or holds_model(folder):
        return {}
    file = folder / WEIGHTS
    facts = _header(file) if file.is_file() else _header_of(folder / TRANSFORMER)
    return facts if "base_model" in facts else {}


def _noted(file: Path) -> Record | dict[str, str]:
    """What a run wrote beside its LoRA, or an export into the header of the file; empty for others."""
    record = Record.read(file.parent) if file.name == WEIGHTS else None
    return _header(file) if record is None else record


def _header_of(folder: Path) -> dict[str, str]:
    """The header of the first weight file in ``folder``; empty where there is none."""
    file = next(iter(sorted(folder.glob("*.safetensors"))), None)
    return {} if file is None else _header(file)


def _header(file: Path) -> dict[str, str]:
    """What an export wrote into the header of ``file``; empty for files of others."""
    try:
        with safe_open(file, "pt") as opened:
            facts = dict(opened.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read as safetensors ({error})") from error
    return facts if facts.get("library", "").startswith("apex_fast ") else {}


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
    lora: str | Path | None = None,
    weight_dtype: Literal["fp32", "bf16"] | None = None,
) -> tuple[Tensor, str]:
    """Images ``[len(prompts) * images_per_prompt, C, H, W]`` in [-1, 1] on the CPU, prompt by prompt, and a phrase
    naming the model.

    Args:
        run, base, lora, weight_dtype: see :func:`open_generator`.
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
    _at_least_one(images_per_prompt=images_per_prompt, num_inference_steps=num_inference_steps)
    if not prompts:
        raise ValueError("at least one prompt is needed")
    device = device_of(str(device))
    with during("loading the model"):
        generator = open_generator(run, lora=lora, base=base, weight_dtype=weight_dtype)
    network = generator.network
    texts = [p for p in prompts for _ in range(images_per_prompt)]
    shape = _latent_shape(generator, height, width)
    noise = torch.randn(len(texts), *shape, generator=torch.Generator().manual_seed(seed))
    scale, guide, against = _guidance(network, guidance_scale, negative_prompt)
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
    return images, generator.phrase


def _at_least_one(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _guidance(
    network: Backbone, guidance_scale: float | None, negative_prompt: str | None
) -> tuple[float, Guide | None, str | None]:
    """Scale and guide for :func:`apex_fast.sample`, and the prompt to lead away from; (1, None, None) is none."""
    scale, guide = (1.0, None) if guidance_scale is None else combine(network, guidance_scale)
    if scale == 1.0 and guide is None:
        return scale, guide, None
    return scale, guide, network.teacher_guidance.negative_prompt or "" if negative_prompt is None else negative_prompt


def _latent_shape(generator: Generator, height: int | None, width: int | None) -> tuple[int, int, int]:
    network = generator.network
    if network.text is not None:
        if height is not None or width is not None:
            raise ValueError(
                "height and width: this model makes pictures of "
                f"{[edge * network.vae_scale_factor for edge in network.sample_shape[1:]]} pixels only"
            )
        return network.sample_shape
    size = generator.resolution or [edge * network.vae_scale_factor for edge in network.sample_shape[1:]]
    return network.latent_shape(height or size[0], width or size[1])


# ---- many pictures


PROMPTS_AT_ONCE = 256
"""Prompts whose embeddings are held in memory together: of a large text encoder, about a gigabyte."""


@dataclass(frozen=True)
class Drawn:
    """What :func:`generate_files` did: pictures drawn now, pictures that were there, and the model in words."""

    new: int
    kept: int
    phrase: str


def generate_files(
    model: str | Path | Generator,
    prompts: Sequence[Prompt],
    out: str | Path,
    *,
    layout: LayoutName = "plain",
    images_per_prompt: int = 4,
    batch_size: int = 1,
    num_inference_steps: int = 1,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    base: str | None = None,
    lora: str | Path | None = None,
    weight_dtype: Literal["fp32", "bf16"] | None = None,
) -> Drawn:
    """Draws pictures of many prompts into ``out``, in a layout that scorers read
    (:mod:`apex_fast.evaluation.layouts`); pictures that are there already are kept.

    The noise of picture ``j`` of prompt ``i`` is drawn from a generator of the CPU with the seed
    ``seed + i * images_per_prompt + j``, as the stock pipeline draws it from ``torch.Generator("cpu").manual_seed``.
    It depends neither on ``batch_size`` nor on what was there already. Progress goes to stderr.

    Args:
        model: as :func:`generate` has it, or what :func:`open_generator` opened, to draw with it more than once; base,
            lora and weight_dtype have been settled then.
        batch_size: pictures that the transformer makes together; they are decoded one at a time.
        others: see :func:`generate`.

    Raises:
        ValueError: as :func:`generate`; ``out`` holds pictures that were made otherwise, or the layout cannot take
            these prompts.
        FileNotFoundError, CheckpointError, SettingsError: as :func:`open_generator`.
    """
    _at_least_one(images_per_prompt=images_per_prompt, num_inference_steps=num_inference_steps, batch_size=batch_size)
    # What is wrong with the prompts is said before a model is loaded.
    Layout(layout, out, prompts, images_per_prompt, {"seed": seed})
    device = device_of(str(device))
    if isinstance(model, Generator):
        generator = model
    else:
        with during("loading the model"):
            generator = open_generator(model, lora=lora, base=base, weight_dtype=weight_dtype)
    network = generator.network
    shape = _latent_shape(generator, height, width)
    edges = [edge * network.vae_scale_factor for edge in shape[1:]]
    if layout == "dpg" and edges[0] != edges[1]:
        raise ValueError(f"layout dpg: its scorer cuts squares, and these pictures are {edges[0]} x {edges[1]} pixels")
    scale, guide, against = _guidance(network, guidance_scale, negative_prompt)
    facts = {
        "seed": seed,
        "weights": _identity(network),
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale if against is not None else None,
        "negative_prompt": against,
        "height": edges[0],
        "width": edges[1],
        "max_sequence_length": network.max_sequence_length,
        "embedded_guidance": network.embedded_guidance,
    }
    place = Layout(layout, out, prompts, images_per_prompt, facts)
    jobs = place.missing()
    total = len(prompts) * images_per_prompt
    done = kept = total - len(jobs)
    console = Console(total, done, label="generate", unit="picture")
    if kept:
        console.say(f"{kept} of {total} pictures are there already")
    try:
        for number, part in enumerate(_parts(jobs)):
            indices = sorted({index for index, _ in part})
            rows = {index: row for row, index in enumerate(indices)}
            condition, negative = _encode(network, [prompts[i].text for i in indices], against, device, number > 0)
            for first in range(0, len(part), batch_size):
                batch = part[first : first + batch_size]
                seeds = [place.seed(index, number) for index, number in batch]
                with during(f"sampling {len(batch)} pictures together (--batch-size)"), torch.no_grad():
                    latents = sample(
                        network,
                        torch.cat([_noise(shape, own) for own in seeds]).to(device),
                        condition.index([rows[index] for index, _ in batch]).to(device),
                        num_inference_steps=num_inference_steps,
                        guidance_scale=scale,
                        negative_condition=negative,
                        guide=guide,
                    )
                for (index, number), latent in zip(batch, latents, strict=True):
                    with during("decoding pictures"):
                        image = network.decode(latent[None]).float().cpu()[0]
                    if not image.isfinite().all():
                        raise ValueError(f"picture {number} of prompt {index} is not finite: {prompts[index].text!r}")
                    place.put(index, number, as_picture(image))
                done += len(batch)
                console.step(done, prompts[batch[-1][0]].text[:40])
        place.finish()
    finally:
        console.close()
    return Drawn(len(jobs), kept, generator.phrase)


_SAMPLED = 1 << 10


def _identity(network: Backbone) -> str:
    """Tells the weights of one folder of pictures from others: the fingerprint of the network, all of a LoRA and its
    scales, and values from all over every tensor of the transformer, the text encoders and the VAE."""
    digest = hashlib.sha256(fingerprint(network).encode())

    def add(values: Tensor) -> None:
        digest.update(values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())

    modules = {"transformer": network.transformer, **network.components}
    for part, module in sorted(modules.items()):
        if not isinstance(module, torch.nn.Module):
            continue
        for name, parameter in sorted(module.named_parameters()):
            # Quantised weights are packed in ways of their own; the fingerprint has their names and shapes.
            if type(parameter) is not torch.nn.Parameter or parameter.is_meta or not parameter.numel():
                continue
            digest.update(f"{part}.{name} {list(parameter.shape)} {parameter.dtype}".encode())
            step = 1 if ".lora_" in name else max(1, parameter.numel() // _SAMPLED)
            add(parameter.reshape(-1)[::step])
    for name, module in sorted(network.transformer.named_modules()):
        if isinstance(scales := getattr(module, "scaling", None), dict):
            digest.update(f"{name} {sorted(scales.items())}".encode())
    return digest.hexdigest()[:16]


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def _parts(jobs: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """``jobs`` in runs of at most :data:`PROMPTS_AT_ONCE` prompts."""
    indices = sorted({index for index, _ in jobs})
    for first in range(0, len(indices), PROMPTS_AT_ONCE):
        chosen = set(indices[first : first + PROMPTS_AT_ONCE])
        yield [job for job in jobs if job[0] in chosen]


def _encode(
    network: Backbone, texts: list[str], against: str | None, device: torch.device, again: bool
) -> tuple[Condition, Condition | None]:
    """Embeddings of ``texts`` on the CPU, and of the negative prompt on ``device``. Text encoders and transformer are
    not on a GPU together; ``again``: the transformer was there before."""
    cpu = torch.device("cpu")
    if network.text is None and again and device != cpu:
        network.transformer.to(cpu)
        release()
    with during("encoding prompts"), torch.no_grad():
        if network.text is None:
            move_parts(network, network.text_parts, device)
        else:
            network.to(device)
        negative = None if against is None else encode_text(network, [against], negative=True).to(device)
        condition = encode_text(network, texts)
    if network.text is None:
        move_parts(network, network.text_parts, cpu)
        release()
        with during(f"moving the transformer to {device}"):
            network.transformer.to(device)
            move_parts(network, ("vae",), device)
    return condition, negative


def picture_path(run: str | Path, prompt: str, num_inference_steps: int, seed: int) -> Path:
    """Where ``apex-fast generate`` writes when it is not told:
    ``RUN/generated/<prompt>-<steps>-steps-seed-<seed>.png``."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"
    return (
        (local_folder(run) or Path("."))
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
