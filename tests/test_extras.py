"""Optional packages: the error names the extra, and the core of the library imports none of them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from apex_fast.extras import require

OPTIONAL = ("diffusers", "transformers", "accelerate", "peft", "yaml", "tensorboard", "matplotlib", "PIL", "sklearn")


def test_require_returns_the_module():
    assert require("json", extra="train") is json


def test_require_imports_submodules():
    assert require("xml.dom.minidom", extra="train").__name__ == "xml.dom.minidom"


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.part"])
def test_require_names_the_extra_that_brings_a_missing_package(module):
    with pytest.raises(ImportError, match=r"pip install 'apex_fast\[data\]'") as caught:
        require(module, extra="data")
    assert str(caught.value).startswith(module)


def test_require_passes_on_the_error_of_a_package_that_is_broken(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as caught:
        require("broken_package", extra="train")
    assert "apex_fast" not in str(caught.value)


def test_import_brings_in_no_optional_package():
    # Whatever torch itself imports is not ours to avoid.
    code = "import sys, torch; before = set(sys.modules); import apex_fast; print(*(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = {name.partition(".")[0] for name in run.stdout.split()}
    assert "apex_fast" in new
    assert not new & {*OPTIONAL, "tqdm", "tokenizers"}
