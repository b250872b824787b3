"""How many passes through the network a step costs, in forwards F of its batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Passes:
    """Passes of the batch through the network in one step; a stacked call over k batches counts k.

    Attributes:
        forward_no_grad: forwards whose graph is not kept.
        forward_grad: forwards whose graph is kept, the generator's second run in ``sequential`` included.
        backward: backwards, each counted as two forwards.
        recomputed: forwards that gradient checkpointing runs again in backward.
    """

    forward_no_grad: int
    forward_grad: int
    backward: int
    recomputed: int = 0

    @property
    def total_in_forwards(self) -> int:
        """All of it in forwards F, with a backward at 2 F."""
        return self.forward_no_grad + self.forward_grad + self.recomputed + 2 * self.backward

    def __str__(self) -> str:
        parts = [f"{self.forward_no_grad} without gradient", f"{self.forward_grad} with", f"{self.backward} backward"]
        if self.recomputed:
            parts.append(f"{self.recomputed} recomputed")
        return f"{self.total_in_forwards} F ({', '.join(parts)})"


def step_passes(
    schedule: Literal["joint", "retain", "sequential"],
    *,
    correction: bool | Literal["measured"] = True,
    supervised: bool = True,
    fake: bool = True,
    consistency: bool = False,
    mix: bool = False,
    mixes_shifted: bool = True,
    guided: bool = False,
    checkpointing: bool = False,
) -> Passes:
    """Passes of one step of the ``correction`` objective.

    Args:
        schedule: as in :meth:`apex_fast.ApexObjective.backward`.
        correction: whether the correction has weight; ``"measured"`` is the warm-up, in which the real branch is asked
            and nothing is trained by it.
        supervised, fake, consistency, mix: whether those terms have weight.
        mixes_shifted: whether lambda of Eq. 24 is above 0, so that ``mix`` asks the shifted branch.
        guided: whether the real branch is guided, which takes a second, unconditional forward.
        checkpointing: whether every forward with a graph runs again in backward.

    Raises:
        ValueError: an unknown schedule, or nothing that is trained.
    """
    if schedule not in ("joint", "retain", "sequential"):
        raise ValueError(f'schedule must be "joint", "retain" or "sequential", got {schedule!r}')
    corrects, measures = correction is True, bool(correction)
    trained = corrects + fake + supervised + consistency + mix
    if trained == 0:
        raise ValueError("nothing is trained: correction, fake, supervised, consistency and mix are all off")
    adversarial = fake or measures
    without = 0
    if adversarial:
        # The generator's sample: with its graph only where `retain` keeps it for the correction.
        without += 0 if schedule == "retain" and corrects else 1
        without += (1 + guided) if measures else 0
        without += 0 if fake else 1  # the shifted branch is read although it is not fitted
    without += (2 + guided) if consistency else 0  # the solver's step, and the endpoint behind it
    without += 1 if mix and mixes_shifted else 0
    return Passes(without, trained, trained, trained if checkpointing else 0)


def objective_passes(
    objective: Any, schedule: str, *, guided: bool = False, checkpointing: bool = False, step: int | None = None
) -> Passes:
    """Passes of a step at full weight of the correction, read off the fields of an objective.

    Args:
        objective: an :class:`apex_fast.ApexObjective` of the ``correction`` loss, or settings with its fields.
        schedule, guided, checkpointing: as in :func:`step_passes`.
        step: index of the step, for ``generator_every`` and ``supervised_every``; None is one that trains every term.

    Raises:
        ValueError: as :func:`step_passes`.
    """
    every = (objective.generator_every, objective.supervised_every)
    corrects, supervises = (step is None or (step + 1) % n == 0 for n in every)
    return step_passes(
        schedule,  # type: ignore[arg-type]
        correction=objective.correction_weight > 0 and corrects,
        supervised=objective.supervised_weight > 0 and supervises,
        fake=objective.fake_weight > 0,
        consistency=objective.consistency_weight > 0,
        mix=objective.mix_regulariser_weight > 0,
        mixes_shifted=objective.mix_weight > 0,
        guided=guided,
        checkpointing=checkpointing,
    )


def mean_forwards(objective: Any, schedule: str, *, guided: bool = False, checkpointing: bool = False) -> float:
    """Forwards F of a step on average over the steps of ``generator_every`` and ``supervised_every``; the arguments of
    :func:`objective_passes`."""
    steps = range(math.lcm(objective.generator_every, objective.supervised_every))
    found = [
        objective_passes(objective, schedule, guided=guided, checkpointing=checkpointing, step=step) for step in steps
    ]
    return sum(passes.total_in_forwards for passes in found) / len(found)


def paper_passes(
    *,
    fake: bool = True,
    mix: bool = True,
    mixes_shifted: bool = True,
    detached: bool = False,
    checkpointing: bool = False,
) -> Passes:
    """Passes of one step of the ``paper`` objective; its schedules cost the same.

    Args:
        fake, mix: whether L_fake (Eq. 12) and L_mix (Eq. 24) have weight.
        mixes_shifted: whether lambda of Eq. 24 is above 0, so that the shifted branch is part of the target.
        detached: whether the gradient of L_fake into the generator is cut.
        checkpointing: whether every forward with a graph runs again in backward.

    Raises:
        ValueError: nothing that is trained.
    """
    if not (fake or mix):
        raise ValueError("nothing is trained: fake and mix are both off")
    generator = mix or (fake and not detached)
    trained = int(generator) + int(fake)
    without = int(mix and mixes_shifted) + int(not generator)
    return Passes(without, trained, trained, trained if checkpointing else 0)
