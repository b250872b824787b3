"""The keys of a training run: names as the diffusers scripts have them, and APEX's own in the sections ``shift`` and
``objective``.

Sections are in :mod:`apex_fast.training.sections`, what is refused in :mod:`apex_fast.training.checks`, which loss uses
which key in :mod:`apex_fast.training.losses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from apex_fast.data.shipped import DIGITS, SHIPPED
from apex_fast.path import TimeDistribution
from apex_fast.training.alarms import AlarmSettings
from apex_fast.training.checks import check_config
from apex_fast.training.foreign_keys import FOREIGN_KEYS
from apex_fast.training.losses import PEERS, Loss
from apex_fast.training.sections import (
    ModelSettings,
    ObjectiveSettings,
    PeerSettings,
    PromptsOnlySettings,
    ShiftSettings,
)
from apex_fast.training.settings import build, check, merge, parse_overrides, read_yaml, setting

REAL_BRANCH = {"full": "frozen", "lora": "frozen"}
"""What ``real_branch: auto`` is for each way of tuning: full tuning copies the start, LoRA switches the adapter off."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a training run."""

    output_dir: str = setting(
        help="Folder of the run: checkpoints, metrics.jsonl, samples, the finished model.", group="Run"
    )
    loss: Loss = setting(
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
        "Qwen/Qwen-Image, or one that ships in the package (digits_start, shapes_start). null builds a new one from "
        "'model'.",
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
        check_config(self)

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
    def scored_samples(self) -> int:
        """``validation_samples``, or what null stands for."""
        if self.validation_samples is not None:
            return self.validation_samples
        return 600 if self.dataset_name == DIGITS else 240

    @property
    def ships_data(self) -> bool:
        """Whether the run trains on a data set that needs no download (:mod:`apex_fast.data.shipped`)."""
        return self.dataset_name in SHIPPED and self.prompts is None

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
