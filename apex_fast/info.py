"""What is installed, how the library was built and which kernel runs each op on which device.

``apex-fast env`` and ``python -m apex_fast.info`` print it, ``--json`` for programs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import _library
from .version import __version__

COMPILED = "compiled"
TWIN = "plain torch twin"
REFUSED = "none (APEX_FAST_KERNELS=compiled)"
MISSING = "none"

# Column title -> dispatch key. A device type that is none of these has whatever the last one has.
DEVICES = {"CPU": "CPU", "CUDA": "CUDA", "other": "PrivateUse1"}

_DISTRIBUTION = "apex_fast"
_REPORTED_EXTRAS = ("train", "data")


def collect() -> dict[str, Any]:
    """Everything that is reported, ready for JSON.

    Returns:
        A dict with

        - ``versions``: package name -> version, ``None`` where it is not installed;
        - ``extras``: package name -> the extra that brings it;
        - ``build``: facts of the compiled library (``apex_fast._build.facts()``);
        - ``runtime``: CPU instruction set in use, threads, settings, CUDA devices;
        - ``ops``: op name -> device -> which kernel runs there.

    Raises:
        ImportError: the compiled library does not load; the message has the mend.
    """
    _library.load()
    extras = _optional_packages()
    return {
        "versions": {
            "python": platform.python_version(),
            "apex_fast": __version__,
            "torch": torch.__version__,
            **{name: _version(name) for name in ("numpy", "safetensors", *sorted(extras))},
        },
        "extras": extras,
        "build": {key: list(v) if isinstance(v, tuple) else v for key, v in _library.build_module().facts().items()},
        "runtime": {
            "cpu_isa": torch.ops.apex_fast.cpu_isa(),
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)),
            "kernels_setting": _library.kernels_setting(),
            "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "ops": {op: {title: kernel_of(op, key) for title, key in DEVICES.items()} for op in op_names()},
    }


def op_names() -> list[str]:
    """Names, without the namespace, of the registered ops that take tensors, in alphabetical order."""
    prefix = f"{_library.NAMESPACE}::"
    return sorted(
        schema.name.removeprefix(prefix)
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith(prefix) and any("Tensor" in str(argument.type) for argument in schema.arguments)
    )


def kernel_of(op: str, dispatch_key: str) -> str:
    """Which kernel the dispatcher runs for ``op`` on a device: ``COMPILED``, ``TWIN``, ``REFUSED`` or ``MISSING``.

    Args:
        op: name without the namespace.
        dispatch_key: torch's name of the device's key, for example ``"CPU"`` or ``"CUDA"``.
    """
    name = f"{_library.NAMESPACE}::{op}"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    # Compiled kernels are registered for their device, the twins once for every device that is left.
    if has_kernel(name, dispatch_key):
        return COMPILED
    if has_kernel(name, "CompositeExplicitAutograd"):
        return REFUSED if _library.kernels_setting() == "compiled" else TWIN
    return MISSING


def build_line() -> str:
    """How the library was built, in one line."""
    build = _library.build_module().facts()
    return (
        f"apex_fast {__version__}, built against torch {build['torch_version']} by {build['compiler']}"
        f" ({build['build_type']}); CPU kernels for {', '.join(build['cpu_isas'])};"
        f" CUDA kernels {build['cuda_decision']}"
    )


def format(report: dict[str, Any]) -> str:
    """A report of :func:`collect` as text for a terminal."""
    build, runtime = report["build"], report["runtime"]
    versions = {}
    for name, version in report["versions"].items():
        extra = report["extras"].get(name)
        advice = f" (pip install 'apex_fast[{extra}]')" if extra else ""
        versions[name] = version or f"not installed{advice}"
    sections = [
        ("Versions", versions),
        (
            "Build",
            {
                "torch": f"{build['torch_version']} (CUDA {build['cuda_version'] or 'none'})",
                "compiler": f"{build['compiler']}, {build['build_type']}",
                "CPU kernels": ", ".join(build["cpu_isas"]),
                "CUDA kernels": build["cuda_decision"],
                "CUDA ops": ", ".join(build["cuda_ops"]) or "none",
            },
        ),
        (
            "Runtime",
            {
                "CPU kernels": f"{runtime['cpu_isa']} (APEX_FAST_CPU_ISA chooses another)",
                "threads": f"{runtime['threads']} of {runtime['cores']} cores",
                "APEX_FAST_KERNELS": runtime["kernels_setting"],
                "CUDA devices": ", ".join(runtime["cuda_devices"]) or "none",
            },
        ),
    ]
    lines = []
    for title, rows in sections:
        width = max(map(len, rows))
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows.items()), ""]
    return "\n".join([*lines, *_table(report["ops"])])


def main(arguments: Sequence[str] = ()) -> int:
    """Entry point of ``apex-fast env`` and ``python -m apex_fast.info``.

    Args:
        arguments: ``--json`` prints :func:`collect` as JSON, ``--build`` only :func:`build_line`.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(prog="apex-fast env", description="Versions, build and kernels of apex_fast.")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print JSON")
    shape.add_argument("--build", action="store_true", help="print only how it was built, in one line")
    options = parser.parse_args(list(arguments))
    if options.build:
        print(build_line())
    else:
        report = collect()
        print(json.dumps(report, indent=2) if options.json else format(report))
    return 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _optional_packages() -> dict[str, str]:
    """Package -> extra, as the installed metadata has them, so that the list is kept in pyproject.toml alone."""
    try:
        requirements = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # run from a source folder that is not installed
        return {}
    packages: dict[str, str] = {}
    for requirement in requirements:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if name and extra and extra[1] in _REPORTED_EXTRAS:
            packages.setdefault(name[0], extra[1])
    return packages


def _table(ops: dict[str, dict[str, str]]) -> list[str]:
    rows = [["Op", *DEVICES], *([op, *kernels.values()] for op, kernels in ops.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
