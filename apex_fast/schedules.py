"""How the passes of a step of the `correction` objective are ordered: the same gradients for other memory and time.

==============  ==========================================================  ===============  ==========================
schedule        passes                                                      graphs alive     for
==============  ==========================================================  ===============  ==========================
``joint``       generator and real branch without gradient, then one        3, in one pass   small and sharded networks
                stacked pass over generator, shifted branch and data
``retain``      generator (graph kept), real branch, shifted branch, one    2                memory to spare
                backward through both; then the data term
``sequential``  generator and real branch without gradient, shifted branch  1                large networks
                forward + backward, generator recomputed and driven
                backward by its known gradient; then the data term
==============  ==========================================================  ===============  ==========================

Each takes the step, ``backward(loss)`` and ``no_sync()``, a context for everything but the last backward, and
accumulates gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from . import ops
from .condition import Condition, concatenate
from .roles import (
    StepInputs,
    Terms,
    call,
    generate,
    loss_arguments,
    query,
    real,
    shifted,
    start,
    supervised_loss,
    supervised_start,
    trained,
)

Backward = Callable[[Tensor], object]
NoSync = Callable[[], AbstractContextManager]


def all_graphs(inputs: StepInputs) -> Terms:
    """Every term with its graph alive; ``total.backward()`` is the caller's."""
    terms = Terms()
    if inputs.adversarial:
        _adversarial(inputs, terms)
    if inputs.supervised_weight > 0:
        terms.add("supervised", supervised_loss(inputs), inputs.supervised_weight)
    return terms


def _adversarial(inputs: StepInputs, terms: Terms) -> None:
    """L_fake (Eq. 12) and the correction on generated trajectories (Eq. 13, 17, 27), with both graphs alive."""
    corrects, fits = inputs.correction_weight > 0, inputs.fake_weight > 0
    with torch.set_grad_enabled(torch.is_grad_enabled() and corrects):
        x_s = start(inputs)
        v_gen = generate(inputs, x_s)
        if corrects:
            trained(v_gen, "generator")
    with torch.no_grad():
        x_fake_t, target = query(inputs, v_gen.detach(), x_s)
    reals = real(inputs, x_fake_t) if inputs.measure_correction else None
    with torch.set_grad_enabled(torch.is_grad_enabled() and fits):
        v_shift = shifted(inputs, x_fake_t, inputs.draws.t_query)
        if fits:
            trained(v_shift, "shifted")
    v_real, options = loss_arguments(inputs, v_shift, reals)
    fake, correction, stats = ops.shifted_velocity_loss(v_gen if corrects else None, v_shift, v_real, target, **options)
    terms.add("fake", fake, inputs.fake_weight)
    if inputs.measure_correction:
        terms.add("correction", correction, inputs.correction_weight)
        terms.stats = stats


def joint(inputs: StepInputs, backward: Backward, no_sync: NoSync | None) -> Terms:
    """One pass with gradient over everything that is trained; it has one backward, so ``no_sync`` is not used.

    Under dropout the generator draws new masks in the stacked pass, so its gradient then is that of another, equally
    likely, draw.
    """
    terms = Terms()
    stack: list[tuple[Tensor, Tensor, Tensor | Condition]] = []
    reals = v_shift = v_gen = target = None
    if inputs.adversarial:
        with torch.no_grad():
            x_s = start(inputs)
            x_fake_t, target = query(inputs, generate(inputs, x_s), x_s)
            reals = real(inputs, x_fake_t) if inputs.measure_correction else None
            if inputs.fake_weight == 0:
                v_shift = shifted(inputs, x_fake_t, inputs.draws.t_query)
        if inputs.correction_weight > 0:
            stack.append((x_s, inputs.draws.s, inputs.condition))
        if inputs.fake_weight > 0:
            stack.append((x_fake_t, inputs.draws.t_query, inputs.shift(inputs.condition)))
    z_sup = None
    if inputs.supervised_weight > 0:
        x_t, z_sup, t = supervised_start(inputs)
        stack.append((x_t, t, inputs.condition))
    samples, times, conditions = zip(*stack, strict=True)
    stacked = call(
        inputs, "generator", inputs.velocities.generator, torch.cat(samples), torch.cat(times), concatenate(conditions)
    )
    parts = list(trained(stacked, "generator").split(inputs.x.shape[0]))
    if inputs.correction_weight > 0:
        v_gen = parts.pop(0)
    if inputs.fake_weight > 0:
        v_shift = parts.pop(0)
    if v_shift is not None and target is not None:
        v_real, options = loss_arguments(inputs, v_shift, reals)
        fake, correction, stats = ops.shifted_velocity_loss(v_gen, v_shift, v_real, target, **options)
        terms.add("fake", fake, inputs.fake_weight)
        if inputs.measure_correction:
            terms.add("correction", correction, inputs.correction_weight)
            terms.stats = stats
    if z_sup is not None:
        terms.add("supervised", ops.mixed_velocity_loss(parts.pop(0), inputs.x, z_sup), inputs.supervised_weight)
    assert terms.total is not None  # the objective refuses a step that trains nothing
    backward(terms.total)
    terms.settle()
    return terms


def retain(inputs: StepInputs, backward: Backward, no_sync: NoSync | None) -> Terms:
    """Generator and shifted branch in one backward, the data term in a second one."""
    terms = Terms()
    if inputs.adversarial:
        with quiet(no_sync, last=inputs.supervised_weight == 0):
            _adversarial(inputs, terms)
            if terms.total is not None:
                backward(terms.total)
            terms.settle()
    _supervised_phase(inputs, terms, backward)
    return terms


def sequential(inputs: StepInputs, backward: Backward, no_sync: NoSync | None) -> Terms:
    """One graph at a time; the generator runs twice, the second time under the random state of the first."""
    terms = Terms()
    corrects, supervises = inputs.correction_weight > 0, inputs.supervised_weight > 0
    if inputs.adversarial:
        with quiet(no_sync, last=not (supervises or corrects)):
            x_s, state, grad_gen = _shifted_phase(inputs, terms, backward)
        if grad_gen is not None:
            with quiet(no_sync, last=not supervises):
                with random_state(inputs.x.device, state):
                    v_gen = trained(generate(inputs, x_s), "generator")
                # A sum in fp32, so that a loss scaler multiplies the gradient before it is rounded to half precision.
                backward((v_gen.to(grad_gen.dtype) * grad_gen).sum())
                del v_gen, grad_gen
    _supervised_phase(inputs, terms, backward)
    return terms


def _supervised_phase(inputs: StepInputs, terms: Terms, backward: Backward) -> None:
    if inputs.supervised_weight > 0:
        backward(terms.add("supervised", supervised_loss(inputs), inputs.supervised_weight))
        terms.settle()


def _shifted_phase(inputs: StepInputs, terms: Terms, backward: Backward) -> tuple[Tensor, RandomState, Tensor | None]:
    """Shifted branch forward and backward while no generator graph exists.

    Returns the generator's start, the random state before its first run, and the gradient that its velocity will get.
    """
    fits = inputs.fake_weight > 0
    with torch.no_grad():
        x_s = start(inputs)
        state = get_random_state(inputs.x.device)
        x_fake_t, target = query(inputs, generate(inputs, x_s), x_s)
        reals = real(inputs, x_fake_t) if inputs.measure_correction else None
    with torch.set_grad_enabled(fits):
        v_shift = shifted(inputs, x_fake_t, inputs.draws.t_query)
        if fits:
            trained(v_shift, "shifted")
        v_real, options = loss_arguments(inputs, v_shift, reals)
        fake, correction, stats = ops.shifted_velocity_loss(None, v_shift, v_real, target, **options)
        term = terms.add("fake", fake, inputs.fake_weight)
        if fits:
            backward(term)
        terms.settle()
    if not inputs.measure_correction:
        return x_s, state, None
    terms.add("correction", correction.detach(), inputs.correction_weight)
    terms.stats = stats
    if inputs.correction_weight == 0:
        return x_s, state, None
    # After the backward above, whose graph is gone: this gradient does not add to the peak.
    with torch.no_grad():
        upstream = torch.full_like(correction, inputs.correction_weight / max(correction.shape[0], 1))
        grad_gen, _, _ = ops.shifted_velocity_loss_backward(
            torch.zeros_like(upstream),
            upstream,
            v_shift.detach(),
            v_real,
            target,
            output_mask=[True, False, False],
            grad_gen_dtype=upstream.dtype,
            **options,
        )
    return x_s, state, grad_gen


SCHEDULES: dict[str, Callable[[StepInputs, Backward, NoSync | None], Terms]] = {
    "joint": joint,
    "retain": retain,
    "sequential": sequential,
}


# ---- what the phases need


def quiet(no_sync: NoSync | None, *, last: bool) -> AbstractContextManager:
    """Context of a phase, forward and backward: only the last one of a step synchronises gradients across processes."""
    return nullcontext() if last or no_sync is None else no_sync()


RandomState = tuple[Tensor, Tensor | None]


def get_random_state(device: torch.device) -> RandomState:
    """State of the global generators that a network on ``device`` may draw from: the CPU's and the device's."""
    on_device = None if device.type in ("cpu", "meta") else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), on_device


def set_random_state(device: torch.device, state: RandomState) -> None:
    """Restores :func:`get_random_state`."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1], device)


@contextmanager
def random_state(device: torch.device, state: RandomState) -> Iterator[None]:
    """Runs its body under ``state`` and leaves the global generators as it found them."""
    found = get_random_state(device)
    set_random_state(device, state)
    try:
        yield
    finally:
        set_random_state(device, found)
