"""Settings that make a run fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from apex_fast.planning.blueprint import Blueprint
from apex_fast.planning.stages import validates
from apex_fast.planning.ways import Planner, altered
from apex_fast.training.config import TrainConfig

ADVISED_RANK = 64
"""Rank of the LoRA that is advised in place of full tuning."""

PAPER_RANK = 32
"""The smallest rank that the paper reports, with results like those of 64."""


@dataclass(frozen=True)
class Advice:
    """Settings that make a run fit, planned with them.

    Attributes:
        changes: keys of the config and what to write.
        needed: bytes with them, in the stage that needs the most, which is ``fullest``.
        fits: whether that is enough; False if nothing that was tried is.
    """

    changes: dict[str, Any]
    needed: int
    fullest: str
    fits: bool


def advise(planner: Planner, config: TrainConfig, gpu: int) -> Advice:
    """Settings with which every stage of the run fits, those that cost the least quality first; those that it can do
    without are left out."""
    adopted: list[dict[str, Any]] = []
    best = planner.excess(config, gpu)
    for change in _CHANGES:
        current = _with(config, adopted)
        for option in change(planner.model, current):
            changed = altered(current, **option)
            if changed is None:
                continue
            # The sum over all stages, not the fullest one alone, which another setting may have to mend.
            excess = planner.excess(changed, gpu)
            if excess >= best:
                continue
            adopted, best = [*adopted, option], excess
            current = _with(config, adopted)
            if best == 0:
                return _shortest(planner, config, adopted, gpu)
    return _advice(planner, config, adopted, False)


def _shortest(planner: Planner, config: TrainConfig, adopted: list[dict[str, Any]], gpu: int) -> Advice:
    """Without the changes that are not needed once the later ones are made, the most costly first, and with the largest
    batch that fits."""
    for option in reversed(adopted):
        rest = [o for o in adopted if o is not option]
        changed = altered(config, **_merged(rest)) if rest else None
        if changed is not None and planner.excess(changed, gpu) == 0:
            adopted = rest
    if "train_batch_size" in _merged(adopted):
        whole = config.train_batch_size
        for size in (n for n in range(whole // 2, 1, -1) if whole % n == 0):
            larger = [*adopted, _batch(config, size)]
            if planner.excess(_with(config, larger), gpu) == 0:
                adopted = larger
                break
    return _advice(planner, config, adopted, True)


def _merged(changes: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for change in changes for name, value in change.items()}


def _advice(planner: Planner, config: TrainConfig, adopted: list[dict[str, Any]], fits: bool) -> Advice:
    changes = {name: value for name, value in _merged(adopted).items() if getattr(config, name) != value}
    stage = planner.fullest(_with(config, adopted))
    return Advice(changes, stage.needed, stage.name, fits)


def _with(config: TrainConfig, changes: list[dict[str, Any]]) -> TrainConfig:
    changed = altered(config, **_merged(changes))
    assert changed is not None
    return changed


# ---- changes, in order of what they cost


def _checkpoint(model: Blueprint, config: TrainConfig) -> Iterator[dict[str, Any]]:
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}


def _sequential(model: Blueprint, config: TrainConfig) -> Iterator[dict[str, Any]]:
    if config.loss != "flow_matching" and config.schedule_in_use != "sequential":
        yield {"schedule": "sequential"}


def _autocast(model: Blueprint, config: TrainConfig) -> Iterator[dict[str, Any]]:
    if config.mixed_precision == "no" and config.weight_dtype == "fp32":
        yield {"mixed_precision": "bf16"}


def _no_pictures(model: Blueprint, config: TrainConfig) -> Iterator[dict[str, Any]]:
    # Scores are drawn from pictures too, but digits have no VAE.
    if validates(config) and not config.validation_metrics:
        yield {"validation_steps": None}


def _no_average(model: Blueprint, config: TrainConfig) -> Iterator[dict[str, Any]]:
    if config.ema_decay is not None:
        yield {"ema_decay": None}


def _smaller_batch(model: Blueprint, config: TrainConfig) -> Iterator[dict[str, Any]]:
    if config.train_batch_size > 1:
        yield _batch(config, 1)


def _batch(config: TrainConfig, size: int) -> dict[str, Any]:
    passes = config.gradient_accumulation_steps * config.train_batch_size // size
    return {"train_batch_size": size, "gradient_accumulation_steps": passes}


def _half(model: Blueprint, config: TrainConfig) -> Iterator[dict[str, Any]]:
    if config.mode == "lora" and config.weight_dtype == "fp32":
        yield {"weight_dtype": "bf16"}
        yield {"weight_dtype": "bf16", "mixed_precision": "no"}


def _smaller_rank(model: Blueprint, config: TrainConfig) -> Iterator[dict[str, Any]]:
    # The paper found like results with 64 and 32.
    for rank in (64, PAPER_RANK):
        if config.rank is not None and config.rank > rank:
            yield {"rank": rank}


def _fewer_bits(model: Blueprint, config: TrainConfig) -> Iterator[dict[str, Any]]:
    if config.mode != "lora":
        return
    for kind in ("int8", "nf4"):
        if config.quantization is None or (config.quantization, kind) == ("int8", "nf4"):
            yield {"weight_dtype": "bf16", "quantization": kind}
            yield {"weight_dtype": "bf16", "quantization": kind, "mixed_precision": "no"}


def _least_rank(model: Blueprint, config: TrainConfig) -> Iterator[dict[str, Any]]:
    for rank in (16, 8):
        if config.rank is not None and config.rank > rank:
            yield {"rank": rank}


def _lora(model: Blueprint, config: TrainConfig) -> Iterator[dict[str, Any]]:
    if config.mode == "full":
        yield {"rank": ADVISED_RANK}


def _smaller_pictures(model: Blueprint, config: TrainConfig) -> Iterator[dict[str, Any]]:
    if config.ships_data or model.own_text:
        return
    height, width = model.pixels(config.image_size)
    step = model.vae_scale_factor * 2
    for part in (0.75, 0.5):
        edges = [max(step, round(edge * part / step) * step) for edge in (height, width)]
        yield {"resolution": edges[0] if edges[0] == edges[1] else edges}


_OF_A_LORA = (_half, _smaller_rank, _fewer_bits, _least_rank)
_CHANGES = (
    *(_checkpoint, _sequential, _autocast, _no_pictures, _no_average, _smaller_batch),
    *_OF_A_LORA,
    # Full tuning has passed the ones before without a change.
    *(_lora, *_OF_A_LORA),
    _smaller_pictures,
)
