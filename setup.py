"""Builds the extension with CMake and Ninja against the installed torch. Metadata: pyproject.toml.

Settings are environment variables:

    APEX_FAST_CUDA        auto (default), on, off, check: see cmake/cuda.cmake
    APEX_FAST_CUDA_ARCHS  CMake architectures, for example "90-real" or "80-real;90-real;100"
    APEX_FAST_PYTHON      the Python whose torch is built against, if it is not the one that installs
    APEX_FAST_BUILD_DIR   where to build; the default keeps build/ in the source tree, so that a second run is quick
    MAX_JOBS              parallel compile jobs, default: the number of cores
    CXX, CMAKE_ARGS       as CMake users know them
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

SOURCE = Path(__file__).parent.resolve()
sys.path.insert(0, str(SOURCE / "build_backend"))
import apex_nvcc  # noqa: E402
import apex_toolchain  # noqa: E402


class FreshPackage(build_py):
    """Copies the package anew: build/ is kept, and a module that was renamed since must not stay in the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "apex_fast", ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """One CMake build makes both extensions: the op library _C and the pybind11 module _build."""

    _built = False

    def get_ext_filename(self, fullname: str) -> str:
        # Loaded by torch, not imported by Python: it has no PyInit function and no Python version in its name.
        if fullname.endswith("._C"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        if self._built:
            return
        self._built = True
        import pybind11

        torch = apex_toolchain.check_environment()
        package = Path(self.get_ext_fullpath("apex_fast._build")).resolve().parent
        build = self._build_folder(torch)
        cmake = apex_toolchain.find_tool("cmake")
        nvcc = apex_nvcc.packaged_nvcc(torch)
        missing = [] if nvcc else apex_nvcc.missing_packages(torch)
        definitions = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": apex_toolchain.find_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_ROOT": torch.root,
            "APEX_TORCH_VERSION": torch.version,
            "APEX_TORCH_CUDA_VERSION": torch.cuda,
            # Empty values too: an earlier build in the same folder may have cached others.
            "APEX_FAST_CUDA": os.environ.get("APEX_FAST_CUDA") or "auto",
            "APEX_FAST_CUDA_ARCHS": os.environ.get("APEX_FAST_CUDA_ARCHS", ""),
            "APEX_FAST_NVCC": nvcc or "",
            "APEX_NVCC_COMMAND": apex_nvcc.pip_command(missing),
        }
        configure = [cmake, "-S", SOURCE, "-B", build, "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in definitions.items()]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        with (build / "lock").open("w") as lock:
            # Installs that run at once share the folder, and the second one would pull it from under the first.
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._run("configuring", [*configure, *self._fresh(build, torch, str(nvcc or apex_nvcc.machine_nvcc()))])
            self._run("compiling", [cmake, "--build", build, "--parallel", jobs])
            self._run("copying the libraries", [cmake, "--install", build, "--prefix", package.parent])

    def _build_folder(self, torch: apex_toolchain.Torch) -> Path:
        # Not build_temp: an editable install makes that a temporary folder, and every build would start anew.
        name = f"{sys.implementation.cache_tag}-torch-{torch.version.replace('+', '-')}{'-debug' if self.debug else ''}"
        root = apex_toolchain.build_root()
        folder = root if os.environ.get("APEX_FAST_BUILD_DIR") else root / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _fresh(self, build: Path, torch: apex_toolchain.Torch, nvcc: str) -> list[str]:
        """CMake refuses, or half follows, a change of these in a folder that it has configured before."""
        signature = {"source": str(SOURCE), "compiler": apex_toolchain.find_compiler()}
        if nvcc and apex_nvcc.wanted_cuda(torch):
            signature["nvcc"] = nvcc
        file = build / "apex_signature.json"
        before = json.loads(file.read_text()) if file.is_file() else {}
        # A build without CUDA names no nvcc, and CMake remembers the one from before it.
        file.write_text(json.dumps({**before, **signature}))
        same = all(before.get(key, value) == value for key, value in signature.items())
        return [] if before and same else ["--fresh"]

    def _run(self, what: str, command: list[str | Path]) -> None:
        environment = {**os.environ, "CXX": apex_toolchain.find_compiler()}
        code = subprocess.run([str(part) for part in command], env=environment).returncode
        if code:
            raise apex_toolchain.BuildError(
                f"{what} failed (exit status {code}); the reason is in the lines above.",
                "If it is about CUDA and the CPU kernels will do: APEX_FAST_CUDA=off pip install .",
            )


def requirements() -> list[str]:
    """Core dependencies. An sdist is for any torch; what is built from it only for the torch it was built against."""
    torch = "torch>=2.11" if "sdist" in sys.argv else apex_toolchain.find_torch().requirement
    return [torch, "safetensors", "numpy"]


setup(
    ext_modules=[Extension("apex_fast._C", []), Extension("apex_fast._build", [])],
    cmdclass={"build_py": FreshPackage, "build_ext": CMakeBuild},
    install_requires=requirements(),
)
