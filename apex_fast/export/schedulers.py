"""The scheduler with which a stock pipeline does what :func:`apex_fast.sample` does, and how each pipeline is called.

One step of a flow model is ``x = z - F(z, 1, c)``, whatever the family, so one configuration of diffusers'
``FlowMatchEulerDiscreteScheduler`` serves all: 1000 training times, no time shift (neither fixed nor by the size of the
picture), no stretching towards a terminal sigma. With it the sigmas of one step are exactly [1, 0]. The schedulers that
the models come with do other things there: SANA's starts at 0.9997, and Qwen-Image's divides 0 by 0.

What differs by family is the call (:data:`STOCK`): how guidance is turned off, which sigmas N steps have if none are
given, whether the pipeline hands its generator to a scheduler that draws new noise in every step, and whether it rounds
the time that it tells the network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from apex_fast.backbones.loading import backbone_class
from apex_fast.extras import require

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
"""Arguments of ``diffusers.FlowMatchEulerDiscreteScheduler``; ``stochastic_sampling=True`` is the re-noising sampler
(``af.sample(..., stochasticity=1)``)."""


@dataclass(frozen=True)
class Stock:
    """What has to be known of a family's stock pipeline (diffusers 0.42) to sample with it as :func:`apex_fast.sample`
    does.

    Attributes:
        unguided: arguments of the call that turn guidance off, and whatever else changes a picture.
        uniform: whether N steps without ``sigmas=`` take the grid 1, (N - 1) / N, ..., 1 / N. Where not, the last
            sigma is 0.001: the grid has one interval less, and the last step hardly moves.
        seeds_scheduler: whether the pipeline gives its ``generator`` to the scheduler. Where not, new noise comes from
            torch's global generator.
        bf16_time: what a network in bf16 is told in place of 0.75, the second of four times. Where it is not 0.75, the
            pipeline rounds 1000 t to the 8 significant bits of that dtype (the other times stay as they are).
    """

    unguided: dict[str, Any] = field(default_factory=dict)
    uniform: bool = True
    seeds_scheduler: bool = False
    bf16_time: float = 0.75


STOCK: dict[str, Stock] = {
    "sana": Stock({"guidance_scale": 1.0, "use_resolution_binning": False}, uniform=False, seeds_scheduler=True),
    # Guided only with a negative prompt; 1 says so, and keeps the pipeline from warning that there is none.
    "qwen_image": Stock({"true_cfg_scale": 1.0}, bf16_time=0.754),
    # No classifier-free guidance; what the weights take as an input comes from call_arguments.
    "flux": Stock(bf16_time=0.752),
    "z_image": Stock({"guidance_scale": 0.0}),
    "stable_diffusion_3": Stock({"guidance_scale": 1.0}, uniform=False),
    "lumina2": Stock({"guidance_scale": 1.0}),
}
"""By family; held by tests against the pipelines themselves."""


@dataclass(frozen=True)
class Mode:
    """One way to sample, and what the stock pipeline makes of it: ``name``, whether it is ``reproduced`` ("yes", or
    what is off), and ``how``, all in words."""

    name: str
    reproduced: str
    how: str


def modes(family: str, weight_dtype: Literal["fp32", "bf16"]) -> tuple[Mode, ...]:
    """The table of the model card for a pipeline in ``weight_dtype``: one step, a few Euler steps, a few steps with new
    noise in each."""
    stock = STOCK[family]
    several = "yes"
    if stock.bf16_time != 0.75 and weight_dtype == "bf16":
        several = (
            f"2 steps yes; at 4 the network is told the time {stock.bf16_time} in place of 0.75, since this pipeline "
            "rounds times to bf16"
        )
    if stock.uniform:
        grid = "without `sigmas=` this pipeline takes the same times"
    else:
        grid = "without `sigmas=` this pipeline would end at sigma 0.001, one step early"
    if stock.seeds_scheduler:
        noise = "`renoise = True`; the pipeline hands its generator on, so the seed decides all of the noise"
    else:
        noise = (
            "`renoise = True`; the pipeline does not hand its generator on, so the new noise comes from torch's global "
            "one: `torch.manual_seed`"
        )
    return (
        Mode("1 step", "yes", "by the scheduler's configuration alone"),
        Mode("2 or 4 steps, Euler", several, f"with `sigmas=` as in the code; {grid}"),
        Mode("2 or 4 steps, new noise in each", several, noise),
    )


def call_arguments(family: str, *, embedded_guidance: float | None = None) -> dict[str, Any]:
    """Arguments of the pipeline's call that turn guidance off as the family does.

    embedded_guidance: of the run, for weights that take the guidance scale as an input; None is the pipeline's own.
        Weights of the family that take none ignore it.
    """
    arguments = dict(STOCK[family].unguided)
    embedded = backbone_class(family).teacher_guidance.embedded
    if embedded is not None:
        arguments["guidance_scale"] = embedded if embedded_guidance is None else embedded_guidance
    return arguments


def scheduler() -> Any:
    """The ``FlowMatchEulerDiscreteScheduler`` that is exported."""
    return require("diffusers", extra="train").FlowMatchEulerDiscreteScheduler(**SCHEDULER)
