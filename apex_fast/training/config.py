"""The keys of a training run: names as the diffusers scripts have them, and APEX's own in the sections ``shift`` and
``objective``."""

from __future__ import annotations

import dataclasses
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from apex_fast.objective import ApexObjective
from apex_fast.path import TimeDistribution
from apex_fast.shift import ConditionShift
from apex_fast.training.foreign_keys import FOREIGN_KEYS
from apex_fast.training.settings import (
    SettingsError,
    argument_docs,
    build,
    check,
    merge,
    parse_overrides,
    read_yaml,
    setting,
)

DIGITS_START = "digits_start"
"""Name under which the start that ships in the package is reached."""

DIGITS = "digits"
"""Name of the data set that ships with scikit-learn; every other ``dataset_name`` is a folder."""

REAL_BRANCH = {"full": "frozen", "lora": "frozen"}
"""What ``real_branch: auto`` is for each way of tuning: full tuning copies the start, LoRA switches the adapter off."""

# ---- sections


def _section_of(cls: type, name: str, leave_out: Sequence[str]) -> type:
    """A settings class with the fields of the dataclass ``cls``, so that a new field of the objective is a key at
    once."""
    docs, hints = argument_docs(cls), typing.get_type_hints(cls)
    fields = []
    for field in dataclasses.fields(cls):
        if not field.init or field.name in leave_out or field.name.startswith("_"):
            continue
        copy = dataclasses.field(
            default=field.default,
            default_factory=field.default_factory,
            metadata={**field.metadata, "help": field.metadata.get("help") or docs.get(field.name, "")},
        )
        fields.append((field.name, hints[field.name], copy))
    made = dataclasses.make_dataclass(name, fields, frozen=True)
    made.__module__ = __name__
    return made


ObjectiveSettings = _section_of(
    ApexObjective, "ObjectiveSettings", leave_out=("shift", "loss", "total_steps", "guidance_scale")
)
"""Every field of :class:`apex_fast.ApexObjective` but the shift, the loss and the number of steps, which the run knows,
and the guidance, which is the model's own unless the run says otherwise."""


@dataclass(frozen=True)
class ShiftSettings:
    """The condition shift c_fake = A c + b (Eq. 9); see :class:`apex_fast.ConditionShift`."""

    mode: Literal["scalar", "diagonal"] = setting("scalar", help="A and b are one number each, or one per channel.")
    scale: float = setting(-1.0, help="Initial A. 1 with bias 0 is no shift at all: the control that must fail.")
    bias: float = setting(0.5, help="Initial b, in the units of the text at the site.")
    trainable: bool = setting(False, help="Whether A and b are learned (their gradient comes from L_fake).")
    train_scale: bool | None = setting(None, help="The same for A alone; null follows 'trainable'.")
    train_bias: bool | None = setting(None, help="The same for b alone; null follows 'trainable'.")
    shift_pooled: bool = setting(True, help="Whether pooled text embeddings are shifted as well.")
    site: Literal["raw", "projected"] = setting(
        "raw",
        help="raw: the text embedding is shifted. projected: what the network's own text projection makes of it. "
        "`apex-fast probe` shows which one the network sees.",
    )


@dataclass(frozen=True)
class ModelSettings:
    """A new network with random weights, for starts (``loss: flow_matching`` without a pretrained model)."""

    family: Literal["sana", "qwen_image", "z_image", "lumina2"] = setting(
        "sana", help="Family of the network; one that reads a single text encoder."
    )
    transformer: dict[str, Any] = setting(help="Arguments of the family's diffusers transformer.", factory=dict)
    text_encoder: dict[str, Any] = setting(help="Arguments of transformers.T5Config.", factory=dict)
    vocab_size: int = setting(384, help="Upper bound of the tokenizer's vocabulary, at least 259.")
    max_sequence_length: int = setting(16, help="Tokens that every prompt is padded or cut to.")
    sample_size: int | None = setting(
        None, help="Edge of the samples in pixels, where the transformer's arguments do not state it (Qwen-Image)."
    )


# ---- the run


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a training run."""

    output_dir: str = setting(
        help="Folder of the run: checkpoints, metrics.jsonl, samples, the finished model.", group="Run"
    )
    loss: Literal["correction", "paper", "flow_matching"] = setting(
        "correction",
        help="correction: one-step tuning with the correction on generated trajectories (the default). paper: Eq. 25 "
        "to the letter. "
        "flow_matching: plain flow matching, which makes a start.",
    )
    max_train_steps: int = setting(1000, help="Optimizer steps of the whole run, a resumed one included.")
    seed: int = setting(0, help="Of data order, prompts, noise and, for a new network, weights.")
    device: str = setting("auto", help="auto (cuda if there is one, else cpu) or a torch device such as cuda:1.")
    resume_from_checkpoint: str | None = setting(None, help="A checkpoint folder, its name in output_dir, or latest.")
    overwrite_output_dir: bool = setting(
        False, help="Delete the checkpoints and metrics of an earlier run in output_dir."
    )

    pretrained_model_name_or_path: str | None = setting(
        None,
        help="The model to tune: a folder (a diffusers pipeline, or a finished run of full tuning), a hub id such as "
        "Qwen/Qwen-Image, or digits_start for the one that ships in the package. null builds a new one from 'model'.",
        group="Model",
    )
    family: Literal["sana", "qwen_image", "flux", "z_image", "stable_diffusion_3", "lumina2"] | None = setting(
        None,
        help="Family of the model; null reads it from the model. --smoke needs it for a hub id that it does not know.",
    )
    revision: str | None = setting(None, help="Branch, tag or commit of a model on the hub.")
    variant: str | None = setting(None, help="Variant of the weight files, such as fp16.")
    weight_dtype: Literal["fp32", "bf16"] = setting(
        "fp32",
        help="How the weights of the model are stored. bf16 is for LoRA: full tuning would lose small updates in it.",
    )
    quantization: Literal["int8", "nf4"] | None = setting(
        None, help="The frozen base in 8 bits (torchao) or 4 bits (bitsandbytes, GPU only); LoRA only."
    )
    max_sequence_length: int | None = setting(
        None, help="Tokens that prompts are padded or cut to; null is what the model's own pipeline uses."
    )
    embedded_guidance_scale: float | None = setting(
        None, help="Guidance that distilled weights (FLUX.1-dev) take as an input; null is the pipeline's own."
    )
    shift_padding: bool = setting(
        False, help="Whether the shift touches padding tokens, for families that see padding (FLUX, SD3)."
    )
    model: ModelSettings = setting(help="The new network, where no pretrained one is given.", factory=ModelSettings)
    train_text_encoder: bool = setting(
        False, help="Train the text encoder too (loss flow_matching only: the objective needs fixed conditions)."
    )
    gradient_checkpointing: bool = setting(
        False, help="Recompute activations in backward: less memory, about a third more time."
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = setting(
        "no", help="Autocast of the network; weights and optimizer stay as they are. fp16 is not implemented yet."
    )
    compile: bool = setting(False, help="Compile the repeated blocks of the transformer. The first steps are slow.")

    rank: int | None = setting(None, help="Rank of the LoRA; null tunes all parameters.", group="LoRA")
    lora_alpha: float | None = setting(
        None, help="The LoRA is scaled by lora_alpha / rank; null is rank, a scale of 1."
    )
    lora_dropout: float = setting(0.0, help="Dropout on the LoRA's input.")
    use_rslora: bool = setting(False, help="Scale by lora_alpha / sqrt(rank) instead.")
    use_dora: bool = setting(False, help="Weight-decomposed LoRA (DoRA): slower; stock tools differ in reading it.")
    lora_target_modules: list[str] | None = setting(
        None,
        help="Ends of the names of the layers that are adapted; null is the family's attention, feed-forward, "
        "modulation and time embedding.",
    )
    lora_dtype: Literal["fp32", "bf16"] = setting("fp32", help="How the LoRA's own weights are stored and trained.")
    start_lora: str | None = setting(
        None, help="A LoRA to start from: a .safetensors file, its folder, or the folder of an earlier run."
    )
    start_lora_mode: Literal["merge", "frozen", "continue"] = setting(
        "merge",
        help="merge: add it to the weights of the model. frozen: keep it as a second adapter, active in every role. "
        "continue: train it further.",
    )

    dataset_name: str = setting(
        DIGITS,
        help="digits (the scanned digits that scikit-learn ships, with text prompts), or a folder of pictures with "
        "metadata.jsonl (file_name, text) or a .txt caption beside each.",
        group="Data",
    )
    resolution: int | list[int] | None = setting(
        None,
        help="Edge of the square that pictures are resized and cropped to, or [height, width]; null is the size that "
        "the model was built for.",
    )
    train_batch_size: int = setting(64, help="Samples in one pass.")
    gradient_accumulation_steps: int = setting(1, help="Passes whose gradients are averaged for one optimizer step.")
    proportion_empty_prompts: float = setting(
        0.0, help="Share of prompts replaced by the empty one, so that guidance has something to guide from."
    )

    learning_rate: float = setting(3e-4, help="Peak learning rate of AdamW.", group="Optimizer")
    lr_scheduler: Literal["constant", "linear", "cosine"] = setting(
        "constant", help="What follows the warm-up; linear and cosine end at 0."
    )
    lr_warmup_steps: int = setting(0, help="Steps over which the learning rate rises linearly.")
    adam_beta1: float = setting(0.9, help="AdamW's first decay.")
    adam_beta2: float = setting(0.99, help="AdamW's second decay.")
    adam_weight_decay: float = setting(0.0, help="AdamW's weight decay.")
    adam_epsilon: float = setting(1e-8, help="AdamW's epsilon.")
    max_grad_norm: float | None = setting(1.0, help="Gradients are scaled down to this norm; null turns that off.")
    ema_decay: float | None = setting(
        0.99,
        help="Decay of the average of the weights that is evaluated and exported; null uses the weights themselves.",
    )

    schedule: Literal["auto", "sequential", "joint", "retain"] = setting(
        "auto",
        help="How a step is computed; all give the same gradients, except that joint draws other dropout masks. "
        "sequential needs the least memory, joint is fastest for small networks. auto is sequential, or retain where "
        "the paper loss needs it.",
        group="APEX",
    )
    real_branch: Literal["auto", "frozen", "ema", "live"] = setting(
        "auto",
        help="The real branch. frozen: the start, as a copy under full tuning and as the base with its adapter off "
        "under LoRA. ema: an average of the live network. live: the live network. auto is frozen.",
    )
    real_ema_decay: float = setting(0.98, help="Decay of that average, with real_branch: ema.")
    guidance_scale: float | None = setting(
        None,
        help="Guidance of the real branch, in the convention of the model's own pipeline; it costs one more pass. null "
        "guides as that pipeline does for its users, and not at all for a model with a text encoder of its own "
        "(digits).",
    )
    negative_prompt: str | None = setting(
        None, help="Prompt that the real branch is guided away from; null is the one of the model's own pipeline."
    )
    probe: bool = setting(
        True,
        help="Ask before the first step whether the network sees the shift (nine passes without gradient), and refuse "
        "one that it does not see. false trains it anyway, as a control.",
    )
    shift: ShiftSettings = setting(help="the condition shift.", factory=ShiftSettings)
    flow_matching_times: TimeDistribution = setting(
        help="distribution of t for loss: flow_matching.", factory=TimeDistribution
    )
    objective: ObjectiveSettings = setting(
        help="terms, weights, clip, times, warm-up and ramp.", factory=ObjectiveSettings
    )  # type: ignore[valid-type]

    validation_prompts: list[str] = setting(
        help="Prompts drawn at every validation.", factory=list, group="Validation, checkpoints, logging"
    )
    validation_steps: int | None = setting(None, help="Steps between validations; null turns them off.")
    validation_images_per_prompt: int = setting(
        4, help="Images of each validation prompt, with the same seeds every time."
    )
    validation_num_inference_steps: int = setting(1, help="Sampling steps of a validation.")
    validation_metrics: bool = setting(
        False, help="Score each validation with the data set's metrics (Frechet distance, accuracy, diversity)."
    )
    checkpointing_steps: int | None = setting(500, help="Steps between checkpoints; null writes only the last one.")
    checkpoints_total_limit: int | None = setting(3, help="Checkpoints kept; the oldest go first. null keeps all.")
    logging_steps: int = setting(10, help="Steps between lines of metrics.jsonl.")
    report_to: Literal["tensorboard", "none"] = setting(
        "none", help="tensorboard: scalars and sample grids in output_dir/tensorboard. metrics.jsonl is always written."
    )

    def __post_init__(self) -> None:
        self._check_weights()
        for name in (
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "validation_images_per_prompt",
            "validation_num_inference_steps",
        ):
            _at_least(name, getattr(self, name), 1)
        for name in ("validation_steps", "checkpointing_steps", "checkpoints_total_limit"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _at_least("lr_warmup_steps", self.lr_warmup_steps, 0)
        if self.max_sequence_length is not None:
            _at_least("max_sequence_length", self.max_sequence_length, 1)
        if self.guidance_scale is not None and not self.guidance_scale >= 0:
            raise SettingsError(
                f"guidance_scale must be at least 0, got {self.guidance_scale}; null guides as the model's own "
                "pipeline does"
            )
        if not self.learning_rate > 0:
            raise SettingsError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise SettingsError(f"max_grad_norm must be above 0 (null turns clipping off), got {self.max_grad_norm}")
        if not 0.0 <= self.proportion_empty_prompts <= 1.0:
            raise SettingsError(f"proportion_empty_prompts must lie in [0, 1], got {self.proportion_empty_prompts}")
        for name in ("ema_decay", "real_ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise SettingsError(f"{name} must be at least 0 and below 1, got {value}")
        if self.loss != "flow_matching":
            if self.pretrained_model_name_or_path is None:
                raise SettingsError(
                    f"loss: {self.loss} tunes a model that can already generate in many steps: set "
                    "pretrained_model_name_or_path to its folder "
                    f"({DIGITS_START} is the one that ships), or write loss: flow_matching to make one"
                )
            if self.train_text_encoder:
                raise SettingsError(
                    "train_text_encoder is for loss: flow_matching; while the text encoder moves, the shifted and "
                    "the real branch see no "
                    "fixed condition. Leave it out"
                )
        if self.loss != "correction" and self.guidance_scale not in (None, 1.0):
            raise SettingsError(f"guidance_scale: the {self.loss} loss has no real branch to guide; leave it out")
        if self.dataset_name == DIGITS and self.resolution is not None:
            raise SettingsError(
                "resolution: the scanned digits have 8 x 8 pixels; leave it out, or name a folder of pictures"
            )
        if self.resolution is not None:
            edges = [self.resolution] if isinstance(self.resolution, int) else self.resolution
            if isinstance(self.resolution, list) and len(edges) != 2 or min(edges, default=0) < 1:
                raise SettingsError(f"resolution must be one edge in pixels or [height, width], got {self.resolution}")
        if self.validation_metrics and self.dataset_name != DIGITS:
            raise SettingsError(
                f"validation_metrics scores digits, and dataset_name is {self.dataset_name}; write validation_prompts "
                "and look at the pictures"
            )
        if self.mixed_precision == "fp16":
            raise SettingsError(
                "mixed_precision: fp16 is not implemented (it needs loss scaling, and no CPU runs it); write bf16 or no"
            )
        if self.loss == "flow_matching" and self.pretrained_model_name_or_path is None and not self.model.transformer:
            raise SettingsError(
                "a new network needs model.transformer and model.text_encoder (see examples/digits_start.yaml)"
            )
        if self.loss != "flow_matching":
            with warnings.catch_warnings():
                # What the objective warns about is said by the run; what it refuses is a mistake in this file.
                warnings.simplefilter("ignore")
                try:
                    ApexObjective(ConditionShift(), loss=self.loss, **vars(self.objective))
                except ValueError as error:
                    raise SettingsError(f"objective: {error}") from None
            asked = self.loss == "correction" and self.objective.correction_weight > 0
            if asked and self.real_branch == "live" and self.objective.supervised_weight == 0:
                raise SettingsError(
                    "real_branch: live needs objective.supervised_weight above 0: nothing else holds the live network "
                    "to the data, and it would follow its own samples. Write real_branch: frozen or ema, or give "
                    "L_sup weight"
                )
            if self.loss == "paper" and self.schedule == "sequential" and not self.objective.detach_x_fake:
                raise SettingsError(
                    "schedule: sequential cannot serve loss: paper, whose L_fake has a gradient into the generator; "
                    "write schedule: retain, or objective.detach_x_fake: true"
                )
        if self.validation_steps is not None and not (self.validation_prompts or self.validation_metrics):
            raise SettingsError(
                "validation_steps is set but there is nothing to validate: write validation_prompts or "
                "validation_metrics: true"
            )

    def _check_weights(self) -> None:
        """What is trained, and how it is stored."""
        if self.start_lora is None and self.start_lora_mode != "merge":
            raise SettingsError(
                f"start_lora_mode: {self.start_lora_mode} says how to start from a LoRA, and there is none; write "
                "start_lora, or leave start_lora_mode out"
            )
        if self.rank is None:
            full = "all parameters are tuned (rank: null)"
            for name in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_target_modules", "lora_dtype"):
                if getattr(self, name) not in (None, 0.0, False, "fp32"):
                    raise SettingsError(
                        f"{name} belongs to LoRA, and {full}; write rank, e.g. rank: 64, or leave it out"
                    )
            if self.quantization is not None:
                raise SettingsError(
                    f"quantization: {self.quantization}: quantised weights cannot be trained, and {full}; write rank, "
                    "e.g. rank: 64, or leave quantization out"
                )
            if self.weight_dtype == "bf16":
                raise SettingsError(
                    f"weight_dtype: bf16 is for LoRA, and {full}: bf16 has 8 bits of precision, so most updates of "
                    "AdamW would be rounded away. Write weight_dtype: fp32 with mixed_precision: bf16, or rank "
                    "for a LoRA"
                )
            if self.start_lora is not None and self.start_lora_mode != "merge":
                raise SettingsError(
                    f"start_lora_mode: {self.start_lora_mode} needs a LoRA to train, and {full}; write "
                    "start_lora_mode: merge, or rank"
                )
        else:
            _at_least("rank", self.rank, 1)
            if self.pretrained_model_name_or_path is None:
                raise SettingsError("rank: a LoRA adapts a pretrained model; set pretrained_model_name_or_path")
            if self.train_text_encoder:
                raise SettingsError("train_text_encoder: a LoRA adapts the transformer alone; leave it or rank out")
            if self.lora_alpha is not None and not self.lora_alpha > 0:
                raise SettingsError(f"lora_alpha must be above 0 (null is rank), got {self.lora_alpha}")
            if not 0.0 <= self.lora_dropout < 1.0:
                raise SettingsError(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout}")
            one_dtype = self.lora_dtype == self.weight_dtype or self.mixed_precision == "bf16"
            if self.use_dora and self.lora_dropout > 0 and not one_dtype:
                raise SettingsError(
                    f"use_dora with lora_dropout needs lora_dtype ({self.lora_dtype}) to be weight_dtype "
                    f"({self.weight_dtype}), or mixed_precision: bf16: peft multiplies the two with each other there"
                )
            if self.start_lora_mode == "continue" and self.lora_dtype != "fp32":
                raise SettingsError(
                    f"lora_dtype: {self.lora_dtype}: start_lora_mode: continue trains the LoRA in fp32, whatever its "
                    "file is stored in; leave lora_dtype out"
                )
            if self.lora_target_modules == []:
                raise SettingsError("lora_target_modules is empty; name layers, or write null for the family's")
            if self.quantization is not None and self.start_lora is not None and self.start_lora_mode == "merge":
                raise SettingsError(
                    "start_lora_mode: merge cannot add a LoRA to quantised weights without rounding it; write "
                    "start_lora_mode: frozen, or leave quantization out"
                )

    @property
    def mode(self) -> Literal["full", "lora"]:
        """What is trained: all parameters, or a LoRA."""
        return "full" if self.rank is None else "lora"

    @property
    def real_branch_in_use(self) -> Literal["frozen", "ema", "live"]:
        """``real_branch`` with "auto" resolved; live, which holds no copy, where the loss has no real branch."""
        if self.loss != "correction" or self.objective.correction_weight == 0:
            return "live"
        return REAL_BRANCH[self.mode] if self.real_branch == "auto" else self.real_branch  # type: ignore[return-value]

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of ``resolution``, or None."""
        if self.resolution is None or isinstance(self.resolution, int):
            return None if self.resolution is None else (self.resolution, self.resolution)
        return self.resolution[0], self.resolution[1]

    @property
    def schedule_in_use(self) -> str:
        """``schedule`` with "auto" resolved."""
        if self.schedule != "auto":
            return self.schedule
        return "retain" if self.loss == "paper" and not self.objective.detach_x_fake else "sequential"


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise SettingsError(f"{name} must be at least {least}, got {value}")


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """A run from a YAML file, command-line ``overrides`` (["--learning_rate", "1e-4"]) on top.

    Raises:
        SettingsError: an unknown, foreign, doubled or ill-typed key, or values that do not go together; the message
        says what to write.
    """
    values = read_yaml(path) if path is not None else {}
    # The file is checked by itself first, so that its mistakes are reported under its own name.
    values = check(TrainConfig, values, source=str(path), foreign=FOREIGN_KEYS)
    over = parse_overrides(TrainConfig, overrides, foreign=FOREIGN_KEYS)
    source = "command line" if path is None else f"{path} with the command line" if over else str(path)
    return build(TrainConfig, merge(values, over), source=source, foreign=FOREIGN_KEYS)
