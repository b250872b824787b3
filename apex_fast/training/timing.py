"""Where the time of a step goes, by role, without making a GPU wait.

A step is cut into stretches at every change of role: data, forward, backward, synchronisation (of gradients between
processes, and the gradient norm), optimizer. A role inside another one interrupts it, so that a backward which the
objective calls in the middle of its forwards is not counted twice. On a CPU a cut is a reading of the clock. On a GPU
it is an event in the stream: it costs microseconds, and what lies between two of them is known once the device has
passed both. They are read when a line of metrics.jsonl is written, where the host waits for the device anyway; cuts
that the device has passed before are folded into sums at the end of every step, so that few of them are alive.

What overlaps cannot be told apart: DistributedDataParallel sends gradients while the backward still runs, and that is
counted as backward. Time in which a GPU waits for its host belongs to the role that the host was in.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

FORWARD, BACKWARD, DATA, SYNCHRONISATION, OPTIMIZER = "forward", "backward", "data", "synchronisation", "optimizer"
ROLES = (FORWARD, BACKWARD, DATA, SYNCHRONISATION, OPTIMIZER)
_OTHER = "other"


class Clock(Protocol):
    """Makes cuts and tells the time between them."""

    def cut(self) -> Any:
        """Now, as :meth:`seconds` takes it."""

    def passed(self, cut: Any) -> bool:
        """Whether the time of ``cut`` is known already."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two cuts; waits for the later one if it has to."""

    def free(self, cut: Any) -> None:
        """``cut`` is not needed any more."""


class HostClock:
    """Readings of the host's clock."""

    def cut(self) -> float:
        return time.perf_counter()

    def passed(self, cut: float) -> bool:
        return True

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def free(self, cut: float) -> None:
        return None


class EventClock:
    """Events in the current stream of a GPU, used again and again. ``make`` makes one."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._spare = make, []

    def cut(self) -> Any:
        event = self._spare.pop() if self._spare else self._make()
        event.record()
        return event

    def passed(self, cut: Any) -> bool:
        return cut.query()

    def seconds(self, begin: Any, end: Any) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1000.0

    def free(self, cut: Any) -> None:
        self._spare.append(cut)


def clock_of(device: torch.device) -> Clock:
    """Events on CUDA, the host's clock elsewhere."""
    if device.type == "cuda":
        return EventClock(lambda: torch.cuda.Event(enable_timing=True))
    return HostClock()


class StepTimer:
    """Seconds of each role, summed over steps until they are read.

    ``with timer.step(): ... with timer.role("data"): ...``; roles may be nested. :meth:`aside` is for what happens
    between steps and is not training, such as a validation: it does not count as time of the steps.
    """

    def __init__(self, device: torch.device, clock: Clock | None = None) -> None:
        self._clock = clock_of(device) if clock is None else clock
        self._cuts: list[tuple[Any, str | None]] = []
        self._roles: list[str] = []
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._begun, self._aside = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One step of the optimizer. Left by an error, it counts as well."""
        with self.role(_OTHER):
            yield
        self._steps += 1
        self._fold(wait=False)

    @contextlib.contextmanager
    def role(self, name: str) -> Iterator[None]:
        """What runs in this context is ``name``, one of ROLES, until a role inside it begins."""
        self._roles.append(name)
        self._cut()
        try:
            yield
        finally:
            self._roles.pop()
            self._cut()

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call`` in the role ``name``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.role(name):
                return call(*args, **kwargs)

        return timed

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Time in here is none of the steps'."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._aside += time.perf_counter() - begun

    def read(self) -> dict[str, float]:
        """Mean seconds of a step since the last reading: of each role that there was, and ``step``, the time that went
        by from one step to the next. Empty without a step. Waits for the device."""
        self._fold(wait=True)
        now, found = time.perf_counter(), {}
        if self._steps:
            found = {role: self._sums[role] / self._steps for role in ROLES if role in self._sums}
            found["step"] = max(now - self._begun - self._aside, 0.0) / self._steps
        self._sums, self._steps, self._begun, self._aside = {}, 0, now, 0.0
        return found

    def _cut(self) -> None:
        self._cuts.append((self._clock.cut(), self._roles[-1] if self._roles else None))

    def _fold(self, *, wait: bool) -> None:
        """Adds up the stretches whose ends the device has passed, or all of them."""
        done = 0
        for (begin, role), (end, _) in zip(self._cuts, self._cuts[1:], strict=False):
            if not wait and not self._clock.passed(end):
                break
            if role is not None:
                self._sums[role] = self._sums.get(role, 0.0) + self._clock.seconds(begin, end)
            done += 1
        for cut, _ in self._cuts[:done]:
            self._clock.free(cut)
        del self._cuts[:done]


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: of the GPU as torch counts it, or resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
