"""The build: what it finds, what it decides and what it says when something is missing.

The tests marked ``slow`` install the package for real: `make test-slow`, or `pytest -m slow tests/test_build.py`. They
make fresh virtual environments, fetch torch (``APEX_TEST_TORCH``, default the version that runs the tests) and the
build tools through pip, and need g++. About ten minutes on two cores; with nvcc the CUDA sources are compiled too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from build_environments import (
    BACKEND,
    COMPILER,
    SOURCE,
    TORCH,
    Environment,
    clean_environment,
    import_backend,
    only_programs,
    script,
    unpacked_sdist,
)

if not BACKEND.is_dir():
    pytest.skip("the tests of the build need the source tree", allow_module_level=True)

IMMEDIATE = 2.0  # seconds in which a build that cannot work must have said so


@pytest.fixture
def toolchain(monkeypatch):
    return import_backend(monkeypatch, "apex_toolchain")


def run_hook(python: str | Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The backend's first hook, as a front end calls it, and how long it took."""
    start = time.perf_counter()
    run = subprocess.run(
        [python, "-c", "import apex_backend; print(apex_backend.get_requires_for_build_wheel())"],
        env=clean_environment(PYTHONPATH=str(BACKEND), **environment),
        cwd="/",
        capture_output=True,
        text=True,
    )
    return run, time.perf_counter() - start


# ---- torch


def test_the_torch_of_this_environment_is_found_and_not_imported(toolchain):
    found = toolchain.find_torch()
    assert found.version == torch.__version__
    assert found.cuda == (torch.version.cuda or "")
    assert Path(found.root) == Path(torch.__file__).parent
    assert found.executable == sys.executable


@pytest.mark.parametrize(
    ("version", "requirement"),
    [("2.13.0+cpu", "torch==2.13.*"), ("2.11.0", "torch==2.11.*"), ("2.14.0a0+gitabc", "torch==2.14.*")],
)
def test_the_requirement_is_one_minor_version(toolchain, version, requirement):
    assert toolchain.Torch(version, "", "", "", (), {}).requirement == requirement


def test_missing_torch_is_said_at_once_with_the_mend(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = tmp_path / "bare" / "bin" / "python"
    run, seconds = run_hook(python)
    assert run.returncode == 1
    assert "no torch was found" in run.stderr
    assert f"looked in {python} (this interpreter) has no torch" in run.stderr
    assert "pip install torch==" in run.stderr
    assert "APEX_FAST_PYTHON=" in run.stderr
    assert "Traceback" not in run.stderr
    assert seconds < IMMEDIATE


def test_a_named_python_is_the_only_one_looked_at(toolchain, monkeypatch, tmp_path):
    monkeypatch.setenv("APEX_FAST_PYTHON", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit, match=r"nothing \(APEX_FAST_PYTHON\) cannot be run: No such file"):
        toolchain.find_torch()


def test_a_named_python_of_another_version_is_refused(toolchain, monkeypatch, tmp_path):
    other = script(tmp_path / "python", """echo 'apex_fast-torch:{"python": "3.99", "torch": "2.13.0"}'""")
    monkeypatch.setenv("APEX_FAST_PYTHON", str(other))
    with pytest.raises(SystemExit, match="is another Python than the"):
        toolchain.find_torch()


def test_a_python_that_fails_is_quoted(toolchain, monkeypatch, tmp_path):
    broken = script(tmp_path / "python", "echo 'cannot start: no shared library' >&2; exit 1")
    monkeypatch.setenv("APEX_FAST_PYTHON", str(broken))
    with pytest.raises(SystemExit, match="cannot start: no shared library"):
        toolchain.find_torch()


def test_under_pip_no_other_environment_is_considered(toolchain, monkeypatch):
    monkeypatch.setenv("VIRTUAL_ENV", "/somewhere")
    assert [why for _, why in toolchain._candidate_pythons()] == ["this interpreter", "VIRTUAL_ENV"]
    monkeypatch.setenv("PIP_BUILD_TRACKER", "/tracker")
    assert [why for _, why in toolchain._candidate_pythons()] == ["this interpreter"]


# ---- compiler and headers


def test_missing_compiler_is_said_at_once_with_the_mend(tmp_path):
    run, seconds = run_hook(sys.executable, PATH=only_programs(tmp_path / "bin"))
    assert run.returncode == 1
    assert "there is no C++ compiler: neither g++ nor c++ is on PATH, and CXX is not set" in run.stderr
    assert "sudo apt install g++" in run.stderr
    assert "Traceback" not in run.stderr
    assert seconds < IMMEDIATE


def test_a_compiler_named_in_cxx_is_taken_with_its_arguments(toolchain, monkeypatch, tmp_path):
    script(tmp_path / "my-g++", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "my-g++ -m64")
    assert toolchain.find_compiler() == "my-g++ -m64"


def test_cxx_that_names_nothing_is_an_error(toolchain, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="CXX is 'no-such-compiler' and there is no such program"):
        toolchain.find_compiler()


def test_gxx_is_preferred_to_cxx_on_path(toolchain, monkeypatch, tmp_path):
    for name in ("c++", "g++"):
        script(tmp_path / name, "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.find_compiler() == str(tmp_path / "g++")


def test_missing_python_headers_are_said_with_the_mend(toolchain, monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match=r"no Python.h in") as caught:
        toolchain.check_python_headers()
    assert f"sudo apt install python3.{sys.version_info[1]}-dev" in str(caught.value)


# ---- build tools


def test_tools_that_are_absent_or_too_old_are_asked_for(toolchain):
    good = {"setuptools": "84.2.1", "pybind11": "3.1.0", "cmake": "4.4.4", "ninja": "1.13.2"}
    assert toolchain.missing_tools(good) == []
    assert toolchain.missing_tools({**good, "setuptools": "65.5.0"}) == ["setuptools>=77"]
    assert toolchain.missing_tools({**good, "cmake": "3.9.6"}) == ["cmake>=3.24"]
    assert toolchain.missing_tools({**good, "cmake": "3.24.0.post1"}) == []
    assert toolchain.missing_tools({}) == list(toolchain.BUILD_TOOLS.values())


def test_a_tool_inside_its_package_comes_before_a_script_on_path(toolchain, monkeypatch, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    inside = script(package / "cmake", "exit 0")
    monkeypatch.setitem(sys.modules, "cmake", SimpleNamespace(CMAKE_BIN_DIR=str(package)))
    other = tmp_path / "path"
    other.mkdir()
    script(other / "cmake", "exit 0")
    monkeypatch.setenv("PATH", str(other))
    assert toolchain.find_tool("cmake") == str(inside)


def test_a_tool_that_does_not_run_is_passed_over(toolchain, monkeypatch, tmp_path):
    # What an environment's bin/cmake is under build isolation: a script whose import fails.
    monkeypatch.setitem(sys.modules, "cmake", None)
    for name, text in (("first", "exit 1"), ("second", "exit 0")):
        (tmp_path / name).mkdir()
        script(tmp_path / name / "cmake", text)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "first"), str(tmp_path / "second")]))
    assert toolchain.find_tool("cmake") == str(tmp_path / "second" / "cmake")
    monkeypatch.setenv("PATH", str(tmp_path / "first"))
    with pytest.raises(SystemExit, match="no cmake that runs was found") as caught:
        toolchain.find_tool("cmake")
    assert "pip install 'cmake>=3.24'" in str(caught.value)


# ---- the decision about CUDA


@pytest.fixture
def decide(toolchain, tmp_path):
    """Runs cmake/cuda_decision.cmake alone; returns its exit status and its words on one line."""
    try:
        cmake = toolchain.find_tool("cmake")
    except SystemExit:
        pytest.skip("needs cmake")

    def decide(setting: str, torch_cuda: str, nvcc: str | None, archs: str = "") -> tuple[int, str]:
        compiler = tmp_path / "nvcc"
        if nvcc:
            script(compiler, f"echo 'Cuda compilation tools, release {nvcc}, V{nvcc}.1'")
        run = subprocess.run(
            [
                cmake,
                f"-DAPEX_FAST_CUDA={setting}",
                "-DAPEX_TORCH_VERSION=2.13.0",
                f"-DAPEX_TORCH_CUDA_VERSION={torch_cuda}",
                f"-DAPEX_FAST_CUDA_ARCHS={archs}",
                "-P",
                SOURCE / "cmake" / "cuda_decision.cmake",
            ],
            # A compiler that is named and does not run stands for a machine without one.
            env=clean_environment(CUDACXX=str(compiler)),
            capture_output=True,
            text=True,
        )
        return run.returncode, " ".join((run.stdout + run.stderr).split())

    return decide


@pytest.mark.parametrize(
    ("setting", "torch_cuda", "nvcc", "decision"),
    [
        ("auto", "13.0", "13.0", "on: nvcc 13.0, architectures 80-real, 90-real, 100-real, 120"),
        ("AUTO", "12.8", "12.9", "on: nvcc 12.9, architectures 80-real, 90-real, 100-real, 120"),
        ("auto", "12.6", "12.6", "on: nvcc 12.6, architectures 80-real, 90"),
        ("auto", "", "13.0", "off: torch 2.13.0 has no CUDA"),
        ("auto", "13.0", None, "off: no nvcc on PATH, in CUDA_HOME or CUDACXX"),
        ("auto", "12.8", "13.0", "off: torch is built for CUDA 12.8 and"),
        ("On", "13.0", "13.1", "on: nvcc 13.1"),
        ("off", "13.0", "13.0", "off: APEX_FAST_CUDA=off"),
        ("check", "", "13.0", "compiled and not linked (check): nvcc 13.0"),
        ("check", "12.8", "13.0", "compiled and not linked (check): nvcc 13.0"),
    ],
)
def test_cuda_decision(decide, setting, torch_cuda, nvcc, decision):
    status, words = decide(setting, torch_cuda, nvcc)
    assert status == 0
    assert f"apex_fast: torch 2.13.0, CUDA kernels {decision}" in words


@pytest.mark.parametrize(
    ("setting", "torch_cuda", "nvcc", "reason"),
    [
        ("on", "", "13.0", "APEX_FAST_CUDA=on, but torch 2.13.0 has no CUDA. Install a torch with CUDA"),
        (
            "ON",
            "13.0",
            None,
            "APEX_FAST_CUDA=on, but no nvcc on PATH, in CUDA_HOME or CUDACXX. Install the CUDA toolkit",
        ),
        ("on", "12.8", "13.0", "is 13.0. The major versions must agree: install the CUDA toolkit 12"),
        ("check", "", None, "APEX_FAST_CUDA=check, but no nvcc"),
        ("yes", "13.0", "13.0", "APEX_FAST_CUDA is 'yes': expected auto, on, off or check."),
        ("", "13.0", "13.0", "APEX_FAST_CUDA is '': expected auto, on, off or check."),
    ],
)
def test_cuda_decision_that_cannot_be_met_stops_the_build(decide, setting, torch_cuda, nvcc, reason):
    status, words = decide(setting, torch_cuda, nvcc)
    assert status == 1
    assert reason in words


def test_cuda_architectures_can_be_named(decide):
    assert decide("auto", "13.0", "13.0", archs="90-real")[1].endswith("on: nvcc 13.0, architectures 90-real")


# ---- make


def make_setup(tmp_path: Path, python: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`make setup` with a Python of the test's making, up to the point where something would be created."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("needs make")
    variables = (f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    run = subprocess.run(
        [make, "setup", *variables], cwd=SOURCE, env=clean_environment(**environment), capture_output=True, text=True
    )
    assert run.returncode != 0
    assert not (tmp_path / "venv").exists()
    return run


def test_make_says_that_python_is_too_old(tmp_path):
    old = script(tmp_path / "python", 'case "$1" in --version) echo Python 3.9.2;; *) exit 1;; esac')
    assert f"needs Python 3.11 or newer and {old} is Python 3.9.2" in make_setup(tmp_path, old).stdout


def test_make_says_that_python_cannot_make_environments(tmp_path):
    bare = script(tmp_path / "python", f'case "$2" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac')
    assert "sudo apt install python3-venv" in make_setup(tmp_path, bare).stdout


def test_make_looks_for_a_compiler_before_it_fetches_anything(tmp_path):
    assert "there is no such program" in make_setup(tmp_path, Path(sys.executable), CXX="no-such-compiler").stderr


# ---- installing for real


DATA = (".py", ".safetensors", ".json", ".yaml")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return unpacked_sdist(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("environment"), COMPILER)
    environment.must("install", TORCH, "numpy", "safetensors")
    return environment


@pytest.mark.slow
def test_sdist_has_every_source_and_nothing_built(source):
    there = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    tracked = [
        path.relative_to(SOURCE)
        for folder in ("csrc", "cmake", "build_backend", "apex_fast", "tests")
        for path in (SOURCE / folder).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    ]
    assert len(tracked) > 50
    assert {str(path) for path in tracked} <= there
    assert {"LICENSE", "Makefile", "CMakeLists.txt", "pyproject.toml", "setup.py", "README.md"} <= there
    assert not [path for path in there if path.endswith((".so", ".pyc"))]
    # For any torch that was tried: the pin belongs to what is built.
    assert "Requires-Dist: torch>=2.11" in (source / "PKG-INFO").read_text()


@pytest.mark.slow
def test_install_with_isolation_uses_the_torch_that_is_there(environment, source):
    before = environment.installed()["torch"]
    assert shutil.which("cmake", path=environment.path) is None
    environment.must("install", "--no-deps", source)
    assert environment.installed()["torch"] == before
    environment.check_works()
    package = Path(environment.run("-c", "import apex_fast; print(apex_fast.__path__[0])").stdout.strip())
    files = [path.relative_to(source) for path in (source / "apex_fast").rglob("*") if path.suffix in DATA]
    assert files and all((package.parent / file).is_file() for file in files)
    pins = environment.run("-c", "import importlib.metadata as m; print(m.requires('apex_fast'))").stdout
    assert f"'torch=={'.'.join(before.split('.')[:2])}.*'" in pins
    assert environment.pip("check").returncode == 0


@pytest.mark.slow
def test_install_without_isolation_says_which_tools_are_missing_and_then_works(environment, source):
    refused = environment.pip("install", "--no-deps", "--no-build-isolation", "--force-reinstall", source)
    assert refused.returncode != 0
    assert "build tools are missing or too old: " in refused.stderr
    assert all(f"'{tool}" in refused.stderr for tool in ("pybind11>=", "cmake>=", "ninja>="))
    assert "or leave out --no-build-isolation" in refused.stderr
    environment.must("install", "setuptools>=77", "pybind11>=2.12", "cmake>=3.24", "ninja>=1.10")
    environment.must("install", "--no-deps", "--no-build-isolation", "--force-reinstall", source)
    environment.check_works()


@pytest.mark.slow
def test_install_with_isolation_needs_no_index_where_the_tools_are_there(environment, source):
    arguments = ("install", "--no-deps", "--no-index", "--force-reinstall", source)
    start = time.perf_counter()
    environment.must(*arguments)
    # The build folder in the sources was kept: nothing is compiled a second time.
    assert time.perf_counter() - start < 60
    environment.check_works()


@pytest.mark.slow
def test_a_module_that_is_gone_does_not_stay_in_the_wheel(environment, source):
    stale = source / "apex_fast" / "gone_tomorrow.py"
    stale.touch()
    environment.must("install", "--no-deps", "--force-reinstall", source)
    stale.unlink()
    assert environment.run("-c", "import apex_fast.gone_tomorrow").returncode == 0
    environment.must("install", "--no-deps", "--force-reinstall", source)
    assert environment.run("-c", "import apex_fast.gone_tomorrow").returncode != 0


@pytest.mark.slow
def test_editable_install_works(environment, source):
    environment.must("install", "--no-deps", "--editable", source)
    assert str(source) in environment.run("-c", "import apex_fast; print(apex_fast.__file__)").stdout
    environment.check_works()


@pytest.mark.slow
def test_a_failing_compilation_ends_with_a_remedy(environment, source):
    run = environment.pip("install", "--no-deps", source, APEX_FAST_CUDA="perhaps")
    assert run.returncode != 0
    assert "APEX_FAST_CUDA is 'perhaps'" in run.stderr
    assert "configuring failed" in run.stderr


@pytest.mark.slow
def test_cuda_sources_compile_without_a_gpu(environment, source):
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        pytest.skip("needs nvcc")
    environment.must("install", "--no-deps", "--force-reinstall", source, APEX_FAST_CUDA="Check", CUDACXX=nvcc)
    facts = environment.run("-m", "apex_fast.info", "--build").stdout
    assert "CUDA kernels compiled and not linked (check): nvcc" in facts
    environment.check_works()


@pytest.mark.slow
def test_install_without_torch_stops_at_once(tmp_path, source):
    bare = Environment(tmp_path, COMPILER)
    start = time.perf_counter()
    run = bare.pip("install", source)
    seconds = time.perf_counter() - start
    assert run.returncode != 0
    assert "no torch was found" in run.stderr
    assert "pip install torch==" in run.stderr
    # pip's own start is in here too.
    assert seconds < IMMEDIATE + 3


@pytest.mark.slow
def test_install_without_a_compiler_stops_at_once(environment, source, tmp_path):
    start = time.perf_counter()
    run = environment.pip("install", "--no-deps", source, PATH=only_programs(tmp_path / "bin"))
    seconds = time.perf_counter() - start
    assert run.returncode != 0
    assert "there is no C++ compiler" in run.stderr
    assert seconds < IMMEDIATE + 3
