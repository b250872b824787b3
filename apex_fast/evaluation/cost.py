"""What one picture costs: seconds from its text to its pixels, seconds of its sampling alone, and memory.

Memory is that of tensors, read from torch's allocator (on a CPU through the profiler), so that kernels' own buffers
count: the weights of the network with its text encoder, and the most that drawing one picture holds besides.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from apex_fast.evaluation.benchmark import Sampler

REPEATS, MOST_SECONDS = (3, 20), 2.0
"""A time is the median of as many calls as end in MOST_SECONDS, at least and at most REPEATS."""


@torch.no_grad()
def cost_of_one_picture(
    sampler: Sampler, prompt: str, sample_shape: tuple[int, ...], *modules: Any
) -> dict[str, float | int]:
    """``seconds_per_picture`` (the text encoded, the picture sampled, decoded and on the CPU), ``network_seconds`` (the
    sampling alone) and ``peak_bytes`` for one picture at a time, as a user waits for it.

    Args:
        sampler: how it is drawn.
        modules: what has to be in memory for that, ``nn.Module`` or other things, which are left out.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, *sample_shape, generator=generator)

    def whole() -> Any:
        condition, negative = sampler.encode([prompt])
        return sampler.draw(noise, condition, negative, generator)

    condition, negative = sampler.encode([prompt])
    extra = peak_extra_bytes(whole, condition.device)
    return {
        "seconds_per_picture": median_seconds(whole),
        "network_seconds": median_seconds(lambda: sampler.sample(noise, condition, negative, generator)),
        "peak_bytes": weight_bytes(*modules) + extra,
    }


def median_seconds(call: Callable[[], Any]) -> float:
    """Median of the seconds that ``call`` takes; its result has to be on the CPU, or the device may not be done."""
    call()
    times: list[float] = []
    while len(times) < REPEATS[0] or (len(times) < REPEATS[1] and sum(times) < MOST_SECONDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def weight_bytes(*modules: Any) -> int:
    """Bytes of all parameters and buffers of ``modules``, each storage once."""
    storages = {}
    for module in modules:
        if isinstance(module, nn.Module):
            for tensor in (*module.parameters(), *module.buffers()):
                storage = tensor.untyped_storage()
                storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors on ``device`` that ``call`` holds at one time above what was held before, its results
    included."""
    call()
    # The profiler would announce itself on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    peak = profiled_peak(profile)
    del result
    return peak


def profiled_peak(profile: torch.profiler.profile) -> int:
    """Most bytes of tensors on the CPU that a finished profile with ``profile_memory`` saw above those at its
    beginning."""
    live = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
