"""What the tests of the build share: environments that lack something, and the sources as they are published."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

SOURCE = Path(__file__).resolve().parents[1]
BACKEND = SOURCE / "build_backend"
TORCH = os.environ.get("APEX_TEST_TORCH") or f"torch=={torch.__version__.split('+')[0]}"

# Settings of whoever runs the tests that would change what a build finds.
SETTINGS = (
    "APEX_FAST_PYTHON",
    "PIP_BUILD_TRACKER",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "CXX",
    "APEX_FAST_BUILD_DIR",
    "APEX_FAST_CUDA",
    "APEX_FAST_CUDA_ARCHS",
    "APEX_FAST_LOCAL_CUDA",
    "CUDACXX",
    "CUDA_HOME",
    "CUDA_PATH",
)

# What g++, pip and make call; nothing that builds comes from here but the compiler.
COMPILER = ("g++", "gcc", "as", "ld", "ar", "ranlib", "nm", "strip", "objdump", "sh", "uname")


def import_backend(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A module of build_backend, where no setting names a torch or a compiler."""
    monkeypatch.syspath_prepend(str(BACKEND))
    importlib.import_module("apex_toolchain").find_torch.cache_clear()
    for variable in SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    return importlib.import_module(name)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would tell a child about this interpreter's packages."""
    hidden = ("PYTHONPATH", *SETTINGS)
    return {**{key: value for key, value in os.environ.items() if key not in hidden}, **changes}


def only_programs(folder: Path, *names: str) -> str:
    """A folder for PATH that has these programs and no others."""
    folder.mkdir()
    for name in names:
        target = shutil.which(name)
        if target:
            (folder / name).symlink_to(target)
    return str(folder)


def unpacked_sdist(folder: Path) -> Path:
    """The unpacked sdist: what is built from it is built from what is published, not from this folder."""
    tree = folder / "tree"
    ignore = shutil.ignore_patterns("build", "dist", "runs", ".*", "*.so", "__pycache__", "*.egg-info")
    shutil.copytree(SOURCE, tree, ignore=ignore)
    shutil.copy(SOURCE / ".clang-format", tree)
    code = f"import apex_backend; print(apex_backend.build_sdist({str(folder)!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=clean_environment(PYTHONPATH=str(BACKEND)),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    archive = folder / run.stdout.split()[-1]
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    return next((folder / "unpacked").iterdir())


class Environment:
    """A fresh virtual environment whose PATH has neither cmake nor ninja."""

    def __init__(self, folder: Path, programs: tuple[str, ...]) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self.python = folder / "venv" / "bin" / "python"
        self.path = only_programs(folder / "bin", *programs)
        self.outside = folder / "elsewhere"
        self.outside.mkdir()

    def run(
        self, *arguments: str | Path, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, *arguments],
            cwd=cwd or self.outside,
            env=clean_environment(**{"PATH": self.path, **environment}),
            capture_output=True,
            text=True,
        )

    def pip(self, *arguments: str | Path, **options: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "pip", "--disable-pip-version-check", *arguments, **options)

    def must(self, *arguments: str | Path, **options: str) -> str:
        run = self.pip(*arguments, **options)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    def installed(self) -> dict[str, str]:
        lines = self.must("list", "--format=freeze").split()
        return dict(line.split("==") for line in lines if "==" in line)

    def check_works(self) -> None:
        code = (
            "import torch, apex_fast; x = torch.ones(2, 3); t = torch.tensor([0.25, 1.0]);"
            "print(torch.ops.apex_fast.interpolate(x, 3 * x, t).tolist())"
        )
        run = self.run("-c", code)
        assert run.stdout.strip() == "[[1.5, 1.5, 1.5], [3.0, 3.0, 3.0]]", run.stderr
