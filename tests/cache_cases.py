"""Small runs and caches for the tests of both."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tiny_runs import pipeline_keys

from apex_fast.caching import build as building
from apex_fast.training.config import TrainConfig, load_config

LORA = ("--rank", "4", "--learning_rate", "1e-3", "--probe", "false")


def keys(model: Path, folder: Path, *more: str) -> list[str]:
    return pipeline_keys(model, folder, *LORA, "--max_train_steps", "2", *more)


def config_of(model: Path, folder: Path, *more: str) -> TrainConfig:
    return load_config(None, keys(model, folder, *more))


def build(config: TrainConfig, **options: object) -> Path:
    return building.build(config, say=lambda line: None, **options)  # type: ignore[arg-type]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*.safetensors"))
    }


def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight pictures make eight shards."""
    monkeypatch.setattr(building, "PICTURES_IN_A_SHARD", 1)
    monkeypatch.setattr(building, "PROMPTS_IN_A_SHARD", 2)
