"""Loading the compiled ops: the setting, and what an import says that cannot work."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from apex_fast import _library

MEND = "pip install --force-reinstall --no-deps ."


def load_anew() -> None:
    """``load`` without its memory."""
    _library.load.__wrapped__()


def other_minor(version: str) -> str:
    major, minor, *_ = version.split("+")[0].split(".")
    return f"{major}.{int(minor) + 1}.0"


# ---- APEX_FAST_KERNELS


@pytest.mark.parametrize("value", _library.KERNEL_CHOICES)
def test_kernels_setting_takes_each_choice(monkeypatch, value):
    monkeypatch.setenv("APEX_FAST_KERNELS", value)
    assert _library.kernels_setting() == value


@pytest.mark.parametrize("value", [None, ""])
def test_kernels_setting_is_auto_where_nothing_is_set(monkeypatch, value):
    monkeypatch.delenv("APEX_FAST_KERNELS", raising=False)
    if value is not None:
        monkeypatch.setenv("APEX_FAST_KERNELS", value)
    assert _library.kernels_setting() == "auto"


def test_a_misspelt_kernels_setting_stops_loading_and_lists_the_choices(monkeypatch):
    monkeypatch.setenv("APEX_FAST_KERNELS", "compild")
    with pytest.raises(ValueError, match="'compild': expected one of auto, compiled, reference"):
        load_anew()


# ---- loading


def test_load_brings_the_ops_and_may_be_repeated():
    _library.load()
    _library.load()
    load_anew()
    assert torch.ops.apex_fast.interpolate.default is not None


def test_load_says_that_the_package_is_not_built(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "PACKAGE", tmp_path)
    with pytest.raises(ImportError, match="apex_fast is not built: there is no") as caught:
        load_anew()
    assert MEND in str(caught.value)


def test_load_names_built_and_installed_torch_when_the_minor_versions_differ(monkeypatch):
    built = other_minor(torch.__version__)
    monkeypatch.setattr(_library, "build_module", lambda: SimpleNamespace(torch_version=built))
    with pytest.raises(ImportError) as caught:
        load_anew()
    message = str(caught.value)
    assert f"built against torch {built}" in message
    assert f"torch {torch.__version__} is installed" in message
    assert MEND in message
    assert f"pip install 'torch=={built.rpartition('.')[0]}.*'" in message


def test_load_accepts_another_patch_release_of_torch(monkeypatch):
    minor = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    monkeypatch.setattr(_library, "build_module", lambda: SimpleNamespace(torch_version=f"{minor}.99+other"))
    load_anew()


def test_build_module_says_that_another_python_was_built_for(monkeypatch, tmp_path):
    (tmp_path / "_build.cpython-399-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr(_library, "PACKAGE", tmp_path)

    def fail(name: str) -> None:
        raise ImportError("no module")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ImportError, match="built for another Python: _build.cpython-399") as caught:
        _library.build_module()
    assert MEND in str(caught.value)


def test_build_module_says_that_nothing_is_built(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "PACKAGE", tmp_path)
    monkeypatch.setitem(sys.modules, "apex_fast._build", None)
    with pytest.raises(ImportError, match="has no compiled _build module"):
        _library.build_module()


# ---- a library that does not load, for real


@pytest.fixture
def broken_copy(tmp_path) -> Path:
    """A copy of the package; its op library is for the test to break. Returns that library's path."""
    source = Path(_library.__file__).parent
    shutil.copytree(source, tmp_path / "apex_fast", ignore=shutil.ignore_patterns("assets", "__pycache__", "_C.so"))
    return tmp_path / "apex_fast" / _library.OP_LIBRARY


def import_error(library: Path) -> str:
    """The last lines on stderr of importing the copy that ``library`` belongs to."""
    folder = library.parents[1]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    code = "import apex_fast; print(apex_fast.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout + run.stderr
    assert str(folder) in run.stderr
    return run.stderr[run.stderr.rindex("ImportError") :]


def assert_explains(message: str) -> None:
    assert "the compiled ops of apex_fast do not load" in message
    assert f"They were built against torch {_library.build_module().torch_version}" in message
    assert f"torch {torch.__version__} is installed" in message
    assert MEND in message


def test_import_explains_a_truncated_library(broken_copy):
    broken_copy.write_bytes((Path(_library.__file__).parent / _library.OP_LIBRARY).read_bytes()[:100])
    assert_explains(import_error(broken_copy))


def test_import_explains_a_missing_symbol(broken_copy, tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to make a library with a missing symbol")
    code = tmp_path / "missing.cpp"
    code.write_text(
        'extern "C" void a_symbol_that_torch_dropped();\nvoid* use = (void*)&a_symbol_that_torch_dropped;\n'
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", broken_copy, code], check=True)
    message = import_error(broken_copy)
    assert "a_symbol_that_torch_dropped" in message
    assert_explains(message)


def test_import_says_that_a_source_tree_is_not_built(broken_copy):
    assert "apex_fast is not built: there is no" in import_error(broken_copy)
