"""Suite ``step``: time and peak memory of a whole training step, without the optimizer.

=====================  =============================================================================================
way                    what it runs
=====================  =============================================================================================
flow_matching          one forward and backward on data: the floor of the memory
naive                  the same losses as the library's in plain torch, one backward, so that all graphs are alive
three_networks         a step in the style of DMD2: student, teacher, and a second trained network for the student's
                       samples; no adversarial head, one update of each
apex_fast joint,       the three schedules (:mod:`apex_fast.schedules`)
retain, sequential
=====================  =============================================================================================

What is trained: ``full``, all weights, the network itself being the real branch; ``full, frozen copy``, the same with a
copy as real branch; ``lora``, an adapter, whose frozen base is the real branch.

Gradients are added to buffers that exist, as in an accumulating step. Peaks count weights, gradients, inputs and what
comes and goes, of the networks that a way needs. Before anything is timed, the gradients of the three schedules are
compared with the naive way's. The floor of a time is the sum of the passes of a way, each timed alone in the same run.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apex_fast import ApexObjective, ConditionShift, Velocities
from apex_fast.backbones.base import Backbone
from apex_fast.condition import Condition
from apex_fast.draws import Draws
from apex_fast.lora import LoraSettings, add_lora, lora_velocities
from apex_fast.passes import Passes, step_passes

from ..allocator import release, touch
from ..report import Row, SuiteResult
from ..timing import interleave, peak_extra_bytes
from .networks import Network, Settings, networks
from .ops_cases import DTYPES

SCHEDULES = ("joint", "retain", "sequential")
#: Largest relative distance of two gradients that are the same but for the order of their sums.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.05}


@dataclass
class Way:
    """One way to make a step: what it runs, which networks it holds and trains, and its passes."""

    run: Callable[[], object]
    held: list[nn.Module]
    passes: Passes


def run_suite(settings: Settings, header: dict[str, Any]) -> SuiteResult:
    """All networks, modes and sizes."""
    rows: list[Row] = []
    for network in networks(settings.device, settings.quick):
        if settings.only not in network.name:
            continue
        for mode in network.modes:
            rows += _mode(network, mode, settings)
    return SuiteResult(rows)


def _mode(network: Network, mode: str, settings: Settings) -> list[Row]:
    backbone = network.build(DTYPES[settings.dtype], settings.device)
    velocities = _roles(backbone, network, mode)
    others: list[Backbone] | Exception
    try:
        others = _other_networks(backbone, mode)
    except torch.OutOfMemoryError as error:
        others = error
    rows = []
    for edge in network.edges:
        print(f"step {network.name} {mode} {settings.dtype} {edge}", file=sys.stderr, flush=True)
        rows += measure(network, mode, edge, backbone, velocities, others, settings)
        release()
    return rows


def _roles(backbone: Backbone, network: Network, mode: str) -> Velocities:
    if mode == "lora":
        add_lora(backbone, LoraSettings(rank=network.rank), seed=0)
        return lora_velocities(backbone)
    return Velocities.from_module(backbone, real="frozen" if mode == "full, frozen copy" else "live")


def _other_networks(backbone: Backbone, mode: str) -> list[Backbone]:
    """Teacher and the network that is fitted to the student's samples, each with weights of its own."""
    teacher = copy.deepcopy(backbone).requires_grad_(False)
    fitted = copy.deepcopy(backbone)
    if mode == "lora":
        teacher.transformer.disable_adapters()
    return [teacher, fitted]


def measure(
    network: Network,
    mode: str,
    edge: int,
    backbone: Backbone,
    velocities: Velocities,
    others: list[Backbone] | Exception,
    settings: Settings,
) -> list[Row]:
    """The rows of one size."""
    x, condition = network.batch_of(backbone, edge, settings.device)
    objective = ApexObjective(ConditionShift(scale=-1.0, bias=0.5).to(x.device), warmup_steps=0, ramp_steps=0)
    draws = objective.draw(x, torch.Generator().manual_seed(1))
    batch = _Batch(x, condition, draws, objective)
    ways = make_ways(batch, backbone, velocities, others if isinstance(others, list) else None)
    wrong: dict[str, str] = {}
    if isinstance(others, Exception):
        wrong["three_networks"] = _failure(others)
    wrong |= _disagreements(ways, backbone, settings.dtype)
    calls = {name: way.run for name, way in ways.items()}
    extra: dict[str, int] = {}
    for name, call in calls.items():
        try:
            extra[name] = peak_extra_bytes(call, settings.device)
        except torch.OutOfMemoryError as error:
            wrong[name] = _failure(error)
    timed = {name: call for name, call in calls.items() if name not in wrong}
    alone = pass_calls(batch, velocities)
    release()
    if settings.device == "cpu":
        touch(max(extra.values()) * 5 // 4)
    timings = interleave({**timed, **alone}, rounds=settings.rounds, block_ms=0.0, device=settings.device, warm_up=2)
    for module in {id(m): m for way in ways.values() for m in way.held}.values():
        module.zero_grad(set_to_none=True)

    medians = {name: timings[name].p50 for name in alone}
    peaks = {name: held_bytes(ways[name].held, [x, condition.prompt_embeds]) + extra[name] for name in extra}
    rows = []
    for name in ["flow_matching", "naive", "three_networks", *(f"apex_fast {s}" for s in SCHEDULES)]:
        row = Row(
            "step", network.name, name, mode, settings.dtype, list(x.shape), f"{network.tokens} text tokens",
            error=wrong.get(name),
        )  # fmt: skip
        if not row.error:
            timing = timings[name]
            row.p20_ms, row.p50_ms, row.p80_ms = timing.p20, timing.p50, timing.p80
            row.calls, row.page_faults = len(timing.samples), timing.faults_per_call
            row.passes_ms = passes_alone(ways[name].passes, medians)
            row.time_over_passes = row.p50_ms / row.passes_ms
            row.peak_bytes, row.extra_bytes = peaks[name], extra[name]
            row.weight_bytes = weight_bytes(ways[name].held)
            row.peak_over_flow_matching = peaks[name] / peaks["flow_matching"] if "flow_matching" in peaks else None
            row.ratio_to_eager = timings["naive"].p50 / timing.p50 if "naive" in timings else None
        rows.append(row)
    return rows


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"


# ---- the ways


@dataclass
class _Batch:
    x: Tensor
    condition: Condition
    draws: Draws
    objective: ApexObjective


def make_ways(
    batch: _Batch, backbone: Backbone, velocities: Velocities, others: list[Backbone] | None
) -> dict[str, Way]:
    """The ways by name; without ``others`` the three networks are left out."""
    copies = [velocities.real] if isinstance(velocities.real, Backbone) else []
    ways = {
        "flow_matching": Way(partial(flow_matching, batch, backbone), [backbone], Passes(0, 1, 1)),
        "naive": Way(partial(naive, batch, velocities), [backbone, *copies], step_passes("retain")),
    }
    if others is not None:
        teacher, fitted = others
        run = partial(three_networks, batch, backbone, teacher, fitted)
        ways["three_networks"] = Way(run, [backbone, teacher, fitted], Passes(2, 2, 2))
    for schedule in SCHEDULES:
        run = partial(
            batch.objective.backward,
            velocities,
            batch.x,
            batch.condition,
            step=0,
            draws=batch.draws,
            schedule=schedule,
        )
        ways[f"apex_fast {schedule}"] = Way(run, [backbone, *copies], step_passes(schedule))
    return ways


def _column(times: Tensor) -> Tensor:
    return times.view(-1, 1, 1, 1)


def flow_matching(batch: _Batch, network: Callable[..., Tensor]) -> None:
    """A step of plain flow matching, as in any trainer."""
    _flow_matching_loss(batch, network).backward()


def _flow_matching_loss(batch: _Batch, network: Callable[..., Tensor]) -> Tensor:
    x, z, t = batch.x, batch.draws.z_sup, batch.draws.t_sup
    x_t = torch.lerp(x, z, _column(t))
    return F.mse_loss(network(x_t, t, batch.condition).float(), z - x)


def naive(batch: _Batch, velocities: Velocities) -> None:
    """The objective as one writes it down first."""
    draws, condition, objective = batch.draws, batch.condition, batch.objective
    generator = velocities.generator
    x_s = torch.lerp(batch.x, draws.z, _column(draws.s))
    v_gen = generator(x_s, draws.s, condition).float()
    x_fake = (x_s - _column(draws.s) * v_gen).detach()
    x_fake_t = torch.lerp(x_fake, draws.z_query, _column(draws.t_query))
    with torch.no_grad():
        v_real = (velocities.real or generator)(x_fake_t, draws.t_query, condition).float()
    embeds, mask, shift = condition.prompt_embeds, condition.prompt_embeds_mask, objective.shift
    shifted_embeds = torch.where(mask[..., None], shift.scale * embeds + shift.bias, embeds).to(embeds.dtype)
    v_shift = generator(x_fake_t, draws.t_query, Condition(shifted_embeds, mask)).float()
    fake = F.mse_loss(v_shift, draws.z_query - x_fake)
    with torch.no_grad():
        goal = v_gen - (v_shift - v_real).clamp(-objective.clip, objective.clip)
    correction = F.mse_loss(v_gen, goal)
    supervised = _flow_matching_loss(batch, generator)
    weights = objective.fake_weight, objective.correction_weight, objective.supervised_weight
    (weights[0] * fake + weights[1] * correction + weights[2] * supervised).backward()


def three_networks(batch: _Batch, student: Backbone, teacher: Backbone, fitted: Backbone) -> None:
    """Distribution matching with a teacher and a second trained network: the student's update, then the other's."""
    draws, condition = batch.draws, batch.condition
    x_s = torch.lerp(batch.x, draws.z, _column(draws.s))
    x_fake = x_s - _column(draws.s) * student(x_s, draws.s, condition).float()
    with torch.no_grad():
        t = draws.t_query
        x_t = torch.lerp(x_fake, draws.z_query, _column(t))
        x_real_hat = x_t - _column(t) * teacher(x_t, t, condition).float()
        x_fake_hat = x_t - _column(t) * fitted(x_t, t, condition).float()
        normaliser = (x_fake - x_real_hat).abs().mean((1, 2, 3), keepdim=True)
        goal = x_fake - (x_fake_hat - x_real_hat) / normaliser
    (0.5 * F.mse_loss(x_fake, goal)).backward()
    x_fake, z, t = x_fake.detach(), draws.z_sup, draws.t_sup
    F.mse_loss(fitted(torch.lerp(x_fake, z, _column(t)), t, condition).float(), z - x_fake).backward()


# ---- what they are measured against


def pass_calls(batch: _Batch, velocities: Velocities) -> dict[str, Callable[[], object]]:
    """Single passes of the batch: forward alone, forward and backward, and the real branch's forward."""
    draws = batch.draws
    arguments = (batch.x, draws.t_query, batch.condition)

    def forward(role: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return role(*arguments)

    def both() -> None:
        velocity = velocities.generator(*arguments)
        velocity.backward(torch.ones_like(velocity))

    return {
        "pass: forward": partial(forward, velocities.generator),
        "pass: real": partial(forward, velocities.real or velocities.generator),
        "pass: forward and backward": both,
    }


def passes_alone(passes: Passes, medians: dict[str, float]) -> float:
    """Sum of the passes in ms; one of those without gradient, if there are any, is the real branch's."""
    without = passes.forward_no_grad
    real = min(without, 1)
    # Every forward whose graph is kept has its backward.
    return (
        (without - real) * medians["pass: forward"]
        + real * medians["pass: real"]
        + passes.backward * medians["pass: forward and backward"]
    )


def _unique(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Parameters and buffers, shared ones once."""
    return _unique(t for module in modules for t in (*module.parameters(), *module.buffers()))


def held_bytes(modules: list[nn.Module], inputs: Iterable[Tensor]) -> int:
    """What is there before a step: weights, a gradient for each that is trained, and the inputs."""
    trained = {id(p): p.nbytes for module in modules for p in module.parameters() if p.requires_grad}
    return weight_bytes(modules) + sum(trained.values()) + _unique(inputs)


def _disagreements(ways: dict[str, Way], backbone: Backbone, dtype: str) -> dict[str, str]:
    """Which schedules have other gradients than the naive way. Leaves buffers of gradients in place for all ways."""
    found: dict[str, list[Tensor]] = {}
    failed: dict[str, str] = {}
    for name, way in ways.items():
        for module in way.held:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
        try:
            way.run()
        except torch.OutOfMemoryError as error:
            failed[name] = _failure(error)
            continue
        if name == "naive" or name.startswith("apex_fast"):
            found[name] = [p.grad.detach().clone() for p in backbone.parameters() if p.requires_grad]
            if name != "naive" and "naive" in found:
                pairs = list(zip(found.pop(name), found["naive"], strict=True))
                distance = sum((a.double() - b.double()).square().sum() for a, b in pairs) ** 0.5
                size = sum(b.double().square().sum() for _, b in pairs) ** 0.5
                if not distance <= TOLERANCE[dtype] * size:
                    failed[name] = (
                        f"wrong: its gradient is {distance / size:.2g} of the naive one's size away from it "
                        f"(allowed: {TOLERANCE[dtype]:g})"
                    )
    return failed
