"""Samples that a model draws itself, for runs without pictures.

What x, the data of the objective, is needed for decides what may take its place (docs/method.md):

* L_sup fits the network to x at t in (0, 1). On *samples of the base* that is distillation: what is learned for 2 to 50
  steps is the base as its pipeline guides it, no better and no worse. On the network's *own one-step samples* it would
  be the shifted branch's task under the unshifted condition: whatever is wrong with the samples would be taught as the
  truth. So it has no weight there.
* L_fake and L_correction are taken on what the generator makes now, whatever x is; x only is where the generator starts
  from at times s < 1 (``objective.generator_times``), and there its own sample of the moment is what a few-step sampler
  would start from.
* The real branch knows the data by itself: the frozen base does, which is why samples of one's own need it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from apex_fast.backbones.base import Backbone
from apex_fast.backbones.stock_times import pipeline_times
from apex_fast.condition import Condition
from apex_fast.draws import normal, state_dtype
from apex_fast.path import endpoint
from apex_fast.sampler import sample
from apex_fast.training.config import TrainConfig
from apex_fast.training.encoding import sample_generator
from apex_fast.training.guidance import RealGuidance
from apex_fast.training.models import Autocast
from apex_fast.training.setup import AUTOCAST, make_trainable
from apex_fast.velocities import Velocity

if TYPE_CHECKING:
    from apex_fast.training.loop import Trainer


class BaseSampler:
    """Draws samples of the model that a run starts from, as its own pipeline would: guided as the real branch is, at
    the times of the pipeline's scheduler, by Euler's steps.

    Args:
        backbone: the network as it was loaded; it is moved to ``device``, and a LoRA that the run starts from is added.
        guidance, negative: of the run, and the condition of its negative prompt, batch 1.
        size: (height, width) in pixels.
    """

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        guidance: RealGuidance | None,
        negative: Condition | None,
        size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.config, self.guidance, self.device = config, guidance, device
        self.negative = None if negative is None else negative.to(device)
        self.shape = backbone.latent_shape(*size)
        self.times = pipeline_times(backbone, config.prompts_only.num_inference_steps, *size)
        # What a run trains is not there yet: its LoRA is at zero, and its adapter off in the frozen real branch.
        make_trainable(config, backbone)
        backbone.to(device)
        network: nn.Module = backbone
        if config.mixed_precision != "no":
            network = Autocast(backbone, device.type, AUTOCAST[config.mixed_precision])
        self.velocity: Velocity = network
        if config.mode == "lora":
            from apex_fast.lora import lora_velocities

            frozen = lora_velocities(backbone, "frozen", call=network).real
            assert frozen is not None
            self.velocity = frozen
        backbone.eval()

    @torch.no_grad()
    def __call__(self, condition: Condition, index: int, *, times: Tensor | None = None) -> Tensor:
        """Latents ``[C, h, w]`` fp32 on the CPU of sample ``index``, whose noise depends on the run's seed and on
        ``index`` alone. condition: of batch 1. times: another grid than the pipeline's."""
        noise = torch.randn(1, *self.shape, generator=sample_generator(self.config.seed, index)).to(self.device)
        guidance = self.guidance
        drawn = sample(
            self.velocity,
            noise,
            condition.to(self.device),
            times=self.times if times is None else times,
            guidance_scale=1.0 if guidance is None else guidance.objective_scale,
            negative_condition=None if guidance is None else self.negative,
            guide=None if guidance is None else guidance.guide,
        )
        return drawn[0].float().cpu()


class OwnSamples:
    """x as the generator's one-step sample of the moment, drawn without gradient in the step.

    Noise is drawn for the global batch on every process and cut, so that a run is the same over any number of them.

    Args:
        network: the generator.
        generator: of the noise.
        process: (rank, number of processes).
    """

    def __init__(
        self, network: nn.Module | Velocity, generator: torch.Generator, process: tuple[int, int] = (0, 1)
    ) -> None:
        self.network, self.generator, self.process = network, generator, process

    @torch.no_grad()
    def __call__(self, x: Tensor, condition: Condition) -> Tensor:
        """Samples of the shape and dtype of ``x``, whose values are not used."""
        rank, world = self.process
        noise = normal((world * len(x), *x.shape[1:]), x.device, state_dtype(x), self.generator)
        noise = noise[rank * len(x) : (rank + 1) * len(x)]
        t = torch.ones(len(x), device=x.device, dtype=torch.float32)
        return endpoint(self.network(noise.to(x.dtype), t, condition).to(noise.dtype), noise, t).to(x.dtype)


def own_samples(trainer: Trainer) -> Callable[[Tensor, Condition], Tensor] | None:
    """What replaces x in the steps of a run on the network's own samples; None where x is data, and where nothing
    looks at x (every sample starts from noise alone), so that no pass is wasted."""
    config = trainer.config
    if config.prompts is None or config.prompts_only.samples != "student":
        return None
    times = config.objective.generator_times
    if times.kind == "constant" and times.value == 1.0:
        return None
    generator = torch.Generator(trainer.device).manual_seed(config.seed + 1)
    trainer.generators["own_samples"] = generator
    return OwnSamples(trainer.network, generator, (trainer.processes.rank, trainer.processes.world))


def describe(config: TrainConfig) -> str:
    """What a run from prompts trains on, in a line."""
    own = config.prompts_only
    if own.samples == "student":
        return (
            f"prompts from {config.prompts}, no pictures: the network learns from its own one-step samples and the "
            "frozen base; without L_sup one step is what is trained, and sampling in 2 to 50 steps may get worse "
            "(prompts_only.samples: base keeps it)"
        )
    each = "" if own.samples_per_prompt == 1 else f"{own.samples_per_prompt} "
    return (
        f"prompts from {config.prompts}, no pictures: L_sup learns from {each}samples of the base for each prompt, in "
        f"{own.num_inference_steps} steps, so in many steps the result is the base as it was guided, not better"
    )
