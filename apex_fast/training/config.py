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

_NO_LORA = "LoRA is not implemented yet, so leave it out to tune all parameters"

FOREIGN_KEYS = {
    # kohya's sd-scripts
    "network_dim": f"write 'rank' (that is kohya's name for it); {_NO_LORA}",
    "network_alpha": f"write 'lora_alpha' (that is kohya's name for it); {_NO_LORA}",
    "network_module": f"'rank' chooses LoRA here, there is no module to name; {_NO_LORA}",
    "unet_lr": "write 'learning_rate'; there is one for all that is trained",
    "text_encoder_lr": "write 'learning_rate' and 'train_text_encoder: true'",
    "save_every_n_steps": "write 'checkpointing_steps'",
    "save_last_n_steps": "write 'checkpoints_total_limit' (a number of checkpoints, not of steps)",
    "sample_every_n_steps": "write 'validation_steps'",
    "sample_prompts": "write 'validation_prompts' (a list of texts)",
    "output_name": "write 'output_dir'",
    "train_data_dir": "write 'dataset_name'",
    "max_train_epochs": "write 'max_train_steps'; runs are counted in steps",
    "min_snr_gamma": "there is no such weight for flow models; leave it out",
    "log_with": "write 'report_to'",
    "optimizer_type": "leave it out: the optimizer is AdamW, see 'adam_beta1' and the keys beside it",
    "optimizer_args": "leave it out: the optimizer is AdamW, see 'adam_beta1' and the keys beside it",
    "save_model_as": "leave it out: everything is saved as safetensors",
    # ai-toolkit
    "name_or_path": "write 'pretrained_model_name_or_path'",
    "linear": f"write 'rank' (that is ai-toolkit's name for it); {_NO_LORA}",
    "linear_alpha": f"write 'lora_alpha' (that is ai-toolkit's name for it); {_NO_LORA}",
    "steps": "write 'max_train_steps'",
    "lr": "write 'learning_rate'",
    "batch_size": "write 'train_batch_size'",
    "gradient_accumulation": "write 'gradient_accumulation_steps'",
    "save_every": "write 'checkpointing_steps'",
    "max_step_saves_to_keep": "write 'checkpoints_total_limit'",
    "sample_every": "write 'validation_steps'",
    "dtype": "write 'mixed_precision'",
    "training_folder": "write 'output_dir'",
    "optimizer": "leave it out: the optimizer is AdamW, see 'adam_beta1' and the keys beside it",
    # diffusers' own variants
    "validation_prompt": "write 'validation_prompts' (a list of texts)",
    "validation_epochs": "write 'validation_steps'; runs are counted in steps",
    "num_train_epochs": "write 'max_train_steps'; runs are counted in steps",
    "num_validation_images": "write 'validation_images_per_prompt'",
    "lora_rank": f"write 'rank'; {_NO_LORA}",
    "resolution": "leave it out: the size comes from the model",
    "scale_lr": "leave it out and write the learning rate that you mean",
    "use_8bit_adam": "leave it out: not implemented yet",
    "enable_xformers_memory_efficient_attention": "leave it out: torch's attention is used",
    "pretrained_teacher_model": "leave it out: the weights are held once; 'real_branch' says what the real branch is",
    # spellings of APEX's own ideas
    "teacher": "write 'real_branch' (frozen, ema or live)",
    "lambda": "write 'objective' and its weights; `apex-fast train --help` lists them",
}


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


ObjectiveSettings = _section_of(ApexObjective, "ObjectiveSettings", leave_out=("shift", "loss", "total_steps"))
"""Every field of :class:`apex_fast.ApexObjective` but the shift, the loss and the number of steps, which the run
knows."""


@dataclass(frozen=True)
class ShiftSettings:
    """The condition shift c_fake = A c + b (Eq. 9); see :class:`apex_fast.ConditionShift`."""

    mode: Literal["scalar", "diagonal"] = setting("scalar", help="A and b are one number each, or one per channel.")
    scale: float = setting(-1.0, help="Initial A. 1 with bias 0 is no shift at all: the control that must fail.")
    bias: float = setting(0.5, help="Initial b, in the units of the text embedding.")
    trainable: bool = setting(False, help="Whether A and b are learned (their gradient comes from L_fake).")
    train_scale: bool | None = setting(None, help="The same for A alone; null follows 'trainable'.")
    train_bias: bool | None = setting(None, help="The same for b alone; null follows 'trainable'.")
    shift_pooled: bool = setting(True, help="Whether pooled text embeddings are shifted as well.")


@dataclass(frozen=True)
class ModelSettings:
    """A new network with random weights, for starts (``loss: flow_matching`` without a pretrained model)."""

    transformer: dict[str, Any] = setting(help="Arguments of diffusers.SanaTransformer2DModel.", factory=dict)
    text_encoder: dict[str, Any] = setting(help="Arguments of transformers.T5Config.", factory=dict)
    vocab_size: int = setting(384, help="Upper bound of the tokenizer's vocabulary, at least 259.")
    max_sequence_length: int = setting(16, help="Tokens that every prompt is padded or cut to.")


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
        help="Folder with the model to tune, or digits_start for the one that ships in the package. null builds a "
        "new one from 'model'.",
        group="Model",
    )
    model: ModelSettings = setting(help="The new network, where no pretrained one is given.", factory=ModelSettings)
    train_text_encoder: bool = setting(
        False, help="Train the text encoder too (loss flow_matching only: the objective needs fixed conditions)."
    )
    gradient_checkpointing: bool = setting(
        False, help="Recompute activations in backward: less memory, about a third more time."
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = setting(
        "no", help="Autocast of the network; weights and optimizer stay fp32. fp16 is not implemented yet."
    )
    rank: int | None = setting(None, help="LoRA rank. Not implemented yet: all parameters are tuned.")
    lora_alpha: float | None = setting(None, help="LoRA alpha. Not implemented yet.")

    dataset_name: Literal["digits"] = setting(
        "digits", help="digits: the scanned digits that scikit-learn ships, with text prompts.", group="Data"
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
    real_branch: Literal["frozen", "ema", "live"] = setting(
        "frozen",
        help="The real branch: a frozen copy of the start, an average of the live network, or the live network.",
    )
    real_ema_decay: float = setting(0.98, help="Decay of that average, with real_branch: ema.")
    negative_prompt: str = setting(
        "", help="Prompt that the real branch is guided away from, if objective.guidance_scale is not 1."
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
        if self.rank is not None or self.lora_alpha is not None:
            key = "rank" if self.rank is not None else "lora_alpha"
            raise SettingsError(
                f"{key}: LoRA is not implemented yet, so {key} would have no effect; leave it out to tune all "
                "parameters"
            )
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
