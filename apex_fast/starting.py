"""``apex-fast init``: a commented config to start from, with the values of the paper where it gives them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

from apex_fast.backbones.base import Backbone
from apex_fast.backbones.loading import FAMILIES, backbone_class
from apex_fast.command import command_name
from apex_fast.planning.published import PUBLISHED
from apex_fast.training.settings import SettingsError

Mode = Literal["full", "lora"]

DEFAULT_MODELS = {
    "sana": "Efficient-Large-Model/Sana_600M_512px_diffusers",
    "qwen_image": "Qwen/Qwen-Image",
    "flux": "black-forest-labs/FLUX.1-dev",
    "z_image": "Tongyi-MAI/Z-Image",
    "stable_diffusion_3": "stabilityai/stable-diffusion-3.5-medium",
    "lumina2": "Alpha-VLLM/Lumina-Image-2.0",
}

_SANA_1_6B = "Efficient-Large-Model/Sana_1600M_1024px_diffusers"

EXAMPLES: dict[str, tuple[str, Mode, str]] = {
    "sana_0.6b_full": ("sana", "full", DEFAULT_MODELS["sana"]),
    "sana_0.6b_lora": ("sana", "lora", DEFAULT_MODELS["sana"]),
    "sana_1.6b_full": ("sana", "full", _SANA_1_6B),
    "qwen_image_lora": ("qwen_image", "lora", DEFAULT_MODELS["qwen_image"]),
    "flux_lora": ("flux", "lora", DEFAULT_MODELS["flux"]),
    "sd35_lora": ("stable_diffusion_3", "lora", DEFAULT_MODELS["stable_diffusion_3"]),
    "z_image_lora": ("z_image", "lora", DEFAULT_MODELS["z_image"]),
}
"""The configs in ``examples/`` that :func:`starting_config` writes: name -> family, mode, model."""


def starting_config(family: str, mode: Mode, *, model: str | None = None, path: str | Path = "run.yaml") -> str:
    """The text of a config for ``family``.

    Args:
        family: one of ``apex_fast.backbones.loading.FAMILIES``.
        mode: tune all parameters, or a LoRA.
        model: folder or hub id; None is the family's best-known one.
        path: where the text will be written; the commands in it name that file, and the run is called like it.

    Raises:
        SettingsError: an unknown family or mode, or a model that is known to be of another family.
    """
    if family not in FAMILIES:
        raise SettingsError(f"init: no such family: {family}; expected one of {', '.join(FAMILIES)}")
    if mode not in ("full", "lora"):
        raise SettingsError(f"init: mode must be full or lora, got {mode}")
    model = model or DEFAULT_MODELS[family]
    known = PUBLISHED.get(model)
    if known is not None and known.family != family:
        raise SettingsError(f"init: {model} is of the family {known.family}, not {family}")
    backbone, path = backbone_class(family), Path(path)
    lora, name = mode == "lora", path.stem
    batch = 8 if family == "sana" else 1
    what = "a LoRA on" if lora else "all parameters of"
    file = shlex.quote(str(path))
    return f"""\
# One step instead of many: {what} {model}.
#   apex-fast plan {file}              # memory, passes of a step, hours; downloads nothing
#   apex-fast train {file} --smoke     # the wiring, on a tiny random model, in a minute
#   apex-fast train {file}
# "paper" marks values that APEX (arXiv 2604.12322) gives, "open" what it leaves open: a place to start tuning from.
output_dir: runs/{name}

# The model: a hub id, or the folder of a download.
family: {family}
pretrained_model_name_or_path: {model}
{_weights(lora)}
gradient_checkpointing: true       # less memory, about a third more time

{_lora(lora)}\
# The data: replace by your folder of pictures with captions, either metadata.jsonl with lines such as
# {{"file_name": "a.png", "text": "a red cat"}}, or a.txt beside a.png.
dataset_name: data/train
{_resolution(model)}
train_batch_size: {batch}                # {batch} x {64 // batch} = 64, the global batch size (paper)
gradient_accumulation_steps: {64 // batch}

# The objective.
loss: correction                   # "paper" is Eq. 25 to the letter; see what was measured in docs/method.md
schedule: sequential               # one graph at a time: the least memory
real_branch: auto                  # {_real(lora)}
{_guidance(family, backbone, model)}
shift:                             # c_fake = scale * c + bias; good: scale -1 to -0.5, bias 0.1 to 1 (paper, Table 7)
  scale: -1.0
  bias: 0.5
objective:
  correction_weight: 4.0           # better than 2 on scanned digits, beside a frozen start (docs/recipe.md)
  warmup_steps: null               # null: a tenth of the run, at most 150
  ramp_steps: null                 # null: an eighth of the run, at most 200

{_optimizer(lora)}

validation_prompts: ["a photo of a red cat on a wooden chair", "a bowl of fruit on a blue table"]
validation_steps: 250
validation_images_per_prompt: 2
checkpointing_steps: 250
checkpoints_total_limit: 2
logging_steps: 5
seed: 0
"""


def _weights(lora: bool) -> str:
    if lora:
        return """\
weight_dtype: bf16                 # of the frozen base: 2 bytes a parameter
mixed_precision: bf16              # the adapter, held in fp32, computes in bf16 too (paper)
quantization: null                 # int8: 1 byte a parameter; nf4: half a byte, on a GPU only"""
    return """\
weight_dtype: fp32                 # in bf16 small updates would be lost
mixed_precision: bf16              # computes in bf16 (paper)"""


def _lora(lora: bool) -> str:
    if not lora:
        return ""
    return """\
rank: 64                           # paper: 32 and 64, with like results
lora_alpha: null                   # open; null is rank, a scale of 1
lora_dropout: 0.0
lora_target_modules: null          # open; null is attention, feed-forward, modulation and the time (docs/lora.md)
start_lora: null                   # a LoRA of your own to start from, with start_lora_mode: merge, frozen or continue

"""


def _resolution(model: str) -> str:
    known = PUBLISHED.get(model)
    if known is None:
        return "resolution: null                   # null: the size that the model was built for; or [height, width]"
    return f"resolution: {known.resolution:<22} # the size that the model was made for; or [height, width]"


def _real(lora: bool) -> str:
    if lora:
        return "the base with the LoRA off: no copy of the weights"
    return "a frozen copy of the start, one more copy of the weights"


def _guidance(family: str, backbone: type[Backbone], model: str) -> str:
    teacher = backbone.teacher_guidance
    known = PUBLISHED.get(model)
    if teacher.embedded is None and known is not None and not known.guided:
        none = 0.0 if family == "z_image" else 1.0
        return f"guidance_scale: {none:<18} # none: these weights were made to be used without guidance"
    if family == "qwen_image":
        return """\
# The pipeline guides only if it is given a negative prompt; its users give it " ". One more pass a step.
guidance_scale: 4.0
negative_prompt: " \""""
    if teacher.embedded is not None:
        return f"""\
embedded_guidance_scale: {teacher.embedded:<10} # an input of these weights, as the pipeline sets it
guidance_scale: null               # null: the real branch is not guided beyond that, as the pipeline does"""
    usual = f'{teacher.scale:g} away from "{teacher.negative_prompt}"'
    return f"""\
guidance_scale: null               # null: {usual}, as {backbone.pipeline_class} guides; one more pass"""


def _optimizer(lora: bool) -> str:
    steps, rate, decay = ("2000", "1e-4", "0.99") if lora else ("10000", "2e-5", "0.999")
    grade = "2K steps for LoRA" if lora else "8K to 10K steps for 0.6B and 1.6B"
    return f"""\
max_train_steps: {steps:<17} # paper: {grade}
learning_rate: {rate:<19} # open
lr_scheduler: cosine               # open; what swings at a constant rate comes to rest (docs/digits.md)
lr_warmup_steps: 50                # open
adam_beta2: 0.99                   # open
max_grad_norm: 1.0                 # open
ema_decay: {decay:<23} # open; of the average that is evaluated and saved"""


def write_starting_config(family: str, mode: Mode, path: str | Path, *, model: str | None = None) -> str:
    """Writes :func:`starting_config` to ``path``; returns the lines that say what to type next.

    Raises:
        SettingsError: as :func:`starting_config`, or the file exists: nothing is ever overwritten.
    """
    path = Path(path)
    text = starting_config(family, mode, model=model, path=path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise SettingsError(f"init: {path} exists already; write another -o, or delete it") from None
    command, place = command_name(), shlex.quote(str(path))
    return (
        f"wrote {path}; set dataset_name in it, then:\n"
        f"  {command} plan {place}\n"
        f"  {command} train {place} --smoke\n"
        f"  {command} train {place}"
    )
