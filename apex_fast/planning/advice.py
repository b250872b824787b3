"""Settings that make a run fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from apex_fast.planning.blueprint import Blueprint
from apex_fast.planning.ways import Planner, altered
from apex_fast.training.config import DIGITS, TrainConfig

ADVISED_RANK = 64
"""Rank of the LoRA that is advised in place of full tuning."""


@dataclass(frozen=True)
class Advice:
    """Settings that make a run fit, planned with them.

    Attributes:
        changes: keys of the config and what to write.
        needed: bytes with them.
        fits: whether that is enough; False if nothing that was tried is.
    """

    changes: dict[str, Any]
    needed: int
    fits: bool


def advise(planner: Planner, config: TrainConfig, gpu: int) -> Advice:
    """The first settings, in the order below, with which the run fits; those that it can do without are left out."""
    adopted: list[dict[str, Any]] = []
    best = planner.way(config).needed
    for change in (_checkpoint, _sequential, _autocast, _lora, _smaller_batch, _fewer_bits, _no_average, _smaller_rank):
        current = _with(config, adopted)
        for option in change(current):
            changed = altered(current, **option)
            if changed is None:
                continue
            needed = planner.way(changed).needed
            if needed >= best:
                continue
            if option.get("train_batch_size") == 1 and needed <= gpu:
                option, needed = _largest_batch(planner, current, gpu, option, needed)
            adopted, best = [*adopted, option], needed
            current = _with(config, adopted)
            if best <= gpu:
                return _shortest(planner, config, adopted, gpu)
    for option in _smaller_pictures(planner.model, _with(config, adopted)):
        changed = altered(_with(config, adopted), **option)
        if changed is not None and (needed := planner.way(changed).needed) < best:
            best = needed
            if best <= gpu:
                return _shortest(planner, config, [*adopted, option], gpu)
    return _advice(planner, config, adopted, False)


def _shortest(planner: Planner, config: TrainConfig, adopted: list[dict[str, Any]], gpu: int) -> Advice:
    """Without the changes that are not needed once the later ones are made, the most costly to the user first."""
    for option in sorted(adopted, key=lambda option: -max(_COST.get(name, 0) for name in option)):
        rest = [o for o in adopted if o is not option]
        changed = altered(config, **_merged(rest)) if rest else None
        if changed is not None and planner.way(changed).needed <= gpu:
            adopted = rest
    return _advice(planner, config, adopted, True)


_COST = {"rank": 3, "quantization": 2, "resolution": 4, "train_batch_size": 1}


def _merged(changes: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for change in changes for name, value in change.items()}


def _advice(planner: Planner, config: TrainConfig, adopted: list[dict[str, Any]], fits: bool) -> Advice:
    changes = {name: value for name, value in _merged(adopted).items() if getattr(config, name) != value}
    return Advice(changes, planner.way(_with(config, adopted)).needed, fits)


def _with(config: TrainConfig, changes: list[dict[str, Any]]) -> TrainConfig:
    changed = altered(config, **_merged(changes))
    assert changed is not None
    return changed


def _checkpoint(config: TrainConfig) -> Iterator[dict[str, Any]]:
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}


def _sequential(config: TrainConfig) -> Iterator[dict[str, Any]]:
    if config.loss != "flow_matching" and config.schedule_in_use != "sequential":
        yield {"schedule": "sequential"}


def _autocast(config: TrainConfig) -> Iterator[dict[str, Any]]:
    if config.mixed_precision == "no" and config.weight_dtype == "fp32":
        yield {"mixed_precision": "bf16"}


def _lora(config: TrainConfig) -> Iterator[dict[str, Any]]:
    if config.mode == "full":
        yield {"rank": ADVISED_RANK}


def _smaller_batch(config: TrainConfig) -> Iterator[dict[str, Any]]:
    if config.train_batch_size > 1:
        yield _batch(config, 1)


def _batch(config: TrainConfig, size: int) -> dict[str, Any]:
    passes = config.gradient_accumulation_steps * config.train_batch_size // size
    return {"train_batch_size": size, "gradient_accumulation_steps": passes}


def _largest_batch(
    planner: Planner, config: TrainConfig, gpu: int, option: dict[str, Any], needed: int
) -> tuple[dict[str, Any], int]:
    """The largest divisor of the batch that fits, given that 1 does."""
    whole = config.train_batch_size
    for size in (n for n in range(whole // 2, 1, -1) if whole % n == 0):
        larger = _batch(config, size)
        changed = altered(config, **larger)
        if changed is not None and (bytes_ := planner.way(changed).needed) <= gpu:
            return larger, bytes_
    return option, needed


def _fewer_bits(config: TrainConfig) -> Iterator[dict[str, Any]]:
    if config.mode != "lora":
        return
    if config.weight_dtype == "fp32":
        yield {"weight_dtype": "bf16", "mixed_precision": "no"}
    if config.quantization is None:
        yield {"weight_dtype": "bf16", "quantization": "int8", "mixed_precision": "no"}
    if config.quantization != "nf4":
        yield {"weight_dtype": "bf16", "quantization": "nf4", "mixed_precision": "no"}


def _no_average(config: TrainConfig) -> Iterator[dict[str, Any]]:
    if config.ema_decay is not None:
        yield {"ema_decay": None}


def _smaller_rank(config: TrainConfig) -> Iterator[dict[str, Any]]:
    for rank in (32, 16, 8):
        if config.rank is not None and config.rank > rank:
            yield {"rank": rank}


def _smaller_pictures(model: Blueprint, config: TrainConfig) -> Iterator[dict[str, Any]]:
    if config.dataset_name == DIGITS or model.own_text:
        return
    height, width = model.pixels(config.image_size)
    step = model.vae_scale_factor * 2
    for part in (0.75, 0.5):
        edges = [max(step, round(edge * part / step) * step) for edge in (height, width)]
        yield {"resolution": edges[0] if edges[0] == edges[1] else edges}
