"""The model card: README.md with what was trained, how it scored, and code that samples with it.

The code block is complete: it runs as it stands where the base model can be loaded, and a test runs it for every
family. Its variables come first; ``steps`` and ``renoise`` choose among the modes of the table below it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apex_fast.export.schedulers import call_arguments, modes
from apex_fast.export.source import UNKNOWN_LICENCE, Source
from apex_fast.export.stock import START_LORA
from apex_fast.extras import require
from apex_fast.lora import WEIGHTS
from apex_fast.training.models import is_hub_id
from apex_fast.training.provenance import README

PICTURE = "samples.png"
TRAINING = (
    ("loss_fake", "L_fake"),
    ("loss_correction", "L_correction"),
    ("loss_supervised", "L_sup"),
    ("dv_relative", "v_shift - v_real, relative"),
)
"""Columns of the table of the training: keys of metrics.jsonl and their headings."""


def write_card(source: Source, folder: Path, merge: bool) -> Path:
    """Writes README.md into ``folder``, and beside it the last picture that a validation of the run drew."""
    picture = copy_picture(source, folder)
    path = folder / README
    path.write_text(card(source, merge, picture=picture), encoding="utf-8")
    return path


def copy_picture(source: Source, folder: Path) -> str:
    """Copies the last grid of validation pictures into ``folder``; how a card shows it, empty where there is none."""
    if not source.pictures:
        return ""
    shutil.copyfile(source.pictures[-1], folder / PICTURE)
    said = f"![Samples of the validation prompts]({PICTURE})"
    return f"{said}\n\n{_steps(source.steps).capitalize()}, the validation prompts, one row each."


def card(source: Source, merge: bool, *, picture: str) -> str:
    """The text of the card; ``picture`` is what :func:`copy_picture` gave."""
    parts = [front_matter_text(source, merge, ("diffusers",)), f"# {source.name}", what(source, merge)]
    if picture:
        parts.append(picture)
    parts += [
        "## Use it",
        f"```python\n{snippet(source, merge)}```",
        _modes(source),
        "## How it was made",
        settings_table(source),
    ]
    if table := metrics_table(source):
        parts += ["## Metrics", table]
    return "\n\n".join(parts) + "\n"


# ---- parts


def front_matter_text(source: Source, merge: bool, tools: Sequence[str]) -> str:
    """The settings that a model card begins with; ``tools`` read the files beside it."""
    values: dict[str, Any] = {}
    if is_hub_id(source.base):
        values["base_model"] = source.base
        values["base_model_relation"] = "adapter" if source.mode == "lora" and not merge else "finetune"
    licence, _, name = source.licence.partition(" (")
    if source.licence != UNKNOWN_LICENCE:
        values["license"] = licence
        if name:
            values["license_name"] = name.removesuffix(")")
    if "diffusers" in tools:
        values["library_name"] = "diffusers"
    values["pipeline_tag"] = "text-to-image"
    kind = ["lora"] if source.mode == "lora" and not merge else []
    values["tags"] = ["apex_fast", *tools, "text-to-image", "few-step", source.family, *kind]
    return f"---\n{require('yaml', extra='train').safe_dump(values, sort_keys=False)}---"


def what(source: Source, merge: bool, rest: str = " The other parts of the pipeline are the base's own.") -> str:
    """What was tuned and how, in a paragraph; ``rest`` is said of a merged model of full tuning."""
    base = f"[{source.base}](https://huggingface.co/{source.base})" if is_hub_id(source.base) else f"`{source.base}`"
    kind = "A LoRA on" if source.mode == "lora" else "All parameters of the transformer of"
    merged = " It is merged into the weights here." if source.mode == "lora" and merge else ""
    if source.mode == "full" and merge:
        merged = rest
    return (
        f"{kind} {base}, tuned to make a picture in {_steps(source.steps)} by "
        "[APEX](https://arxiv.org/abs/2604.12322) (self-adversarial training by condition shifting) with apex_fast."
        f"{merged} Licence of the base model: {source.licence}."
    )


def _steps(count: int) -> str:
    return "one step" if count == 1 else f"{count} steps"


def snippet(source: Source, merge: bool) -> str:
    """Python that loads the exported folder into the stock pipeline and draws one picture."""
    cls, record = source.backbone_class, source.record
    lone = source.mode == "full" and not merge
    dtype = "bfloat16" if record.weight_dtype == "bf16" else "float32"
    imports = sorted(["FlowMatchEulerDiscreteScheduler", cls.pipeline_class, *([cls.transformer_class] * lone)])
    lines = ["import torch", f"from diffusers import {', '.join(imports)}", ""]
    if not merge:
        lines.append(f"base = {json.dumps(source.base)}")
    lines += [
        'folder = "."  # of this file',
        f"prompt = {json.dumps(source.prompt, ensure_ascii=False)}",
        f"steps = {source.steps}",
        "renoise = False  # True: new noise in every step, instead of Euler steps",
        f"dtype = torch.{dtype}",
        "",
    ]
    where = [f"{key}={json.dumps(value)}" for key in ("revision", "variant") if (value := getattr(record, key))]
    load = ", ".join(["base", *where, "dtype=dtype"])
    if merge:
        lines.append(f"pipeline = {cls.pipeline_class}.from_pretrained(folder, dtype=dtype)")
    elif lone:
        load = load.replace("base", "base, transformer=transformer", 1)
        lines += [
            f"transformer = {cls.transformer_class}.from_pretrained(",
            '    folder, subfolder="transformer", dtype=dtype',
            ")",
            f"pipeline = {cls.pipeline_class}.from_pretrained({load})",
        ]
    elif source.start_lora is None:
        lines += [
            f"pipeline = {cls.pipeline_class}.from_pretrained({load})",
            f'pipeline.load_lora_weights(folder, weight_name="{WEIGHTS}")',
        ]
    else:
        lines += [
            f"pipeline = {cls.pipeline_class}.from_pretrained({load})",
            f'pipeline.load_lora_weights(folder, weight_name="{START_LORA}", adapter_name="start")',
            f'pipeline.load_lora_weights(folder, weight_name="{WEIGHTS}", adapter_name="few_step")',
            'pipeline.set_adapters(["start", "few_step"])',
        ]
    arguments = call_arguments(source.family, embedded_guidance=record.embedded_guidance)
    if record.max_sequence_length is not None:
        arguments["max_sequence_length"] = record.max_sequence_length
    lines += [
        "pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(",
        '    folder, subfolder="scheduler", stochastic_sampling=renoise',
        ")",
        'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")',
        "",
        "image = pipeline(",
        "    prompt,",
        f"    height={source.resolution[0]},",
        f"    width={source.resolution[1]},",
        "    num_inference_steps=steps,",
        "    sigmas=[1 - i / steps for i in range(steps)],",
        *(f"    {name}={value!r}," for name, value in arguments.items()),
        '    generator=torch.Generator("cpu").manual_seed(0),',
        ").images[0]",
        'image.save("picture.png")',
        "",
    ]
    return "\n".join(lines)


def _modes(source: Source) -> str:
    table = modes(source.family, source.record.weight_dtype)
    rows = [f"| {mode.name} | {mode.reproduced} | {mode.how} |" for mode in table]
    return "\n".join(
        [
            "What this pipeline and the exported scheduler reproduce of apex_fast's own sampler, to rounding:",
            "",
            "| mode | reproduced | how |",
            "| --- | --- | --- |",
            *rows,
            "",
            f"The weights were made for {_steps(source.steps)}; the modes say how they are sampled, not how good other "
            "numbers of steps look.",
        ]
    )


def settings_table(source: Source) -> str:
    """What was trained, on what and how, as a table."""
    record, shift = source.record, source.shift
    rows = [("base model", f"`{source.base}`" + (f", revision `{record.revision}`" if record.revision else ""))]
    if source.mode == "lora":
        kind = "".join(
            f", {name}"
            for key, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA"))
            if (record.lora or {}).get(key)
        )
        rows.append(("trained", f"a LoRA of rank {source.lora_rank}, alpha {source.lora_alpha:g}{kind}"))
    else:
        rows.append(("trained", "all parameters of the transformer"))
    if source.train_steps is not None:
        rows.append(("training steps", f"{source.train_steps:,}"))
    rows.append(("sampling steps", str(source.steps)))
    rows.append(("resolution", f"{source.resolution[0]} x {source.resolution[1]} (height x width)"))
    if shift is not None:
        text = f"c_fake = {shift['scale']:g} c + {shift['bias']:g}, {shift['mode']}"
        rows.append(("condition shift", text + _learned(source)))
        rows.append(("site of the shift", str(shift.get("site", "raw"))))
    if source.config.get("loss"):
        rows.append(("loss", str(source.config["loss"])))
    stored = record.weight_dtype + (f", quantised to {record.quantization}" if record.quantization else "")
    rows.append(("weights of the base in training", stored))
    if source.start_lora is not None:
        rows.append(("started from", f"another LoRA, `{START_LORA}`, which has to be loaded too"))
    rows.append(("library", source.metadata["library"]))
    table = [f"| {name} | {value} |" for name, value in rows]
    text = "\n".join(["| setting | value |", "| --- | --- |", *table])
    if record.quantization:
        text += (
            f"\n\nIt was trained on weights in {record.quantization}, and these files belong on the weights as they "
            "were published. The two differ by the rounding of the quantisation, which few-step models feel most."
        )
    return text


def _learned(source: Source) -> str:
    """Which parts of the shift were learned, and what they came to."""
    if not source.learned_parts:
        return ""
    names = " and ".join(source.learned_parts)
    if not source.learned_shift:
        return f", {names} learned from there (what they came to was in checkpoints that are gone)"
    came = []
    for name, value in source.learned_shift.items():
        shown = f"{value:.4g}" if isinstance(value, float) else "{1:.4g} (mean; {0:.4g} to {2:.4g})".format(*value)
        pooled = " of the pooled text" if name.startswith("pooled_") else ""
        came.append(f"{name.removeprefix('pooled_')}{pooled} {shown}")
    return f", {names} learned from there, to {', '.join(came)}"


def metrics_table(source: Source) -> str:
    """Scores of the validations, if the run scored any, and what the losses were at the start and the end."""
    parts = []
    scored = [line for line in source.metrics if any(key.startswith("validation/") for key in line)]
    if scored:
        names = [key for key in scored[-1] if key.startswith("validation/")]
        heads = [key.removeprefix("validation/") for key in names]
        parts.append(_table(["step", *heads], [[line["step"], *(line.get(n) for n in names)] for line in scored[-8:]]))
    trained = [line for line in source.metrics if "loss_total" in line or "loss_fake" in line]
    columns = [(key, head) for key, head in TRAINING if any(key in line for line in trained)]
    if columns:
        shown = trained if len(trained) <= 4 else [trained[0], trained[len(trained) // 2], trained[-1]]
        rows = [[line["step"], *(line.get(key) for key, _ in columns)] for line in shown]
        parts.append(
            _table(["training step", *(head for _, head in columns)], rows)
            + "\n\nLosses of this kind do not rank models: look at the pictures."
        )
    return "\n\n".join(parts)


def _table(heads: list[str], rows: list[list[Any]]) -> str:
    def shown(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [heads, ["---"] * len(heads), *([shown(v) for v in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
