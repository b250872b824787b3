"""Ways to compute the step of one model, each planned once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from apex_fast.passes import Passes, mean_forwards, objective_passes, paper_passes
from apex_fast.planning.blueprint import Blueprint
from apex_fast.planning.memory import ACTIVATIONS
from apex_fast.planning.stages import (
    PICTURES,
    PROMPTS,
    STEP,
    VALIDATION,
    Stage,
    dtype_bytes,
    held_while_drawing,
    loaded_on_gpu,
    vae_activations,
    validates,
)
from apex_fast.planning.step import GRADIENTS, StepBytes, plan_step, plannable
from apex_fast.training.batches import TABLE_ON_DEVICE
from apex_fast.training.config import TrainConfig
from apex_fast.training.guidance import real_guidance
from apex_fast.training.settings import SettingsError

GIB = 1 << 30
CONTEXT = GIB // 2
"""Bytes that CUDA and its libraries take in a process before the first tensor; what is usual, not measured here."""
MARGIN = 0.1
"""Share of what comes and goes (activations, gradients, temporary tensors) that is added for the allocator."""

SCHEDULES = ("joint", "retain", "sequential")


@dataclass(frozen=True)
class Way:
    """One way to compute a step: a schedule, with or without gradient checkpointing.

    Attributes:
        step: its bytes and operations.
        passes: what it costs.
        needed: bytes of a GPU for the step, with what is added for the allocator and CUDA.
    """

    schedule: str
    checkpointing: bool
    step: StepBytes
    passes: Passes
    needed: int


def ways(config: TrainConfig) -> Iterator[tuple[tuple[str, bool], TrainConfig]]:
    """Every schedule that the config's loss can take, with and without checkpointing."""
    schedules = SCHEDULES if config.loss != "flow_matching" else (config.schedule_in_use,)
    for checkpointing in (False, True):
        for schedule in schedules:
            changed = altered(config, schedule=schedule, gradient_checkpointing=checkpointing)
            if changed is not None:
                yield (schedule, checkpointing), changed


def altered(config: TrainConfig, **changes: Any) -> TrainConfig | None:
    """``config`` with other settings, or None if they do not go together."""
    try:
        return dataclasses.replace(config, **changes)
    except SettingsError:
        return None


def passes_of(config: TrainConfig, guided: bool) -> Passes:
    """Passes of a step at full weight of the correction that trains every term."""
    objective, checkpointing = config.objective, config.gradient_checkpointing
    if config.loss == "flow_matching":
        return Passes(0, 1, 1, 1 if checkpointing else 0)
    if config.loss == "paper":
        return paper_passes(
            fake=objective.paper_fake_weight > 0,
            mix=objective.paper_mix_weight > 0,
            mixes_shifted=objective.mix_weight > 0,
            detached=objective.detach_x_fake,
            checkpointing=checkpointing,
        )
    return objective_passes(objective, config.schedule_in_use, guided=guided, checkpointing=bool(checkpointing))


def mean_share(config: TrainConfig, guided: bool) -> float:
    """What a step costs on average, as a share of one that trains every term: below 1 with ``generator_every`` or
    ``supervised_every``."""
    if config.loss != "correction":
        return 1.0
    checkpointing = bool(config.gradient_checkpointing)
    mean = mean_forwards(config.objective, config.schedule_in_use, guided=guided, checkpointing=checkpointing)
    return mean / passes_of(config, guided).total_in_forwards


class Planner:
    """Plans ways of one model, each once."""

    def __init__(self, model: Blueprint, gpus: int) -> None:
        self.model, self.gpus = model, gpus
        self.backbone = model.backbone()
        self.embeddings = 0 if model.own_text else TABLE_ON_DEVICE
        self._ways: dict[str, Way] = {}

    def guidance(self, config: TrainConfig) -> float | None:
        found = real_guidance(plannable(self.model, config), self.backbone)
        return None if found is None else found.scale

    def kept_vae(self, config: TrainConfig) -> int:
        return self.model.vae_parameters * dtype_bytes(config) if validates(config) else 0

    def own_text(self) -> int:
        """Bytes of a text encoder of the model's own, which stays."""
        return self.model.text_encoder_parameters * 4 if self.model.own_text else 0

    def stages(self, config: TrainConfig) -> list[Stage]:
        """Every stage of the run, in order."""
        way = self.way(config)
        step = Stage(STEP, way.needed, way.step.transient)
        if self.model.own_text:
            return [step]
        found: list[Stage] = []
        activations = vae_activations(self.model, config.image_size, config.weight_dtype)
        encoding, decoding = (None, None) if activations is None else activations
        vae = self.model.vae_parameters * dtype_bytes(config)
        base = loaded_on_gpu(config, way.step)
        text = self.model.text_encoder_parameters * dtype_bytes(config)
        found.append(_stage(PROMPTS, base + text + self.embeddings, None))
        found.append(_stage(PICTURES, base + vae + self.embeddings, encoding))
        found.append(step)
        if validates(config):
            held = held_while_drawing(way.step) + self.embeddings + vae + self.buckets(way.step)
            found.append(_stage(VALIDATION, held, decoding))
        return found

    def fullest(self, config: TrainConfig) -> Stage:
        """The stage that needs the most."""
        return max(self.stages(config), key=lambda stage: stage.needed)

    def excess(self, config: TrainConfig, gpu: int) -> int:
        """By how many bytes the stages exceed ``gpu``, added up; 0 if the run fits."""
        return sum(max(0, stage.needed - gpu) for stage in self.stages(config))

    def buckets(self, step: StepBytes) -> int:
        return round(step.held[GRADIENTS]) if self.gpus > 1 else 0

    def way(self, config: TrainConfig) -> Way:
        key = repr(config)
        if key not in self._ways:
            step = _planned(self.model, config)
            _, peak = step.peak_moment
            moving = peak.get(ACTIVATIONS, 0.0) + peak.get(GRADIENTS, 0.0)
            beside = self.embeddings + self.kept_vae(config) + self.own_text() + self.buckets(step)
            needed = step.peak + beside + MARGIN * moving + CONTEXT
            self._ways[key] = Way(
                config.schedule_in_use,
                config.gradient_checkpointing,
                step,
                passes_of(config, self.guidance(config) is not None),
                round(needed),
            )
        return self._ways[key]


def _stage(name: str, held: int, activations: int | None) -> Stage:
    return Stage(name, round(held + (1 + MARGIN) * (activations or 0)) + CONTEXT, activations)


def _planned(model: Blueprint, config: TrainConfig) -> StepBytes:
    # A blueprint holds plain mappings, so its words are the key.
    key = (repr(model), repr(config))
    if key not in _STEPS:
        if len(_STEPS) >= 256:
            _STEPS.clear()
        _STEPS[key] = plan_step(model, config)
    return _STEPS[key]


_STEPS: dict[tuple[str, str], StepBytes] = {}
