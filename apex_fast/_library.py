"""Finds and loads the compiled ops, and says what to do where they do not load."""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from types import ModuleType

import torch

PACKAGE = Path(__file__).parent
OP_LIBRARY = "_C.so"
NAMESPACE = "apex_fast"
KERNEL_CHOICES = ("auto", "compiled", "reference")

_INSTALL = "pip install --force-reinstall --no-deps ."


def kernels_setting() -> str:
    """Value of ``APEX_FAST_KERNELS``: which kernels the ops may run.

    ``auto`` runs the compiled kernels, and on a device that has none the plain torch twins, with one notice;
    ``compiled`` refuses such a device; ``reference`` runs the twins everywhere.

    Raises:
        ValueError: any other value.
    """
    value = os.environ.get("APEX_FAST_KERNELS") or "auto"
    if value not in KERNEL_CHOICES:
        raise ValueError(f"APEX_FAST_KERNELS is {value!r}: expected one of {', '.join(KERNEL_CHOICES)}")
    return value


def build_module() -> ModuleType:
    """The module that knows how the library was built. It needs no torch, so it loads where the ops do not.

    Raises:
        ImportError: the package is not built, or was built for another Python.
    """
    try:
        return importlib.import_module(f"{__package__}._build")
    except ImportError as error:
        built = sorted(path.name for path in PACKAGE.glob("_build.*.so"))
        if built:
            problem = f"apex_fast was built for another Python: {', '.join(built)} does not load ({error})."
        else:
            problem = f"apex_fast is not built: {PACKAGE} has no compiled _build module."
        raise ImportError(f"{problem} In the source folder run: {_INSTALL}") from error


@functools.cache
def load() -> None:
    """Load the op library, once; afterwards ``torch.ops.apex_fast`` has the ops.

    Raises:
        ImportError: the library was not built, was built against another minor version of torch, or does not load. The
            message names what was built, what is installed, and the command that mends it.
        ValueError: ``APEX_FAST_KERNELS`` is misspelt.
    """
    kernels_setting()
    path = PACKAGE / OP_LIBRARY
    if not path.is_file():
        raise ImportError(
            f"apex_fast is not built: there is no {path}. In the source folder run: {_INSTALL}"
            " (or `pip install -e .` to work on it)"
        )
    built = build_module().torch_version
    if _minor(built) != _minor(torch.__version__):
        raise ImportError(
            f"apex_fast was built against torch {built} and torch {torch.__version__} is installed; compiled ops hold"
            f" for one minor version of torch. Build them anew, in the source folder: {_INSTALL}"
            f" (or go back: pip install 'torch=={'.'.join(_minor(built))}.*')"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # torch reports the path and keeps what the loader said (a missing symbol, say) as the cause.
        reason = error.__cause__ or error
        raise ImportError(
            f"the compiled ops of apex_fast do not load: {reason}. They were built against torch {built}, torch"
            f" {torch.__version__} is installed. Build them anew, in the source folder: {_INSTALL}"
        ) from error


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])
