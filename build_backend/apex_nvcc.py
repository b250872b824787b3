"""The nvcc that compiles the CUDA kernels, on machines that have torch with CUDA and no CUDA toolkit.

The machine's own nvcc is taken where it fits. Where there is none, the one in NVIDIA's Python packages serves:

1. ``requirements`` (the backend's first hook) adds those packages to what the front end fetches for the build, in the
   versions of torch's CUDA. Without build isolation nothing is fetched, and they are used if they are installed.
2. ``packaged_nvcc`` (setup.py) copies the compiler, its headers and the CUDA runtime from there to
   ``build/nvcc-<version>`` in the layout of a toolkit, which the packages lack in two links: ``lib64`` and
   ``libcudart.so``. A copy, since nvcc looks for the rest beside its own file, the packages are not to be changed, and
   with build isolation they are in a temporary folder: the next build finds the copy, fetches nothing and recompiles
   nothing.
3. CMake gets its path as ``APEX_FAST_NVCC`` and decides as with any other nvcc (cmake/cuda_decision.cmake).
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import apex_toolchain
from apex_toolchain import Torch

# What a compile check takes, for which torch need not have CUDA.
CHECK_CUDA = "13.0"


def packages(cuda: str) -> list[str]:
    """Requirements that together are an nvcc of this CUDA version.

    Args:
        cuda: for example ``13.0``.

    Returns:
        All of them pinned, as nvcc itself asks for the rest in any version; empty if there is no such nvcc: the
        packages of CUDA 12 hold its assembler without its compiler.
    """
    major, _, minor = cuda.partition(".")
    if major != "13" or not minor.isdigit():
        return []
    # From CUDA 13.3 on the third number of nvidia-cuda-cccl is that library's own, and the first two stay.
    headers = f"13.{min(int(minor), 3)}"
    names = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime")
    return [*(f"{name}==13.{minor}.*" for name in names), f"nvidia-cuda-cccl=={headers}.*"]


def pip_command(requirements: list[str]) -> str:
    """The command that installs them, for a shell; empty if there are none."""
    return " ".join(["pip install", *(f"'{requirement}'" for requirement in requirements)]) if requirements else ""


def _mode() -> str:
    return (os.environ.get("APEX_FAST_CUDA") or "auto").lower()


def wanted_cuda(torch: Torch) -> str:
    """The CUDA version to compile for, empty if ``APEX_FAST_CUDA`` and torch say that nothing is compiled."""
    # A value that is none of these is refused by CMake.
    return {"auto": torch.cuda, "on": torch.cuda, "check": torch.cuda or CHECK_CUDA}.get(_mode(), "")


def machine_nvcc() -> str:
    """Path of the nvcc that apex_find_nvcc in cmake/cuda_decision.cmake finds, empty if there is none."""
    chosen = os.environ.get("CUDACXX")
    if chosen:
        return chosen
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    local = os.environ.get("APEX_FAST_LOCAL_CUDA") or "/usr/local/cuda"
    folders = [*(f"{home}/bin" for home in homes if home), *os.environ.get("PATH", "").split(os.pathsep)]
    return shutil.which("nvcc", path=os.pathsep.join([*filter(None, folders), f"{local}/bin"])) or ""


def release(nvcc: str | Path) -> str:
    """Version of a compiler, for example ``13.0.88``; empty if it does not run."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return ""
    found = re.search(r"release [0-9.]+, V([0-9.]+)", text)
    return found[1] if found else ""


def _machine_serves(cuda: str) -> bool:
    if os.environ.get("CUDACXX"):
        return True  # The user's choice. CMake says so if it does not fit; another one is not put in its place.
    nvcc = machine_nvcc()
    version = release(nvcc) if nvcc else ""
    return bool(version) and (_mode() == "check" or version.split(".")[0] == cuda.split(".")[0])


def _kept(cuda: str) -> Path | None:
    """The copy of an earlier build."""
    found = sorted(apex_toolchain.build_root().glob(f"nvcc-{cuda}.*/bin/nvcc"))
    return found[-1] if found else None


def _installed(cuda: str, search_path: Iterable[str]) -> Path | None:
    """The folder of a search path with all of the packages, in versions that fit each other."""
    for folder in search_path:
        fitting = [
            requirement
            for requirement in packages(cuda)
            for name, _, version in [requirement.partition("==")]
            for found in importlib.metadata.distributions(name=name, path=[folder])
            if found.version.startswith(version.removesuffix("*"))
        ]
        if fitting and set(fitting) == set(packages(cuda)):
            return Path(folder, "nvidia", f"cu{cuda.split('.')[0]}")
    return None


def missing_packages(torch: Torch) -> list[str]:
    """The packages that a build would use and that are not there.

    None where an nvcc that fits is on the machine, kept by an earlier build or installed beside torch, none where
    nothing is compiled with it, and none for a CUDA version that has no such packages.
    """
    cuda = wanted_cuda(torch)
    if not packages(cuda) or _machine_serves(cuda) or _kept(cuda) or _installed(cuda, torch.search_path):
        return []
    return packages(cuda)


def requirements(torch: Torch) -> list[str]:
    """What the front end is to fetch: ``missing_packages``, and a line on stderr about them."""
    missing = missing_packages(torch)
    if missing:
        print(
            f"apex_fast: no nvcc of CUDA {wanted_cuda(torch)} was found, so it is fetched for this build (100 MB)."
            " APEX_FAST_CUDA=off builds for the CPU alone.",
            file=sys.stderr,
        )
    return missing


def packaged_nvcc(torch: Torch) -> Path | None:
    """The nvcc of the packages, kept from an earlier build or copied from where ``sys.path`` has them.

    Returns:
        None where it is not needed and where it is not there; CMake tells the one from the other.

    Raises:
        BuildError: the packages are there and their nvcc does not run.
    """
    cuda = wanted_cuda(torch)
    if not packages(cuda) or _machine_serves(cuda):
        return None
    kept = _kept(cuda)
    if kept:
        return kept
    root = _installed(cuda, sys.path)
    return _keep(root) / "bin" / "nvcc" if root else None


def _keep(root: Path) -> Path:
    """Copies what compiling and linking take, in the layout of a toolkit."""
    version = release(root / "bin" / "nvcc")
    if not version:
        raise apex_toolchain.BuildError(
            f"the package nvidia-cuda-nvcc is there and {root / 'bin' / 'nvcc'} does not run.",
            "Install it again, or name another compiler: CUDACXX=/path/to/nvcc pip install .",
        )
    destination = apex_toolchain.build_root() / f"nvcc-{version}"
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when it is complete: a folder of that name is one that can be used.
    with tempfile.TemporaryDirectory(prefix="nvcc-", dir=destination.parent) as scratch:
        tree = Path(scratch) / "toolkit"
        for folder in ("bin", "include", "nvvm/bin", "nvvm/libdevice"):
            shutil.copytree(root / folder, tree / folder)
        (tree / "lib").mkdir()
        for library in [*root.glob("lib/libcudart*"), *root.glob("lib/libcudadevrt*")]:
            shutil.copy(library, tree / "lib")
        (tree / "lib64").symlink_to("lib")
        if not (tree / "lib" / "libcudart.so").exists():
            (tree / "lib" / "libcudart.so").symlink_to(f"libcudart.so.{version.split('.')[0]}")
        try:
            tree.rename(destination)
        except OSError:
            if not destination.is_dir():  # else another install was quicker
                raise
    return destination
