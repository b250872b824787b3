"""The training objective: its terms and weights as typed fields, and one step of it under any schedule.

Two losses are built from the paper's parts (APEX, arXiv 2604.12322):

* ``correction``: L_fake (Eq. 12) + the velocity correction on generated trajectories (Eq. 13, 17, 27) + flow matching
  on data (Eq. 20). The correction's gradient on the generator's velocity is ``clamp(v_shift - v_real)``; it is what
  makes one step work.
* ``paper``: lambda_p L_fake + lambda_e L_mix (Eq. 25), to reproduce the text.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Literal, SupportsIndex

import torch
from torch import Tensor, nn

from . import ops, paper, schedules
from .condition import Condition, batch_size, condition_tensors
from .draws import Draws, normal, state_dtype
from .finite import GRADIENT_NORM, FiniteWatch
from .path import TimeDistribution
from .roles import StepInputs, Terms
from .velocities import Velocities, Velocity
from .weighting import mean_time_factor, time_factor

Schedule = Literal["joint", "retain", "sequential"]
Phase = Literal["warm-up", "ramp", "full"]


@dataclass(frozen=True, eq=False)
class Losses:
    """What a step returns.

    Attributes:
        total: 0-d, the weighted sum of the terms' means; differentiable from ``objective(...)``, without history from
            ``backward``.
        fake, correction, supervised, consistency, mix: ``[B]`` without history, fp32 (fp64 for fp64 data), unweighted
            (``correction`` without its weight per sample, too); None where the loss, its weights or the step leave the
            term out. ``mix`` includes its factor t (1 - t).
        metrics: 0-d tensors on the device of x; reading them is the caller's host synchronisation, making them is none.
        phase: ``"warm-up"`` (the correction is measured but has no weight yet), ``"ramp"`` or ``"full"``.
    """

    total: Tensor
    fake: Tensor | None
    correction: Tensor | None
    supervised: Tensor | None
    mix: Tensor | None
    metrics: dict[str, Tensor]
    phase: Phase
    consistency: Tensor | None = None


@dataclass(eq=False)
class ApexObjective:
    """One-step training by condition shifting: ``ApexObjective(shift, loss="correction", ...)``.

    Args:
        shift: the condition shift (Eq. 9), such as :class:`~apex_fast.shift.ConditionShift`, on the device of the
            conditions.
        loss: ``"correction"`` or ``"paper"``.

        fake_weight: weight of L_fake (Eq. 12) in ``correction``.
        correction_weight: weight of the correction (Eq. 17 on x_t ~ p_theta) after warm-up and ramp. 0.5 is for a live
            real branch, which a call with one network has; with a frozen one 4 beat 2 on scanned digits
            (docs/recipe.md), and larger ones made a live branch diverge (docs/lora.md). 0 leaves the real branch
            uncalled.
        supervised_weight: weight of flow matching on data (Eq. 20). It keeps a live real branch honest, and keeps 2 to
            50 steps working.
        clip: bound on the correction dv = v_shift - v_real, in units of velocity; None is off.
        clip_mode: ``"element"``: every element of dv is clamped to [-clip, clip]. ``"norm"``: dv of a sample is scaled
            down to a root mean square of ``clip`` where that is above it; its direction stays, and a few large elements
            shrink all the others.
        correction_weighting: what the bounded dv of a sample is multiplied by. ``"constant"``: 1. ``"dmd"``:
            1 / mean |v_real - (z' - x_fake)|, at most 1000, v_real guided as everywhere. It is the normaliser of DMD
            (arXiv 2311.18828, Eq. 8; kept by DMD2, arXiv 2405.14867), where the difference of the two endpoints is
            divided by the mean absolute distance of x_fake to the real one; both carry a factor t, which cancels.
            ``"time"``: s (1 - t)^2 / (2 t) over its mean over generator_times and fake_times, so that
            correction_weight keeps its meaning: without a clip the direction of the gradient of KL(p_theta,t || q_t) to
            the letter. It is not bounded: under the default times the largest weight is 18.8, and a lower end of
            fake_times nearer to 0 makes it larger. Means of 0 and infinity are refused.
        generator_every: the generator learns from the correction in the last of every so many steps. In the others
            L_fake (and L_sup, L_mix and the consistency term) train alone: the correction's real branch is not asked,
            the generator's sample has no graph, and there are no metrics of the correction. Weights are not scaled up
            for it. Logged every ``generator_every`` steps, or a multiple, every line has the correction's metrics.
        supervised_every: L_sup is trained in the last of every so many steps; the others do without its pass. Not
            scaled up either: supervised_weight is its weight in the steps that have it.
        guidance_scale: classifier-free guidance of the real branch, ``v_uncond + g (v_real - v_uncond)``; other than 1
            it needs ``negative_condition`` in the call, and doubles the batch of the real pass.

        generator_times: distribution of s, where the generator starts: x_s = s z + (1 - s) x. The default, always 1,
            trains one step; ``TimeDistribution("uniform", constant_share=0.6)`` is one step in 60 % and any start in
            the rest, for few-step sampling.
        fake_times: distribution of t at which shifted and real branch are asked (Eq. 12 and 13).
        supervised_times: distribution of t of the data term. It must stay away from 1, where flow matching asks for the
            mean of the data and fights the one-step generator.

        consistency_weight: weight of the consistency term, for sampling in a few steps that jump to the endpoint
            (re-noise): at data points x_s, ``mean |F(x_s, s, c) - (x_s - e_r) / s|^2`` with e_r the generator's own
            endpoint, under a stop-gradient, from x_r = x_s - (s - r) v_real(x_s, s, c), a later point of the real
            branch's path. Consistency distillation (arXiv 2303.01469, Eq. 7) in units of velocity, without an average
            of the target network. It asks for another velocity below t = 1 than L_sup does, the mean over the rest of
            the path in place of that at the point, so the two pull against each other there, and Euler in several
            steps gets worse. Costs two forwards without gradient (three where the real branch is guided), one with,
            and one backward. 0 leaves it out.
        consistency_times: distribution of s of that term; it must stay above 0.
        consistency_gap: s - r in (0, 1]; r ends at 0. Small: the solver's step is exact and the target moves slowly.
        mix_regulariser_weight: weight of L_mix (Eq. 23 and 24, with t (1 - t)) at data points beside the correction;
            lambda is ``mix_weight``, the times are ``paper_times``. Costs a forward and a backward with gradient, and
            the shifted branch without where lambda is above 0. 0 leaves it out.

        warmup_steps: steps in which the correction is measured but has weight 0, so that the shifted branch is fitted
            before its difference is believed. None: 100, or with ``total_steps`` a tenth of it, at most 150.
        ramp_steps: steps over which the weight then rises linearly. None: 100, or with ``total_steps`` an eighth of it,
            at most 200.
        total_steps: length of the run, if known. It sets the defaults above, and a run that would end before the
            correction starts or has its full weight is warned about.

        paper_fake_weight: lambda_p of Eq. 25, weight of L_fake in ``paper``.
        paper_mix_weight: lambda_e of Eq. 25, weight of L_mix in ``paper``.
        mix_weight: lambda of Eq. 24: how much of the target of L_mix is the shifted branch's velocity; 0 is flow
            matching.
        paper_times: distribution of t in ``paper``.
        fresh: ``paper`` only: draw z' and t' of L_fake anew instead of using z and t again as the paper does.
        detach_x_fake: ``paper`` only: cut the gradient of L_fake into the generator. The paper does not; False is to
            the letter.

    Raises:
        ValueError: a field out of range; the message names it.

    ``correction_factor``, an attribute and no field, multiplies the weight of the correction; 1 unless a trainer backs
    it off for a while.
    """

    shift: nn.Module
    _: KW_ONLY
    loss: Literal["correction", "paper"] = "correction"

    fake_weight: float = 1.0
    correction_weight: float = 0.5
    supervised_weight: float = 1.0
    clip: float | None = 1.0
    clip_mode: Literal["element", "norm"] = "element"
    correction_weighting: Literal["constant", "dmd", "time"] = "constant"
    generator_every: int = 1
    supervised_every: int = 1
    guidance_scale: float = 1.0

    generator_times: TimeDistribution = field(default_factory=lambda: TimeDistribution("constant", value=1.0))
    fake_times: TimeDistribution = field(default_factory=lambda: TimeDistribution("uniform", low=0.02, high=0.98))
    supervised_times: TimeDistribution = field(default_factory=lambda: TimeDistribution("uniform", low=0.02, high=0.98))

    consistency_weight: float = 0.0
    consistency_times: TimeDistribution = field(default_factory=lambda: TimeDistribution("uniform", low=0.02))
    consistency_gap: float = 0.1
    mix_regulariser_weight: float = 0.0

    warmup_steps: int | None = None
    ramp_steps: int | None = None
    total_steps: int | None = None

    paper_fake_weight: float = 1.0
    paper_mix_weight: float = 1.0
    mix_weight: float = 0.5
    paper_times: TimeDistribution = field(default_factory=lambda: TimeDistribution("uniform"))
    fresh: bool = False
    detach_x_fake: bool = False

    def __post_init__(self) -> None:
        self._watch = FiniteWatch()
        self.correction_factor = 1.0
        if not callable(self.shift):
            raise ValueError(f"ApexObjective: shift must be a ConditionShift, got {type(self.shift).__name__}")
        if self.loss not in ("correction", "paper"):
            raise ValueError(f'ApexObjective: loss must be "correction" or "paper", got {self.loss!r}')
        weights = ("fake_weight", "correction_weight", "supervised_weight", "paper_fake_weight", "paper_mix_weight")
        for name in (*weights, "consistency_weight", "mix_regulariser_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"ApexObjective: {name} must be finite and at least 0, got {getattr(self, name)}")
        if not 0 <= self.mix_weight <= 1:
            raise ValueError(f"ApexObjective: mix_weight (lambda of Eq. 24) must lie in [0, 1], got {self.mix_weight}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"ApexObjective: clip must be above 0, or None for no clip, got {self.clip}")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"ApexObjective: guidance_scale must be finite, got {self.guidance_scale}")
        if self.loss == "paper" and self.guidance_scale != 1:
            raise ValueError("ApexObjective: the paper loss has no real branch to guide; leave guidance_scale at 1")
        for name in ("warmup_steps", "ramp_steps", "total_steps"):
            steps = getattr(self, name)
            if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
                raise ValueError(
                    f"ApexObjective: {name} must be a whole number of steps, at least 0, or None, got {steps!r}"
                )
        for name in ("generator_times", "fake_times", "supervised_times", "consistency_times", "paper_times"):
            if not isinstance(getattr(self, name), TimeDistribution):
                raise ValueError(
                    f"ApexObjective: {name} must be a TimeDistribution, got {type(getattr(self, name)).__name__}"
                )
        self._check_knobs()
        self._mean_time_factor = 1.0
        if self.correction_weighting == "time":
            try:
                self._mean_time_factor = mean_time_factor(self.generator_times, self.fake_times)
            except ValueError as error:
                raise ValueError(f"ApexObjective: {error}") from None
        self._set_lengths()

    def _check_knobs(self) -> None:
        """What varies the correction loss; ValueError for values out of range and for the paper loss."""
        choices = {"clip_mode": ("element", "norm"), "correction_weighting": ("constant", "dmd", "time")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                wanted = " or ".join(f'"{choice}"' for choice in known)
                raise ValueError(f"ApexObjective: {name} must be {wanted}, got {getattr(self, name)!r}")
        for name in ("generator_every", "supervised_every"):
            steps = getattr(self, name)
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
                raise ValueError(f"ApexObjective: {name} must be a whole number of steps, at least 1, got {steps!r}")
        if not 0 < self.consistency_gap <= 1:
            raise ValueError(f"ApexObjective: consistency_gap must lie in (0, 1], got {self.consistency_gap}")
        if self.consistency_weight > 0 and self.consistency_times.reaches_zero:
            raise ValueError(
                "ApexObjective: consistency_times must stay above 0, where the endpoint is the sample itself; write a "
                "lower end such as 0.02"
            )
        if self.loss == "paper":
            plain = {
                "clip_mode": "element",
                "correction_weighting": "constant",
                "generator_every": 1,
                "supervised_every": 1,
                "consistency_weight": 0,
                "mix_regulariser_weight": 0,
            }
            for name, value in plain.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f'ApexObjective: {name} varies the correction loss, and loss is "paper"; leave {name} out'
                    )
            return
        steps = range(math.lcm(self.generator_every, self.supervised_every))
        always = self.fake_weight + self.consistency_weight + self.mix_regulariser_weight
        asked = self.correction_weight + self.supervised_weight > 0
        if asked and always == 0 and not all(self._trains(step) for step in steps):
            raise ValueError(
                f"ApexObjective: generator_every={self.generator_every} and supervised_every={self.supervised_every} "
                "leave steps in which nothing is trained, for fake_weight is 0; give L_fake weight, or write 1 for one "
                "of the two"
            )

    def _trains(self, step: int) -> bool:
        corrects = self.correction_weight > 0 and self.generator_learns(step)
        return corrects or (self.supervised_weight > 0 and self.supervises(step))

    def _set_lengths(self) -> None:
        total = self.total_steps
        if self.warmup_steps is None:
            self.warmup_steps = 100 if total is None else min(150, total // 10)
        if self.ramp_steps is None:
            self.ramp_steps = 100 if total is None else min(200, total // 8)
        if total is None or self.loss != "correction" or self.correction_weight == 0:
            return
        # The last step in which the generator learns; -1 if there is none.
        last = total // self.generator_every * self.generator_every - 1
        if last < self.warmup_steps:
            every = f" and generator_every={self.generator_every}" if self.generator_every > 1 else ""
            warnings.warn(
                f"the correction never starts: warmup_steps={self.warmup_steps}{every} of total_steps={total}, so "
                "nothing is learnt about one step; lower them or train longer",
                stacklevel=4,
            )
        elif self.warmup_steps + self.ramp_steps > total:
            reached = self.correction_weight_at(last)
            warnings.warn(
                f"the correction ends at weight {reached:.3g} of {self.correction_weight:g}: warmup_steps="
                f"{self.warmup_steps} and ramp_steps={self.ramp_steps} are more than total_steps={total}; "
                "shorten them or train longer",
                stacklevel=4,
            )

    # ---- what holds at a step

    def correction_weight_at(self, step: int) -> float:
        """Weight of the correction at ``step``, from 0: none in the warm-up, rising over the ramp, then all of it; each
        time ``correction_factor``. It has this weight in the steps in which the generator learns."""
        warmup, ramp = self.warmup_steps or 0, self.ramp_steps or 0
        if step < warmup:
            return 0.0
        return self.correction_factor * self.correction_weight * min(1.0, (step - warmup + 1) / (ramp + 1))

    def generator_learns(self, step: int) -> bool:
        """Whether ``step``, from 0, is one of those in which the correction is made, by ``generator_every``: the last
        of every so many, so that the shifted branch has been fitted before."""
        return (step + 1) % self.generator_every == 0

    def supervises(self, step: int) -> bool:
        """Whether ``step``, from 0, is one of those that train L_sup, by ``supervised_every``."""
        return (step + 1) % self.supervised_every == 0

    @property
    def full_step(self) -> int:
        """The first step at full weight of the correction in which every term is trained."""
        settled = (self.warmup_steps or 0) + (self.ramp_steps or 0)
        every = math.lcm(self.generator_every, self.supervised_every)
        return settled + (-settled - 1) % every

    def phase(self, step: int) -> Phase:
        """The part of the run that ``step`` belongs to; without a correction it is always ``"full"``."""
        warmup, ramp = self.warmup_steps or 0, self.ramp_steps or 0
        if self.loss == "paper" or self.correction_weight == 0 or step >= warmup + ramp:
            return "full"
        return "warm-up" if step < warmup else "ramp"

    # ---- a step

    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> Draws:
        """All random draws of a step for ``x`` ``[B, ...]``.

        They come from ``generator`` alone, on whichever device it lives, or without one from the global generator of
        x's device. Noise and times are fp32, cast to fp64 for an fp64 x. Every step draws for all terms that have
        weight, also those that it leaves out, so that ``generator_every`` and ``supervised_every`` change no draw.
        """
        dtype = state_dtype(x)

        def noise() -> Tensor:
            drawn = normal(x.shape, x.device, dtype, generator)
            # The same numbers in x's own layout (channels_last, say), which the ops then read without a copy.
            return drawn if x.is_contiguous() else torch.empty_like(x, dtype=dtype).copy_(drawn)

        def times(distribution: TimeDistribution) -> Tensor:
            return distribution.sample(x.shape[0], x.device, generator).to(dtype)

        if self.loss == "paper":
            z, t = noise(), times(self.paper_times)
            return Draws(z, t, noise(), times(self.paper_times)) if self.fresh else Draws(z, t, z, t)
        draws = Draws(noise(), times(self.generator_times), noise(), times(self.fake_times))
        if self.supervised_weight > 0:
            draws = replace(draws, z_sup=noise(), t_sup=times(self.supervised_times))
        if self.consistency_weight > 0:
            draws = replace(draws, z_consistency=noise(), t_consistency=times(self.consistency_times))
        if self.mix_regulariser_weight > 0:
            draws = replace(draws, z_mix=noise(), t_mix=times(self.paper_times))
        return draws

    def __call__(
        self,
        velocities: Velocities | Velocity,
        x: Tensor,
        condition: Tensor | Condition,
        *,
        step: SupportsIndex,
        generator: torch.Generator | None = None,
        draws: Draws | None = None,
        negative_condition: Tensor | Condition | None = None,
    ) -> Losses:
        """The losses of a step with all graphs alive; ``losses.total.backward()`` is the caller's.

        Args:
            velocities: a callable ``velocity(x_t, t, condition)`` for all roles, or
                :class:`~apex_fast.velocities.Velocities`.
            x: data (latents) ``[B, ...]`` with B at least 1; the callables get their x_t in its dtype. It is not
                modified and gets no gradient.
            condition: of the B samples.
            step: index of this step in the run, from 0, an int or what converts to one without loss, such as
                ``numpy.int64``; warm-up and ramp depend on it.
            generator: source of the random draws.
            draws: the draws themselves, from :meth:`draw`; then ``generator`` must be left out.
            negative_condition: for ``guidance_scale`` other than 1: batch B, or 1 to be repeated.

        Raises:
            TypeError, ValueError: arguments that do not fit; a velocity of the wrong shape.
            NonFiniteLossError: a term of the step *before* was NaN or infinite.
        """
        step = _index(step)
        inputs = self._inputs(velocities, x, condition, step, generator, draws, negative_condition)
        terms = paper.all_graphs(inputs) if self.loss == "paper" else schedules.all_graphs(inputs)
        return self._losses(inputs, terms, step)

    def backward(
        self,
        velocities: Velocities | Velocity,
        x: Tensor,
        condition: Tensor | Condition,
        *,
        step: SupportsIndex,
        generator: torch.Generator | None = None,
        draws: Draws | None = None,
        negative_condition: Tensor | Condition | None = None,
        schedule: Schedule | None = None,
        backward: Callable[[Tensor], object] | None = None,
        no_sync: schedules.NoSync | None = None,
    ) -> Losses:
        """A step with its backward: adds to the ``.grad`` of the parameters and returns the losses without history.

        Args:
            schedule: order of the passes (:mod:`apex_fast.schedules`); all give the same gradients, up to rounding and,
                for ``"joint"``, dropout. ``"sequential"`` holds one graph at a time, ``"retain"`` two, ``"joint"``
                three in one stacked pass, for which generator and shifted branch must be the same callable; a network
                with dropout draws other masks there than under the other two, and the generator's gradient is that of
                other masks than its samples. The paper loss runs ``"joint"`` as ``"retain"``, and takes
                ``"sequential"`` only with ``detach_x_fake``. None is ``"sequential"`` wherever that can serve.
            backward: called with each loss in place of ``loss.backward()``, such as ``accelerator.backward``.
            no_sync: makes a context in which gradients are not synchronised, such as ``model.no_sync`` of a
                DistributedDataParallel; all but the last forward and backward of the step run in one. It covers the
                wrapped module only: a trainable shift lives outside of it, so the caller averages the shift's gradients
                over the processes, after this call and before the optimizer's step.
            velocities, x, condition, step, generator, draws, negative_condition: as in the call.

        Raises:
            as the call; and ValueError for a schedule that cannot serve these velocities, this loss or this condition.
        """
        step = _index(step)
        table = paper.SCHEDULES if self.loss == "paper" else schedules.SCHEDULES
        if schedule is None:
            schedule = "retain" if self.loss == "paper" and not self.detach_x_fake else "sequential"
        if schedule not in table:
            raise ValueError(f"schedule must be one of {', '.join(table)}, got {schedule!r}")
        inputs = self._inputs(velocities, x, condition, step, generator, draws, negative_condition)
        if schedule == "joint" and not inputs.velocities.shares_network:
            raise ValueError(
                'schedule="joint" stacks generator and shifted branch into one call, but they are different callables; '
                'use schedule="retain" or "sequential"'
            )
        if schedule != "joint" and any(t.grad_fn is not None for t in condition_tensors(condition)):
            raise ValueError(
                f'schedule="{schedule}" may run several backward calls, and the condition hangs on a graph that only '
                "one can walk "
                '(a trained text encoder?); use schedule="joint" or objective(...).total.backward(), or detach the '
                "condition"
            )
        losses = table[schedule](inputs, backward or torch.Tensor.backward, no_sync)
        return self._losses(inputs, losses, step)

    def watch_gradient_norm(self, norm: Tensor, *, step: SupportsIndex) -> None:
        """Has the norm of the gradients of ``step`` looked at as the losses are: a finite loss can have a gradient that
        is not, and what an optimizer makes of it is NaN weights.

        Args:
            norm: 0-d, as :func:`torch.nn.utils.clip_grad_norm_` returns it; it is not read on the host now, but by the
                next step or by :meth:`check_finite`.
            step: the step that was passed to the call or to :meth:`backward`.
        """
        self._watch.add(_index(step), {GRADIENT_NORM: norm})

    def leave_finite_checks(self) -> None:
        """From now on losses and gradient norms that are not finite are no error here: the caller looks at them."""
        self._watch.enabled = False

    def check_finite(self) -> None:
        """Examines the losses and gradient norms that are not examined yet; call it before a checkpoint is written.

        Raises:
            NonFiniteLossError: naming the term and its step.
        """
        self._watch.check()

    # ---- the edges

    def _inputs(
        self,
        velocities: Velocities | Velocity,
        x: Tensor,
        condition: Tensor | Condition,
        step: int,
        generator: torch.Generator | None,
        draws: Draws | None,
        negative_condition: Tensor | Condition | None,
    ) -> StepInputs:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a floating-point tensor [B, ...] of data or latents, got {got}")
        if x.shape[0] == 0:
            raise ValueError(
                f"x must hold at least one sample, got {list(x.shape)}: the mean loss of an empty batch is no number; "
                "skip the step, or drop the data loader's empty batch"
            )
        if batch_size(condition) != x.shape[0]:
            raise ValueError(
                f"condition must have the batch size of x, {x.shape[0]}, got {batch_size(condition)}; one condition "
                "per sample"
            )
        if draws is not None and generator is not None:
            raise ValueError("give draws or a generator, not both: the draws were made already")
        guided = self.guidance_scale != 1 and self.correction_weight + self.consistency_weight > 0
        if guided and negative_condition is None:
            raise ValueError(
                f"guidance_scale={self.guidance_scale} guides the real branch, which needs negative_condition=; "
                "pass the condition of the empty prompt, or set guidance_scale=1"
            )
        draws = self.draw(x, generator) if draws is None else draws
        self._check_draws(draws, x)
        common = {
            "velocities": Velocities.of(velocities),
            "shift": self.shift,
            "x": x.detach().to(state_dtype(x)),
            "network_dtype": x.dtype,
            "condition": condition,
            "negative_condition": negative_condition if guided else None,
            "draws": draws,
            "guidance_scale": float(self.guidance_scale),
            "clip": self.clip,
        }
        if self.loss == "paper":
            if self.paper_fake_weight == 0 and self.paper_mix_weight == 0:
                raise ValueError("nothing to train: paper_fake_weight and paper_mix_weight are both 0")
            return StepInputs(
                fake_weight=self.paper_fake_weight,
                paper_weight=self.paper_mix_weight,
                mix_weight=float(self.mix_weight),
                detach_x_fake=self.detach_x_fake,
                **common,
            )
        learns = self.generator_learns(step)
        weight = self.correction_weight_at(step) if learns else 0.0
        supervised = self.supervised_weight if self.supervises(step) else 0.0
        if self.fake_weight + weight + supervised + self.consistency_weight + self.mix_regulariser_weight == 0:
            raise ValueError(
                f"nothing to train at step {step}: fake_weight and supervised_weight are 0 and the correction has no "
                "weight "
                f"(correction_weight={self.correction_weight}, warmup_steps={self.warmup_steps})"
            )
        return StepInputs(
            fake_weight=self.fake_weight,
            correction_weight=weight,
            measure_correction=self.correction_weight > 0 and learns,
            supervised_weight=supervised,
            clip_mode=self.clip_mode,
            correction_weighting=self.correction_weighting,
            time_weights=self._time_weights(draws),
            consistency_weight=self.consistency_weight,
            consistency_gap=float(self.consistency_gap),
            mix_regulariser_weight=self.mix_regulariser_weight,
            mix_weight=float(self.mix_weight),
            **common,
        )

    def _time_weights(self, draws: Draws) -> Tensor | None:
        if self.correction_weighting != "time":
            return None
        return time_factor(draws.s, draws.t_query) / self._mean_time_factor

    def _check_draws(self, draws: Draws, x: Tensor) -> None:
        wanted = {"z": x.shape, "z_query": x.shape, "s": x.shape[:1], "t_query": x.shape[:1]}
        if self.loss == "correction" and self.supervised_weight > 0:
            wanted.update(z_sup=x.shape, t_sup=x.shape[:1])
        if self.consistency_weight > 0:
            wanted.update(z_consistency=x.shape, t_consistency=x.shape[:1])
        if self.mix_regulariser_weight > 0:
            wanted.update(z_mix=x.shape, t_mix=x.shape[:1])
        for name, shape in wanted.items():
            value = getattr(draws, name)
            if value is None or value.shape != shape or value.device != x.device:
                got = "None" if value is None else f"{list(value.shape)} on {value.device}"
                raise ValueError(
                    f"draws.{name} must be {list(shape)} on {x.device}, got {got}; make draws with objective.draw(x) "
                    "of this objective"
                )

    def _losses(self, inputs: StepInputs, terms: Terms, step: int) -> Losses:
        assert terms.total is not None
        with torch.no_grad():
            named = {
                "fake": terms.fake,
                "correction": terms.correction,
                "supervised": terms.supervised,
                "consistency": terms.consistency,
                "mix": terms.mix,
            }
            means = {name: losses.mean() for name, losses in named.items() if losses is not None}
            metrics = {f"loss_{name}": mean for name, mean in means.items()}
            metrics["loss_total"] = terms.total.detach()
            metrics.update(self._metrics(inputs, terms))
        self._watch.record(step, means)
        return Losses(
            terms.total,
            terms.fake,
            terms.correction,
            terms.supervised,
            terms.mix,
            metrics,
            self.phase(step),
            terms.consistency,
        )

    def _metrics(self, inputs: StepInputs, terms: Terms) -> dict[str, Tensor]:
        """What the loss op has counted on its way (``ops.STATS``), as batch means; no pass over the velocities, no
        synchronisation.
        """
        if terms.stats is None:
            return {}
        columns = dict(zip(ops.STATS, terms.stats.unbind(1), strict=True))
        elements = max(inputs.x[0].numel(), 1)
        dv, shifted, real = columns["dv_squared"], columns["shift_squared"], columns["real_squared"]
        tiny = torch.finfo(dv.dtype).tiny
        metrics = {
            # |v_shift - v_real| as a root mean square, before and after the clip, and against |v_real|
            "dv_rms": (dv.mean() / elements).sqrt(),
            "dv_clipped_rms": (columns["clipped_dv_squared"].mean() / elements).sqrt(),
            "dv_relative": (dv / real.clamp_min(tiny)).sqrt().mean(),
            "clipped_share": columns["clipped_share"].mean(),
            "shift_real_cosine": (columns["shift_dot_real"] / (shifted * real).sqrt().clamp_min(tiny)).mean(),
        }
        if self.loss == "correction":
            metrics["dmd_normaliser"] = columns["guided_target_distance"].mean()
            # new_full fills on the device; torch.tensor would copy from the host
            metrics["correction_weight"] = dv.new_full((), inputs.correction_weight)
        return metrics


def _index(step: SupportsIndex) -> int:
    """``step`` as an int; a truth value is refused, although Python counts with it, as an argument mixed up."""
    try:
        index = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        index = -1
    if index < 0:
        raise ValueError(f"step must be the index of this training step, a whole number from 0, got {step!r}")
    return index
