"""What a run needs, how long it takes, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass, field

from apex_fast.planning.advice import Advice, advise
from apex_fast.planning.blueprint import Blueprint, PlanError, blueprint_of
from apex_fast.planning.published import PUBLISHED
from apex_fast.planning.stages import Stage, loaded_on_host
from apex_fast.planning.ways import Planner, Way, mean_share, ways
from apex_fast.training.config import TrainConfig
from apex_fast.training.losses import PEERS


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found. All memory is in bytes.

    Attributes:
        model, config: what was planned.
        chosen: the way that the config takes.
        ways: that one and the others, for comparison.
        held: by category, what lives as long as the run, gradients included.
        embeddings: cached embeddings on the GPU, at most.
        stages: what the GPU needs while the data is encoded, in a step and while validation pictures are drawn.
        host: main memory that loading the model needs.
        kept_vae: the VAE, if it stays because validation pictures are wanted.
        own_text: a text encoder of the model's own, which stays.
        guidance: of the real branch; None if it is not guided.
        flops: of a whole optimizer step on one GPU that trains every term, accumulation included.
        forwards: the same in forwards of the batch; less than the passes where frozen weights need no gradient.
        hours: of the run, or None if no rate was given.
        gpu: bytes of the GPU that was asked about, or None; ``gpus`` how many.
        buckets: bytes that data parallel training adds on every GPU; 0 on one.
        advice: for a run that does not fit.
    """

    model: Blueprint
    config: TrainConfig
    chosen: Way
    ways: list[Way]
    held: dict[str, int]
    embeddings: int
    stages: list[Stage]
    host: int
    kept_vae: int
    own_text: int
    guidance: float | None
    flops: float
    forwards: float
    hours: float | None = None
    rate: str = ""
    gpu: int | None = None
    gpus: int = 1
    buckets: int = 0
    advice: Advice | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def needed(self) -> int:
        """Bytes of every GPU, in the stage that needs the most."""
        return self.fullest.needed

    @property
    def fullest(self) -> Stage:
        """The stage that needs the most."""
        return max(self.stages, key=lambda stage: stage.needed)

    @property
    def fits(self) -> bool | None:
        """Whether the run fits into ``gpu``; None if that was not given."""
        return None if self.gpu is None else self.needed <= self.gpu


def plan(
    config: TrainConfig,
    *,
    gpu: int | None = None,
    gpus: int = 1,
    throughput: float | None = None,
    tflops: float | None = None,
    compare: bool = True,
) -> Plan:
    """Plans a run without loading or downloading anything.

    Args:
        config: the run.
        gpu: bytes of a GPU; a run that does not fit gets advice.
        gpus: how many of them train in parallel, each with the batch of the config.
        throughput: forwards of the batch per second, measured on that GPU; gives hours.
        tflops: the rate at which the GPU computes, in 1e12 operations per second, instead.
        compare: plan the other schedules as well, each with and without gradient checkpointing.

    Raises:
        PlanError: a model that is not known here; ValueError: settings that do not fit it, or rates that are no rates.
    """
    for name, value in (("gpu", gpu), ("gpus", gpus), ("throughput", throughput), ("tflops", tflops)):
        if value is not None and not value > 0:
            raise ValueError(f"plan: {name} must be above 0, got {value}")
    if throughput is not None and tflops is not None:
        raise ValueError("plan: give throughput or tflops, not both; a measured throughput is the better one")
    if config.loss in PEERS:
        raise PlanError(
            f"loss: {config.loss} is not planned; docs/peers.md has its passes and copies, and loss: correction a plan"
        )
    model = blueprint_of(config)
    planner = Planner(model, gpus)
    chosen = planner.way(config)
    found = [chosen]
    if compare:
        own = (chosen.schedule, chosen.checkpointing)
        found = [chosen if which == own else planner.way(other) for which, other in ways(config)]
    step = chosen.step
    accumulated = config.gradient_accumulation_steps
    flops, forwards = step.flops * accumulated, step.flops * accumulated / max(step.forward_flops, 1.0)
    share = mean_share(config, planner.guidance(config) is not None)
    hours, rate = None, ""
    if throughput is not None:
        hours = share * forwards * config.max_train_steps / throughput / 3600
        rate = f"{throughput:g} forwards a second"
    elif tflops is not None:
        hours = share * flops * config.max_train_steps / (tflops * 1e12) / 3600
        rate = f"{tflops:g} TFLOP/s, which was assumed and not measured"
    advice = None
    if gpu is not None and planner.excess(config, gpu) > 0:
        advice = advise(planner, config, gpu)
    return Plan(
        model=model,
        config=config,
        chosen=chosen,
        ways=found,
        held={name: round(size) for name, size in step.held.items()},
        embeddings=planner.embeddings,
        stages=planner.stages(config),
        host=loaded_on_host(model, config, step),
        kept_vae=planner.kept_vae(config),
        own_text=planner.own_text(),
        guidance=planner.guidance(config),
        flops=flops,
        forwards=forwards,
        hours=hours,
        rate=rate,
        gpu=gpu,
        gpus=gpus,
        buckets=planner.buckets(step),
        advice=advice,
        notes=_notes(config, planner),
    )


def _notes(config: TrainConfig, planner: Planner) -> list[str]:
    notes = []
    guidance = planner.guidance(config)
    published = PUBLISHED.get(config.pretrained_model_name_or_path or "")
    if guidance is not None and published is not None and not published.guided:
        # No guidance is 1 in the convention of most pipelines and 0 in that of some.
        none = next(scale for scale in (1.0, 0.0) if planner.backbone.linear_guidance_scale(scale) == 1.0)
        notes.append(
            f"{config.pretrained_model_name_or_path} is used without classifier-free guidance, and this run guides its "
            f"real branch by {guidance:g}; guidance_scale: {none:g} leaves that out"
        )
    if (share := mean_share(config, guidance is not None)) < 1:
        notes.append(
            f"passes and memory are those of a step that trains every term; on average a step costs {share:.2f} of it "
            "(objective.generator_every, objective.supervised_every), which the hours count"
        )
    if config.train_text_encoder:
        notes.append("the text encoder that is trained along is not counted")
    if config.start_lora is not None and config.start_lora_mode == "frozen":
        notes.append("the frozen adapter that the run starts from is not counted")
    if config.compile:
        notes.append("compile: true changes activations and temporary tensors in ways that are not planned")
    return notes
