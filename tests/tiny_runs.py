"""Tiny training runs for the tests of everything that trains; the start that they tune has a few thousand
parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRANSFORMER = {
    "in_channels": 1,
    "out_channels": 1,
    "sample_size": 8,
    "patch_size": 2,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 16,
    "mlp_ratio": 1.0,
    "interpolation_scale": 1,
    "dropout": 0.1,
}
TEXT_ENCODER = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}


def make_start(folder: Path) -> Path:
    """Saves a model with random weights: enough for everything but pretty pictures."""
    pytest.importorskip("diffusers")
    pytest.importorskip("sklearn")
    from apex_fast.backbones.sana import SanaBackbone
    from apex_fast.data.digits import all_prompts

    SanaBackbone.from_config(TRANSFORMER, TEXT_ENCODER, all_prompts(), vocab_size=300).save_pretrained(folder)
    return folder


def make_pipeline(folder: Path, family: str, *, seed: int = 0) -> Path:
    """Saves the tiny random pipeline of ``family`` in ``folder``, and eight captioned pictures beside it."""
    pytest.importorskip("diffusers")
    from apex_fast.backbones.tiny import save_tiny_pipeline
    from apex_fast.training.smoke import render_pictures

    render_pictures(folder / "pictures")
    return save_tiny_pipeline(family, folder / family, seed=seed)


def keys(start: Path, output_dir: Path, *more: str) -> list[str]:
    """Command-line keys of a run of four tiny steps; ``more`` comes on top."""
    base = {
        "pretrained_model_name_or_path": str(start),
        "output_dir": str(output_dir),
        "max_train_steps": "4",
        "train_batch_size": "8",
        "logging_steps": "1",
        "objective.warmup_steps": "1",
        "objective.ramp_steps": "1",
        "real_branch": "ema",
        "device": "cpu",
        "report_to": "none",
        "validation_base_inference_steps": "null",
    }
    return _words(base, more)


def pipeline_keys(model: Path, output_dir: Path, *more: str) -> list[str]:
    """The same for what :func:`make_pipeline` saved: batches of two pictures of 32 x 32 pixels."""
    base = {
        "pretrained_model_name_or_path": str(model),
        "dataset_name": str(model.parent / "pictures"),
        "resolution": "32",
        "output_dir": str(output_dir),
        "max_train_steps": "4",
        "train_batch_size": "2",
        "logging_steps": "1",
        "objective.warmup_steps": "1",
        "objective.ramp_steps": "1",
        "device": "cpu",
        "report_to": "none",
        "validation_base_inference_steps": "null",
    }
    return _words(base, more)


def _words(base: dict[str, str], more: tuple[str, ...]) -> list[str]:
    for name, value in zip(more[::2], more[1::2], strict=True):
        base[name.removeprefix("--")] = value
    return [word for name, value in base.items() for word in (f"--{name}", value)]


def losses(output_dir: Path) -> list[tuple[int, float, float, float]]:
    """(step, L_fake, L_correction, gradient norm) of every line of metrics.jsonl, exact."""
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss_fake"], r["loss_correction"], r["grad_norm"]) for r in records if "loss_fake" in r]


def start_process(arguments: list[str]) -> subprocess.Popen[str]:
    """A real Python process on one thread that finds these modules too; stdout and stderr are pipes of text."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
