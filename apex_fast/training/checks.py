"""What a run's config is refused for, by what it is about; each says what was expected, what came, what to write.

:func:`check_config` runs all of them. They read the config and change nothing. Where the values of a section are for a
class that checks them itself, it is asked here, so that its error comes before anything is loaded.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from apex_fast.data.shipped import DIGITS, SHIPPED
from apex_fast.objective import ApexObjective
from apex_fast.peers import PeerSettings as PeerFields
from apex_fast.peers import Rcgm
from apex_fast.peers.rcgm import split_rows
from apex_fast.shift import ConditionShift
from apex_fast.shipped import is_shipped, shipped_names
from apex_fast.training.ema import check_decays
from apex_fast.training.losses import METHODS, PEERS, UNSHIFTED
from apex_fast.training.sections import PromptsOnlySettings
from apex_fast.training.settings import SettingsError

if TYPE_CHECKING:
    from apex_fast.training.config import TrainConfig


def check_config(config: TrainConfig) -> None:
    """SettingsError for values of ``config`` that are out of range or do not go together."""
    check_weights(config)
    check_ranges(config)
    check_shifted_adapter(config)
    check_memory(config)
    check_start(config)
    check_prompts(config)
    check_pictures(config)
    check_shipped_data(config)
    check_validation(config)
    check_peer(config)
    check_objective(config)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise SettingsError(f"{name} must be at least {least}, got {value}")


def check_weights(config: TrainConfig) -> None:
    """What is trained, and how it is stored."""
    if config.start_lora is None and config.start_lora_mode != "merge":
        raise SettingsError(
            f"start_lora_mode: {config.start_lora_mode} says how to start from a LoRA, and there is none; write "
            "start_lora, or leave start_lora_mode out"
        )
    if config.rank is None:
        full = "all parameters are tuned (rank: null)"
        lora = ("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_target_modules", "lora_dtype")
        for name in (*lora, "shifted_adapter"):
            if getattr(config, name) not in (None, 0.0, False, "fp32"):
                raise SettingsError(f"{name} belongs to LoRA, and {full}; write rank, e.g. rank: 64, or leave it out")
        if config.quantization is not None:
            raise SettingsError(
                f"quantization: {config.quantization}: quantised weights cannot be trained, and {full}; write rank, "
                "e.g. rank: 64, or leave quantization out"
            )
        if config.weight_dtype == "bf16":
            raise SettingsError(
                f"weight_dtype: bf16 is for LoRA, and {full}: bf16 has 8 bits of precision, so most updates of "
                "AdamW would be rounded away. Write weight_dtype: fp32 with mixed_precision: bf16, or rank "
                "for a LoRA"
            )
        if config.start_lora is not None and config.start_lora_mode != "merge":
            raise SettingsError(
                f"start_lora_mode: {config.start_lora_mode} needs a LoRA to train, and {full}; write "
                "start_lora_mode: merge, or rank"
            )
    else:
        _at_least("rank", config.rank, 1)
        if config.pretrained_model_name_or_path is None:
            raise SettingsError("rank: a LoRA adapts a pretrained model; set pretrained_model_name_or_path")
        if config.train_text_encoder:
            raise SettingsError("train_text_encoder: a LoRA adapts the transformer alone; leave it or rank out")
        if config.lora_alpha is not None and not config.lora_alpha > 0:
            raise SettingsError(f"lora_alpha must be above 0 (null is rank), got {config.lora_alpha}")
        if not 0.0 <= config.lora_dropout < 1.0:
            raise SettingsError(f"lora_dropout must be at least 0 and below 1, got {config.lora_dropout}")
        one_dtype = config.lora_dtype == config.weight_dtype or config.mixed_precision == "bf16"
        if config.use_dora and config.lora_dropout > 0 and not one_dtype:
            raise SettingsError(
                f"use_dora with lora_dropout needs lora_dtype ({config.lora_dtype}) to be weight_dtype "
                f"({config.weight_dtype}), or mixed_precision: bf16: peft multiplies the two with each other there"
            )
        if config.start_lora_mode == "continue" and config.lora_dtype != "fp32":
            raise SettingsError(
                f"lora_dtype: {config.lora_dtype}: start_lora_mode: continue trains the LoRA in fp32, whatever its "
                "file is stored in; leave lora_dtype out"
            )
        if config.lora_target_modules == []:
            raise SettingsError("lora_target_modules is empty; name layers, or write null for the family's")
        if config.quantization is not None and config.start_lora is not None and config.start_lora_mode == "merge":
            raise SettingsError(
                "start_lora_mode: merge cannot add a LoRA to quantised weights without rounding it; write "
                "start_lora_mode: frozen, or leave quantization out"
            )


def check_ranges(config: TrainConfig) -> None:
    """Single numbers."""
    for name in (
        "max_train_steps",
        "train_batch_size",
        "gradient_accumulation_steps",
        "logging_steps",
        "validation_images_per_prompt",
    ):
        _at_least(name, getattr(config, name), 1)
    for name in ("validation_steps", "checkpointing_steps", "checkpoints_total_limit"):
        if getattr(config, name) is not None:
            _at_least(name, getattr(config, name), 1)
    _at_least("lr_warmup_steps", config.lr_warmup_steps, 0)
    if config.max_sequence_length is not None:
        _at_least("max_sequence_length", config.max_sequence_length, 1)
    if config.guidance_scale is not None and not config.guidance_scale >= 0:
        raise SettingsError(
            f"guidance_scale must be at least 0, got {config.guidance_scale}; null guides as the model's own "
            "pipeline does"
        )
    if not config.learning_rate > 0:
        raise SettingsError(f"learning_rate must be above 0, got {config.learning_rate}")
    if config.shift_learning_rate is not None and not config.shift_learning_rate > 0:
        raise SettingsError(f"shift_learning_rate must be above 0, got {config.shift_learning_rate}")
    if config.max_grad_norm is not None and not config.max_grad_norm > 0:
        raise SettingsError(f"max_grad_norm must be above 0 (null turns clipping off), got {config.max_grad_norm}")
    if not 0.0 <= config.proportion_empty_prompts <= 1.0:
        raise SettingsError(f"proportion_empty_prompts must lie in [0, 1], got {config.proportion_empty_prompts}")
    if not 0.0 <= config.real_ema_decay < 1.0:
        raise SettingsError(f"real_ema_decay must be at least 0 and below 1, got {config.real_ema_decay}")
    if config.ema_decay is not None:
        try:
            check_decays(config.ema_decays)
        except ValueError as error:
            raise SettingsError(str(error)) from None
    if not config.distributed_timeout > 0:
        raise SettingsError(f"distributed_timeout must be above 0 seconds, got {config.distributed_timeout}")


def check_shifted_adapter(config: TrainConfig) -> None:
    """What goes with an adapter of the shifted branch's own."""
    rate = config.shifted_adapter_learning_rate
    if rate is not None and not rate > 0:
        raise SettingsError(f"shifted_adapter_learning_rate must be above 0, got {rate}")
    if not config.shifted_adapter:
        if rate is not None:
            raise SettingsError(
                f"shifted_adapter_learning_rate: {rate} is the rate of an adapter that the shifted branch has for "
                "itself, and it shares the generator's; write shifted_adapter: true, or leave the rate out"
            )
        return
    if config.loss != "correction":
        raise SettingsError(f"shifted_adapter is for loss: correction, and loss is {config.loss}; leave it out")
    if config.objective.fake_weight == 0:
        raise SettingsError(
            "shifted_adapter: with objective.fake_weight: 0 nothing trains it; give L_fake weight, or leave "
            "shifted_adapter out"
        )
    if config.schedule == "joint":
        raise SettingsError(
            "schedule: joint stacks generator and shifted branch into one call, which runs with one adapter; write "
            "schedule: retain or sequential, or leave shifted_adapter out"
        )


def check_memory(config: TrainConfig) -> None:
    """What is recomputed, and what waits in the memory of the CPU."""
    policy = config.gradient_checkpointing
    if not isinstance(policy, bool):
        if policy == [] or (isinstance(policy, int) and policy < 1):
            raise SettingsError(
                f"gradient_checkpointing: {policy}: write true for every block, false for none, a number from 1 "
                "for every n-th block, or the numbers of the blocks, from 0"
            )
        if isinstance(policy, list) and (min(policy) < 0 or len(set(policy)) < len(policy)):
            raise SettingsError(f"gradient_checkpointing: each block once, counted from 0, got {policy}")
    for name in ("activation_offload", "block_offload"):
        if getattr(config, name) and config.compile:
            raise SettingsError(f"{name} moves tensors between calls, which compiled blocks do not allow; drop one")
    if not config.block_offload:
        return
    if config.quantization is not None:
        raise SettingsError(
            f"block_offload moves plain weights, and quantization: {config.quantization} stores them with tables of "
            "their own; write one of the two"
        )
    if config.real_branch_in_use == "ema":
        raise SettingsError(
            "block_offload keeps frozen weights on the CPU, and real_branch: ema changes in every step; write "
            "real_branch: frozen, or leave block_offload out"
        )
    if config.rank is None and config.loss != "correction":
        raise SettingsError(
            "block_offload moves the frozen weights of loss: correction or of a LoRA, and this is loss: "
            f"{config.loss} with all parameters tuned; leave it out"
        )
    if config.rank is None and config.real_branch_in_use != "frozen":
        raise SettingsError(
            "block_offload moves frozen weights, and this run has none: all parameters are tuned (rank: null) and "
            f"real_branch is {config.real_branch_in_use}; write rank or real_branch: frozen, or leave it out"
        )


def check_start(config: TrainConfig) -> None:
    """What the loss needs of the model that the run starts from."""
    if config.loss != "flow_matching":
        if config.pretrained_model_name_or_path is None:
            raise SettingsError(
                f"loss: {config.loss} tunes a model that can already generate in many steps: set "
                "pretrained_model_name_or_path to its folder "
                f"(what ships: {shipped_names()}), or write loss: flow_matching to make one"
            )
        if config.train_text_encoder:
            raise SettingsError(
                "train_text_encoder is for loss: flow_matching; while the text encoder moves, the shifted and the "
                "real branch see no fixed condition. Leave it out"
            )
    if config.loss not in ("correction", *PEERS) and config.guidance_scale not in (None, 1.0):
        raise SettingsError(f"guidance_scale: the {config.loss} loss has no real branch to guide; leave it out")
    if config.loss == "flow_matching" and config.pretrained_model_name_or_path is None and not config.model.transformer:
        raise SettingsError(
            "a new network needs model.transformer and model.text_encoder (see examples/digits_start.yaml)"
        )


def check_prompts(config: TrainConfig) -> None:
    """What trains on samples of the model itself."""
    own = config.prompts_only
    _at_least("prompts_only.num_inference_steps", own.num_inference_steps, 1)
    _at_least("prompts_only.samples_per_prompt", own.samples_per_prompt, 1)
    if config.prompts is None:
        if own != PromptsOnlySettings():
            raise SettingsError("prompts_only says how a run without pictures gets its samples; write prompts, too")
        return
    if config.dataset_name != DIGITS:
        raise SettingsError(
            f"prompts: {config.prompts} and dataset_name: {config.dataset_name}: a run trains on samples of the model "
            "or on pictures; leave one of them out"
        )
    if (name := config.pretrained_model_name_or_path) is None or is_shipped(name):
        raise SettingsError(
            "prompts: samples are drawn from a pretrained pipeline; set pretrained_model_name_or_path to its "
            "folder or hub id"
        )
    if config.validation_metrics:
        raise SettingsError("validation_metrics compares with pictures, and prompts has none; leave it out")
    if own.samples != "student":
        return
    if config.loss != "correction":
        raise SettingsError(
            f"prompts_only.samples: student is for loss: correction: {config.loss} would fit the network to its own "
            "one-step samples, which says nothing of the data; write samples: base"
        )
    if config.objective.supervised_weight != 0:
        raise SettingsError(
            "prompts_only.samples: student needs objective.supervised_weight: 0: L_sup on the network's own "
            "samples teaches it the velocity of what it makes already, errors included, which is what the shifted "
            "branch is for. Write objective.supervised_weight: 0, or samples: base, with which 2 to 50 steps keep "
            "working, too"
        )
    if config.objective.mix_regulariser_weight != 0:
        raise SettingsError(
            "prompts_only.samples: student needs objective.mix_regulariser_weight: 0: L_mix fits the data, and the "
            "network's own samples are none. Write objective.mix_regulariser_weight: 0, or samples: base"
        )
    if config.real_branch_in_use != "frozen":
        raise SettingsError(
            f"prompts_only.samples: student with real_branch: {config.real_branch}: nothing would hold the real "
            "branch to the data; write real_branch: frozen"
        )


def check_pictures(config: TrainConfig) -> None:
    """The sizes of pictures, and how many of them may be broken."""
    if config.resolution is not None:
        edges = [config.resolution] if isinstance(config.resolution, int) else config.resolution
        if isinstance(config.resolution, list) and len(edges) != 2 or min(edges, default=0) < 1:
            raise SettingsError(f"resolution must be one edge in pixels or [height, width], got {config.resolution}")
    if not 0.0 <= config.max_bad_share <= 1.0:
        raise SettingsError(f"max_bad_share must lie in [0, 1], got {config.max_bad_share}")
    if not config.max_aspect_ratio >= 1.0:
        raise SettingsError(f"max_aspect_ratio must be at least 1, got {config.max_aspect_ratio}")
    if config.aspect_bucket_step is not None:
        _at_least("aspect_bucket_step", config.aspect_bucket_step, 1)
    if config.prompts is not None and config.aspect_buckets:
        raise SettingsError("aspect_buckets is for pictures, and a run with prompts has none; leave it out")


def check_shipped_data(config: TrainConfig) -> None:
    """What data sets that ship do not have, and what only they have."""
    if not config.ships_data:
        if config.max_train_samples is not None:
            raise SettingsError(
                f"max_train_samples is for {', '.join(SHIPPED)}; give a data set of your own as many pictures as "
                "you want, and leave it out"
            )
        if config.dataset_name not in SHIPPED:
            return
    for name in ("aspect_buckets", "image_column", "caption_column", "dataset_split"):
        if getattr(config, name):
            raise SettingsError(f"{name}: {config.dataset_name} has nothing of the kind; leave it out")
    if not config.ships_data:
        return
    edges = SHIPPED[config.dataset_name].resolutions
    if config.resolution is not None and config.image_size not in [(edge, edge) for edge in edges]:
        raise SettingsError(
            f"resolution: the pictures of {config.dataset_name} have {' or '.join(f'{e} x {e}' for e in edges)} "
            f"pixels, got {config.resolution}; leave it out, or name a folder of pictures"
        )
    if config.max_train_samples is not None:
        _at_least("max_train_samples", config.max_train_samples, 1)


def check_validation(config: TrainConfig) -> None:
    """What is drawn and scored on the way."""
    counts = config.inference_steps
    if not counts:
        raise SettingsError("validation_num_inference_steps is empty; write one number of steps or several")
    for count in counts:
        _at_least("validation_num_inference_steps", count, 1)
    if len(set(counts)) < len(counts):
        raise SettingsError(f"validation_num_inference_steps has a number twice: {counts}; keep one")
    if config.validation_base_inference_steps is not None:
        _at_least("validation_base_inference_steps", config.validation_base_inference_steps, 1)
    if config.validation_minutes is not None and not config.validation_minutes > 0:
        raise SettingsError(
            f"validation_minutes must be above 0 (null has none by time), got {config.validation_minutes}"
        )
    for name in ("validation_steps", "validation_minutes"):
        if getattr(config, name) is not None and not (config.validation_prompts or config.validation_metrics):
            raise SettingsError(
                f"{name} is set but there is nothing to validate: write validation_prompts or validation_metrics: true"
            )
    if config.validation_metrics and config.dataset_name not in SHIPPED:
        raise SettingsError(
            f"validation_metrics scores {', '.join(SHIPPED)}, and dataset_name is {config.dataset_name}; write "
            "validation_prompts and look at the pictures"
        )
    _check_validation_samples(config)
    if config.best_metric is not None and not config.validation_metrics:
        raise SettingsError(
            f"best_metric: {config.best_metric} is a number of the validations, and this run has none; write "
            "validation_metrics: true, or leave best_metric out"
        )


def _check_validation_samples(config: TrainConfig) -> None:
    count = config.validation_samples
    if count is None:
        return
    if not config.validation_metrics:
        raise SettingsError("validation_samples is how many pictures validation_metrics scores, which is off")
    # The categories of every benchmark get equal shares of it.
    if count < 60 or count % 60 or (config.dataset_name == DIGITS and count > 600):
        raise SettingsError(
            f"validation_samples must be a multiple of 60 (of the digits, which are 600, at most that), got {count}"
        )


def check_peer(config: TrainConfig) -> None:
    """What the peers' methods need and do not do."""
    try:
        PeerFields(**vars(config.peer))
    except ValueError as error:
        raise SettingsError(f"peer.{error}") from None
    if config.loss not in PEERS:
        return
    if config.shift_learning_rate is not None:
        raise SettingsError(f"shift_learning_rate: loss: {config.loss} has no condition shift; leave it out")
    method = METHODS[config.loss]
    if issubclass(method, Rcgm):
        try:
            split_rows(config.train_batch_size, method.shares_of(PeerFields(**vars(config.peer))))
        except ValueError as error:
            raise SettingsError(f"peer.shares: {error}") from None
        return
    if config.real_branch not in ("auto", "frozen"):
        raise SettingsError(
            f"real_branch: {config.real_branch}: the teacher of loss: {config.loss} is the frozen start; write "
            "real_branch: frozen, or leave it out"
        )
    if config.gradient_accumulation_steps > 1:
        raise SettingsError(
            f"gradient_accumulation_steps: {config.gradient_accumulation_steps}: loss: {config.loss} updates its fake "
            "score in every pass, so several passes would change how often; write 1 and a larger train_batch_size"
        )
    if config.mixed_precision == "fp16":
        raise SettingsError(
            f"mixed_precision: fp16: the fake score of loss: {config.loss} is trained without loss scaling; write "
            "mixed_precision: bf16"
        )
    if config.compile:
        raise SettingsError(
            f"compile: the fake score of loss: {config.loss} would run uncompiled beside a compiled student; leave "
            "it out"
        )
    if config.loss == "dmd2" and config.rank is not None:
        if config.quantization is not None:
            raise SettingsError(
                f"quantization: {config.quantization}: the fake score of loss: dmd2 is a whole network that is "
                "trained, which quantised weights cannot be; write loss: dmd2_lora"
            )
        if config.start_lora_mode == "frozen":
            raise SettingsError(
                "start_lora_mode: frozen: the fake score of loss: dmd2 starts from the base with that LoRA in it; "
                "write start_lora_mode: merge, or loss: dmd2_lora"
            )
        if config.block_offload:
            raise SettingsError(
                "block_offload moves frozen weights, and the fake score of loss: dmd2 has none; write loss: "
                "dmd2_lora, or leave it out"
            )


def check_objective(config: TrainConfig) -> None:
    """What the objective refuses, and what does not go with its weights."""
    if config.loss in UNSHIFTED:
        return
    with warnings.catch_warnings():
        # What the objective warns about is said by the run; what it refuses is a mistake in this file.
        warnings.simplefilter("ignore")
        try:
            ApexObjective(ConditionShift(), loss=config.loss, **vars(config.objective))
        except ValueError as error:
            raise SettingsError(f"objective: {error}") from None
    objective = config.objective
    asked = config.loss == "correction" and objective.correction_weight + objective.consistency_weight > 0
    if asked and config.real_branch == "live" and config.objective.supervised_weight == 0:
        raise SettingsError(
            "real_branch: live needs objective.supervised_weight above 0: nothing else holds the live network "
            "to the data, and it would follow its own samples. Write real_branch: frozen or ema, or give "
            "L_sup weight"
        )
    if config.loss == "paper" and config.schedule == "sequential" and not config.objective.detach_x_fake:
        raise SettingsError(
            "schedule: sequential cannot serve loss: paper, whose L_fake has a gradient into the generator; "
            "write schedule: retain, or objective.detach_x_fake: true"
        )
