"""What the CUDA kernels take, as the compiler reports it: no spills, no stack frame, on every architecture.

Needs nvcc and no GPU. Compiles the kernels as ``make cuda-check`` does, in a fresh folder; a few minutes on two cores.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")

#: Kernel templates that must appear on each architecture: an empty report would pass otherwise.
KERNELS = (
    "map_kernel",
    "reduce_kernel",
    "finish_kernel",
    "condition_shift_kernel",
    "condition_shift_backward_kernel",
    "column_sums_kernel",
    "projected_condition_shift_kernel",
    "projected_condition_shift_backward_kernel",
    "row_kernelIfN",
    "row_kernelIdN",
)

#: Spills: gradients in fp64 of rows longer than a block holds, which no training computes.
SPILLS = ("row_kernel<double, RmsNormsBackward<double>, false>",)

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Kernel:
    architecture: str
    name: str
    registers: int
    stack: int
    spills: int


def parse(report: str) -> list[Kernel]:
    """The kernels in the output of ``ptxas -v``."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return [
        Kernel(
            found["architecture"],
            found["name"],
            int(found["registers"]),
            int(found["stack"]),
            int(found["stores"]) + int(found["loads"]),
        )
        for found in pattern.finditer(report)
    ]


def readable(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    shortened = (
        re.sub(r"apex_fast::|cuda::|\(anonymous namespace\)::|void |math::", "", n) for n in done.stdout.split("\n")
    )
    return [name.split("(")[0] for name in shortened]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    nvcc = shutil.which("nvcc") or os.environ.get("CUDACXX") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        pytest.skip("needs nvcc on PATH, in CUDACXX or in /usr/local/cuda")
    pybind11 = pytest.importorskip("pybind11", reason="needs the build tools: pip install -e '.[dev]'")
    cmake, ninja = (
        shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool) for tool in ("cmake", "ninja")
    )
    if not (cmake and ninja and (SOURCE / "CMakeLists.txt").is_file()):
        pytest.skip("needs the source tree, cmake and ninja")
    build = tmp_path_factory.mktemp("cuda-check")
    settings = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "APEX_FAST_CUDA": "check",
        "TORCH_ROOT": torch.__path__[0],
        "APEX_TORCH_VERSION": torch.__version__,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "Python_EXECUTABLE": sys.executable,
    }
    environment = os.environ | {"CUDACXX": nvcc}
    configure = [cmake, "-S", SOURCE, "-B", build, "-G", "Ninja", *(f"-D{k}={v}" for k, v in settings.items())]
    done = subprocess.run(configure, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = subprocess.run(
        [cmake, "--build", build, "--target", "apex_cuda_kernels", "apex_cuda_glue"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stdout[-4000:] + compiled.stderr[-4000:]
    return parse(compiled.stdout + compiled.stderr)


def test_every_kernel_is_compiled_for_every_architecture(kernels: list[Kernel]) -> None:
    by_architecture = {a: sorted(k.name for k in kernels if k.architecture == a) for a in ARCHITECTURES}
    assert {k.architecture for k in kernels} == set(ARCHITECTURES)
    assert len({tuple(names) for names in by_architecture.values()}) == 1
    for template in KERNELS:
        assert any(template in name for name in by_architecture["sm_90"]), template
    assert len(by_architecture["sm_90"]) >= 40


def test_no_kernel_spills_or_has_a_stack_frame(kernels: list[Kernel], record_property: pytest.RecordProperty) -> None:
    names = readable([k.name for k in kernels])
    lines = [f"{k.architecture} {k.registers:3d} {name}" for k, name in zip(kernels, names, strict=False)]
    record_property("registers", "\n".join(sorted(lines)))
    print("\n".join(sorted(lines)))  # shown by pytest -s
    guilty = [
        line
        for k, name, line in zip(kernels, names, lines, strict=False)
        if (k.stack or k.spills) and name not in SPILLS
    ]
    assert not guilty, "\n".join(guilty)


def test_three_blocks_of_a_kernel_in_fp32_fit_a_multiprocessor(kernels: list[Kernel]) -> None:
    """The kernels are bound by memory: with fewer threads too few loads are in flight."""
    # The type of the arithmetic is the first template argument, f in the mangled name.
    streaming = [
        k for k in kernels if re.search(r"(map|reduce)_kernelIf|\d+(projected_)?condition_shift_kernelIf", k.name)
    ]
    assert len(streaming) >= 15 * len(ARCHITECTURES)
    assert max(k.registers for k in streaming) <= 65536 // (3 * 256) // 8 * 8


def test_rows_that_are_held_leave_room_for_others(kernels: list[Kernel]) -> None:
    """Two blocks of a forward op share a multiprocessor at 3,072 channels, 384 threads; one of a backward op fits."""
    held = [k for k in kernels if re.search(r"row_kernelIf.*Lb1E", k.name)]
    forward, backward = ([k for k in held if ("Backward" in k.name) == wanted] for wanted in (False, True))
    assert len(forward) == len(backward) == 2 * len(ARCHITECTURES)
    assert max(k.registers for k in forward) <= 65536 // (2 * 384) // 8 * 8
    assert max(k.registers for k in backward) <= 65536 // 512


def test_the_report_is_understood() -> None:
    report = """
ptxas info    : Compiling entry function '_Z1fPf' for 'sm_90'
ptxas info    : Function properties for _Z1fPf
    8 bytes stack frame, 4 bytes spill stores, 2 bytes spill loads
ptxas info    : Used 48 registers, used 0 barriers
"""
    assert parse(report) == [Kernel("sm_90", "_Z1fPf", 48, 8, 6)]
