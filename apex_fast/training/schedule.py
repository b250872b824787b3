"""Learning rates as a pure function of the step, so that there is nothing to save."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, *, kind: str, warmup_steps: int, total_steps: int) -> float:
    """What the learning rate is multiplied with at ``step`` (from 0): a linear warm-up, then constant or half a cosine
    down to 0.

    kind: "constant", "linear" (down to 0) or "cosine". ValueError for another."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 - done
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"lr_scheduler must be one of: constant, linear, cosine; got {kind!r}")
