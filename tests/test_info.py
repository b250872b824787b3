"""The report of `apex-fast env`: complete, read from the dispatcher, and honest about devices without a kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from apex_fast import _library, info

# Read when the library is loaded, so the tests below cannot change what it did.
LOADED_WITH = os.environ.get("APEX_FAST_KERNELS")
OPS = ("condition_shift", "interpolate", "renoise", "shifted_velocity_loss", "mixed_velocity_loss", "sampler_step")


@pytest.fixture
def report(monkeypatch):
    monkeypatch.setenv("APEX_FAST_KERNELS", "auto")
    return info.collect()


@pytest.fixture
def new_op():
    """Defines an op in the library's namespace that nobody implements; it goes away with the test."""
    library = torch.library.Library("apex_fast", "FRAGMENT")
    library.define("op_of_a_test(Tensor x) -> Tensor")
    yield "op_of_a_test"
    library._destroy()


def in_new_process(*arguments: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "apex_fast.info", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_versions_are_those_in_use(report):
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"apex_fast", "numpy", "safetensors"} <= set(report["versions"])


def test_build_facts_are_complete(report):
    assert set(report["build"]) == {
        "torch_version",
        "cuda_version",
        "cuda_decision",
        "cuda_architectures",
        "cuda_ops",
        "compiler",
        "build_type",
        "cpu_isas",
    }
    assert report["build"]["torch_version"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert report["build"]["compiler"].startswith("GNU ")
    assert report["build"]["cpu_isas"][0] == "default"
    assert report["runtime"]["cpu_isa"] in report["build"]["cpu_isas"]


@pytest.mark.parametrize("op", [*OPS, *(f"{op}_backward" for op in OPS)])
def test_every_op_has_a_compiled_kernel_on_the_cpu(report, op):
    if LOADED_WITH == "reference":
        pytest.skip("the library was loaded with APEX_FAST_KERNELS=reference")
    assert report["ops"][op]["CPU"] == info.COMPILED
    assert report["ops"][op]["other"] == info.TWIN


def test_cuda_column_follows_what_was_built(report):
    built = () if LOADED_WITH == "reference" else report["build"]["cuda_ops"]
    for op, kernels in report["ops"].items():
        stem = op.removesuffix("_backward").removesuffix("_with_gradients")
        assert kernels["CUDA"] == (info.COMPILED if stem in built else info.TWIN)


def test_ops_are_read_from_the_dispatcher(new_op):
    assert new_op in info.op_names()
    assert info.kernel_of(new_op, "CPU") == info.MISSING


def test_functions_without_tensors_are_no_ops():
    assert hasattr(torch.ops.apex_fast, "cpu_isa")
    assert "cpu_isa" not in info.op_names()


def test_compiled_setting_refuses_devices_without_a_kernel(monkeypatch):
    monkeypatch.setenv("APEX_FAST_KERNELS", "compiled")
    assert info.kernel_of("renoise", "PrivateUse1") == info.REFUSED


def test_reference_setting_and_lower_isa_show_in_a_new_process():
    report = json.loads(in_new_process("--json", APEX_FAST_KERNELS="reference", APEX_FAST_CPU_ISA="default"))
    assert {kernels["CPU"] for kernels in report["ops"].values()} == {info.TWIN}
    assert report["runtime"]["kernels_setting"] == "reference"
    assert report["runtime"]["cpu_isa"] == "default"


def test_text_shows_what_is_installed_and_how_to_get_what_is_not(report):
    report["versions"]["diffusers"] = None
    report["extras"]["diffusers"] = "train"
    text = info.format(report)
    assert "not installed (pip install 'apex_fast[train]')" in text
    assert report["build"]["cuda_decision"] in text
    assert torch.__version__ in text
    for op in report["ops"]:
        assert any(line.startswith(f"{op} ") for line in text.splitlines())


def test_optional_packages_come_from_the_metadata(monkeypatch):
    requirements = [
        "numpy",
        'diffusers>=0.42; extra == "train"',
        "pillow; extra == 'data'",
        'ruff==1.0; extra == "dev"',
    ]
    monkeypatch.setattr(info.importlib.metadata, "requires", lambda name: requirements)
    assert info._optional_packages() == {"diffusers": "train", "pillow": "data"}


def test_main_prints_json(capsys):
    assert info.main(["--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"versions", "extras", "build", "runtime", "ops"}


def test_main_prints_text(capsys):
    assert info.main() == 0
    assert capsys.readouterr().out == info.format(info.collect()) + "\n"


def test_build_line_is_one_line(capsys):
    assert info.main(["--build"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert f"torch {_library.build_module().torch_version}" in out
    assert _library.build_module().facts()["cuda_decision"] in out
