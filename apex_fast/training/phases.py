"""What is normal at a step: the phase of the run, the milestones that follow from its recipe, the line that says so.

Everything here is read off the objective's warm-up and ramp and the length of the run. The bounds are those of the runs
on scanned digits (docs/training.md has the command that shows them); other models have not confirmed them yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apex_fast.objective import ApexObjective
from apex_fast.peers import Peer

if TYPE_CHECKING:
    from apex_fast.training.flow_matching import FlowMatching

GUIDE = "docs/training.md"

DV, CLIPPED = "dv_relative", "clipped_share"
"""Metrics of the objective: ``||v_shift - v_real|| / ||v_real||`` and the share of that difference which is clipped."""

HEALTHY_DV = (0.1, 1.0)
"""Where DV lies in a run that goes well, once the warm-up is over: below, the branches agree and the correction says
nothing; above, the shifted branch is further from the real one than an answer of zero."""

PHASE_NAMES = {
    "warm-up": "warm-up",
    "ramp": "ramp",
    "full": "correction on",
    "flow": "flow matching",
    "peer": "peer's method",
}

PHASES = {
    "warm-up": "warm-up. The shifted branch learns what the generator makes; the generator is not corrected yet.",
    "ramp": "ramp. The correction is turned up; one-step samples get worse before they get better.",
    "full": "correction on, at full weight.",
    "flow": "flow matching on data.",
    "peer": "a peer's method, the same in every step.",
}


@dataclass(frozen=True)
class Milestone:
    """What to expect when ``step`` steps are done.

    Attributes:
        expect: in words.
        read: section of the guide that says what to do if it is otherwise.
        metric, band: what can be measured of it, and where it should lie; "" where somebody has to look.
    """

    step: int
    expect: str
    read: str
    metric: str = ""
    band: tuple[float, float] = HEALTHY_DV

    def announce(self) -> str:
        """The line at the start of a run."""
        return f"by step {self.step} expect {self.expect}; if not, stop and read {GUIDE}#{self.read}"

    def reached(self, numbers: Mapping[str, float]) -> str:
        """The line when ``step`` is done, with ``numbers`` as of then."""
        value = numbers.get(self.metric) if self.metric else None
        if value is None:
            return f"milestone, step {self.step}: expect {self.expect}; if not, stop and read {GUIDE}#{self.read}"
        low, high = self.band
        if low <= value <= high:
            return f"milestone, step {self.step}: {self.expect}: {value:.2g}, as expected"
        return (
            f"milestone, step {self.step}: expected {self.expect}, and it is {value:.2g}: stop and read "
            f"{GUIDE}#{self.read}"
        )


class Course:
    """The phases of a run over ``total_steps``."""

    def __init__(self, objective: ApexObjective | FlowMatching | Peer, total_steps: int) -> None:
        self.objective, self.total = objective, total_steps
        self.corrects = isinstance(objective, ApexObjective) and (
            objective.loss == "correction" and objective.correction_weight > 0
        )
        self.warmup = (objective.warmup_steps or 0) if self.corrects else 0
        self.ramp = (objective.ramp_steps or 0) if self.corrects else 0

    def phase(self, step: int) -> str:
        """The part of the run that ``step`` belongs to, a key of PHASES."""
        if isinstance(self.objective, ApexObjective):
            return self.objective.phase(step)
        return "peer" if isinstance(self.objective, Peer) else "flow"

    def phases(self) -> list[tuple[int, str]]:
        """(first step, name) of every phase of the run, in order."""
        found: list[tuple[int, str]] = []
        for step in range(self.total):
            name = PHASE_NAMES[self.phase(step)]
            if not found or found[-1][1] != name:
                found.append((step, name))
        return found

    @property
    def settled(self) -> int:
        """The step from which the correction has its full weight."""
        return self.warmup + self.ramp

    def milestones(self) -> list[Milestone]:
        """In the order of their steps; none for losses that have no correction."""
        if not self.corrects:
            return []
        low, high = HEALTHY_DV
        band = f"dv between {low:g} and {high:g}"
        # Twice the warm-up and ramp, as long again as the shifted branch was given before; on the digits the one-step
        # pictures had passed the start's by then.
        sharper = max(2 * self.settled, self.total // 5)
        found = [
            Milestone(self.warmup, f"{band}, the shifted branch being fitted", "branch-difference", DV),
            Milestone(self.settled, f"{band}, the correction at its full weight", "branch-difference", DV),
            Milestone(sharper, "one-step samples sharper than those of the start", "one-step-samples-stay-blurred"),
            Milestone(self.total * 3 // 5, "most of what one step will reach", "one-step-samples-stay-blurred"),
        ]
        last, kept = 0, []
        for milestone in found:
            if last < milestone.step < self.total:
                kept.append(milestone)
                last = milestone.step
        return kept

    def where(self, step: int) -> list[str]:
        """The phase after ``step`` steps and what is normal in it, for the status line."""
        phase = self.phase(max(step - 1, 0))
        name = PHASE_NAMES[phase]
        if phase == "warm-up":
            name = f"{name} {step}/{self.warmup}"
        elif phase == "ramp":
            name = f"{name} {step - self.warmup}/{self.ramp}"
        if self.corrects and step < self.settled < self.total:
            return [name, f"one-step samples get worse until about step {self.settled}, expected"]
        return [name]


def status(
    course: Course,
    step: int,
    numbers: Mapping[str, float],
    *,
    visibility: float | None = None,
    seconds: Mapping[str, float] | None = None,
    peak: int | None = None,
) -> list[str]:
    """The parts of the line that says how a run does after ``step`` steps.

    Args:
        numbers: the latest metrics of the objective.
        visibility: relative change of the velocity by the shift, as the probe measured it before the first step.
        seconds: of a step, by role, as :meth:`apex_fast.training.timing.StepTimer.read` gives them.
        peak: bytes.
    """
    parts = course.where(step)
    if DV in numbers:
        low, high = HEALTHY_DV
        inside = low <= numbers[DV] <= high
        parts.append(f"dv {numbers[DV]:.2f} ({'healthy' if inside else 'outside'} {low:.1f}-{high:.1f})")
    elif "loss_total" in numbers:
        parts.append(f"loss {numbers['loss_total']:.4g}")
    if CLIPPED in numbers:
        parts.append(f"clipped {100 * numbers[CLIPPED]:.0f} %")
    if numbers.get("correction_factor", 1.0) < 1.0:
        parts.append(f"correction backed off to {100 * numbers['correction_factor']:.0f} %")
    if numbers.get("skipped_steps"):
        parts.append(f"{numbers['skipped_steps']:.0f} steps skipped")
    if visibility is not None:
        parts.append(f"visibility {_percent(visibility)}")
    if seconds:
        parts.append(pace(seconds))
    if peak is not None:
        parts.append(f"peak {size(peak)}")
    return parts


def pace(seconds: Mapping[str, float]) -> str:
    """ "1.8 s/step: forward 0.9, backward 0.7, data 0.1": the roles that take a hundredth of a step or more."""
    step = seconds["step"]
    factor, unit = (1.0, "s") if step >= 1 else (1000.0, "ms")
    roles = [
        f"{role} {_short(value * factor)}" for role, value in seconds.items() if role != "step" and value >= 0.01 * step
    ]
    text = f"{_short(step * factor)} {unit}/step"
    return f"{text}: {', '.join(roles)}" if roles else text


def _percent(share: float) -> str:
    """Two digits that mean something: 0.306 is "31 %", 0.0041 is "0.41 %"."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def size(count: float) -> str:
    """Bytes as GB or MB (powers of ten, as GPUs and disks are sold)."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """ "3 h 10 min", "12 min", "40 s"."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
