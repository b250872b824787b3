"""The random numbers of a step, drawn once, so that every schedule can be given the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Draws:
    """All random draws of one training step, on the device of x; noise and times are fp32 (fp64 for an fp64 x).

    Args:
        z: ``[B, ...]``, noise of the generator's start x_s = s z + (1 - s) x (Eq. 1).
        s: ``[B]``, time of that start; 1 is one-step generation.
        z_query: ``[B, ...]``, noise z' with which the generated sample is noised again (Eq. 12).
        t_query: ``[B]``, its time.
        z_sup: ``[B, ...]``, noise of the flow-matching term on data (Eq. 20); None where that term is off.
        t_sup: ``[B]``, its time; None with it.
        z_consistency, t_consistency: ``[B, ...]`` and ``[B]``, noise and time of the consistency term; None where that
            is off.
        z_mix, t_mix: ``[B, ...]`` and ``[B]``, noise and time of L_mix beside the correction; None where that is off.
    """

    z: Tensor
    s: Tensor
    z_query: Tensor
    t_query: Tensor
    z_sup: Tensor | None = None
    t_sup: Tensor | None = None
    z_consistency: Tensor | None = None
    t_consistency: Tensor | None = None
    z_mix: Tensor | None = None
    t_mix: Tensor | None = None


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype of samples on the path, whatever the network computes in: fp64 for an fp64 x, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def normal(
    shape: Sequence[int], device: torch.device, dtype: torch.dtype, generator: torch.Generator | None = None
) -> Tensor:
    """Standard normal noise in ``dtype`` on ``device``.

    It is always drawn in fp32, so a seed gives the same noise to an fp64 and an fp32 run, and on the generator's own
    device: a CPU generator makes a run on any accelerator start from the same numbers. Without a generator the global
    one of ``device`` is used.
    """
    source = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=source, dtype=torch.float32).to(device, dtype)
