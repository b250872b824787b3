"""A plan in words and tables, and the command that prints it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apex_fast.planning.planner import Plan, plan
from apex_fast.planning.stages import PICTURES, PROMPTS, STEP, VALIDATION, Stage
from apex_fast.planning.step import AVERAGE, FROZEN, GRADIENTS, OPTIMIZER, REAL, TRAINED
from apex_fast.planning.ways import CONTEXT, GIB, MARGIN, Way
from apex_fast.training.config import load_config
from apex_fast.training.settings import SettingsError

USAGE = """usage: apex-fast plan CONFIG.yaml [--key value ...] [--gpu 24GB] [--gpus N]
                      [--throughput FORWARDS_PER_SECOND | --tflops T] [--json FILE]

Memory, passes and hours of a run, computed from configurations: nothing is loaded, downloaded or trained.

  --gpu 24GB        say whether the run fits into a GPU that is sold as 24 GB, and if not which settings make it fit
  --gpus N          N GPUs in parallel, each with the batch of the config (the trainer runs on one so far)
  --throughput P    hours, from P forwards of the batch per second (without gradient, as measured on that GPU)
  --tflops T        hours, from T x 1e12 operations per second instead; an assumption
  --json FILE       write the plan as JSON too

Every key of the config can be set on the command line, as in `apex-fast train`.
"""

_OWN = ("gpu", "gpus", "throughput", "tflops", "json")


def main(arguments: Sequence[str]) -> int:
    """``apex-fast plan``: prints a plan; 0, or 1 if a GPU was named and the run does not fit, 2 for wrong usage.

    Raises:
        SettingsError: wrong usage; the message says what to write.
    """
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    own, rest = _split(arguments)
    path = None
    if rest[:1] == ["--config"]:
        rest = rest[1:]
    if rest and not rest[0].startswith("--"):
        path, rest = rest[0], rest[1:]
    config = load_config(path, rest)
    try:
        made = plan(
            config,
            gpu=None if "gpu" not in own else gpu_bytes(own["gpu"]),
            gpus=int(_number(own, "gpus") or 1),
            throughput=_number(own, "throughput"),
            tflops=_number(own, "tflops"),
        )
    except ValueError as error:
        raise SettingsError(str(error)) from error
    print(table(made))
    if "json" in own:
        Path(own["json"]).write_text(json.dumps(as_mapping(made), indent=2) + "\n", encoding="utf-8")
        print(own["json"])
    return 1 if made.fits is False else 0


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The command's own options, and what is for the config."""
    own: dict[str, str] = {}
    rest: list[str] = []
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in _OWN:
            rest.append(word)
            continue
        if not equals:
            if position == len(arguments):
                raise SettingsError(f"--{name} needs a value; see apex-fast plan --help")
            value = arguments[position]
            position += 1
        own[name] = value
    return own, rest


def _number(own: dict[str, str], name: str) -> float | None:
    if name not in own:
        return None
    try:
        return float(own[name])
    except ValueError:
        raise SettingsError(f"--{name} must be a number, got {own[name]!r}") from None


def gpu_bytes(text: str) -> int:
    """Bytes of "24GB", "24GiB", "24G" or "24": cards are sold in GB and have as many GiB, to a per cent.

    Raises:
        SettingsError: no size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:G|GB|GiB)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise SettingsError(f"--gpu must be the memory of a GPU such as 24GB, got {text!r}")
    return round(float(match[1]) * GIB)


# ---- words

_NF4 = "nf4: bitsandbytes puts the transformer on the GPU when it is loaded, so it is there while the data is encoded"


def table(made: Plan) -> str:
    """The plan as the command prints it."""
    lines = [*_head(made), "", *_held(made), "", *_table_of_ways(made), "", *_stages(made), "", *_time(made)]
    if made.gpu is not None:
        lines += ["", *_fit(made)]
    lines += ["", *_not_counted(made)]
    return "\n".join(lines)


def _head(made: Plan) -> list[str]:
    config, step = made.config, made.chosen.step
    height, width = made.model.pixels(config.image_size)
    what = f"LoRA of rank {config.rank}" if config.mode == "lora" else "all parameters"
    lines = [
        f"{made.model.name} ({made.model.family}, {_count(step.parameters)} parameters), {what}: "
        f"{_count(step.trained)} trained",
        f"{width} x {height} pixels, batch {config.train_batch_size}"
        + (f" x {config.gradient_accumulation_steps} passes" if config.gradient_accumulation_steps > 1 else "")
        + f", loss {config.loss}, weights {config.quantization or config.weight_dtype}"
        + (f", autocast {config.mixed_precision}" if config.mixed_precision != "no" else ""),
        f"configuration from {made.model.source}",
    ]
    if made.model.unverified:
        lines.append("not compared with the published files: " + "; ".join(made.model.unverified))
    return lines


def _held(made: Plan) -> list[str]:
    config, held = made.config, made.held
    precision = config.quantization or config.weight_dtype
    trained_in = config.lora_dtype if config.mode == "lora" else config.weight_dtype
    frozen_by = {"lora": "the base with its adapter off: no copy", "full": "a copy of the start"}[config.mode]
    real = {"frozen": frozen_by, "ema": "an average", "live": "the live network: no copy"}[config.real_branch_in_use]
    eight = config.optimizer == "adamw_8bit"
    rows = [
        (f"frozen weights ({precision})", held.get(FROZEN, 0)),
        (f"trained weights ({trained_in})", held.get(TRAINED, 0)),
        (f"real branch ({real})", held.get(REAL, 0)),
        ("gradients", held.get(GRADIENTS, 0)),
        (f"optimizer state (AdamW, two moments{' in 8 bits' if eight else ''})", held.get(OPTIMIZER, 0)),
        ("average of the trained weights (ema_decay)", held.get(AVERAGE, 0)),
    ]
    if made.embeddings:
        rows.append(("cached embeddings, at most (the rest stays in main memory)", made.embeddings))
    if made.own_text:
        rows.append(("text encoder of the model's own", made.own_text))
    if made.kept_vae:
        rows.append(("VAE, for validation pictures", made.kept_vae))
    if made.buckets:
        rows.append(("gradient buckets of data parallel training", made.buckets))
    unit, name_of_unit = _unit(made)
    lines = [
        f"{'held on the GPU':<62}{name_of_unit:>10}",
        *(f"  {name:<60}{size / unit:>10.2f}" for name, size in rows),
    ]
    return lines


def _unit(made: Plan) -> tuple[int, str]:
    return (GIB, "GiB") if made.needed - CONTEXT >= GIB else (1 << 20, "MiB")


def _table_of_ways(made: Plan) -> list[str]:
    unit, name_of_unit = _unit(made)
    lines = [
        f"peak of a step, {name_of_unit}",
        f"  {'schedule':<12}{'checkpointing':<15}{'come and go':>13}{'needed in it':>15}{'passes':>9}",
    ]
    for way in made.ways:
        mark = "  <- this config" if way is made.chosen else ""
        forwards = way.passes.total_in_forwards
        lines.append(
            f"  {way.schedule:<12}{'yes' if way.checkpointing else 'no':<15}{way.step.transient / unit:>13.2f}"
            f"{way.needed / unit:>15.2f}{forwards:>7} F{mark}"
        )
    lines.append("  come and go: activations, gradients and temporary tensors of passes and backwards")
    lines.append(
        f"  needed in it: the peak, {MARGIN:.0%} of what comes and goes for the allocator, "
        f"{CONTEXT / GIB:g} GiB for CUDA"
    )
    lines.append(f"  the peak of this config is reached {_moment(made.chosen)}")
    return lines


def _stages(made: Plan) -> list[str]:
    unit, name_of_unit = _unit(made)
    lines = [f"{'needed on the GPU, one after the other':<62}{name_of_unit:>10}"]
    for stage in made.stages:
        mark = "  <- the most" if stage is made.fullest and len(made.stages) > 1 else ""
        lines.append(f"  {_stage_in_words(made, stage):<60}{stage.needed / unit:>10.2f}{mark}")
    if made.config.quantization == "nf4" and len(made.stages) > 1:
        lines.append(f"  {_NF4}")
    lines.append(f"{'needed in main memory':<62}{name_of_unit:>10}")
    parts = "text encoders and VAE" if made.config.quantization == "nf4" else "transformer, text encoders and VAE"
    what = "the model" if made.model.own_text else f"{parts} at once"
    lines.append(f"  {'loading: ' + what:<60}{made.host / unit:>10.2f}")
    step = made.chosen.step
    if waiting := step.waiting_weights + step.waiting_activations:
        lines.append(f"  {'a step: offloaded frozen weights and activations, pinned':<60}{waiting / unit:>10.2f}")
    lines.append("  a file of weights while it is read, and later latents and embeddings of the data, are not in it")
    return lines


def _stage_in_words(made: Plan, stage: Stage) -> str:
    counted = "" if stage.activations is not None else ", activations not counted"
    return {
        PROMPTS: f"encoding prompts: text encoders{counted}",
        PICTURES: f"encoding pictures one at a time: VAE{counted}",
        STEP: "a step of this config",
        VALIDATION: f"validation: decoding one picture{counted}",
    }[stage.name]


def _moment(way: Way) -> str:
    name, _ = way.step.peak_moment
    return {
        "backward": "in a backward",
        OPTIMIZER: "while the optimizer updates the weights",
        "generator": "in the generator's forward",
        "shifted": "in the shifted branch's forward",
        "real": "in the real branch's forward",
    }.get(name, "between the passes")


def _time(made: Plan) -> list[str]:
    config, way = made.config, made.chosen
    guided = (
        "" if made.guidance is None else f"; the real branch is guided by {made.guidance:g}, which is one of the passes"
    )
    lines = [
        f"a pass of a step: {way.passes}, F one forward of the batch{guided}",
        f"an optimizer step: {made.flops / 1e12:.4g} TFLOP, as much as {made.forwards:.1f} forwards"
        + (" (frozen weights need no gradient)" if config.mode == "lora" else ""),
    ]
    if made.hours is None:
        lines.append("hours: give --throughput (measured) or --tflops (assumed)")
    else:
        lines.append(f"{config.max_train_steps} steps: {_hours(made.hours)} at {made.rate}")
    if made.gpus > 1:
        lines.append(
            f"{made.gpus} GPUs: every one needs all of the above and sees its own batch, so a step has "
            f"{made.gpus * config.train_batch_size * config.gradient_accumulation_steps} samples and takes as long; "
            "communication is not counted. This is a plan only: `apex-fast train` runs as one process on one GPU so far"
        )
    return lines


def _fit(made: Plan) -> list[str]:
    assert made.gpu is not None
    spare = made.gpu - made.needed
    size = f"{made.gpu / GIB:g} GiB"
    if spare >= 0:
        return [f"fits into {size}: {spare / GIB:.2f} GiB to spare"]
    too_much = [stage for stage in made.stages if stage.needed > made.gpu]
    stages = ", ".join(f"{stage.name} {(stage.needed - made.gpu) / GIB:.2f} GiB" for stage in too_much)
    lines = [f"does not fit into {size}: {-spare / GIB:.2f} GiB too much"]
    if len(made.stages) > 1:
        lines[0] += f" (by stage: {stages})"
    advice = made.advice
    if advice is None:
        return lines
    flags = " ".join(f"--{name} {_value(value)}" for name, value in advice.changes.items())
    if advice.fits:
        lines.append(
            f"it fits with {flags}: needs {advice.needed / GIB:.2f} GiB, "
            f"{(made.gpu - advice.needed) / GIB:.2f} GiB to spare (planned with these settings)"
        )
    else:
        tried = "nothing that was tried helps"
        if flags:
            tried = f"with {flags} it still needs {advice.needed / GIB:.2f} GiB ({advice.fullest})"
        lines.append(f"no settings make it fit: {tried}. Take a smaller model or a larger GPU")
        if advice.changes.get("quantization") == "nf4" and advice.fullest in (PROMPTS, PICTURES):
            lines.append(f"({_NF4})")
    return lines


def _not_counted(made: Plan) -> list[str]:
    lines = [
        "Not counted: what kernels take and give back within one operation (workspaces of matrix products,",
        "convolutions and attention), fragmentation beyond the margin, activations of text encoders, the passes that",
        "sample for validation (without gradient, one picture at a time), other programs on the GPU. Prompts are",
        "planned at the most tokens that the model's text encoding gives. The count equals that of the same step on a",
        "CPU; it was not compared with the allocator of a GPU.",
    ]
    if made.config.mixed_precision != "no":
        lines.append(
            "Autocast is planned by the list of operations that CUDA casts, as far as diffusers' networks use them."
        )
    return lines + [f"Careful: {note}." for note in made.notes]


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def as_mapping(made: Plan) -> Mapping[str, Any]:
    """A plan as plain values, for JSON; memory in bytes."""

    def way(found: Way) -> dict[str, Any]:
        return {
            "schedule": found.schedule,
            "gradient_checkpointing": found.checkpointing,
            "transient": found.step.transient,
            "peak": found.step.peak,
            "peak_at": {name: round(size) for name, size in found.step.peak_moment[1].items()},
            "needed": found.needed,
            "passes_in_forwards": found.passes.total_in_forwards,
            "flops": found.step.flops,
        }

    height, width = made.model.pixels(made.config.image_size)
    return {
        "model": made.model.name,
        "family": made.model.family,
        "source": made.model.source,
        "unverified": list(made.model.unverified),
        "parameters": round(made.chosen.step.parameters),
        "trained_parameters": round(made.chosen.step.trained),
        "resolution": [height, width],
        "held": made.held,
        "cached_embeddings": made.embeddings,
        "stages": [dataclasses.asdict(stage) for stage in made.stages],
        "main_memory_for_loading": made.host,
        "vae_for_validation": made.kept_vae,
        "own_text_encoder": made.own_text,
        "data_parallel_buckets": made.buckets,
        "guidance_scale": made.guidance,
        "chosen": way(made.chosen),
        "ways": [way(found) for found in made.ways],
        "flops_per_optimizer_step": made.flops,
        "forwards_per_optimizer_step": made.forwards,
        "max_train_steps": made.config.max_train_steps,
        "hours": made.hours,
        "needed": made.needed,
        "gpu": made.gpu,
        "gpus": made.gpus,
        "fits": made.fits,
        "advice": None if made.advice is None else dataclasses.asdict(made.advice),
        "added": {"cuda_context": CONTEXT, "margin": MARGIN},
        "notes": made.notes,
    }
