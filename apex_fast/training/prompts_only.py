"""The front door of prompts-only training: ``apex-fast train --model PATH_OR_ID --prompts prompts.txt``.

No config file and no pictures: the settings are those that ``apex-fast init FAMILY --mode lora`` writes, the samples
are those of the model itself (:mod:`apex_fast.training.base_samples`), and at the end the LoRA is exported for stock
diffusers, with a scheduler and a model card, and for ComfyUI, with a workflow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from apex_fast.backbones.loading import INDEX, family_of, read_json
from apex_fast.data.prompts import PromptFile
from apex_fast.planning.published import PUBLISHED
from apex_fast.starting import starting_config
from apex_fast.training.config import TrainConfig
from apex_fast.training.foreign_keys import FOREIGN_KEYS
from apex_fast.training.models import pretrained_source
from apex_fast.training.results import Record
from apex_fast.training.settings import SettingsError, build, merge, parse_overrides, parse_yaml

VALIDATED = 2
"""Prompts of the file that validations draw, unless the run names others."""


def is_front_door(arguments: Sequence[str]) -> bool:
    """Whether these words of the command line, which name no config file, ask for a run from prompts alone."""
    return any(word.partition("=")[0] == "--prompts" for word in arguments)


def with_model(arguments: Sequence[str]) -> list[str]:
    """``--model X`` as the key that it stands for; ``--model.family`` and the like are keys of their own."""
    return [
        "--pretrained_model_name_or_path" + word[len("--model") :] if word.partition("=")[0] == "--model" else word
        for word in arguments
    ]


def config_from(arguments: Sequence[str]) -> TrainConfig:
    """The run that ``--model``, ``--prompts`` and any other keys mean.

    Raises:
        SettingsError: no model, prompts that cannot be used, or any mistake in a key.
        FileNotFoundError: no such model or file.
    """
    over = parse_overrides(TrainConfig, with_model(arguments), foreign=FOREIGN_KEYS)
    model = over.get("pretrained_model_name_or_path")
    if model is None:
        raise SettingsError("train --prompts needs the model to tune: --model with a diffusers folder or a hub id")
    prompts = over["prompts"]
    try:
        texts = PromptFile.open(prompts).captions
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise SettingsError(str(error)) from error
    family = over.get("family") or family_of_model(str(model), over.get("revision"))
    name = f"{Path(str(model)).name}_{Path(prompts).stem}"
    text = starting_config(family, "lora", model=str(model), path=f"{name}.yaml")
    values: dict[str, Any] = parse_yaml(text, source="apex-fast init")
    del values["dataset_name"]
    values["validation_prompts"] = texts[:VALIDATED]
    if over.get("prompts_only", {}).get("samples") == "student":
        # Its own samples are nothing to learn from; see apex_fast.training.base_samples.
        values["objective"]["supervised_weight"] = 0.0
    return build(TrainConfig, merge(values, over), source="command line", foreign=FOREIGN_KEYS)


def family_of_model(name: str, revision: str | None = None) -> str:
    """The family of a model by its ``model_index.json``, which is all that is read of it.

    Raises:
        FileNotFoundError: it is not there.
        SettingsError: a model that is not supported.
    """
    if name in PUBLISHED:
        return PUBLISHED[name].family
    source = pretrained_source(name)
    if isinstance(source, Path) and not (source / INDEX).is_file() and (record := Record.read(source)) is not None:
        return record.family
    local = isinstance(source, Path)
    values = read_json(source, INDEX, local, revision) or read_json(source, "config.json", local, revision) or {}
    try:
        return family_of(str(values.get("_class_name")), name).family
    except ValueError as error:
        raise SettingsError(f"pretrained_model_name_or_path: {error}") from error


def export_results(config: TrainConfig, say: Callable[[str], None]) -> list[Path]:
    """Exports a finished run for stock diffusers and for ComfyUI; a form that its family does not have is told, and
    the other is written."""
    from apex_fast.export import export_run

    written = []
    for form in ("diffusers", "comfyui"):
        try:
            written.append(export_run(config.output_dir, format=form, say=say))
        except SettingsError as error:
            say(f"not exported for {form}: {error}")
        else:
            say(f"exported for {form}: {written[-1]}")
    return written
