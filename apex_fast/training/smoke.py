"""``apex-fast train CONFIG --smoke``: the same config on a tiny random model of its family, start to picture.

It shows in a minute and without a download whether keys, schedule, LoRA, checkpoint, resume and sampling work together.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from apex_fast.backbones.loading import family_of
from apex_fast.data.folder import METADATA
from apex_fast.data.source import HUB, Source
from apex_fast.data.tar_shards import shown
from apex_fast.extras import require
from apex_fast.planning.blueprint import PlanError, blueprint_of
from apex_fast.planning.published import PUBLISHED
from apex_fast.shipped import is_shipped
from apex_fast.training.config import TrainConfig
from apex_fast.training.encoding import open_data
from apex_fast.training.loop import Trainer
from apex_fast.training.losses import PEERS, SHIFTED
from apex_fast.training.models import is_hub_id, pretrained_folder, quiet_libraries, start_lora_file
from apex_fast.training.results import INDEX, Record
from apex_fast.training.settings import SettingsError

STEPS, RESUMED_AT = 3, 2
RANK = 4
BASE_STEPS = 2
PROMPTS = "prompts.txt"
EDGE = 32
"""Pixels; suits the tiny pipeline of every family."""

CAPTIONS = (
    "a red circle on white",
    "a green circle on black",
    "a blue square on white",
    "a yellow square on black",
    "a red square on grey",
    "a green square on white",
    "a blue circle on grey",
    "a yellow circle on blue",
)


def smoke_run(config: TrainConfig, *, output_dir: str | Path | None = None) -> int:
    """Runs ``config`` small and says what that shows; returns the exit code.

    output_dir: where to leave the files; None is a temporary folder that is removed.

    Raises:
        SettingsError: a config that has no family's pipeline to be tried on, or any mistake that the run finds.
    """
    begun = time.monotonic()
    family = family_of_config(config)
    with ExitStack() as stack:
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="apex-fast-smoke-")))
        run, notes = small_config(config, family, folder)
        for note in notes:
            print(f"smoke: {note}")
        quiet_libraries()
        require("apex_fast.backbones.tiny", extra="train").save_tiny_pipeline(family, folder / "tiny_model")
        render_pictures(folder / "pictures")
        (folder / PROMPTS).write_text("".join(f"{caption}\n" for caption in CAPTIONS), encoding="utf-8")
        first = Trainer(run, label="smoke").run(until=RESUMED_AT)
        if first.exit_code:
            return first.exit_code
        resumed = dataclasses.replace(run, resume_from_checkpoint="latest", overwrite_output_dir=False)
        second = Trainer(resumed, label="smoke").run()
        if not second.finished:
            return second.exit_code
        picture = _generate(folder / "run", config)
        kept = f"; everything is in {folder}" if output_dir is not None else ""
        print(
            f"smoke: passed in {time.monotonic() - begun:.0f} s: {family}, "
            f"{'all parameters' if run.rank is None else f'LoRA of rank {run.rank}'}, {STEPS} steps with a resume "
            f"after {RESUMED_AT}, checkpoint, result, and a picture of {picture} from it{kept}\n"
            "smoke: the weights are random, so this shows the wiring and says nothing of quality, memory or speed"
        )
    return 0


SMALL_ALREADY = (
    "--smoke puts a tiny random pipeline in place of a large one, and this config's model is small already; write "
    "--max_train_steps 3 instead"
)


def family_of_config(config: TrainConfig) -> str:
    """The family of a config's model without loading or downloading it.

    Raises:
        SettingsError: it cannot be told, or the model needs no smaller one.
    """
    name = config.pretrained_model_name_or_path
    if name is None or is_shipped(name):
        raise SettingsError(SMALL_ALREADY)
    found: str | None = None
    if is_hub_id(name):
        found = PUBLISHED[name].family if name in PUBLISHED else None
    elif config.family is None or Path(name).exists():
        folder = pretrained_folder(name)
        if (record := Record.read(folder)) is not None:
            found = record.family
        else:
            index = folder / INDEX if (folder / INDEX).is_file() else folder / "config.json"
            try:
                values = json.loads(index.read_text(encoding="utf-8"))
            except ValueError as error:
                raise SettingsError(
                    f"pretrained_model_name_or_path: {index} is no JSON ({error}); copy or download it again"
                ) from error
            try:
                backbone = family_of(values.get("_class_name", ""), str(name))
            except ValueError as error:
                raise SettingsError(f"pretrained_model_name_or_path: {error}") from error
            if values.get("_class_name") == backbone.__name__:
                raise SettingsError(SMALL_ALREADY)
            found = backbone.family
    if found is not None and config.family not in (None, found):
        raise SettingsError(f"family: {config.family}, but {name} is a {found} model; write family: {found}")
    family = config.family or found
    if family is None:
        raise SettingsError(f"--smoke does not know the family of {name}; write it, e.g. family: sana")
    return family


def _look_at_data(config: TrainConfig) -> list[str]:
    """What can be told of the run's own data, which is not trained on here."""
    if config.prompts is not None:
        found = f"prompts: {len(open_data(config))} in {config.prompts}"
        return [f"{found}; samples of the base take {BASE_STEPS} steps here"]
    name = config.dataset_name
    if name.lower().startswith(("http://", "https://", HUB)):
        return [f"dataset_name: {shown(name)} is not fetched here; the run will"]
    try:
        data = open_data(config)
    except FileNotFoundError:
        if Path(name).exists():
            raise
        return [f"dataset_name: {name} is not there yet; the run will need it"]
    assert isinstance(data, Source)
    found = f"dataset_name: {len(data)} pictures with captions in {data.label}"
    return [found, *(f"dataset_name: {line}" for line in data.warnings())]


def small_config(config: TrainConfig, family: str, folder: Path) -> tuple[TrainConfig, list[str]]:
    """``config`` on the tiny model and pictures in ``folder``, and what of it is left out or could be told already."""
    notes = []
    if config.ships_data:
        raise SettingsError(
            f"dataset_name: {config.dataset_name} is for networks without a VAE, and {family} takes a folder of "
            "pictures"
        )
    notes += _look_at_data(config)
    if config.start_lora is not None:
        start_lora_file(config.start_lora)
    _check_size(config)
    left_out = {"quantization": None, "start_lora": None, "start_lora_mode": "merge", "compile": False}
    for name, default in left_out.items():
        if getattr(config, name) != default:
            notes.append(f"{name}: {getattr(config, name)} is not tried: it takes the real weights or long to start")
    alpha = config.lora_alpha
    if config.rank is not None and alpha is not None:
        alpha = alpha * RANK / config.rank
    size = config.image_size
    wide = None if size is None or size[0] == size[1] else [EDGE, EDGE + 16] if size[1] > size[0] else [EDGE + 16, EDGE]
    small = dataclasses.replace(
        config,
        **left_out,
        # Of random weights it would say nothing.
        probe=config.probe and config.loss not in SHIFTED,
        family=family,
        pretrained_model_name_or_path=str(folder / "tiny_model"),
        revision=None,
        variant=None,
        **_small_data(config, folder),
        cache_dir=None,
        dataset_split=None,
        image_column=None,
        caption_column=None,
        aspect_bucket_step=None,
        resolution=wide or EDGE,
        output_dir=str(folder / "run"),
        resume_from_checkpoint=None,
        max_train_steps=STEPS,
        train_batch_size=min(4 if config.loss in PEERS else 2, config.train_batch_size),
        gradient_accumulation_steps=min(2, config.gradient_accumulation_steps),
        rank=None if config.rank is None else RANK,
        lora_alpha=alpha,
        lr_warmup_steps=min(1, config.lr_warmup_steps),
        objective=_small_objective(config),
        # Shares of a larger batch.
        peer=dataclasses.replace(config.peer, shares=type(config.peer)().shares),
        validation_steps=STEPS if config.validates else None,
        validation_minutes=None,
        validation_images_per_prompt=1,
        validation_base_inference_steps=None if config.validation_base_inference_steps is None else 2,
        report_to="none",
        checkpointing_steps=None,
        logging_steps=1,
    )
    return small, notes


def _small_objective(config: TrainConfig) -> Any:
    """Every term in these few steps; as it is in losses that do not use it, which would tell of the change."""
    if config.loss != "correction":
        return config.objective
    every = {name: min(2, getattr(config.objective, name)) for name in ("generator_every", "supervised_every")}
    return dataclasses.replace(config.objective, warmup_steps=1, ramp_steps=1, **every)


def _small_data(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """The keys that name the data in ``folder``."""
    if config.prompts is None:
        return {"dataset_name": str(folder / "pictures")}
    own = dataclasses.replace(config.prompts_only, num_inference_steps=BASE_STEPS, samples_per_prompt=1)
    return {"prompts": str(folder / PROMPTS), "prompts_only": own}


def _check_size(config: TrainConfig) -> None:
    """SettingsError for a ``resolution`` that the model of the config, not the tiny one, cannot make; nothing where
    that model cannot be known without loading it."""
    if config.image_size is None:
        return
    try:
        model = blueprint_of(config)
        network = model.backbone()
    except (ValueError, FileNotFoundError):
        # Its own mistakes are found by the run, in the run's words.
        return
    try:
        model.latent_shape(network, config.image_size)
    except PlanError as error:
        raise SettingsError(str(error)) from error


def render_pictures(folder: Path) -> None:
    """Eight pictures of shapes with captions in ``metadata.jsonl``."""
    pil, draw_module = require("PIL.Image", extra="train"), require("PIL.ImageDraw", extra="train")
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, caption in enumerate(CAPTIONS):
        _, color, shape, _, ground = caption.split()
        picture = pil.new("RGB", (48, 40), ground)
        pencil = draw_module.Draw(picture)
        (pencil.ellipse if shape == "circle" else pencil.rectangle)((8, 6, 36, 34), fill=color)
        picture.save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": caption}) + "\n")
    (folder / METADATA).write_text("".join(lines), encoding="utf-8")


def _generate(run: Path, config: TrainConfig) -> str:
    from apex_fast.generate import generate, picture_path, write_picture

    images, _ = generate(run, CAPTIONS[:1], images_per_prompt=1, device=config.device)
    write_picture(images, CAPTIONS[:1], picture_path(run, CAPTIONS[0], 1, 0))
    if not images.isfinite().all():
        raise SettingsError("--smoke: the tuned model makes pictures that are not finite")
    return f"{images.shape[-1]} x {images.shape[-2]} pixels"
