"""The objective as the paper writes it: lambda_p L_fake + lambda_e L_mix (APEX, arXiv 2604.12322, Eq. 25).

Its passes: the generator F(x_t, t, c) at data points, the shifted branch there under a stop-gradient (the target of
Eq. 24), and the shifted branch at the generated points (L_fake, Eq. 12), which the generator's velocity leads to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import ops
from .roles import StepInputs, Terms, generate, query, shifted, start, trained
from .schedules import Backward, NoSync, quiet

OWN_FIELDS = ("paper_fake_weight", "paper_mix_weight", "fresh", "detach_x_fake")
"""Fields of :class:`apex_fast.ApexObjective` that this loss alone reads."""

SHARED_FIELDS = ("mix_weight", "paper_times", "clip")
"""Those that it reads as the correction loss does, ``clip`` for its statistics alone; all others are that loss's."""


def all_graphs(inputs: StepInputs) -> Terms:
    """Both terms with their graphs alive."""
    terms = Terms()
    x_t = start(inputs)
    velocity = _mix(inputs, terms, x_t)
    if inputs.fake_weight > 0:
        _fake(inputs, terms, velocity.detach() if inputs.detach_x_fake else velocity, x_t)
    return terms


def one_backward(inputs: StepInputs, backward: Backward, no_sync: NoSync | None) -> Terms:
    """`joint` and `retain`: both graphs, one backward; x_fake needs the generator's pass, so nothing can be stacked."""
    terms = all_graphs(inputs)
    assert terms.total is not None  # the objective refuses a step that trains nothing
    backward(terms.total)
    terms.settle()
    return terms


def sequential(inputs: StepInputs, backward: Backward, no_sync: NoSync | None) -> Terms:
    """One graph at a time; only for a detached x_fake, whose two terms share no graph.

    Raises:
        ValueError: x_fake is not detached: L_fake then runs through the generator's graph, which would have to be kept.
    """
    if inputs.fake_weight > 0 and not inputs.detach_x_fake:
        raise ValueError(
            'schedule="sequential" cannot serve the paper loss with an undetached x_fake: L_fake needs the graph of '
            'the generator while the shifted branch runs; use schedule="retain", or set detach_x_fake=True'
        )
    terms = Terms()
    x_t = start(inputs)
    with quiet(no_sync, last=inputs.fake_weight == 0):
        velocity = _mix(inputs, terms, x_t)
        if terms.total is not None:
            backward(terms.total)
        terms.settle()
        velocity = velocity.detach()
    if inputs.fake_weight > 0:
        _fake(inputs, terms, velocity, x_t, backward)
        terms.settle()
    return terms


def _mix(inputs: StepInputs, terms: Terms, x_t: Tensor) -> Tensor:
    """L_mix with its weight t^2 / w(t) = t (1 - t) (Eq. 24, Prop. 2); returns the generator's velocity there."""
    t = inputs.draws.s
    mixes = inputs.paper_weight > 0
    v_fake = None
    if mixes and inputs.mix_weight > 0:
        with torch.no_grad():
            v_fake = shifted(inputs, x_t, t)
    through = mixes or (inputs.fake_weight > 0 and not inputs.detach_x_fake)
    with torch.set_grad_enabled(torch.is_grad_enabled() and through):
        velocity = generate(inputs, x_t)
        if through:
            trained(velocity, "generator")
    if mixes:
        mix = ops.mixed_velocity_loss(
            velocity,
            inputs.x,
            inputs.draws.z,
            v_fake=v_fake,
            mix_weight=inputs.mix_weight if v_fake is not None else 0.0,
        )
        terms.add("mix", t * (1 - t) * mix, inputs.paper_weight)
    if v_fake is not None:
        with torch.no_grad():
            # For its statistics alone: here the correction dv (Eq. 17) is taken at data points, as the paper writes it.
            _, _, stats = ops.shifted_velocity_loss(None, v_fake, velocity.detach(), inputs.draws.z, clip=inputs.clip)
            terms.stats = stats
    return velocity


def _fake(inputs: StepInputs, terms: Terms, velocity: Tensor, x_t: Tensor, backward: Backward | None = None) -> None:
    """L_fake (Eq. 12); where x_fake is not detached its gradient reaches the generator through input and target."""
    x_fake_t, target = query(inputs, velocity, x_t)
    v_shift = trained(shifted(inputs, x_fake_t, inputs.draws.t_query), "shifted")
    fake, _, _ = ops.shifted_velocity_loss(None, v_shift, v_shift.detach(), target, clip=None)
    term = terms.add("fake", fake, inputs.fake_weight)
    if backward is not None:
        backward(term)


SCHEDULES: dict[str, Callable[[StepInputs, Backward, NoSync | None], Terms]] = {
    "joint": one_backward,
    "retain": one_backward,
    "sequential": sequential,
}
