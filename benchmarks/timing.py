"""Times of several providers, interleaved, and the memory that a call needs."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]


@dataclass
class Timing:
    """Times of single calls, in ms, and the page faults that they met."""

    samples: list[float] = field(default_factory=list)
    faults: int = 0

    def quantile(self, share: float) -> float:
        """Linear between the two nearest samples, as numpy's default."""
        ordered = sorted(self.samples)
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    @property
    def p20(self) -> float:
        return self.quantile(0.2)

    @property
    def p50(self) -> float:
        return statistics.median(self.samples)

    @property
    def p80(self) -> float:
        return self.quantile(0.8)

    @property
    def faults_per_call(self) -> float:
        return self.faults / len(self.samples)


def interleave(calls: dict[str, Call], *, rounds: int, block_ms: float) -> dict[str, Timing]:
    """Time ``calls`` side by side.

    Every round runs each call in a block of about ``block_ms`` (one call at least), the order turned by one from round
    to round, so that a change of the machine's speed meets all of them. The first call of a block is not timed: caches
    and branch predictors then hold what they hold in a loop over this call, not what the previous provider left.
    Results are dropped outside the timed span.
    """
    names = list(calls)
    block_lengths = {name: max(1, min(200, round(block_ms / _warm_up(calls[name])))) for name in names}
    timings = {name: Timing() for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                _run_block(calls[name], block_lengths[name], timings[name])
    finally:
        if collecting:
            gc.enable()
    return timings


def _warm_up(call: Call) -> float:
    """Duration in ms of a call, after so many that the heap has what it needs (or after 30: it will not settle).

    Freed blocks often miss the next request by the few bytes that alignment takes, so the heap goes on growing for a
    while; four calls in a row without a page fault tell that it has stopped.
    """
    settled = 0
    for _ in range(30):
        faults = _faults()
        start = time.perf_counter_ns()
        call()
        duration = (time.perf_counter_ns() - start) / 1e6
        settled = settled + 1 if _faults() - faults < 16 else 0
        if settled == 4:
            break
    return max(1e-6, duration)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _run_block(call: Call, count: int, timing: Timing) -> None:
    call()
    faults = _faults()
    for _ in range(count):
        start = time.perf_counter_ns()
        result = call()
        timing.samples.append((time.perf_counter_ns() - start) / 1e6)
        del result
    timing.faults += _faults() - faults


def peak_extra_bytes(call: Call) -> int:
    """Most bytes of tensor memory that ``call`` holds at one time above what was held before, its results included.

    Read from torch's allocator through the profiler, so that memory taken inside kernels and by compiled code counts.
    """
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    live = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak
