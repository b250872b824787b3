"""What a run needs, how long it takes, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass, field

from apex_fast.planning.advice import Advice, advise
from apex_fast.planning.blueprint import Blueprint, blueprint_of
from apex_fast.planning.ways import Planner, Way, ways
from apex_fast.training.config import TrainConfig


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found. All memory is in bytes.

    Attributes:
        model, config: what was planned.
        chosen: the way that the config takes.
        ways: that one and the others, for comparison.
        held: by category, what lives as long as the run, gradients included.
        embeddings: cached embeddings on the GPU, at most.
        before: text encoders and VAE, on the GPU while the data is encoded and dropped before the first step.
        kept_vae: of those, what stays because validation pictures are wanted.
        own_text: a text encoder of the model's own, which stays.
        guidance: of the real branch; None if it is not guided.
        flops: of a whole optimizer step on one GPU, accumulation included.
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
    before: int
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
        """Bytes of every GPU."""
        return self.chosen.needed

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
    hours, rate = None, ""
    if throughput is not None:
        hours = forwards * config.max_train_steps / throughput / 3600
        rate = f"{throughput:g} forwards a second"
    elif tflops is not None:
        hours = flops * config.max_train_steps / (tflops * 1e12) / 3600
        rate = f"{tflops:g} TFLOP/s, which was assumed and not measured"
    advice = None
    if gpu is not None and chosen.needed > gpu:
        advice = advise(planner, config, gpu)
    return Plan(
        model=model,
        config=config,
        chosen=chosen,
        ways=found,
        held={name: round(size) for name, size in step.held.items()},
        embeddings=planner.embeddings,
        before=planner.before(config),
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
        notes=_notes(config),
    )


def _notes(config: TrainConfig) -> list[str]:
    notes = []
    if config.train_text_encoder:
        notes.append("the text encoder that is trained along is not counted")
    if config.start_lora is not None and config.start_lora_mode == "frozen":
        notes.append("the frozen adapter that the run starts from is not counted")
    if config.compile:
        notes.append("compile: true changes activations and temporary tensors in ways that are not planned")
    return notes
