"""The build on machines that have torch with CUDA and no CUDA toolkit: which nvcc is taken, fetched, kept.

The tests marked ``slow`` compile and link the CUDA sources with the nvcc of the package index while the machine's own
is hidden: `pytest -m slow tests/test_build_nvcc.py`, four to five minutes on two cores, no GPU. They need g++ and fetch
torch (``APEX_TEST_TORCH``), the build tools and 100 MB of nvcc through pip.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
from build_environments import (
    BACKEND,
    COMPILER,
    SOURCE,
    TORCH,
    Environment,
    import_backend,
    script,
    unpacked_sdist,
)

if not BACKEND.is_dir():
    pytest.skip("the tests of the build need the source tree", allow_module_level=True)

CUDA_13_0 = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
]


def fake_nvcc(path: Path, version: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return script(path, f"echo 'Cuda compilation tools, release {version.rpartition('.')[0]}, V{version}'")


@pytest.fixture
def nvcc(monkeypatch, tmp_path) -> ModuleType:
    """apex_nvcc on a machine on which there is none: nothing on PATH, an empty /usr/local/cuda, a first build."""
    module = import_backend(monkeypatch, "apex_nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("APEX_FAST_LOCAL_CUDA", str(tmp_path / "local"))
    monkeypatch.setenv("APEX_FAST_BUILD_DIR", str(tmp_path / "build"))
    return module


@pytest.fixture
def torch_with(nvcc):
    """Makes the torch that the backend would have found."""

    def torch_with(cuda: str, *search_path: Path) -> object:
        paths = tuple(str(path) for path in search_path)
        return nvcc.apex_toolchain.Torch("2.13.0", cuda, "", "", paths, {})

    return torch_with


@pytest.fixture
def site(tmp_path) -> Path:
    """A site-packages folder that has the packages of CUDA 13.0, as far as a build looks at them."""
    folder = tmp_path / "site"
    for requirement in CUDA_13_0:
        name = requirement.partition("==")[0]
        information = folder / f"{name.replace('-', '_')}-13.0.88.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 13.0.88\n")
    files = "nvvm/bin/cicc nvvm/libdevice/libdevice.10.bc include/crt/host_config.h include/nv/target lib/libnvvm.so.4"
    for file in [*files.split(), "lib/libcudart.so.13", "lib/libcudart_static.a", "lib/libcudadevrt.a", "bin/ptxas"]:
        path = folder / "nvidia" / "cu13" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file)
    fake_nvcc(folder / "nvidia" / "cu13" / "bin" / "nvcc", "13.0.88")
    return folder


# ---- what is asked for


@pytest.mark.parametrize(
    ("cuda", "headers"),
    [("13.0", "13.0"), ("13.2", "13.2"), ("13.3", "13.3"), ("13.5", "13.3"), ("13.12", "13.3")],
)
def test_the_packages_are_those_of_torchs_cuda(nvcc, cuda, headers):
    compiler = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime")
    assert nvcc.packages(cuda) == [*(f"{name}=={cuda}.*" for name in compiler), f"nvidia-cuda-cccl=={headers}.*"]


@pytest.mark.parametrize("cuda", ["", "11.8", "12.8", "12.9", "14.0", "13", "rocm"])
def test_other_cuda_versions_have_no_packages(nvcc, cuda):
    assert nvcc.packages(cuda) == []


@pytest.mark.parametrize(
    ("setting", "cuda", "asked"),
    [
        (None, "13.0", "13.0"),
        ("", "13.2", "13.2"),
        ("auto", "13.0", "13.0"),
        ("ON", "13.0", "13.0"),
        ("off", "13.0", None),
        ("auto", "", None),
        ("on", "", None),
        ("auto", "12.8", None),
        ("on", "12.8", None),
        ("check", "", "13.0"),
        ("Check", "13.2", "13.2"),
        ("check", "12.8", None),
        ("perhaps", "13.0", None),
    ],
)
@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
def test_the_hooks_ask_for_nvcc_where_it_is_needed(nvcc, torch_with, monkeypatch, capsys, hook, setting, cuda, asked):
    backend = importlib.import_module("apex_backend")
    monkeypatch.setattr(nvcc.apex_toolchain, "check_environment", lambda: torch_with(cuda))
    if setting is not None:
        monkeypatch.setenv("APEX_FAST_CUDA", setting)
    tools = list(nvcc.apex_toolchain.BUILD_TOOLS.values())
    assert getattr(backend, hook)() == [*tools, *(nvcc.packages(asked) if asked else [])]
    notice = capsys.readouterr().err
    if asked:
        assert f"no nvcc of CUDA {asked} was found" in notice and "APEX_FAST_CUDA=off" in notice
    else:
        assert notice == ""


@pytest.mark.parametrize("place", ["CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH", "APEX_FAST_LOCAL_CUDA"])
def test_nothing_is_asked_for_where_the_machine_has_an_nvcc(nvcc, torch_with, monkeypatch, tmp_path, place):
    there = fake_nvcc(tmp_path / "toolkit" / "bin" / "nvcc", "13.1.80")
    monkeypatch.setenv(place, {"CUDACXX": str(there), "PATH": str(there.parent)}.get(place, str(tmp_path / "toolkit")))
    assert nvcc.requirements(torch_with("13.0")) == []
    assert nvcc.packaged_nvcc(torch_with("13.0")) is None


def test_an_nvcc_that_does_not_fit_is_none(nvcc, torch_with, monkeypatch, tmp_path):
    there = fake_nvcc(tmp_path / "path" / "nvcc", "12.8.93")
    assert nvcc.requirements(torch_with("13.0")) == CUDA_13_0
    monkeypatch.setenv("APEX_FAST_CUDA", "check")  # compiles with any
    assert nvcc.requirements(torch_with("13.0")) == []
    script(there, "exit 1")
    assert nvcc.requirements(torch_with("13.0")) == CUDA_13_0


def test_an_nvcc_named_in_cudacxx_is_not_replaced(nvcc, torch_with, monkeypatch, tmp_path, site):
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(tmp_path / "path" / "nvcc", "12.8.93")))
    assert nvcc.requirements(torch_with("13.0")) == []
    assert nvcc.packaged_nvcc(torch_with("13.0")) is None
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nothing"))
    assert nvcc.requirements(torch_with("13.0")) == []


def test_nothing_is_asked_for_where_the_packages_are_installed(nvcc, torch_with, tmp_path, site):
    assert nvcc.requirements(torch_with("13.0", tmp_path / "other", site)) == []
    assert nvcc.requirements(torch_with("13.2", site)) == nvcc.packages("13.2")


@pytest.mark.parametrize("name", [requirement.partition("==")[0] for requirement in CUDA_13_0])
@pytest.mark.parametrize("fault", ["missing", "of another version"])
def test_packages_that_do_not_fit_each_other_are_not_used(nvcc, torch_with, monkeypatch, site, name, fault):
    # `pip install nvidia-cuda-nvcc==13.0.*` alone brings the newest of the rest.
    information = site / f"{name.replace('-', '_')}-13.0.88.dist-info"
    if fault == "missing":
        shutil.rmtree(information)
    else:
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 13.5.37\n")
        information.rename(site / information.name.replace("13.0.88", "13.5.37"))
    monkeypatch.syspath_prepend(str(site))
    assert nvcc.requirements(torch_with("13.0", site)) == CUDA_13_0
    assert nvcc.packaged_nvcc(torch_with("13.0")) is None


# ---- what is kept


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.lstat().st_mtime_ns, p.lstat().st_ino) for p in folder.rglob("*")}


def test_the_packages_become_a_toolkit_in_the_build_folder(nvcc, torch_with, monkeypatch, tmp_path, site):
    before = listing(site)
    monkeypatch.syspath_prepend(str(site))
    found = nvcc.packaged_nvcc(torch_with("13.0"))
    tree = tmp_path / "build" / "nvcc-13.0.88"
    assert found == tree / "bin" / "nvcc"
    assert nvcc.release(found) == "13.0.88"
    for file in ("bin/ptxas", "nvvm/bin/cicc", "nvvm/libdevice/libdevice.10.bc", "include/crt/host_config.h"):
        assert (tree / file).read_text() == file
    # The two that the packages lack.
    assert (tree / "lib64" / "libcudart_static.a").read_text() == "lib/libcudart_static.a"
    assert (tree / "lib" / "libcudart.so").read_text() == "lib/libcudart.so.13"
    assert not (tree / "lib" / "libnvvm.so.4").exists()  # 60 MB that compiling does not take
    assert not [link for link in tree.rglob("*") if link.is_symlink() and os.path.isabs(os.readlink(link))]
    assert listing(site) == before
    assert [path.name for path in (tmp_path / "build").iterdir()] == ["nvcc-13.0.88"]


def test_the_next_build_finds_what_was_kept(nvcc, torch_with, monkeypatch, site):
    monkeypatch.syspath_prepend(str(site))
    first = nvcc.packaged_nvcc(torch_with("13.0"))
    before = listing(first.parents[1])
    shutil.rmtree(site)  # as pip does with an isolated environment
    assert nvcc.requirements(torch_with("13.0")) == []
    assert nvcc.packaged_nvcc(torch_with("13.0")) == first
    assert listing(first.parents[1]) == before
    # Another torch: another compiler.
    assert nvcc.requirements(torch_with("13.2")) == nvcc.packages("13.2")
    assert nvcc.packaged_nvcc(torch_with("13.2")) is None


def test_of_two_builds_at_once_the_second_uses_what_the_first_kept(nvcc, tmp_path, site):
    first = nvcc._keep(site / "nvidia" / "cu13")
    before = listing(first)
    assert nvcc._keep(site / "nvidia" / "cu13") == first
    assert listing(first) == before
    assert [path.name for path in (tmp_path / "build").iterdir()] == ["nvcc-13.0.88"]


def test_a_packaged_nvcc_that_does_not_run_is_an_error(nvcc, torch_with, monkeypatch, tmp_path, site):
    script(site / "nvidia" / "cu13" / "bin" / "nvcc", "exit 1")
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(SystemExit, match="nvidia-cuda-nvcc is there and .*nvcc does not run") as caught:
        nvcc.packaged_nvcc(torch_with("13.0"))
    assert "CUDACXX=/path/to/nvcc" in str(caught.value)
    assert not (tmp_path / "build").exists()


def test_nothing_half_copied_is_kept(nvcc, torch_with, monkeypatch, tmp_path, site):
    shutil.rmtree(site / "nvidia" / "cu13" / "nvvm")
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(FileNotFoundError, match="nvvm"):
        nvcc.packaged_nvcc(torch_with("13.0"))
    assert list((tmp_path / "build").iterdir()) == []


# ---- what CMake decides


@pytest.fixture
def decide(nvcc, tmp_path):
    """Runs cmake/cuda_decision.cmake in the environment that apex_nvcc sees; its exit status and words on one line."""
    try:
        cmake = nvcc.apex_toolchain.find_tool("cmake")
    except SystemExit:
        pytest.skip("needs cmake")

    def decide(**settings: str) -> tuple[int, str]:
        settings = {"APEX_FAST_CUDA": "auto", "APEX_TORCH_VERSION": "2.13.0", **settings}
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        command = [cmake, *definitions, "-P", SOURCE / "cmake" / "cuda_decision.cmake"]
        run = subprocess.run(command, capture_output=True, text=True)
        return run.returncode, " ".join((run.stdout + run.stderr).split())

    return decide


PLACES = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH", "APEX_FAST_LOCAL_CUDA")


@pytest.mark.parametrize("first", range(len(PLACES) + 1))
def test_cmake_and_the_backend_find_the_same_nvcc(nvcc, decide, monkeypatch, tmp_path, first):
    # An nvcc in this place and in all that come after it.
    for number, place in enumerate(PLACES[first:], first):
        there = fake_nvcc(tmp_path / place / "bin" / "nvcc", f"13.{number}.5")
        value = {"CUDACXX": there, "PATH": there.parent}.get(place, tmp_path / place)
        monkeypatch.setenv(place, str(value))
    status, words = decide(APEX_TORCH_CUDA_VERSION="13.0")
    assert status == 0
    if first == len(PLACES):
        assert nvcc.machine_nvcc() == ""
        assert "CUDA kernels off: no nvcc on PATH, in CUDA_HOME or CUDACXX" in words
    else:
        assert nvcc.release(nvcc.machine_nvcc()) == f"13.{first}.5"
        assert f"CUDA kernels on: nvcc 13.{first}, " in words


def test_cmake_takes_the_nvcc_of_the_packages_and_says_so(decide, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "old" / "bin" / "nvcc", "12.8.93").parents[1]))
    packaged = fake_nvcc(tmp_path / "build" / "bin" / "nvcc", "13.0.88")
    settings = {"APEX_TORCH_CUDA_VERSION": "13.0", "APEX_FAST_NVCC": str(packaged), "APEX_FAST_CUDA_ARCHS": "90-real"}
    decision = "nvcc 13.0, architectures 90-real, package nvidia-cuda-nvcc"
    assert decide(**settings)[1].endswith(f"CUDA kernels on: {decision}")
    assert decide(**settings, APEX_FAST_CUDA="check")[1].endswith(f"compiled and not linked (check): {decision}")


def test_without_isolation_the_command_that_brings_nvcc_is_named(nvcc, torch_with, decide, monkeypatch, tmp_path):
    missing = nvcc.missing_packages(torch_with("13.0"))
    settings = {"APEX_TORCH_CUDA_VERSION": "13.0", "APEX_NVCC_COMMAND": nvcc.pip_command(missing)}
    command = "pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' "
    status, words = decide(**settings)
    assert status == 0
    assert "CUDA kernels off: no nvcc" in words and command in words and "Without --no-build-isolation" in words
    status, words = decide(**settings, APEX_FAST_CUDA="on")
    assert status == 1
    assert "Install the CUDA toolkit 13.0, or name its compiler: CUDACXX=" in words and command in words
    # Where the machine's nvcc is of another version they help as well.
    fake_nvcc(tmp_path / "path" / "nvcc", "12.8.93")
    status, words = decide(**settings, APEX_FAST_CUDA="on")
    assert status == 1
    assert "The major versions must agree" in words and command in words


def test_with_cuda_12_a_toolkit_is_asked_for(decide):
    status, words = decide(APEX_TORCH_CUDA_VERSION="12.8", APEX_FAST_CUDA="on")
    assert status == 1
    assert "Install the CUDA toolkit 12.8" in words and "the nvcc of CUDA 13, of 12 it has none" in words
    status, words = decide(APEX_TORCH_CUDA_VERSION="12.8")
    assert status == 0
    assert "CUDA kernels off: no nvcc" in words and "pip install" not in words


# ---- compiling for real


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return unpacked_sdist(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Environment:
    """A fresh environment with torch, in which no nvcc is found; skips where pip cannot fetch one."""
    folder = tmp_path_factory.mktemp("environment")
    environment = Environment(folder, COMPILER)
    # The smallest of the packages tells.
    probe = environment.pip("download", "--no-deps", "--dest", folder / "probe", CUDA_13_0[2])
    if probe.returncode:
        pytest.skip(f"pip cannot fetch {CUDA_13_0[2]}: {(probe.stderr.strip().splitlines() or ['no reason'])[-1]}")
    assert shutil.which("nvcc", path=environment.path) is None
    environment.must("install", TORCH, "numpy", "safetensors")
    cuda = environment.run("-c", "import torch; print(torch.version.cuda or '')").stdout.strip()
    if cuda not in ("", "13.0"):
        pytest.skip(f"is about CUDA 13.0, and {TORCH} is for CUDA {cuda}")
    return environment


def build(environment: Environment, *arguments: str | Path, **settings: str) -> tuple[int, str]:
    """Runs pip with the machine's nvcc hidden, for one architecture; its exit status and all that was said."""
    settings = {"APEX_FAST_LOCAL_CUDA": str(environment.outside), "APEX_FAST_CUDA_ARCHS": "90-real", **settings}
    run = environment.pip(*arguments, "--verbose", "--no-deps", **settings)
    return run.returncode, run.stdout + run.stderr


def objects(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("csrc/**/*.o")}


@pytest.mark.slow
def test_cuda_sources_compile_with_the_nvcc_of_the_package_index(environment, source):
    status, text = build(environment, "install", "--force-reinstall", source, APEX_FAST_CUDA="check")
    assert status == 0, text
    assert "no nvcc of CUDA 13.0 was found, so it is fetched for this build" in text
    assert re.search(r"Successfully installed .*nvidia-cuda-nvcc-13\.0", text)
    facts = environment.run("-m", "apex_fast.info", "--build").stdout
    assert "compiled and not linked (check): nvcc 13.0, architectures 90-real, package nvidia-cuda-nvcc" in facts
    environment.check_works()
    # Fetched for the build, not into the environment, and nothing of the machine's toolkit had a part in it.
    assert not [name for name in environment.installed() if name.startswith("nvidia-cuda-nvcc")]
    (compiler,) = (source / "build").glob("nvcc-13.0.*/bin/nvcc")
    (commands,) = (source / "build").glob("*/compile_commands.json")
    text = commands.read_text()
    assert text.count(f'"command": "{compiler}') == len(list((source / "csrc" / "cuda").glob("*.cu"))) > 0
    assert "/usr/local/cuda" not in text + (commands.parent / "build.ninja").read_text()
    # The next build finds the compiler and what it made, though pip's environment of the first one is gone.
    before = objects(commands.parent)
    assert any(name.endswith(".cu.o") for name in before)
    status, text = build(environment, "install", "--force-reinstall", source, APEX_FAST_CUDA="check")
    assert status == 0, text
    assert "nvidia-cuda-nvcc-13" not in text and "so it is fetched" not in text
    after = objects(commands.parent)
    changed = [name for name in before if after[name] != before[name]]
    assert all(name.endswith("bindings.cpp.o") for name in changed), changed  # pybind11 is in a temporary folder too


@pytest.fixture
def torch_with_cuda(environment, tmp_path) -> Path:
    """A Python with a torch for CUDA 13.0, as far as compiling and linking look: the headers of a CPU build, which has
    all but one, and CUDA libraries without content. What is linked with them cannot be loaded."""
    real = Path(environment.run("-c", "import torch; print(torch.__path__[0])").stdout.strip())
    stand_in = tmp_path / "stand-in" / "torch"
    shutil.copytree(real / "include", stand_in / "include", copy_function=os.symlink)
    macros = stand_in / "include" / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    macros.unlink(missing_ok=True)
    macros.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    (stand_in / "lib").mkdir()
    for name in ("libtorch_cpu.so", "libc10.so"):
        (stand_in / "lib" / name).symlink_to(real / "lib" / name)
    for name in ("libtorch_cuda.so", "libc10_cuda.so"):
        subprocess.run(["g++", "-shared", "-x", "c++", "/dev/null", "-o", stand_in / "lib" / name], check=True)
    (stand_in / "__init__.py").touch()
    version = torch.__version__.split("+")[0]
    (stand_in / "version.py").write_text(f"__version__ = '{version}+cu130'\ncuda = '13.0'\n")
    return script(tmp_path / "python", f'PYTHONPATH={stand_in.parent} exec {environment.python} "$@"')


@pytest.mark.slow
def test_without_isolation_the_packages_are_named_and_the_kernels_linked_with_them(
    environment, source, torch_with_cuda, monkeypatch, tmp_path
):
    environment.must("install", *import_backend(monkeypatch, "apex_toolchain").BUILD_TOOLS.values())
    folder, packages = tmp_path / "build", tmp_path / "packages"
    arguments = ("wheel", "--no-build-isolation", "--wheel-dir", tmp_path / "wheels", source)
    settings = {
        "APEX_FAST_PYTHON": str(torch_with_cuda),
        "APEX_FAST_CUDA": "on",
        "APEX_FAST_BUILD_DIR": str(folder),
    }
    status, text = build(environment, *arguments, **settings)
    assert status != 0
    words = " ".join(text.split())
    named = re.search(r"Or without a toolkit: pip install ('.*?')\. Without --no-build-isolation", words)
    assert named and shlex.split(named[1]) == CUDA_13_0, words
    # Beside the environment, which stays as the other tests need it.
    environment.must("install", "--no-deps", "--target", packages, *CUDA_13_0)
    status, text = build(environment, *arguments, **settings, PYTHONPATH=str(packages))
    assert status == 0, text
    assert "CUDA kernels on: nvcc 13.0, architectures 90-real, package nvidia-cuda-nvcc" in text
    dynamic = subprocess.run(["readelf", "-d", folder / "_C.so"], capture_output=True, text=True, check=True).stdout
    assert "[libcudart.so.13]" in dynamic
    # Where the library is used the runtime is the one that torch brings: no path of the build is left in it.
    assert str(tmp_path) not in dynamic
