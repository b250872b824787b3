"""What a build needs and where it is: torch, a C++ compiler, Python headers, CMake, Ninja.

Used by the PEP 517 backend (apex_backend.py) and by setup.py. Torch is located, never imported: reading its version
file takes a fraction of a second and works where torch itself would not load.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Importable name -> requirement. Versions are the lowest that have what is used: SPDX licence names in pyproject.toml,
# `cmake --fresh`, FindPython support.
BUILD_TOOLS = {
    "setuptools": "setuptools>=77",
    "pybind11": "pybind11>=2.12",
    "ninja": "ninja>=1.10",
    "cmake": "cmake>=3.24",
}

# Runs in the interpreter that may have torch and prints one line of JSON after a marker.
_MARK = "apex_fast-torch:"
_PROBE = r"""
import importlib.metadata, importlib.util, json, os, sys
found = {"python": "%d.%d" % sys.version_info[:2], "torch": None}
try:
    spec = importlib.util.find_spec("torch")
except (ImportError, ValueError):
    spec = None
root = os.path.dirname(spec.origin) if spec and spec.origin else ""
version_file = os.path.join(root, "version.py")
if root and os.path.isfile(version_file):
    values = {}
    with open(version_file) as file:
        exec(file.read(), values)
    tools = {}
    for name in NAMES:
        try:
            tools[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    found.update(torch=str(values["__version__"]), cuda=values.get("cuda") or "", root=root, executable=sys.executable,
                 search_path=[path for path in sys.path if path and os.path.isdir(path)], tools=tools)
print(MARK + json.dumps(found))
"""


class BuildError(SystemExit):
    """Ends the build with an explanation on stderr and no traceback."""

    def __init__(self, problem: str, *remedy: str) -> None:
        bar = "-" * 100
        lines = [bar, f"apex_fast: {problem}", *(f"  {line}" for line in remedy), bar]
        super().__init__("\n".join(["", *lines]))


@dataclass(frozen=True)
class Torch:
    """The torch to build against.

    Attributes:
        version: for example ``2.13.0+cpu``.
        cuda: CUDA version it was built with, empty for a CPU build.
        root: folder of the package.
        executable: the Python that has it.
        search_path: ``sys.path`` of that Python.
        tools: versions of the build tools installed beside it.
    """

    version: str
    cuda: str
    root: str
    executable: str
    search_path: tuple[str, ...]
    tools: dict[str, str]

    @property
    def requirement(self) -> str:
        """Torch's C++ interface holds within one minor version, so that is what the built package asks for."""
        return f"torch=={'.'.join(self.version.split('+')[0].split('.')[:2])}.*"


def build_root() -> Path:
    """Where builds keep what the next one can use: ``APEX_FAST_BUILD_DIR``, else build/ in the source tree."""
    chosen = os.environ.get("APEX_FAST_BUILD_DIR")
    return Path(chosen).resolve() if chosen else Path(__file__).resolve().parents[1] / "build"


def _candidate_pythons() -> Iterator[tuple[str, str]]:
    """(executable, why) of interpreters that may have torch, the most certain first."""
    chosen = os.environ.get("APEX_FAST_PYTHON")
    if chosen:
        yield chosen, "APEX_FAST_PYTHON"
        return
    # pip's build isolation keeps the interpreter of the target environment and hides its packages through the
    # environment variables that are removed in find_torch.
    yield sys.executable, "this interpreter"
    if "PIP_BUILD_TRACKER" in os.environ:
        return  # pip: another environment's torch would be the wrong one
    # uv and `python -m build` run the hooks in an environment of their own.
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(variable):
            yield os.path.join(os.environ[variable], "bin", "python"), variable


@functools.cache
def find_torch() -> Torch:
    """The torch of the environment that is installed into.

    Raises:
        BuildError: there is none; the message lists where it was looked for and what to do.
    """
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME", "__PYVENV_LAUNCHER__")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    probe = _PROBE.replace("NAMES", repr(tuple(BUILD_TOOLS))).replace("MARK", repr(_MARK))
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    tried: dict[str, str] = {}
    for executable, why in _candidate_pythons():
        if executable in tried:
            continue
        try:
            run = subprocess.run([executable, "-c", probe], env=environment, cwd="/", capture_output=True, text=True)
        except OSError as error:
            tried[executable] = f"({why}) cannot be run: {error.strerror}"
            continue
        answers = [line.removeprefix(_MARK) for line in run.stdout.splitlines() if line.startswith(_MARK)]
        if not answers:
            tried[executable] = f"({why}) {(run.stderr.strip().splitlines() or ['gave no answer'])[-1]}"
            continue
        found = json.loads(answers[-1])
        if found.pop("python") != here:
            tried[executable] = f"({why}) is another Python than the {here} that builds"
        elif not found["torch"]:
            tried[executable] = f"({why}) has no torch"
        else:
            found["search_path"] = tuple(found["search_path"])
            return Torch(version=found.pop("torch"), **found)
    raise BuildError(
        "no torch was found, and the extension is built against the torch that is installed.",
        *(f"looked in {executable} {reason}" for executable, reason in tried.items()),
        "Mend it with",
        "  pip install torch==2.13.0",
        "and install apex_fast again. If another Python has torch, name it:",
        "  APEX_FAST_PYTHON=/path/to/python pip install .",
    )


def find_compiler() -> str:
    """The C++ compiler as CMake will be given it: ``CXX``, else g++ or c++ on PATH.

    Raises:
        BuildError: there is none, or ``CXX`` names a program that does not exist.
    """
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        if shutil.which(shlex.split(chosen)[0]):
            return chosen
        raise BuildError(f"CXX is {chosen!r} and there is no such program.", "Mend it with: unset CXX, or CXX=g++")
    for name in ("g++", "c++"):
        path = shutil.which(name)
        if path:
            return path
    raise BuildError(
        "there is no C++ compiler: neither g++ nor c++ is on PATH, and CXX is not set.",
        "Mend it with",
        "  sudo apt install g++            (Debian, Ubuntu)",
        "  sudo dnf install gcc-c++        (Fedora, RHEL)",
        "or name one: CXX=/path/to/g++ pip install .",
    )


def check_python_headers() -> None:
    """Raises:
    BuildError: Python.h is missing (Linux distributions ship it apart from Python itself).
    """
    folder = sysconfig.get_path("include")
    if not os.path.isfile(os.path.join(folder, "Python.h")):
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise BuildError(
            f"the C headers of Python {version} are missing: no Python.h in {folder}.",
            "Mend it with",
            f"  sudo apt install python{version}-dev       (Debian, Ubuntu)",
            f"  sudo dnf install python{version}-devel     (Fedora, RHEL)",
        )


def _numbers(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.split("+")[0].split("."):
        digits = "".join(ch for ch in part if ch.isdigit())
        if not digits or digits != part:
            break
        parts.append(int(digits))
    return tuple(parts)


def missing_tools(installed: dict[str, str]) -> list[str]:
    """Requirements in BUILD_TOOLS that the installed versions do not meet."""
    missing = []
    for name, requirement in BUILD_TOOLS.items():
        lowest = requirement.partition(">=")[2]
        if name not in installed or _numbers(installed[name]) < _numbers(lowest):
            missing.append(requirement)
    return missing


def find_tool(name: str) -> str:
    """Path of a cmake or ninja that runs.

    The binary inside the Python package comes first. What an environment has in bin/cmake is a Python script that
    imports the package, and pip's build isolation hides that package from it: it would be found and fail.

    Raises:
        BuildError: there is none.
    """
    try:
        package = importlib.import_module(name)
    except ImportError:
        package = None
    folders = [getattr(package, "CMAKE_BIN_DIR", None), getattr(package, "BIN_DIR", None)]
    for folder in [*filter(None, folders), *os.environ.get("PATH", "").split(os.pathsep)]:
        path = os.path.join(folder, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            if subprocess.run([path, "--version"], capture_output=True).returncode == 0:
                return path
    raise BuildError(f"no {name} that runs was found.", f"Mend it with: pip install '{BUILD_TOOLS[name]}'")


def check_environment() -> Torch:
    """Everything that cannot be fetched by the build itself, checked before anything is downloaded or compiled."""
    torch = find_torch()
    find_compiler()
    check_python_headers()
    return torch
