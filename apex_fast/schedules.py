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

The data term is L_sup. The consistency term and L_mix, where they have weight, follow it in the same way, each a pass
of its own (a part of the stacked pass in ``joint``); what they ask of the network without gradient comes right before.

Each takes the step, ``backward(loss)`` and ``no_sync()``, a context for everything but the last backward, and
accumulates gradients.

The loss runs in one of two ways, N being the bytes of one velocity. *Recompute*: losses first, and in backward the
velocities are read again; 8N for both gradients. *One pass*: a schedule knows what each loss of each sample weighs, so
losses and gradients come from a single read; 5N, and v_real and the target are given back before the backward runs.
What decides is how a gradient that is known gets into the network:

* Without a ``backward`` of the caller's it is handed to the velocity as it is. One pass wins in all three schedules.
  Where a sample's weight follows from the loss itself, the gradient is multiplied by it in place (2N more), which
  leaves one pass ahead (:mod:`apex_fast.weighting`).
* A caller's ``backward`` may scale the loss, by a number that only the device knows, so a known gradient has to be
  multiplied by it: 2N more for each. ``sequential``, which needs its two gradients at different times, would otherwise
  read the velocities three times (11N); one pass wins (9N). ``retain`` and ``joint`` recompute (8N against 9N).
* What a caller's loss scale multiplies must not have vanished in fp16: ``sequential`` then keeps the generator's
  gradient in fp32, and reads an fp16 velocity of the shifted branch through an fp32 copy, to get its gradient in fp32.

``objective(...)``, whose caller may never ask for a gradient, recomputes. Measured with
``python benchmarks/run.py --suite ops --only one_pass --threads 1`` (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops
from .condition import Condition, concatenate
from .path import per_sample
from .roles import (
    StepInputs,
    Terms,
    call,
    data_terms,
    generate,
    loss_arguments,
    query,
    real,
    shifted,
    start,
    trained,
)
from .weighting import Weighed, weigh

Backward = Callable[[Tensor], object]
NoSync = Callable[[], AbstractContextManager]


def all_graphs(inputs: StepInputs) -> Terms:
    """Every term with its graph alive; ``total.backward()`` is the caller's."""
    terms = Terms()
    if inputs.adversarial:
        _recomputed(inputs, terms, _both_graphs(inputs))
    for name, weight, make in data_terms(inputs):
        terms.add(name, make(inputs).losses(inputs), weight)
    return terms


def _both_graphs(inputs: StepInputs) -> _Asked:
    """Generator, real and shifted branch, the graphs of generator and shifted branch kept where they are trained."""
    corrects, fits = inputs.correction_weight > 0, inputs.fake_weight > 0
    with torch.set_grad_enabled(torch.is_grad_enabled() and corrects):
        x_s = start(inputs)
        v_gen = generate(inputs, x_s)
        if corrects:
            trained(v_gen, "generator")
    with torch.no_grad():
        x_fake_t, target = query(inputs, v_gen.detach(), x_s)
    reals = real(inputs, x_fake_t, inputs.draws.t_query) if inputs.measure_correction else None
    with torch.set_grad_enabled(torch.is_grad_enabled() and fits):
        v_shift = shifted(inputs, x_fake_t, inputs.draws.t_query)
        if fits:
            trained(v_shift, "shifted")
    v_real, options = loss_arguments(inputs, v_shift, reals)
    return _Asked(v_gen, v_shift, v_real, target, options)


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
            reals = real(inputs, x_fake_t, inputs.draws.t_query) if inputs.measure_correction else None
            if inputs.fake_weight == 0:
                v_shift = shifted(inputs, x_fake_t, inputs.draws.t_query)
        if inputs.correction_weight > 0:
            stack.append((x_s, inputs.draws.s, inputs.condition))
        if inputs.fake_weight > 0:
            stack.append((x_fake_t, inputs.draws.t_query, inputs.shift(inputs.condition)))
    on_data = [(name, weight, make(inputs)) for name, weight, make in data_terms(inputs)]
    stack += [(term.x_t, term.t, inputs.condition) for _, _, term in on_data]
    samples, times, conditions = zip(*stack, strict=True)
    stacked = call(
        inputs, "generator", inputs.velocities.generator, torch.cat(samples), torch.cat(times), concatenate(conditions)
    )
    parts = list(trained(stacked, "generator").split(inputs.x.shape[0]))
    if inputs.correction_weight > 0:
        v_gen = parts.pop(0)
    if inputs.fake_weight > 0:
        v_shift = parts.pop(0)
    roots: list[tuple[Tensor, Tensor | None]] = []
    if v_shift is not None and target is not None:
        v_real, options = loss_arguments(inputs, v_shift, reals)
        asked = _Asked(v_gen, v_shift, v_real, target, options)
        if _hands_over(backward):
            roots += _roots(asked, *_one_pass(inputs, terms, asked))
        else:
            _recomputed(inputs, terms, asked)
        del asked, v_real, options  # the backward of known gradients needs none of them, and a graph keeps its own
        reals = target = None
    for name, weight, term in on_data:
        roots.append((terms.add(name, term.loss(parts.pop(0)), weight), None))
    assert terms.total is not None  # the objective refuses a step that trains nothing
    if _hands_over(backward):
        torch.autograd.backward(*zip(*roots, strict=True))
    else:
        backward(terms.total)
    terms.settle()
    return terms


def retain(inputs: StepInputs, backward: Backward, no_sync: NoSync | None) -> Terms:
    """Generator and shifted branch in one backward, the terms on data in one each."""
    terms = Terms()
    if inputs.adversarial:
        with quiet(no_sync, last=not data_terms(inputs)):
            if _hands_over(backward):
                asked = _both_graphs(inputs)
                roots = _roots(asked, *_one_pass(inputs, terms, asked))
                del asked  # the backward needs neither v_real nor the target
                if roots:
                    torch.autograd.backward(*zip(*roots, strict=True))
            else:
                _recomputed(inputs, terms, _both_graphs(inputs))
                if terms.total is not None:
                    backward(terms.total)
            terms.settle()
    _data_phases(inputs, terms, backward, no_sync)
    return terms


def sequential(inputs: StepInputs, backward: Backward, no_sync: NoSync | None) -> Terms:
    """One graph at a time; the generator runs twice, the second time under the random state of the first."""
    terms = Terms()
    corrects, follows = inputs.correction_weight > 0, bool(data_terms(inputs))
    if inputs.adversarial:
        with quiet(no_sync, last=not (follows or corrects)):
            x_s, state, known = _shifted_phase(inputs, terms, backward)
        if known is not None:
            with quiet(no_sync, last=not follows):
                with random_state(inputs.x.device, state):
                    v_gen = trained(generate(inputs, x_s), "generator")
                _drive(backward, v_gen, known)
                del v_gen, known
    _data_phases(inputs, terms, backward, no_sync)
    return terms


def _data_phases(inputs: StepInputs, terms: Terms, backward: Backward, no_sync: NoSync | None) -> None:
    """The terms on data, one graph at a time."""
    makers = data_terms(inputs)
    for number, (name, weight, make) in enumerate(makers, 1):
        with quiet(no_sync, last=number == len(makers)):
            backward(terms.add(name, make(inputs).losses(inputs), weight))
            terms.settle()


def _shifted_phase(inputs: StepInputs, terms: Terms, backward: Backward) -> tuple[Tensor, RandomState, _Known | None]:
    """Shifted branch forward and backward while no generator graph exists.

    Returns the generator's start, the random state before its first run, and what its velocity will get; None where the
    correction trains nothing.
    """
    fits = inputs.fake_weight > 0
    with torch.no_grad():
        x_s = start(inputs)
        state = get_random_state(inputs.x.device)
        v_gen = generate(inputs, x_s)
        x_fake_t, target = query(inputs, v_gen, x_s)
        reals = real(inputs, x_fake_t, inputs.draws.t_query) if inputs.measure_correction else None
    with torch.set_grad_enabled(fits):
        v_shift = shifted(inputs, x_fake_t, inputs.draws.t_query)
        if fits:
            trained(v_shift, "shifted")
    v_real, options = loss_arguments(inputs, v_shift, reals)
    asked = _Asked(v_gen, v_shift, v_real, target, options)
    of_generator, of_shifted = _one_pass(inputs, terms, asked, scaled=not _hands_over(backward))
    del asked, v_gen, x_fake_t, target, reals, v_real, options  # the backward needs none of them
    if of_shifted is not None:
        _drive(backward, v_shift, of_shifted)
    return x_s, state, of_generator


SCHEDULES: dict[str, Callable[[StepInputs, Backward, NoSync | None], Terms]] = {
    "joint": joint,
    "retain": retain,
    "sequential": sequential,
}


# ---- losses, and their gradients into the network


@dataclass
class _Asked:
    """What the branches answered on generated trajectories: the arguments of the loss op."""

    v_gen: Tensor | None
    v_shift: Tensor
    v_real: Tensor
    target: Tensor
    options: dict[str, Any]


def _recomputed(inputs: StepInputs, terms: Terms, asked: _Asked) -> None:
    """L_fake (Eq. 12) and the correction on generated trajectories (Eq. 13, 17, 27), differentiable."""
    v_gen = asked.v_gen if inputs.correction_weight > 0 else None
    fake, correction, stats = ops.shifted_velocity_loss(
        v_gen, asked.v_shift, asked.v_real, asked.target, **asked.options
    )
    _note(inputs, terms, fake, _weigh(inputs, correction, stats))


def _weigh(inputs: StepInputs, correction: Tensor, stats: Tensor) -> Weighed:
    return weigh(
        correction,
        stats,
        elements=inputs.x[0].numel(),
        clip=inputs.clip,
        clip_mode=inputs.clip_mode,
        weighting=inputs.correction_weighting,
        time_weights=inputs.time_weights,
    )


def _note(inputs: StepInputs, terms: Terms, fake: Tensor, weighed: Weighed) -> tuple[Tensor, Tensor]:
    """Notes the losses and returns what they add to the total."""
    fake_term = terms.add("fake", fake, inputs.fake_weight)
    if not inputs.measure_correction:
        return fake_term, fake.new_zeros(())
    terms.stats = weighed.stats
    weight = inputs.correction_weight
    return fake_term, terms.add("correction", weighed.losses, weight, summands=weighed.summands)


@dataclass
class _Known:
    """The gradient of a velocity, and the weighted 0-d loss that it is the gradient of."""

    gradient: Tensor
    loss: Tensor


def _one_pass(
    inputs: StepInputs, terms: Terms, asked: _Asked, *, scaled: bool = False
) -> tuple[_Known | None, _Known | None]:
    """The losses of :func:`_recomputed` and their gradients from one read of the velocities: that of the generator's
    and that of the shifted branch's, each None if it trains nothing.

    ``scaled``: the gradients will be multiplied by a loss scale, so that none of them may vanish in fp16 before.
    """
    corrects, fits = inputs.correction_weight > 0, inputs.fake_weight > 0
    v_shift, target = asked.v_shift.detach(), asked.target
    compute = torch.promote_types(torch.promote_types(v_shift.dtype, target.dtype), torch.float32)
    if scaled and v_shift.dtype == torch.float16:
        v_shift = v_shift.to(compute)  # the op writes this gradient in the dtype of this velocity
    weights = [
        torch.full(v_shift.shape[:1], weight / v_shift.shape[0], dtype=compute, device=v_shift.device)
        for weight in (inputs.fake_weight, inputs.correction_weight)
    ]
    if inputs.time_weights is not None and not inputs.weighs_after_the_loss:
        weights[1] = weights[1] * inputs.time_weights
    grad_gen_dtype = None if asked.v_gen is None else compute if scaled else asked.v_gen.dtype
    fake, correction, stats, grad_gen, grad_shift = ops.shifted_velocity_loss_with_gradients(
        *weights,
        v_shift,
        asked.v_real,
        target,
        output_mask=(corrects, fits),
        grad_gen_dtype=grad_gen_dtype,
        **asked.options,
    )
    weighed = _weigh(inputs, correction, stats)
    if corrects and inputs.weighs_after_the_loss and weighed.factor is not None:
        grad_gen.mul_(per_sample(weighed.factor, grad_gen))
    loss_fake, loss_correction = _note(inputs, terms, fake, weighed)
    return _Known(grad_gen, loss_correction) if corrects else None, _Known(grad_shift, loss_fake) if fits else None


def _roots(
    asked: _Asked, of_generator: _Known | None, of_shifted: _Known | None
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Where a backward starts, and with which gradients."""
    pairs = ((asked.v_gen, of_generator), (asked.v_shift, of_shifted))
    return [(velocity, known.gradient) for velocity, known in pairs if known is not None]


def _hands_over(backward: Backward) -> bool:
    """Whether a schedule runs the backward itself, so that known gradients go into the network as they are. A caller's
    own ``backward`` may scale the loss and does what else its trainer needs, so it is always given one."""
    return backward is Tensor.backward


def _drive(backward: Backward, velocity: Tensor, known: _Known) -> None:
    """The backward behind ``velocity``, which gets the gradient that is known."""
    if _hands_over(backward):
        torch.autograd.backward(velocity, known.gradient)
    else:
        backward(KnownGradient.apply(known.loss, velocity, known.gradient))


class KnownGradient(torch.autograd.Function):
    """``loss`` as a function of ``velocity`` whose derivative is ``gradient``; the velocity is not read."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, velocity: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = velocity.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, (gradient * scale).to(ctx.dtype), None


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
