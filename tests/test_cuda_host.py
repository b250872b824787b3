"""The CUDA sources without a GPU: their index arithmetic, and the kernels themselves compiled for the host.

What is left to a GPU (test_cuda_ops.py): the compiler's machine code, races that taking turns hides, streams and
graphs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops_cases import OPS, SHIFTED_VELOCITY_LOSS_WITH_GRADIENTS
from row_ops import ROW_OPS

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
HOST = TESTS / "cuda_host"
if not (CSRC / "cuda").is_dir():
    pytest.skip("the tests of the CUDA sources need the source tree", allow_module_level=True)

FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


RELEASE = ("-O3", "-DNDEBUG", "-fno-math-errno", "-fno-trapping-math")


def compile_with_gxx(*arguments: str | Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    done = subprocess.run([compiler, *FLAGS, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_index_arithmetic(tmp_path: Path) -> None:
    """Every element in exactly one slot, sums through both stages, sizes beyond 2^31."""
    program = tmp_path / "index_arithmetic"
    compile_with_gxx("-O2", f"-I{CSRC}", HOST / "index_arithmetic.cpp", "-o", program)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    counts = dict(re.findall(r"(\w+) (\d+)", done.stdout))
    assert set(counts) == {"divisions", "slots", "chunks", "large", "rows", "row_chunks", "row_tasks"}
    assert all(int(count) > 50 for count in counts.values())


@pytest.fixture(scope="module")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulated")
    root = Path(torch.__path__[0])
    objects = []
    for source in sorted([*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cpp")]):
        target = folder / f"{source.name}.o"
        # the stand-ins before the sources, or the sources' own would be found first
        includes = (f"-I{HOST / 'include'}", f"-I{CSRC}", "-isystem", root / "include")
        # The glue as it ships: what reads memory that is gone can be right by luck without optimisation.
        flags = RELEASE if source.suffix == ".cpp" else ("-O1",)
        compile_with_gxx(*flags, "-fPIC", *includes, "-x", "c++", "-c", source, "-o", target)
        objects.append(target)
    library = folder / "emulated.so"
    libraries = (f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}")
    compile_with_gxx("-shared", "-o", library, *objects, *libraries)
    return library


@pytest.mark.slow
@pytest.mark.parametrize("op", [*OPS, SHIFTED_VELOCITY_LOSS_WITH_GRADIENTS, *ROW_OPS], ids=lambda op: op.name)
def test_the_kernels_pass_the_tests_of_their_op(op, emulated_library: Path) -> None:
    """The tests of the CPU kernels, in a process where the CUDA kernels, compiled for the host, take their place."""
    settings = {
        "APEX_FAST_KERNELS": "reference",
        "APEX_FAST_EMULATED_KERNELS": str(emulated_library),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HOST), str(TESTS), *filter(None, sys.path)]),
    }
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "emulated_kernels", "--tb=short"]
    done = subprocess.run(
        [sys.executable, *command, TESTS / f"test_{op.name}.py"],
        env=os.environ | settings,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50
