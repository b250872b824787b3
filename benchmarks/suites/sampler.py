"""Suite ``sampler``: latency and images per second of sampling, in latents: no text encoder, no VAE.

``apex_fast`` is :func:`apex_fast.sample`, ``eager`` an Euler loop in plain torch over the same network calls. Guided
runs ask the network once a step, under condition and negative condition stacked. The sampler's own share is the time of
the same run over a network that answers at once with a tensor made before, relative to the whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apex_fast import sample
from apex_fast.condition import Condition, concatenate
from apex_fast.velocities import Guide, Velocity

from ..allocator import release
from ..report import Row, SuiteResult, add_ratios
from ..timing import interleave
from .networks import Network, Settings, networks
from .ops_cases import DTYPES, TOLERANCE

STEPS = (1, 2, 4, 50)
MODES = ("unguided", "guided")
SCALE = 4.5


def run_suite(settings: Settings, header: dict[str, Any]) -> SuiteResult:
    """All networks at their middle size, numbers of steps and both modes."""
    rows: list[Row] = []
    for network in networks(settings.device, settings.quick):
        if settings.only in network.name:
            rows += _network(network, settings)
            release()
    return SuiteResult(rows)


def _network(network: Network, settings: Settings) -> list[Row]:
    backbone = network.build(DTYPES[settings.dtype], settings.device).requires_grad_(False).eval()
    edge = network.edges[len(network.edges) // 2]
    noise, condition = network.batch_of(backbone, edge, settings.device)
    # What a family's pipeline does with two velocities, if that is more than a line between them.
    linear = backbone.linear_guidance_scale(SCALE)
    guide, scale = (backbone.guide, SCALE) if linear is None else (None, linear)
    negative = Condition(torch.zeros_like(condition.prompt_embeds), condition.prompt_embeds_mask)
    rows = []
    for mode in MODES:
        for steps in STEPS:
            case = f"{network.name}, {steps} step{'s' * (steps > 1)}"
            print(f"sampler {case} {mode} {settings.dtype}", file=sys.stderr, flush=True)
            run = Run(noise, condition, negative if mode == "guided" else None, scale, guide, steps)
            rows += measure(case, mode, backbone, run, network, settings)
    return rows


@dataclass
class Run:
    """What is sampled. Without ``negative`` it is not guided."""

    noise: Tensor
    condition: Condition
    negative: Condition | None
    scale: float
    guide: Guide | None
    steps: int


def ours(velocity: Velocity, run: Run) -> Tensor:
    """With this library."""
    guided = run.negative is not None
    return sample(
        velocity,
        run.noise,
        run.condition,
        num_inference_steps=run.steps,
        negative_condition=run.negative,
        guidance_scale=run.scale if guided else 1.0,
        guide=run.guide if guided else None,
    )


@torch.no_grad()
def eager(velocity: Velocity, run: Run) -> Tensor:
    """The loop in plain torch."""
    x, batch = run.noise, run.noise.shape[0]
    both = None if run.negative is None else concatenate([run.condition, run.negative])
    times = torch.linspace(1, 0, run.steps + 1, device=x.device)
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        if both is None:
            v = velocity(x, t.expand(batch), run.condition).float()
        else:
            stacked = velocity(torch.cat([x, x]), t.expand(2 * batch), both).float()
            v, v_negative = stacked.chunk(2)
            v = v_negative + run.scale * (v - v_negative) if run.guide is None else run.guide(v, v_negative, run.scale)
        x = x + (t_next - t) * v
    return x


PROVIDERS: dict[str, Callable[[Velocity, Run], Tensor]] = {"eager": eager, "apex_fast": ours}


def measure(case: str, mode: str, velocity: Velocity, run: Run, network: Network, settings: Settings) -> list[Row]:
    """The rows of one number of steps."""
    asked = run.noise if run.negative is None else torch.cat([run.noise, run.noise])
    answer = asked.to(DTYPES[settings.dtype])
    results = {name: way(velocity, run) for name, way in PROVIDERS.items()}
    calls: dict[str, Callable[[], object]] = {}
    for name, way in PROVIDERS.items():
        calls[name] = lambda way=way: way(velocity, run)
        calls[f"{name} alone"] = lambda way=way: way(lambda x, t, c: answer, run)
    timings = interleave(calls, rounds=settings.rounds, block_ms=0.0, device=settings.device, warm_up=2)
    rows = []
    size = f"{network.tokens} text tokens"
    for name in PROVIDERS:
        row = Row("sampler", case, name, mode, settings.dtype, list(run.noise.shape), size)
        error = (results[name] - results["eager"]).abs().max() / results["eager"].abs().max()
        # Errors of a step are carried into the next.
        allowed = TOLERANCE[DTYPES[settings.dtype]] * (1 + run.steps)
        if not error <= allowed:
            row.error = f"wrong: off by {error:.2g} of the largest value of the plain loop (allowed: {allowed:.2g})"
        else:
            timing = timings[name]
            row.p20_ms, row.p50_ms, row.p80_ms = timing.p20, timing.p50, timing.p80
            row.calls, row.page_faults = len(timing.samples), timing.faults_per_call
            row.images_per_second = run.noise.shape[0] / timing.p50 * 1e3
            row.sampler_share = timings[f"{name} alone"].p50 / timing.p50
        rows.append(row)
    add_ratios(rows)
    return rows
