"""Memory, passes and hours of a run before it runs, from configurations alone: ``apex-fast plan``."""

from __future__ import annotations

from typing import Any

__all__ = ["Plan", "PlanError", "Passes", "paper_passes", "plan", "step_passes"]

_HOMES = {
    "Plan": "apex_fast.planning.planner",
    "plan": "apex_fast.planning.planner",
    "PlanError": "apex_fast.planning.blueprint",
    "Passes": "apex_fast.passes",
    "paper_passes": "apex_fast.passes",
    "step_passes": "apex_fast.passes",
}


def __getattr__(name: str) -> Any:
    # Training imports the passes from here, and planning imports training.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
