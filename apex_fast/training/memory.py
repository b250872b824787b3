"""Memory that runs out: what was being done is kept with the error, and the command line says what to change."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OutOfMemory(torch.OutOfMemoryError):
    """torch's error with what was being done when memory ran out.

    Attributes:
        phase: in words: "encoding pictures and prompts", "step 12".
    """

    def __init__(self, phase: str, message: str) -> None:
        super().__init__(message)
        self.phase = phase


@contextmanager
def during(phase: str) -> Iterator[None]:
    """Names what is being done, should torch run out of memory in it; the innermost name counts."""
    try:
        yield
    except OutOfMemory:
        raise
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(phase, str(error)) from error


def release() -> None:
    """Gives memory that nothing refers to any more back to the GPU, for what comes next there. Nothing without one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        # Models hold cycles (hooks, bound methods), so dropping the last name of one does not free it yet.
        gc.collect()
        torch.cuda.empty_cache()


def explain(error: torch.OutOfMemoryError, command: str, advice: str) -> str:
    """What to tell the user in one line.

    Args:
        command: `apex-fast plan CONFIG`, to which the size of the GPU is added; "" where there is no config to plan.
        advice: what to change.
    """
    phase = getattr(error, "phase", None)
    line = "out of memory" + (f" during: {phase}" if phase else "")
    size = "24GB"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        # The device that ran out; a process of this program uses one.
        device = max(range(torch.cuda.device_count()), key=torch.cuda.max_memory_allocated)
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        line += f"; this process held at most {_gib(peak)} of the {_gib(total)} of cuda:{device}"
        size = f"{round(total / (1 << 30))}GB"
    if command:
        line += f". `{command} --gpu {size}` says what such a run needs and which settings make it fit"
    return f"{line}; {advice}" if advice else line


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
