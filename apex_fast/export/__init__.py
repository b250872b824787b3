"""Out of a run to where people work: files that stock diffusers and ComfyUI load, with a model card.

:mod:`~apex_fast.export.source` reads what a run left, :mod:`~apex_fast.export.stock` writes it for the family's own
diffusers pipeline with the scheduler of :mod:`~apex_fast.export.schedulers`, :mod:`~apex_fast.export.card` describes
it, :mod:`~apex_fast.export.comfyui` writes it for ComfyUI. :func:`export_run` does all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apex_fast.export.command import export_run

__all__ = ["export_run"]


def __getattr__(name: str) -> Any:
    # When it is asked for: `import apex_fast` must not need what an export needs.
    if name == "export_run":
        from apex_fast.export.command import export_run

        return export_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
