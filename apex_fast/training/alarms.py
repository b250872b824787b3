"""Alarms: what a run watches in itself, and what it does about it without being asked.

====================  ==========================================================  ============================
alarm                 what it sees                                                what it does by default
====================  ==========================================================  ============================
non_finite            the norm of the gradients, or a loss, is NaN or infinite    skips the step; an error after
                                                                                  ``patience`` in a row
gradient_explosion    the norm is ``factor`` times the median of the last steps   skips the step; stops after
                                                                                  ``patience`` in a row
branch_difference     |v_shift - v_real| / |v_real| leaves its band: above it     backs off above it, tells of
                      the branches run apart, below it they agree                 it below
shift_drift           a trainable shift came close to the identity, under which   stops with a checkpoint
                      there is nothing to learn from, or went far from its start
diversity             one-step samples of one prompt over several seeds look      backs off
                      alike, where they did not before
====================  ==========================================================  ============================

*Skip*: the optimizer does not step, the data moves on, the step counts. *Back off*: ``objective.correction_factor``,
which multiplies the weight of the correction, is halved and grows back to 1 over ``recovery_steps``. *Stop*: the run
ends with a checkpoint and :data:`EXIT_CODE`.

Nobody waits for the device in this. Whether a step is skipped is decided where the gradients are: :meth:`Alarms.judge`
compares the norm with the median of the last norms, which lie in a small tensor beside it, and hands the verdict to the
optimizer as a tensor (:func:`apex_fast.training.optimizers.step_unless`). All else is looked at on the host one step
late: :meth:`Alarms.after_step` sends the numbers of a step to pinned memory behind the work of that step and reads
those of the step before, which are there already. A back-off or a stop therefore comes one step after what caused it,
which none of them minds.

In several processes every one decides the same: the norm is that of the global gradients, the skip flag is the greatest
of all processes, and the other numbers are averaged over them (one all-reduce of a dozen values a step), so that no
process stops or skips alone. What is pending is part of :meth:`Alarms.state_dict`, so that a resumed run sees the same
alarms at the same steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apex_fast.finite import GRADIENT_NORM, NonFiniteLossError
from apex_fast.training.settings import SettingsError, setting

EXIT_CODE = 4
"""What a run that an alarm has stopped ends with."""

DOCS = "docs/training.md"
"""Where every alarm has a section of its name."""

SMALLEST_FACTOR = 1 / 16
"""How far the correction is backed off at most; an alarm that would go further stops the run."""

DEFAULT_DISTANCE = math.hypot(2.0, 0.5)
"""Of the default shift (A = -1, b = 0.5) from the identity."""

LEAST_HISTORY = 20
"""Steps that a median or a mean is made of at least before anything is compared with it."""


# ---- settings


@dataclass(frozen=True)
class NonFiniteSettings:
    """Gradients or losses that are NaN or infinite."""

    action: Literal["skip", "error"] = setting(
        "skip", help="skip: leave the step out. error: end the run with an error at once, as spoilt."
    )
    patience: int = setting(10, help="So many such steps in a row end the run with an error, without a checkpoint.")


@dataclass(frozen=True)
class GradientExplosionSettings:
    """A norm of the gradients that is far from those before it."""

    action: Literal["off", "tell", "skip", "back_off", "stop"] = setting("skip", help="What to do about it.")
    factor: float = setting(10.0, help="How many times the median of the last norms is too much.")
    window: int = setting(100, help="Steps that the median is of.")
    patience: int = setting(10, help="With action: skip, so many in a row stop the run with a checkpoint.")


@dataclass(frozen=True)
class BranchDifferenceSettings:
    """|v_shift - v_real| / |v_real| (dv_relative), its mean over some steps, after the warm-up."""

    action: Literal["off", "tell", "back_off", "stop"] = setting("back_off", help="What to do above the band.")
    action_low: Literal["off", "tell", "stop"] = setting("tell", help="What to do below it.")
    low: float = setting(0.05, help="Lower end of the band: the branches agree, so the shift is not seen.")
    high: float = setting(1.5, help="Upper end: the shifted branch does not follow the generator any more.")
    window: int = setting(20, help="Steps that the mean is over.")


@dataclass(frozen=True)
class ShiftDriftSettings:
    """A trainable shift, in units of the distance of its start from the identity (A = 1, b = 0); one that starts there
    is measured in units of the default shift's distance, and for ``most`` alone."""

    action: Literal["off", "tell", "stop"] = setting("stop", help="What to do about it.")
    least: float = setting(0.5, help="Distance from the identity below which the shift is nearly none.")
    most: float = setting(1.0, help="Distance from its start above which it is another shift.")


@dataclass(frozen=True)
class DiversitySettings:
    """Spread of one-step samples of one prompt over seeds, against the widest so far."""

    action: Literal["off", "tell", "back_off", "stop"] = setting("back_off", help="What to do about it.")
    every: int = setting(50, help="Steps between two looks, each one small batch without gradient.")
    seeds: int = setting(4, help="Samples of each prompt.")
    prompts: int = setting(2, help="Prompts: the first of validation_prompts, or of the data.")
    share: float = setting(0.2, help="Share of the widest spread so far that is too little.")
    patience: int = setting(2, help="Looks in a row that have to show it.")


@dataclass(frozen=True)
class AlarmSettings:
    """What a run watches in itself and what it does about it."""

    enabled: bool = setting(True, help="false watches for non-finite losses and gradients alone, which are errors.")
    back_off: float = setting(0.5, help="What a back-off multiplies the weight of the correction with.")
    recovery_steps: int = setting(200, help="Steps over which that is made good again.")
    non_finite: NonFiniteSettings = setting(help="the gradients are no numbers.", factory=NonFiniteSettings)
    gradient_explosion: GradientExplosionSettings = setting(
        help="the gradients are far too large.", factory=GradientExplosionSettings
    )
    branch_difference: BranchDifferenceSettings = setting(
        help="the branches run apart or agree.", factory=BranchDifferenceSettings
    )
    shift_drift: ShiftDriftSettings = setting(help="the trainable shift is lost.", factory=ShiftDriftSettings)
    diversity: DiversitySettings = setting(help="samples become alike.", factory=DiversitySettings)

    def __post_init__(self) -> None:
        if not 0.0 < self.back_off < 1.0:
            raise SettingsError(f"alarms.back_off must lie between 0 and 1, got {self.back_off}")
        counts = {
            "recovery_steps": self.recovery_steps,
            "non_finite.patience": self.non_finite.patience,
            "gradient_explosion.patience": self.gradient_explosion.patience,
            "branch_difference.window": self.branch_difference.window,
            "diversity.every": self.diversity.every,
            "diversity.prompts": self.diversity.prompts,
            "diversity.patience": self.diversity.patience,
        }
        for name, value in counts.items():
            if value < 1:
                raise SettingsError(f"alarms.{name} must be at least 1, got {value}")
        if self.gradient_explosion.window < LEAST_HISTORY:
            raise SettingsError(
                f"alarms.gradient_explosion.window must be at least {LEAST_HISTORY} steps, got "
                f"{self.gradient_explosion.window}"
            )
        if self.diversity.seeds < 2:
            raise SettingsError(f"alarms.diversity.seeds must be at least 2, got {self.diversity.seeds}")
        if not 0 <= self.diversity.share < 1:
            raise SettingsError(f"alarms.diversity.share must be at least 0 and below 1, got {self.diversity.share}")
        if not 0 <= self.shift_drift.least < 1:
            raise SettingsError(
                f"alarms.shift_drift.least must be at least 0 and below 1, got {self.shift_drift.least}"
            )
        if not 0 < self.shift_drift.most < math.inf:
            raise SettingsError(f"alarms.shift_drift.most must be above 0 and finite, got {self.shift_drift.most}")
        if not self.gradient_explosion.factor > 1:
            raise SettingsError(
                f"alarms.gradient_explosion.factor must be above 1, got {self.gradient_explosion.factor}"
            )
        if not 0 <= self.branch_difference.low < self.branch_difference.high:
            raise SettingsError(
                "alarms.branch_difference: low must be at least 0 and below high, got "
                f"{self.branch_difference.low} and {self.branch_difference.high}"
            )


# ---- what is found


@dataclass(frozen=True)
class Alarm:
    """What was seen and done.

    Attributes:
        name: key of the alarm in the config's ``alarms``.
        step: the step that it was seen in, counted from 1, on the console, in metrics.jsonl and in reports. The line of
            metrics.jsonl is written a step later, and its own ``step`` is that one's: a resumed run cuts by it.
        saw, did: in words.
        stops: whether it ends the run.
    """

    name: str
    step: int
    saw: str
    did: str
    stops: bool = False

    @property
    def see(self) -> str:
        """Where to read about it."""
        return f"{DOCS}#{self.name.replace('_', '-')}"

    @property
    def line(self) -> str:
        """For the console."""
        return f"ALARM {self.name} at step {self.step}: {self.saw}; {self.did}. See {self.see}"

    @property
    def record(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {"alarm": {"step": self.step, "name": self.name, "saw": self.saw, "did": self.did, "see": self.see}}


class Alarms:
    """The alarms of one run. Per step: :meth:`judge` between clipping and the optimizer, :meth:`after_step` at the end.

    Attributes:
        correction_factor: what the weight of the correction is to be multiplied with in the next step.
        skipped: steps that were left out, as far as looked at.
        halt: the alarm that ends the run, or None.
    """

    def __init__(
        self,
        settings: AlarmSettings,
        *,
        shift: nn.Module | None = None,
        device: torch.device | str = "cpu",
        loss_scaling: bool = False,
    ) -> None:
        """
        Args:
            shift: a condition shift that is trained, as it starts; None for one that stays.
            device: of the gradients.
            loss_scaling: gradients that overflow are part of fp16 training, which skips such steps by itself; single
                ones are then no alarm.
        """
        self.settings, self.loss_scaling = settings, loss_scaling
        self.correction_factor = 1.0
        self.skipped = 0
        self.halt: Alarm | None = None
        trained = shift is not None and any(p.requires_grad for p in shift.parameters())
        self._shift = shift if trained and settings.shift_drift.action != "off" else None
        self._start = {} if self._shift is None else {n: p.detach().clone() for n, p in shift.named_parameters()}
        first = math.sqrt(sum(float((p - _identity(n)).square().mean()) for n, p in self._start.items()))
        # A start at the identity cannot come closer to it; how far it goes is then counted in another unit.
        self._starts_as_none = first < 1e-6
        self._unit = DEFAULT_DISTANCE if self._starts_as_none else first
        # Newest norms of the gradients in a ring; infinity is "none", which sorting puts last.
        self._norms = torch.full((settings.gradient_explosion.window,), float("inf"), device=device)
        self._judged = 0
        self._verdict: dict[str, Tensor] = {}
        self._pending: _Sent | _Here | None = None
        self._run = {"non_finite": 0, "gradient_explosion": 0, "diversity": 0}
        self._differences: deque[float] = deque(maxlen=settings.branch_difference.window)
        self._quiet: set[str] = set()
        self._drift_told = 0
        self._widest = 0.0

    # ---- on the device

    @torch.no_grad()
    def judge(self, norm: Tensor) -> Tensor | None:
        """Whether the step with these gradients is to be left out: 0-d, 1.0 or 0.0, on the device; None: nothing asks.

        norm: 0-d norm of the gradients before clipping, the same in every process. Call it once a step.
        """
        settings = self.settings.gradient_explosion
        if not self.settings.enabled:
            return None
        norm = norm.detach().to(self._norms)
        ordered = self._norms.sort().values
        known = ordered.isfinite().sum()
        median = ordered.gather(0, ((known - 1) // 2).clamp_min(0).view(1)).squeeze(0)
        exploded = (norm > settings.factor * median) & (known >= LEAST_HISTORY) & (median > 0) & norm.isfinite()
        skip = torch.zeros_like(norm)
        if self.settings.non_finite.action == "skip":
            skip = torch.maximum(skip, (~norm.isfinite()).float())
        if settings.action == "skip":
            skip = torch.maximum(skip, exploded.float())
        if _processes() > 1:
            dist.all_reduce(skip, op=dist.ReduceOp.MAX)
        # An exploded norm goes in too: where norms stay larger for good, the median follows within half the window.
        self._norms[self._judged % len(self._norms)] = norm.nan_to_num(nan=float("inf"))
        self._judged += 1
        self._verdict = {"grad_norm": norm, "median": median, "exploded": exploded.float(), "skip": skip}
        return skip

    # ---- on the host, one step late

    def after_step(self, step: int, values: Mapping[str, Tensor]) -> list[Alarm]:
        """Looks at the numbers of the step before, and sends those of this one on their way.

        Args:
            step: steps done, this one included.
            values: 0-d tensors of this step by name; those that an alarm asks for are taken: the losses,
                ``dv_relative``, ``correction_weight``, ``diversity`` where it was measured.

        Raises:
            NonFiniteLossError: too many steps in a row without finite gradients.
        """
        if not self.settings.enabled:
            return []
        pending, self._pending = self._pending, None
        alarms = [] if pending is None else self.look(*pending.read())
        wanted = {name: value for name, value in values.items() if name in _ASKED or name.startswith("loss_")}
        wanted |= {**self._verdict, **self._drift()}
        self._verdict = {}
        if wanted:
            self._pending = _Sent(step, wanted)
        return alarms

    def _drift(self) -> dict[str, Tensor]:
        if self._shift is None:
            return {}
        identity, moved = [], []
        with torch.no_grad():
            for name, parameter in self._shift.named_parameters():
                start = self._start[name] = self._start[name].to(parameter.device)
                identity.append((parameter - _identity(name)).square().mean())
                moved.append((parameter - start).square().mean())
            distances = {"shift_moved": torch.stack(moved).sum().sqrt() / self._unit}
            if not self._starts_as_none:
                distances["shift_from_identity"] = torch.stack(identity).sum().sqrt() / self._unit
            return distances

    def look(self, step: int, numbers: Mapping[str, float]) -> list[Alarm]:
        """What the numbers of a finished step mean. ``step`` counts it; what is missing is not looked at.

        Raises:
            NonFiniteLossError: as :meth:`after_step`.
        """
        steps = self.settings.recovery_steps
        self.correction_factor = min(1.0, self.correction_factor * (1 / self.settings.back_off) ** (1 / steps))
        found = [
            self._non_finite(step, numbers),
            self._explosion(step, numbers),
            self._difference(step, numbers),
            self._lost_shift(step, numbers),
            self._diversity(step, numbers),
        ]
        alarms = [alarm for alarm in found if alarm is not None]
        self.halt = self.halt or next((alarm for alarm in alarms if alarm.stops), None)
        return alarms

    def _non_finite(self, step: int, numbers: Mapping[str, float]) -> Alarm | None:
        settings = self.settings.non_finite
        bad = _not_finite(numbers)
        self._run["non_finite"] = self._run["non_finite"] + 1 if bad else 0
        if bad is None:
            return None
        if settings.action == "error" or self._run["non_finite"] >= settings.patience:
            raise NonFiniteLossError(bad, step - 1, numbers[_key(bad)])
        skipped = bool(numbers.get("skip", 0.0))
        self.skipped += skipped
        if self.loss_scaling and bad == GRADIENT_NORM:
            return None
        did = "the step was skipped" if skipped else "its gradients were finite, so the step was done"
        return Alarm(
            "non_finite",
            step,
            f"the {bad if bad == GRADIENT_NORM else f'{bad} loss'} was {numbers[_key(bad)]}",
            f"{did} ({self._run['non_finite']} in a row, an error at {settings.patience})",
        )

    def _explosion(self, step: int, numbers: Mapping[str, float]) -> Alarm | None:
        settings = self.settings.gradient_explosion
        exploded = bool(numbers.get("exploded", 0.0)) and settings.action != "off"
        self._run["gradient_explosion"] = self._run["gradient_explosion"] + 1 if exploded else 0
        if not exploded:
            return None
        saw = (
            f"the gradient norm was {numbers['grad_norm']:.4g}, {numbers['grad_norm'] / numbers['median']:.3g} times "
            f"the median of the last {settings.window} steps"
        )
        if settings.action != "skip":
            return self._act("gradient_explosion", step, saw, settings.action)
        self.skipped += 1
        run = self._run["gradient_explosion"]
        if run >= settings.patience:
            return self._act("gradient_explosion", step, f"{saw}, the {run}th time in a row", "stop")
        return Alarm("gradient_explosion", step, saw, f"the step was skipped ({run} in a row)")

    def _difference(self, step: int, numbers: Mapping[str, float]) -> Alarm | None:
        settings, now = self.settings.branch_difference, numbers.get("dv_relative", math.nan)
        if not math.isfinite(now) or not numbers.get("correction_weight", 0.0) > 0:
            return None
        self._differences.append(now)
        if len(self._differences) < settings.window:
            return None
        mean = sum(self._differences) / settings.window
        high, low = mean > settings.high, mean < settings.low
        if not low:
            self._quiet.discard("low")
        if not high:
            self._quiet.discard("high")
        if not (high or low):
            return None
        side, action = ("high", settings.action) if high else ("low", settings.action_low)
        if action == "off" or (side in self._quiet and action == "tell"):
            return None
        self._quiet.add(side)
        # A back-off is given the time of a whole mean to show.
        self._differences.clear()
        saw = (
            f"the difference between the branches was {mean:.3g} of the real velocity over {settings.window} steps, "
            f"{'above' if high else 'below'} {settings.high if high else settings.low:g}"
        )
        return self._act("branch_difference", step, saw, action)

    def _lost_shift(self, step: int, numbers: Mapping[str, float]) -> Alarm | None:
        settings = self.settings.shift_drift
        left, moved = numbers.get("shift_from_identity", math.nan), numbers.get("shift_moved", math.nan)
        saw = None
        if left < settings.least:
            saw = f"the shift is {left:.2f} of its first distance from the identity, below {settings.least:g}"
        elif moved > settings.most:
            unit = "the default shift's distance" if self._starts_as_none else "its first distance"
            saw = f"the shift has moved by {moved:.2f} of {unit} from the identity, more than {settings.most:g}"
        if saw is None:
            self._drift_told = 0
            return None
        # Told once for each further `most` and each halving below `least`: a run that was stopped and goes on is
        # stopped again where it goes on drifting.
        levels = [int(min(moved / settings.most, 1e9))] if moved > settings.most else []
        if left < settings.least:
            levels.append(1 + int(math.log2(settings.least / max(left, 1e-6))))
        if max(levels) <= self._drift_told:
            return None
        self._drift_told = max(levels)
        return self._act("shift_drift", step, saw, settings.action)

    def _diversity(self, step: int, numbers: Mapping[str, float]) -> Alarm | None:
        settings, now = self.settings.diversity, numbers.get("diversity")
        if now is None or not math.isfinite(now):
            return None
        self._widest = max(self._widest, now)
        self._run["diversity"] = self._run["diversity"] + 1 if now < settings.share * self._widest else 0
        if self._run["diversity"] < settings.patience:
            return None
        self._run["diversity"] = 0
        saw = (
            f"one-step samples of one prompt differ by {now:.3g} over {settings.seeds} seeds, {now / self._widest:.2f} "
            f"of the {self._widest:.3g} that they differed by before"
        )
        return self._act("diversity", step, saw, settings.action)

    def _act(self, name: str, step: int, saw: str, action: str) -> Alarm:
        if action == "back_off":
            if self.correction_factor * self.settings.back_off >= SMALLEST_FACTOR:
                self.correction_factor *= self.settings.back_off
                did = (
                    f"the weight of the correction is multiplied with {self.correction_factor:.3g}, which grows back "
                    f"to 1 ({self.settings.recovery_steps} steps for each halving)"
                    if self.settings.back_off == 0.5
                    else f"the weight of the correction is multiplied with {self.correction_factor:.3g} for now"
                )
                return Alarm(name, step, saw, did)
            saw, action = f"{saw}, with the correction at {self.correction_factor:.3g} of its weight already", "stop"
        if action == "stop":
            return Alarm(name, step, saw, "the run stops with a checkpoint", stops=True)
        return Alarm(name, step, saw, "nothing was done")

    # ---- saving

    @property
    def figures(self) -> dict[str, float]:
        """What of this belongs into metrics.jsonl: only what is not as it should be."""
        figures: dict[str, float] = {}
        if self.skipped:
            figures["skipped_steps"] = self.skipped
        if self.correction_factor < 1:
            figures["correction_factor"] = self.correction_factor
        return figures

    def settle(self, parameters: Iterable[Tensor]) -> None:
        """Before a checkpoint: has the last step's numbers here, waiting for them; they are looked at in their time.

        parameters: what would be saved.

        Raises:
            NonFiniteLossError: the last step had no finite gradients or losses, and it is the last of ``patience`` in
                a row, or the parameters themselves are not finite.
        """
        if self._pending is None:
            return
        step, numbers = self._pending.read()
        self._pending = _Here(step, numbers)
        bad = _not_finite(numbers)
        scaled = self.loss_scaling and bad == GRADIENT_NORM
        if bad is None or scaled:
            return
        settings = self.settings.non_finite
        enough = settings.action == "error" or self._run["non_finite"] + 1 >= settings.patience
        if enough or _spoilt(parameters):
            raise NonFiniteLossError(bad, step - 1, numbers[_key(bad)])

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to see the same alarms, in plain values."""
        pending = None if self._pending is None else self._pending.read()
        return {
            "correction_factor": self.correction_factor,
            "skipped": self.skipped,
            "judged": self._judged,
            "norms": _written(self._norms.tolist()),
            "runs": dict(self._run),
            "differences": list(self._differences),
            "quiet": sorted(self._quiet),
            "drift_told": self._drift_told,
            "widest": self._widest,
            "pending": None if pending is None else {"step": pending[0], "numbers": _written(pending[1])},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`. Norms of another ``window`` are taken as far as they go."""
        self.correction_factor, self.skipped = float(state["correction_factor"]), int(state["skipped"])
        norms, judged, size = _read(state["norms"]), int(state["judged"]), len(self._norms)
        newest = [norms[(judged - 1 - i) % len(norms)] for i in range(min(len(norms), size, judged))]
        self._norms.fill_(float("inf"))
        self._judged = judged
        for back, norm in enumerate(newest):
            self._norms[(judged - 1 - back) % size] = norm
        self._run = {**self._run, **{k: int(v) for k, v in state["runs"].items()}}
        self._differences.clear()
        self._differences.extend(state["differences"])
        quiet = set(state["quiet"])
        # Earlier versions told of a drift once, and kept that among the others.
        self._drift_told = int(state.get("drift_told", "shift_drift" in quiet))
        self._quiet = quiet - {"shift_drift"}
        self._widest = float(state["widest"])
        pending = state["pending"]
        self._pending = None if pending is None else _Here(int(pending["step"]), _read(pending["numbers"]))


_ASKED = ("dv_relative", "correction_weight", "diversity")


def _not_finite(numbers: Mapping[str, float]) -> str | None:
    """The term whose value is no number, as :class:`NonFiniteLossError` calls it; single losses before their sum."""
    names = sorted((n for n in numbers if n.startswith("loss_")), key=lambda name: name == "loss_total")
    for name in (*names, "grad_norm"):
        if not math.isfinite(numbers.get(name, 0.0)):
            return GRADIENT_NORM if name == "grad_norm" else name.removeprefix("loss_")
    return None


def _identity(name: str) -> float:
    """What a parameter of a shift that shifts nothing has in every channel."""
    return 1.0 if "scale" in name else 0.0


def _key(term: str) -> str:
    return "grad_norm" if term == GRADIENT_NORM else f"loss_{term}"


@torch.no_grad()
def _spoilt(parameters: Iterable[Tensor]) -> bool:
    """Whether a value of ``parameters`` is not finite, in any process; the host waits for the answer."""
    own = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    flag = torch.stack([~p.isfinite().all() for p in own]).any().float()
    if _processes() > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Sent:
    """Numbers of a step on their way from the device."""

    def __init__(self, step: int, values: Mapping[str, Tensor]) -> None:
        self.step, self.names = step, tuple(values)
        tensor = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        if _processes() > 1:
            # Every process has to come to the same conclusions. Of what is the same everywhere the mean is that too.
            dist.all_reduce(tensor)
            tensor /= _processes()
        self.ready: torch.cuda.Event | None = None
        if tensor.is_cuda:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            self.ready = torch.cuda.Event()
            self.ready.record(torch.cuda.current_stream(tensor.device))
            tensor = host
        self.values = tensor

    def read(self) -> tuple[int, dict[str, float]]:
        if self.ready is not None:
            self.ready.synchronize()
        return self.step, dict(zip(self.names, self.values.tolist(), strict=True))


@dataclass(frozen=True)
class _Here:
    """Numbers of a step that are here."""

    step: int
    numbers: dict[str, float]

    def read(self) -> tuple[int, dict[str, float]]:
        return self.step, self.numbers


def _written(values: Any) -> Any:
    """``values`` with infinities and NaN as texts: JSON has no such numbers."""
    if isinstance(values, dict):
        return {name: _written(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_written(value) for value in values]
    return values if math.isfinite(values) else str(values)


def _read(values: Any) -> Any:
    """The inverse of :func:`_written`."""
    if isinstance(values, Mapping):
        return {name: _read(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_read(value) for value in values]
    return float(values)


# ---- what the loop does not compute by itself


@torch.no_grad()
def one_step_spread(network: nn.Module, velocity: Any, condition: Any, shape: tuple[int, ...], seeds: int) -> Tensor:
    """How far one-step samples of one prompt lie apart over seeds: 0-d, the standard deviation over the seeds as a root
    mean square over all values of a sample, averaged over the prompts; in the units of the samples (latents).

    Args:
        network: set to eval mode meanwhile.
        velocity: the generator, ``velocity(x_t, t, condition)``.
        condition: of P prompts, on the device.
        shape: (C, h, w) of a sample.
        seeds: noises, the same for every prompt and in every call.

    Draws no random numbers of anybody: the noise has a generator of its own, and nothing drops out in eval mode.
    """
    prompts, device = len(condition.prompt_embeds), condition.prompt_embeds.device
    noise = torch.randn(seeds, *shape, generator=torch.Generator().manual_seed(20261)).to(device)
    rows = torch.arange(prompts, device=device)
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        samples = []
        for i in range(seeds):  # one seed at a time: as many rows as prompts
            x_t = noise[i].expand(prompts, *shape).contiguous()
            t = torch.ones(prompts, device=device)
            samples.append(x_t.float() - velocity(x_t, t, condition.index(rows)).float())
    finally:
        for module, mode in modes:
            module.training = mode
    return torch.stack(samples).var(dim=0).flatten(1).mean(1).sqrt().mean()
