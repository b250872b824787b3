"""What a run is made of, from its config: the model with what is trained of it, the objective, the three roles."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from apex_fast.backbones.base import Backbone
from apex_fast.backbones.loading import backbone_class
from apex_fast.backbones.offload import Offload
from apex_fast.condition import Condition
from apex_fast.objective import ApexObjective
from apex_fast.passes import mean_forwards, objective_passes, paper_passes
from apex_fast.shift import ConditionShift
from apex_fast.shipped import is_shipped
from apex_fast.training.config import TrainConfig
from apex_fast.training.flow_matching import FlowMatching
from apex_fast.training.guidance import RealGuidance
from apex_fast.training.losses import PEERS, UNSHIFTED
from apex_fast.training.models import Autocast, load_pretrained, pretrained_source, quiet_libraries, start_lora_file
from apex_fast.training.processes import Processes
from apex_fast.training.provenance import licence_of
from apex_fast.training.results import Record
from apex_fast.training.settings import SettingsError
from apex_fast.velocities import Velocities
from apex_fast.version import __version__

FROZEN_WITHOUT_DATA = (
    "real_branch: frozen with objective.supervised_weight: 0: nothing keeps the trained network to the data, and in "
    "small models this ruined sampling in 2 to 50 steps; give L_sup weight unless you want one step alone"
)


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What ``mixed_precision`` computes in."""


# ---- several processes


def check_spreading(config: TrainConfig, processes: Processes) -> None:
    """What several processes cannot do. SettingsError names it and what to write."""
    if config.loss in PEERS:
        raise SettingsError(f"loss: {config.loss} is there to compare with and runs in one process; start one alone")
    if config.block_offload:
        raise SettingsError(
            "block_offload fetches weights by itself, which neither DDP nor FSDP2 knows of; leave it out (FSDP2 holds "
            "a share of the frozen blocks in each process), or start one process"
        )
    if config.shifted_adapter:
        raise SettingsError(
            "shifted_adapter trains two adapters in turns, and the exchange of gradients waits for both; leave it out, "
            "or start one process"
        )
    if not processes.sharded:
        return
    way = "distributed: fsdp2"
    if config.quantization is not None:
        raise SettingsError(
            f"quantization: {config.quantization} cannot be sharded ({way}); write distributed: ddp, where every "
            "process holds the quantised base, or weight_dtype: bf16 instead of quantization"
        )
    if config.optimizer == "adamw_8bit":
        raise SettingsError(
            f"optimizer: adamw_8bit cannot hold sharded moments ({way} has a part of them in each process anyway); "
            "write optimizer: adamw, or distributed: ddp"
        )
    if config.train_text_encoder:
        raise SettingsError(
            f"train_text_encoder: a text encoder that is trained along is not sharded ({way}); write distributed: ddp"
        )
    shift = config.shift
    if config.mixed_precision == "fp16" and any((shift.trainable, shift.train_scale, shift.train_bias)):
        raise SettingsError(
            f"mixed_precision: fp16 with {way} cannot scale the gradient of a trainable shift, which is not sharded; "
            "write mixed_precision: bf16"
        )


# ---- the model


def load_backbone(config: TrainConfig, prompts: Iterable[str], **load_options: bool) -> Backbone:
    """The model of a run on the CPU: the pretrained one, or a new one from ``config.model`` whose tokenizer is trained
    on ``prompts``. load_options: which parts of a pipeline are not needed, as
    :func:`apex_fast.backbones.loading.from_pretrained` names them.

    Raises:
        FileNotFoundError, SettingsError: there is no such model, it is not supported, or keys do not fit it.
    """
    if config.pretrained_model_name_or_path is None:
        quiet_libraries()
        model = config.model
        try:
            return backbone_class(model.family).from_config(
                model.transformer,
                model.text_encoder,
                prompts,
                vocab_size=model.vocab_size,
                max_sequence_length=model.max_sequence_length,
                sample_size=model.sample_size,
                vae=model.vae,
                seed=config.seed,
            )
        except (TypeError, ValueError) as error:
            raise SettingsError(f"model: {error}") from error
    backbone = load_pretrained(
        pretrained_source(config.pretrained_model_name_or_path),
        weight_dtype=config.weight_dtype,
        quantization=config.quantization,
        revision=config.revision,
        variant=config.variant,
        max_sequence_length=config.max_sequence_length,
        embedded_guidance=config.embedded_guidance_scale,
        shift_padding=config.shift_padding,
        **load_options,
    )
    if config.family not in (None, backbone.family):
        raise SettingsError(
            f"family: {config.family}, but {config.pretrained_model_name_or_path} is a {backbone.family} model; write "
            f"family: {backbone.family}, or leave it out"
        )
    if backbone.text is not None and config.max_sequence_length not in (None, backbone.text.max_sequence_length):
        raise SettingsError(
            f"max_sequence_length: {config.max_sequence_length}: the model has a text encoder of its own, which was "
            f"made for {backbone.text.max_sequence_length}; leave it out"
        )
    return backbone


def make_trainable(config: TrainConfig, backbone: Backbone) -> None:
    """Gives gradients to what the run trains, all of the transformer or a LoRA, and sets the modes of the network.

    Raises:
        FileNotFoundError, SettingsError: a LoRA to start from that is not there or does not fit, or LoRA settings that
        do not fit the network.
    """
    transformer = backbone.transformer
    if config.mode == "full":
        if config.start_lora is not None:
            _start_from_lora(config, backbone)
        transformer.requires_grad_(True)
        for name in backbone.parameters_without_gradient():
            transformer.get_parameter(name).requires_grad_(False)
    else:
        _add_lora(config, backbone)
    transformer.train()
    if backbone.text is not None:
        trained = config.train_text_encoder
        if trained and backbone.text.package is not None:
            raise SettingsError(
                f"train_text_encoder: the text encoder is that of the package {backbone.text.package}, which is read "
                "as it is installed and not saved with the model; leave train_text_encoder out"
            )
        backbone.text.text_encoder.requires_grad_(trained).train(trained)
    if config.gradient_checkpointing is not False:
        try:
            backbone.enable_gradient_checkpointing(config.gradient_checkpointing)
        except ValueError as error:
            raise SettingsError(str(error)) from error
    offload_network(config, backbone)


def offload_network(config: TrainConfig, backbone: Backbone) -> None:
    """Has activations and frozen blocks of the trained network wait on the CPU, as the config says; once what is
    trained has its gradients, and before the network moves to a device."""
    blocks = config.block_offload and config.mode == "lora"
    if config.activation_offload or blocks:
        backbone.offload = Offload(backbone.transformer, activations=config.activation_offload, blocks=blocks)


def offload_real_branch(config: TrainConfig, velocities: Velocities) -> None:
    """The same for the blocks of a real branch that is a frozen copy."""
    real = velocities.real.module if isinstance(velocities.real, Autocast) else velocities.real
    if config.block_offload and isinstance(real, Backbone):
        real.offload = Offload(real.transformer, blocks=True)


def start_lora_hint(config: TrainConfig) -> str | None:
    """What has to be known about the LoRA that a run started from by whoever uses its result."""
    if config.start_lora is None or config.start_lora_mode == "continue":
        return None
    if config.mode == "full":
        return f"{config.start_lora} is part of its weights; do not add it again"
    if config.start_lora_mode == "frozen":
        return f"use it together with {config.start_lora}, on which it was trained"
    return (
        f"it belongs on the model with {config.start_lora} merged into it, as it was trained: apex-fast generate "
        "merges it by itself; other programs load it once, beside this LoRA, unless their model holds it already"
    )


def _start_from_lora(config: TrainConfig, backbone: Backbone) -> None:
    from apex_fast.lora import load_start_lora

    assert config.start_lora is not None
    file = start_lora_file(config.start_lora)
    try:
        # Ahead of diffusers, which reports a damaged file in other words in every version.
        with safe_open(file, "pt"):
            pass
        load_start_lora(backbone, file, config.start_lora_mode)
    except SafetensorError as error:
        raise SettingsError(
            f"start_lora: {file} cannot be read as safetensors ({error}); it was cut off or is another kind of file, "
            "so copy or download it again"
        ) from error
    except ValueError as error:
        raise SettingsError(f"start_lora: {error}") from error


def _add_lora(config: TrainConfig, backbone: Backbone) -> None:
    from apex_fast.lora import GENERATOR, LoraSettings, add_lora

    if config.start_lora is not None:
        _start_from_lora(config, backbone)
        if config.start_lora_mode == "continue":
            rank = backbone.transformer.peft_config[GENERATOR].r
            if rank != config.rank:
                raise SettingsError(
                    f"rank: {config.rank}, but {config.start_lora} has rank {rank}, and start_lora_mode: continue "
                    f"trains that one; write rank: {rank}"
                )
            _check_continued(config, backbone)
            return
    targets = None if config.lora_target_modules is None else tuple(config.lora_target_modules)
    try:
        settings = LoraSettings(
            rank=config.rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            target_modules=targets,
            dtype=config.lora_dtype,
        )
        add_lora(backbone, settings, seed=config.seed)
    except ValueError as error:
        key = "lora_target_modules" if targets is not None and "add_lora: no layer" in str(error) else "rank"
        raise SettingsError(f"{key}: {error}") from error


def _check_continued(config: TrainConfig, backbone: Backbone) -> None:
    """SettingsError for settings that say something else than the LoRA that is trained further: they would not be
    followed. Those left at their defaults say nothing."""
    from apex_fast.lora import GENERATOR

    own = backbone.transformer.peft_config[GENERATOR]
    asked: dict[str, tuple[Any, Any]] = {
        "lora_alpha": (config.lora_alpha, own.lora_alpha),
        "use_rslora": (config.use_rslora or None, bool(own.use_rslora)),
        "use_dora": (config.use_dora or None, bool(own.use_dora)),
        "lora_dropout": (config.lora_dropout or None, own.lora_dropout),
    }
    reason = "start_lora_mode: continue trains that LoRA as it is"
    for key, (wanted, found) in asked.items():
        if wanted is not None and wanted != found:
            raise SettingsError(
                f"{key}: {wanted}, but {config.start_lora} has {found}, and {reason}; leave {key} out, or write "
                "start_lora_mode: merge to train a new one"
            )
    if config.lora_target_modules is None:
        return
    mark, ends = f".{GENERATOR}", tuple(config.lora_target_modules)
    adapted, others = set(), set()
    unused = {name.rpartition(".")[0] for name in backbone.parameters_without_gradient()}
    for name, module in backbone.transformer.named_modules():
        if hasattr(module, "lora_A") and GENERATOR in module.lora_A:
            adapted.add(name)
        elif isinstance(module, nn.Linear) and mark not in name and not name.endswith(".base_layer"):
            others.add(name)
    kept = {name for name in adapted if _ends_with(name, ends)}
    missed = sorted({name for name in others - unused if _ends_with(name, ends)})
    if missed or kept != adapted:
        differs = f"does not adapt {missed[0]}" if missed else f"adapts {min(adapted - kept)} as well"
        raise SettingsError(
            f"lora_target_modules: {list(ends)}, but {config.start_lora} {differs}, and {reason}; leave "
            "lora_target_modules out, or write start_lora_mode: merge to train a new one"
        )


def _ends_with(name: str, ends: tuple[str, ...]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def record_of(config: TrainConfig, backbone: Backbone, size: tuple[int, int]) -> Record:
    """What has to be known beside the trained weights; ``size`` in pixels."""
    base = config.pretrained_model_name_or_path or ""
    if not is_shipped(base) and Path(base).exists():
        base = str(Path(base).resolve())
    lora = None
    if config.mode == "lora":
        peft_config = backbone.transformer.peft_config["default"]
        lora = {
            "rank": peft_config.r,
            "alpha": peft_config.lora_alpha,
            "use_rslora": bool(peft_config.use_rslora),
            "use_dora": bool(peft_config.use_dora),
            "target_modules": sorted(peft_config.target_modules),
        }
    start = None if config.start_lora is None else str(start_lora_file(config.start_lora).resolve())
    return Record(
        family=backbone.family,
        mode=config.mode,
        base=base,
        revision=config.revision,
        variant=config.variant,
        weight_dtype=config.weight_dtype,
        quantization=config.quantization,
        lora=lora,
        start_lora=start,
        start_lora_mode=config.start_lora_mode,
        max_sequence_length=config.max_sequence_length,
        embedded_guidance=config.embedded_guidance_scale,
        shift_padding=config.shift_padding,
        resolution=list(size),
        shift=None if config.loss in UNSHIFTED else dict(vars(config.shift)),
        train_steps=config.max_train_steps,
        num_inference_steps=config.inference_steps[0],
        library_version=__version__,
        licence=licence_of(base, config.revision) if base else None,
    )


# ---- objective and roles


def make_objective(
    config: TrainConfig, backbone: Backbone, guidance: RealGuidance | None, example: Condition | None
) -> tuple[ApexObjective | FlowMatching, list[str]]:
    """The loss of a run, and what it warns about.

    example: a condition of the model, for the width of its pooled embeddings; None if it has none.
    """
    if config.loss == "flow_matching":
        return FlowMatching(config.flow_matching_times), []
    shift = vars(config.shift).copy()
    if config.shift.mode == "diagonal":
        shift["dim"] = backbone.site_width(config.shift.site)
        pooled = None if example is None else example.pooled_prompt_embeds
        if pooled is not None and config.shift.shift_pooled:
            shift["pooled_dim"] = pooled.shape[-1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        objective = ApexObjective(
            ConditionShift(**shift),
            loss=config.loss,
            total_steps=config.max_train_steps,
            guidance_scale=1.0 if guidance is None else guidance.objective_scale,
            **vars(config.objective),
        )
    notes = [str(w.message) for w in caught]
    if config.loss == "correction" and config.real_branch_in_use == "frozen" and objective.supervised_weight == 0:
        notes.append(FROZEN_WITHOUT_DATA)
    if config.logging_steps % objective.generator_every:
        every = math.lcm(config.logging_steps, objective.generator_every)
        notes.append(
            f"logging_steps: {config.logging_steps} is no multiple of objective.generator_every: "
            f"{objective.generator_every}, so the metrics of the correction are in one line in every {every} steps"
        )
    return objective, notes


def make_velocities(
    config: TrainConfig, backbone: Backbone, device: torch.device, guidance: RealGuidance | None
) -> Velocities:
    """The three roles of the network, the real one guided as ``guidance`` says."""
    network: nn.Module = backbone
    if config.mixed_precision != "no":
        network = Autocast(backbone, device.type, AUTOCAST[config.mixed_precision])
    real = config.real_branch_in_use
    if config.mode == "full":
        velocities = Velocities.from_module(network, real=real, ema_decay=config.real_ema_decay)
    else:
        from apex_fast.lora import lora_velocities

        velocities = lora_velocities(
            backbone,
            real,
            ema_decay=config.real_ema_decay,
            call=network,
            shifted_adapter=config.shifted_adapter,
        )
    if guidance is not None:
        velocities.guide = guidance.guide
    offload_real_branch(config, velocities)
    return velocities


def compile_blocks(backbone: Backbone, velocities: Velocities) -> None:
    """Compiles the repeated blocks of the network and of a real branch that is a copy of it (a copy is not compiled by
    compiling its source)."""
    real = velocities.real.module if isinstance(velocities.real, Autocast) else velocities.real
    for network in (backbone, real):
        if isinstance(network, Backbone):
            network.compile_blocks()


def cost_of_a_step(config: TrainConfig, guidance: RealGuidance | None) -> str:
    """The real branch and what a step costs, in words; "" for flow matching."""
    objective, checkpointing = config.objective, config.gradient_checkpointing
    if config.loss in UNSHIFTED:
        return ""
    if config.loss == "paper":
        passes = paper_passes(
            fake=objective.paper_fake_weight > 0,
            mix=objective.paper_mix_weight > 0,
            mixes_shifted=objective.mix_weight > 0,
            detached=objective.detach_x_fake,
            checkpointing=checkpointing,
        )
        return f"a step is {passes}, F being one forward of the batch"
    options = {"guided": guidance is not None, "checkpointing": bool(checkpointing)}
    passes = objective_passes(objective, config.schedule_in_use, **options)
    mean = mean_forwards(objective, config.schedule_in_use, **options)
    on_average = f", {mean:.3g} F on average" if mean < passes.total_in_forwards else ""
    guided = "not guided"
    if guidance is not None:
        guided = f'guided by {guidance.scale:g} away from "{guidance.negative_prompt}", which is one of the passes'
    return (
        f"real branch: {config.real_branch_in_use}, {guided}; schedule {config.schedule_in_use}: a step is {passes}"
        f"{on_average}, F being one forward of the batch"
    )
