"""Times of several providers, interleaved, and the memory that a call needs, keeps and moves.

On a GPU a time is that of a call and of waiting for its end: what the host takes to launch it counts.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apex_fast.evaluation import cost

from .machine import synchronise

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


def interleave(
    calls: dict[str, Call], *, rounds: int, block_ms: float, device: str = "cpu", warm_up: int = 30
) -> dict[str, Timing]:
    """Time ``calls`` side by side.

    Every round runs each call in a block of about ``block_ms`` (one call at least), the order turned by one from round
    to round, so that a change of the machine's speed meets all of them. The first call of a block is not timed: caches
    and branch predictors then hold what they hold in a loop over this call, not what the previous provider left. With
    ``block_ms`` 0, for long calls, every call is timed. Results are dropped outside the timed span. ``warm_up``: most
    calls before anything is timed.
    """
    names = list(calls)
    durations = {name: _warm_up(calls[name], device, warm_up) for name in names}
    block_lengths = {name: max(1, min(200, round(block_ms / durations[name]))) for name in names}
    timings = {name: Timing() for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                if block_ms > 0:
                    calls[name]()
                _run_block(calls[name], block_lengths[name], timings[name], device)
    finally:
        if collecting:
            gc.enable()
    return timings


def _warm_up(call: Call, device: str, limit: int) -> float:
    """Duration in ms of a call, after so many that the heap has what it needs (or after ``limit``: it will not settle).

    Freed blocks often miss the next request by the few bytes that alignment takes, so the heap goes on growing for a
    while; four calls in a row without a page fault tell that it has stopped.
    """
    settled = 0
    for _ in range(limit):
        faults = _faults()
        synchronise(device)
        start = time.perf_counter_ns()
        call()
        synchronise(device)
        duration = (time.perf_counter_ns() - start) / 1e6
        settled = settled + 1 if _faults() - faults < 16 else 0
        if settled == 4:
            break
    return max(1e-6, duration)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _run_block(call: Call, count: int, timing: Timing, device: str) -> None:
    faults = _faults()
    for _ in range(count):
        synchronise(device)
        start = time.perf_counter_ns()
        result = call()
        synchronise(device)
        timing.samples.append((time.perf_counter_ns() - start) / 1e6)
        del result
    timing.faults += _faults() - faults


def peak_extra_bytes(call: Call, device: str = "cpu") -> int:
    """Most bytes of tensor memory that ``call`` holds at one time above what was held before; see
    :func:`apex_fast.evaluation.cost.peak_extra_bytes`."""
    return cost.peak_extra_bytes(call, torch.device(device))


class MovedBytes(TorchDispatchMode):
    """Counts in ``bytes`` what the operations in its context read and write: each operand and each result once.

    What a view or a reshape without a copy does moves nothing. Memory that a kernel uses inside is not seen, and an
    operand that stays in the cache counts all the same: it is the count for tensors beyond the cache.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found, returned = list(_tensors((args, kwargs))), list(_tensors(result))
        storages = {t.untyped_storage().data_ptr() for t in found}
        is_view = (
            returned
            and not func._schema.is_mutable
            and all(t.untyped_storage().data_ptr() in storages for t in returned)
        )
        if not is_view and func.overloadpacket not in _NOTHING_MOVED:
            # an expanded tensor has fewer bytes than elements
            self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in (*found, *returned))
            self.bytes += _moved_inside(func, args, kwargs or {})
        return result


_NOTHING_MOVED = (
    torch.ops.aten.detach,
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
)


def _moved_inside(func, args, kwargs) -> int:
    """What operations of this library that consist of several others move between those, less what they do not read."""
    if func._schema.name == "apex_fast::shifted_velocity_loss":
        return 0 if args[0] is None else -args[0].nbytes  # of v_gen it needs the graph alone
    if func.namespace != "apex_fast" or not func._schema.name.startswith("apex_fast::velocity_head"):
        return 0
    hidden = args[1] if func._schema.name.endswith("_backward") else args[0]
    if hidden is args[0]:
        return 2 * hidden.nbytes  # the modulated state: written, and read by the projection
    to_hidden, to_scale, to_shift, to_weight, _ = kwargs["output_mask"]
    inputs = to_hidden or to_scale or to_shift
    # For the weight the modulated state is made anew and read, from hidden, which is read a second time for the inputs,
    # and so is the gradient that the projection gives the modulated state.
    return hidden.nbytes * ((2 + inputs) * to_weight + 2 * inputs)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def moved_bytes(call: Call) -> int:
    """What :class:`MovedBytes` counts of ``call``, its backward included."""
    with MovedBytes() as moved:
        call()
    return moved.bytes


def kept_bytes(forward: Call, besides: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward of ``forward``; storages of ``besides``, which are held anyway, and
    tensors of one storage do not count twice."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in besides}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            kept.append(tensor)  # or its memory might be given to the next one, which would not be counted
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)
